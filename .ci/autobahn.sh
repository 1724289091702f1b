#!/bin/bash
# Installs the Autobahn test suite: .ci/autobahn.sh FOLDER; then FOLDER/wst/bin/wstest is the program.
#
# The suite needs Python 2.7; with Python 3, it installs, but does not start. This needs gcc, a CPython 2.7
# ($PYTHON2, pyenv's, or the one on the path) and a CPython from 3.8 to 3.12; it takes 40 seconds.
set -euo pipefail

folder=${1:?usage: autobahn.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)

python2=${PYTHON2:-}
if [ -z "$python2" ] && command -v pyenv >/dev/null; then
    python2=$(find "$(pyenv root)"/versions -path '*/bin/python2.7' | head -n 1)
fi
python2=${python2:-$(command -v python2.7 || true)}
[ -n "$python2" ] || { echo "there is no CPython 2.7; PYTHON2 can name one" >&2; exit 1; }

mkdir -p "$folder"
export VIRTUALENV_OVERRIDE_APP_DATA="$folder/appdata"
python3 -m venv "$folder/build"
"$folder/build/bin/pip" install -qq 'virtualenv==20.21.1' # later ones cannot make a 2.7 environment
"$folder/build/bin/virtualenv" -q -p "$python2" "$folder/wst"
"$folder/wst/bin/pip" install -qq --only-binary=autobahntestsuite \
    -c "$here/autobahn-constraints.txt" autobahntestsuite
rm -rf "$folder/build" "$folder/appdata"
"$folder/wst/bin/wstest" -a

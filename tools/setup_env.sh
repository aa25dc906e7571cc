#!/usr/bin/env bash
# Set up the environment and print its Python: .venv with the versions of requirements.txt, or, if
# the Python in use already has Detectron2, that Python as it is, with only what is missing.
# The argument names the extras of setup.py to install, as in dev,onnx (default: none).
#
#   PYTHON=python3.12    the Python to start from (default: python3)
#   DETECTRON2=SOURCE    where to get Detectron2 from: a checkout, an archive, a wheel or
#                        git+https://MIRROR/detectron2.git (default: see tools/detectron2_wheel.py)
#   TORCH_BACKEND=cpu    the build of PyTorch, for uv's --torch-backend: cpu, cu128, auto, ...
#                        (default: that of the package index)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh
set -euo pipefail
exec 3>&1 1>&2 # stdout is for the one line at the end

fail() {
    echo "setup_env.sh: error: $*"
    exit 2
}

# Paths are those of the caller's directory.
absolute() { echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; }
python=${PYTHON:-python3}
[[ $python != */* || ! -e $python ]] || python=$(absolute "$python")
[ ! -e "${DETECTRON2:-}" ] || export DETECTRON2=$(absolute "$DETECTRON2")
cd "$(dirname "$0")/.."

extras=${1:-}
known=$(sed -n '/extras_require/,$ s/^        "\(.*\)": \[.*/\1/p' setup.py | xargs)
[ $# -le 1 ] || fail "give the extras as one argument, as in dev,onnx; got '$*'."
for name in ${extras//,/ }; do
    [[ " $known " == *" $name "* ]] || fail "'$name' is not an extra of setup.py, which has: $known."
done

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "'$python' is not Python 3.11 or later: set PYTHON to one that is, as in PYTHON=python3.12."
detectron2_version() {
    "$1" -c 'import importlib.metadata as m; print(m.version("detectron2"))' 2>/dev/null
}

# What is set up already need not be looked at again.
done=.venv/.set_up/extras-$extras
state=$(cat setup.py requirements.txt | cksum)
own=$(detectron2_version "$python" || true) # of the user's own environment, which is used as it is
[ ! "$("$python" -c 'import sys; print(sys.prefix)')" -ef .venv ] || own= # activated
if [ -z "$own" ]; then # one at a time, until this one ends
    exec 9<setup.py
    "$python" - 2>/dev/null <<'END' || true # there are file systems without locks
import fcntl

try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Another set-up of this directory is running. Waiting for it ...", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
END
fi
if [ -z "$own" ] && [ -f .venv/.set_up/variables ]; then
    for name in DETECTRON2 PYTHON TORCH_BACKEND; do
        [ -z "${!name:-}" ] || grep -qxF "$name=${!name}" .venv/.set_up/variables ||
            echo "$name=${!name} is ignored, as .venv is set up already: delete it to set up anew."
    done
fi
if [ -z "$own" ] && [ -x .venv/bin/python ] && [ "$(cat "$done" 2>/dev/null)" = "$state" ]; then
    echo "$PWD/.venv/bin/python" >&3
    exit
fi

# End with the reason of an installation that failed, which is in $log, or else with "$*".
explain() {
    local proxy=${HTTPS_PROXY:-${https_proxy:-${ALL_PROXY:-}}} denied
    proxy=${proxy##*@} # without its password
    denied=$(sed -nE 's/^( *cause: )?(.*(Read-only file|[Pp]ermission denied).*)/\2/p' "$log" | tail -n 1)
    if grep -qiE 'no space left|disk quota' "$log"; then
        fail "the disk is full: the environment takes 6 GB."
    elif [ -n "$denied" ]; then
        fail "a directory cannot be written to: $denied."
    elif grep -qi certificate "$log"; then
        fail "the certificate of the package index is not trusted here: set SSL_CERT_FILE and PIP_CERT" \
            "to the file with the certificates of your network."
    elif grep -qiE 'connect|error sending request|timed out' "$log"; then
        fail "the package index cannot be reached: check the network${proxy:+ and the proxy $proxy}, or" \
            "set PIP_INDEX_URL to the address of a mirror."
    elif grep -q torch-backend "$log"; then
        fail "TORCH_BACKEND=$TORCH_BACKEND is not a build of PyTorch that uv knows: it is cpu, auto," \
            "cu128 or another that 'uv pip install --help' lists."
    fi
    cat "$log"
    [ $# -eq 0 ] || fail "$*"
    fail "the installation failed; the reason is above."
}

# Its Python may be gone since, or an interrupted set-up may have made half of it.
usable() {
    .venv/bin/python -c '' &&
        { [ -n "$uv" ] || .venv/bin/uv --version || .venv/bin/python -m pip --version; }
} >/dev/null 2>&1

# Where uv was killed or the disk was full, it takes packages for installed that lack files.
forget_half_installed() {
    "$python" - <<'END'
import csv, shutil, sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
for info in site.glob("*.dist-info"):
    record = info / "RECORD"
    rows = list(csv.reader(record.read_text().splitlines())) if record.is_file() else []
    if not rows or not all((site / file).exists() for file, sha256, _ in rows if sha256):
        shutil.rmtree(info)
END
}

temporary=$(mktemp -d)
log=$temporary/log
trap 'rm -rf "$temporary"' EXIT
# uv does not read pip's settings, where mirrors and their certificates are often kept.
index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
[ -n "${UV_INDEX_URL:-}${UV_DEFAULT_INDEX:-}" ] || [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
versions=$temporary/versions.txt
uv=$(command -v uv || true)
if [ -n "$own" ]; then
    version=$own
    # It was built against its PyTorch: replace neither.
    : >"$versions"
    # uv sees the packages of the environment itself, pip also those of other directories.
    { [ -n "$uv" ] && "$uv" pip show -q --python "$python" detectron2 2>/dev/null; } || uv=
else
    grep -v '^detectron2' requirements.txt >"$versions"
    if ! usable; then
        if [ -n "$uv" ]; then
            "$uv" venv -q --clear --python "$(command -v "$python")" .venv 2>"$log" || explain
        else
            "$python" -m venv --clear .venv 2>"$log" ||
                explain "'$python' cannot make a virtual environment: it needs its module venv (on" \
                    "Debian and Ubuntu, apt-get install python3-venv) or uv."
        fi
    fi
    python=$PWD/.venv/bin/python
    if [ -z "$uv" ]; then
        uv=$PWD/.venv/bin/uv
        "$uv" --version >/dev/null 2>&1 ||
            "$python" -m pip install -qI --disable-pip-version-check uv 2>"$log" || explain
    fi
    forget_half_installed
    version=$(detectron2_version "$python" || true)
fi

run_uv_or_pip() {
    if [ -n "$uv" ]; then
        # With bytecode, as pip: where Python may not write it, each start takes 5 seconds more.
        "$uv" pip install --python "$python" ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
            --compile-bytecode -c "$versions" "$@"
    else
        "$python" -m pip install --disable-pip-version-check -c "$versions" "$@"
    fi
}
install() {
    # The first try shows its progress on a terminal; what the second says can be read here.
    run_uv_or_pip "$@" && return
    echo "Trying once more ..."
    run_uv_or_pip "$@" 2>"$log" || explain
}

wheel=
if [ -n "$version" ]; then
    echo "Detectron2 is version $version, which $python has already."
else
    install -q pip setuptools
    wheel=$("$python" tools/detectron2_wheel.py requirements.txt "$temporary") || exit 2
fi
install ${wheel:+"$wheel"} -e ".${extras:+[$extras]}"
if [ -z "$own" ]; then
    mkdir -p .venv/.set_up
    [ -f .venv/.set_up/variables ] || printf '%s\n' "DETECTRON2=${DETECTRON2:-}" \
        "PYTHON=${PYTHON:-}" "TORCH_BACKEND=${TORCH_BACKEND:-}" >.venv/.set_up/variables
    echo "$state" >"$done"
fi
echo "$python" >&3

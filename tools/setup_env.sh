#!/usr/bin/env bash
# Set up the environment and print its Python: .venv with the versions of requirements.txt, or, if
# the Python in use already has Detectron2, that Python as it is, with only what is missing.
# The argument names the extras of setup.py to install (default: report).
#
#   PYTHON=python3.11   the Python to start from (default: python3)
#   DETECTRON2=SOURCE   where to get Detectron2 instead of GitHub: a local checkout, a wheel or
#                       git+https://MIRROR/detectron2.git
set -euo pipefail
cd "$(dirname "$0")/.."
exec 3>&1 1>&2 # stdout is for the one line at the end

fail() {
    echo "setup_env.sh: error: $*"
    exit 2
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$python' is not Python 3.10 or later: set PYTHON to one that is, as in PYTHON=python3.11."
has_detectron2() { "$1" -c 'import importlib.metadata as m; m.version("detectron2")' 2>/dev/null; }

versions=/dev/null # a Detectron2 that is installed was built against its torch: replace neither
if ! has_detectron2 "$python"; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv || fail "'$python -m venv .venv' failed."
    python=$PWD/.venv/bin/python
    versions=$(mktemp)
    trap 'rm -f "$versions"' EXIT
    grep -v '^detectron2' requirements.txt >"$versions"
fi
install() { "$python" -m pip install --disable-pip-version-check -c "$versions" "$@"; }

if ! has_detectron2 "$python"; then
    source=${DETECTRON2:-$(grep '^detectron2' requirements.txt)}
    case $source in
    *git+*)
        url=${source#*git+}
        [[ $url =~ ^(.*)@[0-9a-f]+$ ]] && url=${BASH_REMATCH[1]}
        GIT_TERMINAL_PROMPT=0 git ls-remote "$url" HEAD >/dev/null ||
            fail "Detectron2 cannot be fetched from $url: set DETECTRON2 to another source (a local" \
                "checkout, a wheel, git+https://MIRROR/detectron2.git) and run this again."
        ;;
    *)
        [ -e "$source" ] || fail "DETECTRON2=$source does not exist."
        ;;
    esac
    [[ $source == *.whl ]] || command -v "${CXX:-c++}" >/dev/null ||
        fail "Detectron2 compiles C++ code, and there is no C++ compiler: install one (on Debian and" \
            "Ubuntu, apt-get install g++) and run this again."
    install -q setuptools wheel ninja torch torchvision ||
        fail "PyTorch could not be installed; pip says why above."
    install -q --no-build-isolation "$source" ||
        fail "Detectron2 could not be built from $source; pip says why above."
fi
install -q --no-build-isolation -e ".[${1:-report}]" ||
    fail "gnws_d2 could not be installed; pip says why above."
echo "$python" >&3

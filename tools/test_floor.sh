#!/usr/bin/env bash
# Test with the lowest versions that setup.py allows, and Detectron2 v0.6, in .venv-floor.
# Arguments go to pytest.
#
#   PYTHON=python3.11   the Python to start from (default: python3)
set -euo pipefail
cd "$(dirname "$0")/.."
floor=(torch==2.4.1 torchvision==0.19.1 numpy==1.26.4 opencv-python==4.11.0.86)
others=(fvcore hotcoco hypothesis iopath matplotlib orjson pillow pycocotools pytest pytest-xdist
    setuptools tabulate tqdm)

uv=$(command -v uv || echo .venv/bin/uv) # tools/setup_env.sh puts it there
venv=$PWD/.venv-floor
python=$venv/bin/python
[ -x "$python" ] || "$uv" venv -q --python "$(command -v "${PYTHON:-python3}")" "$venv"
grep -vE '^(torch|torchvision|triton|numpy|opencv-python|detectron2)\b' requirements.txt \
    >"$venv/versions.txt"
install() { "$uv" pip install -q --compile-bytecode --python "$python" -c "$venv/versions.txt" "$@"; }
install "${floor[@]}" "${others[@]}"
wheel=$(DETECTRON2=v0.6 PATH=$PATH:$(dirname "$uv") \
    "$python" tools/detectron2_wheel.py requirements.txt "$venv")
install "$wheel"
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal \
    tests/layers tests/modeling tests/checkpoint "$@"

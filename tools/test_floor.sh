#!/usr/bin/env bash
# Test with the lowest versions that setup.py allows, in .venv-floor. Detectron2 is not compiled.
# Arguments go to pytest.
#
#   PYTHON=python3.11   the Python to start from (default: python3)
#   DETECTRON2=SOURCE   where to get Detectron2 instead of GitHub: a local checkout or
#                       git+https://MIRROR/detectron2.git
set -euo pipefail
cd "$(dirname "$0")/.."
floor=(torch==2.4.1 torchvision==0.19.1 numpy==1.26.4 opencv-python==4.11.0.86)
others=(black cloudpickle fvcore hydra-core hypothesis iopath matplotlib omegaconf orjson packaging pillow
    pycocotools pytest pytest-xdist setuptools tabulate tensorboard termcolor tqdm yacs)

venv=$PWD/.venv-floor
python=$venv/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
grep -vE '^(torch|torchvision|triton|numpy|opencv-python|detectron2)\b' requirements.txt \
    >"$venv/versions.txt"
"$python" -m pip install -q --disable-pip-version-check -c "$venv/versions.txt" \
    "${floor[@]}" "${others[@]}"

pin=$(grep '^detectron2' requirements.txt)
source=${DETECTRON2:-${pin%@*}}
if [[ $source == *git+* ]]; then
    git clone -q "${source#*git+}" "$venv/detectron2" 2>/dev/null || git -C "$venv/detectron2" fetch -q
    source=$venv/detectron2
    git -C "$source" checkout -q "${pin##*@}"
fi
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$site/detectron2"
cp -r "$source/detectron2" "$site/"
rm -f "$site"/detectron2/_C*.so # compiled against another PyTorch
cp -r "$source/configs" "$site/detectron2/model_zoo/"
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal \
    tests/layers tests/modeling tests/checkpoint "$@"

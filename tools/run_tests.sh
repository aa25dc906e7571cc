#!/usr/bin/env bash
# Set up, then run the tests, two at a time. Arguments go to pytest.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh
set -euo pipefail
python=$(bash "$(dirname "$0")/setup_env.sh" dev,hub,onnx,supervision,wandb)
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal "$@"

#!/usr/bin/env bash
# Set up, then run the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(bash tools/setup_env.sh dev,report,onnx,wandb)
"$python" -m pytest "$@"

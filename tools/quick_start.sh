#!/usr/bin/env bash
# Set up, then train, evaluate and report on a small GN+WS Mask R-CNN on the built-in data, on a CPU.
# Arguments go to train_net.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh
set -euo pipefail
python=$(bash "$(dirname "$0")/setup_env.sh")
cd "$(dirname "$0")/.."
"$python" train_net.py --config-file configs/quick_start.yaml "$@"
"$python" tools/report.py output/quick_start

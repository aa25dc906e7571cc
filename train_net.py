#!/usr/bin/env python3
"""
Train and evaluate GN+WS detectors: Detectron2's training script, with `--dataset` for your own data
and checks before work starts. What it does is in gnws_d2/engine/train_net.py.
"""

from tools.cli import main

if __name__ == "__main__":
    main("train")

#!/usr/bin/env python3
"""Train a model on your own data: `gnws finetune`."""

from cli import main

if __name__ == "__main__":
    main("finetune")

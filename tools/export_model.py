#!/usr/bin/env python3
"""Export a model as plain GN, TorchScript or ONNX: `gnws export`."""

from cli import main

if __name__ == "__main__":
    main("export")

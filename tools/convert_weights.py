#!/usr/bin/env python3
"""Convert a checkpoint from or to MMDetection's format: `gnws convert`."""

from cli import main

if __name__ == "__main__":
    main("convert")

#!/usr/bin/env python3
"""Draw what a model detects in images or a video: `gnws demo`."""

from cli import main

if __name__ == "__main__":
    main("demo")

#!/usr/bin/env python3
"""List all problems of a dataset: `gnws check-dataset`."""

from cli import main

if __name__ == "__main__":
    main("check-dataset")

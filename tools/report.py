#!/usr/bin/env python3
"""Write an HTML page about a run: `gnws report`."""

from cli import main

if __name__ == "__main__":
    main("report")

"""The checkpoints of a run, in its ``OUTPUT_DIR``."""

import contextlib
import json
import os
from pathlib import Path


def find_run_checkpoint(output_dir: str) -> str:
    """
    Return the path of the best checkpoint of a run, or else of its last one; "" if it has none.

    ``run.json`` says which files belong to the run: an earlier one in the same directory may have
    left others. Without it, as in a run of stock Detectron2, take what is there.
    """
    names = ["model_best.pth", "model_final.pth"]
    with contextlib.suppress(OSError):
        names.append(Path(output_dir, "last_checkpoint").read_text().strip())
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        start = json.loads(Path(output_dir, "run.json").read_text())[-1]
        names = [start["best_checkpoint"], start["last_checkpoint"]]
    paths = [os.path.join(output_dir, name) for name in names]
    return next(filter(os.path.isfile, paths), "")

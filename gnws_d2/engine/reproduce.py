"""The published table, measured again."""

import logging
import resource
import sys
import time
from typing import Any

import torch
from detectron2.evaluation import inference_on_dataset
from tabulate import tabulate

from .. import model_zoo
from ..checkpoint import GNWSCheckpointer
from ..utils.errors import UserError
from .checks import check_device, check_test_dataset
from .defaults import Trainer, load_config

TOLERANCE = 0.1  # AP, in percent: the published figures have one digit


def reproduce_row(name: str, dataset: str, opts: list[str], output_dir: str) -> dict[str, Any]:
    """
    Evaluate the published weights of a model.

    Args:
        name: of the model.
        dataset: a registered dataset.
        opts: KEY VALUE pairs that override the model's config.
        output_dir: where the predictions are written.

    Returns:
        ``name``; ``published`` and ``measured``, each ``{"bbox": AP, "segm": AP}`` in percent;
        ``memory_gb``, the peak of the GPU, or of the process on a CPU; ``s_per_im``, the time of
        the model for an image; or, if the weights or the data are not there, ``missing``, which
        says what is.

    Raises:
        UserError: if ``MODEL.DEVICE`` is not there, or `opts` are not taken.
    """
    (published,) = (row for row in model_zoo.table() if row["name"] == name)
    tasks = {"bbox": "box_ap", "segm": "mask_ap"}
    row: dict[str, Any] = {
        "name": name,
        "published": {t: published[key] for t, key in tasks.items() if published[key] is not None},
    }
    opts = [
        "MODEL.WEIGHTS", model_zoo.get_checkpoint_url(name),
        "DATASETS.TEST", f"({dataset!r},)", "OUTPUT_DIR", output_dir, *opts,
    ]  # fmt: skip
    cfg = load_config(model_zoo.get_config_file(name), opts)
    check_device(cfg)
    try:
        check_test_dataset(cfg)
        model = Trainer.build_model(cfg)
        GNWSCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
    except UserError as e:
        logging.getLogger(__name__).warning(f"{name}: {e}")
        return {**row, "missing": str(e)}

    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started, seconds = 0.0, []

    def before() -> None:
        nonlocal started
        started = time.perf_counter()

    def after() -> None:
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)

    results = inference_on_dataset(
        model,
        Trainer.build_test_loader(cfg, dataset),
        Trainer.build_evaluator(cfg, dataset),
        callbacks={"before_inference": before, "after_inference": after},
    )
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    warm = seconds[len(seconds) // 10 :]
    return {
        **row,
        "measured": {task: results[task]["AP"] for task in row["published"]},
        "memory_gb": (torch.cuda.max_memory_allocated() if cuda else rss) / 2**30,
        "s_per_im": sum(warm) / len(warm),
    }


def is_reproduced(row: dict[str, Any]) -> bool:
    """Whether no AP that was measured is off the published one by more than :data:`TOLERANCE`."""
    measured = row.get("measured", {})
    # Not "off by more", so that NaN is off.
    return all(
        abs(ap - row["published"][task]) <= TOLERANCE + 1e-9 for task, ap in measured.items()
    )


def format_table(rows: list[dict[str, Any]]) -> str:
    """
    Args:
        rows: of :func:`reproduce_row`.

    Returns:
        The table in Markdown: published AP is MMDetection's, the rest was measured here.
    """
    lines = []
    for row in rows:
        line = [row["name"]]
        for task in ("bbox", "segm"):
            published = row["published"].get(task)
            measured = row.get("measured", {}).get(task)
            difference = None if measured is None else f"{measured - published:+.2f}"
            line += ["" if published is None else f"{published:.1f}", measured, difference]
        line += [row.get("memory_gb"), row.get("s_per_im")]
        line += [row.get("missing") or ("ok" if is_reproduced(row) else f"off by > {TOLERANCE}")]
        lines.append(line)
    headers = ["name"]
    for task in ("box", "mask"):
        headers += [f"{task} AP published", f"{task} AP measured", "difference"]
    headers += ["memory (GB)", "s/im", "result"]
    return tabulate(
        lines,
        headers,
        tablefmt="github",
        floatfmt=("", "", ".2f", "", "", ".2f", "", ".2f", ".4f", ""),
        disable_numparse=[1, 3, 4, 6],
    )

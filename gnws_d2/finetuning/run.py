"""From a dataset to a trained model and a page about it."""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ..checkpoint import find_checkpoint
from ..engine.train_net import run
from ..report import make_report
from ..utils.errors import UserError
from .prepare import prepare


def finetune(
    data: str | None = None,
    *,
    output: str,
    train: Sequence[str] | None = None,
    val: Sequence[str] | None = None,
    model: str | None = None,
    epochs: int = 20,
    batch_size: int = 2,
    num_gpus: int = 1,
    patience: int = 0,
    augment: str | None = None,
    any_orientation: bool = False,
    resume: bool = False,
    keep_going: bool = False,
    dry_run: bool = False,
    opts: Sequence[Any] = (),
) -> str:
    """
    Derive a config from a dataset, train, evaluate the best checkpoint, and write ``report.html``.

    Examples:
    ::
        if __name__ == "__main__":  # with several processes, each of which imports the script
            best = gnws_d2.finetune("my_pictures", output="output/mine", num_gpus=2)
        predictor = gnws_d2.Predictor.from_pretrained("output/mine")

    Args:
        data: directory of a dataset: see :func:`read_dataset`.
        output: ``OUTPUT_DIR`` of the run. The config is written to ``finetune.yaml`` in it.
        train: instead of `data`, the annotation file and the image directory of a COCO dataset.
        val: the same of the validation set (default: a fifth of the images of `train`).
        model: name of a model of the zoo, or a config file (default: Mask R-CNN R-50, or Faster
            R-CNN R-50 if not all objects have masks).
        epochs: the times that each image is seen.
        batch_size: the images that a process holds at once; it accumulates the rest of a batch.
        num_gpus: the number of GPUs, or of processes with ``MODEL.DEVICE cpu``.
        patience: stop after this number of evaluations without a better AP; 0 for never.
        augment: ``INPUT.AUGMENTATION``: "none", "light" (default), or "strong", which with masks
            also pastes objects of other images.
        any_orientation: also train on images turned by 90, 180 and 270 degrees.
        resume: continue the run in `output`, with its data and config. Only `num_gpus` and `opts`
            are used.
        keep_going: leave out more than a tenth of the objects, if they cannot be used.
        dry_run: stop before the training, and write ``data/preview.html``, which shows the data.
        opts: KEY VALUE pairs that override the derived config.

    Returns:
        The path of the best checkpoint, or with `dry_run` that of the config.

    Raises:
        UserError: for the first mistake in the arguments or the data.
    """
    config_file = os.path.join(output, "finetune.yaml")
    if not resume:
        prepare(
            config_file, data=data, train=train, val=val, model=model, epochs=epochs,
            batch_size=batch_size, num_gpus=num_gpus, patience=patience, augment=augment,
            any_orientation=any_orientation, keep_going=keep_going, preview=dry_run, opts=opts,
        )  # fmt: skip
    elif not os.path.isfile(config_file):
        raise UserError(f"--output {output} has no run to --resume: no finetune.yaml in it.")
    if dry_run:
        return config_file
    job = Namespace(
        config_file=config_file, resume=resume, eval_only=False, num_gpus=num_gpus,
        num_machines=1, machine_rank=0, dist_url="auto", dataset=[], opts=[*opts],
    )  # fmt: skip
    run(job)
    best = find_checkpoint(output)
    job.eval_only, job.resume, job.opts = True, False, [*opts, "MODEL.WEIGHTS", best]
    run(job)
    make_report(output, [])
    return best

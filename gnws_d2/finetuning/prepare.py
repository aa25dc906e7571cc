"""Write what a fine-tuning starts from: the data as COCO, and a config with the reasons for it."""

import json
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from .. import model_zoo
from ..config import check_choice, choose_device, flatten_config, load_config
from ..data.augmentation import AUGMENTATIONS
from ..data.formats import Coco, Notes, describe, read_coco_files, read_dataset, root_of
from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.process import num_usable_cores
from .preview import write_preview
from .recipe import Choice, derive_recipe, has_masks
from .split import split_dataset

_MASK_MODEL, _BOX_MODEL = "mask_rcnn_R50_gnws_2x", "faster_rcnn_R50_gnws_1x"
_AUGMENTATION = "light"  # without --augment


def prepare(
    config_file: str,
    *,
    data: str | None,
    train: Sequence[str] | None,
    val: Sequence[str] | None,
    model: str | None,
    epochs: int,
    batch_size: int,
    num_gpus: int,
    patience: int,
    augment: str | None = None,
    any_orientation: bool = False,
    opts: Sequence[Any],
    keep_going: bool = False,
    preview: bool = False,
) -> None:
    """
    Write `config_file`, whose directory is ``OUTPUT_DIR``, the reasons for its values beside it
    (``NAME.choices.json``), and the data in ``data/``. Print the values, the reasons, and what was
    repaired and left out. With `preview` also write ``data/preview.html``.

    See :func:`gnws_d2.finetune` for the other arguments, and what is raised.
    """
    counts = [("epochs", epochs, 1), ("batch-size", batch_size, 1), ("num-gpus", num_gpus, 1)]
    for name, value, least in [*counts, ("patience", patience, 0)]:
        if value < least:
            raise UserError(f"--{name} is at least {least}.")
    check_choice("--augment", augment or _AUGMENTATION, AUGMENTATIONS)
    given, notes = dict(zip(opts[::2], opts[1::2])), Notes()
    boxes = model is not None and not load_config(model, [*opts]).MODEL.MASK_ON
    boxes = boxes or str(given.get("MODEL.MASK_ON")) == "False"
    skip = given.get("INPUT.ON_BAD_IMAGE") == "skip"
    splits, roots, split_reason = _read_splits(
        data, train, val, notes,
        masks=False if boxes else None, skip_bad_images=skip, keep_going=keep_going,
    )  # fmt: skip
    model = model or (_MASK_MODEL if has_masks(splits["train"]) else _BOX_MODEL)
    cfg = load_config(model, [*opts])
    choose_device(cfg)
    published = model in model_zoo.names()
    weights = model_zoo.get_checkpoint_url(model) if published else cfg.MODEL.WEIGHTS
    device_reason = "the config's"
    if cfg.MODEL.DEVICE == "cpu":
        cores = num_usable_cores()
        device_reason = f"{cores} cores, for small data; the log has the time left (eta)"
    output = os.path.dirname(os.path.abspath(config_file))
    # Named by path: another run, or a built-in dataset, may have the name of the directory.
    names = [os.path.join(output, "data", split) for split in splits]
    files = [f"{name}.json" for name in names]
    choices = [
        Choice("MODEL.WEIGHTS", weights, f"those of {model}"),
        Choice("MODEL.DEVICE", cfg.MODEL.DEVICE, device_reason),
        Choice("DATASETS.COCO", tuple(zip(names, files, roots)), "the data as COCO"),
        Choice("DATASETS.TRAIN", (names[0],), describe(splits["train"])),
        Choice("DATASETS.TEST", (names[1],), f"{describe(splits['val'])}, {split_reason}"),
        *derive_recipe(cfg, splits["train"], epochs, batch_size, num_gpus),
        *_augmentation(cfg, has_masks(splits["train"]), augment, any_orientation),
        Choice("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "images without objects teach, too"),
        Choice("SOLVER.PATIENCE", patience, "--patience"),
        Choice("OUTPUT_DIR", output, "--output"),
    ]
    choices = [c for c in choices if c.key not in given]
    cfg.defrost()
    cfg.merge_from_list([item for c in choices for item in (c.key, c.value)])
    try:
        os.makedirs(os.path.dirname(files[0]), exist_ok=True)
    except OSError as e:
        raise UserError(f"--output cannot be written: {e.strerror}: {e.filename}.") from e
    for file, coco in zip(files, splits.values()):
        _write_json(file, coco)
    _write_json(f"{os.path.splitext(config_file)[0]}.choices.json", [c._asdict() for c in choices])
    with atomic_write(config_file) as f:
        f.write(cfg.dump())
    rows = [[c.key, c.value, c.reason] for c in choices if c.key != "DATASETS.COCO"]
    values = flatten_config(cfg)  # tabulate would show the string "False" as True
    rows += [[key, values.get(key, value), "given"] for key, value in given.items()]
    print(tabulate(rows, ["key", "value", "why"], maxcolwidths=[None, 40, 60]) + "\n")
    lines = notes.lines()
    print("\n".join(lines), end="\n" if lines else "")
    if preview:
        page = os.path.join(output, "data", "preview.html")
        write_preview(page, splits, roots, lines, cfg)
        print(f"The data as it is read: {page}.")


def _augmentation(
    cfg: CfgNode, masks: bool, augment: str | None, any_orientation: bool
) -> list[Choice]:
    choices = []
    if augment or cfg.INPUT.AUGMENTATION == "none":  # or else the config's stays
        reason = "--augment" if augment else "better on small data: docs/own_data.md"
        augment = augment or _AUGMENTATION
        choices.append(Choice("INPUT.AUGMENTATION", augment, reason))
        bitmasks = masks and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask"
        if augment == "strong" and bitmasks:
            choices.append(Choice("INPUT.COPY_PASTE", 0.5, f"{reason}; the objects have masks"))
    if any_orientation:
        choices.append(Choice("INPUT.ANY_ORIENTATION", True, "--any-orientation"))
    return choices


def _read_splits(
    data: str | None,
    train: Sequence[str] | None,
    val: Sequence[str] | None,
    notes: Notes,
    **options: Any,
) -> tuple[dict[str, Coco], list[str], str]:
    """Return the COCO dict of "train" and "val", their image roots, and how they were split."""
    if data and not train and not val:
        source, splits, roots = data, read_dataset(data, notes, **options), [root_of(data)] * 2
    elif train and not data:
        source, roots = train[0], [train[1], (val or train)[1]]
        files = {"train": train, "val": val} if val else {"all": train}
        splits = read_coco_files(files, notes, **options)
    elif val and not train:
        raise UserError("--val needs --train.")
    else:
        raise UserError("Give either --data DIR or --train ANNOTATIONS.json IMAGE_ROOT.")
    reason = "the data's own split"
    if "all" in splits:
        if len(splits["all"]["images"]) < 2:
            raise UserError(f"{source} has one image, which cannot be split: give --val as well.")
        splits, reason = split_dataset(splits["all"]), "split by image, seed 0"
    for name, coco in splits.items():
        if not any(not a.get("iscrowd") for a in coco["annotations"]):
            raise UserError(f"{source}: no image of the split {name} has an object.")
    return splits, [os.path.abspath(root) for root in roots], reason


def _write_json(path: str, content: Any) -> None:
    with atomic_write(path) as f:
        f.write(json.dumps(content))  # by C code; json.dump is written in Python

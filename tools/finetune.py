#!/usr/bin/env python3
"""
Train a model on your own data, in any common format: derive the settings from the data, train,
evaluate the best checkpoint, and write a page about it.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from gnws_d2.engine.recipe import Choice

MASK_MODEL, BOX_MODEL = "mask_rcnn_R50_gnws_2x", "faster_rcnn_R50_gnws_1x"
_CONFIG = "finetune.yaml"  # in the output directory


def parse_args() -> argparse.Namespace:
    """Parse the command line, and check the paths in it, before PyTorch is imported."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: --data my_pictures --output output/mine. All choices are config keys, and "
        "KEY VALUE pairs at the end override them.",
    )
    add = parser.add_argument
    text = "dataset: COCO, YOLO, Pascal VOC, labelme, or images beside masks"
    add("--data", metavar="DIR", help=text)
    files = ("ANNOTATIONS.json", "IMAGE_ROOT")
    add("--train", nargs=2, metavar=files, help="training set in COCO format, instead of --data")
    add("--val", nargs=2, metavar=files, help="validation set (default: a fifth of the images)")
    add("--output", required=True, metavar="DIR", help="directory of the run")
    text = f"name of a model, or config file (default: {MASK_MODEL}, or {BOX_MODEL} without masks)"
    add("--model", metavar="NAME", help=text)
    add("--epochs", type=int, default=20, metavar="N", help="default: 20")
    text = "images that a process holds at once, the rest of a batch is accumulated (default: 2)"
    add("--batch-size", type=int, metavar="N", help=text)
    text = "GPUs, or processes with MODEL.DEVICE cpu (default: 1)"
    add("--num-gpus", type=int, default=1, metavar="N", help=text)
    text = "stop after N evaluations without a better AP (default: 0, never)"
    add("--patience", type=int, default=0, metavar="N", help=text)
    add("--resume", action="store_true", help="continue the run in --output")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys, after options")
    args = parser.parse_args()
    if args.resume:
        if not os.path.isfile(os.path.join(args.output, _CONFIG)):
            parser.error(f"--output {args.output} has no run to --resume: no {_CONFIG} in it")
        return args
    if bool(args.data) == bool(args.train):
        parser.error("give either --data DIR or --train ANNOTATIONS.json IMAGE_ROOT")
    if args.val and not args.train:
        parser.error("--val needs --train")
    given = {"--data": [args.data], "--train": args.train or [], "--val": args.val or []}
    for name, paths in given.items():
        for path in filter(None, paths):
            if not os.path.exists(path):
                parser.error(f"{name} {path} does not exist")
    for name in ("epochs", "batch_size", "num_gpus"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if args.patience < 0:
        parser.error("--patience is at least 0")
    return args


def finetune(args: argparse.Namespace) -> None:
    """Derive the config, train, evaluate the best checkpoint and write the report."""
    from gnws_d2.report import make_report
    from gnws_tools.train_net import run

    config_file = os.path.join(args.output, _CONFIG)
    choices = [] if args.resume else prepare(args, config_file)
    job = argparse.Namespace(
        config_file=config_file, resume=args.resume, eval_only=False, num_gpus=args.num_gpus,
        num_machines=1, machine_rank=0, dist_url="auto", dataset=[], opts=args.opts,
        choices=choices,
    )  # fmt: skip
    run(job)
    names = ("model_best.pth", "model_final.pth")
    paths = (os.path.join(args.output, name) for name in names)
    best = next(filter(os.path.isfile, paths))
    job.eval_only, job.resume, job.opts = True, False, [*args.opts, "MODEL.WEIGHTS", best]
    run(job)
    make_report(args.output, [])
    print(
        f"\nThe best checkpoint is {best}.\n"
        f"  predict: gnws demo --model {args.output} --input IMAGES --output PICTURES\n"
        f"  resume:  gnws finetune --resume --output {args.output}\n"
        f"  export:  gnws export --config-file {args.output}/config.yaml --format onnx --output "
        f"EXPORTED --images IMAGE MODEL.WEIGHTS {best}"
    )


def prepare(args: argparse.Namespace, config_file: str) -> "list[Choice]":
    """Write the data as COCO and the config of the run; return and print the choices in it."""
    from tabulate import tabulate

    from gnws_d2.config import choose_device, load_config
    from gnws_d2.engine.recipe import Choice, derive_recipe, has_masks

    splits, roots, split_reason = _read_splits(args)
    train, val = splits["train"], splits["val"]
    given = dict(zip(args.opts[::2], args.opts[1::2]))
    model = args.model or (MASK_MODEL if has_masks(train) else BOX_MODEL)
    base = load_config(model, args.opts)
    choose_device(base)
    weights = _weights(model, base)
    names = [f"{os.path.basename(os.path.abspath(args.output))}_{split}" for split in splits]
    directory = os.path.abspath(os.path.join(args.output, "data"))
    files = [os.path.join(directory, f"{split}.json") for split in splits]
    choices = [
        Choice("MODEL.WEIGHTS", weights, f"those of {model}"),
        Choice("MODEL.DEVICE", base.MODEL.DEVICE, _describe_device(base)),
        Choice("DATASETS.COCO", tuple(zip(names, files, roots)), "the data as COCO"),
        Choice("DATASETS.TRAIN", (names[0],), _describe(train)),
        Choice("DATASETS.TEST", (names[1],), f"{_describe(val)}, {split_reason}"),
        *derive_recipe(
            base,
            train,
            epochs=args.epochs,
            images_at_once=args.batch_size,
            num_processes=args.num_gpus,
        ),
        Choice("SOLVER.PATIENCE", args.patience, "--patience"),
        Choice("OUTPUT_DIR", os.path.abspath(args.output), "--output"),
    ]
    choices = [c for c in choices if c.key not in given]
    _write(splits, files, model, choices, given, config_file)
    for file, root in zip(files, roots):
        _check(file, root)
    rows = [[c.key, c.value, c.reason] for c in choices if c.key != "DATASETS.COCO"]
    rows += [[key, value, "given"] for key, value in given.items()]
    print(tabulate(rows, ["key", "value", "why"], maxcolwidths=[None, 40, 60]) + "\n")
    return choices


def _read_splits(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], str]:
    """Return the COCO dict of "train" and "val", their image roots, and how they were split."""
    from gnws_d2.data.coco_json import read_coco_json
    from gnws_d2.data.formats import complete_coco, read_dataset
    from gnws_d2.data.split import split_dataset, unify_classes
    from gnws_d2.utils.errors import UserError

    reason = "the data's own split"
    if args.data:
        splits, roots = read_dataset(args.data), [args.data] * 2
    else:
        splits = {"all": complete_coco(read_coco_json(args.train[0]))}
        roots = [args.train[1]] * 2
        if args.val:
            splits = {"train": splits["all"], "val": complete_coco(read_coco_json(args.val[0]))}
            roots[1] = args.val[1]
    source = args.data or args.train[0]
    unify_classes(splits)
    if "all" in splits:
        if len(splits["all"]["images"]) < 2:
            raise UserError(f"{source} has one image, which cannot be split: give --val as well.")
        splits, reason = split_dataset(splits["all"]), "split by image, seed 0"
    for name, coco in splits.items():
        if not any(not a.get("iscrowd") for a in coco["annotations"]):
            raise UserError(f"{source}: no image of the split {name} has an object.")
    return splits, [os.path.abspath(root) for root in roots], reason


def _check(json_file: str, image_root: str) -> None:
    """Open all images, so that training does not stop at one hours later."""
    from gnws_d2.data.check import check_dataset
    from gnws_d2.utils.errors import UserError

    errors = [i.message for i in check_dataset(json_file, image_root) if i.level == "error"]
    if errors:
        raise UserError(
            f"{json_file}: {errors[0]} ({len(errors)} errors in all: gnws check-dataset "
            f"{json_file} {image_root} lists them.)"
        )


def _weights(model: str, base: "CfgNode") -> str:
    from gnws_d2 import model_zoo

    published = model in model_zoo.names()
    return model_zoo.get_checkpoint_url(model) if published else base.MODEL.WEIGHTS


def _describe(coco: dict[str, Any]) -> str:
    return f"{len(coco['images'])} images, {len(coco['annotations'])} objects"


def _describe_device(cfg: "CfgNode") -> str:
    if cfg.MODEL.DEVICE != "cpu":
        return "the config's"
    return f"{os.cpu_count()} cores, for small data; the log tells the time that is left (eta)"


def _write(
    splits: dict[str, Any],
    files: list[str],
    model: str,
    choices: "list[Choice]",
    given: dict[str, str],
    config_file: str,
) -> None:
    import json

    from detectron2.config import CfgNode

    from gnws_d2.config import find_config_file
    from gnws_d2.utils.errors import UserError
    from gnws_d2.utils.files import atomic_write

    content = CfgNode({"_BASE_": os.path.abspath(find_config_file(model))})
    for key, value in [(c.key, c.value) for c in choices] + list(given.items()):
        *sections, name = key.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = CfgNode._decode_cfg_value(value)
    try:
        os.makedirs(os.path.dirname(files[0]), exist_ok=True)
    except OSError as e:
        raise UserError(f"--output cannot be written: {e.strerror}: {e.filename}.") from e
    for file, coco in zip(files, splits.values()):
        with atomic_write(file) as f:
            json.dump(coco, f)
    with atomic_write(config_file) as f:
        f.write(content.dump())


def main() -> None:
    args = parse_args()
    from gnws_d2.utils.errors import exit_on_user_error

    sys.exit(exit_on_user_error(finetune)(args))


if __name__ == "__main__":
    main()

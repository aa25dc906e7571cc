"""
Read a dataset of any common format as COCO, in four steps: find its files (:mod:`.tree` and the
``find`` of each format), pair pictures with labels and splits (:mod:`.tree`, :mod:`.splits`), parse
the labels (``parse`` of each format), check and settle the objects (:mod:`.settle`).
"""

import os
from collections.abc import Sequence
from typing import Any

from ...utils.errors import UserError
from ...utils.process import no_garbage_collection
from . import coco, cvat, labelme, masks, unreadable, via, voc, yolo
from .label import Label
from .settle import Coco, Notes, describe, settle
from .splits import assign_splits
from .tree import Tree, split_of_name

__all__ = ["Coco", "Notes", "describe", "read_coco_files", "read_dataset", "root_of"]

_FORMATS: dict[str, Any] = {
    "COCO": coco, "VIA": via, "CVAT for images": cvat,
    "labelme": labelme, "Pascal VOC": voc, "YOLO": yolo, "masks": masks,
}  # fmt: skip
_EXPECTED = (
    "COCO JSON (Roboflow, CVAT, FiftyOne), YOLO labels with the names of their classes, Pascal VOC "
    "XML, labelme or VIA JSON, CVAT for images, or masks in a directory 'masks'"
)
_MANY = (coco, via, cvat)  # a file for many pictures


@no_garbage_collection()
def read_dataset(data: str, notes: Notes | None = None, **options: Any) -> dict[str, Coco]:
    """
    Read the dataset in a directory, or that of a ``data.yaml`` or annotation file.

    Args:
        notes: gets what was repaired and left out.
        options: see :func:`.settle`.

    Returns:
        The COCO dict of each of "train" and "val", or of "all" if the dataset is not split.
        ``file_name`` is relative to :func:`root_of` the data, and masks are polygons or RLE.

    Raises:
        UserError: if the format is unknown or ambiguous, or names the file that cannot be used.
    """
    if not os.path.exists(data):
        raise UserError(f"--data {data}: there is no such directory.")
    tree = Tree(root_of(data))
    name, own = _find_format(tree, data)
    format, notes = _FORMATS[name], notes or Notes()
    if format is masks:
        labels = list(masks.parse_all(tree, own))
    else:
        labels = [label for file in own for label in format.parse(tree, file)]
    labels = _pair(tree, labels, format, notes, **options)
    if format in _MANY and len(own) > 1:
        for label in labels:
            label.split = split_of_name(label.file)
    labels = assign_splits(tree, labels)
    if format in _MANY and any(label.split != "all" for label in labels):
        for label in labels:  # of a file without a split, among files with one
            label.split = label.split.replace("all", "train")
    return _join_splits(tree, settle(labels, tree.classes, notes, **options))


def root_of(data: str) -> str:
    """The directory of the dataset that is given by its directory or by a file in it."""
    if os.path.isdir(data):
        return data
    directory = os.path.dirname(os.path.abspath(data))
    is_for_labels = os.path.basename(directory).lower() in ("annotations", "labels")
    return os.path.dirname(directory) if is_for_labels else directory


@no_garbage_collection()
def read_coco_files(
    files: dict[str, Sequence[str]], notes: Notes | None = None, **options: Any
) -> dict[str, Coco]:
    """
    Read the annotation file and the image directory of each split; see :func:`read_dataset`. Return
    the COCO dict of each split, whose ``file_name`` is relative to the image directory.
    """
    labels: list[Label] = []
    classes: dict[str, int] = {}
    notes = notes or Notes()
    for split, (file, root) in files.items():
        tree = Tree(root)
        tree.classes = classes
        own = list(coco.parse(tree, os.path.abspath(file)))
        for label in _pair(tree, own, coco, notes, **options):
            label.split = split
            labels.append(label)
    return settle(labels, classes, notes, **options)


def _find_format(tree: Tree, data: str) -> tuple[str, list[str]]:
    given = None if os.path.isdir(data) else os.path.relpath(os.path.abspath(data), tree.root)
    if given and given.lower().endswith(".json"):
        tree.files = [f for f in tree.files if f == given or not f.lower().endswith(".json")]
    elif given and not given.lower().endswith((".yaml", ".yml")):
        raise UserError(f"--data {data} is neither a directory, nor a data.yaml, nor a JSON file.")
    elif given:
        tree.yamls = {given: tree.yamls.get(given, {})}
    found = {name: own for name, format in _FORMATS.items() if (own := format.find(tree))}
    for name in ("masks", "YOLO"):  # which may lie beside others as leftovers of a tool
        if len(found) > 1:
            found.pop(name, None)
    if not found:
        unreadable.explain(tree)
        kinds = sorted({os.path.splitext(file)[1] or file for file in tree.files})
        what = f"{len(tree.files)} files ({', '.join(kinds[:8])})" if tree.files else "no files"
        raise UserError(f"--data {data} holds {what}, and none of {_EXPECTED}.")
    if len(found) > 1:
        what = " and ".join(f"{name} ({own[0]})" for name, own in found.items())
        raise UserError(f"--data {data} holds {what}: leave one of them, or use --train and --val.")
    return next(iter(found.items()))


def _pair(tree: Tree, labels: list[Label], format: Any, notes: Notes, **options) -> list[Label]:
    """Find the picture of each label. Return the labels, with empty ones of other pictures."""
    of_picture: dict[str, Label] = {}
    orphans = []
    for label in labels:
        if label.named is None and not label.stems:  # objects of no picture
            orphans.append(label)
            continue
        # A file with absolute path is not in the tree: its pictures are below the root.
        file = "" if os.path.isabs(label.file) else label.file
        label.picture = tree.find_picture(file, label.named, label.stems)
        if label.picture is None:
            name = label.named or label.stems[0]
            what = f"{tree.path(label.file)} has no picture: there is no {name} in {tree.root}."
            if not options.get("skip_bad_images"):
                raise UserError(what)
            notes.left_out["label without a picture"].append(what)
        elif label.picture not in of_picture:
            of_picture[label.picture] = label
            label.path = tree.path(label.picture)
        elif (other := of_picture[label.picture]).file != label.file and format in _MANY:
            _join(tree, other, label)
        else:
            what = f"have labels of the same picture, {other.path}: remove one."
            raise UserError(f"{tree.path(label.file)} and {tree.path(other.file)} {what}")
    pictures = [p for p in tree.pictures if p not in of_picture] if format not in _MANY else []
    # Others in a directory with labels show nothing of the classes, where formats say so.
    with_labels = {os.path.dirname(p) for p in of_picture} if format in (yolo, masks) else set()
    if left := [p for p in pictures if os.path.dirname(p) not in with_labels]:
        notes.left_out["picture without a label"] += [tree.path(p) for p in left]
    empty = [p for p in pictures if os.path.dirname(p) in with_labels]
    labels = [Label("", picture=picture, path=tree.path(picture)) for picture in empty]
    return [*of_picture.values(), *labels, *orphans]


def _join(tree: Tree, label: Label, other: Label) -> None:
    """Add the objects that another file of the same split has for the same picture."""
    splits = {split_of_name(file).replace("all", "train") for file in (label.file, other.file)}
    known = {(o.name, str(o.box), str(o.segmentation)) for o in label.objects}
    twice = any((o.name, str(o.box), str(o.segmentation)) in known for o in other.objects)
    if twice or len(splits) > 1:
        what = "have the same objects of" if twice else "are for two splits, and both have"
        files = f"{tree.path(label.file)} and {tree.path(other.file)}"
        raise UserError(f"{files} {what} the picture {label.path}: remove one.")
    label.objects += other.objects


def _join_splits(tree: Tree, splits: dict[str, Coco]) -> dict[str, Coco]:
    if not splits:
        raise UserError(f"--data {tree.root}: no image of it can be used.")
    if splits.keys() == {"all"}:
        return splits
    if "train" not in splits:
        raise UserError(
            f"--data {tree.root} has the splits {', '.join(splits)}: one of them has to "
            "be train, or none is named."
        )
    if "all" in splits:
        raise UserError(
            f"--data {tree.root}: {splits['all']['images'][0]['file_name']} is in no split, but "
            "others are in train: put all into splits, or none."
        )
    val = splits.get("val") or splits.get("test")
    return {"train": splits["train"], "val": val} if val else {"all": splits["train"]}

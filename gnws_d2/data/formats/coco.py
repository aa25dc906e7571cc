"""COCO as exporters lay it out: a JSON file for each split, images anywhere beside or below it."""

import os
from collections import defaultdict

from ...utils.errors import UserError
from ..check import read_coco_json
from ..dataset_mapper import image_size
from .dataset import Coco, complete_coco, is_image, read_json, split_of


def find(root: str, files: list[str]) -> list[str]:
    """Return the label files of this format among the files below `root`."""
    found = []
    for file in (f for f in files if f.lower().endswith(".json")):
        content = read_json(root, file)
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            found.append(file)
    return found


def read(root: str, files: list[str], own: list[str]) -> dict[str, Coco]:
    """See :func:`.read_dataset`; `own` are the files that :func:`find` returns."""
    by_name = defaultdict(list)
    for file in filter(is_image, files):
        by_name[os.path.basename(file)].append(file)
    splits: dict[str, Coco] = {}
    for json_file in own:
        split = split_of(json_file) if len(own) > 1 else "all"
        if split in splits or (split == "all" and len(own) > 1):
            raise UserError(
                f"--data {root} holds the annotation files {', '.join(own)}: name one train and "
                "one val, or use --train and --val."
            )
        coco = read_coco_json(os.path.join(root, json_file))
        for image in coco["images"]:
            name = os.path.normpath(str(image.get("file_name")).replace("\\", "/"))
            near = by_name[os.path.basename(name)]
            candidates = [f for f in near if f == name or f.endswith(os.sep + name)] or near
            directory = os.path.dirname(json_file)
            beside = [f for f in candidates if directory and f.startswith(directory + os.sep)]
            beside = beside or [f for f in candidates if split_of(f) in (split, "all")]
            candidates = beside or candidates
            if len(candidates) != 1:
                what = f"{len(candidates)} files called that" if candidates else "no such image"
                raise UserError(f"{json_file} names {name}, but there is {what} in {root}.")
            (image["file_name"],) = candidates
            if not {"width", "height"} <= image.keys():
                size = image_size(os.path.join(root, candidates[0]))
                image["width"], image["height"] = size
        splits[split] = complete_coco(coco)
    return splits

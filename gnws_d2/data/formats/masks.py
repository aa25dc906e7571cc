"""
Masks: ``images/a.jpg`` with ``masks/a.png`` of instance numbers, or with a mask for each object in
``masks/a/`` or ``masks/a_*.png``; or ``a/images/a.png`` with ``a/masks/*.png``.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...utils.errors import UserError
from .dataset import Coco, Dataset, encode_mask, is_image, split_of

_ONE_CLASS = "object"  # masks have no names


def find(root: str, files: list[str]) -> list[str]:
    """Return the label files of this format among the files below `root`."""
    return [f for f in filter(is_image, files) if "masks" in Path(f).parts[:-1]]


def read(root: str, files: list[str], own: list[str]) -> dict[str, Coco]:
    """See :func:`.read_dataset`; `own` are the files that :func:`find` returns."""
    dataset = Dataset(root, [_ONE_CLASS])
    masks: dict[str, list[str]] = defaultdict(list)
    for file in own:
        masks[os.path.dirname(file)].append(file)
    pictures = [f for f in filter(is_image, files) if "images" in Path(f).parts[:-1]]
    num_beside: dict[str, int] = defaultdict(int)
    for file in pictures:
        num_beside[os.path.dirname(file)] += 1
    used = set()
    for file in pictures:
        directory, stem = os.path.dirname(file), os.path.splitext(os.path.basename(file))[0]
        parts = list(Path(directory).parts)
        parts[len(parts) - 1 - parts[::-1].index("images")] = "masks"
        beside = os.path.join(*parts)
        of_image = masks.get(os.path.join(beside, stem), [])
        if not of_image:
            names = {f: os.path.splitext(os.path.basename(f))[0] for f in masks.get(beside, [])}
            of_image = [f for f, name in names.items() if name == stem]
            of_image = of_image or [f for f, n in names.items() if n.startswith(f"{stem}_")]
            if not of_image and num_beside[directory] == 1:
                of_image = list(names)
        if not of_image:
            raise UserError(
                f"{os.path.join(root, file)} has no mask: there is neither {beside}/{stem}.png nor "
                f"{beside}/{stem}/*.png."
            )
        used.update(of_image)
        split = split_of(directory)
        image = dataset.add_image(file, split)
        for mask_file in of_image:
            for rle in _read_instances(os.path.join(root, mask_file), image, len(of_image) > 1):
                dataset.add_object(split, image, _ONE_CLASS, segmentation=rle)
    if left := sorted(set(own) - used):
        raise UserError(f"{os.path.join(root, left[0])} is the mask of no image.")
    return dataset.finish()


def _read_instances(path: str, image: dict[str, Any], is_one: bool) -> list[dict[str, Any]]:
    """Return the RLE of each object in a mask; with `is_one` of all that is not 0."""
    mask = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    size = (image["height"], image["width"])
    if mask is None or mask.shape[:2] != size:
        shape = "no image" if mask is None else f"of {mask.shape[1]}x{mask.shape[0]}"
        raise UserError(f"The mask {path} is {shape}, but its image of {size[1]}x{size[0]}.")
    if mask.ndim == 3:  # a color for each object; alpha is none
        mask = mask[:, :, :3].astype(np.int64) @ [1, 256, 65536]
    numbers = [n for n in np.unique(mask) if n != 0]
    if is_one:
        return [encode_mask(mask != 0)] if numbers else []
    if len(numbers) == 1:  # not numbers, but foreground: its separate parts are the objects
        _, mask = cv2.connectedComponents((mask != 0).astype(np.uint8))
        numbers = list(range(1, mask.max() + 1))
    return [encode_mask(mask == number) for number in numbers]

"""Pascal VOC: an XML file for each image, with boxes whose pixels count from 1."""

import os
from pathlib import Path
from xml.etree import ElementTree

from ...utils.errors import UserError
from .dataset import Coco, Dataset, is_image, split_of


def find(root: str, files: list[str]) -> list[str]:
    """Return the label files of this format among the files below `root`."""
    return [f for f in files if f.endswith(".xml") and b"<annotation" in _head(root, f)]


def _head(root: str, file: str) -> bytes:
    with open(os.path.join(root, file), "rb") as f:
        return f.read(1000)


def read(root: str, files: list[str], own: list[str]) -> dict[str, Coco]:
    """See :func:`.read_dataset`; `own` are the files that :func:`find` returns."""
    listed = {
        name: split
        for split in ("train", "val", "test")
        for file in files
        if file.endswith(f"ImageSets/Main/{split}.txt")
        for name in Path(root, file).read_text().split()
    }
    images = {os.path.splitext(os.path.basename(f))[0]: f for f in filter(is_image, files)}
    dataset = Dataset(root)
    for file in own:
        path, stem = os.path.join(root, file), os.path.splitext(os.path.basename(file))[0]
        if stem not in images:
            raise UserError(f"{path} has no image: there is no {stem}.jpg or so in {root}.")
        split = listed.get(stem, "test") if listed else split_of(os.path.dirname(file))
        image = dataset.add_image(images[stem], split)
        try:
            for item in ElementTree.parse(path).iter("object"):
                x1, y1, x2, y2 = (
                    float(item.findtext(f"bndbox/{key}") or "")
                    for key in ("xmin", "ymin", "xmax", "ymax")
                )
                box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
                crowd = int(item.findtext("difficult") or 0)
                name = item.findtext("name") or ""
                dataset.add_object(split, image, name, bbox=box, iscrowd=crowd)
        except (ElementTree.ParseError, ValueError) as e:
            raise UserError(f"{path} is not a Pascal VOC annotation: {e}.") from e
    return dataset.finish()

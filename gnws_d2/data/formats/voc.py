"""Pascal VOC: an XML file for each picture, with boxes whose pixels count from 1."""

import re
from collections.abc import Iterator

from ..check import to_numbers
from .label import Label, Object
from .tree import Tree, stem


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    files = tree.with_suffix(".xml")
    return [f for f in files if re.search(rb"<annotation[\s>]", tree.head(f))]


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the label of a picture."""
    root = tree.xml(file)
    label = Label(file, root.findtext("filename", "").strip(), (stem(file),))
    label.size = [root.findtext(f"size/{key}") for key in ("width", "height")]
    for number, item in enumerate(root.iter("object"), 1):
        name, difficult = (item.findtext(key, "").strip() for key in ("name", "difficult"))
        object = Object(f"{tree.path(file)}, object {number}", name)
        object.crowd = difficult.lower() in ("1", "true", "yes")
        corners = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if values := to_numbers(corners):
            x1, y1, x2, y2 = values
            object.box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        nodes = item.findall("polygon/pt/*") or item.findall("polygon/*")  # the first: LabelMe's
        if points := to_numbers([node.text for node in nodes]):
            object.segmentation = [points]
        if not object.name:
            object.fault = "it has no name"
        elif object.box is None and not object.segmentation:
            what = "rotated box" if item.find("robndbox") is not None else "box"
            object.fault = f"it has a {what} without xmin, ymin, xmax and ymax: {corners}"
        label.objects.append(object)
    yield label

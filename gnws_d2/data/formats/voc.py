"""Pascal VOC: an XML file for each picture, with boxes whose pixels count from 1."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from ...utils.errors import UserError
from .label import Label, Object, to_number
from .tree import Tree, stem

_TRUE = ("1", "true", "yes")


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    files = tree.with_suffix(".xml")
    return [f for f in files if re.search(rb"<annotation[\s>]", tree.head(f))]


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the label of a picture."""
    try:
        root = ElementTree.parse(tree.path(file)).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as e:
        raise UserError(f"{tree.path(file)} is not valid XML: {e}.") from e
    label = Label(file, (root.findtext("filename") or "").strip(), (stem(file),))
    label.size = [root.findtext(f"size/{key}") for key in ("width", "height")]
    for number, item in enumerate(root.iter("object"), 1):
        object = Object(
            f"{tree.path(file)}, object {number}", (item.findtext("name") or "").strip()
        )
        object.crowd = (item.findtext("difficult") or "").strip().lower() in _TRUE
        corners = [item.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        values = [to_number(corner) for corner in corners]
        if None not in values:
            x1, y1, x2, y2 = (v or 0.0 for v in values)
            object.box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        nodes = item.findall("polygon/pt/*") or item.findall("polygon/*")  # the first: LabelMe's
        points = [to_number(node.text) for node in nodes]
        if points and None not in points:
            object.segmentation = [[v or 0.0 for v in points]]
        if not object.name:
            object.fault = "it has no name"
        elif object.box is None and not object.segmentation:
            what = "rotated box" if item.find("robndbox") is not None else "box"
            object.fault = f"it has a {what} without xmin, ymin, xmax and ymax: {corners}"
        label.objects.append(object)
    yield label

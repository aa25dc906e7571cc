"""
Masks: an image for each picture, with a number or color for each object, or with all objects in one
value; or an image for each object, in a directory of the picture's name or with its name in front.
"""

import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Iterator

from ...utils.errors import UserError
from .label import Label, Object
from .mask_files import Reading, read_class_names, read_objects, read_values
from .tree import MASK_DIRECTORY, MASK_STEM, Tree, map_files, stem, stems_before

_VOID = 255  # beside numbers


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    if any("segmentationobject" in f.lower() for f in tree.masks):  # beside the same by class
        return [f for f in tree.masks if "segmentationclass" not in f.lower()]
    return tree.masks


def parse_all(tree: Tree, files: list[str]) -> Iterator[Label]:
    """Read the labels of all pictures, with one meaning of the values in all masks."""
    of_picture: dict[str, list[str]] = defaultdict(list)
    for file in files:
        of_picture[tree.find_picture(file, None, _stems(file)) or file].append(file)
    is_one = {f: len(own) > 1 or _is_part(f, p) for p, own in of_picture.items() for f in own}
    jobs = [tree.path(file) for file in files], [is_one[file] for file in files]
    values = dict(zip(files, map_files(read_values, "Reading masks", *jobs)))
    whole = {f: v for f, v in values.items() if not is_one[f]}
    blurred = any(v.is_blurred for v in values.values())
    if bad := [f for f, v in values.items() if blurred and not v.is_two_valued]:
        raise UserError(
            f"{tree.path(bad[0])} has values that compression or resizing has changed, so that its "
            "objects cannot be told apart: save masks as PNG, without smoothing."
        )
    numbers = {n for v in whole.values() for n in v.numbers}
    if _VOID in numbers and 0 < max(numbers - {_VOID}, default=0) < 200:
        numbers.discard(_VOID)
    by_class = "segmentationclass" in files[0].lower()
    several = any(len(v.numbers) > 1 for v in whole.values()) or len(numbers) > 1
    reading = Reading(blurred, several and not blurred, by_class, numbers, read_class_names(tree))
    objects = map_files(
        read_objects, "Reading objects of masks", *jobs, values.values(), itertools.repeat(reading)
    )
    found = dict(zip(files, objects))
    if reading.numbers and not by_class and any(apart for _, apart in found.values()):
        logging.getLogger(__name__).warning(
            f"--data {tree.root}: some values of the masks have separate parts. The values are "
            "read as numbers of objects; masks with numbers of classes need a file for each object."
        )
    for own in of_picture.values():
        label = Label(own[0], None, _stems(own[0]), values[own[0]].size)
        for file in own:
            for name, rle in found[file][0]:
                where = tree.path(file)
                label.objects.append(Object(where, name, segmentation=rle, encoded=True))
        yield label


def _stems(file: str) -> tuple[str, ...]:
    """The names that the picture of a mask may have, the likeliest first."""
    name, directories = stem(file), file.split("/")[:-1]
    stems = [name]
    if match := re.fullmatch(MASK_STEM, name, re.I):
        stems.append(match[1])
    stems += stems_before(stems[-1])[1:]
    above = [d for d in reversed(directories) if not re.fullmatch(MASK_DIRECTORY, d.lower())]
    in_own = directories and above and above[0] == directories[-1]  # masks/a/0.png
    return (above[0], *stems, *above[1:]) if in_own else (*stems, *above)


def _is_part(file: str, picture: str) -> bool:
    """Whether a mask has another name than its picture, so that it is one object of several."""
    name, own = stem(file).lower(), stem(picture).lower()
    match = re.fullmatch(MASK_STEM, name)
    return own not in (name, match and match[1])

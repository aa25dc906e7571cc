"""Find image files."""

import os
from glob import escape, glob

from ..data.dataset_mapper import IMAGE_SUFFIXES


def find_images(path: str) -> list[str]:
    """
    Return the sorted image files at a path.

    Args:
        path: a file of any name, a directory, or a pattern such as ``images/*.jpg``.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = glob(os.path.join(escape(path), "*"))
        found = [file for file in found if file.lower().endswith(IMAGE_SUFFIXES)]
    else:
        found = [path] if os.path.exists(path) else glob(path)
    return sorted(map(os.path.normpath, found))

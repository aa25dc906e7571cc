"""Open whatever people have of a picture: a file, an address, bytes, a PIL image or an array."""

import os
import urllib.request
from glob import escape, glob
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..data.dataset_mapper import IMAGE_SUFFIXES, BadImageError, decode_image, read_image

_TIMEOUT = 30  # seconds without an answer
_TAKES = (
    "give a path, URL, PIL image, bytes of an image file, or uint8 array of shape (H, W, 3) in BGR "
    "order"
)


def open_picture(source: Any) -> np.ndarray:
    """
    Open a picture as in training: the EXIF orientation is applied, and alpha is dropped.

    Args:
        source: the path or http(s) URL of an image file, its bytes, a PIL image, or a uint8 array
            of shape (H, W, 3) or (H, W, 4), in the order BGR(A), or (H, W) or (H, W, 1), gray.

    Returns:
        (H, W, 3), uint8, BGR.

    Raises:
        BadImageError: a ValueError, if it is anything else, or cannot be read.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return decode_image(_download(source), source, "BGR")
    if isinstance(source, str | Path):
        return read_image(os.path.expanduser(source), "BGR")
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source), "given as bytes", "BGR")
    if isinstance(source, Image.Image):
        return _from_pil(source)
    shown = (
        repr(source) if source is None or source in ([], ()) else f"of type {type(source).__name__}"
    )
    raise BadImageError(f"The picture is {shown}: {_TAKES}.")


def _from_array(image: np.ndarray) -> np.ndarray:
    planes = image[:, :, None] if image.ndim == 2 else image
    if planes.dtype != np.uint8 or planes.ndim != 3 or planes.shape[2] not in (1, 3, 4):
        raise BadImageError(
            f"The picture is an array of shape {image.shape} and type {image.dtype}: {_TAKES}."
        )
    if not planes.size:
        raise BadImageError(f"The picture is an array without pixels, of shape {image.shape}.")
    return np.repeat(planes, 3, axis=2) if planes.shape[2] == 1 else planes[:, :, :3]


def _from_pil(image: Image.Image) -> np.ndarray:
    # Pillow cuts off the lower half of the colors of 16 bits when it loads a file.
    if image.mode[0] in "IF" or ";16" in str(getattr(image, "tile", "")):
        raise BadImageError(f"The PIL image is not of 8 bits (mode {image.mode}): convert it.")
    try:
        rgb = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError) as e:  # of a damaged file, which Pillow reads only now
        raise BadImageError(f"The PIL image cannot be read: {e}.") from e
    return _from_array(rgb[:, :, ::-1])


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, HTTPException) as e:
        raise BadImageError(f"Cannot download the image {url}: {e}.") from e


def sample_image() -> str:
    """Return the path of a photograph: Grace Hopper, by J. S. Davis, US Navy, public domain."""
    return str(Path(__file__).parent / "sample.jpg")


def find_images(path: str | Path) -> list[str]:
    """Return the sorted image files of a directory, a pattern like ``images/*.jpg``, or a file."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = glob(os.path.join(escape(path), "*"))
        found = [file for file in found if file.lower().endswith(IMAGE_SUFFIXES)]
    else:
        found = [path] if os.path.exists(path) else glob(path, recursive=True)
    return sorted(map(os.path.normpath, found))


def num_frames(file: str) -> int:
    """Return the number of frames or pages of a file; :func:`read_image` reads the first."""
    with Image.open(file) as image:
        # A camera's MPO file is a JPEG with small copies.
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)

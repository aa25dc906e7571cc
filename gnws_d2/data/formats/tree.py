"""The files of a dataset: the picture that a label belongs to, and the split of a picture."""

import contextlib
import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import yaml
from tqdm import tqdm

from ...utils.errors import UserError
from ...utils.process import num_usable_cores
from ..check import parse_json
from ..dataset_mapper import IMAGE_SUFFIXES

_LEFT_BEHIND = r"\.|__MACOSX$|.*[Vv]isuali[sz]ation$"  # directories
_SPLITS = {
    "train": r"train(ing)?[\d_-]*",
    "val": r"val(id(ation)?)?[\d_-]*",
    "test": r"test(ing)?[\d_-]*",
}
# Directories that say what their files are, and nothing about which of them belong together.
_ROLES = {
    "images", "image", "imgs", "img", "jpegimages", "pngimages", "pictures", "photos", "data",
    "labels", "label", "annotations", "annotation", "annots", "ann", "anns", "xml", "xmls", "json",
}  # fmt: skip
MASK_DIRECTORY = r"(?P<of>.*?)[_-]?masks?|segmentation.*|gts?|ground_?truths?|trimaps?"
_MAYBE_MASK_DIRECTORY = r"labels?|annotations?|instances?"  # if images are elsewhere
MASK_STEM = r"(.+?)[_-](mask|label|seg|segmentation|gt|instances?)"


class Tree:
    """
    The files below a directory, without hidden ones and what tools leave behind. Symbolic links in
    the directory are followed. Paths are relative to it, in natural order (2 before 10).
    """

    def __init__(self, root: str):
        self.root = root
        self.files = sorted(_walk(root), key=natural_key)
        images = self.with_suffix(*IMAGE_SUFFIXES)
        others = set(self.files).difference(images)
        masks = _find_masks(images, {os.path.splitext(file)[0] for file in others})
        self.pictures = [f for f in images if f not in masks]
        self.masks = [f for f in images if f in masks]
        self.classes: dict[str, int] = {}  # the number of each, from 1, as the data numbers them
        self._of_stem: dict[str, list[str]] = defaultdict(list)
        for picture in self.pictures:
            self._of_stem[stem(picture).lower()].append(picture)
        self._by_lower = {file.lower(): file for file in self.files}

    def path(self, file: str) -> str:
        """The path of a file, for messages and for opening it."""
        return os.path.join(self.root, file)

    def head(self, file: str) -> bytes:
        """The first 1,000 bytes of a file."""
        with open(self.path(file), "rb") as f:
            return f.read(1000)

    def xml(self, file: str) -> ElementTree.Element:
        """The root of an XML file. Raise UserError if it is not valid."""
        try:
            return ElementTree.parse(self.path(file)).getroot()
        except (ElementTree.ParseError, ValueError, LookupError) as e:
            raise UserError(f"{self.path(file)} is not valid XML: {e}.") from e

    def with_suffix(self, *suffixes: str) -> list[str]:
        """The files with one of some suffixes, in lower or upper case."""
        return [f for f in self.files if f.lower().endswith(suffixes)]

    @functools.cached_property
    def jsons(self) -> dict[str, Any]:
        """The content of the JSON files that can be read, by file."""
        contents = {}
        for file in self.with_suffix(".json"):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                content = contents[file] = parse_json(Path(self.path(file)).read_bytes())
                if isinstance(content, dict) and "shapes" in content:
                    content.pop("imageData", None)  # labelme's copy of the picture
        return contents

    @functools.cached_property
    def yamls(self) -> dict[str, dict[str, Any]]:
        """The content of the YAML files that hold keys, by file. Others may be a program's."""
        contents = {}
        for file in self.with_suffix(".yaml", ".yml"):
            text = read_text(self.path(file))
            try:
                content = yaml.safe_load(text)
            except (ValueError, yaml.YAMLError) as e:
                if not re.search(r"^\W*(names|train)\W*:", text, re.M):
                    continue
                raise UserError(f"{self.path(file)} is not valid YAML: {e}") from e
            if isinstance(content, dict):
                contents[file] = content
        return contents

    def find_picture(self, label: str, named: str | None, stems: Iterable[str]) -> str | None:
        """
        Find the picture of a label file, by the first of these that exists: the longest end of the
        path or URL that is `named` in it, and the names without suffix `stems`, in their order. Of
        several pictures the nearest: in the directory of the label, in the one that mirrors it, in
        the same split. Raise :class:`UserError` if several are equally near.
        """
        # Of a URL the path; urllib refuses some.
        url = re.match(r"[a-z][a-z0-9+.-]*://[^/?#]*([^?#]*)", named or "", re.I)
        parts = _parts(url[1] if url else named or "")
        for start in range(len(parts)):
            end = [part.lower() for part in parts[start:]]
            of_stem = self._of_stem.get(stem(end[-1]), [])
            found = [p for p in of_stem if p.lower().split("/")[-len(end) :] == end]
            if found:
                beside = "/".join([*label.split("/")[:-1], *parts[start:]])
                if beside in found:
                    return beside
                return self._nearest(label, found, parts[-1])
        for name in (*stems, *map(stem, parts[-1:])):
            if found := self._of_stem.get(name.lower(), []):
                return self._nearest(label, found, name)
        return None

    def _nearest(self, label: str, pictures: list[str], name: str) -> str:
        if len(pictures) > 1:
            distances = [_distance(label, picture, name) for picture in pictures]
            nearest = min(distances)
            pictures = [p for p, d in zip(pictures, distances) if d == nearest]
        if len(pictures) > 1:
            raise UserError(
                f"{self.path(label)} may belong to {self.path(pictures[0])} or to "
                f"{self.path(pictures[1])}: rename or remove one."
            )
        return pictures[0]

    def find_listed(self, entry: str, bases: Iterable[str]) -> set[str] | None:
        """
        Find the pictures that an entry of a split names: a directory, a list file or a picture,
        relative to one of the directories `bases` or to the root; of a path that does not exist,
        its longest end that does. Return None if there is nothing that it may name.
        """
        parts = _parts(entry) or [""]
        for start in range(len(parts)):
            for base in (*bases, ""):
                path = os.path.normpath(os.path.join(base, *parts[start:]))
                prefix = "" if path == "." else f"{path}/".lower()
                if inside := {p for p in self.pictures if p.lower().startswith(prefix)}:
                    return inside
                if file := self._by_lower.get(path.lower()):
                    return self._read_list(file) if path.lower().endswith(".txt") else {file}
        return None

    def _read_list(self, file: str) -> set[str]:
        """Read the pictures that a list file names, a path, a name or a stem in each line."""
        found = set()
        for name in filter(None, map(str.strip, read_text(self.path(file)).splitlines())):
            # A flag behind it, as in Pascal VOC's lists of a class, is not part of the name.
            for candidate in (name, re.sub(r"\s+-?[01]$", "", name)):
                stems = [re.split(r"[\\/]", candidate)[-1]]
                if picture := self.find_picture(file, candidate, stems):
                    found.add(picture)
                    break
        return found


def map_files(function: Callable, what: str, files: list[str], *more: Iterable) -> Iterator[Any]:
    """Map a function over files with all cores, and a progress bar where it takes over 2 s."""
    # OpenCV, Pillow and NumPy release the GIL.
    with ThreadPoolExecutor(num_usable_cores()) as pool:
        yield from tqdm(pool.map(function, files, *more), what, len(files), delay=2)


def natural_key(name: str) -> list[Any]:
    """Sort 2 before 10."""
    return [(int(t), "") if t.isdigit() else (float("inf"), t) for t in re.split(r"(\d+)", name)]


def stem(path: str) -> str:
    """The name of a file without directory and suffix."""
    return os.path.splitext(path.rpartition("/")[2])[0]


def stems_before(name: str) -> list[str]:
    """The name and what is left of it without the parts behind its last "_" or "-"."""
    stems = [name]
    while match := re.fullmatch(r"(.+)[_-][^_-]*", stems[-1]):
        stems.append(match[1])
    return stems


def split_of(path: str) -> str:
    """The split that the nearest directory of a path is called: "train", "val", "test" or "all"."""
    for part in reversed(path.lower().split("/")[:-1]):
        if named := _splits_named([part]):
            return named[0]
    return "all"


def split_of_name(path: str) -> str:
    """The split that a word in the name of a file is, or else :func:`split_of` its directory."""
    named = _splits_named(re.split(r"[^a-z]+", stem(path).lower()))
    return named[0] if len(named) == 1 else split_of(path)


def _splits_named(words: list[str]) -> list[str]:
    return [s for s, pattern in _SPLITS.items() if any(re.fullmatch(pattern, w) for w in words)]


def read_text(path: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark, UTF-16 with one, or Latin-1."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _walk(root: str) -> Iterable[str]:
    for directory, directories, names in os.walk(root, followlinks=True):
        here = os.path.realpath(directory) + os.sep
        directories[:] = [
            d
            for d in directories
            if not re.match(_LEFT_BEHIND, d)
            # A link to a directory above would be followed again and again.
            and not here.startswith(os.path.realpath(os.path.join(directory, d)) + os.sep)
        ]
        for name in (name for name in names if name[0] != "."):
            yield os.path.relpath(os.path.join(directory, name), root).replace(os.sep, "/")


def _parts(path: str) -> list[str]:
    path = unquote(path) if "%20" in path else path
    return [p for p in path.replace("\\", "/").split("/") if p not in ("", ".", "..")]


def _find_masks(images: list[str], other_stems: set[str]) -> set[str]:
    """Return the images that are masks of others, by the names of their directories and files."""
    masks, maybe = set(), set()
    for file in images:
        if os.path.splitext(file)[0] in other_stems:  # a label beside it: a picture
            continue
        directories = file.lower().split("/")[:-1]
        if any(re.fullmatch(MASK_DIRECTORY, d) for d in directories):
            masks.add(file)
        elif any(re.fullmatch(_MAYBE_MASK_DIRECTORY, d) for d in directories):
            maybe.add(file)
    stems = {stem(f).lower() for f in images if f not in masks and f not in maybe}
    masks |= {f for f in maybe if any(name in stems for name in stems_before(stem(f).lower()))}
    for file in images:
        if (match := re.fullmatch(MASK_STEM, stem(file).lower())) and match[1] in stems:
            masks.add(file)
    return masks if stems else set()


def _distance(label: str, picture: str, name: str) -> tuple[Any, ...]:
    """A tuple that is smaller for a picture that is nearer to a label file."""
    here, there = label.split("/")[:-1], picture.split("/")[:-1]
    splits = split_of_name(label), split_of(picture)
    other_split = splits[0] != splits[1] and "all" not in splits
    differing = [i for i, pair in enumerate(zip(here, there)) if pair[0] != pair[1]]
    common = min(*differing, len(here), len(there))
    mirrored = len(here) == len(there) and len(differing) == 1 and not other_split
    rank = 0 if here == there else 1 if mirrored else 2 if _place(here) == _place(there) else 3
    below = there[: len(here)] != here
    exact = name not in (picture.rpartition("/")[2], stem(picture))
    return (rank, other_split, below, -common, exact)


def _place(directories: list[str]) -> list[str]:
    """The directories without those that only say what their files are."""
    parts = (re.sub(rf"^(?:{MASK_DIRECTORY})\Z", r"\g<of>", d.lower()) for d in directories)
    return [part for part in parts if part and part not in _ROLES]

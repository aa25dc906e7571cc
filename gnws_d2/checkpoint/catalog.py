"""``gnws://``: the published checkpoints as paths that Detectron2 understands."""

import difflib
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir
from tqdm import tqdm

from .. import model_zoo
from ..utils.errors import UserError
from .checkpointer import load_checkpoint, save_checkpoint


def checkpoint_urls() -> dict[str, str]:
    """
    Returns:
        The URL of each name in the catalog. The end of its file name is the start of its SHA-256.
    """
    urls = {row["name"]: row["checkpoint_url"] for row in model_zoo.table()}
    for row in model_zoo.imagenet_backbones():
        urls[f"ImageNetPretrained/{row['name']}"] = row["url"]
    return urls


class GNWSCatalogHandler(PathHandler):
    """
    Resolve ``gnws://NAME`` to a local file in Detectron2's format: downloaded once, its hash
    checked, converted, and kept in iopath's cache directory (``$FVCORE_CACHE``). A file that was
    downloaded elsewhere may be put there instead.
    """

    PREFIX = "gnws://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name, urls = path.removeprefix(self.PREFIX), checkpoint_urls()
        if name not in urls:
            near = difflib.get_close_matches(name, urls, n=3, cutoff=0) or list(urls)
            raise UserError(f"{path} is not in the catalog. The nearest are {', '.join(near)}.")
        cache = os.path.join(get_cache_dir(), "gnws_d2")
        published = os.path.join(cache, urls[name].rpartition("/")[2])
        converted = f"{published.removesuffix('.pth')}.detectron2.pth"
        try:
            with file_lock(published):
                if not os.path.isfile(converted):
                    if not os.path.isfile(published):
                        _download(urls[name], published)
                    _check_hash(published)
                    save_checkpoint(load_checkpoint(published), converted)
        except OSError as e:
            raise UserError(
                f"{path} cannot be kept in the cache directory {cache}: {e.strerror or e}. Set "
                "FVCORE_CACHE to another directory."
            ) from e
        return converted

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path.removeprefix(self.PREFIX) in checkpoint_urls()

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        return open(self._get_local_path(path), mode, buffering)


def _download(url: str, path: str) -> None:
    part = f"{path}.part"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with open(part, "wb") as f:
                bar = tqdm.wrapattr(f, "write", total=size or None, desc=os.path.basename(path))
                with bar as out:
                    shutil.copyfileobj(response, out)
        if os.path.getsize(part) < size:
            raise ConnectionError(f"it ended after {os.path.getsize(part)} of {size} bytes")
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
        raise UserError(
            f"Cannot download {url}: {e}. Put the file, downloaded elsewhere, into "
            f'{os.path.dirname(path)}, or set MODEL.WEIGHTS "" to train from scratch.'
        ) from e
    os.replace(part, path)


def _check_hash(path: str) -> None:
    expected = path.removesuffix(".pth").rpartition("-")[2]
    with open(path, "rb") as f:
        actual = hashlib.file_digest(f, "sha256").hexdigest()
    if not actual.startswith(expected):
        os.replace(path, f"{path}.wrong")
        raise UserError(
            f"The SHA-256 of {path} starts with {actual[:8]}, not {expected}: it is damaged or "
            f"another file. It was kept as {path}.wrong, and is not used; run this again to "
            "download it again."
        )


PathManager.register_handler(GNWSCatalogHandler())

"""``gnws://NAME``: the published checkpoints as paths that Detectron2 understands."""

import difflib
import os
from http.client import HTTPException
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir
from torch.hub import download_url_to_file

from .. import model_zoo
from ..utils.errors import UserError
from .files import load_checkpoint, save_checkpoint


def checkpoint_urls() -> dict[str, str]:
    """Return the URL of each name. It ends with the first digits of the file's SHA-256."""
    urls = {row["name"]: row["checkpoint_url"] for row in model_zoo.table()}
    backbones = model_zoo.imagenet_backbones()
    return urls | {f"ImageNetPretrained/{row['name']}": row["url"] for row in backbones}


class GNWSCatalogHandler(PathHandler):
    """
    Resolve ``gnws://NAME`` to a local file in Detectron2's format.

    The published file is downloaded once, its hash checked, and its conversion kept beside it in
    iopath's cache directory (``$FVCORE_CACHE``). A file put there by hand is used as it is.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return ["gnws://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name, urls = path.removeprefix("gnws://"), checkpoint_urls()
        if name not in urls:
            near = difflib.get_close_matches(name, urls, n=3, cutoff=0)
            raise UserError(f"{path} is not in the catalog. The nearest are {', '.join(near)}.")
        url, cache = urls[name], os.path.join(get_cache_dir(), "gnws_d2")
        published = os.path.join(cache, os.path.basename(url))
        converted = f"{published.removesuffix('.pth')}.detectron2.pth"
        try:
            with file_lock(published):  # one process downloads, the others wait for it
                if not os.path.isfile(converted):
                    if not os.path.isfile(published):
                        hash_prefix = url.removesuffix(".pth").rpartition("-")[2]
                        download_url_to_file(url, published, hash_prefix)
                    save_checkpoint(load_checkpoint(published), converted)
        except (OSError, HTTPException, RuntimeError) as e:  # the last for a wrong hash
            raise UserError(
                f"Cannot download {url} to {cache}: {e}. Put the file there by hand, set "
                'FVCORE_CACHE to another directory, or set MODEL.WEIGHTS "" to train from scratch.'
            ) from e
        return converted


PathManager.register_handler(GNWSCatalogHandler())

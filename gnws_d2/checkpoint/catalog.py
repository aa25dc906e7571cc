"""Models by name: ``gnws://NAME``, a path that Detectron2 understands, and ``hf://USER/REPO``."""

import difflib
import os
from http.client import HTTPException
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir
from torch.hub import download_url_to_file

from .. import model_zoo
from ..utils.errors import UserError
from .files import THRESHOLD_FILE, load_checkpoint, save_checkpoint

_HUB_FILES = ["config.yaml", "gnws.json", "model.safetensors"]


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


def download_from_hub(name: str) -> str:
    """
    Return the local directory of a model that :func:`push_to_hub` has shared, as "USER/REPO", or
    "hf://USER/REPO" with an optional "@REVISION"; without a network, that of an earlier download.

    Raises:
        UserError: if there is no such model or extra, or the Hub is out of reach.
    """
    repo, _, revision = name.removeprefix("hf://").partition("@")
    hub = import_hub(f"{name} is not on this machine: to look on the Hugging Face Hub", repo)
    try:
        files = [*_HUB_FILES, THRESHOLD_FILE]  # and no other, such as a pickle
        directory = hub.snapshot_download(repo, revision=revision or None, allow_patterns=files)
    except hub.errors.RevisionNotFoundError as e:
        raise UserError(f"{repo} has no revision {revision}: see its branches and tags.") from e
    except hub.errors.RepositoryNotFoundError as e:
        raise UserError(
            f"There is no {repo}, neither here nor, for you, on the Hugging Face Hub: check the "
            "name, and if it is private or gated, run `hf auth login`."
        ) from e
    except (hub.errors.HTTPError, OSError) as e:
        raise UserError(
            f"Cannot download {repo}, and it is not on this machine ({shorten(e)}) Where there is "
            f"a network, run `hf download {repo} --local-dir DIRECTORY`, and name that directory."
        ) from e
    missing = [file for file in _HUB_FILES if not os.path.isfile(os.path.join(directory, file))]
    if missing:
        raise UserError(f"{repo} is not a model of `gnws push`: it has no {', '.join(missing)}.")
    return directory


def import_hub(purpose: str, repo: str) -> Any:
    """Import huggingface_hub. Raise :class:`UserError` without the extra, or for a bad `repo`."""
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
        import safetensors.torch  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"{purpose}, pip install huggingface-hub safetensors ({e.name} is missing)."
        ) from e
    try:
        huggingface_hub.utils.validate_repo_id(repo if "/" in repo else f"/{repo}")
    except ValueError as e:
        raise UserError(f"{repo} is not the name USER/REPO of a repository: {shorten(e)}") from e
    return huggingface_hub


def shorten(error: Any) -> str:
    """Return a message as one line that ends with a dot."""
    return " ".join(str(error).split())[:300].rstrip(".") + "."

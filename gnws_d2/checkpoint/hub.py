"""Download a model that ``gnws push`` has shared on the Hugging Face Hub."""

import os
from typing import Any

from ..utils.errors import UserError
from .files import THRESHOLD_FILE

_FILES = ["config.yaml", "gnws.json", "model.safetensors"]


def download_from_hub(name: str) -> str:
    """
    Return the local directory of a model that :func:`push_to_hub` has shared; without a network,
    that of an earlier download.

    Args:
        name: "USER/REPO", or "hf://USER/REPO" with an optional "@REVISION".

    Raises:
        UserError: if there is no such model or extra, or the Hub is out of reach.
    """
    repo, _, revision = name.removeprefix("hf://").partition("@")
    hub = import_hub(f"{name} is not on this machine: to look on the Hugging Face Hub", repo)
    try:
        files = [*_FILES, THRESHOLD_FILE]  # and no other, such as a pickle
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
    missing = [file for file in _FILES if not os.path.isfile(os.path.join(directory, file))]
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

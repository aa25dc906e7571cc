"""Find, read and write the files of checkpoints."""

import contextlib
import json
import math
import os
import pickle
import types
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from ..utils.errors import UserError
from ..utils.files import atomic_write
from .convert import convert_to_detectron2

THRESHOLD_FILE = "threshold.json"  # in the directory of the checkpoint
DEFAULT_THRESHOLD = 0.5

# What a pickle may import: what tensors are made of, and libraries whose objects are not read.
_PLAIN = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
}
_LIBRARIES = set(
    "_codecs argparse collections copyreg datetime mmcv mmdet mmengine numpy pathlib".split()
)


class DamagedCheckpointError(UserError):
    """Raised when a checkpoint is missing, truncated or damaged."""


def find_checkpoint(path: str) -> str:
    """
    Return the local file of a checkpoint, downloaded if necessary.

    Args:
        path: a file; the ``OUTPUT_DIR`` of a run, for its best checkpoint, or else its last; or an
            address: ``https://...``, ``gnws://NAME`` or ``detectron2://...``.

    Raises:
        UserError: if there is no such file, or it cannot be downloaded.
    """
    if os.path.isdir(path):
        names = _names_in_run(path)
        file = next(filter(os.path.isfile, (os.path.join(path, name) for name in names)), "")
        if not file:
            raise UserError(
                f"{path} is not a trained model: it has no checkpoint. Name the OUTPUT_DIR of a "
                "run, or a checkpoint in it."
            )
        return file
    try:
        file = PathManager.get_local_path(path.partition("?")[0])  # Detectron2 drops queries, too
    except (OSError, HTTPException, ValueError) as e:
        raise UserError(f"Cannot download the checkpoint {path}: {e}. Check the address.") from e
    if not os.path.isfile(file):
        raise DamagedCheckpointError(f"The checkpoint {path} does not exist.")
    return file


def _names_in_run(output_dir: str) -> list[str]:
    """
    The names of the checkpoints of a run, the best first. ``run.json`` says which files belong to
    the run: an earlier one in the same directory may have left others. Without it, as in a run of
    stock Detectron2 or a download from the Hugging Face Hub, take what is there.
    """
    names = ["model.safetensors", "model_best.pth", "model_final.pth"]
    with contextlib.suppress(OSError):
        names.append(Path(output_dir, "last_checkpoint").read_text().strip())
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        start = json.loads(Path(output_dir, "run.json").read_text())[-1]
        names = [start["best_checkpoint"], start["last_checkpoint"]]
    return names


def load_checkpoint(file: str) -> dict[str, Any]:
    """
    Read a checkpoint of any format of :func:`convert_to_detectron2`, without running code in it,
    and return it in Detectron2's format, on the CPU. Raise :class:`UserError` if `file` cannot be
    read, has an unknown format, code or non-finite values.
    """
    checkpoint = _read(file)
    try:
        checkpoint = convert_to_detectron2(checkpoint)
        bad = [name for name, value in checkpoint["model"].items() if not value.isfinite().all()]
    except (UserError, RuntimeError) as e:  # PyTorch's, if a tensor claims more values than it has
        raise UserError(f"The checkpoint {file} cannot be used: {e}") from e
    if bad:
        raise UserError(f"The checkpoint {file} has values that are not finite in {bad[0]}.")
    return checkpoint


def read_config(file: str) -> str:
    """Return the config in a checkpoint, or beside that of ``gnws push``, as YAML, or ""."""
    if file.endswith(".safetensors"):
        with contextlib.suppress(OSError):
            return Path(file).with_name("config.yaml").read_text("utf-8", "replace")
    # Map the tensors instead of reading them, which only the zip format allows: ours.
    checkpoint = _read(file, mmap=True) if zipfile.is_zipfile(file) else {}
    return checkpoint.get("config", "") if isinstance(checkpoint, dict) else ""


def read_threshold(checkpoint: str) -> float:
    """Return the score of detections that are worth showing, as last evaluated, or 0.5."""
    file = os.path.join(os.path.dirname(checkpoint), THRESHOLD_FILE)
    try:
        threshold = float(json.loads(Path(file).read_text())["threshold"])
    except FileNotFoundError:
        return DEFAULT_THRESHOLD
    except (OSError, ValueError, LookupError, TypeError):
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise UserError(f"{file} is damaged: remove it, or evaluate again.")
    return threshold


class _Inert:
    """Takes the place of an object that is not read."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    append = extend = __setstate__

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Reads tensors and plain values alone: all else of known libraries is :class:`_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_storage = module == "torch" and name.endswith("Storage")
        if (module, name) in _PLAIN or is_dtype or is_storage:
            return super().find_class(module, name)
        if module.partition(".")[0] in _LIBRARIES:
            return _Inert
        raise UserError(f"loading it would run {module}.{name}")


def _read(file: str, **kwargs: Any) -> Any:
    kwargs["map_location"] = "cpu"
    try:
        if file.endswith(".safetensors"):
            return _read_safetensors(file)
        try:
            return torch.load(file, weights_only=True, **kwargs)
        except pickle.UnpicklingError as e:
            if "GLOBAL" not in str(e):
                raise
        # MMDetection's checkpoints also have the logs, options and times of their training.
        reader: Any = types.SimpleNamespace(__name__=__name__, Unpickler=_Unpickler)
        reader.load = lambda f, **kwargs: _Unpickler(f, **kwargs).load()
        return torch.load(file, weights_only=False, pickle_module=reader, **kwargs)
    except UserError as e:
        raise UserError(f"{file} is refused: {e}.") from e
    except OSError as e:
        raise UserError(f"Cannot read the checkpoint {file}: {e.strerror or e}.") from e
    except Exception as e:  # a damaged file can fail in any way
        raise DamagedCheckpointError(
            f"{file} is damaged, or not a PyTorch checkpoint but a web page or a pickle."
        ) from e


def _read_safetensors(file: str) -> dict[str, Any]:
    """Read the folded weights of ``gnws push``, and the classes from ``gnws.json`` beside them."""
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise UserError("it needs safetensors: pip install huggingface-hub safetensors") from e
    try:
        known = json.loads(Path(file).with_name("gnws.json").read_bytes())["classes"]
        classes = {c["id"]: str(c["name"]) for c in known}
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError("gnws.json beside it is missing or damaged") from e
    return {"model": load_file(file), "folded": True, "classes": classes}


def save_checkpoint(checkpoint: dict[str, Any], path: str) -> None:
    """Write a checkpoint atomically; raise :class:`UserError` if that fails, as on a full disk."""
    with atomic_write(path, "wb") as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # PyTorch's, while it handles the OSError of a full disk
            raise (e.__context__ if isinstance(e.__context__, OSError) else OSError(e)) from e

"""Detectron2's checkpointer for the formats of :mod:`.convert`, that lets no mismatch pass."""

import os
import re
import zipfile
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..layers import WSConv2d
from ..utils.errors import UserError
from ..utils.files import replace_file
from .convert import convert_to_detectron2

# The layers whose shape depends on the classes.
_PREDICTORS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.predictor.",
)


def load_checkpoint(path: str) -> dict[str, Any]:
    """
    Read a checkpoint of any format that :func:`convert_to_detectron2` knows, without running code
    that it may hold.

    Args:
        path: a local file.

    Returns:
        The checkpoint in Detectron2's format.

    Raises:
        UserError: if the file is damaged, needs code to be run, has no known format, claims to be
            larger than it is, or has weights that are not finite.
    """
    try:
        with PathManager.open(path, "rb") as f:
            start = f.read(64).lstrip().lower()
            f.seek(0)
            if zipfile.is_zipfile(f):
                with zipfile.ZipFile(f) as z:
                    unpacked = sum(entry.file_size for entry in z.infolist())
                if unpacked > os.fstat(f.fileno()).st_size:
                    # torch.save does not compress: a small file could fill the memory.
                    raise UserError(f"The file {path} is compressed: unpack it and save it again.")
            f.seek(0)
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"Cannot read the checkpoint {path}: {e.strerror or e}.") from e
    except UserError:
        raise
    except Exception as e:  # a damaged file can fail in any way
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            why = "is a web page, not a checkpoint: its download failed"
        elif code := re.search(r"\bGLOBAL (\S+)", str(e)):
            why = f"holds {code[1]}, which would run code when loaded: it is refused"
        elif start.startswith(b"\x80"):
            why = "is a pickle, which can run code when loaded: it is refused"
        else:
            why = "is damaged, or no PyTorch checkpoint"
            raise DamagedCheckpointError(f"The file {path} {why}.") from e
        raise UserError(f"The file {path} {why}.") from e
    try:
        converted = convert_to_detectron2(checkpoint)
    except UserError as e:
        raise UserError(f"The checkpoint {path} cannot be used: {e}") from e
    for name, value in converted["model"].items():
        try:
            # Strides of 0 would make a few bytes as large as one likes.
            whole = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
            finite = whole and bool(value.isfinite().all())
        except RuntimeError as e:  # sparse, quantized, without values and others
            raise UserError(f"The checkpoint {path} has a tensor of no use in {name}.") from e
        if not whole:
            raise UserError(
                f"The checkpoint {path} has fewer values in {name} than its shape "
                f"{list(value.shape)} says."
            )
        if not finite:
            raise UserError(f"The checkpoint {path} has values that are not finite in {name}.")
    return converted


def save_checkpoint(checkpoint: dict[str, Any], path: str) -> None:
    """Write `checkpoint` to `path`, where there is never half of it (:func:`replace_file`)."""
    try:
        with replace_file(path, "wb") as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError for a full disk
        raise UserError(f"Cannot write {path}: {' '.join(str(e).split())}.") from e


class DamagedCheckpointError(UserError):
    """A file that is no whole checkpoint."""


class GNWSCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that reads MMDetection's, MMCV's and the WS authors' files like
    its own, runs no code in them, and writes whether the model has standardized weights.

    A checkpoint of another network is an error. To start training, a checkpoint may lack
    parameters (a backbone does), and its predictors may be for other classes.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, strict: bool = False, **kwargs: Any
    ):
        """
        Args:
            model, save_dir, kwargs: see :class:`DetectionCheckpointer`.
            strict: every parameter must be in the checkpoint, with its shape, as evaluation and
                prediction need it.
        """
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict

    def save(self, name: str, **kwargs: Any) -> None:
        """
        See :class:`DetectionCheckpointer`. Whenever the process is killed, there are whole files,
        and ``last_checkpoint`` names one of them.

        Raises:
            UserError: if the file cannot be written, as on a full disk.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data |= {"model": self.model.state_dict(), **kwargs}
        data["weight_standardization"] = self._is_standardized()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        save_checkpoint(data, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """See :class:`DetectionCheckpointer`."""
        with replace_file(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """
        See :class:`DetectionCheckpointer`. If the last checkpoint is damaged or gone, the one
        before it is used, and so on.

        Raises:
            UserError: if there are checkpoints to resume from, and none that is whole.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        last = self.get_checkpoint_file()
        others = sorted(self.get_all_checkpoint_files(), key=os.path.getmtime, reverse=True)
        for candidate in [last, *(other for other in others if other != last)]:
            try:
                if not os.path.isfile(candidate):
                    raise DamagedCheckpointError(f"The checkpoint {candidate} does not exist.")
                return self.load(candidate)
            except DamagedCheckpointError as e:
                self.logger.error(f"{e} Looking for the checkpoint before it.")
        raise UserError(
            f"No checkpoint in {self.save_dir} is whole: train anew with another OUTPUT_DIR."
        )

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Args:
            path: a local file, a URL, ``gnws://...``, or "" for none.

        Raises:
            UserError: see :func:`load_checkpoint`; or if there is no such file, or the checkpoint
                does not fit the model.
        """
        if self.strict and not path:
            raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to use.")
        if path and "://" not in path and not self.path_manager.isfile(path):
            raise UserError(f"MODEL.WEIGHTS {path} does not exist.")
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # which Detectron2 leaves set when it fails

    def _load_file(self, filename: str) -> dict[str, Any]:
        return load_checkpoint(filename)

    def _load_model(self, checkpoint: dict[str, Any]):
        standardized = checkpoint.get("weight_standardization", self._is_standardized())
        if standardized != self._is_standardized():
            names = {True: "GN+WS", False: "plain GN"}
            self.logger.warning(
                f"{self._path} is of a {names[standardized]} model, but the config builds a "
                f"{names[not standardized]} one: its predictions will be wrong."
            )
        if checkpoint.pop("matching_heuristics", False):
            # A backbone. Detectron2's heuristics would find its place too, but drop what is left.
            stems = (n for n in self.model.state_dict() if n.endswith("stem.conv1.weight"))
            prefix = next(stems, "").removesuffix("stem.conv1.weight")
            checkpoint["model"] = {f"{prefix}{k}": v for k, v in checkpoint["model"].items()}
        given = dict(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        missing, unexpected = incompatible.missing_keys, incompatible.unexpected_keys
        shapes = incompatible.incorrect_shapes

        if not self.strict:
            predictors = [name for name, *_ in shapes if name.startswith(_PREDICTORS)]
            if predictors:
                self.logger.info(
                    f"{self._path} is for other classes: the predictors {', '.join(predictors)} "
                    "keep their new initialization."
                )
                shapes[:] = [shape for shape in shapes if shape[0] not in predictors]
                missing[:] = [name for name in missing if name not in predictors]
        mismatched = {name for name, *_ in shapes}
        missing = [name for name in missing if name not in mismatched]
        if not self.strict:  # a part of the model may be missing, but not a part of a part
            loaded = set(self.model.state_dict()).difference(missing, mismatched)
            parts = {_part(name) for name in loaded}
            missing = [name for name in missing if _part(name) in parts]
            unexpected = [name for name in unexpected if _part(name) in parts]
        faults = [
            f"{len(names)} parameters {what} (the first is {names[0]})"
            for what, names in (
                ("are missing", missing),
                ("have another shape", [f"{k}: {list(a)}, not {list(b)}" for k, a, b in shapes]),
                ("are of no layer of it", unexpected),
            )
            if names
        ]
        if faults:
            raise UserError(
                f"The checkpoint {self._path} seems to be {describe(given)}, but the config builds "
                f"{describe(self.model.state_dict())}: {'; '.join(faults)}."
            )
        return incompatible

    def _is_standardized(self) -> bool:
        return any(isinstance(m, WSConv2d) for m in self.model.modules())


def _part(name: str) -> str:
    """The part of a detector that has a parameter: a checkpoint has all of it, or nothing."""
    return ".".join(
        name.split(".")[: 2 if name.startswith(("backbone.bottom_up", "roi_heads")) else 1]
    )


def describe(state: dict[str, Tensor]) -> str:
    """
    Args:
        state: with Detectron2's names.

    Returns:
        What network it seems to be of, as "a Mask R-CNN R-50-FPN with 80 classes".
    """
    blocks = {m.group(1) for name in state if (m := re.search(r"\bres4\.(\d+)\.", name))}
    depth = {6: "50", 23: "101", 36: "152"}.get(len(blocks), "?")
    convs = [value.shape for name, value in state.items() if name.endswith("res2.0.conv2.weight")]
    width, width_per_group = convs[0][:2] if convs else (1, 1)
    groups = width // width_per_group
    backbone = f"R-{depth}" if groups == 1 else f"X-{depth}-{groups}x{width_per_group}d"
    if any("fpn_" in name for name in state):
        backbone += "-FPN"
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is None:
        return f"an {backbone} backbone"
    detector = "Mask" if "roi_heads.mask_head.predictor.weight" in state else "Faster"
    return f"a {detector} R-CNN {backbone} with {len(scores) - 1} classes"

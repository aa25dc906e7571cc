"""Detectron2's checkpointer for the formats of :mod:`.convert`; a mismatch is an error."""

import os
import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ..layers import WSConv2d, fold_for_inference
from ..utils.errors import UserError
from ..utils.files import atomic_write
from .files import DamagedCheckpointError, find_checkpoint, load_checkpoint, save_checkpoint

# The layers whose shape depends on the number of classes.
_PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.")


class GNWSCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that reads the formats of :func:`convert_to_detectron2`, runs no
    code in them, writes atomically, and raises :class:`UserError` if a checkpoint does not fit.

    A checkpoint to start training from may lack whole parts of the model, as a backbone does, and
    may have predictors for other classes. On resume, and with ``strict=True`` as for evaluation, it
    must match entirely, and its class names must be those of the dataset. Checkpoints also record
    the config, and whether the model has weight standardization: a difference is a warning.
    """

    def __init__(
        self,
        *args: Any,
        strict: bool = False,
        classes: dict[Any, str] | None = None,
        config: str = "",
        averaged: AveragedModel | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            classes: class names by category id, in Detectron2's order; by default, taken from
                the checkpoint that is loaded.
            config: the config to save, as YAML.
            averaged: an average of the weights to save as the model. Those of the model itself are
                saved beside it, and a resumed training continues with them.
        """
        super().__init__(*args, **kwargs)
        self.strict, self.classes, self.config = strict, classes, config
        self.averaged = averaged
        self.last_saved = ""  # the name of a file

    def save(self, name: str, **kwargs: Any) -> None:
        """See :class:`DetectionCheckpointer`; raises :class:`UserError`, as on a full disk."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {key: obj.state_dict() for key, obj in self.checkpointables.items()} | kwargs
        data |= {"model": self.model.state_dict(), "weight_standardization": self._standardized()}
        if self.averaged is not None:
            data["trained_model"], data["model"] = data["model"], self.averaged.module.state_dict()
        data |= {k: v for k, v in {"classes": self.classes, "config": self.config}.items() if v}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        save_checkpoint(data, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """See :class:`DetectionCheckpointer`."""
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename)
        self.last_saved = last_filename_basename

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """See :class:`DetectionCheckpointer`. For a damaged checkpoint, take the one before it."""
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        last = self.get_checkpoint_file()
        others = sorted(self.get_all_checkpoint_files(), key=os.path.getmtime, reverse=True)
        for candidate in [last, *(other for other in others if other != last)]:
            try:
                return self.load(candidate, resume=True)
            except DamagedCheckpointError as e:
                self.logger.error(f"{e} Looking for the checkpoint before it.")
        raise UserError(f"All checkpoints in {self.save_dir} are damaged: use another OUTPUT_DIR.")

    def load(self, path: str, *args: Any, resume: bool = False, **kwargs: Any) -> dict[str, Any]:
        """See :class:`DetectionCheckpointer`. With `resume` the checkpoint must match entirely."""
        if self.strict and not path:
            raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to use.")
        self._path, self._resume = path, resume
        self._parsed_url_during_load = None  # Detectron2 leaves it set after an error
        checkpoint = super().load(path and find_checkpoint(path), *args, **kwargs)
        if self.averaged is not None:
            self.averaged.module.load_state_dict(self.model.state_dict())
            self.averaged.n_averaged.fill_(1)  # or the next update would be a copy
        if resume and "trained_model" in checkpoint:
            self.model.load_state_dict(checkpoint.pop("trained_model"))
        return checkpoint

    def _load_file(self, filename: str) -> dict[str, Any]:
        return load_checkpoint(filename)

    def _load_model(self, checkpoint: dict[str, Any]):
        if checkpoint.pop("folded", False) and self.strict:
            fold_for_inference(self.model)  # training standardizes the weights again
        own_ws = self._standardized()
        if checkpoint.get("weight_standardization", own_ws) != own_ws:
            self.logger.warning(
                f"Only one of {self._path} and the model of the config has weight standardization: "
                "the predictions will be wrong."
            )
        self._check_classes(checkpoint.get("classes"))
        own = self.model.state_dict()
        if checkpoint.pop("matching_heuristics", False):
            # A backbone. Detectron2's heuristics would silently drop parameters without a place.
            stems = (name for name in own if name.endswith("stem.conv1.weight"))
            prefix = next(stems, "").removesuffix("stem.conv1.weight")
            checkpoint["model"] = {f"{prefix}{k}": v for k, v in checkpoint["model"].items()}
        given = dict(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        if issues := self._find_issues(*incompatible):
            hint = " Resume with its config, start anew without --resume or in another OUTPUT_DIR."
            raise UserError(
                f"The checkpoint {self._path} seems to be {describe(given)}, but the config builds "
                f"{describe(own)}: {issues[0]} ({len(issues)} parameters differ)."
                f"{hint if self._resume else ''}"
            )
        return incompatible

    def _check_classes(self, given: dict[Any, str] | None) -> None:
        if self.classes is None:
            self.classes = given
        elif given and (self.strict or self._resume):
            names, own = (list(classes.values()) for classes in (given, self.classes))
            if len(names) == len(own) and names != own:
                raise UserError(
                    f"The checkpoint {self._path} is for the classes {', '.join(names)[:200]}, but "
                    f"the dataset has {', '.join(own)[:200]}, in this order: use a dataset with "
                    "the classes that the model was trained on."
                )

    def _find_issues(self, missing: list, unexpected: list, shapes: list) -> list[str]:
        # Detectron2 counts parameters of another shape as missing, too, and logs what is left here.
        mismatched = [name for name, *_ in shapes]
        missing[:] = [name for name in missing if name not in mismatched]
        if not (self.strict or self._resume):
            predictors = [name for name in mismatched if name.startswith(_PREDICTORS)]
            if predictors:
                self.logger.info(
                    f"{self._path} is for other classes: the predictors {', '.join(predictors)} "
                    "keep their new initialization."
                )
                shapes[:] = [shape for shape in shapes if shape[0] not in predictors]
            parts = {_part(k) for k in self.model.state_dict().keys() - {*mismatched, *missing}}
            if parts:  # at least one has to match
                missing = [name for name in missing if _part(name) in parts]
                unexpected = [name for name in unexpected if _part(name) in parts]
        return [
            *(f"{name} has shape {list(given)}, not {list(own)}" for name, given, own in shapes),
            *(f"{name} is missing" for name in missing),
            *(f"{name} is not a parameter of it" for name in unexpected),
        ]

    def _standardized(self) -> bool:
        return any(isinstance(module, WSConv2d) for module in self.model.modules())


def _part(name: str) -> str:
    """Return the part of a model that has a parameter: a checkpoint has all of it, or nothing."""
    return re.findall(r"backbone\.bottom_up|roi_heads\.\w+|\w*", name)[0]


def describe(state: dict[str, Tensor]) -> str:
    """Name the network of a state dict, as "a Mask R-CNN R-50-FPN with 80 classes"."""
    conv = next((state[name] for name in state if name.endswith("res2.0.conv2.weight")), None)
    if conv is None:
        return "another network"
    blocks = sum("res4." in name and name.endswith("conv2.weight") for name in state)
    depth = {6: "50", 23: "101", 36: "152"}.get(blocks, "?")
    groups, width = conv.shape[0] // conv.shape[1], conv.shape[1]
    backbone = f"R-{depth}" if groups == 1 else f"X-{depth}-{groups}x{width}d"
    if any("fpn_" in name for name in state):
        backbone += "-FPN"
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is None:
        return f"an {backbone} backbone"
    detector = "Mask" if "roi_heads.mask_head.predictor.weight" in state else "Faster"
    return f"a {detector} R-CNN {backbone} with {len(scores) - 1} classes"

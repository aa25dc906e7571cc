"""The twelve GN+WS models of MMDetection, with the functions of `detectron2.model_zoo`."""

import json
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..config import CONFIG_DIR, add_gnws_config, choose_device

_DIR = Path(__file__).parent


def table() -> list[dict[str, Any]]:
    """
    Return a row for each model, in the order of MMDetection's GN+WS table and with its figures:
    ``box_ap`` and ``mask_ap`` (%, COCO val2017; None without masks), ``train_memory_gb`` (2 images
    per V100), ``inference_s_per_im_v100`` and ``inference_fps_v100`` (None if not published);
    ``checkpoint_mib``, ``checkpoint_url`` and ``sha256_prefix`` of its file.
    """
    return json.loads((_DIR / "table.json").read_text())


def imagenet_backbones() -> list[dict[str, str]]:
    """Return ``name`` and ``url`` of each ImageNet-pretrained GN+WS backbone."""
    return json.loads((_DIR / "imagenet_backbones.json").read_text())


def names() -> list[str]:
    """Return the names of the models, in table order."""
    return [row["name"] for row in table()]


def get_checkpoint_url(name: str) -> str:
    """Return ``gnws://NAME``, the weights of a model; raise RuntimeError if there is none."""
    if name not in names():
        raise RuntimeError(f"{name} not available in Model Zoo! It has {', '.join(names())}.")
    return f"gnws://{name}"


def get_config_file(name: str) -> str:
    """
    Return the path of the config of a model, or of another file of ``configs/``, by its name
    without ".yaml". Raise RuntimeError if there is no such file.
    """
    path = CONFIG_DIR / f"{name}.yaml"
    if not path.is_file():
        raise RuntimeError(f"{name} not available in Model Zoo! It has {', '.join(names())}.")
    return str(path)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """
    Return the config of a model (:func:`get_config_file`) or of a file, on the CPU if PyTorch finds
    no GPU. If `trained`, ``MODEL.WEIGHTS`` is the trained model instead of its backbone.
    """
    cfg = get_cfg()
    add_gnws_config(cfg)
    cfg.merge_from_file(name if Path(name).is_file() else get_config_file(name))
    choose_device(cfg)
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(name)
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build the model of :func:`get_config`, on `device` if given, with weights, for training."""
    cfg = get_config(name, trained)
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model

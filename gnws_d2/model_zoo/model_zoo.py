"""The twelve GN+WS models of MMDetection, under the function names of `detectron2.model_zoo`."""

import json
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..config import add_gnws_config

_DIR = Path(__file__).parent


def table() -> list[dict[str, Any]]:
    """
    Returns:
        A row for each model, in the order of MMDetection's published GN+WS table. Figures are
        MMDetection's: ``box_ap`` and ``mask_ap`` (%, COCO val2017; None without masks),
        ``train_memory_gb`` (2 images per V100), ``inference_s_per_im_v100`` and
        ``inference_fps_v100`` (None where none was published), ``checkpoint_mib``,
        ``checkpoint_url`` and ``sha256_prefix`` of its file.
    """
    return json.loads((_DIR / "table.json").read_text())


def imagenet_backbones() -> list[dict[str, str]]:
    """
    Returns:
        ``name`` and ``url`` of each ImageNet-pretrained GN+WS backbone that the models start from.
    """
    return json.loads((_DIR / "imagenet_backbones.json").read_text())


def names() -> list[str]:
    """
    Returns:
        The names of the models, in table order.
    """
    return [row["name"] for row in table()]


def get_checkpoint_url(name: str) -> str:
    """
    Args:
        name: one of :func:`names`.

    Returns:
        The path of MMDetection's checkpoint of the model in the catalog, for ``MODEL.WEIGHTS``.

    Raises:
        RuntimeError: if there is no such model.
    """
    if name not in names():
        raise RuntimeError(f"{name} not available in Model Zoo! It has {', '.join(names())}.")
    return f"gnws://{name}"


def get_config_file(name: str) -> str:
    """
    Args:
        name: one of :func:`names`, or another file of ``configs/`` without its ".yaml".

    Returns:
        The path of the config file.

    Raises:
        RuntimeError: if there is no such config.
    """
    path = _DIR / "configs" / f"{name}.yaml"
    if not path.is_file():
        raise RuntimeError(f"{name} not available in Model Zoo! It has {', '.join(names())}.")
    return str(path)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """
    Args:
        name: see :func:`get_config_file`.
        trained: set ``MODEL.WEIGHTS`` to the published checkpoint; otherwise it is the config's.

    Returns:
        The config of the model.

    Raises:
        RuntimeError: if there is no such model.
    """
    cfg = get_cfg()
    add_gnws_config(cfg)
    cfg.merge_from_file(get_config_file(name))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(name)
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """
    Args:
        name, trained: see :func:`get_config`.
        device: overrides ``MODEL.DEVICE``; by default the CPU where there is no GPU.

    Returns:
        The model with its weights, in training mode.

    Raises:
        RuntimeError: if there is no such model.
    """
    cfg = get_config(name, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model

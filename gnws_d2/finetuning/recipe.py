"""Derive the config of a fine-tuning from its data: image size, anchors, schedule, limits."""

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode

from ..data.formats import Coco

_MIN_EDGE, _MAX_EDGE, _RATIO = 32, 800, 1333 / 800  # of images; the last two are the recipe's
# Pixels of the smallest tenth of the objects, as the recipe's are at 800 x 1067: 0.024 of the image
# (Singh and Davis, CVPR 2018, section 1).
_SMALL_OBJECT = 22
_COVERED = 0.5  # IoU of a box with its best anchor
_ENOUGH = 0.9  # share of boxes that are covered, to keep the anchors of the config
_MIN_ITERATIONS = 500  # with fewer, batches are made smaller
_MAX_EVALUATIONS = 30


class Choice(NamedTuple):
    """A config key, the value that was chosen for it, and why."""

    key: str
    value: Any
    reason: str


def derive_recipe(
    cfg: CfgNode, train: Coco, epochs: int, images_at_once: int, num_processes: int
) -> list[Choice]:
    """
    Args:
        cfg: config of the model, with the schedule of its own training.
        train: the training set in COCO's format, with width, height, bbox and area.
        epochs: the times that each image is seen.
        images_at_once: the images that a process holds at once.
        num_processes: of the training.
    """
    objects = [a for a in train["annotations"] if not a.get("iscrowd") and min(a["bbox"][2:]) > 0]
    edge, reason = _short_edge(cfg, train, objects)
    scales = {i["id"]: edge / min(i["width"], i["height"]) for i in train["images"]}
    longest = max(max(i["width"], i["height"]) * scales[i["id"]] for i in train["images"])
    max_size = math.ceil(min(longest, _RATIO * edge))
    boxes = np.array([np.multiply(a["bbox"][2:], scales[a["image_id"]]) for a in objects])
    counts = Counter(a["image_id"] for a in train["annotations"])
    masks = has_masks(train)
    mask_reason = f"the objects have {'masks' if masks else 'boxes'}, the model predicts "
    mask_reason += "masks" if cfg.MODEL.MASK_ON else "boxes"
    rule = Choice("MODEL.RPN.MIN_LOW_QUALITY_IOU", 0.0, "small objects have an anchor, too")
    return [
        Choice("MODEL.ROI_HEADS.NUM_CLASSES", len(train["categories"]), "classes with objects"),
        Choice("MODEL.MASK_ON", masks and cfg.MODEL.MASK_ON, mask_reason),
        Choice("INPUT.MIN_SIZE_TRAIN", (edge,), reason),
        Choice("INPUT.MIN_SIZE_TEST", edge, reason),
        Choice("INPUT.MAX_SIZE_TRAIN", max_size, "the longest edge at that size"),
        Choice("INPUT.MAX_SIZE_TEST", max_size, "the longest edge at that size"),
        *([rule] if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "MinQualityRPN" else []),
        *_choose_anchors(cfg, boxes.reshape(-1, 2)),
        *_raise_limits(cfg, max(counts.values(), default=0)),
        *_schedule(cfg, len(train["images"]), epochs, images_at_once, num_processes),
    ]


def has_masks(coco: Coco) -> bool:
    """Return whether the objects have masks: after :func:`read_dataset`, all or none have one."""
    objects = [a for a in coco["annotations"] if not a.get("iscrowd")]
    return bool(objects) and all(a.get("segmentation") for a in objects)


def _short_edge(cfg: CfgNode, coco: Coco, objects: list[dict[str, Any]]) -> tuple[int, str]:
    shorter = {i["id"]: min(i["width"], i["height"]) for i in coco["images"]}
    own = float(np.median(list(shorter.values())))
    shares = [math.sqrt(math.prod(a["bbox"][2:])) / shorter[a["image_id"]] for a in objects]
    small = own * float(np.quantile(shares, 0.1)) if shares else math.inf
    needed = own * _SMALL_OBJECT / small
    most = max(cfg.INPUT.MIN_SIZE_TEST, min(needed, _MAX_EDGE))
    wanted = max(own, min(needed, 2 * own))
    edge = max(_MIN_EDGE, round(min(wanted, most)))
    images = f"the images have {own:.0f}, a tenth of their objects under {small:.0f} pixels"
    return edge, images if edge != cfg.INPUT.MIN_SIZE_TEST else f"the config's; {images}"


def _choose_anchors(cfg: CfgNode, boxes: np.ndarray) -> list[Choice]:
    sizes, ratios = cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    before = anchor_coverage(boxes, sizes, ratios)
    if before >= _ENOUGH:
        return []
    centers = _k_means(np.log(boxes.prod(axis=1)) / 2, len(sizes))
    new_sizes = [[round(math.exp(c), 1)] for c in centers]  # one for each level of the FPN
    centers = _k_means(np.log(boxes[:, 1] / boxes[:, 0]), len(ratios[0]))
    new_ratios = [[round(math.exp(c), 2) for c in centers]]
    after = anchor_coverage(boxes, new_sizes, new_ratios)
    if after <= before:
        return []
    reason = f"k-means: they cover {after:.0%} of the boxes, the anchors of the config {before:.0%}"
    return [
        Choice("MODEL.ANCHOR_GENERATOR.SIZES", new_sizes, reason),
        Choice("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", new_ratios, reason),
    ]


def anchor_coverage(
    boxes: np.ndarray, sizes: list[list[float]], ratios: list[list[float]]
) -> float:
    """
    Return the share of boxes whose IoU with an anchor of the same center is at least 0.5.

    Args:
        boxes: (n, 2), width and height.
        sizes, ratios: as in ``MODEL.ANCHOR_GENERATOR``; a ratio is height by width.
    """
    if not len(boxes):
        return 1.0
    every = [(s, r) for level in sizes for s in level for r in ratios[0]]
    anchors = np.array([(s / math.sqrt(r), s * math.sqrt(r)) for s, r in every])
    overlap = np.minimum(boxes[:, None], anchors).prod(axis=2)
    iou = overlap / (boxes.prod(axis=1)[:, None] + anchors.prod(axis=1) - overlap)
    return float((iou.max(axis=1) >= _COVERED).mean())


def _k_means(values: np.ndarray, k: int) -> list[float]:
    """Return k centers of values, (n,), sorted: Lloyd's algorithm from quantiles."""
    centers = np.quantile(values, (np.arange(k) + 0.5) / k)
    for _ in range(100):
        nearest = np.abs(values[:, None] - centers).argmin(axis=1)
        parts = [values[nearest == i] for i in range(k)]
        centers = np.array([p.mean() if len(p) else c for p, c in zip(parts, centers)])
    return sorted(centers.tolist())


def _raise_limits(cfg: CfgNode, most: int) -> list[Choice]:
    reason = f"up to {most} objects in an image"
    choices = []
    for key in ("PRE_NMS_TOPK", "POST_NMS_TOPK"):
        for split in ("TRAIN", "TEST"):
            if cfg.MODEL.RPN[f"{key}_{split}"] < 10 * most:
                choices.append(Choice(f"MODEL.RPN.{key}_{split}", 10 * most, reason))
    if cfg.TEST.DETECTIONS_PER_IMAGE < 2 * most:
        choices.append(Choice("TEST.DETECTIONS_PER_IMAGE", 2 * most, reason))
    return choices


def _schedule(
    cfg: CfgNode, num_images: int, epochs: int, images_at_once: int, num_processes: int
) -> list[Choice]:
    solver = cfg.SOLVER
    batch, reason = solver.IMS_PER_BATCH, "the recipe's"
    while batch > 1 and epochs * num_images / batch < _MIN_ITERATIONS:
        batch, reason = batch // 2, f"less than the recipe's {solver.IMS_PER_BATCH}, for more steps"
    share = max(1, batch // num_processes)  # of a process
    images_at_once = min(images_at_once, share)
    accumulate_steps = share // images_at_once
    batch = num_processes * images_at_once * accumulate_steps
    iterations = math.ceil(epochs * num_images / batch)
    # Of small data the evaluations would take longer than the training.
    epochs_each = math.ceil(epochs / _MAX_EVALUATIONS)
    period = epochs_each * math.ceil(num_images / batch)
    when = "each epoch" if epochs_each == 1 else f"each {epochs_each} epochs"
    lr = solver.BASE_LR * batch / solver.IMS_PER_BATCH
    drops = {round(step / solver.MAX_ITER * iterations) for step in solver.STEPS}
    steps = tuple(sorted(s for s in drops if 0 < s < iterations))
    warmup = min(solver.WARMUP_ITERS, iterations // 10)
    return [
        Choice("SOLVER.REFERENCE_WORLD_SIZE", 0, "the numbers below are used as they are"),
        Choice("SOLVER.IMS_PER_BATCH", batch, reason),
        Choice("SOLVER.ACCUMULATE_STEPS", accumulate_steps, f"{images_at_once} images at once"),
        Choice("SOLVER.BASE_LR", lr, f"the recipe's {solver.BASE_LR:g} by the batch size"),
        Choice("SOLVER.MAX_ITER", iterations, f"{epochs} epochs of {num_images} images"),
        Choice("SOLVER.STEPS", steps, "at the same shares as in the recipe"),
        Choice("SOLVER.WARMUP_ITERS", warmup, "at most a tenth"),
        Choice("TEST.EVAL_PERIOD", period, when),
        Choice("TEST.MAX_TIME_SHARE", 0.1, "or fewer, if evaluations took longer than a tenth"),
        Choice("TEST.VALIDATION_LOSS", True, "at each evaluation"),
        Choice("SOLVER.CHECKPOINT_PERIOD", period, "at each evaluation"),
        Choice("SOLVER.CHECKPOINT_KEEP", 1, "beside the best"),
    ]

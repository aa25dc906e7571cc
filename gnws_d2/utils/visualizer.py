"""Pictures of a run: what the model found beside what is there, and how the loss fell."""

import json
from collections import defaultdict
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure

_MIN_WIDTH = 320  # pixels; smaller images are drawn larger, so that labels fit


def draw_predictions(
    dataset_name: str, results_json: str, output: str, num_images: int = 6, threshold: float = 0.6
) -> None:
    """
    Draw the ground truth (left) and the predictions (right) of a few images, evenly spread over
    the dataset, with Detectron2's :class:`Visualizer`.

    Args:
        dataset_name: a registered dataset with annotations.
        results_json: ``coco_instances_results.json`` of :class:`COCOEvaluator` on that dataset.
        output: path of the picture to write.
        num_images: number of images.
        threshold: predictions of a lower score are not drawn.
    """
    predictions = defaultdict(list)
    with open(results_json) as f:
        for prediction in json.load(f):
            if prediction["score"] >= threshold:
                predictions[prediction["image_id"]].append(prediction)
    dataset = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    step = max(1, len(dataset) // num_images)
    records = dataset[::step][:num_images]

    fig = Figure(figsize=(9, 4.5 * len(records)), layout="constrained")
    for row, record in zip(fig.subplots(len(records), 2, squeeze=False), records):
        image = utils.read_image(record["file_name"], "RGB")
        scale = max(1.0, _MIN_WIDTH / image.shape[1])
        found = _to_instances(predictions[record["image_id"]], image.shape[:2], metadata)
        truth = Visualizer(image, metadata, scale).draw_dataset_dict(record)
        drawn = Visualizer(image, metadata, scale).draw_instance_predictions(found)
        for ax, title, picture in zip(row, ("ground truth", "predictions"), (truth, drawn)):
            ax.imshow(picture.get_image())
            ax.set_title(f"{title}, image {record['image_id']}")
            ax.axis("off")
    fig.savefig(output)


def _to_instances(
    predictions: list[dict[str, Any]], image_size: tuple[int, int], metadata: Metadata
) -> Instances:
    boxes = np.asarray([p["bbox"] for p in predictions], dtype=np.float64).reshape(-1, 4)
    ids = metadata.thing_dataset_id_to_contiguous_id
    instances = Instances(image_size)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = np.asarray([p["score"] for p in predictions])
    instances.pred_classes = np.asarray([ids[p["category_id"]] for p in predictions], dtype=int)
    if predictions and "segmentation" in predictions[0]:
        instances.pred_masks = [p["segmentation"] for p in predictions]
    return instances


def plot_losses(metrics_json: str, output: str) -> None:
    """
    Plot the losses and the learning rate over the iterations.

    Args:
        metrics_json: ``metrics.json`` of Detectron2's :class:`JSONWriter`.
        output: path of the picture to write.
    """
    with open(metrics_json) as f:
        # A resumed run writes iterations again: the last writing counts.
        by_iteration = {line["iteration"]: line for line in map(json.loads, f) if "lr" in line}
    lines = [by_iteration[i] for i in sorted(by_iteration)]
    iterations = [line["iteration"] for line in lines]

    fig = Figure(figsize=(9, 5), layout="constrained")
    ax = fig.subplots()
    for key in sorted({key for line in lines for key in line if "loss" in key}):
        ax.plot(
            iterations,
            [line.get(key, np.nan) for line in lines],
            label=key,
            linewidth=2.2 if key == "total_loss" else 1.2,
        )
    ax.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    ax.grid(alpha=0.3)
    lr = ax.twinx()
    lr.plot(iterations, [line["lr"] for line in lines], "k:", label="learning rate")
    lr.set(ylabel="learning rate", ylim=(0, None))
    handles = [h for a in (ax, lr) for h in a.get_legend_handles_labels()[0]]
    ax.legend(handles=handles)
    fig.savefig(output, dpi=120)


def plot_bars(seconds: dict[str, list[float]], title: str, output: str) -> None:
    """
    Plot the median of some times as horizontal bars, with a line from the least to the largest.

    Args:
        seconds: the times of each bar, by its name.
        output: path of the picture to write.
    """
    names = list(seconds)
    medians = np.array([np.median(seconds[name]) for name in names])
    spread = [[min(seconds[name]), max(seconds[name])] for name in names]
    errors = np.abs(np.array(spread).T - medians)

    fig = Figure(figsize=(9, 1.2 + 0.4 * len(names)), layout="constrained")
    ax = fig.subplots()
    bars = ax.barh(names, medians, xerr=errors, color="tab:blue", ecolor="0.3", capsize=3)
    # Inside the bars, where the lines of the spread do not cross them.
    ax.bar_label(bars, [f" {m:.3g} s" for m in medians], label_type="center", color="white")
    ax.invert_yaxis()
    ax.set(xlabel="seconds, median and min - max", title=title)
    ax.grid(axis="x", alpha=0.3)
    fig.savefig(output, dpi=120)

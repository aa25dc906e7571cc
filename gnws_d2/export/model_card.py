"""The model card of a repository on the Hugging Face Hub."""

import contextlib
import math
import re

import yaml
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from ..checkpoint.checkpointer import describe
from ..data import register_coco_datasets
from ..report.analysis import METRICS
from ..report.run_dir import Run

_CARD = """---
{front}---

# {title}

This is {network} with Group Normalization and Weight Standardization, for gnws_d2 and Detectron2.
{picture}
## Use

```python
from gnws_d2 import Predictor  # with huggingface-hub and safetensors
predictor = Predictor.from_pretrained("{repo}")
instances = predictor("image.jpg")["instances"]
instances = instances[instances.scores >= predictor.threshold]
print([predictor.metadata.thing_classes[i] for i in instances.pred_classes], instances)
```

## Training

{training}

## Evaluation

{evaluation}
"""


def model_card(
    run: Run, state: dict, checkpoint: dict, repo: str, license: str, has_picture: bool
) -> str:
    """
    Return the README.md of a model, without paths and names of the machine.

    Args:
        run: the training of the model.
        state: the model's state dict.
        checkpoint: see :func:`load_checkpoint`.
        repo, license: see :func:`push_to_hub`.
        has_picture: whether there is a ``detections.jpg``.
    """
    cfg, iteration = run.cfg, checkpoint.get("iteration", -1)
    front = {
        "license": license,
        "library_name": "detectron2",
        "pipeline_tag": "image-segmentation" if cfg.MODEL.MASK_ON else "object-detection",
        "tags": ["gnws_d2", "group-normalization", "weight-standardization"],
    }
    register_coco_datasets(cfg.DATASETS.COCO)
    images, objects = _count(cfg.DATASETS.TRAIN)
    classes = list((checkpoint.get("classes") or {}).values())
    facts = {
        "Images": images,
        "Objects": objects,
        "Classes": f"{len(classes)}: {', '.join(classes)}" if classes else "",
        "Iterations": f"{iteration + 1:,}" if iteration >= 0 else "",
        "Duration": run.facts.get("Duration", ""),
        "Versions": run.facts.get("Versions", ""),
    }
    rows = [[name, _escape(text)] for name, text in facts.items() if text]
    is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=repo.partition("/")[2],
        network=describe(state) if is_rcnn else cfg.MODEL.META_ARCHITECTURE,
        picture="\n![Detections](detections.jpg)\n" if has_picture else "",
        repo=repo,
        training=tabulate(rows, ["Trained on", ""], "github", disable_numparse=True),
        evaluation=_evaluation(run, iteration),
    )


def _evaluation(run: Run, iteration: int) -> str:
    """AP as it was logged when the checkpoint was evaluated."""
    names, known = run.cfg.DATASETS.TEST, dict[str, float]()
    for line in run.metrics:  # after the last iteration Detectron2 counts one more
        known |= line if min(line["iteration"], run.cfg.SOLVER.MAX_ITER - 1) == iteration else {}
    prefix = f"{names[0]}/" if len(names) > 1 else ""
    rows = []
    for task, name in (("bbox", "box"), ("segm", "mask")):
        values = [known.get(f"{prefix}{task}/{metric}", math.nan) for metric in METRICS]
        if not all(map(math.isnan, values)):
            rows.append([name, *("" if math.isnan(v) else f"{v:.1f}" for v in values)])
    if not rows:
        return "The log of the training has no evaluation of this checkpoint."
    images, objects = _count(names[:1])
    where = f" on {images} images with {objects} objects" if images else ""
    table = tabulate(rows, ["%", *METRICS], "github", disable_numparse=True)
    return f"COCO AP{where}:\n\n{table}"


def _count(datasets: tuple[str, ...]) -> tuple[str, str]:
    """Count images and objects; "" if the annotations are not there."""
    with contextlib.suppress(Exception):
        records = [record for name in datasets for record in DatasetCatalog.get(name)]
        objects = [a for r in records for a in r["annotations"] if not a.get("iscrowd")]
        return f"{len(records):,}", f"{len(objects):,}"
    return "", ""


def _escape(text: str) -> str:
    """Keep a class name from being read as Markdown or HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`*_\\\[\]])", r"\\\1", " ".join(text.split()))

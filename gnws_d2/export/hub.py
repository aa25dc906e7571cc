"""Share a trained model on the Hugging Face Hub."""

import contextlib
import json
import math
import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from ..checkpoint import load_checkpoint
from ..checkpoint.catalog import import_hub, shorten
from ..checkpoint.checkpointer import describe
from ..checkpoint.files import THRESHOLD_FILE
from ..data import read_image, register_coco_datasets
from ..evaluation import TASKS
from ..prediction import Predictor, find_trained
from ..prediction.drawing import LabelVisualizer
from ..report.analysis import METRICS
from ..report.run_dir import Run, read_run
from ..utils.errors import UserError

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


def push_to_hub(
    output_dir: str, repo: str, *, license: str, picture: str | None = None, private: bool = False
) -> str:
    """
    Upload the weights of a trained model, folded, with what predictions need of its config, its
    classes and threshold, and a model card. No training image, path or host name is in them.

    Args:
        output_dir: ``OUTPUT_DIR`` of a run: its best checkpoint, or else its last.
        repo: "USER/REPO", which is created if it does not exist.
        license: for the card, as the Hub spells it, such as "apache-2.0".
        picture: an image to draw detections on, for the card.
        private: whether others may not see a new repository.

    Returns:
        The address of the repository.

    Raises:
        UserError: if there is no such run, extra or token, or the Hub is out of reach or refuses.
    """
    hub = import_hub(f"To push to {repo}", repo)
    run = read_run(output_dir)
    if not hub.get_token():
        raise UserError("There is no token to push with: run `hf auth login`, or set HF_TOKEN.")
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write_files(folder, run, repo, license, picture)
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise UserError(f"{url} is public: name another repository for --private.")
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Upload a model of gnws_d2 {version('gnws_d2')}",
                delete_patterns=["detections.jpg", THRESHOLD_FILE],  # those of an earlier model
            )
        except UserError:  # of an image, which is a ValueError, too
            raise
        except hub.errors.HfHubHTTPError as e:
            raise UserError(
                f"The Hugging Face Hub refuses {repo}: {shorten(e.server_message or e)} If it is "
                "not about the licence, `hf auth login` with a token that may write there."
            ) from e
        except (hub.errors.HTTPError, hub.errors.OfflineModeIsEnabled) as e:
            raise UserError(
                f"Cannot reach the Hugging Face Hub, so {repo} is not pushed ({shorten(e)}) Run "
                "this again with a network connection, and without HF_HUB_OFFLINE."
            ) from e
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"Cannot push {repo}: {shorten(e)}") from e
    return str(url)


def _write_files(folder: str, run: Run, repo: str, license: str, picture: str | None) -> None:
    from safetensors.torch import save_file

    cfg = find_trained(run.path, ["MODEL.DEVICE", "cpu"]).clone()
    shared = _shared_config(cfg).dump()
    cfg.defrost()
    cfg.TEST.AUG.ENABLED = False  # which would wrap the model
    predictor, checkpoint = Predictor(cfg), load_checkpoint(cfg.MODEL.WEIGHTS)
    state = {k: v.contiguous().clone() for k, v in predictor.model.state_dict().items()}
    save_file(state, os.path.join(folder, "model.safetensors"))
    threshold, file = None, Path(cfg.MODEL.WEIGHTS).with_name(THRESHOLD_FILE)
    if file.is_file():
        threshold = json.loads(file.read_bytes())
        Path(folder, THRESHOLD_FILE).write_bytes(file.read_bytes())
    classes = [{"id": k, "name": v} for k, v in (checkpoint.get("classes") or {}).items()]
    content = json.dumps({"classes": classes, "threshold": threshold}, indent=1)
    card = _model_card(run, state, checkpoint, repo, license, bool(picture))
    for name, text in (("config.yaml", shared), ("gnws.json", content), ("README.md", card)):
        Path(folder, name).write_text(text, "utf-8")
    if picture:
        image = read_image(picture, "RGB")
        outputs: Any = predictor(image[:, :, ::-1])
        instances = outputs["instances"]
        instances = instances[instances.scores >= predictor.threshold]
        visualizer = LabelVisualizer(image, predictor.metadata)
        drawn = visualizer.draw_instance_predictions(instances).get_image()
        cv2.imwrite(os.path.join(folder, "detections.jpg"), drawn[:, :, ::-1])


def _shared_config(cfg: CfgNode) -> CfgNode:
    """Return what predictions need: no path, no dataset and no device."""
    cfg = cfg.clone()
    for node, keys in (
        (cfg, cfg.keys() - {"VERSION", "MODEL", "INPUT", "TEST"}),
        (cfg.TEST, cfg.TEST.keys() - {"AUG", "DETECTIONS_PER_IMAGE"}),
        (cfg.MODEL, {"WEIGHTS", "DEVICE"}),
    ):
        for key in keys:
            del node[key]
    return cfg


def _model_card(
    run: Run, state: dict, checkpoint: dict, repo: str, license: str, has_picture: bool
) -> str:
    """Return the README.md of a model, without paths and names of the machine."""
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
    for task, name in TASKS.items():
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

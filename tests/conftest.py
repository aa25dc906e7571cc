import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import HealthCheck, settings
from server import Server

from gnws_d2 import model_zoo
from gnws_d2.utils.compat import LAUNCHES_ON_CPU

settings.register_profile("short", max_examples=150, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "fuzz",
    max_examples=100_000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("short")

# Handlers that a test has set up write to its captured stdout, which is closed after it.
logging.raiseExceptions = False

# Detectron2 v0.6 launches several processes on GPUs only.
launches_on_cpu = pytest.mark.skipif(
    not LAUNCHES_ON_CPU, reason="needs a Detectron2 after v0.6, which launches processes on a CPU"
)
retinanet_with_gn = pytest.mark.skipif(
    not LAUNCHES_ON_CPU, reason="needs a Detectron2 after v0.6, whose RetinaNetHead takes GN"
)

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "tests" / "assets"

# Keys for a short training on small images, and for a network that is quick and small on the disk.
TINY = [
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "(96,)",
    "INPUT.MIN_SIZE_TEST", "96", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
]  # fmt: skip
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "32",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "64",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "128",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "64",
]  # fmt: skip


@dataclass
class Photographs:
    """18 photographs of fruits and nuts with polygons, in COCO format."""

    json_file: Path = ASSETS / "fruits_nuts" / "trainval.json"
    images: Path = ASSETS / "fruits_nuts" / "images"

    def coco(self, number=18):
        """The annotations of the first images."""
        coco = json.loads(self.json_file.read_text())
        coco["images"] = coco["images"][:number]
        ids = {image["id"] for image in coco["images"]}
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
        return coco


@pytest.fixture
def photographs():
    return Photographs()


@pytest.fixture
def shapes_root(tmp_path, monkeypatch):
    """Where the built-in data is generated for a test."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    for name in ("shapes_train", "shapes_val"):
        metadata = MetadataCatalog.get(name)
        for key in ("json_file", "image_root"):
            metadata.__dict__.pop(key, None)


@pytest.fixture
def gnws(monkeypatch, capsys):
    """Run `gnws COMMAND ...` in this process. Return its exit status, stdout and stderr."""

    def gnws(command, *args):
        monkeypatch.syspath_prepend(ROOT / "tools")  # as for its scripts; it may not be installed
        from cli import main

        monkeypatch.setattr(sys, "argv", [f"gnws {command}", *map(str, args)])
        capsys.readouterr()
        status = 0
        try:
            main(command)
        except SystemExit as e:
            status = e.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return gnws


def run_python(*args, cwd=None, **environ):
    """Run Python, beside this project, which has to succeed. Return what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def mmdet_network(name):
    """The name of the file of parameter names and shapes of a model of the zoo."""
    detector, _, backbone = name.split("_gnws")[0].split("_", 2)
    return f"{detector}_{backbone.removesuffix('_32x4d')}"


def mmdet_state(name):
    """
    MMDetection's state dict of a model of the zoo, with its exact names and shapes and seeded
    values, that finds objects of some classes with some confidence.
    """
    path = ASSETS / "mmdet_keys" / f"{mmdet_network(name)}.keys.json"
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in json.loads(path.read_text()).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value *= (2 / value[0].numel()) ** 0.5
        elif key.endswith("weight"):
            # Small residual branches, as in trained networks: a float32 forward through large
            # ones is itself not exact to the tolerances of the tests.
            value = (0.2 if "gn3" in key else 1) * (1 + 0.1 * value)
        else:
            value *= 0.1
        if "rpn_reg" in key or "fc_reg" in key:
            value *= 0.1
        elif "fc_cls" in key:
            value *= 3
        state[key] = value
    return state


def backbone_state(name):
    """The state of its backbone alone, as MMCV has those that are trained on ImageNet."""
    return {
        key.removeprefix("backbone."): value
        for key, value in mmdet_state(name).items()
        if key.startswith("backbone.")
    }


def published(name, path, size=200, num_proposals=100):
    """Config of a model of the zoo with MMDetection's weights in `path`, for the CPU, and fast."""
    torch.save({"meta": {}, "state_dict": mmdet_state(name)}, path)
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", str(path)
    cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = size, num_proposals
    return cfg


def build(name, num_classes=80):
    """Build a model of the zoo on the CPU."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    return build_model(cfg)


def small_mask_rcnn(path, classes):
    """Config of a small Mask R-CNN with seeded weights, in `path`, that detects something."""
    cfg = model_zoo.get_config("quick_start")
    cfg.MODEL.WEIGHTS = str(path)
    generator = torch.Generator().manual_seed(0)
    state = build_model(cfg).state_dict()
    for key, value in state.items():
        random = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            scale = 2 if "cls_score" in key else 0.1 if "delta" in key or "bbox" in key else 1
            state[key] = random * scale * (2 / value[0].numel()) ** 0.5
        elif key.endswith("norm.weight"):
            state[key] = (0.2 if "conv3" in key else 1) * (1 + 0.1 * random)
        else:
            state[key] = 0.1 * random
    torch.save({"model": state, "classes": dict(enumerate(classes, 1))}, path)
    return cfg


def make_batch(number=2, num_classes=80, size=128):
    """Images of noise with two objects each, to train on."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for i in range(number):
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 12, 70, 90], [60, 40, 120, 100 + i]]))
        instances.gt_classes = torch.tensor([0, num_classes - 1])
        masks = torch.zeros(2, size, size, dtype=torch.bool)
        masks[0, 12:90, 10:70] = masks[1, 40:100, 60:120] = True
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "height": size, "width": size, "instances": instances})
    return batch


def wait_for(condition, timeout=120):
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def mark_processes(monkeypatch):
    """Give all processes that a test starts a variable that tells them from others."""
    monkeypatch.setenv("OF_TEST", uuid.uuid4().hex)


def processes_of_test():
    """
    The ids of the running processes that this test has started, and those started by them, whatever
    their session: torchrun gives each worker one of its own.
    """
    mark = f"OF_TEST={os.environ['OF_TEST']}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if mark in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids

"""Models are pushed to a server that speaks the calls of the Hugging Face Hub, and read back."""

import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import runs
import torch
import yaml
from builders import coco
from conftest import ASSETS, ROOT, small_mask_rcnn
from detectron2.modeling import build_model
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load, load_file, save_file

from gnws_d2.checkpoint import GNWSCheckpointer
from gnws_d2.config import load_config
from gnws_d2.export.hub import push_to_hub
from gnws_d2.layers import WSConv2d
from gnws_d2.prediction import Predictor, find_trained
from gnws_d2.utils.errors import UserError

CLASSES = ["fig", "hazelnut", "fig|<b>_x"]
THRESHOLD = {"iteration": 39, "threshold": 0.25, "classes": {"fig": 0.25}}
pytestmark = pytest.mark.ci  # three minutes
REPO = "marie/fruits"
PHOTOGRAPH = ASSETS / "fruits_nuts" / "images" / "0.jpg"
# Names of the machine, the user and the training images, which nobody else is to know.
SECRETS = ["node7", "curie", "holiday", "/home", "/tmp", str(ROOT), "hf_secret_run"]
START = runs.START | {
    "command": "gnws finetune --data /home/curie/holiday --output /home/curie/hf_secret_run",
    "machine": runs.START["machine"] | {"versions": {"torch": "2.15.0"}},
    "iterations": 60,
    "best_checkpoint": "model_best.pth",
    "last_checkpoint": "model_final.pth",
    "status": "finished",
}
# Every process calls the machine node7.
PROGRAM = """
import os, platform, socket, sys
socket.gethostname = platform.node = lambda: "node7"
os.environ["HF_TOKEN"] = "hf_token"
from gnws_d2.utils.errors import UserError
def attempt(function, *args, **kwargs):
    try:
        print("RETURNED", function(*args, **kwargs))
    except UserError as e:
        print("ERROR", e)
"""


def environment(hub, home, **more):
    names = {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HOME": str(home)}
    return {**os.environ, "HF_HUB_DISABLE_XET": "1", "USER": "curie", **names, **more}


def program(code, env, *args):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM + code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def run(code, env, *args):
    """Run a program; return its lines that start with RETURNED or ERROR."""
    done = program(code, env, *args)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("RETURNED", "ERROR"))]


def gnws(env, *args):
    return program("from gnws_tools.cli import main; sys.argv[0] = 'gnws'; main()", env, *args)


@pytest.fixture(scope="module")
def hub():
    hub = HubServer()
    yield hub
    hub.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """OUTPUT_DIR of a run on three images, whose best checkpoint is from the middle."""
    root = tmp_path_factory.mktemp("curie")
    path = root / "hf_secret_run"
    path.mkdir()
    images = [f"holiday_{i}.jpg" for i in range(3)]
    objects = [(images[0], CLASSES[0], [1, 1, 9, 9])] * 5
    truth = coco(dict.fromkeys(images, (64, 64)), objects, CLASSES, masks=False)
    truth["annotations"][4]["iscrowd"] = 1
    (root / "holiday.json").write_text(json.dumps(truth))
    small_mask_rcnn(path / "model_best.pth", CLASSES)
    checkpoint = torch.load(path / "model_best.pth")
    torch.save({**checkpoint, "iteration": 39}, path / "model_best.pth")
    names = ["DATASETS.TRAIN", "('holiday',)", "DATASETS.TEST", "('holiday',)"]
    opts = [*names, "SOLVER.MAX_ITER", "60", "OUTPUT_DIR", str(path), "INPUT.MIN_SIZE_TEST", "100"]
    dataset = ["holiday", str(root / "holiday.json"), str(root)]
    (path / "threshold.json").write_text(json.dumps(THRESHOLD))
    lines = [{"iteration": i, "lr": 0.1} for i in (19, 39, 59)]
    lines += [{"iteration": 39, "bbox/AP": 41.26, "bbox/AP50": 61.0, "bbox/APl": float("nan")}]
    lines += [{"iteration": 39, "segm/AP": 35.5}, {"iteration": 60, "bbox/AP": 12.3}]
    runs.write_run(path, *opts, lines=lines, starts=[START], datasets=[dataset])
    exif = Image.Exif()
    exif[0x010E] = "node7 /home/curie"  # ImageDescription
    Image.open(PHOTOGRAPH).resize((320, 240)).save(root / "holiday_picture.jpg", exif=exif)
    return path


@pytest.fixture(scope="module")
def pushed(hub, trained, tmp_path_factory):
    """The files of the repository after `gnws push`."""
    env, picture = environment(hub, tmp_path_factory.mktemp("home")), "holiday_picture.jpg"
    args = ["--license", "mit", "--picture", trained.parent / picture]
    done = gnws(env, "push", trained, REPO, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/{REPO}"
    commits = hub.repos[REPO]
    return commits[commits["main"]]


def snapshot(pushed, path):
    """What `hf download` leaves."""
    path.mkdir()
    for name, data in pushed.items():
        (path / name).write_bytes(data)
    return path


def test_nothing_of_the_machine_or_of_the_training_images_leaves(hub, pushed):
    assert set(pushed) == {
        "README.md", "config.yaml", "detections.jpg", "gnws.json", "model.safetensors",
        "threshold.json",
    }  # fmt: skip
    sent = [repr(request).encode() + request[3] for request in hub.received]
    for secret in SECRETS:
        for data in [*sent, *pushed.values()]:
            assert secret.encode() not in data, secret
    assert any(b"lfsFile" in data for data in sent)  # what was searched is all that there was
    cfg = yaml.safe_load(pushed["config.yaml"])
    assert set(cfg) == {"INPUT", "MODEL", "TEST", "VERSION"}
    assert not {"WEIGHTS", "DEVICE"} & set(cfg["MODEL"])


def test_card_has_the_numbers_of_the_run(pushed):
    _, front, text = pushed["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "mit",
        "library_name": "detectron2",
        "pipeline_tag": "image-segmentation",
        "tags": ["gnws_d2", "group-normalization", "weight-standardization"],
    }
    rows = dict(re.findall(r"^\| (.+?) +\| (.+?) +\|$", text, re.MULTILINE))
    assert rows["Images"] == "3" and rows["Objects"] == "4" and rows["Iterations"] == "40"
    assert rows["Classes"] == r"3: fig, hazelnut, fig\|&lt;b>\_x"
    assert rows["Duration"] == "0:02:28" and rows["Versions"] == "torch 2.15.0"
    assert re.search(r"^\| box +\| 41\.3 +\| 61\.0 +\| +\| +\| +\| +\|$", text, re.MULTILINE)
    assert re.search(r"^\| mask +\| 35\.5 +\|", text, re.MULTILINE) and "12.3" not in text
    assert "COCO AP on 3 images with 4 objects" in text and "Mask R-CNN R-50-FPN with 3" in text
    assert "![Detections](detections.jpg)" in text


def test_use_on_the_card_runs_as_it_is(hub, pushed, tmp_path):
    code = re.search(r"```python\n(.*?)```", pushed["README.md"].decode(), re.DOTALL)[1]
    assert len(code.splitlines()) == 5
    (tmp_path / "image.jpg").write_bytes(PHOTOGRAPH.read_bytes())
    code = f"os.chdir({str(tmp_path)!r})\n{code}\nprint('RETURNED', len(instances) > 5)"
    assert run(code, environment(hub, tmp_path / "home")) == ["RETURNED True"]


def test_picture_shows_the_detections_over_the_threshold(trained, pushed):
    image = cv2.imread(str(trained.parent / "holiday_picture.jpg"))
    drawn = cv2.imdecode(np.frombuffer(pushed["detections.jpg"], np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape == image.shape and np.abs(drawn.astype(int) - image).mean() > 5


def test_weights_are_folded_and_load_strictly_without_being_standardized_again(pushed, tmp_path):
    path = snapshot(pushed, tmp_path / "model")
    state = load(pushed["model.safetensors"])
    assert all(value.dtype == torch.float32 for value in state.values())
    predictor = Predictor.from_pretrained(str(path))
    assert not any(isinstance(module, WSConv2d) for module in predictor.model.modules())
    own = predictor.model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name].cpu(), value) for name, value in state.items())
    for name in ("backbone.bottom_up.res2.0.conv1", "roi_heads.mask_head.mask_fcn1"):
        assert state[f"{name}.weight"].flatten(1).mean(1).abs().max() < 1e-5, name


SAME = """
import cv2, torch
from gnws_d2 import Predictor
trained, photograph, home, sha = sys.argv[1:]
image = cv2.imread(photograph)
opts = ["MODEL.DEVICE", "cpu"]
local = Predictor.from_pretrained(trained, opts)
for name in ("marie/fruits", "hf://marie/fruits", f"hf://marie/fruits@{sha}"):
    shared = Predictor.from_pretrained(name, opts)
    a, b = (p(image)["instances"].get_fields() for p in (local, shared))
    same = [torch.equal(getattr(a[k], "tensor", a[k]), getattr(b[k], "tensor", b[k])) for k in a]
    ids = [p.metadata.thing_dataset_id_to_contiguous_id for p in (local, shared)]
    names = [p.metadata.thing_classes for p in (local, shared)]
    print("RETURNED", all(same), len(a["scores"]) > 5, ids[0] == ids[1], names[0] == names[1])
"""
FIND = """
from gnws_d2.prediction import find_trained
for name in sys.argv[1:]:
    attempt(lambda: find_trained(name).MODEL.WEIGHTS)
"""


def test_detections_are_those_of_the_local_model_to_the_last_bit_and_without_a_network(
    hub, trained, pushed, tmp_path
):
    home, sha = tmp_path / "home", hub.repos[REPO]["main"]
    hub.repos[REPO][sha]["model_best.pth"] = b"a pickle"
    lines = run(SAME, environment(hub, home), trained, PHOTOGRAPH, home, sha)
    assert lines == ["RETURNED True True True True"] * 3
    found = home / "hub" / "models--marie--fruits" / "snapshots" / sha
    downloaded = set(pushed) - {"README.md", "detections.jpg", "model_best.pth"}
    assert {path.name for path in found.iterdir()} == downloaded
    assert json.loads((found / "threshold.json").read_text()) == THRESHOLD
    del hub.repos[REPO][sha]["model_best.pth"]

    cached = [f"RETURNED {found}/model.safetensors"]
    assert run(FIND, environment("http://127.0.0.1:9", home), REPO) == cached
    offline = environment(hub, home, HF_HUB_OFFLINE="1")
    assert run(FIND, offline, f"hf://{REPO}@{sha}") == cached


def test_demo_draws_with_a_shared_model(hub, pushed, tmp_path):
    args = ["--input", PHOTOGRAPH, "--output", tmp_path / "out", "--confidence-threshold", "0.1"]
    done = gnws(environment(hub, tmp_path), "demo", "--model", REPO, *args)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [c["name"] for c in found["categories"]] == CLASSES and found["annotations"]


def test_mistakes_of_a_download_are_sentences(hub, pushed, tmp_path):
    hub.commit("marie/other", {"README.md": b"", "model.safetensors": b""})
    names = {
        "marie/gone": "ERROR There is no marie/gone, neither here nor, for you, on",
        f"hf://{REPO}@v9": f"ERROR {REPO} has no revision v9",
        "marie/other": "ERROR marie/other is not a model of `gnws push`: it has no config.yaml",
        "hf://fruits": "ERROR fruits is not the name USER/REPO of a repository",
        "hf://a/b/c": "ERROR a/b/c is not the name USER/REPO of a repository",
        "output/model_final.pth": "ERROR output/model_final.pth is not a trained model: name the",
    }
    lines = run(FIND, environment(hub, tmp_path), *names)
    assert len(lines) == len(names)
    for line, expected in zip(lines, names.values()):
        assert line.startswith(expected), line
    (line,) = run(FIND, environment("http://127.0.0.1:9", tmp_path / "new"), REPO)
    assert line.startswith(f"ERROR Cannot download {REPO}, and it is not on this machine (")
    assert f"run `hf download {REPO} --local-dir DIRECTORY`, and name that directory." in line
    offline = environment(hub, tmp_path / "new", HF_HUB_OFFLINE="1")
    assert run(FIND, offline, REPO)[0].startswith(f"ERROR Cannot download {REPO}, and")


PUSH = """
from gnws_d2.export.hub import push_to_hub
trained, other = sys.argv[1:]
with open(f"{trained}/threshold.json") as f:
    threshold = f.read()
with open(f"{trained}/threshold.json", "w") as f:
    f.write("[]")
attempt(push_to_hub, trained, "marie/fruits", license="mit")
with open(f"{trained}/threshold.json", "w") as f:
    f.write(threshold)
attempt(push_to_hub, trained, "fruits", license="mit")
attempt(push_to_hub, trained, "pierre/fruits", license="mit")
attempt(push_to_hub, trained, "marie/fruits", license="own")
attempt(push_to_hub, trained, "marie/fruits", license="mit", private=True)
attempt(push_to_hub, trained, "marie/secret", license="mit", private=True)
attempt(push_to_hub, trained, "marie/fruits", license="mit", picture="gone.jpg")
attempt(push_to_hub, other, "marie/fruits", license="mit")
del os.environ["HF_TOKEN"]
attempt(push_to_hub, trained, "marie/fruits", license="mit")
"""


def test_mistakes_of_a_push_are_sentences(hub, trained, pushed, tmp_path):
    before = dict(hub.repos[REPO])
    lines = run(PUSH, environment(hub, tmp_path), trained, tmp_path)
    expected = [
        f"ERROR {trained}/threshold.json is damaged: remove it",
        "ERROR fruits is not the name USER/REPO of a repository",
        "ERROR The Hugging Face Hub refuses pierre/fruits: You cannot write to pierre. If it is",
        'ERROR Cannot push marie/fruits: Invalid metadata in README.md. - "license" must be one of',
        f"ERROR {hub.url}/{REPO} is public: name another repository for --private.",
        f"RETURNED {hub.url}/marie/secret",
        "ERROR Cannot read the image gone.jpg",
        f"ERROR {tmp_path} is not the OUTPUT_DIR of a run",
        "ERROR There is no token to push with: run `hf auth login`, or set HF_TOKEN.",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected):
        assert line.startswith(start), line
    assert hub.private["marie/secret"] and hub.repos[REPO] == before
    done = gnws(
        environment("http://127.0.0.1:9", tmp_path), "push", trained, REPO, "--license", "mit"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: Cannot reach the Hugging Face Hub, so {REPO} is not pushed" in done.stderr


def test_without_the_extra_the_message_names_it(trained, pushed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(UserError, match=r"^To push to .* pip install huggingface-hub"):
        push_to_hub(str(trained), REPO, license="mit")
    with pytest.raises(UserError, match=r"not on this machine: .* pip install huggingface"):
        find_trained("no/such")
    path = snapshot(pushed, tmp_path / "model")
    assert Predictor.from_pretrained(str(path)).metadata.thing_classes == CLASSES
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"it needs safetensors: pip install huggingface"):
        Predictor.from_pretrained(str(path))


def test_weights_that_do_not_fit_are_named(pushed, tmp_path):
    path = snapshot(pushed, tmp_path / "model")
    state = load_file(path / "model.safetensors")
    name = "roi_heads.box_predictor.cls_score.weight"
    for change, message in (
        ({name: state[name][:2].clone()}, rf"{name} has shape \[2, .*1 parameters differ"),
        ({"more": torch.zeros(1)}, "more is not a parameter of it"),
        ({name: torch.full_like(state[name], torch.nan)}, f"not finite in {name}"),
    ):
        save_file(state | change, path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            Predictor.from_pretrained(str(path))
    del state[name]
    save_file(state, path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is missing"):
        Predictor.from_pretrained(str(path))


def test_damaged_downloads_are_refused(pushed, tmp_path):
    path = snapshot(pushed, tmp_path / "model")
    for name, content, message in (
        ("model.safetensors", pushed["model.safetensors"][:1000], "model.safetensors is damaged"),
        ("model.safetensors", torch.zeros(1).numpy().dumps(), "model.safetensors is damaged"),
        ("gnws.json", b"[]", "gnws.json beside it is missing or damaged"),
        ("gnws.json", b'{"classes": [{"id": []}]}', "gnws.json beside it is missing or damaged"),
        ("config.yaml", b"_BASE_: /etc/passwd\n", "_BASE_"),
        ("config.yaml", b"MODEL: !!python/object/apply:os.getcwd []\n", "could not determine a"),
        ("config.yaml", b"\xff\xfe", "--config-file .*config.yaml: "),
    ):
        (path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            Predictor.from_pretrained(str(path))
        (path / name).write_bytes(pushed[name])


def test_directory_comes_before_the_hub(trained, monkeypatch):
    monkeypatch.chdir(trained.parent.parent)
    name = f"{trained.parent.name}/{trained.name}"  # as USER/REPO
    assert find_trained(name).MODEL.WEIGHTS == f"{name}/model_best.pth"


def test_training_starts_from_shared_weights_with_weight_standardization(pushed, tmp_path, caplog):
    path = snapshot(pushed, tmp_path / "model")
    cfg = find_trained(str(path), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    GNWSCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert any(isinstance(module, WSConv2d) for module in model.modules())
    assert "predictions will be wrong" not in caplog.text
    conv = model.backbone.bottom_up.res2[0].conv1
    torch.testing.assert_close(conv.get_weight(), conv.weight, rtol=1e-3, atol=1e-4)


def test_model_without_threshold_classes_and_record_can_be_shared(hub, trained, tmp_path):
    """As a run of stock Detectron2. What an earlier model left in the repository goes."""
    earlier = {"threshold.json": b"{}", "detections.jpg": b"", "own.txt": b"own"}
    hub.commit(f"{REPO}2", earlier)
    path = tmp_path / "run"
    path.mkdir()
    cfg = load_config(str(trained / "config.yaml"), ["DATASETS.COCO", "()"])
    (path / "config.yaml").write_text(cfg.dump())
    checkpoint = torch.load(trained / "model_best.pth")
    torch.save({"model": checkpoint["model"]}, path / "model_final.pth")
    code = f"from gnws_d2.export.hub import push_to_hub\npush_to_hub(sys.argv[1], {REPO + '2'!r}, "
    run(code + "license='mit')", environment(hub, tmp_path), path)
    commits = hub.repos[f"{REPO}2"]
    files = commits[commits["main"]]
    assert set(files) == {"README.md", "config.yaml", "gnws.json", "model.safetensors", "own.txt"}
    assert json.loads(files["gnws.json"]) == {"classes": [], "threshold": None}
    card = files["README.md"].decode()
    assert "has no evaluation of this checkpoint" in card and "| Images " not in card
    assert "detections.jpg" not in card
    predictor = Predictor.from_pretrained(str(snapshot(files, tmp_path / "model")))
    assert predictor.metadata.get("thing_classes") is None

"""``tools/demo.py``: its detections, its files and its error messages."""

import json
import re
import runpy
import shutil
import struct
import sys
import uuid
import zlib
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from conftest import ROOT, mmdet_state
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from gnws_d2 import Predictor
from gnws_d2.checkpoint import catalog
from gnws_d2.config import load_config
from gnws_d2.data.check import check_dataset

QUICK_START = str(ROOT / "configs" / "quick_start.yaml")
# Not in the order of their ids.
CATEGORIES = [{"id": 7, "name": "fig"}, {"id": 3, "name": "date"}, {"id": 5, "name": "nut"}]
FEW = ["TEST.DETECTIONS_PER_IMAGE", "5"]  # drawing takes long


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the quick start's network that detect objects of all classes."""
    torch.manual_seed(0)
    model = build_model(load_config(QUICK_START, []))
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 300
        model.roi_heads.mask_head.predictor.weight *= 300
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the tool in its own directory; return exit status, stdout and its lines of stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    capsys.readouterr()

    def run(*args):
        tool = str(ROOT / "tools" / "demo.py")
        monkeypatch.setattr(sys, "argv", [tool, *map(str, args)])
        with pytest.raises(SystemExit) as e:
            runpy.run_path(tool, run_name="__main__")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return e.value.code, out, [line for line in err.splitlines() if line.startswith("demo.py:")]

    return run


@pytest.fixture
def demo(run, weights, tmp_path):
    """Run the tool with :func:`weights` and :data:`CATEGORIES`."""
    coco = {"images": [{"id": 0}], "categories": CATEGORIES}
    (tmp_path / "classes.json").write_text(json.dumps(coco))
    name = f"demo_{uuid.uuid4().hex}"  # a name is for one dataset in a process

    def demo(*args, opts=()):
        return run(
            "--config-file", QUICK_START, *args, "--dataset", name, "classes.json", ".",
            "--confidence-threshold", "0.4",
            "--opts", "MODEL.WEIGHTS", weights, "DATASETS.TEST", f"('{name}',)", *FEW, *opts,
        )  # fmt: skip

    return demo


@pytest.fixture
def images(photographs, tmp_path):
    """Five photographs of two sizes."""
    (tmp_path / "photos").mkdir()
    for i in range(5):
        image = cv2.imread(str(photographs.images / f"{i}.jpg"))
        image = cv2.resize(image, (200, 150) if i != 2 else (150, 200))
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.png"), image)
    return tmp_path / "photos"


def read(path):
    coco = json.loads(Path(path).read_text())
    by_file = {image["file_name"]: [] for image in coco["images"]}
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    for annotation in coco["annotations"]:
        by_file[names[annotation["image_id"]]].append(annotation)
    return coco, by_file


def test_pictures_and_json_show_what_the_predictor_finds(demo, images, weights):
    status, out, err = demo("--input", images, "--output", "out")
    assert (status, err) == (0, [])
    coco, found = read("out/detections.json")
    assert f"5 images, {len(coco['annotations'])} objects: out/detections.json" in out
    assert coco["info"]["image_root"] == str(images)
    assert sorted(coco["categories"], key=lambda c: -c["id"]) == [
        CATEGORIES[0], CATEGORIES[2], CATEGORIES[1],
    ]  # fmt: skip
    opts = ["MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.4, *FEW]
    predictor = Predictor(load_config(QUICK_START, opts))
    classes = set()
    for i, image in enumerate(coco["images"]):
        assert image["file_name"] == f"{i}.png"
        pixels = cv2.imread(str(images / f"{i}.png"))
        assert (image["height"], image["width"]) == pixels.shape[:2]
        picture = cv2.imread(f"out/{i}.png")
        scale = 320 / image["width"]  # as small images are drawn larger
        assert picture.shape[:2] == (int(image["height"] * scale), 320)
        plain = cv2.resize(pixels, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        assert (picture != plain).any(axis=2).mean() > 0.01

        expected = predictor(pixels)["instances"]
        assert len(expected) == len(found[f"{i}.png"]) > 0
        for k, result in enumerate(found[f"{i}.png"]):
            x0, y0, x1, y1 = expected.pred_boxes.tensor[k].tolist()
            assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
            assert result["score"] == pytest.approx(expected.scores[k].item())
            assert result["category_id"] == [3, 5, 7][expected.pred_classes[k]]
            classes.add(result["category_id"])
            mask = expected.pred_masks[k].numpy()
            assert np.array_equal(mask_util.decode(result["segmentation"]), mask)
            assert result["area"] == mask.sum()
    assert len(classes) > 1


def test_json_is_a_dataset_and_results_in_coco_format(demo, images):
    assert demo("--input", images, "--output", "out")[0] == 0
    assert not [f for f in check_dataset("out/detections.json", str(images)) if f.level != "note"]
    coco = COCO("out/detections.json")
    assert len(coco.loadRes(coco.dataset["annotations"]).getAnnIds()) == len(coco.getAnnIds()) > 5


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def test_unreadable_inputs_are_named_and_skipped(demo, images, photographs):
    data = (photographs.images / "0.jpg").read_bytes()
    bad = {
        "cut.jpg": data[: len(data) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html></html>",
        "vast.png": png_header(30_000, 30_000),
    }
    for name, content in bad.items():
        (images / name).write_bytes(content)
    (images / "notes.txt").write_text("not an image, and not taken for one")
    Path("nothing").mkdir()
    gone = ["gone.jpg", "*.gone", "nothing"]
    status, _, err = demo("--input", "photos", "gone.jpg", "*.gone", "nothing", "--output", "out")
    assert status == 1
    for name in (*bad, *gone):
        assert sum(name in line for line in err) == 1, name
    assert len(err) == 7
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(
        [f"{i}.png" for i in range(5)] + ["detections.json"]
    )
    assert len(read("out/detections.json")[0]["images"]) == 5


def test_inputs_of_one_name_have_a_picture_each(demo, images):
    Path("more/deep").mkdir(parents=True)
    shutil.copy("photos/0.png", "more/deep/1.png")
    inputs = ["photos/[01].png", "more/deep/1.png", "./photos/1.png"]
    assert demo("--input", *inputs, "--output", "out")[0] == 0
    names = ["photos/0.png", "photos/1.png", "more/deep/1.png"]
    assert [image["file_name"] for image in read("out/detections.json")[0]["images"]] == names
    assert all(cv2.imread(f"out/{name}") is not None for name in names)


def test_one_picture_goes_to_a_file_of_any_kind(demo, images):
    assert demo("--input", "photos/*2.png", "--output", "drawn.jpg")[0] == 0
    assert Path("drawn.jpg").read_bytes().startswith(b"\xff\xd8")
    assert list(read("drawn.json")[1]) == ["2.png"]
    assert not list(Path().glob("*.part"))


def test_no_input_is_overwritten(demo, images):
    before = (images / "0.png").read_bytes()
    for output, files in (("photos", ["photos"]), ("photos/0.png", ["photos/0.png"])):
        status, _, err = demo("--input", *files, "--output", output)
        assert status == 2 and len(err) == 1 and "would overwrite an input" in err[0]
    shutil.copy("photos/0.png", "photos/0")  # whose picture would be 0.png
    status, _, err = demo("--input", "photos/0", "photos/0.png", "--output", "out")
    assert status == 2 and len(err) == 1 and "two pictures would be one file" in err[0]
    assert (images / "0.png").read_bytes() == before


def write_video(path, frames, codec="mp4v"):
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*codec), 7.0, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def read_video(path):
    video = cv2.VideoCapture(str(path))
    frames = []
    while (frame := video.read())[0]:
        frames.append(frame[1])
    return video.get(cv2.CAP_PROP_FPS), frames


@pytest.fixture
def frames(photographs):
    image = cv2.resize(cv2.imread(str(photographs.images / "0.jpg")), (240, 180))
    return [np.roll(image, 3 * i, axis=1) for i in range(7)]


@pytest.mark.parametrize("output", ["out", "out/drawn.mp4"])
def test_every_frame_of_a_video_is_drawn(demo, frames, output):
    write_video("in.mp4", frames)
    Path("out").mkdir()
    status, _, err = demo("--video-input", "in.mp4", "--output", output)
    assert (status, err) == (0, [])
    (json_file,) = Path("out").glob("*.json")
    (video,) = set(Path("out").iterdir()) - {json_file}
    assert video.stem == json_file.stem == ("in" if output == "out" else "drawn")
    rate, drawn = read_video(video)
    _, given = read_video("in.mp4")
    assert rate == 7 and len(drawn) == len(given) == 7
    for i, frame in enumerate(drawn):
        distances = [np.median(np.abs(frame.astype(int) - other)) for other in given]
        assert np.argmin(distances) == i and (frame != given[i]).any(axis=2).mean() > 0.1
    coco, _ = read(json_file)
    assert [(image["file_name"], image["frame"]) for image in coco["images"]] == [
        ("in.mp4", i) for i in range(7)
    ]
    assert {a["image_id"] for a in coco["annotations"]} <= set(range(1, 8))
    assert coco["annotations"]


def test_video_that_breaks_off_is_reported(demo, frames):
    write_video("whole.avi", frames * 2, "MJPG")
    data = Path("whole.avi").read_bytes()
    Path("cut.avi").write_bytes(data[: len(data) // 4])
    status, _, err = demo("--video-input", "cut.avi", "--output", "out")
    assert status == 1 and len(err) == 1
    assert re.search(r"The video cut.avi ended after \d+ of 14 frames", err[0])
    (json_file,) = Path("out").glob("*.json")
    assert 0 < len(read(json_file)[0]["images"]) < 7


def test_pictures_are_shown_until_escape(demo, images, monkeypatch):
    shown, keys = [], iter([32, 27])
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *args: None)
    monkeypatch.setattr(cv2, "imshow", lambda window, picture: shown.append(picture.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: next(keys))
    assert demo("--input", images)[0] == 0
    assert shown == [(240, 320, 3)] * 2
    assert sorted(p.name for p in Path().iterdir()) == ["classes.json", "photos"]

    status, _, err = demo("--webcam")
    assert status == 2 and err == ["demo.py: error: OpenCV cannot read a webcam."]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input", "gone.jpg", "*.gone"], "Nothing to read. .* at gone.jpg. .* at [*].gone."),
        (["--input", "photos"], "no display .* --output"),
        (["--webcam"], "no display"),
        (["--webcam", "--output", "out"], "--webcam .* leave out --output"),
        (["--webcam", "--input", "photos"], "--input: not allowed with argument --webcam"),
        (["--input", "photos", "--output", "out.png"], "out.png: two pictures would be one"),
        (["--input", "photos/0.png", "--output", "out.doc"], "out.doc: OpenCV cannot write"),
        (["--input", "photos", "--output", "classes.json/out"], "classes.json/out: Not a dir"),
        (["--video-input", "gone.mp4"], "cannot read the video gone.mp4"),
        (["--video-input", "classes.json"], "cannot read the video classes.json"),
        (["--video-input", "in.mp4", "--output", "in.mp4"], "in.mp4 would overwrite an input"),
        (["--video-input", "in.mp4", "--output", "out.doc"], "cannot write the video out.doc"),
    ],
)
def test_mistake_is_one_sentence(run, images, frames, weights, args, message):
    write_video("in.mp4", frames[:1])
    Path("classes.json").write_text("{}")
    if "--output" not in args and message.split()[0] not in ("no",):
        args = [*args, "--output", "out"]
    status, out, err = run("--config-file", QUICK_START, *args, "--opts", "MODEL.WEIGHTS", weights)
    assert status == 2 and out == "" and len(err) == 1
    assert re.search(message, err[0]), err
    assert not list(Path().rglob("*.part")) and not list(Path().glob("out*/*"))


@pytest.mark.parametrize(
    "args, opts, message",
    [
        (["--model", "mask_rcnn_R52"], [], "no model mask_rcnn_R52: .* such as mask_rcnn_R"),
        (["--config-file", "gone.yaml"], [], "gone.yaml"),
        ([], ["MODEL.WEIGHTS", "gone.pth"], "The checkpoint gone.pth does not exist"),
        ([], ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        ([], ["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        ([], ["DATASETS.TEST", "('mine',)"], "names mine, .* --dataset mine"),
        ([], ["DATASETS.TEST", "('none',)"], "classes.json has nothing in 'categories'"),
        ([], ["DATASETS.TEST", "('coco_2017_val',)"], "NUM_CLASSES is 3, .* has 80 classes"),
        ([], ["SEED", "many"], "SEED"),
    ],
)
def test_mistake_about_the_model_is_one_sentence(run, images, weights, args, opts, message):
    Path("classes.json").write_text('{"images": [{}], "categories": []}')
    dataset = ["--dataset", "none", "classes.json", "."] if "('none',)" in opts else []
    args = args or ["--config-file", QUICK_START]
    args = [*args, "--input", "photos", "--output", "out", *dataset, "--opts"]
    status, out, err = run(*args, "MODEL.WEIGHTS", weights, *opts)
    assert status == 2 and out == "" and len(err) == 1
    assert re.search(message, err[0]), err


def test_control_characters_of_a_class_name_do_not_reach_the_terminal(run, images, weights):
    coco = {"images": [{"id": 0}], "categories": [{"id": 1, "name": "\x1b[31mfig"}]}
    Path("classes.json").write_text(json.dumps(coco))
    status, out, err = run(
        "--config-file", QUICK_START, "--input", "photos", "--output", "out",
        "--dataset", "colored", "classes.json", ".",
        "--opts", "MODEL.WEIGHTS", weights, "DATASETS.TEST", "('colored',)",
    )  # fmt: skip
    assert status == 2 and len(err) == 1 and "[31mfig" in err[0]
    assert (out + err[0]).isprintable()


def test_model_of_the_zoo_has_the_published_weights(run, images, tmp_path, monkeypatch):
    name = "faster_rcnn_R50_gnws_1x"
    published = tmp_path / "published.pth"
    torch.save({"meta": {}, "state_dict": mmdet_state(name)}, published)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(
        catalog.GNWSCatalogHandler,
        "_get_local_path",
        lambda self, path, **kwargs: asked.append(path) or str(published),
    )
    args = ["--model", name, "--input", "photos/0.png", "--output", "out", "--opts"]
    opts = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"]
    assert run(*args, *opts)[0] == 0
    assert set(asked) == {f"gnws://{name}"}
    coco, _ = read("out/detections.json")
    assert coco["categories"][-1] == {"id": 90, "name": "toothbrush"} and coco["annotations"]
    assert coco["annotations"][0]["area"] == pytest.approx(
        np.prod(coco["annotations"][0]["bbox"][2:])
    )
    asked.clear()
    assert run(*args, *opts, "MODEL.WEIGHTS", published)[0] == 0
    assert not asked

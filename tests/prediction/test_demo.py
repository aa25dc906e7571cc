"""``gnws demo``: detections, files and error messages."""

import json
import os
import re
import shutil
import signal
import uuid
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from builders import classes_of
from conftest import small_mask_rcnn
from detectron2.data import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from gnws_d2 import Predictor
from gnws_d2.config import load_config
from gnws_d2.data.formats import Notes, read_coco_files, read_dataset
from gnws_d2.prediction.demo import VisualizationDemo
from gnws_d2.prediction.results import CocoDetections

# Not in the order of their ids.
CATEGORIES = [{"id": 7, "name": "fig"}, {"id": 3, "name": "date"}, {"id": 5, "name": "nut"}]
FEW = ["TEST.DETECTIONS_PER_IMAGE", "5"]  # drawing takes long


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the quick start's network that detect objects of all classes."""
    torch.manual_seed(0)
    model = build_model(load_config("quick_start", []))
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 300
        model.roi_heads.mask_head.predictor.weight *= 300
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch, gnws):
    """Run the command in its own directory. Return the exit status, stdout, and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        status, out, err = gnws("demo", *args)
        return status, out, [line for line in err.splitlines() if line.startswith("gnws demo:")]

    return run


@pytest.fixture
def demo(run, weights, tmp_path):
    """Run the tool with :func:`weights` and :data:`CATEGORIES`."""
    coco = {"images": [{"id": 0}], "categories": CATEGORIES}
    (tmp_path / "classes.json").write_text(json.dumps(coco))
    name = f"demo_{uuid.uuid4().hex}"  # a name is for one dataset in a process

    def demo(*args):
        return run(
            "--config-file", "quick_start", *args, "--dataset", name, "classes.json", ".",
            "--confidence-threshold", "0.4",
            "--opts", "MODEL.WEIGHTS", weights, "DATASETS.TEST", f"('{name}',)", *FEW,
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


def test_pictures_and_json_have_the_detections_of_the_predictor(demo, images, weights):
    status, out, err = demo("--input", images, "--output", "out")
    assert (status, err) == (0, [])
    coco, found = read("out/detections.json")
    assert f"5 images, {len(coco['annotations'])} objects: out/detections.json" in out
    assert coco["info"]["image_root"] == str(images)
    assert sorted(coco["categories"], key=lambda c: -c["id"]) == [
        CATEGORIES[0], CATEGORIES[2], CATEGORIES[1],
    ]  # fmt: skip
    opts = ["MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.4, *FEW]
    predictor = Predictor(load_config("quick_start", opts))
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
    # The file is both a dataset and results in COCO format.
    notes = Notes()
    read_coco_files({"all": ("out/detections.json", str(images))}, notes)
    assert not notes.left_out  # a box of few weights is not always that of its mask
    truth = COCO("out/detections.json")
    assert len(truth.loadRes(coco["annotations"]).getAnnIds()) == len(coco["annotations"])


def test_unreadable_inputs_are_named_and_skipped(demo, images, photographs):
    data = (photographs.images / "0.jpg").read_bytes()
    bad = {"cut.jpg": data[: len(data) // 2], "empty.jpg": b"", "page.jpg": b"<html></html>"}
    for name, content in bad.items():
        (images / name).write_bytes(content)
    (images / "notes.txt").write_text("not an image, by its name")
    Path("nothing").mkdir()
    gone = ["gone.jpg", "*.gone", "nothing"]
    status, _, err = demo("--input", "photos", *gone, "--output", "out")
    assert status == 1
    for name in (*bad, *gone):
        assert sum(name in line for line in err) == 1, name
    assert len(err) == 7 and "6 of the inputs could not be used" in err[-1]
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(
        [f"{i}.png" for i in range(5)] + ["detections.json"]
    )
    assert len(read("out/detections.json")[0]["images"]) == 5


def test_picture_of_any_shape_is_drawn_and_further_frames_are_told(demo, tmp_path):
    (tmp_path / "in").mkdir()
    pictures = {"thin": (2000, 2), "tall": (2, 900), "dot": (1, 1), "small": (2, 9)}
    for name, size in pictures.items():
        Image.new("RGB", size, (90, 120, 40)).save(f"in/{name}.png")
    first, second = (Image.new("RGB", (60, 40), color) for color in ("red", "blue"))
    for name in ("frames.gif", "frames.webp", "pages.tif"):
        first.save(f"in/{name}", save_all=True, append_images=[second])
    status, _, err = demo("--input", "in", "--output", "out")
    told = "has 2 frames or pages: only the first is used"
    assert status == 0 and [told in line for line in err] == [True] * 3
    coco, _ = read("out/detections.json")
    assert {i["file_name"]: (i["width"], i["height"]) for i in coco["images"]} == {
        **{f"{name}.png": size for name, size in pictures.items()},
        **dict.fromkeys(["frames.gif", "frames.webp", "pages.tif"], (60, 40)),
    }
    assert len(list(Path("out").iterdir())) == 8


def test_drawing_of_any_picture_has_a_name_of_its_own(demo, images):
    shutil.copy("photos/0.png", "photos/0")
    shutil.copy("photos/0.png", "photos/0.jfif")
    cv2.imwrite("photos/0.pgm", cv2.imread("photos/0.png", cv2.IMREAD_GRAYSCALE))
    inputs = [f"photos/{name}" for name in ("0.png", "0", "0.jfif", "0.pgm")]
    shutil.copy("photos/0.png", "photos/0.png.png")
    status, _, err = demo("--input", *inputs, "photos/0.png.png", "--output", "out")
    assert (status, err) == (0, [])
    drawings = {"0.png", "0.png.png", "0.jfif.png", "0.pgm.png", "0.png.png.png"}
    assert {path.name for path in Path("out").iterdir()} == drawings | {"detections.json"}


def test_drawing_that_cannot_be_written_does_not_stop_the_others(demo, images):
    Path("out/1.png").mkdir(parents=True)
    status, _, err = demo("--input", "photos", "--output", "out")
    assert status == 1 and "Cannot write out/1.png: Is a directory" in err[0]
    assert len(read("out/detections.json")[0]["images"]) == 5
    assert cv2.imread("out/4.png") is not None


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_whole_files_of_the_images_before_it(
    demo, images, monkeypatch, signum, status
):
    draw = VisualizationDemo.run_on_image

    def run_on_image(self, image, scale, file_name):
        if file_name == "2.png":
            os.kill(os.getpid(), signum)
        return draw(self, image, scale, file_name=file_name)

    monkeypatch.setattr(VisualizationDemo, "run_on_image", run_on_image)
    got, out, err = demo("--input", "photos", "--output", "out")
    assert got == status and f"stopped by {signum.name}" in err[-1] and "3 images" in out
    coco, _ = read("out/detections.json")
    assert [image["file_name"] for image in coco["images"]] == ["0.png", "1.png", "2.png"]
    names = ["0.png", "1.png", "2.png", "detections.json"]
    assert sorted(path.name for path in Path("out").iterdir()) == names


def test_threshold_of_the_last_evaluation_is_used_unless_one_is_given(run, images, tmp_path):
    model = tmp_path / "run" / "model_final.pth"
    model.parent.mkdir()
    cfg = small_mask_rcnn(model, ["fig", "date", "nut"])
    (model.parent / "config.yaml").write_text(cfg.dump())
    scores = Predictor(cfg)("photos/0.png")["instances"].scores
    middle = scores.sort().values[len(scores) // 2 :][:2].mean().item()

    def number(*args):
        args = ["--model", model.parent, "--input", "photos/0.png", "--output", "out", *args]
        status, out, err = run(*args)
        assert (status, err) == (0, [])
        return len(read("out/detections.json")[0]["annotations"]), out

    assert "scores of at least 0.50" in number()[1]
    (model.parent / "threshold.json").write_text(json.dumps({"threshold": middle}))
    count, out = number()
    assert 0 < count == (scores > middle).sum() < len(scores)
    assert f"scores of at least {middle:.2f}" in out
    assert Predictor(cfg).threshold == middle
    assert number("--threshold", "0")[0] > count


def test_saved_labels_are_the_detections_and_are_not_overwritten(demo, images):
    args = ["--input", "photos", "--output", "out", "--save-labels", "yolo"]
    status, out, err = demo(*args)
    assert (status, err) == (0, []) and "5 pictures with labels to correct: out/labels_yolo" in out
    coco, _ = read("out/detections.json")
    (labels,) = read_dataset("out/labels_yolo", Notes()).values()
    assert sorted(classes_of(coco)) == sorted(classes_of(labels))
    status, _, err = demo(*args)
    assert status == 2 and "out/labels_yolo exists, and is not overwritten" in err[0]


def test_inputs_of_the_same_name_have_a_picture_each(demo, images):
    Path("more/deep").mkdir(parents=True)
    shutil.copy("photos/0.png", "more/deep/1.png")
    inputs = ["photos/[01].png", "more/deep/1.png", "./photos/1.png"]
    assert demo("--input", *inputs, "--output", "out")[0] == 0
    names = ["photos/0.png", "photos/1.png", "more/deep/1.png"]
    assert [image["file_name"] for image in read("out/detections.json")[0]["images"]] == names
    assert all(cv2.imread(f"out/{name}") is not None for name in names)


def test_inputs_are_not_overwritten(demo, images):
    before = (images / "0.png").read_bytes()
    status, _, err = demo("--input", "photos", "--output", "photos")
    assert status == 2 and "would overwrite the input" in err[0]
    assert (images / "0.png").read_bytes() == before


def write_video(path, frames):
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 7.0, frames[0].shape[1::-1])
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


def test_every_frame_of_a_video_is_drawn(demo, frames):
    write_video("in.mp4", frames)
    status, _, err = demo("--video-input", "in.mp4", "--output", "out")
    assert (status, err) == (0, [])
    rate, drawn = read_video("out/in.mp4")
    _, given = read_video("in.mp4")
    assert rate == 7 and len(drawn) == len(given) == 7
    for i, frame in enumerate(drawn):
        distances = [np.median(np.abs(frame.astype(int) - other)) for other in given]
        assert np.argmin(distances) == i and (frame != given[i]).any(axis=2).mean() > 0.1
    coco, _ = read("out/detections.json")
    assert [(image["file_name"], image["frame"]) for image in coco["images"]] == [
        ("in.mp4", i) for i in range(7)
    ]
    assert {a["image_id"] for a in coco["annotations"]} <= set(range(1, 8))
    assert coco["annotations"]


@pytest.mark.parametrize("rate", [0.0, np.nan, 90000.0])
def test_video_without_a_frame_rate_gets_25(demo, frames, monkeypatch, rate):
    open_video = cv2.VideoCapture

    def open_without_rate(path):
        video = open_video(path)

        def get(key):
            return rate if key == cv2.CAP_PROP_FPS else video.get(key)

        return SimpleNamespace(isOpened=video.isOpened, read=video.read, get=get)

    write_video("in.mp4", frames[:2])
    with monkeypatch.context() as m:
        m.setattr(cv2, "VideoCapture", open_without_rate)
        assert demo("--video-input", "in.mp4", "--output", "out")[0] == 0
    rate, drawn = read_video("out/in.mp4")
    assert rate == 25 and len(drawn) == 2


PHOTOS = ["--input", "photos"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--video-input", "in.mp4", "--save-labels", "yolo"], "--save-labels needs --input"),
        (["--input", "gone.jpg", "*.gone"], "no image at gone.jpg. .* at [*].gone."),
        ([*PHOTOS, "--threshold", "2"], "2 is not a score from 0 to 1"),
        ([*PHOTOS, "--threshold", "nan"], "argument --threshold"),
        ([*PHOTOS, "--output", "classes.json/out"], "classes.json/out: Not a dir"),
        ([*PHOTOS, "--video-input", "in.mp4"], "not allowed with argument --input"),
        (["--video-input", "gone.mp4"], "cannot read the video gone.mp4"),
        (["--video-input", "classes.json"], "cannot read the video classes.json"),
        (["--video-input", "in.mp4", "--output", "."], "overwrite the input .*in.mp4"),
        ([*PHOTOS, "--model", "mask_rcnn_R52"], "R52 is not a trained model: .* mask_rcnn"),
        ([*PHOTOS, "--opts", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        ([*PHOTOS, "--opts", "DATASETS.TEST", "('mine',)"], "names mine, .* --dataset mine"),
        ([*PHOTOS, "--opts", "DATASETS.TEST", "('coco_2017_val',)"], "is 3, .* has 80 classes"),
    ],
)
def test_mistake_is_one_sentence(run, images, frames, weights, args, message):
    write_video("in.mp4", frames[:1])
    Path("classes.json").write_text("{}")
    model = [] if "--model" in args else ["--config-file", "quick_start"]
    opts = [] if "--opts" in args else ["--opts"]
    status, out, err = run("--output", "out", *model, *args, *opts, "MODEL.WEIGHTS", weights)
    assert status == 2 and out == "" and len(err) == 1
    assert re.search(message, err[0]), err


def test_area_of_an_object_without_a_mask_is_the_area_of_its_box():
    names = {"thing_classes": ["fig"], "thing_dataset_id_to_contiguous_id": {7: 0}}
    detections = CocoDetections(Metadata(**names))
    boxes, classes = Boxes(torch.tensor([[1.0, 2, 4, 8]])), torch.tensor([0])
    found = Instances((10, 20), pred_boxes=boxes, pred_classes=classes, scores=torch.ones(1))
    detections.add(found, file_name="a.jpg")
    (annotation,) = detections.annotations
    assert (annotation["area"], annotation["category_id"]) == (18, 7)
    assert detections.images == [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}]

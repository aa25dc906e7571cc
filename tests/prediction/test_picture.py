"""What a predictor takes for a picture, and the sentence for all else."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from builders import png
from conftest import small_mask_rcnn
from PIL import Image

from gnws_d2 import Predictor
from gnws_d2.data import read_image
from gnws_d2.prediction.picture import open_picture


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    return Predictor(small_mask_rcnn(path, ["fig", "date", "nut"]))


@pytest.fixture
def bgr(photographs):
    return read_image(str(photographs.images / "0.jpg"), "BGR")[::4, ::4].copy()


@pytest.fixture
def folder(tmp_path, bgr, monkeypatch):
    """0.png and 1.png, which is upside down."""
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate((bgr, bgr[::-1])):
        Image.fromarray(image[:, :, ::-1]).save(f"{i}.png")
    return tmp_path


def fields(output):
    instances = output["instances"]
    assert len(instances) > 0
    return [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]


def equal(a, b):
    return all(map(torch.equal, fields(a), fields(b)))


FORMS = {
    "path": lambda image: "0.png",
    "Path": lambda image: Path("0.png"),
    "bytes": lambda image: Path("0.png").read_bytes(),
    "PIL image": lambda image: Image.open("0.png"),
    "PIL image with alpha": lambda image: Image.open("0.png").convert("RGBA"),
    "BGRA": lambda image: np.dstack([image, np.full(image.shape[:2], 7, np.uint8)]),
    "other strides": lambda image: image[:, :, ::-1].copy()[:, :, ::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_same_picture_gives_the_same_detections_in_any_form(predictor, folder, bgr, form):
    assert equal(predictor(FORMS[form](bgr)), predictor(bgr))


def test_url(predictor, folder, bgr, server):
    server.files["picture"] = Path("0.png").read_bytes()
    assert equal(predictor(f"{server.url}/picture"), predictor(bgr))
    with pytest.raises(ValueError, match=r"Cannot download the image .*gone.png: HTTP Error 404"):
        predictor(f"{server.url}/gone.png")


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_pillow_image_is_what_its_file_is_in_training(tmp_path, folder, mode):
    image = Image.open("0.png").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    of_file = read_image(str(path), "BGR").astype(int)
    # CMYK is converted with other rounding.
    assert np.abs(open_picture(image) - of_file).max() <= (2 if mode == "CMYK" else 0)


def test_gray_arrays_are_what_gray_files_are(folder):
    Image.open("0.png").convert("L").save("gray.png")
    gray = np.array(Image.open("gray.png"))
    for image in (gray, gray[:, :, None]):
        assert np.array_equal(open_picture(image), read_image("gray.png", "BGR"))


def test_exif_orientation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("0.png").save("turned.png", exif=exif)
    expected = np.rot90(open_picture("0.png"), -1)
    assert np.array_equal(open_picture(Image.open("turned.png")), expected)
    assert np.array_equal(open_picture("turned.png"), expected)


def test_lists_directories_and_patterns(predictor, folder, bgr):
    both = [predictor("0.png"), predictor("1.png")]
    batch = predictor((bgr, bgr[::-1]))
    assert len(batch) == 2 and all(map(equal, predictor(["0.png", Image.open("1.png")]), batch))
    (folder / "notes.txt").write_text("not an image, by its name")
    for path in (str(folder), folder, f"{folder}/?.png", "./"):
        outputs = predictor(path)
        assert next(outputs)["file_name"].endswith("0.png")  # one at a time
        (last,) = outputs
        assert last["file_name"].endswith("1.png") and equal(last, both[1])
    (folder / "[01].png").write_bytes(Path("0.png").read_bytes())
    assert equal(predictor("[01].png"), both[0])  # a file of this name comes first
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"There is no image in .*empty"):
        predictor(folder / "empty")


@pytest.mark.parametrize("shape", [(1, 1, 3), (2000, 1, 3), (2, 3000, 3)])
def test_image_of_any_shape_is_resized(predictor, shape):
    assert predictor(np.zeros(shape, np.uint8))["instances"].image_size == shape[:2]


@pytest.mark.parametrize(
    "picture, message",
    [
        (None, "The picture is None: give a path, URL, PIL image"),
        ([], r"The picture is \[\]: give a path"),
        ((), r"The picture is \(\): give a path"),
        ([None], "The picture is None"),
        (7, "The picture is of type int: "),
        (torch.zeros(3, 8, 8), "The picture is of type Tensor: .* array of shape"),
        (iter([]), "The picture is of type list_iterator"),
        (np.zeros((8, 8, 3)), r"array of shape \(8, 8, 3\) and type float64: give"),
        (np.zeros((8, 8, 3), np.uint16), "type uint16"),
        (np.zeros((8, 8, 3), bool), "type bool"),
        (np.zeros((3, 8, 8), np.uint8), r"array of shape \(3, 8, 8\) and type uint8"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"without pixels, of shape \(0, 8, 3\)"),
        (Image.new("I;16", (8, 8)), r"The PIL image is not of 8 bits \(mode I;16\): convert it"),
        (Image.new("F", (8, 8)), "mode F"),
        (b"", "The image given as bytes is damaged or not an image: its format is not known"),
        (png(np.zeros((8, 8), np.uint16)), "image given as bytes has 16 bits per channel"),
        (png(np.zeros((80, 80), np.uint8))[:-20], "given as bytes is damaged"),
        ("gone.png", "Cannot read the image gone.png: No such file"),
        ("gone/*.png", r"Cannot read the image gone/\*.png: No such file"),
        ("http://localhost:1/a.png", "Cannot download the image http://localhost:1/a.png: "),
        ("", "Cannot read the image : No such file"),
    ],
)
def test_what_cannot_be_used_is_a_value_error_of_one_sentence(predictor, picture, message):
    with pytest.raises(ValueError, match=message) as e:
        predictor(picture)
    assert re.fullmatch(r"[^\n]*\.", str(e.value))


def test_pillow_image_with_colors_of_16_bits_is_told(tmp_path):
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, np.full((8, 8, 3), 1000, np.uint16))
    with pytest.raises(ValueError, match="not of 8 bits"):
        open_picture(Image.open(path))


def test_damaged_pillow_image_is_told(folder):
    data = Path("0.png").read_bytes()
    Path("0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="The PIL image cannot be read: "):
        open_picture(Image.open("0.png"))

import os
import zlib

import cv2
import numpy as np
import pytest
import torch
from builders import encode
from detectron2.config import get_cfg
from detectron2.data.datasets import load_coco_json
from detectron2.structures import polygons_to_bitmask
from PIL import Image

from gnws_d2 import model_zoo
from gnws_d2.data import OpenCVDatasetMapper, read_image
from gnws_d2.data.dataset_mapper import BadImageError
from gnws_d2.utils.errors import UserError


def get_config(min_size=400, flip="none"):
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (min_size,), min_size
    cfg.INPUT.RANDOM_FLIP = flip
    return cfg


@pytest.fixture
def records(photographs):
    return load_coco_json(str(photographs.json_file), str(photographs.images), "fruits_mapper")


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize(
    "size, shape",
    [(800, (800, 1067)), (333, (333, 444)), (600, (600, 800)), (2000, (1000, 1333))],
)
def test_test_image_is_opencvs_bit_for_bit(records, image_format, size, shape):
    cfg = get_config(size)
    cfg.INPUT.FORMAT = image_format
    for record in records[:3]:
        image = OpenCVDatasetMapper(cfg, False)(record)["image"]
        expected = cv2.imread(record["file_name"])
        expected = cv2.resize(expected, shape[::-1], interpolation=cv2.INTER_LINEAR)
        if image_format == "RGB":
            expected = expected[:, :, ::-1]
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_exif_orientation_is_applied_as_opencv_does(records, tmp_path):
    path = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    Image.open(records[0]["file_name"]).save(path, exif=exif)
    image = read_image(str(path), "BGR")
    assert image.shape == (800, 600, 3)
    assert np.array_equal(image, cv2.imread(str(path)))


def test_polygons_of_whole_numbers_keep_their_fractions_when_resized(records):
    """Detectron2 truncates them to whole numbers of the new size."""
    record = {**records[0], "annotations": [dict(records[0]["annotations"][0])]}
    mapper = OpenCVDatasetMapper(get_config(333, "none"), True)
    masks = []
    for kind in (int, float):
        square = list(map(kind, (111, 111, 310, 111, 310, 310, 111, 310)))
        record["annotations"][0]["segmentation"] = [square]
        masks.append(mapper(record)["instances"].gt_masks.tensor)
    assert torch.equal(*masks)


@pytest.mark.parametrize("flip", ["none", "horizontal"])
@pytest.mark.parametrize("rle", [False, True], ids=["polygons", "rle"])
def test_instances_equal_those_of_detectron2s_mapper(records, flip, rle, monkeypatch):
    """Bit for bit, also where crowds and empty masks are left out."""
    mapper = OpenCVDatasetMapper(get_config(450, flip), True)
    records = [record for record in records if len(record["annotations"]) > 3]
    for record in records:
        first, second, third = record["annotations"][:3]
        first["iscrowd"] = 1
        second["segmentation"] = [[1.0, 1.0, 1.2, 1.0, 1.2, 1.2]]  # no pixel
        third["bbox"] = [5, 5, 0, 0]
        if rle:
            for annotation in record["annotations"]:
                size = record["height"], record["width"]
                mask = polygons_to_bitmask(annotation["segmentation"], *size)
                annotation["segmentation"] = encode(mask)

    def mapped():
        np.random.seed(0)
        return [mapper(record)["instances"] for record in records]

    ours = mapped()
    monkeypatch.delattr(OpenCVDatasetMapper, "_transform_annotations")
    for actual, expected, record in zip(ours, mapped(), records):
        assert len(actual) == len(record["annotations"]) - 3
        assert torch.equal(actual.gt_boxes.tensor, expected.gt_boxes.tensor)
        assert torch.equal(actual.gt_classes, expected.gt_classes)
        assert torch.equal(actual.gt_masks.tensor, expected.gt_masks.tensor)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_opened(tmp_path, make):
    """Reading a pipe that nobody writes to, or /dev/zero, would never end."""
    path = tmp_path / "special.jpg"
    make(path)
    with pytest.raises(BadImageError, match=f"{path}: it is not a regular file"):
        read_image(str(path), "BGR")


FAULTS = {
    "missing": None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "no image": lambda data: b"<html>not found</html>",
    "another size": lambda data: data,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_faulty_image_is_an_error_that_names_it(records, tmp_path, fault, suffix):
    path = tmp_path / f"photo{suffix}"
    record = dict(records[0], file_name=str(path))
    record["width"] += fault == "another size"
    if change := FAULTS[fault]:
        data = cv2.imencode(suffix, cv2.imread(records[0]["file_name"]))[1].tobytes()
        path.write_bytes(change(data))
    with pytest.raises(UserError) as e:
        OpenCVDatasetMapper(get_config(), True)(record)
    assert record["file_name"] in str(e.value)
    assert "\n" not in str(e.value)


def test_whole_image_with_trailing_bytes_is_read(records, tmp_path):
    path = tmp_path / "trailing.jpg"
    with open(records[0]["file_name"], "rb") as f:
        path.write_bytes(f.read() + b"trailer")
    assert np.array_equal(read_image(str(path), "BGR"), cv2.imread(records[0]["file_name"]))


def png(width, height, data):
    """A file with a grey image of 1 bit a pixel."""

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return len(content).to_bytes(4, "big") + name + content + crc.to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_images_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    bomb = png(20_000, 20_000, zlib.compress(bytes(20_000 * 2501)))  # 50 kB, 1.2 GB of RGB
    assert len(bomb) < 60_000
    files = {"header.png": png(100_000, 100_000, b""), "bomb.png": bomb, "cut.png": bomb[:-9]}
    monkeypatch.setattr(cv2, "imdecode", None)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is larger than PIL.Image.MAX_IMAGE_P") as e:
            read_image(str(tmp_path / name), "BGR")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("image_format", ["DDS", "TIFF", "AVIF", "BMP", "WEBP"])
def test_damaged_image_of_any_format_is_an_error(tmp_path, image_format):
    """Pillow raises NotImplementedError, RuntimeError and TypeError for some of these."""
    path = tmp_path / "damaged"
    Image.new("RGB", (30, 20)).save(path, image_format)
    content = path.read_bytes()
    refused = 0
    for at in range(len(content) // 2 if len(content) < 1000 else 200):
        path.write_bytes(content[:at] + b"\xff\xf1" + content[at + 2 :])
        try:
            read_image(str(path), "BGR")
        except BadImageError:
            refused += 1
    assert refused


def test_limit_of_image_size_can_be_raised(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png(80, 80, zlib.compress(bytes(80 * 11))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6399)
    with pytest.raises(UserError, match="6399"):
        read_image(str(path), "BGR")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6400)
    assert read_image(str(path), "BGR").shape == (80, 80, 3)


def test_unknown_channel_order_is_refused():
    cfg = get_config()
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(UserError, match=r"INPUT\.FORMAT"):
        OpenCVDatasetMapper(cfg, True)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_more_than_8_bits_is_refused_by_name(tmp_path, channels):
    """12 bits of a camera in a PNG of 16 would be read as black."""
    image = np.full((8, 8, channels), 4095, np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    with pytest.raises(BadImageError, match=r"has 16 bits per channel, and values up to 4095"):
        read_image(str(tmp_path / "a.png"), "BGR")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_kinds_of_8_bit_images_are_read(tmp_path, mode):
    Image.new("RGB", (8, 6), (200, 100, 50)).convert(mode).save(tmp_path / "a.png")
    image = read_image(str(tmp_path / "a.png"), "RGB")
    assert image.shape == (6, 8, 3) and image.dtype == np.uint8
    assert np.array_equal(image, cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1])


def test_detectron2s_own_config_has_no_augmentation(records):
    cfg = get_cfg()
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (400,)
    ours = OpenCVDatasetMapper(get_config(), True)(records[0])["image"]
    assert torch.equal(OpenCVDatasetMapper(cfg, True)(records[0])["image"].flip(0), ours)

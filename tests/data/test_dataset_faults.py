"""Every fault of a dataset is found, in the tool and before a training, by one implementation."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.datasets import load_coco_json
from PIL import Image

from gnws_d2 import model_zoo
from gnws_d2.data import OpenCVDatasetMapper, check_coco_json, read_image
from gnws_d2.data.check import check_dataset, find_faults, read_coco_json
from gnws_d2.data.dataset_mapper import BadImageError
from gnws_d2.utils.errors import UserError

ROOT = Path(__file__).parent.parent.parent
H, W = 600, 800  # of the photographs


def faults_of(coco, image_root, masks=True):
    return {
        (f.level, f.kind, f.item, f.id) for f in find_faults(coco, str(image_root), masks=masks)
    }


def annotation(**values):
    return lambda coco: coco["annotations"][0].update(values)


def rle(counts, size=(H, W)):
    return annotation(segmentation={"size": list(size), "counts": counts})


def image(**values):
    return lambda coco: coco["images"][0].update(values)


@pytest.mark.parametrize(
    "change, level, kind",
    [
        (annotation(image_id=99), "error", "annotation without image"),
        (annotation(image_id=[0]), "error", "annotation without image"),
        (annotation(image_id=True), "error", "annotation without image"),
        (annotation(category_id="1"), "error", "unknown category"),
        (annotation(category_id={}), "error", "unknown category"),
        (annotation(bbox=None), "error", "box"),
        (annotation(bbox=["1", 2, 3, 4]), "error", "box"),
        (annotation(bbox=[True, 2, 3, 4]), "error", "box"),
        (annotation(bbox=[10**400, 2, 3, 4]), "error", "box"),
        (annotation(bbox=[1, 2, float("inf"), 4]), "error", "box"),
        (annotation(bbox=[-(10**300), 2, 10**300, 4]), "error", "box outside its image"),
        (annotation(bbox=[W, 2, 3, 4]), "error", "box outside its image"),
        (annotation(bbox=[3, 2, 0, 4]), "warning", "box with no area"),
        (annotation(bbox=[9, 2, 3, -4]), "warning", "box with no area"),
        (annotation(bbox=[W - 9, 2, 30, 4]), "warning", "box over the edge of its image"),
        (annotation(segmentation=[]), "error", "no segmentation"),
        (annotation(segmentation="x"), "error", "segmentation"),
        (annotation(segmentation=[3]), "error", "polygon"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "error", "polygon"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, "6"]]), "error", "polygon"),
        (annotation(segmentation=[[1, 2, 3, 4]]), "evaluation", "polygon without three points"),
        (annotation(segmentation=[[0] * 7]), "evaluation", "polygon without three points"),
        (annotation(segmentation=[[0, 0, 9, 9, 1e9, 9]]), "error", "polygon outside its image"),
        (rle([H * W], (W, H)), "error", "RLE of another size"),
        (rle([H * W], ("a", 0)), "error", "RLE of another size"),
        (rle([H * W - 1]), "error", "broken RLE"),
        (rle([H * W + 1, -1]), "error", "broken RLE"),
        (rle([float(H * W)]), "error", "broken RLE"),
        (rle([]), "error", "broken RLE"),
        (rle(""), "error", "broken RLE"),
        (rle("P"), "error", "broken RLE"),  # goes on, and there is nothing
        (rle("\x00"), "error", "broken RLE"),
        (rle("é"), "error", "broken RLE"),
        (rle("oooooooooooo1"), "error", "broken RLE"),  # of more than 64 bits
        (rle(None), "error", "broken RLE"),
        (annotation(iscrowd="no"), "error", "'iscrowd'"),
        (annotation(ignore=1), "error", "'ignore'"),
        (annotation(keypoints=[1, 2]), "error", "'keypoints'"),
        (annotation(area=None), "evaluation", "no 'iscrowd' or 'area'"),
        (lambda coco: coco["annotations"][0].pop("bbox"), "error", "no box"),
        (annotation(area="9"), "evaluation", "no 'iscrowd' or 'area'"),
        (annotation(id=2), "error", "duplicate annotation id"),
        (image(file_name="gone.jpg"), "error", "missing image"),
        (image(file_name="a\0b"), "error", "missing image"),
        (image(file_name="\ud800"), "error", "missing image"),
        (image(file_name=3), "error", "no file name"),
        (image(file_name="../images/0.jpg"), "error", "path out of the image directory"),
        (image(file_name="a/../../images/0.jpg"), "error", "path out of the image directory"),
        (image(file_name="/etc/passwd"), "error", "path out of the image directory"),
        (image(file_name="http://a/0.jpg"), "error", "path out of the image directory"),
        (image(width=0), "error", "image size"),
        (image(height="600"), "error", "image size"),
        (image(width=100_000, height=100_000), "error", "image size"),
        (image(width=float("nan")), "error", "image size"),
        (lambda coco: coco["categories"][0].pop("name"), "error", "no name"),
        (
            lambda coco: coco["categories"].append(coco["categories"][0]),
            "error",
            "duplicate category id",
        ),
        (lambda coco: coco["images"].append(coco["images"][0]), "error", "duplicate image id"),
    ],
)  # fmt: skip
def test_fault_is_found_and_no_other(photographs, change, level, kind):
    coco = photographs.coco()
    assert faults_of(coco, photographs.images) == set()
    change(coco)
    ((*found, item, id_),) = faults_of(coco, photographs.images)
    assert found == [level, kind]
    assert (item, id_) in {("annotation", i) for i in (1, 2)} | {("image", 0), ("category", 1)}


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, 3, [], "x", {}, {"id": [1]}, {"id": float("nan")}])
def test_item_that_is_none_is_found(photographs, key, value):
    coco = photographs.coco()
    coco[key].append(value)
    assert {"no object", "no id"} & {kind for _, kind, *_ in faults_of(coco, photographs.images)}


def test_ids_of_two_types_are_found(photographs):
    coco = photographs.coco()
    coco["categories"].append({"id": "x", "name": "x"})
    found = faults_of(coco, photographs.images)
    assert found == {("error", "ids of two types", "category", None)}


def test_image_without_annotations_is_a_note_and_stops_nothing(photographs, tmp_path):
    coco = photographs.coco()
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != 3]
    found = faults_of(coco, photographs.images)
    assert found == {("note", "image without annotations", "image", 3)}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    check_coco_json(str(tmp_path / "a.json"), str(photographs.images), masks=True, evaluation=True)


def test_annotations_without_segmentation_train_boxes_only(photographs, tmp_path):
    coco = photographs.coco()
    for a in coco["annotations"]:
        del a["segmentation"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    check_coco_json(str(path), str(photographs.images))
    assert check_dataset(str(path), str(photographs.images)) == []
    with pytest.raises(UserError, match=r"annotation id 1 has no 'segmentation'.*MODEL.MASK_ON"):
        check_coco_json(str(path), str(photographs.images), masks=True)


def test_what_only_evaluation_needs_does_not_stop_training(photographs, tmp_path):
    coco = photographs.coco()
    coco["annotations"][0].pop("area")
    coco["annotations"][1]["segmentation"].append([1, 2, 3, 4])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco))
    check_coco_json(str(path), str(photographs.images), masks=True)
    with pytest.raises(UserError, match=r"annotation id 1 .*'area'"):
        check_coco_json(str(path), str(photographs.images), masks=True, evaluation=True)


def test_ids_are_not_taken_for_anything_else(photographs):
    coco = photographs.coco()
    for image in coco["images"]:
        image["id"] = f"{{x}} %s {image['id']}"
    for a in coco["annotations"]:
        a["image_id"] = f"{{x}} %s {a['image_id']}"
    assert faults_of(coco, photographs.images) == set()
    coco["annotations"][0]["bbox"] = [W, 0, 3, 4]
    (fault,) = find_faults(coco, str(photographs.images), masks=True)
    assert "outside its image id '{x} %s 0' of 800x600" in fault.message


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_of_any_mask_is_no_fault_and_a_changed_one_is(photographs, compressed):
    """The reference is pycocotools' own encoder."""
    rng = np.random.RandomState(0)
    coco = photographs.coco()
    coco["annotations"] = coco["annotations"][:1]
    changed = 0
    for scale in (1, 2, 5, 20, 100, 400):
        for density in (0, 0.02, 0.5, 1):
            small = rng.rand(-(-H // scale), -(-W // scale)) < density
            mask = np.kron(small, np.ones((scale, scale)))[:H, :W].astype(np.uint8)
            segmentation = mask_util.encode(np.asfortranarray(mask))
            segmentation["counts"] = segmentation["counts"].decode()
            if not compressed:
                flat = mask.ravel(order="F")
                edges = np.flatnonzero(np.diff(flat)) + 1
                runs = np.diff([0, *edges, H * W]).tolist()
                segmentation["counts"] = [0, *runs] if flat[0] else runs
                assert mask_util.area(mask_util.frPyObjects(segmentation, H, W)) == mask.sum()
            coco["annotations"][0]["segmentation"] = segmentation
            assert not [f for f in faults_of(coco, photographs.images) if f[0] != "note"]
            segmentation["counts"] = segmentation["counts"][:-1]
            changed += bool([f for f in faults_of(coco, photographs.images) if f[0] != "note"])
    assert changed == 24


JSON = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"images"',
    "NaN",
    "{}",
    '{"images": null, "categories": []}',
    '{"images": {}, "annotations": {}, "categories": {}}',
    '{"images": [], "annotations": [], "categories": []}',
    '{"images": [{}], "annotations": null, "categories": [{}]}',
    "[" * 100_000,
    '{"images": ' + "[" * 100_000,
    '{"images": [' + "9" * 5000 + "]}",
    "\ufeff{}",
]


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_of_another_kind_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as e:
        read_coco_json(str(path))
    assert "\n" not in str(e.value)


def test_bytes_that_are_no_text_are_one_sentence(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(UserError, match=str(path)):
        read_coco_json(str(path))


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
        with pytest.raises(UserError, match=f"{name} is larger than the .*MAX_IMAGE_PIXELS") as e:
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


@pytest.fixture
def copy(photographs, tmp_path):
    """The dataset in a directory whose images are links, as on clusters."""
    (tmp_path / "images").mkdir()
    for path in photographs.images.iterdir():
        (tmp_path / "images" / path.name).symlink_to(path)
    return tmp_path


def run_tool(*args):
    tool = str(ROOT / "tools" / "check_dataset.py")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, tool, *args], env=environ, capture_output=True, text=True
    )


def test_tool_lists_every_fault_once_by_id(photographs, copy):
    coco, images = photographs.coco(), copy / "images"
    coco["annotations"][4].update(id=1234, category_id=9)
    coco["annotations"][5].update(id=1235, bbox=[1, 1, 0, 0])
    for a in coco["annotations"][6:40]:
        a["bbox"] = None
    coco["images"][3]["file_name"] = "../escaped.jpg"
    coco["images"][4]["width"] += 1
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    for i, content in ((5, None), (6, b"GIF89a no image"), (7, png(30_000, 30_000, b""))):
        (images / names[i]).unlink()
        if content is not None:
            (images / names[i]).write_bytes(content)
    (images / names[8]).unlink()
    (images / names[8]).write_bytes((photographs.images / names[8]).read_bytes()[:-1000])
    (copy / "a.json").write_text(json.dumps(coco))
    args = [str(copy / "a.json"), str(images), "--output", str(copy / "report.json")]

    done = run_tool(*args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    report = json.loads((copy / "report.json").read_text())
    found = [(f["kind"], f["item"], f["id"]) for f in report["faults"]]
    assert sorted(found) == sorted(
        [
            ("unknown category", "annotation", 1234),
            ("box with no area", "annotation", 1235),
            *(("box", "annotation", a["id"]) for a in coco["annotations"][6:40]),
            ("path out of the image directory", "image", 3),
            ("another image size", "image", 4),
            ("missing image", "image", 5),
            *(("unreadable image", "image", i) for i in (6, 7, 8)),
        ]
    )
    assert "error: 34 x box" in done.stdout and "and 24 more" in done.stdout
    assert "annotation id 1234 has category id 9" in done.stdout
    assert "MAX_IMAGE_PIXELS" in done.stdout

    assert run_tool(*args, "--no-images").returncode == 1
    without = json.loads((copy / "report.json").read_text())
    opened = [f for f in report["faults"] if f not in without["faults"]]
    assert [f["id"] for f in opened] == [4, 6, 7, 8] and opened[0]["item"] == "image"


def test_tool_finds_nothing_in_a_good_dataset_and_training_reads_its_links(photographs, copy):
    done = run_tool(str(photographs.json_file), str(copy / "images"))
    assert done.returncode == 0 and done.stdout.endswith("trainval.json: 0 faults\n")
    assert check_coco_json(str(photographs.json_file), str(copy / "images"), masks=True)
    record = load_coco_json(str(photographs.json_file), str(copy / "images"))[0]
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    assert "instances" in OpenCVDatasetMapper(cfg, True)(record)


@pytest.mark.parametrize(
    "args", [["gone.json", "."], [__file__, "gone"], [__file__, ".", "--output", "gone/a.json"], []]
)
def test_tool_that_cannot_start_has_status_2_and_one_line(args):
    done = run_tool(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and "check_dataset.py: error: " in done.stderr

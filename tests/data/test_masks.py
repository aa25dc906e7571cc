"""Mask files in every layout and reading give the hand-made masks."""

import numpy as np
import pytest
from builders import H, W, box_of, classes_of, decode, read, rectangle, write
from PIL import Image, ImageFilter

from gnws_d2.data.formats import read_dataset
from gnws_d2.utils.errors import UserError

ONE, TWO = rectangle(4, 6, 10, 12), rectangle(20, 2, 8, 20)
COLORS = [(0, 0, 0), (255, 0, 0), (0, 0, 128)]
VOC_COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
NUMBERS = (ONE + 2 * TWO).astype(np.uint8)
BOTH = (255 * (ONE | TWO)).astype(np.uint8)


def palette(values, colors):
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([v for color in colors for v in color])
    return image


def void(values):
    """The values with 255 around the picture."""
    rim = np.pad(values[1:-1, 1:-1], 1, constant_values=255)
    return rim.astype(np.uint8)


def assert_masks(coco, wanted, names=None):
    """Compare picture, class and mask with {picture: masks}, in any order of the masks."""
    found = {image["id"]: image["file_name"] for image in coco["images"]}
    actual = {name: set() for name in found.values()}
    for a, name in zip(coco["annotations"], classes_of(coco)):
        mask = decode(a)
        actual[found[a["image_id"]]].add((name, mask.tobytes()))
        assert a["bbox"] == box_of(mask) and a["area"] == mask.sum() and a["iscrowd"] == 0
    names = names or ["object"] * 9
    assert actual == {
        picture: {(name, mask.tobytes()) for name, mask in zip(names, masks)}
        for picture, masks in wanted.items()
    }


@pytest.mark.parametrize(
    "mask, name",
    [
        (NUMBERS, "a.png"),
        (NUMBERS * 100, "a.png"),
        (void(NUMBERS), "a.png"),
        (BOTH, "a.png"),
        (BOTH // 255, "a.png"),
        (BOTH > 0, "a.png"),
        (np.array(COLORS, np.uint8)[NUMBERS], "a.png"),
        (np.array([(*c, 255) for c in COLORS], np.uint8)[NUMBERS], "a.png"),
        (palette(NUMBERS, COLORS), "a.png"),
        (palette(void(NUMBERS), COLORS + [(9, 9, 9)] * 253), "a.png"),
        (NUMBERS.astype(np.uint16) * 1000, "a.png"),
        (NUMBERS.astype(np.int32) * 70000, "a.tif"),
        (NUMBERS, "a.tiff"),
        (NUMBERS, "a.bmp"),
        (np.stack([BOTH, np.full_like(BOTH, 255)], 2), "a.png"),
        (np.stack([NUMBERS, np.full_like(BOTH, 255)], 2), "a.png"),
    ],
)  # fmt: skip
def test_reading_of_values(tmp_path, mask, name):
    coco, _ = read(tmp_path, {"images/a.jpg": (W, H), f"masks/{name}": mask})
    assert coco["categories"] == [{"id": 1, "name": "object"}]
    assert_masks(coco, {"images/a.jpg": [ONE, TWO]})


PARTS = [(255 * m).astype(np.uint8) for m in (ONE, TWO)]


@pytest.mark.parametrize(
    "picture, masks",
    [
        ("images/a.jpg", {"masks/a/0.png": PARTS[0], "masks/a/1.png": PARTS[1]}),
        ("images/a.jpg", {"masks/a_0.png": PARTS[0], "masks/a_1.png": PARTS[1]}),
        ("a/images/a.jpg", {"a/masks/x.png": PARTS[0], "a/masks/y.png": PARTS[1]}),
        # As pycococreator has them, in a directory that also JSON files may be in.
        ("train/a.png", {"masks/a_cat_0.png": PARTS[0], "masks/a_dog_1.png": PARTS[1]}),
        ("train/a.png", {"annotations/a_cat_0.png": PARTS[0], "annotations/a_dog_1.png": PARTS[1]}),
        ("images/a.jpg", {"masks/a_mask.png": NUMBERS}),
        ("a.jpg", {"a_mask.png": NUMBERS}),
        ("a.jpg", {"a-seg.png": NUMBERS}),
        ("train/a.jpg", {"train_masks/a.png": NUMBERS}),
        ("image/a.jpg", {"mask/a.png": NUMBERS}),
        ("PNGImages/a.png", {"PedMasks/a_mask.png": NUMBERS}),
        ("images/a.jpg", {"labels/a.png": NUMBERS}),
        ("images/a.jpg", {"annotations/trimaps/a.png": NUMBERS}),
    ],
)
def test_layout(tmp_path, picture, masks):
    splits = read_dataset(write(tmp_path, {picture: (W, H)} | masks))
    assert_masks(splits.popitem()[1], {picture: [ONE, TWO]})


BY_NAME = {"masks/a_0.png": PARTS[0], "masks/a_1.png": PARTS[1]}


@pytest.mark.parametrize(
    "masks, other",
    [
        (BY_NAME | {"masks/a_b_0.png": PARTS[1], "masks/a_b_1.png": PARTS[0]}, [ONE, TWO]),
        ({"masks/a.png": NUMBERS, "masks/a_b.png": 0 * NUMBERS}, []),
        ({"masks/a.png": NUMBERS, "masks/a_b.png": BOTH // 255}, [ONE | TWO]),
    ],
)
def test_masks_of_two_pictures_are_told_apart_and_have_one_reading(tmp_path, caplog, masks, other):
    coco, _ = read(tmp_path, {f"images/{n}.jpg": (W, H) for n in ("a", "a_b")} | masks)
    assert_masks(coco, {"images/a.jpg": [ONE, TWO], "images/a_b.jpg": other})
    warned = "some values of the masks have separate parts" in caplog.text
    assert warned == (len(other) == 1)  # one value in two parts may be a class


def test_mask_without_a_picture_is_told(tmp_path):
    files = {"images/a.jpg": (W, H), "masks/a.png": NUMBERS, "masks/other.png": NUMBERS}
    with pytest.raises(UserError, match=r"masks/other\.png has no picture"):
        read(tmp_path, files)


@pytest.mark.parametrize("kind", ["JPEG", "antialiased"])
def test_blurred_masks_are_read_where_they_are_two_valued(tmp_path, kind):
    name = "masks/a.jpg" if kind == "JPEG" else "masks/a.png"
    mask = Image.fromarray(BOTH)
    if kind == "antialiased":
        mask = mask.filter(ImageFilter.GaussianBlur(0.5))
    coco, _ = read(tmp_path, {"images/a.png": (W, H), name: mask})
    for a, wanted in zip(coco["annotations"], (TWO, ONE), strict=True):
        assert (decode(a) != wanted).sum() <= 0.05 * wanted.sum()


NOISE = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)


@pytest.mark.parametrize(
    "mask",
    [*(np.array(v, np.uint8)[NUMBERS * 3 // 2] for v in ([0, 60, 140, 250], [0, 1, 2, 3])), NOISE],
)
def test_blurred_masks_of_several_values_and_photographs_are_refused(tmp_path, mask):
    with pytest.raises(UserError, match=r"masks/a\.jpg has values that compression"):
        read(tmp_path, {"images/a.png": (W, H), "masks/a.jpg": mask})


@pytest.mark.parametrize("own", [None, "cat:255,0,0::\ndog:0,0,128::\n"])
@pytest.mark.parametrize("by_object", [True, False])
def test_pascal_voc(tmp_path, own, by_object):
    names, colors = (["cat", "dog"], COLORS) if own else (["aeroplane", "bicycle"], VOC_COLORS)
    rim, values = [(224, 224, 192)] * 253, void(NUMBERS)
    files = {"JPEGImages/a.jpg": (W, H), "SegmentationClass/a.png": palette(values, colors + rim)}
    if by_object:
        files["SegmentationObject/a.png"] = palette(values, COLORS + rim)
    if own:
        files["labelmap.txt"] = "# label:color_rgb:parts:actions\nbackground:0,0,0::\n" + own
    assert_masks(read(tmp_path, files)[0], {"JPEGImages/a.jpg": [ONE, TWO]}, names)


def test_mask_with_thousands_of_objects_keeps_them_all(tmp_path):
    mask = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60)
    coco, _ = read(tmp_path, {"images/a.png": (60, 40), "masks/a.png": mask})
    assert len(coco["annotations"]) == 40 * 60 - 1


def test_mask_larger_than_pillow_opens_or_than_its_classes_is_told(tmp_path, monkeypatch):
    names = {f"Segmentation{what}/a.png": NUMBERS for what in ("Class", "Object")}
    files = {"JPEGImages/a.jpg": (W, H)} | names | {"SegmentationClass/a.png": NUMBERS[1:]}
    message = r"SegmentationClass/a\.png has another size than .*SegmentationObject/a\.png"
    with pytest.raises(UserError, match=message):
        read(tmp_path / "voc", files)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H - 1)
    with pytest.raises(UserError, match=r"masks/a\.png cannot be read: .*MAX_IMAGE_PIXELS"):
        read(tmp_path, {"images/a.jpg": (W, H), "masks/a.png": BOTH})


def test_damaged_mask_is_told(tmp_path):
    with pytest.raises(UserError, match=r"mask .*masks/a\.png cannot be read"):
        read(tmp_path, {"images/a.jpg": (W, H), "masks/a.png": b"\x89PNG\r\n\x1a\n"})
    files = {"masks/a.png": NUMBERS, "images/b.jpg": b"", "masks/b.png": NUMBERS}
    coco, notes = read(tmp_path, files, skip_bad_images=True)
    assert_masks(coco, {"images/a.jpg": [ONE, TWO]})
    assert "b.jpg" in notes.lines()[0]


def test_labelme_s_export_as_pascal_voc(tmp_path):
    files = {
        "JPEGImages/a.jpg": (W, H),
        "SegmentationObject/a.png": palette(NUMBERS, VOC_COLORS),
        "SegmentationClass/a.png": palette(NUMBERS, VOC_COLORS),
        "SegmentationObjectVisualization/a.jpg": BOTH,
        "class_names.txt": "__ignore__\n_background_\ncat\ndog\n",
    }
    assert_masks(read(tmp_path, files)[0], {"JPEGImages/a.jpg": [ONE, TWO]}, ["cat", "dog"])

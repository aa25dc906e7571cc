"""Mask files in every layout and reading give the hand-made masks."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_settle import H, W, decode, names_of, rectangle, write

from gnws_d2.data.formats import Notes, read_dataset
from gnws_d2.utils.errors import UserError

ONE, TWO = rectangle(4, 6, 10, 12), rectangle(20, 2, 8, 20)
COLORS = [(0, 0, 0), (255, 0, 0), (0, 0, 128)]
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


def read(root, files):
    return read_dataset(write(root, files))["all"]


def assert_masks(coco, wanted, names=None):
    """Compare picture, class and mask with {picture: masks}, in any order of the masks."""
    found = {image["id"]: image["file_name"] for image in coco["images"]}
    actual = {name: set() for name in found.values()}
    for a in coco["annotations"]:
        mask = decode(a)
        name = names_of(coco)[a["category_id"]]
        actual[found[a["image_id"]]].add((name, mask.tobytes()))
        y, x = np.nonzero(mask)
        assert a["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert a["area"] == mask.sum() and a["iscrowd"] == 0
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
        (np.stack([BOTH, BOTH], 2), "a.png"),
        (np.stack([NUMBERS, np.full_like(BOTH, 255)], 2), "a.png"),
    ],
)  # fmt: skip
def test_reading_of_values(tmp_path, mask, name):
    if isinstance(mask, np.ndarray) and mask.shape[2:] == (2,):
        mask[:, :, 1] = 255
    coco = read(tmp_path, {"images/a.jpg": (W, H), f"masks/{name}": mask})
    assert coco["categories"] == [{"id": 1, "name": "object"}]
    assert_masks(coco, {"images/a.jpg": [ONE, TWO]})


PARTS = [(255 * m).astype(np.uint8) for m in (ONE, TWO)]


@pytest.mark.parametrize(
    "picture, masks",
    [
        ("images/a.jpg", {"masks/a/0.png": PARTS[0], "masks/a/1.png": PARTS[1]}),
        ("images/a.jpg", {"masks/a_0.png": PARTS[0], "masks/a_1.png": PARTS[1]}),
        ("a/images/a.jpg", {"a/masks/x.png": PARTS[0], "a/masks/y.png": PARTS[1]}),
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
    assert_masks(read(tmp_path, {picture: (W, H)} | masks)["images"] and
                 read_dataset(str(tmp_path)).popitem()[1], {picture: [ONE, TWO]})  # fmt: skip


def test_masks_of_one_picture_are_not_those_of_another_whose_name_begins_with_its_name(tmp_path):
    files = {f"images/{n}.jpg": (W, H) for n in ("a", "a_b")}
    files |= {"masks/a_0.png": PARTS[0], "masks/a_1.png": PARTS[1], "masks/a_b_0.png": PARTS[1]}
    coco = read(tmp_path, files | {"masks/a_b_1.png": PARTS[0]})
    assert_masks(coco, {"images/a.jpg": [ONE, TWO], "images/a_b.jpg": [ONE, TWO]})


def test_picture_without_a_mask_in_another_directory_is_a_negative(tmp_path):
    files = {"images/a.jpg": (W, H), "images/b.jpg": (W, H), "masks/a.png": NUMBERS}
    files["masks/b.png"] = 0 * NUMBERS
    assert_masks(read(tmp_path, files), {"images/a.jpg": [ONE, TWO], "images/b.jpg": []})


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
    coco = read(tmp_path, {"images/a.png": (W, H), name: mask})
    for a, wanted in zip(coco["annotations"], (TWO, ONE), strict=True):
        assert (decode(a) != wanted).sum() <= 0.05 * wanted.sum()


@pytest.mark.parametrize("values", [[0, 60, 140, 250], [0, 1, 2, 3]])
def test_blurred_masks_of_several_values_are_refused(tmp_path, values):
    mask = Image.fromarray(np.array(values, np.uint8)[NUMBERS + (NUMBERS > 1)])
    with pytest.raises(UserError, match=r"masks/a\.jpg has values that compression"):
        read(tmp_path, {"images/a.png": (W, H), "masks/a.jpg": mask})


@pytest.mark.parametrize("own", [None, "cat:255,0,0::\ndog:0,0,128::\n"])
@pytest.mark.parametrize("by_object", [True, False])
def test_pascal_voc(tmp_path, own, by_object):
    names, colors = ["cat", "dog"], COLORS
    if own is None:
        names, colors = ["aeroplane", "bicycle"], [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    colors = [*colors, *[(224, 224, 192)] * 253]
    files = {"JPEGImages/a.jpg": (W, H), "SegmentationClass/a.png": palette(void(NUMBERS), colors)}
    if by_object:
        files["SegmentationObject/a.png"] = palette(void(NUMBERS), COLORS + [(224, 224, 192)] * 253)
    if own:
        files["labelmap.txt"] = "# label:color_rgb:parts:actions\nbackground:0,0,0::\n" + own
    assert_masks(read(tmp_path, files), {"JPEGImages/a.jpg": [ONE, TWO]}, names)


def test_all_masks_of_a_dataset_have_one_reading_with_a_warning_if_values_look_like_classes(
    tmp_path, caplog
):
    files = {f"images/{n}.jpg": (W, H) for n in "ab"}
    files |= {"masks/a.png": NUMBERS, "masks/b.png": BOTH // 255}
    coco = read(tmp_path, files)
    assert_masks(coco, {"images/a.jpg": [ONE, TWO], "images/b.jpg": [ONE | TWO]})
    assert "some values of the masks have separate parts" in caplog.text


def test_damaged_mask_is_told(tmp_path):
    with pytest.raises(UserError, match=r"mask .*masks/a\.png cannot be read"):
        read_dataset(write(tmp_path, {"images/a.jpg": (W, H), "masks/a.png": b"\x89PNG\r\n\x1a\n"}))
    notes = Notes()
    files = {"masks/a.png": NUMBERS, "images/b.jpg": b"", "masks/b.png": NUMBERS}
    coco = read_dataset(write(tmp_path, files), notes, skip_bad_images=True)["all"]
    assert_masks(coco, {"images/a.jpg": [ONE, TWO]})
    assert "b.jpg" in notes.lines()[0]


@pytest.mark.parametrize("directory", ["masks", "annotations"])
def test_mask_of_each_object_has_the_name_of_its_picture_in_front(tmp_path, directory):
    """As pycococreator has them, in a directory that also JSON files may be in."""
    masks = {f"{directory}/a_cat_0.png": (255 * ONE).astype(np.uint8)}
    masks[f"{directory}/a_dog_1.png"] = (255 * TWO).astype(np.uint8)
    coco = read(tmp_path, {"train/a.png": (W, H), **masks})
    assert_masks(coco, {"train/a.png": [ONE, TWO]})


def test_labelme_s_export_as_pascal_voc(tmp_path):
    names = "__ignore__\n_background_\ncat\ndog\n"
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    files = {
        "JPEGImages/a.jpg": (W, H),
        "SegmentationObject/a.png": palette(NUMBERS, voc),
        "SegmentationClass/a.png": palette(NUMBERS, voc),
        "SegmentationObjectVisualization/a.jpg": BOTH,
        "class_names.txt": names,
    }
    assert_masks(read(tmp_path, files), {"JPEGImages/a.jpg": [ONE, TWO]}, ["cat", "dog"])


def test_photograph_in_place_of_a_mask_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)
    with pytest.raises(UserError, match=r"masks/a.jpg has values that compression"):
        read(tmp_path, {"images/a.png": (W, H), "masks/a.jpg": Image.fromarray(noise)})

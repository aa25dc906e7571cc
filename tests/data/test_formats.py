"""One hand-made dataset in each format and layout gives the COCO file that was written by hand."""

import builders
import pytest
from builders import classes_of, corners, voc, write

from gnws_d2.data.formats import Notes, read_coco_files, read_dataset
from gnws_d2.utils.errors import UserError

SIZES = {"a": (40, 30), "b c": (20, 50)}  # width, height
# (image, class, box as x, y, width, height)
BOXES = [
    ("a", "cat", [4, 6, 10, 12]),
    ("a", "dog", [20, 3, 8, 20]),
    ("b c", "dog", [2, 10, 12, 30]),
]
CLASSES = ["cat", "dog"]


def images(directory="images", suffix="jpg"):
    return {f"{directory}/{stem}.{suffix}": size for stem, size in SIZES.items()}


def coco(*stems):
    """The COCO dataset of some of the images, or of all."""
    own = [(f"{stem}.jpg", *more) for stem, *more in BOXES if not stems or stem in stems]
    return builders.coco({name: SIZES[name[:-4]] for name in dict(o[:2] for o in own)}, own)


def objects_of(dataset):
    """(stem of the image, class, box, outline) of each object, in a form that can be compared."""
    stems = {i["id"]: i["file_name"].rpartition("/")[2][:-4] for i in dataset["images"]}
    for image in dataset["images"]:
        assert SIZES[stems[image["id"]]] == (image["width"], image["height"])
    found = []
    for a, name in zip(dataset["annotations"], classes_of(dataset)):
        box, *outline = ([round(v, 3) for v in p] for p in (a["bbox"], *a.get("segmentation", [])))
        found.append((stems[a["image_id"]], name, box, outline, a["iscrowd"]))
    return sorted(found)


def expected(masks=False, stems=tuple(SIZES)):
    return [
        (stem, name, box, [corners(*box)] if masks else [], 0)
        for stem, name, box in BOXES
        if stem in stems
    ]


def assert_splits(splits, masks):
    """Whether "a" is in train, and "b c" in val."""
    assert objects_of(splits["train"]) == expected(masks, ["a"])
    assert objects_of(splits["val"]) == expected(masks, ["b c"])


def yolo(
    directory="images", labels="labels", names="names: [cat, dog]\n", polygons=False, separator=" ",
    end="",
):  # fmt: skip
    files = images(directory) | ({"data.yaml": names} if names else {})
    for stem, (width, height) in SIZES.items():
        lines = ""
        for image, name, (x, y, w, h) in BOXES:
            values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            if polygons:
                points = corners(x, y, w, h)
                values = [v / (height if i % 2 else width) for i, v in enumerate(points)]
            if image == stem:
                lines += separator.join(map(str, [CLASSES.index(name), *values])) + f"{end}\n"
        files[f"{labels}/{stem}.txt"] = lines
    return files


def voc_of(stem):
    return voc(*(own[1:] for own in BOXES if own[0] == stem), filename=f"{stem}.jpg")


@pytest.mark.parametrize("name", ["train/_annotations.coco.json", "annotations/instances.json"])
def test_coco_with_the_images_anywhere(tmp_path, name):
    splits = read_dataset(write(tmp_path, images("train") | {name: coco()}))
    assert objects_of(splits["all"]) == expected(masks=True)
    assert splits["all"]["images"][0]["file_name"] == "train/a.jpg"


def test_coco_as_downloaded(tmp_path):
    """Captions, keypoints, panoptic segments and image_info lie beside the instances."""
    for split, stem in (("train", "a"), ("val", "b c")):
        own = coco(stem)
        panoptic, captions = [{"image_id": 1, "segments_info": []}], [{"id": 1, "caption": "a"}]
        people = [{**c, "keypoints": ["nose"]} for c in own["categories"]]
        others = {
            f"instances_{split}2017": own,
            f"person_keypoints_{split}2017": own | {"categories": people},
            f"captions_{split}2017": own | {"annotations": captions},
            f"panoptic_{split}2017": own | {"annotations": panoptic},
            "image_info_test2017": {"images": own["images"]},
        }
        write(tmp_path, {f"annotations/{name}.json": content for name, content in others.items()})
        write(tmp_path, images(f"{split}2017"))
    splits = read_dataset(str(tmp_path))
    assert_splits(splits, True)
    assert splits["val"]["images"][0]["file_name"] == "val2017/b c.jpg"


def test_coco_files_of_one_split_are_joined_and_one_without_a_split_is_train(tmp_path):
    write(tmp_path, images() | {"first.json": coco("a"), "second.json": coco("b c")})
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected(True)
    (tmp_path / "second.json").rename(tmp_path / "val.json")
    assert_splits(read_dataset(str(tmp_path)), True)


def test_classes_of_two_files_are_the_same_by_name_without_those_that_have_no_objects(tmp_path):
    """Roboflow's exports have a parent class of id 0 without objects."""
    parts = {"train": coco("a"), "val": coco("b c")}
    parts["train"]["categories"] = [{"id": i, "name": n} for i, n in enumerate(["pet", *CLASSES])]
    parts["val"]["categories"] = [{"id": 2, "name": "bird"}, {"id": 7, "name": "dog"}]
    (bird,) = parts["val"]["annotations"]
    parts["val"]["annotations"] = [bird, {**bird, "id": 9, "category_id": 7}]
    write(tmp_path, images() | parts)
    files = {split: (str(tmp_path / split), str(tmp_path / "images")) for split in parts}
    splits = read_coco_files(files)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "bird"}]
    assert splits["train"]["categories"] == splits["val"]["categories"] == categories
    assert objects_of(splits["train"]) == expected(True, ["a"])
    assert [a["category_id"] for a in splits["val"]["annotations"]] == [3, 2]


@pytest.mark.parametrize(
    "variant",
    [
        {"names": "names: [cat, dog]\nnc: 2\n"},
        {"names": "names: {0: cat, 1: dog}\n"},
        {"names": "names: {'0': cat, '1': dog}\n"},
        {"names": "names: {cat: 0, dog: 1}\nnc: '2'\n"},
        {"names": "\ufeffnames:\n- cat\n- dog\n"},
        {"labels": "images"},
        {"directory": "Images", "labels": "Labels"},
        {"directory": "train/images", "labels": "train/labels"},
        {"directory": "img", "labels": "img"},
        {"separator": ","},
        {"end": " 0.9"},  # a confidence
        {"names": "kpt_shape: [2, 2]\nnames: [cat, dog]\n", "end": " .1 .2 .3 .4"},
        {"names": "kpt_shape: [1e300, 1.e300]\nnames: [cat, dog]\n"},
        {"polygons": True},
    ],
)
def test_yolo_with_names_and_labels_as_people_write_them(tmp_path, variant):
    splits = read_dataset(write(tmp_path, yolo(**variant)))
    assert objects_of(splits["all"]) == expected(masks="polygons" in variant)


@pytest.mark.parametrize("name", ["classes.txt", "labels/classes.txt", "obj.names", "cars.names"])
def test_yolo_with_names_in_a_text_file(tmp_path, name):
    others = {name: "cat\ndog\n\nbird\n", "labels/README.txt": "made with a tool\n"}
    others |= {} if name == "cars.names" else {"coco.names": "person\n"}  # a leftover
    splits = read_dataset(write(tmp_path, yolo(names=None) | others))
    assert objects_of(splits["all"]) == expected()


def test_yolo_as_cvat_exports_it(tmp_path):
    files = yolo("obj_train_data", "obj_train_data", names=None) | {
        "obj.names": "cat\ndog\n",
        "obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\n",
        "train.txt": "data/obj_train_data/a.jpg\n",
        "valid.txt": "data/obj_train_data/b c.jpg\n",
    }
    assert_splits(read_dataset(write(tmp_path, files)), False)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("2 .5 .5 .2 .2", "not of a known class"),
        ("-1 .5 .5 .2 .2", "not of a known class"),
        ("0.7 .5 .5 .2 .2", "not of a known class"),
        ("nan .5 .5 .2 .2", "not a number"),
        ("0 inf .5 .2 .2", "not a number"),
        ("0 .5 .5 -.2 .2", "not from 0 to 1"),
        ("0 30 20 10 12", "not from 0 to 1"),
        ("0 .1 .2 .3 .4 .5 .6 .7", "neither a box .* nor a polygon"),
    ],
)
def test_yolo_line_that_cannot_be_used_is_named(tmp_path, line, reason):
    files = yolo()
    files["labels/a.txt"] += f"{line}\n"
    write(tmp_path, files)
    where = f"{tmp_path / 'labels' / 'a.txt'}, line 3: "
    with pytest.raises(UserError, match=f"{where}.*{reason}.* 1 of 4 objects cannot be used"):
        read_dataset(str(tmp_path))
    notes = Notes()
    assert objects_of(read_dataset(str(tmp_path), notes, keep_going=True)["all"]) == expected()
    (left_out,) = notes.left_out.values()
    assert left_out[0].startswith(where)


@pytest.mark.parametrize(
    "names, message",
    [
        (None, "no names of their classes"),
        ("nc: 2\n", "no names of their classes"),
        ("nc: 3\nnames: [cat, dog]\n", "nc is 3, but 'names' has 2"),
        ("names: [cat, cat]\n", "two classes in 'names' are called 'cat'"),
        ("names: [cat, null]\n", "is not the name of a class"),
        ("names: 2\n", "not a list"),
        ("names: {cat: 0, dog: 0}\n", "does not have a number of its own for each class"),
        ("names:\n\t- cat\n", "not valid YAML"),
    ],
)
def test_yolo_names_that_cannot_be_used_are_one_sentence(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        read_dataset(write(tmp_path, yolo(names=names)))


def test_pascal_voc_counts_pixels_from_1(tmp_path):
    files = {f"Annotations/{stem}.xml": voc_of(stem) for stem in SIZES}
    splits = read_dataset(write(tmp_path, images("JPEGImages") | files))
    assert objects_of(splits["all"]) == expected()


@pytest.mark.parametrize("difficult, crowd", [("0", 0), ("Unspecified", 0), ("1", 1), ("true", 1)])
def test_pascal_voc_polygons_are_masks_and_difficult_objects_are_crowds(tmp_path, difficult, crowd):
    name, box = BOXES[0][1:]
    values = enumerate(corners(*box))
    points = "".join(f"<{'xy'[i % 2]}{i}>{v}</{'xy'[i % 2]}{i}>" for i, v in values)
    xml = voc((name, box), (name, box), outline=f"<polygon>{points}</polygon>")
    xml = xml.replace("<difficult>0", f"<difficult>{difficult}", 1)
    objects = objects_of(read_dataset(write(tmp_path, images(".") | {"a.xml": xml}))["all"])
    assert sorted(o[4] for o in objects) == [0, crowd]
    assert all(o[3] == [corners(*box)] for o in objects)


def test_labelme_s_older_xml_has_polygons(tmp_path):
    name, box = BOXES[0][1:]
    points = zip(corners(*box)[::2], corners(*box)[1::2])
    text = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in points)
    polygon = f"<polygon><username>me</username>{text}</polygon>"
    xml = f"<annotation><object><name>{name}</name>{polygon}</object></annotation>"
    splits = read_dataset(write(tmp_path, images(".") | {"a.xml": xml}))
    assert objects_of(splits["all"]) == expected(True)[:1]


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("labels/a.txt", "Car 0.00 0 -1.58 1 2 3 4 1.5 1.6 1.7 1.8 1.9 20.1 -1.5\n", "KITTI"),
        ("labels/a.txt", "1 2 3 4 5 6 7 8 plane 0\n", "DOTA labels with rotated boxes"),
        ("a.tfrecord", "x", "TFRecord"),
        ("a.parquet", "x", "Parquet"),
        ("data.zip", "x", "archives .* unpack them"),
        ("a.json", [{"id": 1, "data": {}, "annotations": []}], "Label Studio's own JSON"),
        ("ann/a.jpg.json", {"size": {}, "objects": []}, "Supervisely's own JSON"),
        ("a.xml", "<annotations><track id='0'/></annotations>", "CVAT for video: export it as"),
    ],
)
def test_known_format_that_cannot_be_read_is_named(tmp_path, file, content, message):
    with pytest.raises(UserError, match=message):
        read_dataset(write(tmp_path, images() | {file: content}))


def test_two_formats_in_one_directory_are_an_error_that_names_both(tmp_path):
    files = images() | {"a.json": coco(), "images/a.xml": voc_of("a")}
    with pytest.raises(UserError, match=r"holds COCO \(a.json\) and Pascal VOC \(images/a.xml\)"):
        read_dataset(write(tmp_path, files))


def test_nothing_to_read_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match="holds no files, and none of COCO"):
        read_dataset(str(tmp_path))
    write(tmp_path, images())
    with pytest.raises(UserError, match=r"holds 2 files \(.jpg\), and none of COCO"):
        read_dataset(str(tmp_path))
    with pytest.raises(UserError, match="there is no such directory"):
        read_dataset(str(tmp_path / "gone"))

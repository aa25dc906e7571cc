"""One hand-made dataset in each format and layout gives the COCO file that was written by hand."""

import json

import pytest
from PIL import Image

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


def corners(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_images(root, directory="images", suffix="jpg"):
    (root / directory).mkdir(parents=True, exist_ok=True)
    for stem, size in SIZES.items():
        Image.new("RGB", size).save(root / directory / f"{stem}.{suffix}")


def coco(file_name="{}.jpg", stems=tuple(SIZES), masks=True):
    """The COCO dataset of some of the images."""
    images = [
        {"id": i, "file_name": file_name.format(s), "width": SIZES[s][0], "height": SIZES[s][1]}
        for i, s in enumerate(SIZES, 1)
        if s in stems
    ]
    annotations = []
    for number, (stem, name, box) in enumerate(BOXES, 1):
        if stem in stems:
            annotation = {
                "id": number, "image_id": list(SIZES).index(stem) + 1, "bbox": box, "iscrowd": 0,
                "category_id": CLASSES.index(name) + 1, "area": box[2] * box[3],
            }  # fmt: skip
            annotations.append({**annotation, "segmentation": [corners(*box)] * masks})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def objects_of(dataset):
    """(stem of the image, class, box, outline) of each object, in a form that can be compared."""
    names = {c["id"]: c["name"] for c in dataset["categories"]}
    images = {i["id"]: i for i in dataset["images"]}
    for image in images.values():
        assert SIZES[stem_of(image)] == (image["width"], image["height"])
    return sorted(
        (
            stem_of(images[a["image_id"]]),
            names[a["category_id"]],
            [round(v, 3) for v in a["bbox"]],
            [[round(v, 3) for v in p] for p in a.get("segmentation", [])],
            a["iscrowd"],
        )
        for a in dataset["annotations"]
    )


def stem_of(image):
    return image["file_name"].rpartition("/")[2].rpartition(".")[0]


def expected(masks=False, stems=tuple(SIZES)):
    return [
        (stem, name, box, [corners(*box)] if masks else [], 0)
        for stem, name, box in BOXES
        if stem in stems
    ]


def yolo_lines(stem, polygons=False, separator=" ", end=""):
    width, height = SIZES[stem]
    lines = []
    for image, name, (x, y, w, h) in BOXES:
        values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        if polygons:
            points = corners(x, y, w, h)
            values = [v / (height if i % 2 else width) for i, v in enumerate(points)]
        if image == stem:
            lines.append(separator.join(map(str, [CLASSES.index(name), *values])) + end)
    return "\n".join(lines) + "\n"


def write_yolo(root, images="images", labels="labels", names="names: [cat, dog]\n", **kwargs):
    write_images(root, images)
    for stem in SIZES:
        write(root / labels / f"{stem}.txt", yolo_lines(stem, **kwargs))
    if names:
        write(root / "data.yaml", names)


def voc_xml(stem, objects=BOXES, difficult="0"):
    text = ""
    for image, name, (x, y, w, h) in objects:
        box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        if image == stem:
            text += f"<object><name>{name}</name><difficult>{difficult}</difficult>"
            text += f"<bndbox>{box}</bndbox></object>"
    return f"<annotation><filename>{stem}.jpg</filename>{text}</annotation>"


@pytest.mark.parametrize("name", ["train/_annotations.coco.json", "annotations/instances.json"])
def test_coco_with_the_images_anywhere(tmp_path, name):
    write_images(tmp_path, "train")
    write(tmp_path / name, coco())
    splits = read_dataset(str(tmp_path))
    assert objects_of(splits["all"]) == expected(masks=True)
    assert splits["all"]["images"][0]["file_name"] == "train/a.jpg"


def test_coco_as_downloaded(tmp_path):
    """Captions, keypoints, panoptic segments and image_info lie beside the instances."""
    for split, stem in (("train", "a"), ("val", "b c")):
        write_images(tmp_path, f"{split}2017")
        instances, annotations = coco(stems=[stem]), tmp_path / "annotations"
        write(annotations / f"instances_{split}2017.json", instances)
        keypoints = [{**c, "keypoints": ["nose"]} for c in instances["categories"]]
        people = {**instances, "categories": keypoints}
        write(annotations / f"person_keypoints_{split}2017.json", people)
        captions = {**instances, "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
        write(annotations / f"captions_{split}2017.json", captions)
        panoptic = {**instances, "annotations": [{"image_id": 1, "segments_info": []}]}
        write(annotations / f"panoptic_{split}2017.json", panoptic)
        write(annotations / "image_info_test2017.json", {"images": instances["images"]})
    splits = read_dataset(str(tmp_path))
    assert objects_of(splits["train"]) == expected(True, ["a"])
    assert objects_of(splits["val"]) == expected(True, ["b c"])
    assert splits["val"]["images"][0]["file_name"] == "val2017/b c.jpg"


def test_coco_files_of_one_split_are_joined_and_one_without_a_split_is_train(tmp_path):
    write_images(tmp_path)
    write(tmp_path / "first.json", coco(stems=["a"]))
    write(tmp_path / "second.json", coco(stems=["b c"]))
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected(True)
    (tmp_path / "second.json").rename(tmp_path / "val.json")
    splits = read_dataset(str(tmp_path))
    assert objects_of(splits["train"]) == expected(True, ["a"])
    assert objects_of(splits["val"]) == expected(True, ["b c"])


def test_classes_of_two_files_are_the_same_by_name_without_those_that_have_no_objects(tmp_path):
    """Roboflow's exports have a parent class of id 0 without objects."""
    write_images(tmp_path)
    parts = {"train": coco(stems=["a"]), "val": coco(stems=["b c"])}
    parts["train"]["categories"] = [{"id": i, "name": n} for i, n in enumerate(["pet", *CLASSES])]
    parts["val"]["categories"] = [{"id": 2, "name": "bird"}, {"id": 7, "name": "dog"}]
    bird, dog = parts["val"]["annotations"][0], {**parts["val"]["annotations"][0], "id": 9}
    parts["val"]["annotations"] = [bird, {**dog, "category_id": 7}]
    files = {split: (str(tmp_path / split), str(tmp_path / "images")) for split in parts}
    for split, content in parts.items():
        write(tmp_path / split, content)
    splits = read_coco_files(files)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "bird"}]
    assert splits["train"]["categories"] == splits["val"]["categories"] == categories
    assert objects_of(splits["train"]) == expected(True, ["a"])
    assert [a["category_id"] for a in splits["val"]["annotations"]] == [3, 2]


@pytest.mark.parametrize(
    "names",
    [
        "names: [cat, dog]\nnc: 2\n",
        "names: {0: cat, 1: dog}\n",
        "names: {'0': cat, '1': dog}\n",
        "names: {cat: 0, dog: 1}\nnc: '2'\n",
        "\ufeffnames:\n- cat\n- dog\n",
    ],
)
def test_yolo_with_names_as_people_write_them(tmp_path, names):
    write_yolo(tmp_path, names=names)
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected()


@pytest.mark.parametrize(
    "variant",
    [
        {"labels": "images"},
        {"images": "Images", "labels": "Labels"},
        {"images": "train/images", "labels": "train/labels"},
        {"images": "img", "labels": "img"},
        {"separator": ","},
        {"end": " 0.9"},  # a confidence
        {"names": "kpt_shape: [2, 2]\nnames: [cat, dog]\n", "end": " .1 .2 .3 .4"},
    ],
)
def test_yolo_with_labels_as_people_keep_them(tmp_path, variant):
    write_yolo(tmp_path, **variant)
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected()


def test_yolo_polygons_are_masks(tmp_path):
    write_yolo(tmp_path, polygons=True)
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected(masks=True)


@pytest.mark.parametrize("name", ["classes.txt", "labels/classes.txt", "obj.names"])
def test_yolo_with_names_in_a_text_file(tmp_path, name):
    write_yolo(tmp_path, names=None)
    write(tmp_path / name, "cat\ndog\n\nbird\n")
    write(tmp_path / "labels" / "README.txt", "made with a tool\n")
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected()


def test_yolo_as_cvat_exports_it(tmp_path):
    write_yolo(tmp_path, images="obj_train_data", labels="obj_train_data", names=None)
    write(tmp_path / "obj.names", "cat\ndog\n")
    write(tmp_path / "obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\n")
    write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
    write(tmp_path / "valid.txt", "data/obj_train_data/b c.jpg\n")
    splits = read_dataset(str(tmp_path))
    assert objects_of(splits["train"]) == expected(stems=["a"])
    assert objects_of(splits["val"]) == expected(stems=["b c"])


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
    write_yolo(tmp_path)
    with open(tmp_path / "labels" / "a.txt", "a") as f:
        f.write(f"{line}\n")
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
    write_yolo(tmp_path, names=names)
    with pytest.raises(UserError, match=message):
        read_dataset(str(tmp_path))


def test_pascal_voc_counts_pixels_from_1(tmp_path):
    write_images(tmp_path, "JPEGImages")
    for stem in SIZES:
        write(tmp_path / "Annotations" / f"{stem}.xml", voc_xml(stem))
    assert objects_of(read_dataset(str(tmp_path))["all"]) == expected()


def test_pascal_voc_polygons_are_masks_and_difficult_objects_are_crowds(tmp_path):
    write_images(tmp_path, ".")
    x, y, w, h = BOXES[0][2]
    points = enumerate(corners(x, y, w, h))
    polygon = "".join(
        f"<{'xy'[i % 2]}{i // 2 + 1}>{v}</{'xy'[i % 2]}{i // 2 + 1}>" for i, v in points
    )
    for difficult, crowd in (("0", 0), ("Unspecified", 0), ("1", 1), ("true", 1)):
        xml = voc_xml("a", [BOXES[0], BOXES[0]], "0")
        xml = xml.replace("<bndbox>", f"<polygon>{polygon}</polygon><bndbox>")
        xml = xml.replace("<difficult>0", f"<difficult>{difficult}", 1)
        write(tmp_path / "a.xml", xml)
        objects = objects_of(read_dataset(str(tmp_path))["all"])
        assert sorted(o[4] for o in objects) == [0, crowd]
        assert all(o[3] == [corners(x, y, w, h)] for o in objects)


def test_labelme_s_older_xml_has_polygons(tmp_path):
    write_images(tmp_path, ".")
    x, y, w, h = BOXES[0][2]
    points = zip(corners(x, y, w, h)[::2], corners(x, y, w, h)[1::2])
    text = "".join(f"<pt><x>{px}</x><y>{py}</y></pt>" for px, py in points)
    polygon = f"<polygon><username>me</username>{text}</polygon>"
    xml = f"<annotation><object><name>cat</name>{polygon}</object></annotation>"
    write(tmp_path / "a.xml", xml)
    (only,) = objects_of(read_dataset(str(tmp_path))["all"])
    assert only == ("a", "cat", [x, y, w, h], [corners(x, y, w, h)], 0)


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
    write_images(tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        read_dataset(str(tmp_path))


def test_two_formats_in_one_directory_are_an_error_that_names_both(tmp_path):
    write_images(tmp_path)
    write(tmp_path / "a.json", coco())
    write(tmp_path / "images" / "a.xml", voc_xml("a"))
    with pytest.raises(UserError, match=r"holds COCO \(a.json\) and Pascal VOC \(images/a.xml\)"):
        read_dataset(str(tmp_path))


def test_nothing_to_read_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match="holds no files, and none of COCO"):
        read_dataset(str(tmp_path))
    write_images(tmp_path)
    with pytest.raises(UserError, match=r"holds 2 files \(.jpg\), and none of COCO"):
        read_dataset(str(tmp_path))
    with pytest.raises(UserError, match="there is no such directory"):
        read_dataset(str(tmp_path / "gone"))

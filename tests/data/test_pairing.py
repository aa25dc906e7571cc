"""Each picture gets its own labels and its own split, wherever they lie."""

import json

import pytest
from PIL import Image

from gnws_d2.data.formats import read_dataset
from gnws_d2.utils.errors import UserError

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
BOX = [5, 10, 20, 20]


def picture(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 48))
    image.paste(COLORS[color], (5, 10, 25, 30))
    image.save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def voc(name, filename):
    box = "<xmin>6</xmin><ymin>11</ymin><xmax>25</xmax><ymax>30</ymax>"
    file = f"<filename>{filename}</filename>" if filename else ""
    return (
        f"<annotation>{file}<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    )


def coco(files, name="red"):
    ids = range(1, len(files) + 1)
    return {
        "images": [
            {"id": i, "file_name": f, "width": 64, "height": 48} for i, f in zip(ids, files)
        ],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": BOX} for i in ids],
        "categories": [{"id": 1, "name": name}],
    }


def yolo(root, number, names="names: [red]\n"):
    for i in range(number):
        picture(root / "images" / f"{i}.jpg")
        write(root / "labels" / f"{i}.txt", "0 .2 .4 .3 .4\n")
    write(root / "data.yaml", names)


def files_of(splits):
    return {name: [i["file_name"] for i in coco["images"]] for name, coco in splits.items()}


def check_colors(root, splits):
    """Each object lies on a picture of the color that its class is called."""
    for dataset in splits.values():
        files = {i["id"]: i["file_name"] for i in dataset["images"]}
        names = {c["id"]: c["name"] for c in dataset["categories"]}
        for a in dataset["annotations"]:
            pixel = Image.open(root / files[a["image_id"]]).convert("RGB").getpixel((15, 20))
            color = min(COLORS, key=lambda name: abs(COLORS[name][0] - pixel[0]))
            assert color == names[a["category_id"]], files[a["image_id"]]


@pytest.mark.parametrize(
    "pictures, labels",
    [
        ("cam{}", "cam{}"),
        ("JPEGImages/cam{}", "Annotations/cam{}"),
        ("cam{}/images", "cam{}/annotations"),
        ("img/cam{}", "labels_v2/cam{}"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_pictures_of_the_same_name_get_the_labels_of_their_directory(
    tmp_path, pictures, labels, named
):
    for color, camera in zip(COLORS, "AB"):
        for i in range(3):
            picture(tmp_path / pictures.format(camera) / f"{i}.jpg", color)
            xml = voc(color, f"{i}.jpg" if named else "")
            write(tmp_path / labels.format(camera) / f"{i}.xml", xml)
    splits = read_dataset(str(tmp_path))
    assert len(splits["all"]["images"]) == len(splits["all"]["annotations"]) == 6
    check_colors(tmp_path, splits)


@pytest.mark.parametrize(
    "named",
    [
        "a/1.jpg",
        "./a/1.jpg",
        "a\\1.jpg",
        "C:\\data\\a\\1.JPG",
        "/home/me/pictures/a/1.jpg",
        "https://host/bucket/a/1.jpg?size=3",
        "A/1.JPG",
    ],
)
def test_path_in_a_label_is_found_by_its_longest_end(tmp_path, named):
    picture(tmp_path / "pictures" / "a" / "1.jpg", "blue")
    picture(tmp_path / "pictures" / "b" / "1.jpg", "red")
    write(tmp_path / "labels.json", coco([named], "blue"))
    splits = read_dataset(str(tmp_path))
    assert files_of(splits) == {"all": ["pictures/a/1.jpg"]}
    check_colors(tmp_path, splits)


def test_stem_pairs_if_one_picture_has_it(tmp_path):
    picture(tmp_path / "x" / "1.png")
    write(tmp_path / "y" / "z" / "1.xml", voc("red", "old name.jpg"))
    assert files_of(read_dataset(str(tmp_path))) == {"all": ["x/1.png"]}


@pytest.mark.parametrize("other", ["images/1.png", "images/1.JPG"])
def test_two_pictures_that_a_label_may_belong_to_are_named(tmp_path, other):
    yolo(tmp_path, 2)
    picture(tmp_path / other)
    with pytest.raises(
        UserError, match=r"labels/1.txt may belong to .*images/1.* or to .*images/1"
    ):
        read_dataset(str(tmp_path))


def test_two_labels_of_one_picture_are_named(tmp_path):
    picture(tmp_path / "1.jpg")
    write(tmp_path / "1.xml", voc("red", "1.jpg"))
    write(tmp_path / "copy.xml", voc("red", "1.jpg"))
    with pytest.raises(UserError, match=r"copy.xml and .*1.xml have labels of the same picture"):
        read_dataset(str(tmp_path))


def test_label_without_a_picture_is_named(tmp_path):
    yolo(tmp_path, 3)
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"labels/1.txt has no picture"):
        read_dataset(str(tmp_path))
    splits = read_dataset(str(tmp_path), skip_bad_images=True)
    assert files_of(splits) == {"all": ["images/0.jpg", "images/2.jpg"]}


def test_hidden_files_and_what_tools_leave_are_not_there(tmp_path):
    yolo(tmp_path, 2)
    for directory in (".ipynb_checkpoints", "__MACOSX", ".git"):
        picture(tmp_path / "images" / directory / "1-checkpoint.jpg")
        write(tmp_path / "labels" / directory / "1-checkpoint.txt", "0 .5 .5 .2 .2\n")
    write(tmp_path / "images" / "._1.jpg", "x")
    assert files_of(read_dataset(str(tmp_path))) == {"all": ["images/0.jpg", "images/1.jpg"]}


def test_picture_without_a_label_has_no_objects_among_pictures_with_labels(tmp_path):
    yolo(tmp_path, 2)
    picture(tmp_path / "images" / "9.jpg")
    picture(tmp_path / "unlabeled" / "10.jpg")
    splits = read_dataset(str(tmp_path))
    assert files_of(splits) == {"all": ["images/0.jpg", "images/1.jpg", "images/9.jpg"]}
    assert len(splits["all"]["annotations"]) == 2


@pytest.mark.parametrize("given", ["", "data.yaml"])
@pytest.mark.parametrize(
    "names, files",
    [
        ("train: train.txt\nval: val.txt\n", {"train": "images/{}.jpg", "val": "./images/{}.jpg"}),
        ("path: .\ntrain: [l/a.txt]\nval: l/b.txt\n", {"l/a": "images/{}.jpg", "l/b": "{}"}),
        ("train: Train.txt\nval: Val.txt\n", {"train": "images/{}.jpg", "val": "{}"}),
        ("", {"train": "/old/place/images/{}.jpg", "valid": "images\\{}.jpg"}),
        ("train: ../train/images\nval: ../valid/images\n", {"train": "{}.jpg", "val": "{}"}),
    ],
)  # fmt: skip
def test_list_files_are_the_splits(tmp_path, names, files, given):
    yolo(tmp_path, 6, f"{names}names: [red]\n")
    for (file, line), numbers in zip(files.items(), ([0, 1, 2, 4], [3, 5])):
        write(tmp_path / f"{file}.txt", "".join(line.format(i) + "\n" for i in numbers))
    splits = files_of(read_dataset(str(tmp_path / given)))
    assert splits["val"] == ["images/3.jpg", "images/5.jpg"]
    assert splits["train"] == [f"images/{i}.jpg" for i in (0, 1, 2, 4)]


def test_directories_of_a_yaml_are_the_splits(tmp_path):
    for directory in ("a", "b", "holdout"):
        picture(tmp_path / "images" / directory / f"{directory}.jpg")
        write(tmp_path / "labels" / directory / f"{directory}.txt", "0 .2 .4 .3 .4\n")
    text = "path: .\ntrain: [images/a, images/b]\nval: images/holdout\nnames: [red]\n"
    write(tmp_path / "data.yaml", text)
    splits = files_of(read_dataset(str(tmp_path)))
    assert splits == {
        "train": ["images/a/a.jpg", "images/b/b.jpg"],
        "val": ["images/holdout/holdout.jpg"],
    }


def test_image_sets_with_blanks_suffixes_and_flags(tmp_path, caplog):
    lines = {"train": "my 1  1\n2.jpg\n", "val": "3 -1\n"}
    for name in ("my 1", "2", "3", "4"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        write(tmp_path / "Annotations" / f"{name}.xml", voc("red", f"{name}.jpg"))
    for split, text in lines.items():
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", text)
    write(tmp_path / "ImageSets" / "Main" / "red_train.txt", "4 1\n")
    splits = files_of(read_dataset(str(tmp_path)))
    assert splits == {
        "train": ["JPEGImages/2.jpg", "JPEGImages/my 1.jpg"],
        "val": ["JPEGImages/3.jpg"],
    }
    assert "1 pictures are in none of the dataset's lists" in caplog.text
    assert "JPEGImages/4.jpg" in caplog.text


@pytest.mark.parametrize(
    "directory, split",
    [
        ("train", "train"), ("Training", "train"), ("train2017", "train"), ("x/train/y", "train"),
        ("val", "val"), ("valid/images", "val"), ("validation", "val"), ("testing", "val"),
        ("val/train", "train"), ("my_train_pictures", None), ("trainers", None), ("tests", None),
    ],
)  # fmt: skip
def test_nearest_directory_with_a_whole_name_is_the_split(tmp_path, directory, split):
    others = {"train": "val", "val": "train"}.get(split, "")
    for i, place in enumerate((directory, others)):
        picture(tmp_path / place / f"{i}.jpg")
        write(tmp_path / place / f"{i}.xml", voc("red", f"{i}.jpg"))
    splits = files_of(read_dataset(str(tmp_path)))
    if split is None:
        assert list(splits) == ["all"]
    else:
        assert splits[split] == [f"{directory}/0.jpg"]


def test_train_and_val_of_the_same_pictures_are_no_split(tmp_path):
    yolo(tmp_path, 2, "train: images\nval: images\nnames: [red]\n")
    assert list(read_dataset(str(tmp_path))) == ["all"]


def test_picture_that_is_listed_twice_is_not_trained_on(tmp_path, caplog):
    yolo(tmp_path, 3, "train: images\nval: val.txt\nnames: [red]\n")
    write(tmp_path / "val.txt", "images/1.jpg\n")
    splits = files_of(read_dataset(str(tmp_path)))
    assert splits == {"train": ["images/0.jpg", "images/2.jpg"], "val": ["images/1.jpg"]}
    assert "1 pictures are listed in both train and val" in caplog.text


def test_annotation_file_is_taken_as_well_as_its_directory(tmp_path):
    picture(tmp_path / "images" / "1.jpg")
    write(tmp_path / "annotations" / "a.json", coco(["1.jpg"]))
    write(tmp_path / "annotations" / "b.json", coco(["gone.jpg"]))
    splits = read_dataset(str(tmp_path / "annotations" / "a.json"))
    assert files_of(splits) == {"all": ["images/1.jpg"]}
    with pytest.raises(UserError, match="is neither a directory, nor a data"):
        read_dataset(str(tmp_path / "images" / "1.jpg"))


def test_subsets_of_a_cvat_project_are_directories(tmp_path):
    xml = ""
    for subset, color in (("Train", "red"), ("Val", "blue")):
        picture(tmp_path / "images" / subset / "1.jpg", color)
        xml += f'<image name="1.jpg" subset="{subset}" width="64" height="48">'
        xml += f'<box label="{color}" xtl="5" ytl="10" xbr="25" ybr="30"/></image>'
    write(tmp_path / "annotations.xml", f"<annotations>{xml}</annotations>")
    splits = read_dataset(str(tmp_path))
    assert files_of(splits) == {"train": ["images/Train/1.jpg"], "val": ["images/Val/1.jpg"]}
    check_colors(tmp_path, splits)


@pytest.mark.parametrize(
    "names, box, what",
    [
        (("first.json", "second.json"), BOX, "have the same objects of"),
        (("train.json", "val.json"), [1, 2, 30, 30], "are for two splits, and both have"),
    ],
)
def test_two_files_for_the_same_picture_that_do_not_add_up_are_both_named(
    tmp_path, names, box, what
):
    picture(tmp_path / "images/0.jpg")
    other = coco(["0.jpg"])
    other["annotations"][0]["bbox"] = box
    for name, content in zip(names, (coco(["0.jpg"]), other)):
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{names[0]} and .*{names[1]} {what} the picture"):
        read_dataset(str(tmp_path))


def test_two_files_with_other_objects_of_the_same_picture_are_joined(tmp_path):
    picture(tmp_path / "images/0.jpg")
    write(tmp_path / "first.json", coco(["0.jpg"], "red"))
    write(tmp_path / "second.json", coco(["0.jpg"], "blue"))
    (dataset,) = read_dataset(str(tmp_path)).values()
    assert sorted(a["category_id"] for a in dataset["annotations"]) == [1, 2]


def test_a_program_s_yaml_does_not_matter_and_that_of_the_data_does(tmp_path):
    yolo(tmp_path, 2)
    write(tmp_path / "environment.yml", "channels: !!python/tuple\n- defaults\n")
    assert len(read_dataset(str(tmp_path))["all"]["images"]) == 2
    write(tmp_path / "data.yaml", "names: !!python/tuple\n- red\n")
    with pytest.raises(UserError, match=r"data\.yaml is not valid YAML"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize("other", ["images", "data"])
def test_a_mirrored_directory_is_nearer_than_one_with_a_directory_of_a_role_below(tmp_path, other):
    picture(tmp_path / "images" / "a.jpg", "red")
    picture(tmp_path / "images" / other / "a.jpg", "blue")
    write(tmp_path / "labels" / "a.txt", "0 .2 .4 .3 .4\n")
    write(tmp_path / "labels" / other / "a.txt", "1 .2 .4 .3 .4\n")
    write(tmp_path / "data.yaml", "names: [red, blue]\n")
    check_colors(tmp_path, read_dataset(str(tmp_path)))

"""Each picture gets its own labels and its own split, wherever they lie."""

import builders
import pytest
from builders import classes_of, files_of, write
from PIL import Image

from gnws_d2.data.formats import read_dataset
from gnws_d2.utils.errors import UserError

BOX = [5, 10, 20, 20]
SIZE = (64, 48)


def picture(color="red"):
    """A picture with a rectangle of the color that its class is called."""
    image = Image.new("RGB", SIZE)
    image.paste(color, (5, 10, 25, 30))
    return image


def voc(name, filename=""):
    return builders.voc((name, BOX), filename=filename)


def coco(files, name="red", box=BOX):
    return builders.coco(dict.fromkeys(files, SIZE), [(f, name, box) for f in files], [name], False)


def yolo(number, names="names: [red]\n"):
    files = {f"images/{i}.jpg": SIZE for i in range(number)}
    files |= {f"labels/{i}.txt": "0 .2 .4 .3 .4\n" for i in range(number)}
    return files | {"data.yaml": names}


def read_files(root, files):
    """Write and read a dataset. Return the pictures of each split."""
    return files_of(read_dataset(write(root, files)))


def check_colors(root, splits):
    """Each object lies on a picture of the color that its class is called."""
    for dataset in splits.values():
        files = {i["id"]: i["file_name"] for i in dataset["images"]}
        for a, name in zip(dataset["annotations"], classes_of(dataset)):
            red, _, blue = Image.open(root / files[a["image_id"]]).convert("RGB").getpixel((15, 20))
            assert name == ("red" if red > blue else "blue"), files[a["image_id"]]


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
    for color, camera in (("red", "A"), ("blue", "B")):
        for i in range(3):
            xml = voc(color, f"{i}.jpg" if named else "")
            write(tmp_path / pictures.format(camera), {f"{i}.jpg": picture(color)})
            write(tmp_path / labels.format(camera), {f"{i}.xml": xml})
    splits = read_dataset(str(tmp_path))
    assert len(splits["all"]["images"]) == len(splits["all"]["annotations"]) == 6
    check_colors(tmp_path, splits)


@pytest.mark.parametrize(
    "named",
    ["a/1.jpg", "./a/1.jpg", "a\\1.jpg", "C:\\data\\a\\1.JPG", "/home/me/pictures/a/1.jpg",
     "https://host/bucket/a/1.jpg?size=3", "A/1.JPG"],
)  # fmt: skip
def test_path_in_a_label_is_found_by_its_longest_end(tmp_path, named):
    files = {"pictures/a/1.jpg": picture("blue"), "pictures/b/1.jpg": picture("red")}
    splits = read_dataset(write(tmp_path, files | {"labels.json": coco([named], "blue")}))
    assert files_of(splits) == {"all": ["pictures/a/1.jpg"]}
    check_colors(tmp_path, splits)


def test_stem_pairs_if_one_picture_has_it(tmp_path):
    files = {"x/1.png": SIZE, "y/z/1.xml": voc("red", "old name.jpg")}
    assert read_files(tmp_path, files) == {"all": ["x/1.png"]}


COPIES = {"1.jpg": SIZE, "1.xml": voc("red", "1.jpg"), "copy.xml": voc("red", "1.jpg")}


@pytest.mark.parametrize(
    "files, message",
    [
        *((yolo(2) | {other: SIZE}, r"labels/1.txt may belong to .*images/1.* or to .*images/1")
          for other in ("images/1.png", "images/1.JPG")),
        (COPIES, r"copy.xml and .*1.xml have labels of the same picture"),
        ({"images/0.jpg": SIZE, "first.json": coco(["0.jpg"]), "second.json": coco(["0.jpg"])},
         "first.json and .*second.json have the same objects of the picture"),
        ({"images/0.jpg": SIZE, "train.json": coco(["0.jpg"]),
          "val.json": coco(["0.jpg"], box=[1, 2, 30, 30])},
         "train.json and .*val.json are for two splits, and both have the picture"),
        (yolo(2, "names: !!python/tuple\n- red\n"), r"data\.yaml is not valid YAML"),
    ],
)  # fmt: skip
def test_two_files_that_do_not_go_together_are_both_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        read_dataset(write(tmp_path, files))


def test_label_without_a_picture_is_named(tmp_path):
    write(tmp_path, yolo(3))
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"labels/1.txt has no picture"):
        read_dataset(str(tmp_path))
    splits = read_dataset(str(tmp_path), skip_bad_images=True)
    assert files_of(splits) == {"all": ["images/0.jpg", "images/2.jpg"]}


def test_hidden_files_and_what_tools_and_programs_leave_are_not_there(tmp_path):
    files = yolo(2) | {"images/._1.jpg": "x"}
    files["environment.yml"] = "channels: !!python/tuple\n- defaults\n"
    for directory in (".ipynb_checkpoints", "__MACOSX", ".git"):
        files[f"images/{directory}/1-checkpoint.jpg"] = SIZE
        files[f"labels/{directory}/1-checkpoint.txt"] = "0 .5 .5 .2 .2\n"
    assert read_files(tmp_path, files) == {"all": ["images/0.jpg", "images/1.jpg"]}


def test_picture_without_a_label_has_no_objects_among_pictures_with_labels(tmp_path):
    files = yolo(2) | {"images/9.jpg": SIZE, "unlabeled/10.jpg": SIZE}
    splits = read_dataset(write(tmp_path, files))
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
    write(tmp_path, yolo(6, f"{names}names: [red]\n"))
    for (file, line), numbers in zip(files.items(), ([0, 1, 2, 4], [3, 5])):
        write(tmp_path, {f"{file}.txt": "".join(line.format(i) + "\n" for i in numbers)})
    splits = files_of(read_dataset(str(tmp_path / given)))
    assert splits["val"] == ["images/3.jpg", "images/5.jpg"]
    assert splits["train"] == [f"images/{i}.jpg" for i in (0, 1, 2, 4)]


def test_directories_of_a_yaml_are_the_splits(tmp_path):
    text = "path: .\ntrain: [images/a, images/b]\nval: images/holdout\nnames: [red]\n"
    files = {"data.yaml": text}
    for directory in ("a", "b", "holdout"):
        files[f"images/{directory}/{directory}.jpg"] = SIZE
        files[f"labels/{directory}/{directory}.txt"] = "0 .2 .4 .3 .4\n"
    assert read_files(tmp_path, files) == {
        "train": ["images/a/a.jpg", "images/b/b.jpg"],
        "val": ["images/holdout/holdout.jpg"],
    }


def test_image_sets_with_blanks_suffixes_and_flags(tmp_path, caplog):
    lines = {"train": "my 1  1\n2.jpg\n", "val": "3 -1\n", "red_train": "4 1\n"}
    files = {f"ImageSets/Main/{split}.txt": text for split, text in lines.items()}
    for name in ("my 1", "2", "3", "4"):
        files[f"JPEGImages/{name}.jpg"] = SIZE
        files[f"Annotations/{name}.xml"] = voc("red", f"{name}.jpg")
    assert read_files(tmp_path, files) == {
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
    files = {}
    for i, place in enumerate((directory, others)):
        files |= {f"{place}/{i}.jpg".strip("/"): SIZE, f"{place}/{i}.xml".strip("/"): voc("red")}
    splits = read_files(tmp_path, files)
    if split is None:
        assert list(splits) == ["all"]
    else:
        assert splits[split] == [f"{directory}/0.jpg"]


def test_train_and_val_of_the_same_pictures_are_no_split(tmp_path):
    files = yolo(2, "train: images\nval: images\nnames: [red]\n")
    assert list(read_files(tmp_path, files)) == ["all"]


def test_picture_that_is_listed_twice_is_not_trained_on(tmp_path, caplog):
    files = yolo(3, "train: images\nval: val.txt\nnames: [red]\n")
    splits = read_files(tmp_path, files | {"val.txt": "images/1.jpg\n"})
    assert splits == {"train": ["images/0.jpg", "images/2.jpg"], "val": ["images/1.jpg"]}
    assert "1 pictures are listed in both train and val" in caplog.text


def test_annotation_file_is_taken_as_well_as_its_directory(tmp_path):
    labels = {"annotations/a.json": coco(["1.jpg"]), "annotations/b.json": coco(["gone.jpg"])}
    write(tmp_path, {"images/1.jpg": SIZE} | labels)
    splits = read_dataset(str(tmp_path / "annotations" / "a.json"))
    assert files_of(splits) == {"all": ["images/1.jpg"]}
    with pytest.raises(UserError, match="is neither a directory, nor a data"):
        read_dataset(str(tmp_path / "images" / "1.jpg"))


def test_subsets_of_a_cvat_project_are_directories(tmp_path):
    xml, files = "", {}
    for subset, color in (("Train", "red"), ("Val", "blue")):
        files[f"images/{subset}/1.jpg"] = picture(color)
        xml += f'<image name="1.jpg" subset="{subset}" width="64" height="48">'
        xml += f'<box label="{color}" xtl="5" ytl="10" xbr="25" ybr="30"/></image>'
    files["annotations.xml"] = f"<annotations>{xml}</annotations>"
    splits = read_dataset(write(tmp_path, files))
    assert files_of(splits) == {"train": ["images/Train/1.jpg"], "val": ["images/Val/1.jpg"]}
    check_colors(tmp_path, splits)


def test_two_files_with_other_objects_of_the_same_picture_are_joined(tmp_path):
    labels = {f"{name}.json": coco(["0.jpg"], name) for name in ("red", "blue")}
    (dataset,) = read_dataset(write(tmp_path, {"images/0.jpg": SIZE} | labels)).values()
    assert sorted(a["category_id"] for a in dataset["annotations"]) == [1, 2]


@pytest.mark.parametrize("other", ["images", "data"])
def test_a_mirrored_directory_is_nearer_than_one_with_a_directory_of_a_role_below(tmp_path, other):
    files = {
        "images/a.jpg": picture("red"),
        f"images/{other}/a.jpg": picture("blue"),
        "labels/a.txt": "0 .2 .4 .3 .4",
        f"labels/{other}/a.txt": "1 .2 .4 .3 .4",
        "data.yaml": "names: [red, blue]",
    }
    check_colors(tmp_path, read_dataset(write(tmp_path, files)))


@pytest.mark.parametrize(
    "url", ["https://h.org/x/a.png?size=2#top", "http://[x/a.png", "my_disk://pictures/a.png"]
)
def test_picture_that_a_url_names(tmp_path, url):
    files = {"pictures/a.png": picture("red"), "b.png": picture("blue"), "b.xml": voc("red", url)}
    splits = read_dataset(write(tmp_path, files))
    check_colors(tmp_path, splits)
    assert [i["file_name"] for i in splits["all"]["images"]] == ["pictures/a.png"]


def test_link_to_a_directory_above_is_not_followed(tmp_path):
    root = write(tmp_path / "data", {"a/1.png": picture("red"), "a/1.xml": voc("red")})
    (tmp_path / "data/a/again").symlink_to(tmp_path / "data", target_is_directory=True)
    assert files_of(read_dataset(root)) == {"all": ["a/1.png"]}

"""`gnws check-dataset` lists what is left out of a dataset, by file and line or id."""

import json

from PIL import Image


def test_dataset_without_issues_has_status_0(photographs, gnws):
    status, stdout, _ = gnws("check-dataset", photographs.json_file, photographs.images)
    assert status == 0
    assert stdout == "all: 18 images, 165 objects, of the classes date, fig, hazelnut\n"


def test_everything_that_is_left_out_is_listed(photographs, gnws, tmp_path):
    coco = photographs.coco()
    images = tmp_path / "images"
    images.mkdir()
    for image in coco["images"]:
        (images / image["file_name"]).symlink_to(photographs.images / image["file_name"])
    coco["annotations"][0].update(id=1234, category_id=99)
    coco["annotations"][1].update(id=1235, bbox=[1, 1, 0, 5], segmentation=[])
    coco["annotations"][2].update(id=1236, segmentation=coco["annotations"][2]["segmentation"][0])
    names = [image["file_name"] for image in coco["images"]]
    (images / names[5]).unlink()
    (images / names[6]).unlink()
    (images / names[6]).write_bytes((photographs.images / names[6]).read_bytes()[:-1000])
    (tmp_path / "a.json").write_text(json.dumps(coco))

    status, stdout, _ = gnws("check-dataset", tmp_path / "a.json", images)
    assert status == 1
    repaired, left_out = stdout.split("Left out", 1)
    assert f"{tmp_path / 'a.json'}, annotation id 1236" in repaired
    for item in ("annotation id 1234", "annotation id 1235", names[5], str(images / names[6])):
        assert item in left_out and item not in repaired


def test_any_format_is_read(gnws, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .2 .2\n")
    status, _, stderr = gnws("check-dataset", tmp_path)
    assert status == 2 and "no names of their classes" in stderr
    (tmp_path / "data.yaml").write_text("names: [x]\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("0 .5 .5 .2 .2\n")
    status, stdout, _ = gnws("check-dataset", tmp_path)
    assert status == 1 and "all: 1 images, 1 objects, of the classes x" in stdout
    assert f"{tmp_path / 'labels' / 'a.txt'} has no picture" in stdout

import json
import sys

import pytest
from detectron2.data.datasets import load_coco_json

from gnws_d2 import model_zoo
from gnws_d2.data import OpenCVDatasetMapper, check_coco_json
from gnws_tools.cli import main


@pytest.fixture
def copy(photographs, tmp_path):
    """The dataset in a directory whose images are links, as on clusters."""
    (tmp_path / "images").mkdir()
    for path in photographs.images.iterdir():
        (tmp_path / "images" / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool, and return its exit status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *args])
        with pytest.raises(SystemExit) as e:
            main("check-dataset")
        return e.value.code, *capsys.readouterr()

    return run


def test_every_issue_is_listed_once_by_id(photographs, copy, run):
    coco, images = photographs.coco(), copy / "images"
    coco["annotations"][4].update(id=1234, category_id=9)
    coco["annotations"][5].update(id=1235, bbox=[1, 1, 0, 0])
    for a in coco["annotations"][6:40]:
        a["bbox"] = None
    coco["images"][3]["file_name"] = "../escaped.jpg"
    coco["images"][4]["width"] += 1
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    for i in (5, 6, 7):
        content = (images / names[i]).read_bytes()
        (images / names[i]).unlink()
        if i > 5:
            (images / names[i]).write_bytes(b"GIF89a no image" if i == 6 else content[:-1000])
    (copy / "a.json").write_text(json.dumps(coco))
    args = [str(copy / "a.json"), str(images), "--output", str(copy / "report.json")]

    status, stdout, _ = run(*args)
    assert status == 1 and stdout.endswith("a.json: 41 issues\n")
    report = json.loads((copy / "report.json").read_text())
    found = [(f["item"], f["id"], f["key"]) for f in report["issues"]]
    assert sorted(found) == sorted(
        [
            ("annotation", 1234, "category_id"),
            ("annotation", 1235, "bbox"),
            *(("annotation", a["id"], "bbox") for a in coco["annotations"][6:40]),
            ("image", 3, "file_name"),
            *(("image", i, "file") for i in (4, 5, 6, 7)),
        ]
    )
    assert "error: annotation bbox (34)" in stdout and "and 24 more" in stdout
    assert "annotation id 1234 has category id 9" in stdout

    assert run(*args, "--no-images")[0] == 1
    without = json.loads((copy / "report.json").read_text())
    opened = [f for f in report["issues"] if f not in without["issues"]]
    assert [f["id"] for f in opened] == [4, 6, 7] and opened[0]["item"] == "image"


def test_good_dataset_of_links_has_no_issue_and_training_reads_it(photographs, copy, run):
    status, stdout, _ = run(str(photographs.json_file), str(copy / "images"))
    assert status == 0 and stdout.endswith("trainval.json: 0 issues\n")
    assert check_coco_json(str(photographs.json_file), str(copy / "images"), masks=True)
    record = load_coco_json(str(photographs.json_file), str(copy / "images"))[0]
    cfg = model_zoo.get_config("mask_rcnn_R50_gnws_2x")
    assert "instances" in OpenCVDatasetMapper(cfg, True)(record)


@pytest.mark.parametrize(
    "args", [["gone.json", "."], [__file__, "gone"], [__file__, ".", "--output", "gone/a.json"], []]
)
def test_tool_that_cannot_start_has_status_2_and_one_line(args, run):
    status, stdout, stderr = run(*args)
    assert status == 2 and stdout == "" and "check_dataset.py: error: " in stderr

import json
import sys

import pytest

from gnws_tools.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command, and return its exit status, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["gnws check-dataset", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            main("check-dataset")
        return e.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def images(photographs, tmp_path):
    """A directory of links to the images, as on clusters."""
    (tmp_path / "images").mkdir()
    for path in photographs.images.iterdir():
        (tmp_path / "images" / path.name).symlink_to(path)
    return tmp_path / "images"


def test_every_issue_is_listed_by_id(photographs, images, run, tmp_path):
    coco = photographs.coco()
    coco["annotations"][4].update(id=1234, category_id=9)
    coco["annotations"][5].update(id=1235, bbox=[1, 1, 0, 0])
    coco["images"][3]["file_name"] = "../escaped.jpg"
    coco["images"][4]["width"] += 1
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    (images / names[5]).unlink()
    content = (images / names[6]).read_bytes()
    (images / names[6]).unlink()
    (images / names[6]).write_bytes(content[:-1000])
    (tmp_path / "a.json").write_text(json.dumps(coco))

    status, stdout, _ = run(tmp_path / "a.json", images)
    *issues, total = stdout.splitlines()
    assert status == 1 and total.endswith("a.json: 6 issues")
    items = ["annotation id 1234", "annotation id 1235"]
    items += [f"image id {i}" for i in (3, 4, 5)] + [names[6]]
    for item in items:
        assert sum(item in line for line in issues) == 1, (item, stdout)


def test_good_dataset_has_no_issues(photographs, images, run):
    status, stdout, _ = run(photographs.json_file, images)
    assert status == 0 and stdout.endswith("trainval.json: 0 issues\n")

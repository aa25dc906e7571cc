"""`gnws finetune`, from a folder of pictures to a report, as a user runs it."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from builders import classes_of, coco, decode, files_of, names_of, shape, voc, write
from conftest import run_python
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import gnws_d2
from gnws_d2.config import load_config
from gnws_d2.data import check_datasets, register_coco_datasets
from gnws_d2.data.formats import read_dataset
from gnws_d2.evaluation import results_json
from gnws_d2.finetuning.prepare import prepare
from gnws_d2.utils.errors import UserError

SMALL = ["--model", "quick_start", "--epochs", "1", "--batch-size", "1"]
KEYS = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.ACCUMULATE_STEPS", "1"]


def finetune(*args, cwd):
    """Return what the command prints."""
    code = "from gnws_tools.cli import main; main()"
    return run_python("-c", code, "finetune", *args, cwd=cwd)


@pytest.fixture
def small(photographs, tmp_path):
    """Four photographs, with their annotations as COCO."""
    root = tmp_path / "small"
    (root / "images").mkdir(parents=True)
    coco = photographs.coco(4)
    for image in coco["images"]:
        picture = cv2.imread(str(photographs.images / image["file_name"]))
        picture = cv2.resize(picture, None, fx=0.2, fy=0.2, interpolation=cv2.INTER_AREA)
        image["height"], image["width"] = picture.shape[:2]
        cv2.imwrite(str(root / "images" / image["file_name"]), picture)
    for annotation in coco["annotations"]:
        annotation["bbox"] = [v / 5 for v in annotation["bbox"]]
        annotation["segmentation"] = [[v / 5 for v in p] for p in annotation["segmentation"]]
        annotation["area"] /= 25
    return root, coco


def by_picture(coco):
    """The image, the stem of its file, and (class, annotation) of its objects."""
    for image in coco["images"]:
        own = [(n, a) for n, a in zip(classes_of(coco), coco["annotations"])
               if a["image_id"] == image["id"]]  # fmt: skip
        yield image, image["file_name"].partition(".")[0], own


def as_coco(root, coco):
    write(root, {"annotations/instances_default.json": coco})


def as_yolo(root, coco):
    names = list(names_of(coco).values())
    write(root, {"data.yaml": yaml.safe_dump({"names": names})})
    for image, stem, objects in by_picture(coco):
        size = image["width"], image["height"]
        lines = [
            [names.index(name), *(np.reshape(a["segmentation"][0], (-1, 2)) / size).ravel()]
            for name, a in objects
        ]
        write(root, {f"labels/{stem}.txt": "\n".join(" ".join(map(str, line)) for line in lines)})


def as_voc(root, coco):
    for _, stem, objects in by_picture(coco):
        own = [(name, [*map(round, a["bbox"])]) for name, a in objects]
        write(root, {f"images/{stem}.xml": voc(*own)})


def as_labelme(root, coco):
    for image, stem, objects in by_picture(coco):
        points = [(name, np.reshape(a["segmentation"][0], (-1, 2))) for name, a in objects]
        shapes = [shape("polygon", *own.tolist(), label=name) for name, own in points]
        content = {"shapes": shapes, "imagePath": image["file_name"]}
        write(root, {f"images/{stem}.json": content})


def as_masks(root, coco):
    for image, stem, objects in by_picture(coco):
        for _, a in objects:
            mask = decode(a, image["height"], image["width"]) * np.uint8(255)
            write(root, {f"masks/{stem}/{a['id']}.png": mask})


@pytest.fixture
def dry_run(small, tmp_path, capsys):
    """Write the small dataset. Return the config that is chosen for it, and what is shown."""

    def dry_run(write=as_coco, **options):
        write(*small)
        options |= {"model": "quick_start", "dry_run": True}
        config = gnws_d2.finetune(str(small[0]), output=str(tmp_path / "out"), **options)
        assert config == str(tmp_path / "out" / "finetune.yaml")
        return load_config(config, []), capsys.readouterr().out

    return dry_run


@pytest.mark.ci
@pytest.mark.parametrize("write", [as_coco, as_yolo, as_voc, as_labelme, as_masks])
def test_each_format_trains_and_draws(small, tmp_path, monkeypatch, gnws, write):
    monkeypatch.chdir(tmp_path)
    root, coco = small
    write(root, coco)
    out = tmp_path / "out"
    gnws("finetune", "--data", root, "--output", out.name, *SMALL, *KEYS)
    assert (out / "report.html").is_file() and (out / "model_final.pth").is_file()
    written = [json.loads((out / "data" / f"{s}.json").read_text()) for s in ("train", "val")]
    assert sum(len(c["images"]) for c in written) == 4
    assert sum(len(c["annotations"]) for c in written) == len(coco["annotations"])
    names = [c["name"] for c in written[0]["categories"]]
    assert names == (["object"] if write is as_masks else ["date", "fig", "hazelnut"])
    assert ("segmentation" in written[0]["annotations"][0]) == (write is not as_voc)
    assert list(torch.load(out / "model_final.pth")["classes"].values()) == names
    images = ["--input", *sorted((root / "images").glob("*.jpg"))]
    gnws("demo", "--model", out.name, *images, "--output", "drawn")
    assert len(list((tmp_path / "drawn").glob("*.jpg"))) == 4
    drawn = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    assert [c["name"] for c in drawn["categories"]] == names


@pytest.mark.ci
def test_choices_are_shown_recorded_overridden_and_kept_by_resume(small, tmp_path):
    root, coco = small
    as_coco(root, coco)
    keys = ["SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "1"]
    args = ["--output", "out", *SMALL, *keys, "SOLVER.ACCUMULATE_STEPS", "1"]
    shown = finetune("--data", root, *args, cwd=tmp_path)
    assert re.search(r"MODEL.ROI_HEADS.NUM_CLASSES +3 +classes with objects", shown)
    assert "split by image, seed 0" in shown
    out = tmp_path / "out"
    choices = {c["key"]: c for c in json.loads((out / "finetune.choices.json").read_text())}
    assert choices["TEST.EVAL_PERIOD"]["reason"] == "each epoch"
    assert "SOLVER.BASE_LR" not in choices  # given
    config = yaml.safe_load((out / "finetune.yaml").read_text())
    assert config["SOLVER"]["BASE_LR"] == 0.001 and config["SOLVER"]["MAX_ITER"] == 2
    metrics = (out / "metrics.json").read_text()
    assert "validation/total_loss" in metrics and "segm/AP" in metrics
    for command in ("gnws demo --model out", "gnws finetune --resume --output out", "gnws export"):
        assert command in shown
    shown = finetune("--resume", "--output", "out", "SOLVER.MAX_ITER", "3", cwd=tmp_path)
    assert "Starting training from iteration 2" in shown
    assert torch.load(out / "model_final.pth")["iteration"] == 2


@pytest.mark.ci
def test_python_trains_and_gets_the_best_checkpoint(small, tmp_path, monkeypatch):
    root, coco = small
    as_coco(root, coco)
    monkeypatch.chdir(tmp_path)
    out = "out"
    options = {"model": "quick_start", "epochs": 1, "batch_size": 1}
    keys = ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.ACCUMULATE_STEPS", 1]
    best = gnws_d2.finetune(str(root), output=out, **options, opts=keys)
    assert best == f"{out}/model_best.pth" and (tmp_path / out / "report.html").is_file()
    predictor = gnws_d2.Predictor.from_pretrained(best)
    assert predictor.metadata.thing_classes == ["date", "fig", "hazelnut"]
    with pytest.raises(UserError, match="gone has no run to --resume"):
        gnws_d2.finetune(output="gone", resume=True)


def test_directories_of_one_name_or_of_a_built_in_dataset_do_not_collide(small, tmp_path):
    """In one process, as in a notebook."""
    root, coco = small
    for number, output in enumerate(("a/out", "b/out", "shapes")):
        path, names = tmp_path / output, [f"fruit {number} {i}" for i in range(3)]
        for category, name in zip(coco["categories"], names):
            category["name"] = name
        as_coco(root, coco)
        prepare(
            str(path / "finetune.yaml"), data=str(root), train=None, val=None, model="quick_start",
            epochs=1, batch_size=1, num_gpus=1, patience=0, opts=[],
        )  # fmt: skip
        cfg = load_config(str(path / "finetune.yaml"), [])
        register_coco_datasets(cfg.DATASETS.COCO)
        check_datasets(cfg, ("TRAIN", "TEST"))
        assert len(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])) == 3
        assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == names
    # A run on several datasets writes the results of each into its own directory.
    cfg.defrost()
    cfg.DATASETS.TEST = (*cfg.DATASETS.TEST, "shapes_val")
    path = results_json(str(path), cfg, cfg.DATASETS.TEST[0])
    assert path.startswith(str(tmp_path / "shapes" / "inference"))


def test_dry_run_shows_the_data_and_trains_nothing(small, tmp_path, dry_run):
    root, coco = small
    coco["annotations"][0]["bbox"], coco["annotations"][0]["segmentation"] = [3, 3, 0, 0], []
    coco["annotations"][1]["segmentation"] = coco["annotations"][1]["segmentation"][0]
    first = coco["images"][-1]["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != first]
    cfg, shown = dry_run()
    out = tmp_path / "out"
    assert not (out / "run.json").exists()
    splits = [json.loads((out / "data" / f"{s}.json").read_text()) for s in ("train", "val")]
    number = len(coco["annotations"]) - 1
    assert sum(len(c["annotations"]) for c in splits) == number
    assert "1 images without objects" in shown
    assert "Repaired 1 x polygon without the list around it. The first: " in shown
    assert "Left out 1 x object: its box has no area. The first: " in shown
    where = f"{root / 'annotations' / 'instances_default.json'}, annotation id "
    assert shown.count(where) == 2
    page = (out / "data" / "preview.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 4 + 16 and where in page
    assert "<td>hazelnut</td>" in page
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS  # pictures without objects are trained on


@pytest.mark.parametrize("augment", [None, "none", "light", "strong"])
@pytest.mark.parametrize("masks", [True, False])
def test_augmentation_is_chosen_and_shown(tmp_path, dry_run, augment, masks):
    turned = augment == "light"
    options = {"augment": augment, "any_orientation": turned}
    cfg, shown = dry_run(as_coco if masks else as_voc, **options)
    given = cfg.INPUT
    assert given.AUGMENTATION == (augment or "light") and given.ANY_ORIENTATION is turned
    assert given.COPY_PASTE == (0.5 if augment == "strong" and masks else 0)
    assert ("INPUT.COPY_PASTE" in shown) == (augment == "strong" and masks)
    reason = "--augment" if augment else "better on small data"
    assert re.search(rf"INPUT.AUGMENTATION +\w+ +{reason}", shown)
    data, _, training = (tmp_path / "out/data/preview.html").read_text().partition("As in training")
    assert data.count("<img") == 4 and training.count("<img") == 16 * (augment != "none")
    if augment == "strong":
        sizes = re.findall(r"<figcaption>\S+, (\d+) x (\d+), \d+ objects", training)
        assert {*sizes} == {(str(given.MAX_SIZE_TRAIN),) * 2} and len(sizes) == 16


@pytest.mark.parametrize("augment", [None, "strong"])
def test_augmentation_of_the_config_and_of_keys_stays(dry_run, augment):
    keys = ["INPUT.AUGMENTATION", "light", "INPUT.COPY_PASTE", "0.2"]
    cfg, _ = dry_run(augment=augment, opts=keys)
    assert (cfg.INPUT.AUGMENTATION, cfg.INPUT.COPY_PASTE) == ("light", 0.2)


def test_no_objects_are_pasted_without_bitmasks_and_given_values_are_shown(dry_run):
    keys = ["INPUT.MASK_FORMAT", "polygon", "TEST.VALIDATION_LOSS", "False"]
    _, shown = dry_run(augment="strong", opts=keys)
    assert "INPUT.COPY_PASTE" not in shown
    assert re.search(r"TEST.VALIDATION_LOSS +False +given", shown)


SIZE = (64, 48)


def two(label, directory=".", picture=SIZE):
    """Two pictures, with a COCO file."""
    files = {"a.png": picture, "b.png": picture, "labels.json": label}
    return {f"{directory}/{name}": content for name, content in files.items()}


def coco_of_two(box=(1, 1, 9, 9), annotated=True):
    sizes = {"a.png": SIZE, "b.png": SIZE}
    return coco(sizes, [(name, "x", [*box]) for name in sizes if annotated], ["x"], masks=False)


NO_OBJECTS = coco_of_two(annotated=False)
DEEP = Image.new("I;16", SIZE)
GOOD = two(coco_of_two())

MISTAKES = [
    ([], "Give either --data DIR or --train"),
    (["--data", ".", "--train", ".", "."], "Give either --data DIR or --train"),
    (["--data", "gone"], "--data gone: there is no such directory"),
    (["--train", "gone.json", "."], "Cannot read the annotation file .*gone.json"),
    (["--val", ".", "."], "--val needs --train"),
    (["--data", ".", "--epochs", "0"], "--epochs is at least 1"),
    (["--data", ".", "--patience", "-1"], "--patience is at least 0"),
    (["--data", ".", "--augment", "much"], "argument --augment: invalid choice: 'much'"),
    (["--resume"], "has no run to --resume"),
    (["--data", "."], "holds no files, and none of COCO"),
    ({"labels.json": "{"}, "holds 1 files .*and none of COCO"),
    ({"images/a.png": SIZE, "labels.json": coco({"a.png": SIZE}, [("a.png", "cat", [1, 1, 9, 9])])},
     "has one image, which cannot be split"),
    (two(NO_OBJECTS), "has nothing in 'categories'|no image of the split"),
    (two(coco_of_two(), "train") | two(NO_OBJECTS, "valid"),
     "no image of the split val has an object"),
    (two(coco_of_two(), picture=(32, 32)),
     "id 1: its label has another size than its picture: 64x48, and .*32x32"),
    (two(coco_of_two(), picture=DEEP), "has 16 bits per channel"),
    (two(coco_of_two([30, 30, 60, 44])), "boxes seem to be x1, y1, x2, y2"),
    (["--data", ".", "--output", "/proc/x"], "OUTPUT_DIR|cannot be written|cannot write"),
    (["--data", ".", "--model", "no_model"], "--config-file no_model"),
    (["--data", ".", "SOLVER.LR", "1"], "there is no key SOLVER.LR"),
]  # fmt: skip


@pytest.mark.parametrize("what, message", MISTAKES)
def test_mistake_is_one_sentence(tmp_path, monkeypatch, gnws, what, message):
    root = tmp_path / "data with blänks"
    root.mkdir()
    monkeypatch.chdir(root)
    args = ["--data", "."] if isinstance(what, dict) else what
    if isinstance(what, dict):
        write(root, what)
    elif {"--model", "SOLVER.LR", "/proc/x"} & {*args}:
        write(root, GOOD)
    if "--output" not in args:
        args = ["--output", str(tmp_path / "out"), *args]
    if "--model" not in args and "--resume" not in args:
        args = ["--model", "quick_start", *args]
    status, _, err = gnws("finetune", *args)
    error = err.strip().splitlines()[-1]
    assert status == 2 and re.search(message, error), error
    assert error.startswith("gnws finetune: error: ")


def test_umlauts_and_blanks_in_names_are_no_mistake(tmp_path):
    root = tmp_path / "Früchte und Nüsse"
    names = [f"{d}/Äpfel {i}.png" for d in ("images", "masks") for i in (1, 2)]
    splits = read_dataset(write(root, {name: Image.new("L", SIZE) for name in names}))
    assert files_of(splits) == {"all": names[:2]}
    shutil.rmtree(root)

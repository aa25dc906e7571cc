"""The page of a run, from files as Detectron2 writes them, on a few of the built-in shapes."""

import html
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import START, metrics

from gnws_d2.data import register_coco_datasets
from gnws_d2.data.shapes import generate_shapes
from gnws_d2.evaluation import best_thresholds, evaluate_results, read_truth
from gnws_d2.report import make_report
from gnws_d2.report.analysis import analyze, find_mistakes
from gnws_d2.utils.errors import UserError

NONE = "\N{EN DASH}"


@pytest.fixture(scope="module", autouse=True)
def built_in_data(tmp_path_factory):
    """Where shapes_train is generated, for no other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        yield
    for key in ("json_file", "image_root"):
        MetadataCatalog.get("shapes_train").__dict__.pop(key, None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """30 images; one class has a hostile name and another no objects."""
    root = tmp_path_factory.mktemp("report") / "shapes"
    generate_shapes(str(root), 30, seed=5)
    path = root / "annotations.json"
    coco = json.loads(path.read_text())
    coco["categories"][1]["name"] = "<script>alert(1)</script>"
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 3]
    path.write_text(json.dumps(coco))
    return ["report_shapes", str(path), str(root / "images")]


def predict(shapes):
    """The ground truth, moved a little; some of it is missing, of another class or found twice."""
    coco, rng = COCO(shapes[1]), np.random.RandomState(0)
    results = []
    for a in coco.anns.values():
        for _ in range(rng.choice([0, 1, 2], p=[0.2, 0.7, 0.1])):
            rle = coco.annToRLE(a)
            results.append({
                "image_id": a["image_id"],
                "category_id": a["category_id"] if rng.rand() < 0.8 else 3,
                "bbox": (np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist(),
                "score": rng.rand() * 0.6 + 0.4,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            })  # fmt: skip
    return results


def write_run(path, shapes, *opts, results=None, **files):
    keys = ["DATASETS.TEST", str((shapes[0],)), "SOLVER.MAX_ITER", "60", *opts]
    cfg = runs.write_run(path, *keys, **files)
    if results is not None:
        file = path / "inference" / (shapes[0] if len(cfg.DATASETS.TEST) > 1 else "")
        file.mkdir(parents=True, exist_ok=True)
        (file / "coco_instances_results.json").write_text(json.dumps(results))
    return str(path)


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    lines = metrics(19, 40, ap=40.0) + metrics(59, 60, ap=50.0)
    path = tmp_path_factory.mktemp("run") / "output"
    return write_run(path, shapes, results=predict(shapes), lines=lines, starts=[START])


def report(run, shapes):
    make_report(run, [shapes])
    return (Path(run) / "report.html").read_text()


def mistakes_of(shapes):
    truth, results = read_truth(shapes[1]), predict(shapes)
    best, _ = best_thresholds(evaluate_results(truth, results, "bbox", iou_threshold=0.5))
    results = [result for result in results if result["score"] >= best.threshold]
    return find_mistakes(
        evaluate_results(read_truth(shapes[1]), results, "bbox", iou_threshold=0.5)
    )


@pytest.fixture(scope="module")
def page(run, shapes):
    return report(run, shapes)


def rows(page, first):
    """The cells of the rows of all tables that start with `first`."""
    pattern = rf'<tr><th scope="row">{re.escape(html.escape(first))}</th>(.*?)</tr>'
    found = re.findall(pattern, page, re.DOTALL)
    return [re.findall(r"([^<>]*)(?:</div>)?</td>", row) for row in found]


def test_page_has_the_ap_of_pycocotools(page, shapes):
    coco, results = COCO(shapes[1]), predict(shapes)
    for task, name in (("bbox", "box"), ("segm", "mask")):
        # With a box, the API takes the area of the box for the area of the mask.
        left_out = "bbox" if task == "segm" else None
        own = [{k: v for k, v in result.items() if k != left_out} for result in results]
        reference = COCOeval(coco, coco.loadRes(own), task)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        stats = reference.stats[:6]
        assert rows(page, name) == [[f"{100 * ap:.1f}" if ap >= 0 else NONE for ap in stats]]
        assert 20 < 100 * stats[0] < 90
    ap, scores, confusion = rows(page, "circle")
    assert len(ap) == 2 and all(float(value) > 20 for value in ap)
    precision, recall, f1 = map(float, scores[1:])
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=0.1) and f1 > 50
    assert len(confusion) == 4 and int(confusion[0]) > int(confusion[2]) > 0
    ap, confusion = rows(page, "triangle")  # which have no objects, and so no recall
    assert ap == [NONE, NONE] and confusion == ["0"] * 4


def test_page_is_a_single_file_with_escaped_values(page):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) > 10 and all(source.startswith(("data:", "#")) for source in sources)
    page = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)  # names, which no browser opens
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "<script" not in page and html.escape("<script>alert(1)</script>") in page


def test_page_has_the_facts_of_the_run(page):
    for text in (
        "Mask R-CNN, R-50, GN+WS", "shapes_train", "report_shapes", "60 of 60",
        "2026-12-31 23:59:00", "0:02:28", "stopped", "train_net.py --config-file a.yaml",
        "2 x NVIDIA H200, AMD EPYC, 16 threads", "python 3.11.7, torch 2.15.0",
        "0.5 s per iteration", "STEM_OUT_CHANNELS: 32",
    ):  # fmt: skip
        assert text in page, text


def test_pictures_are_of_typical_images_and_of_the_worst(page, shapes):
    coco, mistakes = COCO(shapes[1]), mistakes_of(shapes)
    pattern = r"image (\d+)\): (\d+) of (\d+) missed, (\d+) false$"
    shown = []
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page):
        image_id, missed, objects, false = map(int, re.search(pattern, caption).groups())
        assert objects == len(coco.imgToAnns[image_id])
        assert (missed, false) == tuple(map(len, mistakes[image_id]))
        shown.append(missed + false)
    every = sorted((sum(map(len, m)) for m in mistakes.values()), reverse=True)
    middle = (len(every) - 5) // 2
    assert shown == every[middle : middle + 5] + every[:5] and every[5] > 0


def test_detections_and_types_of_errors_are_counted(page, shapes):
    mistakes = mistakes_of(shapes)
    missed, false = (sum(len(m[i]) for m in mistakes.values()) for i in (0, 1))
    objects = sum(not a["iscrowd"] for a in COCO(shapes[1]).anns.values())
    assert f"<b>{objects - missed} of {objects} objects</b>" in page
    assert f"<b>{false}</b> other detections are false" in page
    truth, results = read_truth(shapes[1]), predict(shapes)
    errors = [analyze(evaluate_results(truth, results, task)).errors for task in ("bbox", "segm")]
    assert errors[0]["class"] > 1
    for name in errors[0]:  # in TIDE's terms
        assert rows(page, name)[-1] == [f"{of_task[name]:.1f}" for of_task in errors]


def test_few_images_are_shown_once(shapes, tmp_path):
    coco = json.loads(Path(shapes[1]).read_text())
    coco["images"] = coco["images"][:4]
    ids = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    (tmp_path / "few.json").write_text(json.dumps(coco))
    dataset = ["report_few", str(tmp_path / "few.json"), shapes[2]]
    results = [r for r in predict(shapes) if r["image_id"] in ids]
    page = report(write_run(tmp_path / "o", dataset, results=results), dataset)
    shown = re.findall(r"\(image (\d+)\)", page)
    assert len(shown) == len(set(shown)) > 2


@pytest.mark.parametrize(
    "shared, text",
    [(0, "None of these images is in the"), (1, "1 of these images are also in the")],
)
def test_images_that_were_trained_on_are_counted(shapes, tmp_path, shared, text):
    """Copies under another name."""
    for i, path in enumerate(sorted(Path(shapes[2]).iterdir())[:3]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes() + (b"" if i < shared else b"x"))
    coco = {"categories": COCO(shapes[1]).dataset["categories"], "annotations": []}
    coco["images"] = [
        {"id": i, "file_name": f"{i}.png", "width": 128, "height": 128} for i in range(3)
    ]
    (tmp_path / "a.json").write_text(json.dumps(coco))
    train = [f"report_train_{shared}", str(tmp_path / "a.json"), str(tmp_path)]
    names = ["DATASETS.TRAIN", f"('{train[0]}',)"]
    run = write_run(tmp_path / "o", shapes, *names, results=predict(shapes), lines=metrics(19, 40))
    make_report(run, [shapes, train])
    assert f"{text} training set" in (Path(run) / "report.html").read_text()


def test_perfect_boxes_of_a_faster_rcnn_have_no_masks_and_no_pictures_of_mistakes(shapes, tmp_path):
    results = []
    for a in COCO(shapes[1]).anns.values():
        keys = {key: a[key] for key in ("image_id", "category_id", "bbox")}
        results.append({**keys, "score": 0.9})
    run = write_run(tmp_path / "o", shapes, "MODEL.MASK_ON", "False", results=results)
    page = report(run, shapes)
    assert rows(page, "box")[0][0] == "100.0" and rows(page, "missed") == [["0.0"]]
    assert "Faster R-CNN" in page and not rows(page, "mask")
    assert "nothing was trained here" in page  # but evaluated
    assert ">None.<" in page
    assert " 0 false<" in page and "<b>0</b> other" in page


def test_training_without_an_evaluation_has_its_curves(shapes, tmp_path, capsys):
    run = write_run(tmp_path / "o", shapes, lines=metrics(19, 40))
    with open(Path(run) / "metrics.json", "a") as f:
        f.write('{"iteration": 59, "lr')  # killed while it wrote
    page = report(run, shapes)
    assert 'aria-label="Loss"' in page and "AP over time" not in page and "40 of 60" in page
    assert "There are no predictions of this run on report_shapes yet." in page
    assert "no predictions on report_shapes yet" in capsys.readouterr().out


def test_several_datasets_have_a_section_each(shapes, tmp_path):
    other = ["report_shapes_2", *shapes[1:]]
    register_coco_datasets([shapes, other])
    names = ["DATASETS.TEST", f"('{shapes[0]}', '{other[0]}')"]
    lines = [{"iteration": i, f"{shapes[0]}/bbox/AP": float(i)} for i in (1, 2)]
    run = write_run(tmp_path / "o", shapes, *names, results=predict(shapes), lines=lines)
    page = report(run, shapes)
    assert "Evaluation on report_shapes<" in page and "Evaluation on report_shapes_2" not in page
    other_results = Path(run) / "inference" / other[0] / "coco_instances_results.json"
    other_results.parent.mkdir()
    other_results.write_text("[]")
    page = report(run, shapes)
    assert len(rows(page, "box")) == 2 and 'aria-label="AP over time"' in page
    assert rows(page, "box")[1][:3] == ["0.0", "0.0", "0.0"]
    assert f"<b>0 of {len(COCO(shapes[1]).anns)} objects</b>" in page


def test_run_that_does_not_fit_the_dataset_is_one_sentence(shapes, tmp_path):
    with pytest.raises(UserError, match=r"is not the OUTPUT_DIR of a run: .*config.yaml does not"):
        make_report(str(tmp_path / "nothing"), [])
    run = write_run(tmp_path / "a", ["unknown_shapes", *shapes[1:]], results=predict(shapes))
    with pytest.raises(UserError, match="unknown_shapes, which is not registered: add --dataset"):
        make_report(run, [])
    for i, result in enumerate([{**predict(shapes)[0], "image_id": 999}, {"image_id": 1}, 3]):
        run = write_run(tmp_path / f"b{i}", shapes, results=[result])
        with pytest.raises(UserError, match="does not fit the dataset report_shapes"):
            make_report(run, [shapes])
    (Path(run) / "inference" / "coco_instances_results.json").write_text("[{")
    with pytest.raises(UserError, match=r"coco_instances_results.json is not valid JSON"):
        make_report(run, [shapes])
    assert not (Path(run) / "report.html").exists()


def test_missing_image_is_one_sentence_and_leaves_no_page(shapes, tmp_path):
    copy = tmp_path / "shapes"
    shutil.copytree(Path(shapes[1]).parent, copy)
    dataset = ["report_damaged", str(copy / "annotations.json"), str(copy / "images")]
    run = write_run(tmp_path / "o", dataset, results=[])
    for path in (copy / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged or not an image"):
        make_report(run, [dataset])
    assert not list(Path(run).glob("*.html*"))


BROWSER = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.mark.ci
def test_page_in_a_browser(run, shapes):
    """The page needs no other file, has no errors, fits a phone, and text follows the scheme."""
    from playwright.sync_api import sync_playwright

    make_report(run, [shapes])
    file = (Path(run) / "report.html").as_uri()
    requests, messages, colors = set(), [], set()
    text = "getComputedStyle(document.querySelector('svg text')).fill"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        for width, scheme in itertools.product((390, 1280), ("light", "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("request", lambda request: requests.add(request.url.partition(",")[0]))
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.goto(file)
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("[...document.images].every(i => i.naturalWidth > 50)")
            color = page.evaluate(text)
            assert color == page.evaluate("getComputedStyle(document.body).color")
            colors.add((scheme, color))
        browser.close()
    assert not messages and len(colors) == len({color for _, color in colors}) == 2
    assert all(url == file or url.startswith("data:") for url in requests)

"""The page of a run, from files as Detectron2 writes them, on a few of the built-in shapes."""

import base64
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from gnws_d2 import model_zoo
from gnws_d2.data import register_coco_datasets
from gnws_d2.data.shapes import generate_shapes
from gnws_d2.engine import load_config
from gnws_d2.engine.report import make_report
from gnws_d2.engine.run_dir import read_run
from gnws_d2.evaluation.analysis import count_mistakes
from gnws_d2.evaluation.coco_evaluation import evaluate_results
from gnws_d2.utils.errors import UserError

ROOT = Path(__file__).parent.parent.parent
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
PUBLISHED_WEIGHTS = ["MODEL.WEIGHTS", "gnws://mask_rcnn_R101_gnws_2x"]
LOG = """\
[12/31 23:59:00] detectron2 INFO: Rank of current process: 0. World size: 2
[12/31 23:59:02] detectron2 INFO: Environment info:
-------------------------------  ---------------------------------------------
sys.platform                     linux
Python                           3.11.7 (main, Nov  9 2026, 12:00:00) [GCC 12]
numpy                            2.4.6
detectron2                       0.6 @/opt/detectron2
CUDA compiler                    CUDA 13.2
PyTorch                          2.15.0 @/opt/torch
GPU 0,1                          NVIDIA H200 (arch=9.0)
-------------------------------  ---------------------------------------------
[12/31 23:59:02] detectron2 INFO: Command line arguments: Namespace(config_file='a.yaml', {args})
[12/31 23:59:03] gnws_d2 INFO: gnws_d2 0.1.0 on AMD EPYC, 16 threads, started {started}
[01/01 00:01:30] detectron2.utils.events INFO:  iter: 39  total_loss: 1.2
"""


def log(resume=False, eval_only=False, started="2026-12-31 23:59"):
    return LOG.format(args=f"resume={resume}, eval_only={eval_only}", started=started)


def metrics(first, last, ap=None):
    lines = [
        {
            "iteration": i,
            "lr": 0.02,
            "total_loss": 2 / (i + 1),
            "loss_cls": 1 / (i + 1),
            "time": 0.5,
        }
        for i in range(first, last, 20)
    ]
    return lines + ([{"iteration": last, "bbox/AP": ap, "segm/AP": ap - 1}] if ap else [])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A dataset of 12 images, of which a class is named by an enemy and another has no objects."""
    root = tmp_path_factory.mktemp("report") / "shapes"
    generate_shapes(str(root), 12, seed=5)
    path = root / "annotations.json"
    coco = json.loads(path.read_text())
    coco["categories"][1]["name"] = "<script>alert(1)</script>"
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != 3]
    path.write_text(json.dumps(coco))
    return ["report_shapes", str(path), str(root / "images")]


def predict(shapes, seed=0):
    """The ground truth, moved a little; some of it is missing, of another class or found twice."""
    coco, rng = COCO(shapes[1]), np.random.RandomState(seed)
    results = []
    for a in coco.anns.values():
        for _ in range(rng.choice([0, 1, 2], p=[0.2, 0.7, 0.1])):
            rle = coco.annToRLE(a)
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": a["category_id"] if rng.rand() < 0.8 else 3,
                    "bbox": (np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist(),
                    "score": rng.rand() * 0.6 + 0.4,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return results


def write_run(path, shapes, *opts, results=None, lines=None, log_text=None):
    names = [shapes[0]]
    path.mkdir(parents=True)
    keys = ["DATASETS.TEST", str((shapes[0],)), "SOLVER.MAX_ITER", "60", *opts]
    cfg = load_config(str(ROOT / "configs" / "quick_start.yaml"), keys)
    (path / "config.yaml").write_text(cfg.dump())
    if lines is not None:
        (path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if log_text is not None:
        (path / "log.txt").write_text(log_text)
    for name in names if results is not None else []:
        file = path / "inference" / (name if len(cfg.DATASETS.TEST) > 1 else "")
        file.mkdir(parents=True, exist_ok=True)
        (file / "coco_instances_results.json").write_text(json.dumps(results))
    return str(path)


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    lines = metrics(19, 40, ap=40.0) + metrics(59, 60, ap=50.0)
    return write_run(
        tmp_path_factory.mktemp("run") / "output",
        shapes,
        results=predict(shapes),
        lines=lines,
        log_text=log() + log(resume=True),
    )


def report(run, shapes):
    make_report([run], [shapes])
    return (Path(run) / "report.html").read_text()


@pytest.fixture(scope="module")
def page(run, shapes):
    return report(run, shapes)


def rows(page, first):
    """The cells of the rows of all tables that start with `first`."""
    pattern = rf'<tr><th scope="row">{re.escape(html.escape(first))}</th>(.*?)</tr>'
    found = re.findall(pattern, page, re.DOTALL)
    return [re.findall(r"([^<>]*)(?:</div>)?</td>", row) for row in found]


def test_page_has_the_ap_of_the_official_api(page, shapes):
    coco, results = COCO(shapes[1]), predict(shapes)
    for task, name in (("bbox", "box"), ("segm", "mask")):
        stats = evaluate_results(coco, results, task).stats[:6]
        assert rows(page, name) == [[f"{100 * ap:.1f}" if ap >= 0 else NONE for ap in stats]]
        assert 20 < 100 * stats[0] < 90
    (circle,) = rows(page, "circle")
    assert len(circle) == 2 and all(float(ap) > 20 for ap in circle)
    assert rows(page, "triangle") == [[NONE, NONE]]


def test_page_is_one_file_whose_values_are_escaped(page):
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) > 10 and all(source.startswith("data:") for source in sources)
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert "<script" not in page and html.escape("<script>alert(1)</script>") in page


def test_page_tells_what_ran(page):
    for text in (
        "Mask R-CNN, R-50, GN+WS", "shapes_train", "report_shapes", "60 of 60", "2026-12-31 23:59",
        "2 x NVIDIA H200, AMD EPYC, 16 threads", "Python 3.11.7", "PyTorch 2.15.0", "CUDA 13.2",
        "Detectron2 0.6", "gnws_d2 0.1.0", "a.yaml", "STEM_OUT_CHANNELS: 32",
        "0:04:56",  # two starts of 2 min 28 s, over the turn of the year
    ):  # fmt: skip
        assert text in page, text


def test_pictures_are_of_the_images_with_most_mistakes(page, run, shapes):
    coco = COCO(shapes[1])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    missed = [int(re.search(r"(\d+) of \d+ objects? missed", c)[1]) for c in captions]
    false = [int(re.search(r"(\d+) false detections?$", c)[1]) for c in captions]
    assert missed[:3] == sorted(missed[:3], reverse=True) and missed[0] > 0
    assert false[3:] == sorted(false[3:], reverse=True) and false[3] > 0
    evaluation = evaluate_results(coco, predict(shapes), "bbox")
    mistakes = count_mistakes(evaluation, 0.5).values()
    assert missed[0] == max(len(m.missed) for m in mistakes)
    assert false[3] == max(len(m.false) for m in mistakes)
    for caption in captions:
        image_id, objects = map(int, re.search(r"image (\d+)\): \d+ of (\d+)", caption).groups())
        assert objects == len(coco.imgToAnns[image_id])


def test_faster_rcnn_has_no_mask_ap(shapes, tmp_path):
    results = [{k: v for k, v in r.items() if k != "segmentation"} for r in predict(shapes)]
    run = write_run(tmp_path / "o", shapes, "MODEL.MASK_ON", "False", results=results)
    page = report(run, shapes)
    assert "Faster R-CNN" in page and rows(page, "box") and not rows(page, "mask")
    assert "nothing was trained here" in page  # but evaluated


def test_training_without_an_evaluation_has_its_curves(shapes, tmp_path, capsys):
    run = write_run(tmp_path / "o", shapes, lines=metrics(19, 40), log_text=log())
    with open(Path(run) / "metrics.json", "a") as f:
        f.write('{"iteration": 59, "lr')  # killed while it wrote
    page = report(run, shapes)
    assert 'alt="Loss"' in page and 'alt="AP over time"' not in page and "40 of 60" in page
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
    assert len(rows(page, "box")) == 2 and 'alt="AP over time"' in page
    assert rows(page, "box")[1][:3] == ["0.0", "0.0", "0.0"]
    assert "Nothing was found" in page


def test_iterations_that_were_done_again_count_once(shapes, tmp_path):
    """A resumed run writes them again; what a run that started anew had done before is not its."""
    lines = metrics(19, 200, ap=10.0) + metrics(139, 180) + metrics(19, 60, ap=30.0)
    run = read_run(write_run(tmp_path / "o", shapes, lines=lines))
    assert [line["iteration"] for line in run.metrics] == [19, 39, 59, 60]
    lines = metrics(19, 200, ap=10.0) + metrics(139, 180)
    run = read_run(write_run(tmp_path / "p", shapes, lines=lines))
    assert [line["iteration"] for line in run.metrics] == list(range(19, 180, 20))


def test_evaluation_lines_may_come_late(shapes, tmp_path):
    """Detectron2 writes an evaluation with the next 20 iterations, after their line."""
    lines = [*metrics(19, 60), {"iteration": 49, "bbox/AP": 7.0}, *metrics(79, 80)]
    run = read_run(write_run(tmp_path / "o", shapes, lines=lines))
    assert [line["iteration"] for line in run.metrics] == [19, 39, 49, 59, 79]


def test_iterations_are_those_of_the_number_of_processes(shapes, tmp_path):
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "8"]
    run = read_run(write_run(tmp_path / "o", shapes, *keys, log_text=log()))
    assert run.cfg.SOLVER.MAX_ITER == 120 and run.cfg.SOLVER.IMS_PER_BATCH == 4


def test_duration_is_of_the_training_since_it_was_not_resumed(shapes, tmp_path):
    starts = [log(), log(), log(resume=True, started="later"), log(eval_only=True)]
    run = read_run(write_run(tmp_path / "o", shapes, log_text="".join(starts)))
    assert run.facts["Duration"] == "0:04:56" and run.facts["Starts"] == "2"
    assert run.facts["Started"] == "2026-12-31 23:59"


@pytest.mark.parametrize(
    "config, opts, published",
    [
        ("mask_rcnn_R50_gnws_2x", [], "mask_rcnn_R50_gnws_2x"),
        ("mask_rcnn_R50_gnws_20_23_24e", [], "mask_rcnn_R50_gnws_20_23_24e"),
        (
            "faster_rcnn_X101_32x4d_gnws_1x",
            ["MODEL.DEVICE", "cpu"],
            "faster_rcnn_X101_32x4d_gnws_1x",
        ),
        ("mask_rcnn_R50_gnws_2x", ["SOLVER.MAX_ITER", "100"], None),
        ("mask_rcnn_R50_gnws_2x", ["MODEL.ROI_HEADS.NUM_CLASSES", "3"], None),
        ("quick_start", [], None),
        ("quick_start", PUBLISHED_WEIGHTS, "mask_rcnn_R101_gnws_2x"),
    ],
)
def test_published_row_is_of_the_same_model_and_schedule(config, opts, published, tmp_path):
    cfg = load_config(str(ROOT / "configs" / f"{config}.yaml"), opts)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    row = read_run(str(tmp_path)).published
    assert (row and row["name"]) == published


def test_published_ap_is_named_as_mmdetections(shapes, tmp_path, monkeypatch):
    """On COCO val2017, which 12 images stand for."""
    monkeypatch.setattr("gnws_d2.engine.report._PUBLISHED_ON", shapes[0])
    run = write_run(tmp_path / "o", shapes, *PUBLISHED_WEIGHTS, results=predict(shapes))
    page = report(run, shapes)
    (row,) = (row for row in model_zoo.table() if row["name"] == "mask_rcnn_R101_gnws_2x")
    assert rows(page, "box, published by MMDetection")[0][0] == f"{row['box_ap']:.1f}"
    assert rows(page, "mask, published by MMDetection")[0][0] == f"{row['mask_ap']:.1f}"
    assert "Published figures are MMDetection&#39;s, and were not measured here." in page


def test_published_ap_is_for_no_other_dataset(shapes, tmp_path):
    run = write_run(tmp_path / "o", shapes, *PUBLISHED_WEIGHTS, results=predict(shapes))
    page = report(run, shapes)
    assert not rows(page, "box, published by MMDetection") and "ublished figures" not in page
    assert "MMDetection published" not in page


def test_what_is_no_run_or_does_not_fit_is_one_sentence(shapes, tmp_path):
    with pytest.raises(UserError, match=r"holds no run: .*config.yaml does not exist"):
        make_report([str(tmp_path / "nothing")], [])
    run = write_run(tmp_path / "a", ["unknown_shapes", *shapes[1:]], results=predict(shapes))
    with pytest.raises(UserError, match="unknown_shapes, which is not registered: add --dataset"):
        make_report([run], [])
    for i, (results, message) in enumerate(
        [
            ([{**predict(shapes)[0], "image_id": 999}], "does not fit the dataset report_shapes"),
            ([{"image_id": 1}], "does not fit the dataset report_shapes"),
        ]
    ):
        run = write_run(tmp_path / f"b{i}", shapes, results=results)
        with pytest.raises(UserError, match=message):
            make_report([run], [shapes])
    (Path(run) / "inference" / "coco_instances_results.json").write_text("[{")
    with pytest.raises(UserError, match=r"coco_instances_results.json is no JSON"):
        make_report([run], [shapes])
    assert not (Path(run) / "report.html").exists()


def test_missing_image_is_one_sentence_and_leaves_no_page(shapes, tmp_path):
    copy = tmp_path / "shapes"
    shutil.copytree(Path(shapes[1]).parent, copy)
    dataset = ["report_damaged", str(copy / "annotations.json"), str(copy / "images")]
    run = write_run(tmp_path / "o", dataset, results=[])
    for path in (copy / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or no image"):
        make_report([run], [dataset])
    assert not list(Path(run).glob("*.html*"))


def test_comparison_has_the_differences_of_ap_and_config(run, shapes, tmp_path, capsys):
    other = write_run(
        tmp_path / "other", shapes, "SOLVER.BASE_LR", "0.125",
        results=predict(shapes, seed=1), lines=metrics(19, 60), log_text=log(),
    )  # fmt: skip
    make_report([run, other], [shapes])
    page = (Path(run) / "compare.html").read_text()
    assert rows(page, "SOLVER.BASE_LR") == [["0.05", "0.125"]] and not rows(page, "OUTPUT_DIR")
    coco = COCO(shapes[1])
    for i, task in enumerate(("bbox", "segm")):
        a, b = (
            100 * evaluate_results(coco, predict(shapes, seed), task).stats[0] for seed in (0, 1)
        )
        difference = f"{b - a:+.1f}".replace("-", MINUS)
        assert rows(page, "AP")[i] == [f"{a:.1f}", f"{b:.1f}", difference]
    assert rows(page, "triangle")[0] == [NONE, NONE, NONE]
    assert 'alt="Total loss"' in page and "output and other" in page
    out = capsys.readouterr().out
    assert "| output on report_shapes (%)" in out and "| other on report_shapes (%)" in out


def test_charts_are_svg_for_light_and_dark(page):
    assert page.count('prefers-color-scheme: dark)"') == page.count("<picture>") == 7
    for uri in re.findall(r'data:image/svg\+xml;base64,([^"]+)', page):
        svg = base64.b64decode(uri).decode()
        assert "<text" in svg and 'href="http' not in svg


BROWSER = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("which", ["report", "compare"])
def test_page_in_a_browser(which, run, shapes, tmp_path):
    """Chromium: no request but the page, nothing said in the console, as wide as the window."""
    from playwright.sync_api import sync_playwright

    make_report([run, run] if which == "compare" else [run], [shapes])
    file = (Path(run) / f"{which}.html").as_uri()
    requests, said, shown = set(), [], {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
        for width, height in ((390, 844), (1280, 900)):
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page = context.new_page()
                page.on("request", lambda request: requests.add(request.url.partition(",")[0]))
                page.on("console", lambda message: said.append(message.text))
                page.on("pageerror", lambda error: said.append(str(error)))
                page.goto(file)
                page.wait_for_load_state("networkidle")
                assert file in requests and not said
                assert all(url == file or url.startswith("data:") for url in requests)
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.evaluate("[...document.images].every(i => i.naturalWidth > 50)")
                assert "Total loss" in (text := page.inner_text("body")) or "Mask R-CNN" in text
                background = "getComputedStyle(document.body).backgroundColor"
                shown[scheme] = page.evaluate(background)
                chart = "document.querySelector('picture img').currentSrc"
                shown[f"{scheme} chart"] = page.evaluate(chart)
                path = tmp_path / f"{width}_{scheme}.png"
                page.screenshot(path=path, full_page=True)
                assert path.stat().st_size > 50_000
        browser.close()
    assert shown["light"] == "rgb(255, 255, 255)" and shown["dark"] != shown["light"]
    assert shown["light chart"] != shown["dark chart"]

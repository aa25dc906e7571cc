"""One HTML page of a run, or of two beside each other."""

import contextlib
import io
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from tabulate import tabulate

from ..config import flatten_config
from ..data import read_image, register_coco_datasets
from ..evaluation.analysis import (
    ERRORS,
    METRICS,
    SPECIAL_ERRORS,
    Mistakes,
    TaskAnalysis,
    analyze_task,
    count_mistakes,
)
from ..evaluation.coco_evaluation import evaluate_results
from ..utils.charts import Chart, Curve, Series, bar_chart, data_uri, line_chart
from ..utils.errors import UserError
from ..utils.files import replace_file
from ..utils.visualizer import draw_objects
from .checks import check_test_dataset
from .run_dir import Run, read_run

TASKS = {"bbox": "box", "segm": "mask"}
_NUM_PICTURES = 3
_THRESHOLD = 0.5  # of the score of detections that are drawn and counted
_FOUND, _MISTAKE = "#3b9dff", "#ff8a1f"  # which the colour blind tell apart, too
_PUBLISHED_ON = "coco_2017_val"
_NONE = "\N{EN DASH}"  # for a value that is not there

Block = dict[str, Any]  # what the template shows, by "kind"


@dataclass
class Evaluation:
    """The last evaluation of a run on a dataset."""

    dataset_name: str
    tasks: dict[str, TaskAnalysis]
    published: dict[str, float]  # AP of MMDetection's table, by task
    truth: COCO
    detections: COCO
    mistakes: dict[int, Mistakes]


def make_report(run_dirs: list[str], datasets: list[list[str]]) -> None:
    """
    Write the page of a run, or of two beside each other, into the directory of the first one, and
    print AP.

    Args:
        run_dirs: one or two of :func:`read_run`.
        datasets: for :func:`register_coco_datasets`, those that the runs were tested on.

    Raises:
        UserError: if a run or a dataset is not there, or does not fit.
    """
    register_coco_datasets(datasets)
    runs = [read_run(path) for path in run_dirs]
    evaluations = [evaluate_run(run) for run in runs]
    if len(runs) == 1:
        output = os.path.join(runs[0].path, "report.html")
        write_report(runs[0], evaluations[0], output)
    else:
        output = os.path.join(runs[0].path, "compare.html")
        write_comparison(runs, evaluations, output)
    for run, of_run in zip(runs, evaluations):
        for evaluation in of_run:
            head = [f"{run.name} on {evaluation.dataset_name} (%)", *METRICS]
            rows = _ap_rows(evaluation)
            print(tabulate(rows, head, "github", disable_numparse=True) + "\n")
        if not of_run:
            print(f"{run.path} has no predictions on {_join(run.cfg.DATASETS.TEST)} yet.\n")
    print(output)


def evaluate_run(run: Run) -> list[Evaluation]:
    """
    Look at the last predictions of a run.

    Returns:
        One for each dataset of ``DATASETS.TEST`` that there are predictions on.

    Raises:
        UserError: if such a dataset is not there, or the predictions cannot be read.
    """
    names = [n for n in run.cfg.DATASETS.TEST if os.path.isfile(run.results_json(n))]
    if names:
        check_test_dataset(run.cfg)
    return [_evaluate(run, name) for name in names]


def _evaluate(run: Run, dataset_name: str) -> Evaluation:
    path = run.results_json(dataset_name)
    DatasetCatalog.get(dataset_name)  # the built-in data is generated
    try:
        with open(path) as f:
            results = json.load(f)
    except ValueError as e:
        raise UserError(f"{path} is no JSON ({e}): evaluate again.") from e
    tasks = {}
    for task in TASKS if run.cfg.MODEL.MASK_ON else ("bbox",):
        logging.getLogger(__name__).info(f"{run.path}: {TASKS[task]} AP on {dataset_name}")
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            coco = COCO(MetadataCatalog.get(dataset_name).json_file)
            try:
                evaluation = evaluate_results(coco, results, task)
            except (AssertionError, KeyError, IndexError) as e:
                raise UserError(
                    f"{path} does not fit the dataset {dataset_name}: was it made of another one?"
                ) from e
        tasks[task] = analyze_task(evaluation, results)
        if task == "bbox":
            truth, detections = evaluation.cocoGt, evaluation.cocoDt
            mistakes = count_mistakes(evaluation, _THRESHOLD)
    row = run.published if dataset_name == _PUBLISHED_ON else None
    published = {
        task: row[f"{name}_ap"] for task, name in TASKS.items() if row and row[f"{name}_ap"]
    }
    return Evaluation(dataset_name, tasks, published, truth, detections, mistakes)


def write_report(run: Run, evaluations: list[Evaluation], output: str) -> None:
    """
    Args:
        run: of :func:`read_run`.
        evaluations: of :func:`evaluate_run`.
        output: path of the page.

    Raises:
        UserError: if an image cannot be read.
    """
    sections = [_section("", _tiles(run, evaluations)), _section("What ran", *_what_ran(run))]
    losses = _losses(run)
    charts: dict[str, Chart] = {}
    if losses:
        charts["Loss"] = line_chart(losses, "iteration", "loss")
        rates = {"learning rate": _curve(run, "lr")}
        charts["Learning rate"] = line_chart(rates, "iteration", "learning rate")
    ap = _ap_over_time(run)
    if ap:
        charts["AP over time"] = line_chart(ap, "iteration", "AP (%)", points=True)
    blocks = (
        [{"kind": "charts", "charts": charts}]
        if charts
        else [{"kind": "note", "note": "metrics.json has no iterations: nothing was trained here."}]
    )
    sections.append(_section("Training", *blocks))
    for evaluation in evaluations:
        sections += _evaluation_sections(evaluation)
    if not evaluations:
        note = f"There are no predictions of this run on {_join(run.cfg.DATASETS.TEST)} yet."
        sections.append(_section("Evaluation", {"kind": "note", "note": note}))
    _write(output, run.name, _describe(run), sections)


def write_comparison(runs: list[Run], evaluations: list[list[Evaluation]], output: str) -> None:
    """
    Args:
        runs: two, of :func:`read_run`.
        evaluations: of each, of :func:`evaluate_run`.
        output: path of the page.
    """
    names = [run.name for run in runs]
    if names[0] == names[1]:
        names = [os.path.normpath(run.path) for run in runs]
    keys = [flatten_config(run.cfg) for run in runs]
    differing = [
        [key, *(str(k.get(key, _NONE)) for k in keys)]
        for key in sorted({**keys[0], **keys[1]})
        if keys[0].get(key) != keys[1].get(key) and key != "OUTPUT_DIR"
    ]
    sections = [
        _section(
            "Config keys that differ",
            _table(["", *names], differing, "text")
            if differing
            else {"kind": "note", "note": "None, but OUTPUT_DIR."},
        )
    ]
    by_name = [{e.dataset_name: e for e in of_run} for of_run in evaluations]
    for dataset_name in {**by_name[0], **by_name[1]}:
        blocks = []
        for task, task_name in TASKS.items():
            tasks = [
                e[dataset_name].tasks.get(task) if dataset_name in e else None for e in by_name
            ]
            for title, aps in (
                (f"{task_name} AP (%)", [t.ap if t else {} for t in tasks]),
                (f"{task_name} AP of the classes (%)", [t.class_ap if t else {} for t in tasks]),
            ):
                rows = [
                    [key, *_compare(*(ap.get(key, math.nan) for ap in aps))]
                    for key in {**aps[0], **aps[1]}
                ]
                if rows:
                    blocks.append(_table(["", *names, "difference"], rows, title=title))
        sections.append(_section(f"AP on {dataset_name}", *blocks))
    losses: Series = {}
    rates: Series = {}
    curves: Series = {}
    for name, run in zip(names, runs):
        if _losses(run):
            losses[name], rates[name] = _curve(run, "total_loss"), _curve(run, "lr")
        curves |= {f"{name}, {key}": curve for key, curve in _ap_over_time(run).items()}
    charts = {}
    if losses:
        charts["Total loss"] = line_chart(losses, "iteration", "loss")
        charts["Learning rate"] = line_chart(rates, "iteration", "learning rate")
    if curves:
        charts["AP over time"] = line_chart(curves, "iteration", "AP (%)", points=True)
    if charts:
        sections.append(_section("Training", {"kind": "charts", "charts": charts}))
    facts = [dict(_facts(run)) for run in runs]
    rows = [[name, *(fact.get(name, _NONE) for fact in facts)] for name in {**facts[0], **facts[1]}]
    sections.append(_section("What ran", _table(["", *names], rows, "text")))
    _write(output, " and ".join(names), "Two runs beside each other", sections)


def _write(output: str, title: str, subtitle: str, sections: list[Block]) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        footer=f"Written by gnws_d2. AP is COCO's, in percent, and {_NONE} where there is nothing "
        "to find.",
    )
    with replace_file(output) as f:
        f.write(page)


def _section(title: str, *blocks: Block) -> Block:
    return {"title": title, "blocks": blocks}


def _table(head: list[str], rows: list[list[str]], style: str = "", **block: str) -> Block:
    return {"kind": "table", "head": head, "rows": rows, "style": style, **block}


def _describe(run: Run) -> str:
    model, resnet = run.cfg.MODEL, run.cfg.MODEL.RESNETS
    if run.published:
        return f"{run.published['detector']}, {run.published['backbone']}, GN+WS"
    if model.META_ARCHITECTURE != "GeneralizedRCNN":
        return model.META_ARCHITECTURE
    detector = "Mask R-CNN" if model.MASK_ON else "Faster R-CNN"
    kind = "X" if resnet.NUM_GROUPS > 1 else "R"
    gnws = ", GN+WS" if "gnws" in model.BACKBONE.NAME else ""
    return f"{detector}, {kind}-{resnet.DEPTH}{gnws}"


def _tiles(run: Run, evaluations: list[Evaluation]) -> Block:
    tiles = []
    for evaluation in evaluations[:1]:
        for task, analysis in evaluation.tasks.items():
            published = evaluation.published.get(task)
            note = f"on {evaluation.dataset_name}"
            if published:
                note += f"; MMDetection published {published:.1f}"
            tiles.append((f"{TASKS[task]} AP", _format(analysis.ap["AP"]), note))
    done = _iterations_done(run)
    if done:
        tiles.append(("iterations", f"{done:,}", f"of {run.cfg.SOLVER.MAX_ITER:,}"))
    if run.facts.get("Duration"):
        tiles.append(("duration", run.facts["Duration"], "h:min:s, evaluations included"))
    return {"kind": "tiles", "tiles": tiles}


def _iterations_done(run: Run) -> int:
    return max((line["iteration"] + 1 for line in run.metrics if "lr" in line), default=0)


def _facts(run: Run) -> list[tuple[str, str]]:
    cfg = run.cfg
    facts = [
        ("Model", _describe(run)),
        ("Weights", cfg.MODEL.WEIGHTS or "none: trained from scratch"),
        ("Trained on", _join(cfg.DATASETS.TRAIN)),
        ("Tested on", _join(cfg.DATASETS.TEST)),
    ]
    done = _iterations_done(run)
    if done:
        facts += [
            ("Iterations", f"{done:,} of {cfg.SOLVER.MAX_ITER:,}"),
            ("Batch", f"{cfg.SOLVER.IMS_PER_BATCH} images"),
            ("Learning rate", f"{cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.LR_SCHEDULER_NAME}"),
        ]
        times = [line["time"] for line in run.metrics if "time" in line]
        if times:
            facts.append(("Speed", f"{np.median(times):.3g} s per iteration"))
    facts += [(name, value) for name, value in run.facts.items() if value]
    return facts


def _what_ran(run: Run) -> list[Block]:
    return [
        {"kind": "facts", "facts": [*_facts(run), ("Directory", os.path.abspath(run.path))]},
        {"kind": "details", "summary": "The whole config", "text": run.cfg.dump()},
    ]


def _curve(run: Run, key: str) -> Curve:
    lines = [line for line in run.metrics if key in line]
    return [line["iteration"] for line in lines], [line[key] for line in lines]


def _losses(run: Run) -> Series:
    keys = {key for line in run.metrics for key in line if "loss" in key}
    return {key: _curve(run, key) for key in sorted(keys, key=lambda k: (k != "total_loss", k))}


def _ap_over_time(run: Run) -> Series:
    curves: Series = {}
    several = len(run.cfg.DATASETS.TEST) > 1
    for name in run.cfg.DATASETS.TEST:
        for task, task_name in TASKS.items():
            curve = _curve(run, f"{name}/{task}/AP" if several else f"{task}/AP")
            if len(curve[0]) > 1:
                curves[f"{name}, {task_name}" if several else task_name] = curve
    return curves


def _ap_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for task, analysis in evaluation.tasks.items():
        rows.append([TASKS[task], *(_format(analysis.ap[metric]) for metric in METRICS)])
        if task in evaluation.published:
            published = [_format(evaluation.published[task]), *[""] * (len(METRICS) - 1)]
            rows.append([f"{TASKS[task]}, published by MMDetection", *published])
    return rows


def _evaluation_sections(evaluation: Evaluation) -> list[Block]:
    name, tasks = evaluation.dataset_name, evaluation.tasks
    note = (
        f"In percent, of {len(evaluation.truth.imgs):,} images. AP is the mean of the IoU "
        "thresholds 0.50 to 0.95; APs, APm and APl are of objects of less than 32² pixels, up to "
        "96² and more."
    )
    if evaluation.published:
        note += " Published figures are MMDetection's, and were not measured here."
    columns = [TASKS[task] for task in tasks]
    class_rows = [
        [c, *(_format(analysis.class_ap[c]) for analysis in tasks.values())]
        for c in tasks["bbox"].class_ap
    ]
    recalls = np.linspace(0, 1, 101)
    curves = {
        f"Precision and recall, {TASKS[task]}": line_chart(
            {
                f"IoU {iou / 100:.2f}": (recalls, a.precision[(iou - 50) // 5])
                for iou in (50, 75, 90)
            },
            "recall",
            "precision",
            y_max=1.02,
        )
        for task, a in tasks.items()
    }
    blocks = [
        _table(["", *METRICS], _ap_rows(evaluation), title="AP", note=note),
        _table(["class", *columns], class_rows, "bars", title="AP of the classes"),
        {"kind": "charts", "charts": curves, "note": "Mean of the classes, as in COCO's AP."},
    ]
    return [
        _section(f"Evaluation on {name}", *blocks),
        _section(f"Errors on {name}", _errors(tasks)),
        _section(f"Images of {name}", *_pictures(evaluation)),
    ]


def _errors(tasks: dict[str, TaskAnalysis]) -> Block:
    values = {TASKS[task]: analysis.errors for task, analysis in tasks.items() if analysis.errors}
    if not values:
        return {"kind": "note", "note": "Nothing was found, so there are no types of errors."}
    charts = {
        title: bar_chart(
            {task: {label: of[key] for key, label in names.items()} for task, of in values.items()},
            "AP50 lost by them (points)",
        )
        for title, names in (("By type", ERRORS), ("All together", SPECIAL_ERRORS))
    }
    return {"kind": "charts", "charts": charts, "note": "By TIDE (Bolya et al., ECCV 2020)."}


def _pictures(evaluation: Evaluation) -> list[Block]:
    blocks: list[Block] = []
    for what in ("missed", "false"):
        numbers = {i: len(getattr(m, what)) for i, m in evaluation.mistakes.items()}
        ids = sorted((i for i in numbers if numbers[i]), key=lambda i: (-numbers[i], i))
        title = {"missed": "Most missed objects", "false": "Most false detections"}[what]
        block: Block = {"kind": "pictures", "title": title}
        if ids:
            block["pictures"] = [_picture(evaluation, i) for i in ids[:_NUM_PICTURES]]
        else:
            block |= {"kind": "note", "note": "None."}
        blocks.append(block)
    blocks[-1]["note"] = (
        f"First the ground truth, then the detections with a score of at least {_THRESHOLD}. "
        "Blue is what was found, orange what was missed or is false: boxes of the same "
        "class at IoU 0.5. Crowds are left out."
    )
    return blocks


def _picture(evaluation: Evaluation, image_id: int) -> dict[str, str]:
    coco, mistakes = evaluation.truth, evaluation.mistakes[image_id]
    file_name = coco.imgs[image_id]["file_name"]
    root = MetadataCatalog.get(evaluation.dataset_name).image_root
    image = read_image(os.path.join(root, file_name), "RGB")

    def draw(objects: list[dict[str, Any]], wrong: set[int], scores: bool) -> str:
        names = [coco.cats[o["category_id"]]["name"] for o in objects]
        labels = [f"{n} {o['score']:.0%}" if scores else n for n, o in zip(names, objects)]
        colors = [_MISTAKE if o["id"] in wrong else _FOUND for o in objects]
        picture = draw_objects(image, objects, labels, colors)
        _, jpeg = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        return data_uri("image/jpeg", jpeg.tobytes())

    truth = [a for a in coco.imgToAnns[image_id] if not a.get("iscrowd")]
    found = evaluation.detections.imgToAnns[image_id]
    found = [detection for detection in found if detection["score"] >= _THRESHOLD]
    if "segm" not in evaluation.tasks:
        truth, found = (
            [{k: v for k, v in o.items() if k != "segmentation"} for o in objects]
            for objects in (truth, found)
        )
    missed, false = len(mistakes.missed), len(mistakes.false)
    return {
        "truth": draw(truth, mistakes.missed, scores=False),
        "found": draw(found, mistakes.false, scores=True),
        "caption": f"{file_name} (image {image_id}): {missed} of {mistakes.num_objects} "
        f"object{'s' * (mistakes.num_objects != 1)} missed, "
        f"{false} false detection{'s' * (false != 1)}",
    }


def _compare(a: float, b: float) -> list[str]:
    difference = f"{b - a:+.1f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(b - a) else _NONE
    return [_format(a), _format(b), difference]


def _format(ap: float) -> str:
    return f"{ap:.1f}" if math.isfinite(ap) else _NONE


def _join(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no dataset"

#!/usr/bin/env python3
"""Draw the predictions and the loss curve of a run of train_net.py, and print its AP."""

import argparse
import json
import os

from gnws_tools.arguments import add_dataset_argument
from tabulate import tabulate

import gnws_d2  # noqa: F401  (registers the built-in data)
from gnws_d2.data import register_coco_datasets
from gnws_d2.engine import load_config
from gnws_d2.utils.errors import UserError, exit_on_user_error
from gnws_d2.utils.visualizer import draw_predictions, plot_losses


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="OUTPUT_DIR of the run")
    add_dataset_argument(parser)
    args = parser.parse_args()
    metrics_json, results_json, config_file = (
        os.path.join(args.run_dir, name)
        for name in ("metrics.json", "inference/coco_instances_results.json", "config.yaml")
    )
    for path in (metrics_json, results_json, config_file):
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist: {args.run_dir} holds no finished run.")
    register_coco_datasets(args.dataset)
    dataset_name = load_config(config_file, []).DATASETS.TEST[0]

    with open(metrics_json) as f:
        metrics = [line for line in map(json.loads, f) if "bbox/AP" in line][-1]
    tasks = {"bbox": "box", "segm": "mask"}
    rows = [
        [tasks[task], *(metrics[f"{task}/{name}"] for name in ("AP", "AP50", "AP75"))]
        for task in tasks
        if f"{task}/AP" in metrics
    ]
    headers = [f"{dataset_name} (%)", "AP", "AP50", "AP75"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))
    predictions_png, losses_png = (
        os.path.join(args.run_dir, name) for name in ("predictions.png", "losses.png")
    )
    draw_predictions(dataset_name, results_json, predictions_png)
    plot_losses(metrics_json, losses_png)
    print(f"\n{predictions_png}\n{losses_png}")


if __name__ == "__main__":
    main()

from .coco_evaluation import (
    COCOEvaluator,
    build_evaluator,
    check_evaluators,
    evaluate_results,
    read_results,
    read_truth,
    results_json,
)

__all__ = [
    "COCOEvaluator",
    "build_evaluator",
    "check_evaluators",
    "evaluate_results",
    "read_results",
    "read_truth",
    "results_json",
]

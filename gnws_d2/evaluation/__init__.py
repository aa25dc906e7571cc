from .coco_evaluation import (
    COCOEvaluator,
    evaluate_results,
    read_results,
    read_truth,
    results_json,
)

__all__ = ["COCOEvaluator", "evaluate_results", "read_results", "read_truth", "results_json"]

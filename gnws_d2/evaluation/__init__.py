from .coco_evaluation import COCOEvaluator, evaluate_results, results_json

__all__ = ["COCOEvaluator", "evaluate_results", "results_json"]

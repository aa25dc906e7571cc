from .coco_evaluation import (
    TASKS,
    COCOEvaluator,
    build_evaluator,
    check_evaluators,
    evaluate_predictions,
    evaluate_results,
    max_dets,
    read_results,
    read_truth,
    results_json,
)
from .threshold import best_thresholds

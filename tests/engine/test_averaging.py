"""SOLVER.EMA_DECAY: the average of the weights, against the formula, and what is done with it."""

import pytest
import torch
from detectron2.engine import HookBase

from gnws_d2.config import load_config
from gnws_d2.engine.defaults import Trainer

DECAY = 0.75


def make_config(output_dir, iterations, *keys):
    return load_config(
        "quick_start",
        [
            "OUTPUT_DIR", str(output_dir), "SOLVER.MAX_ITER", iterations, "SOLVER.IMS_PER_BATCH", 2,
            "SOLVER.WARMUP_ITERS", 0, "SOLVER.EMA_DECAY", DECAY, "SOLVER.CHECKPOINT_PERIOD", 2,
            "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "TEST.EVAL_PERIOD", 2, *keys,
        ],
    )  # fmt: skip


class Recorder(HookBase):
    """Keeps the weights of the model after each iteration, and before the first."""

    def __init__(self):
        self.weights = []

    def before_train(self):
        self.after_step()

    def after_step(self):
        self.weights.append({k: v.clone() for k, v in self.trainer.model.state_dict().items()})


def train(cfg, monkeypatch, resume=False):
    """Return the weights after each iteration, and those of the models that were evaluated."""
    evaluated = []

    def test(cls, cfg, model, evaluators=None):
        evaluated.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"bbox": {"AP": 1.0}, "segm": {"AP": 1.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    return recorder.weights, evaluated


def assert_equal(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name, **tolerance)


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("keys", [(), ("SOLVER.ACCUMULATE_STEPS", 2)])
def test_average_is_that_of_the_formula_and_is_evaluated_and_saved(
    shapes_root, tmp_path, monkeypatch, keys
):
    cfg = make_config(tmp_path / "out", 4, *keys)
    (average, *weights), evaluated = train(cfg, monkeypatch)
    average = {k: v.double() for k, v in average.items()}
    averages = []
    for after in weights:
        average = {k: DECAY * v + (1 - DECAY) * after[k].double() for k, v in average.items()}
        averages.append({k: v.float() for k, v in average.items()})
    near = {"rtol": 1e-5, "atol": 1e-6}
    for i, model in zip((1, 3), evaluated, strict=True):
        assert_equal(model, averages[i], **near)
        checkpoint = load(tmp_path / "out" / f"model_{i:07d}.pth")
        assert_equal(checkpoint["model"], averages[i], **near)
        assert_equal(checkpoint["trained_model"], weights[i], rtol=0, atol=0)
    changed = [k for k, v in weights[-1].items() if not torch.equal(v, averages[-1][k])]
    assert len(changed) > 50
    assert_equal(load(tmp_path / "out" / "model_best.pth")["model"], averages[1], **near)


def test_resumed_run_is_bit_equal_and_without_the_key_goes_on_with_the_weights(
    shapes_root, tmp_path, monkeypatch
):
    train(make_config(tmp_path / "whole", 4), monkeypatch)
    train(make_config(tmp_path / "parts", 2), monkeypatch)
    train(make_config(tmp_path / "parts", 4), monkeypatch, resume=True)
    whole, parts = (load(tmp_path / name / "model_final.pth") for name in ("whole", "parts"))
    for part in ("model", "trained_model"):
        assert_equal(parts[part], whole[part], rtol=0, atol=0)
    assert "trained_model" in whole

    train(make_config(tmp_path / "parts", 6, "SOLVER.EMA_DECAY", 0.0), monkeypatch, resume=True)
    train(make_config(tmp_path / "whole", 6), monkeypatch, resume=True)
    plain, whole = (load(tmp_path / name / "model_final.pth") for name in ("parts", "whole"))
    assert "trained_model" not in plain
    assert_equal(plain["model"], whole["trained_model"], rtol=0, atol=0)

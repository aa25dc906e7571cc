import hashlib
import re

import pytest
import torch
from conftest import ROOT, mmdet_state

from gnws_d2 import model_zoo
from gnws_d2.checkpoint import catalog


@pytest.mark.parametrize("function", [model_zoo.get_config_file, model_zoo.get_checkpoint_url])
def test_unknown_name_lists_the_known_ones(function):
    with pytest.raises(RuntimeError, match=r"mask_rcnn_R52_gnws.*mask_rcnn_R50_gnws_2x"):
        function("mask_rcnn_R52_gnws")


def test_get_builds_the_model_with_its_weights(tmp_path, monkeypatch):
    name, state = "faster_rcnn_R50_gnws_1x", mmdet_state("faster_rcnn_R50_gnws_1x")
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    sha = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "model.pth").rename(tmp_path / f"model-{sha}.pth")
    url = f"file://{tmp_path}/model-{sha}.pth"
    monkeypatch.setattr(catalog, "checkpoint_urls", lambda: {name: url})
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    model = model_zoo.get(name, trained=True, device="cpu")
    assert model.training and model.device.type == "cpu"
    assert not hasattr(model.roi_heads, "mask_head")
    assert torch.equal(model.backbone.fpn_output3.weight, state["neck.fpn_convs.1.conv.weight"])


def test_readme_has_the_table():
    """Every figure in README's table is the one in the data, and every row is there."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "README.md").read_text().splitlines()
        if re.match(r"\| \[(faster|mask)_rcnn", line)
    ]
    expected = []
    for row in model_zoo.table():
        name, seconds = row["name"], row["inference_s_per_im_v100"]
        mask_ap = "" if row["mask_ap"] is None else f"{row['mask_ap']:.1f}"
        cells = [f"[{name}](configs/{name}.yaml)", f"{row['box_ap']:.1f}", mask_ap]
        cells += [f"{row['train_memory_gb']:.1f}", "" if seconds is None else f"{seconds:.3f}"]
        expected.append([*cells, f"[model]({row['checkpoint_url']})"])
    assert rows == expected

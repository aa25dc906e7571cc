"""The notebook runs from top to bottom, as it is in the repository: without outputs."""

import hashlib
import json
import shutil

import nbformat
import pytest
import torch
from conftest import ROOT, mmdet_state
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "quick_start.ipynb"
NAME = "mask_rcnn_R50_gnws_2x"
# The published weights are out of reach of a test: seeded ones of the same file format stand for
# them, under another URL.
STAND_IN = """
from gnws_d2.checkpoint import catalog

catalog.checkpoint_urls = lambda: {{{name!r}: {url!r}}}
"""
RESULTS = "print(json.dumps(results))"
# Half the training: .ci/run trains by the whole recipe, to a higher AP.
SHORTER = {"SOLVER.MAX_ITER = 250": "SOLVER.MAX_ITER = 125", "--epochs 4": "--epochs 1"}


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.ci
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    for name in ("configs", "tests", "tools", "requirements.txt", "gnws_d2"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "notebooks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)

    weights = tmp_path / "weights.pth"
    torch.save({"meta": {}, "state_dict": mmdet_state(NAME)}, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights = weights.rename(tmp_path / f"weights-{digest[:8]}.pth")
    stand_in = STAND_IN.format(name=NAME, url=f"file://{weights}")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(stand_in))
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))

    for there, here in SHORTER.items():
        (cell,) = [cell for cell in notebook.cells if there in cell.source]
        cell.source = cell.source.replace(there, here)

    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=1200, resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    assert len(pictures) == 4  # the photograph, losses, shapes, own data
    results = json.loads(outputs[-1].text)
    assert results["bbox"]["AP50"] > 15 and results["segm"]["AP50"] > 15
    assert (tmp_path / "output" / "notebook" / "my_data" / "report.html").is_file()

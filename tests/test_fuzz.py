"""
A checkpoint or config with any content is read, or a UserError says why not. No code in it runs.
For a long run: pytest tests/test_fuzz.py --hypothesis-profile fuzz --hypothesis-seed 0.
"""

import contextlib
import io
import itertools
import logging
import os
import pickle
import zipfile

import pytest
import torch
from detectron2.config import CfgNode
from fuzz import Choice, decisions, mutate_bytes, outcome
from hypothesis import given
from hypothesis import strategies as st

from gnws_d2.checkpoint import convert_to_mmdet, load_checkpoint
from gnws_d2.config import load_config
from gnws_d2.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    logging.disable(logging.CRITICAL)
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "base.yaml").write_text("VERSION: 2\nMODEL: {MASK_ON: True}\nSEED: 1\n")
    yield directory
    logging.disable(logging.NOTSET)


class RunsCode:
    def __reduce__(self):
        return (os.system, ("true",))


def saved(content, **kwargs):
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


DETECTOR = {
    "backbone.conv1.weight": torch.ones(2, 1, 2, 2),
    "backbone.layer1.0.conv1.weight": torch.arange(4.0),
    "neck.fpn_convs.0.gn.bias": torch.ones(3).half(),
    "ema_backbone_conv1_weight": torch.ones(3),
}
BACKBONE = {
    "module.layer1.0.conv1.weight": torch.ones(4),
    "module.layer1.0.bn1.weight": torch.nn.Parameter(torch.ones(4)),
    "fc.weight": torch.ones(2, 2),
}
OWN = {"model": {"roi_heads.a": torch.ones(3)}, "iteration": 3, "weight_standardization": True}
CHECKPOINTS = [
    saved(content, _use_new_zipfile_serialization=zip_format)
    for content in ({"meta": {}, "state_dict": DETECTOR}, BACKBONE, OWN, {"model": RunsCode()})
    for zip_format in (True, False)
] + [pickle.dumps(OWN | {"model": {"a": RunsCode()}}, protocol=p) for p in (0, 2, 4)]
PICKLE_TOKENS = [
    b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"cbuiltins\neval\n", b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"(", b")", b"R", b"}", b"]", b"t", b"u", b"s", b"Q", b"b", b"\x81",
    b"\x85", b"\x86", b"\x88", b"N", b"K\x00", b"J\xff\xff\xff\x7f", b"J\x00\x00\x00\x80",
    b"\x8a\x06\xff\xff\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\x7f", b"q\x00",
    b"h\x00", b"0", b"2", b".", b"\x80\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x01\x02",
    b"\xff\xff\xff\xff",
]  # fmt: skip


def mutate_entries(content, choice):
    """Mutate the files in a zip file, whose checksums stay right."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = source.namelist()
    chosen = names[0] if choice.below(4) else choice.of(names)  # the first is the pickle
    with zipfile.ZipFile(target, "w") as z:
        for name in names:
            entry = source.read(name)
            z.writestr(
                name, mutate_bytes(entry, choice, PICKLE_TOKENS) if name == chosen else entry
            )
    return target.getvalue()


@given(decisions, st.integers(0, len(CHECKPOINTS) - 1), st.booleans())
def test_checkpoints(directory, choices, which, entries):
    content, choice = CHECKPOINTS[which], Choice(choices)
    if entries and content.startswith(b"PK"):
        content = mutate_entries(content, choice)
    else:
        content = mutate_bytes(content, choice, [*PICKLE_TOKENS, content[-200:], content[:200]])
    path = directory / "model.pth"
    path.write_bytes(content)
    checkpoint = outcome(load_checkpoint, str(path))
    if checkpoint is not None:
        check_state(checkpoint["model"])
        assert all(value.isfinite().all() for value in checkpoint["model"].values())


def check_state(state):
    assert state and all(isinstance(name, str) for name in state)
    outcome(convert_to_mmdet, {"model": state})


CONFIG = b"""_BASE_: base.yaml
MODEL:
  ROI_HEADS: {NUM_CLASSES: 3}
  WEIGHTS: ""
DATASETS:
  TRAIN: ("a", "b")
INPUT:
  MIN_SIZE_TRAIN: [640, 800]
SOLVER:
  BASE_LR: 0.01
  STEPS: (1, 2)
SEED: 3
"""
YAML_TOKENS = [
    b"!!python/object/apply:os.system ['true']", b"!!python/name:os.system", b"!!python/module:os",
    b"!!map ", b"!!binary x", b"!!set {a}", b"!!timestamp 2001-99-99", b"2001-01-01",
    b"!!omap [a: 1]", b"!x ", b"&a ", b"*a", b"<<: ", b"_BASE_: ", b"_BASE_: a.yaml\n",
    b"_BASE_: [base.yaml, base.yaml]\n", b"_BASE_: http://127.0.0.1:1/\n", b"VERSION: 1\n",
    b"VERSION: x\n", b"? ", b"- ", b"---\n", b"...\n", b"%TAG ! x\n", b"%YAML 9.9\n", b"{", b"}",
    b"[", b"]", b": ", b"\n", b"\n  ", b"\t", b"'", b'"', b"#", b"|\n", b">\n", b"~", b"null",
    b".nan", b"1:1:1", b"0x", b"9" * 5000, b"\xff", b"\0", b"\xc2\x85", b"[" * 2000, b"MODEL: ",
    b"MODEL: 3\n", b"MODEL: null\n", b"SEED: []\n", b"1: 2\n", b"NEW: 1\n",
    b"__import__('os').system('true')", b"MODEL: {LOAD_PROPOSALS: True}\n",
    b"MODEL: {MASK_ON: 1}\n",
]  # fmt: skip
OPT_KEYS = st.sampled_from(
    ["SEED", "MODEL", "MODEL.WEIGHTS", "MODEL.WEIGHTS.x", "MODEL.LOAD_PROPOSALS", "SOLVER.STEPS",
     "_BASE_", "", ".", "MODEL.", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN.0", "VERSION",
     "--resume", "DATASETS.TRAIN"]
)  # fmt: skip
OPT_VALUES = st.one_of(
    st.sampled_from(
        ["1", "-1", "1e999", "None", "True", "()", "(1,)", "[]", "{}", "{1}", "b''", "'", "(" * 300,
         "-" * 50_000 + "1", "9" * 5000, "__import__('os').system('true')", "os.system('true')",
         "1j", "\0", "\ud800", "f'{1}'", "[[1]*9]"]
    ),
    st.text(max_size=8),
)  # fmt: skip
OPTS = st.one_of(
    st.just([]),
    st.lists(st.tuples(OPT_KEYS, OPT_VALUES), max_size=2).map(lambda x: [*itertools.chain(*x)]),
    st.lists(st.one_of(OPT_KEYS, OPT_VALUES), max_size=3),
)


@given(decisions, OPTS)
def test_configs(directory, choices, opts):
    path = directory / "a.yaml"
    path.write_bytes(mutate_bytes(CONFIG, Choice(choices), YAML_TOKENS))
    cfg = outcome(load_config, str(path), opts)
    if cfg is not None:
        assert isinstance(cfg, CfgNode) and cfg.is_frozen() and not cfg.MODEL.LOAD_PROPOSALS


def test_code_that_runs_is_noticed():
    with pytest.raises(AssertionError, match=r"os\.system"):
        outcome(pickle.loads, CHECKPOINTS[-1])


def test_files_are_read_before_they_are_mutated(directory):
    path = directory / "whole"
    for i, content in enumerate(CHECKPOINTS):
        path.write_bytes(content)
        with contextlib.nullcontext() if i < 6 else pytest.raises(UserError):
            load_checkpoint(str(path))
    path.write_bytes(CONFIG)
    assert load_config(str(path), []).SEED == 3

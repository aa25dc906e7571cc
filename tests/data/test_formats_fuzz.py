"""
Whatever is in label files, a dataset whose boxes are on its pictures comes out, or a UserError.
For long: pytest tests/data/test_formats_fuzz.py --hypothesis-profile fuzz --hypothesis-seed 0.
"""

import copy
import json
import logging

import numpy as np
import pytest
from builders import (
    BOX,
    H,
    W,
    coco_file,
    cvat,
    element,
    labelme,
    mask_shape,
    png,
    shape,
    via,
    voc,
    write,
)  # fmt: skip
from fuzz import Choice, decisions, mutate_bytes, outcome
from hypothesis import given
from hypothesis import strategies as st
from test_check_fuzz import JSON_TOKENS, mutate_json
from test_masks import NUMBERS, PARTS
from test_regions import GOOD, TURNED, VIA

from gnws_d2.data.formats import read_dataset

pytestmark = pytest.mark.filterwarnings("ignore")
RECTANGLE = shape("rectangle", (4, 6), (14, 18))
MASK = mask_shape(4, 6, PARTS[0][6:18, 4:14], group_id=1)
RLE = {"size": [H, W], "counts": [10, 20, W * H - 30]}
VOC = voc(("cat", BOX), filename="a.png").replace(
    "<object>", "<size><width>40</width><height>30</height></size><object>"
)
ITEMS = [
    element("box", **TURNED), element("polygon", points="20,2;30,2;30,12"),
    element("mask", rle="2,3,1,4", left=5, top=7, width=5, height=2),
    element("ellipse", cx=12, cy=12, rx=8, ry=6, rotation=30), element("points", points="1,2"),
]  # fmt: skip


# The label file of each format, and what lies beside it.
FORMATS = {
    "COCO": ("l.json", coco_file({}, {"segmentation": RLE, "iscrowd": 1}), {}),
    "labelme": ("a.json", labelme(GOOD, RECTANGLE, MASK, shape("circle", (12, 12), (12, 20))), {}),
    "VIA": ("l.json", via(VIA, True), {}),
    "CVAT": ("l.xml", cvat(*ITEMS).encode(), {}),
    "VOC": ("a.xml", VOC.encode(), {}),
    "YOLO": ("a.txt", b"0 .5 .5 .2 .2\n1 .1 .1 .9 .1 .5 .9\n", {"data.yaml": "names: [a, b]\n"}),
    "data.yaml": (
        "data.yaml",
        b"path: .\ntrain: [a.png]\nval: a.png\nnames: {0: a, 1: b}\nkpt_shape: [2, 2]\n",
        {"a.txt": "0 .5 .5 .2 .2\n"},
    ),
    "masks": ("masks/a.png", png(NUMBERS), {}),
    "labelmap": (
        "labelmap.txt", b"# label:color_rgb:parts:actions\ncat:1,1,1::\n",
        {"SegmentationClass/a.png": png(NUMBERS)},
    ),
    "train.txt": ("train.txt", b"a.png\n./a.png 1\n", {"a.xml": VOC}),
}  # fmt: skip
TOKENS = [
    *JSON_TOKENS, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"<", b"/>", b'=""', b"&a;", b"<object>",
    b'<?xml version="1.0" encoding="utf-7"?>', b"nan", b"-1", b"inf", b"1e9", b" ", b"\n",
    b"0 " * 9, b"&#0;", b"- ", b"!!python/name:os.system", b"*a", b"[a.png, [1]]", b"9" * 14,
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@given(
    first=st.binary(min_size=2, max_size=20),
    second=decisions,
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig"]),
    how=st.sampled_from(["fields", "fields", "bytes"]),
)
def test_label_file(tmp_path_factory, format, first, second, encoding, how):
    logging.disable(logging.CRITICAL)
    root = tmp_path_factory.mktemp("fuzz")
    name, content, others = FORMATS[format]
    if not isinstance(content, bytes):
        if how == "fields":
            content = mutate_json(copy.deepcopy(content), Choice(first))
        content = json.dumps(content).encode()
    if how == "bytes" or name[-4:] != "json":
        content = mutate_bytes(content, Choice(second), TOKENS)
    if encoding != "utf-8" and name[-3:] != "png":
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    write(root, {"a.png": (W, H), name: content} | others)
    splits = outcome(read_dataset, str(root))
    logging.disable(logging.NOTSET)
    for coco in (splits or {}).values():
        assert [(i["file_name"], i["width"], i["height"]) for i in coco["images"]] in (
            [("a.png", W, H)], [],
        )  # fmt: skip
        names = {c["id"] for c in coco["categories"]}
        for a in coco["annotations"]:
            x, y, w, h = a["bbox"]
            assert x < W and y < H and x + w > 0 and y + h > 0 and w > 0 and h > 0
            assert a["area"] > 0 and np.isfinite([*a["bbox"], a["area"]]).all()
            assert a["image_id"] == 1 and a["category_id"] in names and a["iscrowd"] in (0, 1)

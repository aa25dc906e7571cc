"""Build small datasets in each format, and look at what is read of them."""

import base64
import io
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from gnws_d2.data.formats import Notes, read_dataset

W, H = 40, 30
BOX = [4, 6, 10, 12]
OUTLINE = ((20, 2), (30, 2), (30, 12), (20, 12))


def write(root, files):
    """Write {name: content}; a tuple is the size of a black picture, an array or image its own."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            content = Image.new("RGB", content)
        if isinstance(content, np.ndarray):
            content = Image.fromarray(content)
        if isinstance(content, Image.Image):
            content.save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(root)


def read(root, files, **options):
    """Write and read a dataset without splits. Return it, and the notes."""
    notes = Notes()
    return read_dataset(write(root, files), notes, **options)["all"], notes


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask, np.uint8))


def decode(annotation, height=H, width=W):
    rle = annotation["segmentation"]
    if isinstance(rle, list):
        rle = mask_util.merge(mask_util.frPyObjects(rle, height, width))
    return mask_util.decode(rle).astype(bool)


def box_of(mask):
    return mask_util.toBbox(encode(mask)).tolist()


def rectangle(x, y, w, h):
    mask = np.zeros((H, W), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def disk(cx, cy, rx, ry, degrees=0):
    """Pixels whose centers are in an ellipse that is turned clockwise."""
    y, x = np.mgrid[:H, :W] + 0.5
    t = math.radians(degrees)
    u, v = (x - cx) * math.cos(t) + (y - cy) * math.sin(t), (y - cy) * math.cos(t)
    return (u / rx) ** 2 + ((v - (x - cx) * math.sin(t)) / ry) ** 2 <= 1


def corners(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def names_of(coco):
    return {c["id"]: c["name"] for c in coco["categories"]}


def classes_of(coco):
    """The class of each object."""
    return [names_of(coco)[a["category_id"]] for a in coco["annotations"]]


def files_of(splits):
    return {name: [i["file_name"] for i in coco["images"]] for name, coco in splits.items()}


def assert_objects(coco, wanted):
    """Compare class, box, area and mask with [(class, box, mask or None)], in their order."""
    assert classes_of(coco) == [w[0] for w in wanted]
    for a, (_, box, mask) in zip(coco["annotations"], wanted):
        assert a["bbox"] == pytest.approx(box, abs=0.5)
        assert ("segmentation" in a) == (mask is not None)
        if mask is not None:
            difference = int((decode(a) != mask).sum())
            assert difference <= 0.06 * mask.sum(), difference
            assert a["area"] == pytest.approx(mask.sum(), rel=0.06)


def png(mask):
    data = io.BytesIO()
    Image.fromarray(mask).save(data, "png")
    return data.getvalue()


def coco(sizes, objects, classes=("cat", "dog"), masks=True, **values):
    """A COCO file of {picture: size}, with objects of (picture, class, box) and other values."""
    ids = {name: i for i, name in enumerate(sizes, 1)}
    annotations = [
        {"id": i, "image_id": ids[picture], "category_id": classes.index(name) + 1, "bbox": box,
         "area": box[2] * box[3], "iscrowd": 0, "segmentation": [corners(*box)] * masks} | values
        for i, (picture, name, box) in enumerate(objects, 1)
    ]  # fmt: skip
    images = [
        {"id": ids[name], "file_name": name, "width": w, "height": h}
        for name, (w, h) in sizes.items()
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_file(*annotations, size=(W, H), **more):
    """A COCO file of a.png; each annotation is the good one with other fields, "no" for none."""
    label = coco({"a.png": size}, [("a.png", "cat", BOX)] * len(annotations))
    for own, changes in zip(label["annotations"], annotations):
        own.update(changes)
    own = [{k: v for k, v in a.items() if v != "no"} for a in label["annotations"]]
    return label | {"annotations": own} | more


def voc(*objects, filename="", outline=""):
    """Pascal VOC's file, with objects of (class, box)."""
    text = f"<filename>{filename}</filename>" if filename else ""
    for name, (x, y, w, h) in objects:
        box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        text += f"<object><name>{name}</name><difficult>0</difficult>{outline}"
        text += f"<bndbox>{box}</bndbox></object>"
    return f"<annotation>{text}</annotation>"


def shape(kind, *points, label="cat", **more):
    return {"label": label, "shape_type": kind, "points": [list(p) for p in points]} | more


def mask_shape(x, y, mask, **more):
    """labelme's mask at a place of the picture."""
    last = x + mask.shape[1] - 1, y + mask.shape[0] - 1
    return shape("mask", (x, y), last, mask=base64.b64encode(png(mask)).decode(), **more)


def labelme(*shapes, path="a.png", **more):
    return {"shapes": shapes, "imagePath": path, "imageWidth": W, "imageHeight": H} | more


def via(regions, project):
    item = {"a.png123": {"filename": "a.png", "size": 123, "regions": regions}}
    return {"_via_settings": {}, "_via_img_metadata": item} if project else item


def region(name, kind="cat", **values):
    return {"shape_attributes": {"name": name} | values, "region_attributes": {"kind": kind}}


def cvat(*items, name="a.png"):
    image = f'<image id="0" name="{name}" width="{W}" height="{H}">{"".join(items)}</image>'
    return f'<?xml version="1.0"?>\n<annotations><version>1.1</version>{image}</annotations>'


def element(tag, label="cat", **values):
    return f'<{tag} label="{label}" {" ".join(f"""{k}="{v}" """ for k, v in values.items())}/>'


def box(x, width=10):
    return [float(x), 0.0, float(width), 10.0]


def result(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def truth(path, objects, num_images=2):
    """Write objects of (image, category, box) and of crowds, with a 1 at the end, as COCO."""
    coco = {
        "images": [{"id": i, "width": 2000, "height": 20} for i in range(1, num_images + 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box,
             "area": box[2] * box[3], "iscrowd": sum(crowd)}
            for i, (image, category, box, *crowd) in enumerate(objects, 1)
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 1, "name": "cat"}],
    }  # fmt: skip
    path.write_text(json.dumps(coco))
    return str(path)

"""What training changes at random, compared with the pixels of pictures that show their objects."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from builders import coco, encode, write
from conftest import NARROW, ROOT
from detectron2 import model_zoo as d2_model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, polygons_to_bitmask
from detectron2.utils.events import EventStorage

from gnws_d2 import model_zoo
from gnws_d2.config import load_config
from gnws_d2.data import OpenCVDatasetMapper, register_coco_datasets
from gnws_d2.data.augmentation import check_augmentation, paste_objects
from gnws_d2.data.train_loader import build_train_loader
from gnws_d2.engine import Trainer
from gnws_d2.engine.hooks import validation_loss
from gnws_d2.utils.errors import UserError

H, W, SIZE = 60, 80, 96
# One is not convex, one is at the edge of the picture, one has two parts.
OUTLINES = [
    [[5, 5, 40, 5, 40, 15, 17, 15, 17, 45, 5, 45]],
    [[60, 30, 80, 30, 80, 60, 50, 60]],
    [[44, 4, 56, 4, 56, 20, 44, 20], [60, 4, 72, 4, 72, 20, 60, 20]],
]


def get_config(*keys, size=SIZE, edge=72):
    sizes = ["INPUT.MIN_SIZE_TRAIN", (edge,), "INPUT.MAX_SIZE_TRAIN", size]
    return load_config("quick_start", [*sizes, *keys])


@pytest.fixture
def record(tmp_path):
    """A picture each of whose channels, of RGB, shows the object of one class."""
    picture = np.zeros((H, W, 3), np.uint8)
    annotations = []
    for i, polygons in enumerate(OUTLINES):
        picture[:, :, i] = 255 * polygons_to_bitmask([np.array(p, float) for p in polygons], H, W)
        points = np.reshape(np.concatenate(polygons), (-1, 2))
        box = [*points.min(axis=0), *points.max(axis=0)]
        annotations.append(
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "iscrowd": 0,
             "segmentation": [[float(v) for v in p] for p in polygons]}
        )  # fmt: skip
    write(tmp_path, {"a.png": picture})
    return {"file_name": f"{tmp_path}/a.png", "height": H, "width": W, "annotations": annotations}


def with_rle(record):
    """The same with the pixels of the picture as masks."""
    picture = cv2.imread(record["file_name"])[:, :, ::-1]
    for annotation in record["annotations"]:
        annotation["segmentation"] = encode(picture[:, :, annotation["category_id"]] > 0)
    return record


def near(mask):
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0


def assert_objects_are_those_of_the_picture(image, instances):
    """Up to a pixel, at which colors are interpolated, or some at a flat edge."""
    found = dict(zip(instances.gt_classes.tolist(), range(len(instances))))
    assert len(found) == len(instances)
    h, w = image.shape[1:]
    masks = instances.gt_masks if len(instances) else None
    if masks is not None and not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, h, w)
    for c in range(3):
        shown = image[c].numpy() > 128  # the padding has 128
        if c not in found:
            assert shown.sum() <= 4
            continue
        mask = masks.tensor[found[c]].numpy()
        assert (mask & ~near(shown)).sum() <= 3 and (shown & ~near(mask)).sum() <= 3
        box = instances.gt_boxes.tensor[found[c]].numpy()
        rows, columns = np.nonzero(mask)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, extent, atol=2)
    return len(found)


@pytest.mark.parametrize("mode", ["none", "light", "strong"])
@pytest.mark.parametrize("given, masks", [("polygon", "polygon"), ("polygon", "bitmask"),
                                          ("rle", "bitmask")])  # fmt: skip
def test_boxes_and_masks_are_those_of_the_picture(record, mode, given, masks):
    keys = ["INPUT.AUGMENTATION", mode, "INPUT.MASK_FORMAT", masks, "INPUT.ANY_ORIENTATION", "True"]
    mapper = OpenCVDatasetMapper(get_config(*keys), True)
    record = record if given == "polygon" else with_rle(record)
    numbers, sizes = set(), set()
    for seed in range(30):
        np.random.seed(seed)
        out = mapper(record)
        sizes.add(tuple(out["image"].shape))
        numbers.add(assert_objects_are_those_of_the_picture(out["image"], out["instances"]))
    if mode == "strong":
        assert sizes == {(3, SIZE, SIZE)} and min(numbers) < 3
    else:
        assert numbers == {3} and len(sizes) == 2 if mode == "none" else len(sizes) > 20


def test_none_is_detectron2s_resize_and_flip_bit_for_bit(record):
    mapper = OpenCVDatasetMapper(get_config(), True)
    picture = cv2.resize(cv2.imread(record["file_name"])[:, :, ::-1], (96, 72))
    for seed in range(4):
        np.random.seed(seed)
        np.random.choice([72])
        expected = picture[:, ::-1] if np.random.uniform() < 0.5 else picture
        np.random.seed(seed)
        actual = mapper(record)["image"].numpy().transpose(1, 2, 0)
        assert np.array_equal(actual, expected)


def test_polygons_that_cross_themselves_stay_whole_when_cropped(record):
    """Shapely would leave out a half."""
    record["annotations"] = record["annotations"][:1]
    record["annotations"][0]["segmentation"] = [[10.0, 10, 50, 50, 50, 10, 10, 50]]
    mapper = OpenCVDatasetMapper(get_config("INPUT.AUGMENTATION", "strong"), True)
    np.random.seed(1)
    areas = []
    while len(areas) < 5:
        instances = mapper(record)["instances"]
        if len(instances):
            (x0, y0, x1, y1), mask = instances.gt_boxes.tensor[0], instances.gt_masks.tensor[0]
            areas.append(float(mask.sum() / ((x1 - x0) * (y1 - y0))))
    assert min(areas) > 0.4


@pytest.mark.parametrize("flip, number", [("horizontal", 8), ("none", 4)])
def test_quarter_turns_are_exact(record, flip, number):
    keys = ["INPUT.ANY_ORIENTATION", "True", "INPUT.RANDOM_FLIP", flip]
    mapper = OpenCVDatasetMapper(get_config(*keys, edge=H), True)
    picture = cv2.imread(record["file_name"])[:, :, ::-1]
    turned = [np.rot90(p, k) for p in (picture, picture[:, ::-1]) for k in range(4)]
    record, seen = with_rle(record), set()
    for seed in range(40):
        np.random.seed(seed)
        out = mapper(record)
        image = out["image"].numpy().transpose(1, 2, 0)
        (index,) = [i for i, p in enumerate(turned) if np.array_equal(p, image)]
        seen.add(index)
        assert np.array_equal(out["instances"].gt_masks.tensor, out["image"] > 0)
        boxes = out["instances"].gt_masks.get_bounding_boxes()
        assert torch.allclose(out["instances"].gt_boxes.tensor, boxes.tensor, atol=1)
    assert len(seen) == number


@pytest.mark.parametrize("width, longest", [(80, 96), (240, 96)])
def test_light_scales_also_long_images_by_its_whole_range(width, longest):
    mapper = OpenCVDatasetMapper(get_config("INPUT.AUGMENTATION", "light"), True)
    resize = mapper.augmentations.augs[0]
    transforms = [resize.get_transform(np.zeros((60, width, 3))) for _ in range(200)]
    scales = [t.new_w / longest for t in transforms]
    assert 0.79 < min(scales) < 0.83 and 1.2 < max(scales) < 1.26
    for t in transforms:
        assert t.new_h == pytest.approx(60 / width * t.new_w, abs=1)


def test_colors_change_alike_in_bgr_and_rgb(record):
    images = []
    for channels in ("RGB", "BGR"):
        keys = ["INPUT.AUGMENTATION", "light", "INPUT.FORMAT", channels]
        keys += ["INPUT.RANDOM_FLIP", "none"]
        np.random.seed(3)
        images.append(OpenCVDatasetMapper(get_config(*keys), True)(record)["image"].int())
    assert (images[0] - images[1].flip(0)).abs().max() <= 1
    assert len(images[0][0].unique()) > 10


def test_images_without_objects_are_augmented(record):
    for masks, annotations in itertools.product(
        ("polygon", "bitmask"), ([], [{**record["annotations"][0], "iscrowd": 1}])
    ):
        keys = ["INPUT.AUGMENTATION", "strong", "INPUT.MASK_FORMAT", masks]
        mapper = OpenCVDatasetMapper(get_config(*keys), True)
        out = mapper({**record, "annotations": annotations})
        assert out["image"].shape == (3, SIZE, SIZE) and len(out["instances"]) == 0


def random_image(rng, height, width, number, first_class=0):
    instances = Instances((height, width))
    if number:
        masks = np.zeros((number, height, width), bool)
        for mask in masks:
            y, x = rng.randint(height - 2), rng.randint(width - 2)
            mask[y : y + rng.randint(1, height), x : x + rng.randint(1, width)] = True
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    else:
        instances.gt_boxes = Boxes(torch.zeros(0, 4))
    instances.gt_classes = torch.arange(first_class, first_class + number)
    image = torch.from_numpy(rng.randint(0, 256, (3, height, width), np.uint8))
    return {"image": image, "instances": instances, "file_name": f"{first_class}.png"}


def paste_by_hand(record, other, chosen):
    """Pixel by pixel. Return the image, and {class: mask}."""
    image, masks = record["image"].numpy().copy(), {}
    below, above = record["instances"], other["instances"]
    h, w = image.shape[1:]
    covered = np.zeros((h, w), bool)
    for c in chosen:
        mask = above.gt_masks.tensor[above.gt_classes.tolist().index(c)].numpy()
        masks[c] = np.zeros((h, w), bool)
        for y, x in zip(*np.nonzero(mask)):
            if y < h and x < w:
                masks[c][y, x] = covered[y, x] = True
                image[:, y, x] = other["image"][:, y, x]
    for i, c in enumerate(below.gt_classes.tolist()):
        mask = below.gt_masks.tensor[i].numpy()
        left = mask & ~covered
        if 10 * left.sum() >= mask.sum():
            masks[c] = left
    return image, masks


@pytest.mark.parametrize("size", [(12, 16), (8, 20), (20, 9)])
@pytest.mark.parametrize("number", [0, 4])
def test_pasted_objects_are_those_by_hand(size, number):
    subsets, dropped = set(), 0
    for seed in range(60):
        rng = np.random.RandomState(seed)
        record, other = random_image(rng, 12, 16, number), random_image(rng, *size, 3, 100)
        before = record["image"].clone(), other["image"].clone()
        np.random.seed(seed)
        out = paste_objects(record, other)
        classes = out["instances"].gt_classes.tolist()
        chosen = [c for c in classes if c >= 100]
        image, masks = paste_by_hand(record, other, chosen)
        assert np.array_equal(out["image"], image) and sorted(classes) == sorted(masks)
        for i, c in enumerate(classes):
            assert np.array_equal(out["instances"].gt_masks.tensor[i], masks[c])
            rows, columns = np.nonzero(masks[c])
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert out["instances"].gt_boxes.tensor[i].tolist() == extent
        assert torch.equal(record["image"], before[0]) and torch.equal(other["image"], before[1])
        assert out["file_name"] == "0.png" and out["instances"].image_size == (12, 16)
        subsets.add(len(chosen))
        dropped += number - (len(classes) - len(chosen))
    assert {1, 2, 3} <= subsets and (0 not in subsets or size != (12, 16))
    assert dropped > 0 or not number
    assert paste_objects(record, random_image(rng, 12, 16, 0)) is record


@pytest.fixture
def dataset(tmp_path):
    """12 pictures of one color each, with a cat or a dog, as COCO."""
    sizes = {f"{i}.png": (40 + i, 36) for i in range(12)}
    objects = [(name, ("cat", "dog")[i % 2], [4, 4, 20, 20]) for i, name in enumerate(sizes)]
    rng, files = np.random.RandomState(0), {"a.json": coco(sizes, objects)}
    for name, (w, h) in sizes.items():
        files[f"images/{name}"] = rng.randint(0, 256, (h, w, 3), np.uint8)
    root = write(tmp_path / "data", files)
    name = str(tmp_path)
    register_coco_datasets([(name, f"{root}/a.json", f"{root}/images")])
    yield tmp_path / "data", ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "SEED", 3]
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)


AUGMENTED = ["INPUT.AUGMENTATION", "strong", "INPUT.COPY_PASTE", 0.5,
             "INPUT.ANY_ORIENTATION", "True"]  # fmt: skip


def take(cfg, number, state=None):
    loader = build_train_loader(cfg, OpenCVDatasetMapper(cfg, True))
    if state:
        loader.load_state_dict(state)
    return loader, list(itertools.islice(iter(loader), number))


def content(batch):
    return [
        (d["file_name"], d["image"].tolist(), d["instances"].gt_classes.tolist(),
         d["instances"].gt_boxes.tensor.tolist(), d["instances"].get_fields().get("gt_masks"))
        for d in batch
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_batches_continue_exactly(dataset, workers):
    keys = [*dataset[1], *AUGMENTED, "SOLVER.IMS_PER_BATCH", 2]
    loader, whole = take(get_config(*keys), 9)
    _, rest = take(get_config(*keys, "DATALOADER.NUM_WORKERS", workers), 4, loader.state_dict(5))
    for expected, actual in zip(whole[5:], rest):
        for (*a, mask), (*b, other) in zip(content(expected), content(actual)):
            assert a == b and (mask is None) == (other is None)
            assert mask is None or torch.equal(mask.tensor, other.tensor)
    numbers = [len(d["instances"]) for batch in whole for d in batch]
    assert max(numbers) == 2 and min(numbers) < 2  # pasted, and not


@pytest.mark.parametrize("probability, share", [(0.0, 0), (1.0, 1), (0.5, 0.5)])
def test_objects_are_pasted_with_their_probability(dataset, probability, share):
    keys = [*dataset[1], "INPUT.COPY_PASTE", probability, "INPUT.RANDOM_FLIP", "none"]
    _, batches = take(get_config(*keys, edge=36, size=60), 20)
    plain = cv2.imread(str(dataset[0] / "images" / "0.png"))[:, :, ::-1].transpose(2, 0, 1)
    pasted = 0
    for d in itertools.chain(*batches):
        picture = cv2.imread(d["file_name"])[:, :, ::-1].transpose(2, 0, 1)
        changed = (d["image"].numpy() != picture).any(axis=0)
        own = d["file_name"].endswith("/0.png")
        assert not own or picture.shape == plain.shape
        assert set(map(tuple, np.argwhere(changed))) <= set(np.ndindex(24, 24))
        pasted += bool(changed.any())
    # One in twelve is pasted onto itself.
    assert pasted / 80 == pytest.approx(share * 11 / 12, abs=0.12)


def test_bad_image_to_paste_from_is_skipped_and_counted_or_stops(dataset):
    (dataset[0] / "images" / "5.png").write_bytes(b"")
    keys = [*dataset[1], "INPUT.COPY_PASTE", 1.0]
    with pytest.raises(UserError, match=r"5\.png"):
        take(get_config(*keys), 12)
    loader, batches = take(get_config(*keys, "INPUT.ON_BAD_IMAGE", "skip"), 12)
    assert len(batches) == 12 and loader.num_bad_images > 4  # once an epoch as the image below


def test_evaluation_and_validation_loss_see_no_augmentation(dataset):
    seen = []

    class Model(torch.nn.Module):
        def forward(self, batch):
            seen[-1] += content(batch)
            return {"loss": torch.zeros(())}

    record = DatasetCatalog.get(dataset[1][1][0])[3]
    for keys in ([], ["INPUT.AUGMENTATION", "light"], AUGMENTED):
        seen.append([])
        cfg = get_config(*dataset[1], *keys)
        seen[-1].append(OpenCVDatasetMapper(cfg, False)(record)["image"].tolist())
        with EventStorage():
            validation_loss(cfg, Model())
        seen[-1] = [x[:4] for x in seen[-1]]
    assert len(seen[0]) == 13 and seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    "keys, message",
    [
        (["INPUT.AUGMENTATION", "medium"], 'is "medium": set it to "none" or "light" or "strong"'),
        (["INPUT.COPY_PASTE", 0.5, "MODEL.MASK_ON", "False"], "needs MODEL.MASK_ON True"),
        (["INPUT.COPY_PASTE", 0.5, "INPUT.MASK_FORMAT", "polygon"], "MASK_FORMAT bitmask"),
        (["INPUT.COPY_PASTE", 0.5, "MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON False"),
    ],
)
def test_what_cannot_be_is_one_sentence(keys, message):
    with pytest.raises(UserError, match=message) as e:
        check_augmentation(get_config(*keys))
    assert "\n" not in str(e.value)


def test_polygons_are_cropped_by_shapely_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_augmentation(get_config("INPUT.AUGMENTATION", "strong"))
    polygons = get_config("INPUT.AUGMENTATION", "strong", "INPUT.MASK_FORMAT", "polygon")
    with pytest.raises(UserError, match="pip install shapely"):
        check_augmentation(polygons)


LSJ = sorted(path.stem for path in (ROOT / "configs").glob("*_lsj_*.yaml"))


def test_lsj_configs_are_those_of_the_four_backbones_and_of_detectron2s_recipe(record):
    assert len(LSJ) == 4 and not {*LSJ} & {*model_zoo.names()}
    theirs = d2_model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    batch, schedule = theirs.dataloader.train.total_batch_size, theirs.lr_multiplier
    recipe = [batch, theirs.optimizer.lr, theirs.optimizer.weight_decay, theirs.train.max_iter]
    recipe += [schedule.scheduler.milestones, schedule.warmup_factor]
    for name in LSJ:
        cfg = model_zoo.get_config(name)
        published = model_zoo.get_config(name.replace("lsj_100e", "2x"))
        assert cfg.MODEL.RESNETS == published.MODEL.RESNETS and cfg.MODEL.WEIGHTS == ""
        own = cfg.SOLVER
        assert recipe == [own.IMS_PER_BATCH, own.BASE_LR, own.WEIGHT_DECAY, own.MAX_ITER,
                          list(own.STEPS), own.WARMUP_FACTOR]  # fmt: skip
        resize, crop, flip = OpenCVDatasetMapper(cfg, True).augmentations.augs
        assert (resize.min_scale, resize.max_scale, resize.target_width) == (0.1, 2.0, 1024)
        assert crop.crop_size == (1024, 1024) and flip.horizontal
    assert OpenCVDatasetMapper(cfg, True)(record)["image"].shape == (3, 1024, 1024)


def test_lsj_config_trains_a_step(dataset, tmp_path):
    small = [
        *NARROW, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 2,
        "INPUT.MAX_SIZE_TRAIN", 128, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1,
        "SOLVER.STEPS", (), "SOLVER.AMP.ENABLED", "False", "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.REFERENCE_WORLD_SIZE", 0, "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / "out"),
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    cfg = load_config("mask_rcnn_R50_gnws_lsj_100e", [*dataset[1], *small])
    trainer = Trainer(cfg)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    changed = [not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters())]
    assert trainer.iter == 1 and np.mean(changed) > 0.6  # not in blocks that are the identity
    assert trainer.model.backbone.bottom_up.stem.conv1.weight.requires_grad
    assert (tmp_path / "out" / "model_final.pth").is_file()

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from gnws_d2.data.train_loader import TrainLoader


def draw(record):
    """A mapper that draws from every generator that augmentations use."""
    return {**record, "draws": (random.random(), np.random.rand())}


def records():
    return [{"i": i, "width": 3, "height": 4 if i % 3 else 2} for i in range(10)]


def make_loader(num_workers=0, seed=0, grouping=True):
    return TrainLoader(
        records(),
        sampler=TrainingSampler(10, seed=0),
        mapper=draw,
        batch_size=2,
        aspect_ratio_grouping=grouping,
        num_workers=num_workers,
        seed=seed,
    )


def take(loader, n, start=0):
    loader.start_iter = start
    return list(itertools.islice(iter(loader), n))


@pytest.mark.parametrize("start", [0, 1, 7, 23])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starts_anywhere_with_any_number_of_workers(start, num_workers):
    whole = take(make_loader(), 30)
    assert take(make_loader(num_workers), 5, start) == whole[start : start + 5]


@pytest.mark.parametrize("grouping", [False, True])
def test_batches_are_detectron2s(grouping):
    """Those of one loading process, which gives them in the sampler's order."""
    theirs = build_detection_train_loader(
        records(),
        mapper=lambda record: record,
        sampler=TrainingSampler(10, seed=0),
        total_batch_size=2,
        aspect_ratio_grouping=grouping,
    )
    expected = [[x["i"] for x in batch] for batch in itertools.islice(theirs, 25)]
    batches = take(make_loader(grouping=grouping), 25)
    assert [[x["i"] for x in batch] for batch in batches] == expected
    if grouping:
        assert all(a["height"] == b["height"] for a, b in batches)


def test_an_image_is_augmented_anew_in_every_epoch_and_by_the_seed():
    images = [x for batch in take(make_loader(), 25) for x in batch]
    assert len({x["draws"] for x in images}) == 50
    others = [x for batch in take(make_loader(seed=1), 25) for x in batch]
    assert not {x["draws"] for x in images} & {x["draws"] for x in others}


def test_generators_of_the_process_are_left_alone():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    take(make_loader(), 3)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected

import copy
import functools
import itertools
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.utils import comm

from gnws_d2.config import load_config
from gnws_d2.data.dataset_mapper import BadImageError
from gnws_d2.data.train_loader import TrainLoader, build_train_loader
from gnws_d2.data.workers import StoppableLoader
from gnws_d2.utils.errors import UserError


def draw(record):
    """A mapper that draws from every generator that augmentations use."""
    return {**record, "draws": (random.random(), np.random.rand())}


def bad(record, numbers=(3, 4)):
    if record["i"] in numbers:
        raise BadImageError(f"The image {record['file_name']} is empty.")
    return draw(record)


def records(n=10):
    return [
        {"i": i, "width": 3, "height": 4 if i % 3 else 2, "file_name": f"{i}.jpg"} for i in range(n)
    ]


def make_loader(num_workers=0, seed=0, grouping=True, n=10, mapper=draw, **options):
    options = {"sampler": TrainingSampler(n, seed=0), "batch_size": 2} | options
    options |= {"num_workers": num_workers, "seed": seed, "aspect_ratio_grouping": grouping}
    return TrainLoader(records(n), mapper=mapper, **options)


def take(loader, n):
    return list(itertools.islice(iter(loader), n))


@pytest.mark.parametrize("start", [0, 1, 7, 23])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_at_any_iteration_with_any_number_of_workers(start, num_workers):
    """Also if the config of the resumed run has another seed (SEED -1 draws one)."""
    loader = make_loader()
    whole = take(loader, 30)
    resumed = make_loader(num_workers, seed=5)
    assert resumed.load_state_dict(loader.state_dict(start)) == start
    assert take(resumed, 5) == whole[start : start + 5]


def each_rank(monkeypatch, world_size, sampler, **options):
    """The loaders of all processes, each while it is the process that runs."""
    sampler._rank, sampler._world_size = 0, 1  # as in build_train_loader
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        yield make_loader(sampler=copy.deepcopy(sampler), **options)


def run_part(monkeypatch, world_size, batch_size, state, iterations, n):
    """Return the images of all processes of a part of a run, the state after it, and its start."""
    images, sampler = [], TrainingSampler(n, seed=0)
    for loader in each_rank(monkeypatch, world_size, sampler, n=n, batch_size=batch_size):
        start = loader.load_state_dict(state) if state else 0
        images += [x for batch in take(loader, iterations) for x in batch]
    return images, loader.state_dict(start + iterations), start


@pytest.mark.parametrize("other", [(1, 2), (3, 2), (2, 1), (4, 3), (1, 4)])
def test_another_number_of_processes_continues_with_unseen_images(monkeypatch, other, caplog):
    """In 4 epochs of one stream. The run has other processes in the second and the fourth."""
    n, state, seen = 120, None, []
    for i, (world_size, batch_size) in enumerate([(2, 2), other, (2, 2), other]):
        iterations = n // (world_size * batch_size)
        images, state, start = run_part(monkeypatch, world_size, batch_size, state, iterations, n)
        assert start == i * iterations  # an iteration counts as many images as one has now
        seen += images
    # Each position of the stream is taken once at most: no augmentation comes twice.
    assert len({x["draws"] for x in seen}) == len(seen) == 4 * n
    # At each change, less than a batch is passed over, and some images wait for their group.
    counts = Counter(x["i"] for x in seen)
    total = max(4, other[0] * other[1])
    assert sum(abs(counts[i] - 4) for i in range(n)) <= 2 * 3 * total
    then = "The run had 2 processes with 2 images each."
    (message,) = {m for m in caplog.messages if then in m}
    assert f"continues with {other[0]} processes with {other[1]} images each" in message


def test_run_with_another_number_of_processes_resumes_exactly(monkeypatch):
    _, state, _ = run_part(monkeypatch, 2, 2, None, 7, 10)
    whole, _, start = run_part(monkeypatch, 1, 4, state, 9, 10)
    assert start == 7
    part, state, _ = run_part(monkeypatch, 1, 4, state, 4, 10)
    rest, _, start = run_part(monkeypatch, 1, 4, state, 5, 10)
    assert start == 11 and part + rest == whole


@pytest.mark.parametrize("grouping", [False, True])
def test_batches_are_detectron2s(grouping):
    """With one loading process, which yields images in the sampler's order."""
    theirs = build_detection_train_loader(
        records(), mapper=lambda record: record, sampler=TrainingSampler(10, seed=0),
        total_batch_size=2, aspect_ratio_grouping=grouping,
    )  # fmt: skip
    expected = [[x["i"] for x in batch] for batch in itertools.islice(theirs, 25)]
    batches = take(make_loader(grouping=grouping), 25)
    assert [[x["i"] for x in batch] for batch in batches] == expected
    if grouping:
        assert all(a["height"] == b["height"] for a, b in batches)


def test_augmentation_depends_on_the_epoch_and_the_seed():
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


def test_dataset_without_sizes_is_loaded():
    """As one that the user registers by a function."""

    def load():
        return [{"i": i, "file_name": "", "annotations": [{"category_id": 0}]} for i in range(6)]

    DatasetCatalog.register("without_sizes", load)
    try:
        keys = ["DATASETS.TRAIN", "('without_sizes',)", "SOLVER.IMS_PER_BATCH", "2"]
        cfg = load_config("quick_start", [*keys, "DATALOADER.NUM_WORKERS", "0"])
        batches = take(build_train_loader(cfg, lambda record: record), 3)
    finally:
        DatasetCatalog.remove("without_sizes")
        MetadataCatalog.pop("without_sizes", None)
    assert sorted(x["i"] for batch in batches for x in batch) == list(range(6))


def subset_stream(monkeypatch, world_size, state=None, start=0, n=40):
    """The images of all processes of a run on a quarter of 40 images, and its state at the end."""
    seen, seeds = [], np.random.randint(2**31, size=2).tolist()  # as Detectron2 draws them
    sampler, options = RandomSubsetTrainingSampler(n, 0.25, True, *seeds), {"seed": seeds[0]}
    for loader in each_rank(monkeypatch, world_size, sampler, n=n, grouping=False, **options):
        if state:
            assert loader.load_state_dict(state) == start
        seen.append([[x["i"] for x in batch] for batch in take(loader, 12)])
    return seen, loader.state_dict(start + 5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_random_subset_stays_the_same_when_resumed(monkeypatch, world_size):
    whole, state = subset_stream(monkeypatch, world_size)
    resumed, _ = subset_stream(monkeypatch, world_size, state, start=5)
    for before, after in zip(whole, resumed):
        assert before[5:] == after[:7]
    assert len({i for rank in whole + resumed for batch in rank for i in batch}) == 10


def test_bad_image_of_a_subset_is_replaced_by_one_of_the_subset():
    sampler = RandomSubsetTrainingSampler(40, 0.25, seed_shuffle=0, seed_subset=0)
    good = make_loader(n=40, sampler=sampler, grouping=False)
    subset = {x["i"] for batch in take(good, 20) for x in batch}
    mapper = functools.partial(bad, numbers=[min(subset)])
    loader = make_loader(n=40, sampler=sampler, grouping=False, mapper=mapper, on_bad_image="skip")
    assert {x["i"] for batch in take(loader, 40) for x in batch} == subset - {min(subset)}


def run_code(code, **kwargs):
    code = "from test_train_loader import *\n" + code
    return subprocess.Popen([sys.executable, "-c", code], cwd=os.path.dirname(__file__), **kwargs)


@pytest.mark.parametrize(
    "method, loader", [("fork", "train"), ("spawn", "evaluation"), ("forkserver", "evaluation")]
)
def test_workers_outlive_signals_to_every_process(method, loader):
    """At any time. In the end, the SIGTERM of the process that started them ends them."""
    code = (
        f"method, kind = {method!r}, {loader!r}\n"
        + """
import multiprocessing
multiprocessing.set_start_method(method)
start = multiprocessing.Process.start
def start_and_kill(worker):
    start(worker)
    kill(worker)
def kill(worker):
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
multiprocessing.Process.start = start_and_kill
if kind == "train":
    batches, expected = iter(make_loader(2)), take(make_loader(), 41)[1:]
else:
    data = torch.utils.data.DataLoader(range(41), num_workers=2, batch_size=None)
    batches, expected = iter(StoppableLoader(data)), list(range(1, 41))
next(batches)
workers = multiprocessing.active_children()
for worker in workers:
    kill(worker)
assert list(itertools.islice(batches, 40)) == expected
assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
"""
    )
    run = run_code(code, stderr=subprocess.PIPE, text=True)
    _, stderr = run.communicate(timeout=100)
    assert run.returncode == 0, stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for Linux")
def test_workers_of_a_launched_process_are_forked(monkeypatch):
    """With the launcher's own start method each would import PyTorch, for every evaluation."""
    monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    loader = torch.utils.data.DataLoader([0, 1, 2], num_workers=1, batch_size=None)
    loader.multiprocessing_context = "spawn"
    assert list(StoppableLoader(loader)) == [0, 1, 2]
    assert loader.multiprocessing_context.get_start_method() == "fork"


class OpenCVThreads(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return cv2.getNumThreads()


def test_workers_are_forked_without_opencvs_threads():
    """To end them there, as the mapper does, would wait for the parent's threads forever."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        loader = torch.utils.data.DataLoader(OpenCVThreads(), num_workers=1, batch_size=None)
        assert list(StoppableLoader(loader)) == [1] and cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_workers_end_when_the_training_process_is_killed():
    code = """
import multiprocessing
batches = iter(make_loader(2))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
time.sleep(100)
"""
    run = run_code(code, stdout=subprocess.PIPE, text=True)
    workers = [Path(f"/proc/{pid}/stat") for pid in run.stdout.readline().split()]
    assert len(workers) == 2 and all(path.exists() for path in workers)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 2  # they would hold the lock on OUTPUT_DIR
    # In some containers init reaps no zombies.
    while any(path.exists() and ") Z " not in path.read_text() for path in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_image_stops(num_workers):
    with pytest.raises(BadImageError, match=r"^The image [34]\.jpg is empty\.$"):
        take(make_loader(num_workers, mapper=bad), 10)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_counted_and_logged_once(num_workers, caplog):
    caplog.set_level(logging.WARNING)
    loader = make_loader(num_workers, mapper=bad, on_bad_image="skip")
    batches = take(loader, 25)
    assert [len(batch) for batch in batches] == [2] * 25
    assert not {x["i"] for batch in batches for x in batch} & {3, 4}
    assert not any("bad_images" in x for batch in batches for x in batch)
    # 5 epochs with two bad images, drawn again as replacements now and then.
    assert loader.num_bad_images >= 10
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and sum("3.jpg is empty" in m for m in messages) == 1
    assert "(2 bad files so far)" in messages[1]
    # The replacements do not depend on the number of workers.
    assert batches == take(make_loader(mapper=bad, on_bad_image="skip"), 25)


def test_ten_bad_images_in_a_row_stop():
    with pytest.raises(UserError, match=r"9 images that were drawn instead are bad, too"):
        mapper = functools.partial(bad, numbers=range(10))
        take(make_loader(2, mapper=mapper, on_bad_image="skip"), 1)

"""Detectron2's training loader, which can start at any iteration."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler


class TrainLoader:
    """
    An endless iterable of batches, lists of mapped dicts, that depends on nothing but the dataset,
    the seed, the iteration and the number of processes: what it gives from `start_iter` on is what
    it would have given there without interruption, augmentation included, with any number of
    workers.

    It gives the images of Detectron2's sampler in its order, and groups them by aspect ratio as
    :class:`AspectRatioGroupedDataset` does, but by the sizes in the dataset.
    """

    def __init__(
        self,
        dataset: list[dict[str, Any]],
        *,
        sampler: Sampler,
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        batch_size: int,
        aspect_ratio_grouping: bool,
        num_workers: int,
        seed: int,
    ):
        """
        Args:
            dataset, sampler, mapper: as for Detectron2's :func:`build_detection_train_loader`. The
                mapper draws from the generators of `random` and NumPy.
            batch_size: of this process.
            aspect_ratio_grouping: whether a batch is to have upright or lying images alone.
            num_workers: worker processes; 0 for none.
            seed: of the augmentation.
        """
        groups = [
            int(aspect_ratio_grouping and record["width"] > record["height"]) for record in dataset
        ]
        self.start_iter = 0
        self._batches = _BatchSampler(sampler, groups, batch_size)
        self._dataset = _SeededDataset(DatasetFromList(dataset, copy=False), mapper, seed)
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self._batches.start = self.start_iter
        return iter(
            DataLoader(
                self._dataset,
                batch_sampler=self._batches,
                num_workers=self._num_workers,
                collate_fn=trivial_batch_collator,
                generator=torch.Generator(),  # else it draws from the one of the process
            )
        )


class _BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (position in the stream of the sampler, index into the dataset)."""

    def __init__(self, sampler: Sampler, groups: list[int], batch_size: int):
        self.sampler, self.groups, self.batch_size = sampler, groups, batch_size
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        buckets: tuple[list[tuple[int, int]], ...] = ([], [])
        for key in enumerate(self.sampler):
            bucket = buckets[self.groups[key[1]]]
            bucket.append(key)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()


class _SeededDataset(Dataset):
    """Maps an image with generators that are seeded by its position in the stream."""

    def __init__(self, dataset: Dataset, mapper: Callable, seed: int):
        self.dataset, self.mapper, self.seed = dataset, mapper, (seed, comm.get_rank())

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        states = random.getstate(), np.random.get_state()
        seed = derive_seed(*self.seed, position)
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.mapper(self.dataset[index])
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def derive_seed(*numbers: int) -> int:
    """
    Returns:
        A seed, less than 2**32, that is as good as independent of those of other numbers.
    """
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])


def build_train_loader(cfg: CfgNode, mapper: Callable) -> TrainLoader:
    """
    Args:
        cfg: reads ``DATASETS.TRAIN``, ``DATALOADER.*``, ``SOLVER.IMS_PER_BATCH`` and ``SEED``.
        mapper: see :class:`TrainLoader`.
    """
    parts = _train_loader_from_config(cfg, mapper)
    batch_size = parts.pop("total_batch_size") // comm.get_world_size()
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return TrainLoader(parts.pop("dataset"), batch_size=batch_size, seed=seed, **parts)

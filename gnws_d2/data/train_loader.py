"""Detectron2's training loader, resumable at any iteration."""

import itertools
import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.samplers import RandomSubsetTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.errors import UserError
from .augmentation import paste_objects
from .dataset_mapper import BadImageError
from .workers import iterate

_Key = tuple[int, int]  # of an image in the stream: its position there and in the dataset
_MAX_REPLACEMENTS = 10


class TrainLoader:
    """
    An endless iterable of batches, which are lists of mapped dicts. After :meth:`load_state_dict`
    the batches are those of a run that was not interrupted, bit for bit, with any number of
    workers. With another number of processes or another batch size the loader continues at the same
    number of images seen.

    Detectron2's sampler orders the images. They are grouped by aspect ratio as in
    :class:`AspectRatioGroupedDataset`, but by the sizes in the dataset.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sampler: Sampler,
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        batch_size: int,
        aspect_ratio_grouping: bool,
        num_workers: int,
        seed: int,
        on_bad_image: str = "stop",
        copy_paste: float = 0.0,
    ):
        """
        Args:
            dataset, mapper, aspect_ratio_grouping, num_workers: see
                :func:`build_detection_train_loader`. The mapper draws from `random` and
                `np.random`. Images without width and height count as upright.
            sampler: one of Detectron2's, which yields the indices of all processes.
            batch_size: images per batch of this process.
            seed: of the order of the images and of the augmentation.
            on_bad_image: ``INPUT.ON_BAD_IMAGE``: "skip" replaces an image for which the mapper
                raises :class:`BadImageError` by another one.
            copy_paste: ``INPUT.COPY_PASTE``: the probability of :func:`paste_objects`.
        """
        self.seed = seed
        self.num_bad_images = 0  # in this process, repetitions included
        self._dataset = _SeededDataset(dataset, mapper, on_bad_image, copy_paste)
        self._sampler: Any = sampler
        records = (dataset[i] for i in range(len(dataset)))
        is_wide = (r.get("width", 0) > r.get("height", 0) for r in records)
        self._groups = [aspect_ratio_grouping and wide for wide in is_wide]
        self._batch_size = batch_size
        self._num_workers = num_workers
        # The iteration and the position in the stream where this number of processes and this
        # batch size began, and the number of batches to skip from there.
        self._first_iteration = self._position = self._skip = 0
        self._bad_images: set[str] = set()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A resumed run has the seed of its first start.
        self._sampler._seed = self._dataset.seed = self.seed
        if isinstance(self._sampler, RandomSubsetTrainingSampler):  # draws by another seed
            generator = torch.Generator().manual_seed(derive_seed(self.seed))
            order = torch.randperm(self._sampler._size, generator=generator)
            subset = order[: self._sampler._size_subset]
            self._sampler._indexes_subset, self._dataset.indices = subset, subset.tolist()
        loader = DataLoader(
            self._dataset,
            batch_sampler=itertools.islice(self._batches(), self._skip, None),  # type: ignore
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            generator=torch.Generator(),  # instead of the one of the process
        )
        for batch in iterate(loader):
            for message in itertools.chain(*(d.pop("bad_images", ()) for d in batch)):
                self.num_bad_images += 1
                if message not in self._bad_images:
                    self._bad_images.add(message)
                    logging.getLogger(__name__).warning(
                        f"{message} Another image replaces it, as INPUT.ON_BAD_IMAGE is skip "
                        f"({len(self._bad_images)} bad files so far)."
                    )
            yield batch

    def _batches(self) -> Iterator[list[_Key]]:
        start, step = self._position + comm.get_rank(), comm.get_world_size()
        buckets: dict[bool, list[_Key]] = defaultdict(list)
        for key in itertools.islice(enumerate(self._sampler), start, None, step):
            bucket = buckets[self._groups[key[1]]]
            bucket.append(key)
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()

    def state_dict(self, iteration: int) -> dict[str, Any]:
        """Return the state after `iteration` batches, those before a resumption included."""
        return {
            "seed": self.seed, "world_size": comm.get_world_size(), "batch_size": self._batch_size,
            "iteration": iteration, "first_iteration": self._first_iteration,
            "position": self._position,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """
        Continue after the batches that had been used when `state` was taken. Return the iteration
        to start from: the number of images seen, in batches of the present size.
        """
        self.seed, iteration = state["seed"], state["iteration"]
        self._first_iteration, self._position = state["first_iteration"], state["position"]
        before = state["world_size"], state["batch_size"]
        now = comm.get_world_size(), self._batch_size
        if before != now:
            logging.getLogger(__name__).warning(
                f"The run had {before[0]} processes with {before[1]} images each. It continues "
                f"with {now[0]} processes with {now[1]} images each, at the same number of images "
                "seen."
            )
            self._position += (iteration - self._first_iteration) * math.prod(before)
            # In each process less than a batch may have been waiting for images of its group.
            self._position += before[0] * (before[1] - 1)
            iteration = iteration * math.prod(before) // math.prod(now)
            self._first_iteration = iteration
        self._skip = iteration - self._first_iteration
        return iteration


class _SeededDataset(Dataset):
    """Maps each image with `random` and `np.random` seeded by its position in the stream."""

    def __init__(self, dataset: Any, mapper: Callable, on_bad_image: str, copy_paste: float):
        self.dataset, self.mapper, self.skip = dataset, mapper, on_bad_image == "skip"
        self.copy_paste = copy_paste
        self.seed = 0
        self.indices: Sequence[int] = range(len(dataset))  # of the images to train on

    def __getitem__(self, key: _Key) -> dict[str, Any]:
        position, index = key
        states = random.getstate(), np.random.get_state()
        seed = derive_seed(self.seed, position)
        random.seed(seed)
        np.random.seed(seed)
        try:
            record = self._map(index)
            if random.random() >= self.copy_paste:
                return record
            other = self._map(random.choice(self.indices), record.get("bad_images", ()))
            record = paste_objects(record, other)
            return {**record, "bad_images": other.get("bad_images", ())}
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _map(self, index: int, bad_images: tuple[str, ...] = ()) -> dict[str, Any]:
        try:
            record = self.mapper(self.dataset[index])
        except BadImageError as e:
            if not self.skip:
                raise
            bad_images += (str(e),)
            if len(bad_images) == _MAX_REPLACEMENTS:
                raise UserError(
                    f"{e} {_MAX_REPLACEMENTS - 1} images that were drawn instead are bad, too: "
                    "INPUT.ON_BAD_IMAGE skip is for single bad images."
                ) from e
            return self._map(random.choice(self.indices), bad_images)
        return {**record, "bad_images": bad_images} if bad_images else record


def derive_seed(*numbers: int) -> int:
    """Return a seed, less than 2**32, practically independent of the seeds of other numbers."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])


def build_train_loader(cfg: CfgNode, mapper: Callable) -> TrainLoader:
    """Build the loader of ``DATASETS.TRAIN``, as ``DATALOADER.*`` says."""
    parts = _train_loader_from_config(cfg, mapper)
    # All processes read the same stream and take their parts of it.
    parts["sampler"]._rank, parts["sampler"]._world_size = 0, 1
    return TrainLoader(
        DatasetFromList(parts.pop("dataset"), copy=False),
        batch_size=parts.pop("total_batch_size") // comm.get_world_size(),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        on_bad_image=cfg.INPUT.ON_BAD_IMAGE,
        copy_paste=cfg.INPUT.COPY_PASTE,
        **parts,
    )

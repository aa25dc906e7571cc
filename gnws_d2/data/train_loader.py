"""Detectron2's training loader, which can start at any iteration."""

import contextlib
import itertools
import logging
import os
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.errors import UserError
from .dataset_mapper import BadImageError

# An element of the stream of all processes: its position there, and an index into the dataset.
_Key = tuple[int, int]

_MAX_REPLACEMENTS = 10
_HAS_SIGWAITINFO = hasattr(signal, "sigwaitinfo")  # not on macOS


class TrainLoader:
    """
    An endless iterable of batches, lists of mapped dicts, that depends on nothing but the dataset,
    the seed, the iteration and the number of processes: what it gives after
    :meth:`load_state_dict` is what it would have given there without interruption, augmentation
    included, with any number of workers.

    A run may go on with another number of processes or another batch size: from there on it gives
    the images that the run so far has left of the stream, so that all images go on to be seen
    equally often.

    The stream is that of Detectron2's sampler in its order. Images are grouped by aspect ratio as
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
        on_bad_image: str = "stop",
    ):
        """
        Args:
            dataset, sampler, mapper: as for Detectron2's :func:`build_detection_train_loader`. The
                mapper draws from the generators of `random` and NumPy.
            batch_size: of this process.
            aspect_ratio_grouping: whether a batch is to have upright or lying images alone.
            num_workers: worker processes; 0 for none.
            seed: of the order of the images and of the augmentation.
            on_bad_image: "stop" raises the mapper's :class:`BadImageError`; "skip" puts another
                image in its place (``INPUT.ON_BAD_IMAGE``).
        """
        groups = [
            int(aspect_ratio_grouping and record["width"] > record["height"]) for record in dataset
        ]
        self.seed = seed
        self.num_bad_images = 0  # of this process, each time one came
        self._batches = _BatchSampler(sampler, groups, batch_size)
        self._dataset = _SeededDataset(DatasetFromList(dataset, copy=False), mapper, on_bad_image)
        self._num_workers = num_workers
        self._bad_files: set[str] = set()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # That of a resumed run may not be the one of the config.
        self._batches.sampler._seed = self._dataset.seed = self.seed
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._batches,
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            generator=torch.Generator(),  # else it draws from the one of the process
            worker_init_fn=_end_for_parent_alone,
        )
        with _sigterm_blocked():  # workers inherit it, and have it from their first moment
            batches = iter(loader)
        for batch in batches:
            for record in batch:
                for file_name, message in record.pop("bad_images", ()):
                    self._count_bad_image(file_name, message)
            yield batch

    def _count_bad_image(self, file_name: str, message: str) -> None:
        self.num_bad_images += 1
        if file_name not in self._bad_files:
            self._bad_files.add(file_name)
            logging.getLogger(__name__).warning(
                f"{message} Another image takes its place, as INPUT.ON_BAD_IMAGE is skip "
                f"({len(self._bad_files)} bad files so far)."
            )

    def state_dict(self, iteration: int) -> dict[str, Any]:
        """
        Args:
            iteration: how many batches of a run have been used, those before it was resumed
                included.
        """
        return {"seed": self.seed, "parts": self._batches.parts_until(iteration)}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """
        Go on after the batches that were used when `state` was taken.

        Returns:
            The iteration to start from: as many images as the run has seen, in batches of now.
        """
        self.seed = state["seed"]
        return self._batches.resume([tuple(part) for part in state["parts"]])


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Let SIGTERM wait until the end of a block, and for good in processes that start there."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM] if _HAS_SIGWAITINFO else [])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_for_parent_alone(worker_id: int) -> None:
    """
    Have SIGTERM, which is blocked, end this worker only if the training process has sent it.
    Schedulers send it to every process, and it is for the training process to act on it.
    """
    if not _HAS_SIGWAITINFO:
        return

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _BatchSampler(Sampler[list[_Key]]):
    """
    The batches of this process. A run has parts, each (number of processes, batch size of a
    process, iterations); a new one begins where it is resumed with another of the first two.
    """

    def __init__(self, sampler: Sampler, groups: list[int], batch_size: int):
        self.sampler: Any = sampler
        self.groups = groups
        self.world_size, self.batch_size = comm.get_world_size(), batch_size
        self.earlier: list[tuple[int, int, int]] = []
        self.first = 0  # iteration at which this part begins
        self.start = 0  # batches of this part to pass over

    def parts_until(self, iteration: int) -> list[tuple[int, int, int]]:
        part = (self.world_size, self.batch_size, iteration - self.first)
        return [*self.earlier, part] if part[2] else self.earlier

    def resume(self, parts: list[tuple[int, int, int]]) -> int:
        self.start = 0
        if parts and parts[-1][:2] == (self.world_size, self.batch_size):
            *parts, (_, _, self.start) = parts
        elif parts:
            logging.getLogger(__name__).warning(
                f"The run had {parts[-1][0]} processes with {parts[-1][1]} images each, and goes "
                f"on with {self.world_size} with {self.batch_size}, from the images that are left."
            )
        self.earlier = parts
        images = sum(world_size * batch_size * n for world_size, batch_size, n in parts)
        self.first = images // (self.world_size * self.batch_size)
        return self.first + self.start

    def __iter__(self) -> Iterator[list[_Key]]:
        stream: Iterator[_Key] = enumerate(self.sampler)
        for part in self.earlier:
            stream = self._left(stream, *part)
        mine = itertools.islice(stream, comm.get_rank(), None, self.world_size)
        return itertools.islice(self._batches(mine), self.start, None)

    def _batches(self, stream: Iterator[_Key]) -> Iterator[list[_Key]]:
        buckets: dict[int, list[_Key]] = defaultdict(list)
        for key in stream:
            bucket = buckets[self.groups[key[1]]]
            bucket.append(key)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()

    def _left(
        self, stream: Iterator[_Key], world_size: int, batch_size: int, iterations: int
    ) -> Iterator[_Key]:
        """What the processes of a part of the run leave of `stream`, in its order."""
        buckets: dict[tuple[int, int], list[_Key]] = defaultdict(list)
        todo = [iterations] * world_size
        for rank, key in zip(itertools.cycle(range(world_size)), stream):
            bucket = buckets[rank, self.groups[key[1]]]
            bucket.append(key)
            if todo[rank] and len(bucket) == batch_size:
                bucket.clear()
                todo[rank] -= 1
                if not any(todo):
                    break
        yield from sorted(itertools.chain(*buckets.values()))
        yield from stream


class _SeededDataset(Dataset):
    """Maps an image with generators that are seeded by its position in the stream."""

    def __init__(self, dataset: DatasetFromList, mapper: Callable, on_bad_image: str):
        self.dataset, self.mapper, self.skip = dataset, mapper, on_bad_image == "skip"
        self.seed = 0

    def __getitem__(self, key: _Key) -> dict[str, Any]:
        position, index = key
        bad_images = []
        with _seeded(derive_seed(self.seed, position)):
            while True:
                try:
                    record = self.mapper(self.dataset[index])
                except BadImageError as e:
                    if not self.skip:
                        raise
                    bad_images.append((self.dataset[index]["file_name"], str(e)))
                    if len(bad_images) == _MAX_REPLACEMENTS:
                        raise UserError(
                            f"{e} So are {_MAX_REPLACEMENTS - 1} others that were drawn in its "
                            "place: INPUT.ON_BAD_IMAGE skip is for single bad images."
                        ) from e
                    index = random.randrange(len(self.dataset))
                else:
                    return {**record, "bad_images": bad_images} if bad_images else record


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators of `random` and NumPy for a block, and leave them as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
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
        cfg: reads ``DATASETS.TRAIN``, ``DATALOADER.*``, ``SOLVER.IMS_PER_BATCH``,
            ``INPUT.ON_BAD_IMAGE`` and ``SEED``.
        mapper: see :class:`TrainLoader`.
    """
    parts = _train_loader_from_config(cfg, mapper)
    # The stream of all processes, of which the loader takes what is for this one.
    parts["sampler"]._rank, parts["sampler"]._world_size = 0, 1
    return TrainLoader(
        parts.pop("dataset"),
        batch_size=parts.pop("total_batch_size") // comm.get_world_size(),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        on_bad_image=cfg.INPUT.ON_BAD_IMAGE,
        **parts,
    )

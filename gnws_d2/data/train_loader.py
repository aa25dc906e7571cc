"""Detectron2's training loader, resumable at any iteration."""

import contextlib
import itertools
import logging
import math
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.samplers import RandomSubsetTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..utils.errors import UserError
from ..utils.process import num_usable_cores, release_freed_memory
from .dataset_mapper import BadImageError, image_size
from .workers import iterate

# An element of the stream: its position there, and an index into the dataset.
_Key = tuple[int, int]

_MAX_REPLACEMENTS = 10
_CLASSES = ("thing_classes", "thing_dataset_id_to_contiguous_id")  # of metadata


class TrainLoader:
    """
    An endless iterable of batches, which are lists of mapped dicts. After :meth:`load_state_dict`
    it continues as without interruption, bit for bit, with any number of workers. With another
    number of processes or batch size it continues at the same number of images seen.

    The order of the images comes from Detectron2's sampler. They are grouped by aspect ratio as by
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
    ):
        """
        Args:
            dataset: a list, or a map-style dataset, of Detectron2's dataset dicts.
            mapper, aspect_ratio_grouping, num_workers: see
                :func:`build_detection_train_loader`. The mapper uses `random` and `np.random`.
                Images without width and height in `dataset` are grouped with the upright ones.
            sampler: one of Detectron2's, which yields the indices of all processes.
            batch_size: images per batch of this process.
            seed: seed of the order of the images and of the augmentation.
            on_bad_image: "stop" raises the mapper's :class:`BadImageError`; "skip" puts another
                image in its place (``INPUT.ON_BAD_IMAGE``).
        """
        self.seed = seed
        self.num_bad_images = 0  # of this process, each time one came
        self._dataset = _SeededDataset(dataset, mapper, on_bad_image)
        self._sampler: Any = sampler
        records = (dataset[i] for i in range(len(dataset)))
        self._groups = [
            aspect_ratio_grouping and r.get("width", 0) > r.get("height", 0) for r in records
        ]
        self._batch_size = batch_size
        self._num_workers = num_workers
        # The iteration and position in the stream since which the run has had this number of
        # processes and batch size, and the number of batches to skip from there.
        self._first_iteration = self._position = self._skip = 0
        self._bad_images: set[str] = set()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self._seed_sampler()
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
                        f"{message} Another image takes its place, as INPUT.ON_BAD_IMAGE is skip "
                        f"({len(self._bad_images)} bad files so far)."
                    )
            yield batch

    def _seed_sampler(self) -> None:
        """Seed the sampler; a resumed run has the seed of its first start."""
        self._sampler._seed = self._dataset.seed = self.seed
        if isinstance(self._sampler, RandomSubsetTrainingSampler):  # draws by another seed
            generator = torch.Generator().manual_seed(derive_seed(self.seed))
            order = torch.randperm(self._sampler._size, generator=generator)
            subset = order[: self._sampler._size_subset]
            self._sampler._indexes_subset, self._dataset.indices = subset, subset.tolist()

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
        """
        Args:
            iteration: number of batches used so far, including those before the run was resumed.
        """
        return {
            "seed": self.seed,
            "world_size": comm.get_world_size(),
            "batch_size": self._batch_size,
            "iteration": iteration,
            "first_iteration": self._first_iteration,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """
        Go on after the batches that had been used when `state` was taken.

        Returns:
            The iteration to start from: the number of images seen, in batches of now.

        Raises:
            UserError: if the state is of an older version.
        """
        if "position" not in state:
            raise UserError("--resume needs a checkpoint of this version of gnws_d2.")
        self.seed, iteration = state["seed"], state["iteration"]
        self._first_iteration, self._position = state["first_iteration"], state["position"]
        before = state["world_size"], state["batch_size"]
        now = comm.get_world_size(), self._batch_size
        if before != now:
            logging.getLogger(__name__).warning(
                f"The run had {before[0]} processes with {before[1]} images each, and continues "
                f"with {now[0]} with {now[1]}, at the same number of images seen."
            )
            self._position += (iteration - self._first_iteration) * math.prod(before)
            # Each process may hold back less than a batch, which waits for images of its shape.
            self._position += before[0] * (before[1] - 1)
            iteration = iteration * math.prod(before) // math.prod(now)
            self._first_iteration = iteration
        self._skip = iteration - self._first_iteration
        return iteration


class _SeededDataset(Dataset):
    """Maps an image with generators seeded by its position in the stream."""

    def __init__(self, dataset: Any, mapper: Callable, on_bad_image: str):
        self.dataset, self.mapper, self.skip = dataset, mapper, on_bad_image == "skip"
        self.seed = 0
        self.indices: Sequence[int] = range(len(dataset))  # of the images to train on

    def __getitem__(self, key: _Key) -> dict[str, Any]:
        position, index = key
        states = random.getstate(), np.random.get_state()
        seed = derive_seed(self.seed, position)
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self._map(index)
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
                    f"{e} So are {_MAX_REPLACEMENTS - 1} others that were drawn in its place: "
                    "INPUT.ON_BAD_IMAGE skip is for single bad images."
                ) from e
            return self._map(random.choice(self.indices), bad_images)
        return {**record, "bad_images": bad_images} if bad_images else record


def derive_seed(*numbers: int) -> int:
    """
    Returns:
        A seed, less than 2**32, that is practically independent of the seeds of other numbers.
    """
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])


def load_train_set(cfg: CfgNode) -> DatasetFromList:
    """
    Load ``DATASETS.TRAIN``, with its metadata. Of several processes on a machine the first does,
    and all map the result into their memory from a temporary file: it takes memory once.
    """
    metadata: dict[str, dict[str, Any]] = {}
    dataset, path = None, ""
    if comm.get_local_rank() == 0:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            _fill_in_sizes(records)
        dataset = DatasetFromList(records, copy=False)
        del records
        release_freed_memory()
    if comm.get_world_size() == 1:
        return dataset
    if comm.get_local_rank() == 0:
        for name in cfg.DATASETS.TRAIN:
            known = MetadataCatalog.get(name).as_dict()
            metadata[name] = {key: known[key] for key in _CLASSES if key in known}
        handle, path = tempfile.mkstemp(prefix="gnws_d2_train_set_")
        os.close(handle)
        torch.save((dataset, metadata), path)
    path = comm.all_gather(path)[comm.get_rank() - comm.get_local_rank()]
    dataset, metadata = torch.load(path, weights_only=False, mmap=True)
    comm.synchronize()
    if comm.get_local_rank() == 0:
        os.remove(path)
    for name, classes in metadata.items():
        MetadataCatalog.get(name).set(**classes)
    return dataset


def _fill_in_sizes(records: list[dict[str, Any]]) -> None:
    """Read the sizes of images that have none in their dataset, to group them by aspect ratio."""

    def fill_in(record: dict[str, Any]) -> None:
        with contextlib.suppress(BadImageError):  # ON_BAD_IMAGE is for when it is trained on
            record["width"], record["height"] = image_size(record["file_name"])

    unknown = [record for record in records if "width" not in record or "height" not in record]
    with ThreadPoolExecutor(num_usable_cores()) as pool:
        list(pool.map(fill_in, unknown))


def build_train_loader(cfg: CfgNode, mapper: Callable) -> TrainLoader:
    """
    Args:
        cfg: ``DATASETS.TRAIN``, ``DATALOADER.*``, ``SOLVER.IMS_PER_BATCH``, ``INPUT.ON_BAD_IMAGE``
            and ``SEED`` are used.
        mapper: see :class:`TrainLoader`.
    """
    parts = _train_loader_from_config(cfg, mapper, dataset=load_train_set(cfg))
    # All processes read the same stream and take their parts of it.
    parts["sampler"]._rank, parts["sampler"]._world_size = 0, 1
    return TrainLoader(
        parts.pop("dataset"),
        batch_size=parts.pop("total_batch_size") // comm.get_world_size(),
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        on_bad_image=cfg.INPUT.ON_BAD_IMAGE,
        **parts,
    )

"""
What Detectron2 has added since v0.6, its last release. This package supports all commits from that
release to the one in requirements.txt; all call themselves 0.6.
"""

from typing import Any

import torch.distributed as dist
from detectron2.utils import comm

# Detectron2 after v0.6 (2022-01) launches several processes without a GPU.
LAUNCHES_ON_CPU = hasattr(comm, "create_local_process_group")


def create_local_process_group(num_workers_per_machine: int) -> None:
    """:func:`comm.create_local_process_group`, which Detectron2 v0.6 has within its launcher."""
    if LAUNCHES_ON_CPU:
        comm.create_local_process_group(num_workers_per_machine)
        return
    for first in range(0, comm.get_world_size(), num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group: Any = dist.new_group(ranks)
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group

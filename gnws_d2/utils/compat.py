"""
What is newer than Detectron2 v0.6, its last release: this package works from there to the commit of
requirements.txt. All of them call themselves 0.6.
"""

import importlib.metadata
import json
from typing import Any

import detectron2
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


def detectron2_version() -> str:
    """
    Return the installed version of Detectron2, with the commit if that is known, as "0.6+02b5c4e".

    tools/detectron2_wheel.py puts it into the version, and pip, for git+URL, beside it.
    """
    try:
        distribution = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:  # a checkout in PYTHONPATH
        return detectron2.__version__
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id", "")
    return f"{distribution.version}+{commit[:7]}" if commit else distribution.version

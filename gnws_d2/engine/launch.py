"""Processes that Detectron2's options or torchrun start, and that end together."""

import argparse
import atexit
import contextlib
import logging
import multiprocessing.util
import os
import pickle
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine.launch import _distributed_worker
from detectron2.utils import comm
from torch.multiprocessing import start_processes

from ..utils.errors import (
    PeerError,
    RunError,
    UserError,
    error_of_traceback,
    is_peer_error,
    log_without_traceback,
)
from .machines import (
    check_machines,
    choose_gloo_interface,
    describe_job,
    join_store,
    meet,
    parse_dist_url,
    share_cause,
    watching_machines,
)

TERMINATED = 128 + signal.SIGTERM  # the exit status of a run that was asked to end, and has
_GRACE = 5.0  # seconds that a process waits for the cause, when what it sees may be its effect


def launch(main: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    """
    Run ``main(args)`` in every process: in this one, if torchrun has started it or there is only
    one, else in ``--num-gpus`` new ones, after all machines have come and agree.

    SIGTERM is forwarded to the new processes, and their exit status :data:`TERMINATED` is ours.

    Args:
        main: a function of a module.
        cfg: of :func:`get_config`, which :func:`check_setup` has checked.
        args: of ``train_net.py``.

    Returns:
        What `main` returns, if it runs in this process.

    Raises:
        UserError: if the machines do not find each other, or differ, or `main` raises one.
        RunError: if a process or a machine dies. All processes on this machine have then ended.
    """
    if cfg.MODEL.DEVICE == "cpu":
        # Without a GPU in sight Detectron2's launcher takes Gloo.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.num_gpus)))
    if dist.is_torchelastic_launched():
        if args.num_machines > 1:
            choose_gloo_interface(os.environ["MASTER_ADDR"])
        return _worker(int(os.environ["LOCAL_RANK"]), main, cfg, args)
    if args.num_gpus * args.num_machines == 1:
        return main(args)

    host, port = ("127.0.0.1", 0) if args.dist_url == "auto" else parse_dist_url(args.dist_url)
    store = join_store(host, port, cfg, args)
    try:
        if args.num_machines > 1:
            meet(store, cfg, args)
            choose_gloo_interface(host)
        # As torchrun does for the processes that it starts.
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True"
        )
        # A store that ends, after its machine has said why, is a stack of C++ functions otherwise.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        _run_workers(main, cfg, args)
    except UserError as e:
        if args.num_machines > 1:
            share_cause(e, store, args)
        raise


def torchrun_options() -> dict[str, int]:
    """
    Returns:
        ``num_gpus``, ``num_machines`` and ``machine_rank``, if torchrun has started this process.
    """
    if not dist.is_torchelastic_launched():
        return {}
    names = {
        "num_gpus": "LOCAL_WORLD_SIZE",
        "num_machines": "GROUP_WORLD_SIZE",
        "machine_rank": "GROUP_RANK",
    }
    return {option: int(os.environ[name]) for option, name in names.items()}


def _run_workers(main: Callable, cfg: CfgNode, args: argparse.Namespace) -> None:
    def forward(*_: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()

    default = signal.signal(signal.SIGTERM, forward)
    context = start_processes(_worker, (main, cfg, args), nprocs=args.num_gpus, join=False)
    workers = context.processes
    try:
        # Those that were asked to end are left the time to write a checkpoint.
        while True:
            # Before their errors are read, as one may end in between.
            running = [p.sentinel for p in workers if p.exitcode is None]
            if (errors := _read_errors(context, args)) or not running:
                break
            # A process that has failed may hang where it destroys its process groups.
            connection.wait(running, timeout=1)
    finally:
        for process in workers:
            process.kill()
            process.join()
        signal.signal(signal.SIGTERM, default)
    if errors:
        raise next((e for e in errors if not isinstance(e, PeerError)), errors[0])
    if any(p.exitcode == TERMINATED for p in workers):
        sys.exit(TERMINATED)


def _read_errors(context: Any, args: argparse.Namespace) -> list[BaseException]:
    return [e for i in range(args.num_gpus) if (e := _read_error(context, i, args))]


def _read_error(context: Any, local_rank: int, args: argparse.Namespace) -> BaseException | None:
    status = context.processes[local_rank].exitcode
    who = f"process {local_rank} (rank {args.machine_rank * args.num_gpus + local_rank})"
    # Written before the process closes its connections, and ends.
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):  # not there, or in part
        with open(context.error_files[local_rank], "rb") as f:
            return error_of_traceback(pickle.load(f), who)
    if status in (None, 0, TERMINATED):
        return None
    if status == -signal.SIGTERM:  # before it could do more than end
        return SystemExit(TERMINATED)
    if status > 0:  # it has said why
        return SystemExit(status)
    kill = ", as by the system when memory runs out" if status == -signal.SIGKILL else ""
    return RunError(f"The {who} was ended by {signal.Signals(-status).name}{kill}.")


def _worker(local_rank: int, main: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    log_without_traceback()
    result = []
    try:
        _distributed_worker(
            local_rank,
            lambda: result.append(_run(local_rank, main, cfg, args)),
            args.num_gpus * args.num_machines,
            args.num_gpus,
            args.machine_rank,
            f"{_SCHEME}://",
            (),
            timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT),
        )
    except SystemExit as e:
        if isinstance(e.code, int):
            atexit.register(_leave, e.code)
        raise
    except Exception as e:
        if not is_peer_error(e):
            raise
        # By then the launcher has seen, and told, what happened to the other, if it was here.
        time.sleep(_GRACE)
        reason = re.sub(r"^\[.*?\] *|\. This is .*", "", " ".join(str(e).split()))
        raise PeerError(
            f"Rank {comm.get_rank()} has lost another, whose machine says why. ({reason}; "
            f"DISTRIBUTED.TIMEOUT is {cfg.DISTRIBUTED.TIMEOUT} s.)"
        ) from e
    return result[0]


def _run(local_rank: int, main: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    timeout = timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT)
    # Detectron2 makes them with PyTorch's default.
    for group in (comm.get_local_process_group(), comm._get_global_gloo_group()):
        dist.set_timeout(timeout, group)
    if dist.is_torchelastic_launched():
        here = (args.machine_rank, socket.gethostname(), describe_job(cfg, args))
        check_machines(list({each[0]: each for each in comm.all_gather(here)}.values()))
        # A machine that did not fail itself is not told that the others have started again.
        args.resume = any(comm.all_gather(args.resume))
    run = comm.all_gather(time.time())[0]
    if args.num_machines == 1 or local_rank > 0:
        result = main(args)
    else:
        result = watching_machines(f"run {run}", lambda: main(args), cfg, args)
    atexit.register(_leave, 0)
    return result


def _leave(status: int) -> None:
    """
    End this process without the destructors of C++: those of PyTorch's process groups abort it now
    and then ("terminate called without an active exception"), after all work is done.
    """
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # ends loader workers
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """
    That of ``env://``, but torchrun has one store for all its starts, in which the keys of the
    start before would be taken for those of this one.
    """
    query = dict(parse_qsl(urlsplit(url).query))
    rank, world_size = int(query["rank"]), int(query["world_size"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True",
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    start = _agree_on_start(store, rank, world_size, time.monotonic() + timeout.total_seconds())
    yield dist.PrefixStore(start, store), rank, world_size


def _agree_on_start(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """A name for this start: of rank 0, which answers each process by the name it gives itself."""
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", own)
    while time.monotonic() < deadline:
        if rank > 0:
            name, _, start = store.get(f"answer/{rank}").decode().partition(" ")
            if name == own:
                store.add(start, 1)
                return start
        elif store.add(own, 0) == world_size - 1:
            return own
        else:
            for other in range(1, world_size):
                if store.check([f"hello/{other}"]):
                    name = store.get(f"hello/{other}").decode()
                    store.set(f"answer/{other}", f"{name} {own}")
        time.sleep(0.1)
    raise dist.DistStoreError("not all processes have started")


_SCHEME = "gnws-d2"
dist.register_rendezvous_handler(_SCHEME, _rendezvous)

"""Process setup that neither Detectron2's launcher nor torchrun provides."""

import argparse
import contextlib
import glob
import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import FrameType
from typing import IO

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..layers.kernels import choice
from ..utils.compat import create_local_process_group
from ..utils.errors import RunError, UserError
from ..utils.signals import catch_signals

_LOCK_TIMEOUT = 90  # seconds: NFS keeps the lock of a machine that is gone until its lease ends


def join_torchrun(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Join the processes that torchrun has started. All resume if any of them was restarted."""
    cuda = cfg.MODEL.DEVICE != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT)
    )
    create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    args.resume = any(comm.all_gather(args.resume))


def leave_process_group() -> None:
    """
    End the threads of Gloo. A thread that frees a tensor while the interpreter shuts down aborts
    the process ("terminate called without an active exception").

    Wait first, so that a process that fails because another has ended does so well after it: the
    launcher shows the error of the first process that it sees.
    """
    time.sleep(1)
    if dist.get_backend() == "gloo":
        # Detectron2's references would keep the groups alive.
        comm._get_global_gloo_group.cache_clear()
        comm._LOCAL_PROCESS_GROUP = None
        dist.destroy_process_group()


@contextlib.contextmanager
def supervise(cfg: CfgNode, num_processes: int) -> Iterator[None]:
    """
    Wrap Detectron2's :func:`launch` of several processes: pass SIGTERM and SIGINT on to them, exit
    with the exit status of the first one that ends, or raise its :class:`UserError`, and with
    ``MODEL.DEVICE cpu`` use Gloo.
    """
    if num_processes == 1:  # it runs in this process
        yield
        return
    received = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in multiprocessing.active_children():
            if process.pid:
                os.kill(process.pid, signum)

    environ = dict(os.environ)
    if cfg.MODEL.DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher takes Gloo if it sees no GPU
    try:
        with catch_signals(forward):
            yield
    except (ProcessRaisedException, ProcessExitedException) as e:
        error, _, message = str(e).strip().rpartition("\n")[2].partition(": ")
        if error.startswith("gnws_d2."):  # the last line of the traceback of a UserError
            raise UserError(message) from None
        if not received:
            if isinstance(e, ProcessExitedException) and e.exit_code > 0:
                sys.exit(e.exit_code)
            raise RunError(str(e).strip()) from None
    finally:
        os.environ.clear()
        os.environ.update(environ)
    if received:  # PyTorch 2.4 takes a process that Ctrl-C has ended for finished
        sys.exit(128 + received[0])


@contextlib.contextmanager
def lock_output_dir(cfg: CfgNode, args: argparse.Namespace) -> Iterator[None]:
    """
    Create ``OUTPUT_DIR``, lock it for the main process of a run, and remove temporary files that a
    killed run has left. Wait for a lock that another run holds, and then raise :class:`UserError`.
    """
    if args.machine_rank > 0 or int(os.environ.get("LOCAL_RANK", 0)) > 0:
        yield
        return
    output_dir = cfg.OUTPUT_DIR
    try:
        os.makedirs(output_dir, exist_ok=True)
        lock = open(os.path.join(output_dir, ".lock"), "a+")
    except OSError as e:
        raise UserError(
            f"OUTPUT_DIR {output_dir} cannot be written: {e.strerror or e}. Set another OUTPUT_DIR."
        ) from e
    with lock:
        _lock(lock, output_dir)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}")
        lock.flush()
        for part in glob.glob(os.path.join(glob.escape(output_dir), "*.part")):
            os.remove(part)
        yield


def _lock(file: IO[str], output_dir: str) -> None:
    logger = logging.getLogger(__name__)
    for waited in range(_LOCK_TIMEOUT):
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another run"
            if waited == 0:
                logger.warning(
                    f"OUTPUT_DIR {output_dir} is locked by {owner}: waiting for up to "
                    f"{_LOCK_TIMEOUT} s, in case that run was killed."
                )
            time.sleep(1)
        except (ImportError, OSError) as e:
            logger.warning(
                f"OUTPUT_DIR {output_dir} cannot be locked ({e}): do not start a second run in it."
            )
            return
    raise UserError(
        f"OUTPUT_DIR {output_dir} is in use by {owner}: wait until it has ended, or set another "
        "OUTPUT_DIR."
    )


def agree_on_kernels(cfg: CfgNode, device: torch.device) -> None:
    """
    Check the Triton kernels that a job may use on `device`. If they fail on one rank, set
    ``MODEL.GNWS.KERNELS`` to "torch" on all, with a warning, or raise :class:`UserError` if it is
    "triton".
    """
    dtypes = [torch.float32]
    if cfg.SOLVER.AMP.ENABLED:
        dtypes.append(getattr(torch, cfg.SOLVER.AMP.PRECISION))
    reasons = filter(None, [choice.find_failure(dtype, device) for dtype in dtypes])
    for rank, reason in enumerate(comm.all_gather(next(reasons, ""))):
        if reason:
            choice.refuse(cfg.MODEL.GNWS.KERNELS, f"on rank {rank}, {reason}")
            cfg.defrost()
            cfg.MODEL.GNWS.KERNELS = "torch"
            cfg.freeze()
            return
    logging.getLogger(__name__).info("Triton kernels run on the GPU.")

"""Process setup that neither Detectron2's launcher nor torchrun provides."""

import argparse
import contextlib
import glob
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..config import flatten_config
from ..layers.kernels import choice
from ..utils.compat import create_local_process_group, detectron2_version
from ..utils.errors import RunError, UserError
from ..utils.process import num_usable_cores

_PACKAGE = Path(__file__).parent.parent
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
    End the threads of Gloo. One that frees a tensor while the interpreter shuts down aborts the
    process ("terminate called without an active exception").

    Wait first, so that a process that fails because another has ended ends well after it: the
    launcher shows the error of the first that it sees.
    """
    time.sleep(1)
    if dist.get_backend() == "gloo":
        # Detectron2's references would keep the groups alive.
        comm._get_global_gloo_group.cache_clear()
        comm._LOCAL_PROCESS_GROUP = None
        dist.destroy_process_group()


@contextlib.contextmanager
def supervise(cfg: CfgNode, args: argparse.Namespace) -> Iterator[None]:
    """
    Wrap Detectron2's :func:`launch`. While it waits for the processes that it has started, pass
    SIGTERM and SIGINT on to them, and raise the :class:`UserError` of one, or :class:`RunError` if
    one was killed or raised anything else. With ``MODEL.DEVICE cpu``, use Gloo and share the cores.
    """
    environ = {}
    if cfg.MODEL.DEVICE == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher takes Gloo if it sees no GPU
        if "OMP_NUM_THREADS" not in os.environ:
            environ["OMP_NUM_THREADS"] = str(max(1, num_usable_cores() // args.num_gpus))
    if args.num_gpus * args.num_machines == 1:  # the launcher starts no process
        with _environment(environ):
            yield
        return
    stopped = []

    def forward(signum: int, _: Any) -> None:
        stopped.append(signum)
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signum)

    handlers = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with _environment(environ):
            yield
        if stopped:  # older versions of PyTorch take a process that Ctrl-C has ended for finished
            sys.exit(128 + stopped[0])
    except (ProcessRaisedException, ProcessExitedException) as e:
        error = _describe_failure(e)
        if stopped and not isinstance(error, UserError):
            sys.exit(128 + stopped[0])
        raise error from None
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _describe_failure(error: ProcessRaisedException | ProcessExitedException) -> BaseException:
    who = f"Process {error.error_index}"
    if isinstance(error, ProcessRaisedException):
        text = error.msg.strip()
        name, _, message = text.rpartition("\n")[2].partition(": ")
        if name.startswith(f"{_PACKAGE.name}."):
            return (RunError if name.endswith("RunError") else UserError)(message)
        return RunError(f"{who} failed:\n{text}")
    if error.exit_code > 0:
        return SystemExit(error.exit_code)
    if error.exit_code in (-signal.SIGTERM, -signal.SIGINT):
        return SystemExit(128 - error.exit_code)
    hint = ", as the system does when memory runs out" if error.exit_code == -signal.SIGKILL else ""
    return RunError(f"{who} was killed by {signal.Signals(-error.exit_code).name}{hint}.")


@contextlib.contextmanager
def lock_output_dir(cfg: CfgNode, args: argparse.Namespace) -> Iterator[None]:
    """
    Create ``OUTPUT_DIR``, lock it for the main process of a run, and remove temporary files that a
    killed run has left. If the run that holds the lock is on another machine, or was killed, wait
    for up to 90 s. Raise :class:`UserError` if that fails or another run holds the lock.
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
    deadline = 0.0
    while True:
        try:
            import fcntl  # not on Windows, where a Predictor imports this file, too

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
        except (ImportError, OSError) as e:
            logging.getLogger(__name__).warning(
                f"OUTPUT_DIR {output_dir} cannot be locked ({e}): do not start a second run in it."
            )
            return
        now = time.monotonic()
        if _is_running_here(owner) or 0 < deadline <= now:
            raise UserError(
                f"OUTPUT_DIR {output_dir} is in use by {owner or 'another run'}: wait until it has "
                "ended, or set another OUTPUT_DIR."
            )
        if not deadline:
            deadline = now + _LOCK_TIMEOUT
            logging.getLogger(__name__).warning(
                f"OUTPUT_DIR {output_dir} is locked by {owner or 'another run'}: waiting for up to "
                f"{_LOCK_TIMEOUT} s, in case that run has been killed."
            )
        time.sleep(1)


def _is_running_here(owner: str) -> bool:
    """Whether the process that the lock file names is running, and on this machine."""
    match = re.match(r"process (\d+) on (\S+) since", owner)
    if not match or match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def agree_on_kernels(cfg: CfgNode, device: torch.device) -> None:
    """
    Check the Triton kernels that training or evaluation may use on `device`. If they fail on one
    rank, set ``MODEL.GNWS.KERNELS`` to "torch" on all ranks, with a warning.

    Raises:
        UserError: on all ranks, if they fail on one and the key is "triton".
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


def check_ranks_agree(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise :class:`UserError` in all processes if they do not run the same code and config."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    facts = flatten_config(cfg) | {
        "--eval-only": args.eval_only,
        "--resume": args.resume,
        "torch": torch.__version__,
        "detectron2": detectron2_version(),
        "the source code of gnws_d2": digest.hexdigest()[:12],
    }
    first, *others = comm.all_gather(facts)
    for rank, other in enumerate(others, 1):
        names = [name for name in first | other if first.get(name) != other.get(name)]
        if names:
            values = [f"{name} ({first.get(name)} and {other.get(name)})" for name in names[:5]]
            raise UserError(
                f"Ranks 0 and {rank} differ in {', '.join(values)}: start all processes with the "
                "same code, options and config."
            )

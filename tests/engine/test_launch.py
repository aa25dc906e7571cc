"""Processes start and end together, however they are started, and only the first error is shown."""

import argparse
import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launches_on_cpu, processes_of_test, wait_for
from detectron2.utils import comm
from torch import distributed as dist

from gnws_d2.config import load_config
from gnws_d2.engine import get_config, launch
from gnws_d2.engine.launch import (
    agree_on_kernels,
    leave_process_group,
    lock_output_dir,
    supervise,
)
from gnws_d2.layers.kernels import choice
from gnws_d2.utils.compat import LAUNCHES_ON_CPU, create_local_process_group
from gnws_d2.utils.errors import UserError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# train_net.py without a model: its processes wait for each other until one does $WHAT.
JOB = """
import os, signal, sys, time
from gnws_tools.cli import main as run_command
from detectron2.utils import comm
from gnws_d2.engine import default_setup, get_config, train_net
from gnws_d2.utils.errors import UserError

def main(args):
    default_setup(get_config(args), args)
    what, rank = os.environ["WHAT"], comm.get_rank()
    signals = []
    if what == "checkpoint":
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda signum, _: signals.append(signum))
    open(f"resume {args.resume} {rank}", "w").close()
    open(f"started {rank}", "w").write(str(os.getpid()))
    while True:
        if what == "wrong" and rank == 1:
            raise UserError("The image 7.jpg is broken.")
        if what == "raise" and rank == 1 and not args.resume:
            raise ValueError("a bug")
        if what == "raise" and args.resume:
            return
        if what == "die" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop := max(comm.all_gather(max(signals, default=0))):
            time.sleep(3 * (1 - rank))  # the main process writes longest
            open(f"checkpoint {rank}", "w").close()
            comm.synchronize()
            sys.exit(128 + stop)
        time.sleep(0.05)

train_net.main = main
if __name__ == "__main__":
    run_command("train")
"""


LAUNCHERS = [
    pytest.param("launcher", marks=launches_on_cpu),
    pytest.param("torchrun", marks=pytest.mark.slow),
]


@pytest.fixture
def job(tmp_path):
    """Start two processes of the job, in a session of their own."""
    (tmp_path / "job.py").write_text(JOB)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    started = []

    def start(what, launcher="launcher", torchrun=(), before=()):
        command = [sys.executable, "job.py", "--num-gpus", "2"]
        if launcher == "torchrun":
            command = [*TORCHRUN, *torchrun, "job.py"]
        started.append(
            subprocess.Popen(
                [*before, *command, "--config-file", "quick_start"],
                cwd=tmp_path, text=True, start_new_session=True, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**environ, "WHAT": what, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for run in started:
        for pid in processes_of_test():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.communicate()


def started(tmp_path):
    return all((tmp_path / f"started {r}").exists() for r in (0, 1))


def assert_none_left():
    """Loader workers look every five seconds whether their parent is there."""
    wait_for(lambda: processes_of_test() == [], timeout=10)


@pytest.mark.parametrize(
    "what, message",
    [
        ("wrong", "The image 7.jpg is broken."),
        pytest.param("raise", "ValueError: a bug", marks=pytest.mark.slow),
        ("die", "process 1 terminated with signal SIGKILL"),
    ],
)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_first_error_ends_all_processes_and_is_shown_once(job, tmp_path, launcher, what, message):
    run = job(what, launcher=launcher)
    wait_for((tmp_path / "started 1").exists)
    began = time.monotonic()
    _, stderr = run.communicate(timeout=120)
    assert time.monotonic() - began < 15
    assert_none_left()
    if launcher == "torchrun":
        assert run.returncode == 1  # whatever the exit status of the processes
        assert ("Signal 9 (SIGKILL)" if what == "die" else message) in stderr
    else:
        assert run.returncode == (2 if what == "wrong" else 1)
        assert ("Traceback" in stderr) == (what == "raise")
        assert stderr.count(message) == 1, stderr


@pytest.mark.parametrize(
    "launcher, signum, status",
    [
        pytest.param("launcher", signal.SIGTERM, 143, marks=launches_on_cpu),
        pytest.param("launcher", signal.SIGINT, 130, marks=[launches_on_cpu, pytest.mark.ci]),
        # It does not pass their 143 on.
        pytest.param("torchrun", signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_signal_reaches_all_processes_and_waits_for_their_checkpoints(
    job, tmp_path, launcher, signum, status
):
    run = job("checkpoint", launcher=launcher)
    wait_for(lambda: started(tmp_path))
    if signum == signal.SIGINT:  # Ctrl-C is for all processes of a terminal
        os.killpg(run.pid, signum)
    else:
        run.send_signal(signum)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == status
    assert (tmp_path / "checkpoint 0").exists() and (tmp_path / "checkpoint 1").exists()
    assert launcher == "torchrun" or ("error" not in stderr and "Traceback" not in stderr)
    assert_none_left()


@launches_on_cpu
@pytest.mark.ci
def test_sigterm_before_training_ends_all_processes(job, tmp_path):
    run = job("without a handler")
    wait_for(lambda: started(tmp_path))
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 143
    assert "error" not in stderr and "Traceback" not in stderr
    assert_none_left()


@pytest.mark.slow
def test_torchrun_restarts_with_resume(job, tmp_path):
    run = job("raise", launcher="torchrun", torchrun=["--max-restarts", "1"])
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    for rank in (0, 1):
        assert (tmp_path / f"resume False {rank}").exists()
        assert (tmp_path / f"resume True {rank}").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_end_with_their_launcher(job, tmp_path, launcher):
    """Even if the launcher ignores SIGINT, as under `nohup`."""
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    run = job("wait", launcher=launcher, before=ignoring)
    wait_for(lambda: started(tmp_path))
    run.kill()
    run.wait()
    assert_none_left()


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone, set up as by Detectron2's launcher."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    create_local_process_group(1)
    yield
    if LAUNCHES_ON_CPU:
        comm.create_local_process_group.cache_clear()


def test_no_thread_of_gloo_is_left_at_exit(process_group):
    """A thread that frees a tensor while the interpreter shuts down aborts the process."""
    comm._get_global_gloo_group()

    def threads():
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return [name for name in names if "gloo" in name]

    wait_for(threads, 10)  # which name themselves
    leave_process_group()
    assert threads() == []
    assert comm.get_world_size() == 1


def config(*opts):
    args = argparse.Namespace(config_file="quick_start", dataset=[], opts=list(opts))
    args.machine_rank, args.eval_only = 0, False
    return get_config(args), args


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_the_status_even_if_all_processes_seem_to_have_finished(signum):
    """PyTorch's launcher takes a process that Ctrl-C has ended for finished."""
    cfg, _ = config("MODEL.DEVICE", "cpu")
    before = dict(os.environ)
    with pytest.raises(SystemExit) as e, supervise(cfg, 2):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        os.kill(os.getpid(), signum)
    assert e.value.code == 128 + signum
    assert dict(os.environ) == before


def test_output_dir_is_for_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_LOCK_TIMEOUT", 1)
    cfg, args = config("OUTPUT_DIR", str(tmp_path / "out"))
    with lock_output_dir(cfg, args):
        who = rf"OUTPUT_DIR \S+/out is in use by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError, match=who), lock_output_dir(cfg, args):
            pass
        args.machine_rank = 1  # of the same run
        with lock_output_dir(cfg, args):
            pass
    args.machine_rank = 0
    (tmp_path / "out" / "model_final.pth.0a1b2c3d.part").touch()
    with lock_output_dir(cfg, args):
        assert [path.name for path in Path(cfg.OUTPUT_DIR).iterdir()] == [".lock"]


def test_lock_of_a_run_that_was_killed_is_waited_for(tmp_path, caplog):
    """A network disk may release it late."""
    cfg, args = config("OUTPUT_DIR", str(tmp_path))
    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on elsewhere")
        other.flush()
        threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        with lock_output_dir(cfg, args):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert f"OUTPUT_DIR {tmp_path} is locked by process 7 on elsewhere" in caplog.text


def test_file_system_without_locks_is_logged(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    cfg, args = config("OUTPUT_DIR", str(tmp_path))
    with lock_output_dir(cfg, args):
        pass
    assert f"OUTPUT_DIR {tmp_path} cannot be locked" in caplog.text and "No locks" in caplog.text


def _check_kernels(rank, store):
    """What a rank runs, on whose GPU the kernels in float16 are wrong if it is the second."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    choice.has_triton = lambda device: True
    choice.find_difference = lambda dtype, device: (
        "a lot" if rank == 1 and dtype == torch.float16 else ""
    )
    results = []
    for half_precision, kernels in (("False", "auto"), ("True", "auto"), ("True", "triton")):
        opts = ["SOLVER.AMP.ENABLED", half_precision, "MODEL.GNWS.KERNELS", kernels]
        cfg = load_config("quick_start", opts)
        try:
            agree_on_kernels(cfg, torch.device("cpu"))
            results.append(cfg.MODEL.GNWS.KERNELS)
        except UserError as e:
            results.append(str(e))
    dist.barrier()
    dist.destroy_process_group()
    return results


def test_all_ranks_refuse_kernels_that_fail_on_one(tmp_path):
    ranks = [(rank, tmp_path / "store") for rank in range(2)]
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap_async(_check_kernels, ranks, chunksize=1).get(timeout=120)
    for right, wrong, forced in results:
        assert (right, wrong) == ("auto", "torch")
        assert '"triton", but on rank 1, the kernels fail their check in torch.float16' in forced

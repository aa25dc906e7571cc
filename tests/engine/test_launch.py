"""Processes start and end together, however they are started, and the first error is told alone."""

import argparse
import contextlib
import errno
import fcntl
import os
import re
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
from gnws_d2.engine import get_config, lock_output_dir, supervise
from gnws_d2.engine.launch import agree_on_kernels, leave_process_group
from gnws_d2.layers.kernels import choice
from gnws_d2.utils.compat import LAUNCHES_ON_CPU, create_local_process_group
from gnws_d2.utils.errors import UserError
from gnws_tools.cli import main

QUICK_START = ["--config-file", str(ROOT / "configs" / "quick_start.yaml")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# train_net.py without a model: its processes wait for each other until one does what the test says.
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
        if what == "wrong everywhere" or what == "wrong" and rank == 1:
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

    def start(
        what, *args, launcher="launcher", torchrun=(), options=("--num-gpus", "2"), before=()
    ):
        if launcher == "torchrun":
            command, options = [*TORCHRUN, *torchrun], []
        else:
            command = [sys.executable]
        started.append(
            subprocess.Popen(
                [*before, *command, "job.py", *options, *QUICK_START, *args],
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
        pytest.param("wrong everywhere", "The image 7.jpg is broken.", marks=pytest.mark.slow),
        pytest.param("raise", "ValueError: a bug", marks=pytest.mark.slow),
        ("die", "Process 1 was killed by SIGKILL, as the system does when memory runs out."),
    ],
)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_first_error_ends_all_processes_and_is_told_alone(job, tmp_path, launcher, what, message):
    run = job(what, launcher=launcher)
    wait_for((tmp_path / "started 1").exists)
    began = time.monotonic()
    _, stderr = run.communicate(timeout=120)
    assert time.monotonic() - began < 15
    assert_none_left()
    if launcher == "torchrun":
        assert run.returncode == 1  # whatever the processes' own
        assert ("Signal 9 (SIGKILL)" if what == "die" else message) in stderr
    else:
        assert run.returncode == (2 if what.startswith("wrong") else 1)
        assert ("Traceback" in stderr) == (what == "raise")
        assert stderr.count(message) == 1, stderr
        of_torch = re.compile(r"(\[rank\d\]:)?W\d{4} ")
        lines = [line for line in stderr.splitlines() if not of_torch.match(line)]
        assert what == "raise" or len(lines) == 1, stderr


@launches_on_cpu
@pytest.mark.parametrize(
    "signum, status",
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.ci)],
)
def test_signal_reaches_all_processes_and_waits_for_their_checkpoints(
    job, tmp_path, signum, status
):
    run = job("checkpoint")
    wait_for(lambda: started(tmp_path))
    if signum == signal.SIGINT:  # Ctrl-C is for all processes of a terminal
        os.killpg(run.pid, signum)
    else:
        run.send_signal(signum)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == status
    assert (tmp_path / "checkpoint 0").exists() and (tmp_path / "checkpoint 1").exists()
    assert "error" not in stderr and "Traceback" not in stderr
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
def test_sigterm_of_torchrun_reaches_all_processes(job, tmp_path):
    run = job("checkpoint", launcher="torchrun")
    wait_for(lambda: started(tmp_path))
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 1  # it does not pass their 143 on
    assert (tmp_path / "checkpoint 0").exists() and (tmp_path / "checkpoint 1").exists()
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
    """Also one that ignores SIGINT, as under `nohup`."""
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    run = job("wait", launcher=launcher, before=ignoring)
    wait_for(lambda: started(tmp_path))
    run.kill()
    run.wait()
    assert_none_left()


@launches_on_cpu
@pytest.mark.ci
def test_ranks_that_differ_are_told(job, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{port}", "--machine-rank"]
    runs = [
        job("wait", "SOLVER.BASE_LR", lr, "OUTPUT_DIR", f"out{rank}", options=[*options, rank])
        for rank, lr in (("0", "0.05"), ("1", "0.5"))
    ]
    for run in runs:
        _, stderr = run.communicate(timeout=120)
        assert run.returncode in (1, 2)
    assert "Ranks 0 and 1 differ in" in stderr and "SOLVER.BASE_LR (0.05 and 0.5)" in stderr


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Run train_net.py's command line in this process, and return its error."""

    def fails(*args):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *QUICK_START, *args])
        with pytest.raises(SystemExit) as e:
            main("train")
        assert e.value.code == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("train_net.py: error: ")
        return error

    return fails


@pytest.mark.parametrize(
    "args, message",
    [
        (["--num-machines", "0"], "--num-machines 0"),
        (["--machine-rank", "-1"], "--machine-rank -1: "),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank 2: .* from 0"),
        (["--num-machines", "2"], "--dist-url auto: with several machines it is tcp://HOST:PORT"),
        *(
            (["--num-gpus", "2", "--dist-url", url], f"--dist-url {url}: .* tcp://HOST:PORT")
            for url in ("localhost:1", "tcp://localhost", "tcp://h:port", "tcp://:1")
        ),
    ],
)
def test_wrong_option_is_named(fails, args, message):
    error = fails(*args)
    assert re.search(message, error), error


def test_options_that_contradict_torchrun_are_named(fails, monkeypatch):
    environment = dict(
        TORCHELASTIC_RUN_ID="1", TORCHELASTIC_RESTART_COUNT="0", RANK="0", LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="2", WORLD_SIZE="4", GROUP_RANK="0", GROUP_WORLD_SIZE="2",
    )  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "torchrun has started 4 processes, not --num-gpus 8" in fails("--num-gpus", "8")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    options = ["--num-gpus", "2", "--num-machines", "2"]
    assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in fails(*options)


def test_launcher_without_cpus_names_torchrun(fails, monkeypatch):
    """That of Detectron2 v0.6."""
    monkeypatch.setattr("gnws_d2.engine.checks.LAUNCHES_ON_CPU", False)
    error = fails("--num-gpus", "2")
    assert "Detectron2 0.6" in error and "torchrun --nproc-per-node 2 train_net.py" in error


@pytest.fixture
def process_group(tmp_path):
    """This process alone, as Detectron2's launcher sets it up."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    create_local_process_group(1)
    yield
    if LAUNCHES_ON_CPU:
        comm.create_local_process_group.cache_clear()


def test_no_thread_of_gloo_is_left_at_exit(process_group):
    """One that frees a tensor while the interpreter shuts down aborts the process."""
    comm._get_global_gloo_group()

    def threads():
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return [name for name in names if "gloo" in name]

    assert threads()
    leave_process_group()
    assert threads() == []
    assert comm.get_world_size() == 1


def config(tmp_path, *opts):
    args = argparse.Namespace(config_file=QUICK_START[1], dataset=[], opts=list(opts))
    args.machine_rank, args.eval_only = 0, False
    return get_config(args), args


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_environment_is_set_for_the_processes_of_a_run_alone(tmp_path, monkeypatch, num_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    before = dict(os.environ)
    cfg, args = config(tmp_path, "MODEL.DEVICE", "cpu")
    args.num_gpus, args.num_machines = num_gpus, 1
    with pytest.raises(UserError), supervise(cfg, args):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["OMP_NUM_THREADS"] == str(6 // num_gpus)
        raise UserError("a mistake")
    assert dict(os.environ) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_the_status_also_if_all_processes_seem_to_have_finished(tmp_path, signum):
    """PyTorch's launcher takes one that Ctrl-C has ended for that."""
    cfg, args = config(tmp_path, "MODEL.DEVICE", "cpu")
    args.num_gpus, args.num_machines = 2, 1
    with pytest.raises(SystemExit) as e, supervise(cfg, args):
        os.kill(os.getpid(), signum)
    assert e.value.code == 128 + signum


def test_output_dir_is_for_one_run(tmp_path):
    cfg, args = config(tmp_path, "OUTPUT_DIR", str(tmp_path / "out"))
    began = time.monotonic()
    with lock_output_dir(cfg, args):
        who = rf"OUTPUT_DIR \S+/out is in use by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError, match=who), lock_output_dir(cfg, args):
            pass
        assert time.monotonic() - began < 10  # a second start is not kept waiting
        args.machine_rank = 1  # of the same run
        with lock_output_dir(cfg, args):
            pass
    args.machine_rank = 0
    (tmp_path / "out" / "model_final.pth.0a1b2c3d.part").touch()
    with lock_output_dir(cfg, args):
        assert [path.name for path in Path(cfg.OUTPUT_DIR).iterdir()] == [".lock"]


@pytest.fixture
def locked(tmp_path):
    """Lock an OUTPUT_DIR as another run does."""

    @contextlib.contextmanager
    def locked(owner):
        with open(tmp_path / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"process {owner} since 2026-01-01 00:00:00")
            file.flush()
            yield file

    return locked


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("host", ["this", "another"])
def test_lock_of_a_run_that_is_gone_is_waited_for(tmp_path, locked, caplog, host):
    pid = dead_process() if host == "this" else os.getpid()
    cfg, args = config(tmp_path, "OUTPUT_DIR", str(tmp_path))
    with locked(f"{pid} on {socket.gethostname() if host == 'this' else 'elsewhere'}") as file:
        timer = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with lock_output_dir(cfg, args):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        timer.join()
    (message,) = caplog.messages
    assert message.startswith(f"OUTPUT_DIR {tmp_path} is locked by process {pid} on ")


def test_lock_of_another_machine_that_stays_is_an_error(tmp_path, locked, monkeypatch):
    monkeypatch.setattr("gnws_d2.engine.launch._LOCK_TIMEOUT", 0.5)
    cfg, args = config(tmp_path, "OUTPUT_DIR", str(tmp_path))
    with locked("7 on elsewhere"), pytest.raises(UserError, match="in use by process 7 on elsew"):
        with lock_output_dir(cfg, args):
            pass


def test_file_system_without_locks_is_logged_once(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    cfg, args = config(tmp_path, "OUTPUT_DIR", str(tmp_path))
    with lock_output_dir(cfg, args):
        pass
    (message,) = caplog.messages
    assert f"OUTPUT_DIR {tmp_path} cannot be locked" in message and "No locks" in message


def test_output_dir_that_cannot_be_written_is_named(tmp_path, fails):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        assert f"OUTPUT_DIR {path} cannot be written: " in fails("OUTPUT_DIR", str(path))


def _check_kernels(rank, store, queue):
    """A rank, on whose GPU the kernels in float16 are wrong if it is the second; what it runs."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    choice.has_triton = lambda device: True
    choice.find_difference = lambda dtype, device: (
        "a lot" if rank == 1 and dtype == torch.float16 else ""
    )
    for half_precision, kernels in (("False", "auto"), ("True", "auto"), ("True", "triton")):
        opts = ["SOLVER.AMP.ENABLED", half_precision, "MODEL.GNWS.KERNELS", kernels]
        cfg = load_config("quick_start", opts)
        try:
            agree_on_kernels(cfg, torch.device("cpu"))
            queue.put([rank, cfg.MODEL.GNWS.KERNELS])
        except UserError as e:
            queue.put([rank, str(e)])
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_refuse_kernels_that_fail_on_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_check_kernels, args=(rank, tmp_path / "store", queue))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in range(6)]
    for process in processes:
        process.join()
    for rank in range(2):
        right, wrong, forced = (result for of, result in results if of == rank)
        assert (right, wrong) == ("auto", "torch")
        assert '"triton", but on rank 1, the kernels fail their check in torch.float16' in forced

"""Processes begin and end together, however they are started, and the first error is told alone."""

import argparse
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

import train_net
from gnws_d2.engine import get_config, launch, machines
from gnws_d2.engine.machines import check_machines
from gnws_d2.utils.errors import UserError
from gnws_tools.arguments import train_argument_parser

ROOT = Path(__file__).parent.parent.parent
QUICK_START = ["--config-file", str(ROOT / "configs" / "quick_start.yaml")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# A job without a model: its processes wait for each other until one does what the test says.
JOB = """
import os, signal, sys, time
from detectron2.utils import comm
from gnws_d2.engine import check_setup, get_config, launch
from gnws_d2.utils.errors import UserError, exit_on_user_error
from gnws_tools.arguments import train_argument_parser

def main(args):
    what, rank = os.environ["WHAT"], comm.get_rank()
    signals = []
    if what == "checkpoint":
        signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
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
        if any(comm.all_gather(bool(signals))):
            time.sleep(3 * (1 - rank))  # the main process writes longest
            open(f"checkpoint {rank}", "w").close()
            sys.exit(143)
        time.sleep(0.05)

@exit_on_user_error
def invoke_main():
    args = train_argument_parser().parse_args()
    cfg = get_config(args)
    check_setup(cfg, args)
    launch(main, cfg, args)

if __name__ == "__main__":
    invoke_main()
"""


@pytest.fixture
def job(tmp_path):
    """Start two processes of the job."""
    (tmp_path / "job.py").write_text(JOB)
    started = []

    def start(what, *args, launcher="launcher", torchrun=()):
        command = [*TORCHRUN, *torchrun] if launcher == "torchrun" else [sys.executable]
        options = [] if launcher == "torchrun" else ["--num-gpus", "2"]
        started.append(
            subprocess.Popen(
                [*command, "job.py", *options, *QUICK_START, *args], cwd=tmp_path, text=True,
                env={**os.environ, "WHAT": what}, stderr=subprocess.PIPE, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def wait_for(*paths):
    deadline = time.monotonic() + 100
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "what, message",
    [
        ("wrong", "The image 7.jpg is broken."),
        pytest.param("wrong everywhere", "The image 7.jpg is broken.", marks=pytest.mark.slow),
        pytest.param("raise", "ValueError: a bug", marks=pytest.mark.slow),
        ("die", "process 1 (rank 1) was ended by SIGKILL"),
    ],
)
@pytest.mark.parametrize("launcher", ["launcher", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_first_error_ends_all_processes_and_is_told_alone(job, tmp_path, launcher, what, message):
    run = job(what, launcher=launcher)
    _, stderr = run.communicate(timeout=120)
    if launcher == "torchrun":
        assert run.returncode == 1  # whatever the processes' own
        if what == "die":
            message = "Signal 9 (SIGKILL)"
    else:
        assert run.returncode == (2 if what.startswith("wrong") else 1)
        assert ("Traceback" in stderr) == (what == "raise")
    assert stderr.count(message) == 1, stderr
    for noise in ("Connection", "gloo"):
        assert noise not in stderr
    pids = [int((tmp_path / f"started {rank}").read_text()) for rank in (0, 1)]
    assert not any(map(is_running, pids))


def test_sigterm_reaches_all_processes_and_waits_for_their_checkpoints(job, tmp_path):
    run = job("checkpoint")
    wait_for(*(tmp_path / f"started {rank}" for rank in (0, 1)))
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 143
    assert (tmp_path / "checkpoint 0").exists() and (tmp_path / "checkpoint 1").exists()
    assert "error" not in stderr and "Traceback" not in stderr


def test_sigterm_before_training_ends_all_processes(job, tmp_path):
    run = job("without a handler")
    wait_for(*(tmp_path / f"started {rank}" for rank in (0, 1)))
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == 143
    assert "error" not in stderr and "Traceback" not in stderr


@pytest.mark.slow
def test_sigterm_of_torchrun_reaches_all_processes(job, tmp_path):
    run = job("checkpoint", launcher="torchrun")
    wait_for(*(tmp_path / f"started {rank}" for rank in (0, 1)))
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 1  # it does not pass their 143 on
    assert (tmp_path / "checkpoint 0").exists() and (tmp_path / "checkpoint 1").exists()


@pytest.mark.slow
def test_torchrun_starts_again_with_resume(job, tmp_path):
    run = job("raise", launcher="torchrun", torchrun=["--max-restarts", "1"])
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    for rank in (0, 1):
        assert (tmp_path / f"resume False {rank}").exists()
        assert (tmp_path / f"resume True {rank}").exists()


@pytest.fixture
def torchrun_environment(monkeypatch):
    environment = dict(
        TORCHELASTIC_RUN_ID="1", TORCHELASTIC_RESTART_COUNT="0", RANK="0", LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="2", WORLD_SIZE="4", GROUP_RANK="0", GROUP_WORLD_SIZE="2",
    )  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run train_net.py's command line in this process, and return its error."""

    def fails(*args):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *QUICK_START, *args])
        with pytest.raises(SystemExit) as e:
            train_net.invoke_main()
        assert e.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        (error,) = [line for line in lines if line.startswith("train_net.py: error: ")]
        assert error == lines[-1] and not any("Traceback" in line for line in lines)
        return error

    return fails


def test_options_that_contradict_torchrun_are_named(fails, torchrun_environment):
    assert "--num-gpus 8 contradicts torchrun, which says 2" in fails("--num-gpus", "8")
    assert "--machine-rank 1 contradicts torchrun" in fails("--machine-rank", "1")
    torchrun_environment.setenv("WORLD_SIZE", "3")
    assert "the same --nproc-per-node on all machines" in fails("--num-gpus", "2")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--num-machines", "0"], "--num-machines 0"),
        (["--machine-rank", "-1"], "--machine-rank -1: "),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank 2: .* from 0 to 1"),
        (["--num-machines", "2"], "--dist-url is not given: .*tcp://HOST:PORT"),
        (["--num-machines", "2", "--dist-url", "auto"], "--dist-url is not given: "),
        *(
            (["--num-gpus", "2", "--dist-url", url], f"--dist-url {url} is not of the form")
            for url in (
                "localhost:1",
                "tcp://localhost",
                "tcp://h:port",
                "file:///tmp/f",
                "tcp://:1",
            )
        ),
        (
            ["--num-machines", "2", "--dist-url", "tcp://nowhere.invalid:29500"],
            "the name nowhere.invalid cannot be resolved",
        ),
    ],
)
def test_wrong_option_is_named(fails, args, message):
    error = fails(*args)
    assert re.search(message, error), error


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_machines(port, rank=0):
    url = f"tcp://127.0.0.1:{port}"
    return ["--num-machines", "2", "--machine-rank", str(rank), "--dist-url", url]


SOON = ["DISTRIBUTED.START_TIMEOUT", "3"]


def test_port_in_use_is_named(fails, port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        error = fails(*two_machines(port), *SOON)
    assert f"--dist-url tcp://127.0.0.1:{port}: the port {port} of this machine is in use" in error


def test_machine_0_that_does_not_answer_is_named(fails, port):
    error = fails(*two_machines(port, rank=1), *SOON)
    assert f"--dist-url tcp://127.0.0.1:{port}: machine 0 did not answer in 3 s" in error


def test_what_is_not_machine_0_is_named(fails, port):
    with socket.socket() as other:  # that accepts, and says nothing
        other.bind(("127.0.0.1", port))
        other.listen()
        error = fails(*two_machines(port, rank=1), *SOON)
    assert "what answers there is not machine 0 of this run" in error


def test_machine_that_does_not_come_is_named(fails, port):
    error = fails(*two_machines(port), *SOON)
    assert "After 3 s (DISTRIBUTED.START_TIMEOUT) 1 of 2 machines have come" in error
    assert "not --machine-rank 1: start them with --dist-url tcp://127.0.0.1:" in error


def meet(port, *machines):
    """The errors of machines that start together, each in a thread."""
    errors = {}

    def start(i, options):
        args = train_argument_parser().parse_args(
            [*two_machines(port), *options[0], *QUICK_START, *options[1]]
        )
        try:
            launch(None, get_config(args), args)
        except Exception as e:
            errors[i] = e

    threads = [threading.Thread(target=start, args=each) for each in enumerate(machines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(errors) == len(machines) and all(type(e) is UserError for e in errors.values())
    return [str(errors[i]) for i in sorted(errors)]


@pytest.mark.parametrize(
    "first, second, difference",
    [
        (([], []), ([], ["SOLVER.BASE_LR", "0.5"]), "SOLVER.BASE_LR (0.05 and 0.5)"),
        ((["--num-gpus", "2"], []), ([], []), "--num-gpus (2 and 1)"),
        (([], []), (["--num-machines", "3"], []), "--num-machines (2 and 3)"),
        (([], []), (["--resume"], []), "--resume (False and True)"),
    ],
    ids=["config", "--num-gpus", "--num-machines", "--resume"],
)
def test_machines_that_differ_are_told_on_each(port, first, second, difference):
    second = (["--machine-rank", "1", *second[0]], second[1])
    errors = meet(port, first, second)
    for error in errors:
        assert difference in error and "start all with the same code, options and config" in error


def test_two_machines_of_one_rank_are_told_on_each(port):
    one = (["--num-machines", "3", "--machine-rank", "1"], [])
    errors = meet(port, (["--num-machines", "3"], []), one, one)
    assert all("have --machine-rank 1" in error for error in errors)


def test_versions_and_sources_are_compared(monkeypatch, tmp_path):
    args = argparse.Namespace(num_machines=2, num_gpus=1, eval_only=False, resume=False)
    cfg = get_config(argparse.Namespace(config_file=QUICK_START[1], dataset=[], opts=[]))
    here = machines.describe_job(cfg, args)
    check_machines([(0, "a", here), (1, "b", dict(here))])
    monkeypatch.setattr("torch.__version__", "1.0")
    monkeypatch.setattr("detectron2.__version__", "0.1")
    (tmp_path / "changed.py").touch()
    monkeypatch.setattr(machines, "_PACKAGE", tmp_path)
    there = machines.describe_job(cfg, args)
    with pytest.raises(UserError, match=r"machines 0 \(a\) and 1 \(b\) differ in .*torch") as e:
        check_machines([(0, "a", here), (1, "b", there)])
    assert "detectron2 (" in str(e.value) and "gnws_d2's source files (" in str(e.value)


@pytest.mark.slow
def test_groups_of_detectron2_have_the_timeout(job, tmp_path):
    """Collectives that are never answered end after DISTRIBUTED.TIMEOUT."""
    (tmp_path / "job.py").write_text(
        JOB.replace('what == "die" and rank == 1', 'what == "hang" and rank == 1').replace(
            "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(1000)"
        )
    )
    started = time.monotonic()
    run = job("hang", "DISTRIBUTED.TIMEOUT", "4")
    _, stderr = run.communicate(timeout=100)
    assert time.monotonic() - started < 90
    assert run.returncode == 1 and "DISTRIBUTED.TIMEOUT is 4 s" in stderr

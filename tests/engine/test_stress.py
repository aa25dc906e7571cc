"""What happens in days of training, in minutes: kills at any moment, and memory that may grow."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, processes_of_test, wait_for

# In every process of a training: a file takes as long to write as on a slow network disk.
SLOW_DISK = """
import os, time
os.fsync = lambda fd, fsync=os.fsync: (time.sleep(0.5), fsync(fd))
"""


def start(output, *args, launcher="launcher", processes=1, **environ):
    """Start a training on the built-in data, in a session of its own."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--num-gpus", str(processes)]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(processes)]
        command[1:] = [*torchrun, str(ROOT / "train_net.py")]
    split = args.index("KEYS")
    options = ["--config-file", str(ROOT / "configs" / "quick_start.yaml"), *args[:split]]
    keys = ["OUTPUT_DIR", str(output), "DATASETS.TEST", "()", *args[split + 1 :]]
    with open(f"{output}.txt", "a") as log:
        return subprocess.Popen(
            [*command, *options, *keys],
            env={**os.environ, "DETECTRON2_DATASETS": str(output.parent / "datasets"), **environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process, launcher_alone):
    """Kill all processes, or the launcher, with which the others have to end."""
    if launcher_alone:
        process.kill()
    else:
        for pid in processes_of_test():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: processes_of_test() == [], timeout=20)


def weights(output):
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    trained = {f"trained.{name}": value for name, value in checkpoint["trained_model"].items()}
    return checkpoint["model"] | trained


@pytest.mark.parametrize(
    "launcher, processes, kills, iterations",
    [
        pytest.param("launcher", 1, 1, 4, marks=pytest.mark.ci),
        pytest.param("launcher", 1, 20, 100, marks=pytest.mark.slow),
        pytest.param("launcher", 2, 20, 100, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, 20, 100, marks=pytest.mark.slow),
    ],
)
def test_killed_run_resumes_bit_for_bit(tmp_path, launcher, processes, kills, iterations):
    """Every other kill comes while a checkpoint is written, the others at random moments."""
    keys = ["DATALOADER.NUM_WORKERS", "2", "SOLVER.MAX_ITER", str(iterations)]
    keys += ["SOLVER.EMA_DECAY", "0.9", "INPUT.AUGMENTATION", "strong", "INPUT.COPY_PASTE", "0.5"]
    keys += ["SOLVER.CHECKPOINT_PERIOD", "2" if kills == 1 else "3"]
    how = {"launcher": launcher, "processes": processes}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, "KEYS", *keys, **how).wait() == 0, Path(f"{whole}.txt").read_text()

    (tmp_path / "slow").mkdir()  # Python runs it at the start of every process
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    path = os.pathsep.join([str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")])
    rng = random.Random(0)
    done = 0
    while True:
        process = start(killed, "--resume", "KEYS", *keys, **how, PYTHONPATH=path)
        parts = set(killed.glob("*.part"))  # of the kill before
        if done < kills and done % 2 == 0:
            while process.poll() is None and not set(killed.glob("*.pth.*.part")) - parts:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 15) if done < kills else None)
        if process.poll() is not None:
            break
        kill(process, launcher_alone=rng.random() < 0.5)
        done += 1
    assert process.wait() == 0, Path(f"{killed}.txt").read_text()
    assert done == kills, "the run was over before: it needs more iterations"
    expected, actual = weights(whole), weights(killed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert list(killed.glob("*.part")) == []


def usage(pid):
    """Bytes resident and number of open files, of a process and those it has started."""
    pids, rss, files = [pid], 0, 0
    for p in pids:
        proc = Path(f"/proc/{p}")
        for task in (proc / "task").iterdir():
            pids += map(int, (task / "children").read_text().split())
        rss += int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        files += len(list((proc / "fd").iterdir()))
    return rss, files


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow(tmp_path):
    output = tmp_path / "memory"
    process = start(
        output, "KEYS", "SOLVER.MAX_ITER", "2000", "DATALOADER.NUM_WORKERS", "2",
        "SOLVER.CHECKPOINT_PERIOD", "500", "SOLVER.CHECKPOINT_KEEP", "1",
    )  # fmt: skip
    samples = {}
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # before it trains, and as it ends
            record = json.loads((output / "run.json").read_text())[-1]
            if record["status"] == "running":
                samples[record["iterations"]] = usage(process.pid)
        time.sleep(0.2)
    assert process.wait() == 0, Path(f"{output}.txt").read_text()
    early, late = samples[200], samples[1980]
    assert late[0] < 1.03 * early[0] and late[1] <= early[1]

"""Two machines, network namespaces of this one, train together by torchrun and end together."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

KEYS = [
    "DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "(96,)", "OUTPUT_DIR", "output",
    "DISTRIBUTED.TIMEOUT", "20",
]  # fmt: skip


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Machine:
    def __init__(self, rank):
        self.rank = rank
        self.name = f"gnws{os.getpid() % 100000}-{rank}"
        self.link = f"v{os.getpid() % 100000}-{rank}"
        self.address = f"10.213.7.{rank + 1}"
        self.run = None

    def start(self, command, cwd):
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        self.output = cwd / f"output {self.rank}.txt"
        with open(self.output, "w") as out:
            self.run = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *named, *command],
                cwd=cwd, stdout=out, stderr=out,
                # Two machines share the cores of one.
                env={
                    **os.environ,
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    "OMP_NUM_THREADS": "1",
                },
            )  # fmt: skip

    def pids(self):
        done = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def worker(self):
        """Return the id of the process that trains, or None."""
        for pid in self.pids():
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
            if b"\0LOCAL_RANK=" in environ:
                return pid
        return None

    def kill(self):
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machines():
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2), which makes network namespaces")
    pair = [Machine(0), Machine(1)]
    files = []
    try:
        try:
            ip("netns", "add", pair[0].name)
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces are not permitted: {e.stderr.strip()}")
        ip("netns", "add", pair[1].name)
        ip(
            "link", "add", pair[0].link, "netns", pair[0].name,
            "type", "veth", "peer", "name", pair[1].link, "netns", pair[1].name,
        )  # fmt: skip
        for machine in pair:
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.link)
            ip("-n", machine.name, "link", "set", machine.link, "up")
            ip("-n", machine.name, "link", "set", "lo", "up")
            files.append(Path("/etc/netns") / machine.name)  # in place of /etc in the namespace
            files[-1].mkdir(parents=True)
            hosts = [f"{each.address} {each.name}" for each in pair]
            (files[-1] / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        yield pair
    finally:
        for machine in pair:
            if machine.run is not None:
                machine.kill()
                machine.run.wait()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)
        for path in files:
            shutil.rmtree(path)


@pytest.fixture
def start(machines, photographs, tmp_path):
    """Start train_net.py on both machines."""

    def start(*keys, restarts=0):
        for machine in machines:
            machine.start(
                [
                    sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                    "--nproc-per-node", "1", "--max-restarts", str(restarts),
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0].name}:29500",
                    str(ROOT / "train_net.py"),
                    "--dataset", "fruits", str(photographs.json_file), str(photographs.images),
                    "--config-file", str(ROOT / "configs" / "quick_start.yaml"), *KEYS, *keys,
                ],
                tmp_path,
            )  # fmt: skip

    return start


@pytest.mark.ci
def test_two_machines_train_together(machines, start, tmp_path):
    start("SOLVER.MAX_ITER", "2")
    outputs = [machine.output for machine in machines]
    assert [machine.run.wait(200) for machine in machines] == [0, 0], outputs[0].read_text()
    log = (tmp_path / "output" / "log.txt.rank1").read_text()
    assert "Rank of current process: 1. World size: 2" in log
    assert (tmp_path / "output" / "model_final.pth").is_file()


def wait_for_checkpoint(tmp_path):
    wait_for((tmp_path / "output" / "last_checkpoint").exists)
    return time.monotonic()


@pytest.mark.slow
def test_killed_worker_is_restarted_and_resumes(machines, start, tmp_path):
    start("SOLVER.MAX_ITER", "100", "SOLVER.CHECKPOINT_PERIOD", "5", restarts=1)
    began = wait_for_checkpoint(tmp_path)
    workers = [machine.worker() for machine in machines]
    os.kill(workers[1], signal.SIGKILL)
    wait_for(lambda: machines[0].worker() not in (None, workers[0]))
    print(f"worker killed: {time.monotonic() - began:.1f} s until the other one is restarted")
    outputs = [machine.output for machine in machines]
    assert [machine.run.wait(200) for machine in machines] == [0, 0], outputs[0].read_text()
    log = (tmp_path / "output" / "log.txt").read_text()
    assert re.search(r"Starting training from iteration [1-9]", log)
    assert (tmp_path / "output" / "model_final.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["worker", "machine 0", "machine 1", "link"])
def test_training_ends_when_one_machine_does(machines, start, tmp_path, fault):
    start("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "5")
    began = wait_for_checkpoint(tmp_path)
    survivors = machines
    if fault == "worker":
        os.kill(machines[1].worker(), signal.SIGKILL)
    elif fault == "link":
        ip("-n", machines[0].name, "link", "set", machines[0].link, "down")
    else:
        machines[int(fault[-1])].kill()
        survivors = [machines[1 - int(fault[-1])]]
    wait_for(lambda: all(machine.worker() is None for machine in survivors))
    trained = time.monotonic() - began
    try:
        for machine in survivors:
            assert machine.run.wait(120) != 0, machine.output.read_text()
        ended = f"{time.monotonic() - began:.1f} s"
    except subprocess.TimeoutExpired:
        ended = "over 120 s"
    print(f"{fault}: {trained:.1f} s until training has ended, torchrun after {ended}")

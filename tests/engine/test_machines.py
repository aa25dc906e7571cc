"""Two machines, each a torchrun of its own on this one, train together and end together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, processes_of_test, wait_for


class Machine:
    def __init__(self, rank):
        self.rank = rank

    def start(self, command, cwd):
        self.output = cwd / f"output {self.rank}.txt"
        environ = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        environ |= {**os.environ, "OF_MACHINE": str(self.rank)}
        with open(self.output, "w") as out:
            self.run = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out, env=environ)

    def pids(self, variable=""):
        """The processes of this machine that have an environment variable."""
        for pid in processes_of_test():
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_text()
                if f"OF_MACHINE={self.rank}\0" in environ and variable in environ:
                    yield pid

    def worker(self):
        """The process that trains, or None."""
        return next(self.pids("\0LOCAL_RANK="), None)

    def send(self, signum):
        for pid in self.pids():
            os.kill(pid, signum)


@pytest.fixture
def machines():
    pair = [Machine(0), Machine(1)]
    yield pair
    for machine in pair:
        machine.send(signal.SIGKILL)
        machine.run.wait()


@pytest.fixture
def start(machines, photographs, tmp_path):
    """Start train_net.py on both machines."""

    def start(*keys, restarts=0):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        for machine in machines:
            machine.start(
                [
                    sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                    "--nproc-per-node", "1", "--max-restarts", str(restarts),
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
                    "--rdzv-conf", f"is_host={machine.rank == 0}", "--local-addr", "127.0.0.1",
                    str(ROOT / "train_net.py"),
                    "--dataset", "fruits", str(photographs.json_file), str(photographs.images),
                    "--config-file", str(ROOT / "configs" / "quick_start.yaml"),
                    "DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "()",
                    *TINY, "OUTPUT_DIR", "output", "DISTRIBUTED.TIMEOUT", "20", *keys,
                ],
                tmp_path,
            )  # fmt: skip

    return start


@pytest.mark.parametrize(
    "restarts", [pytest.param(0, marks=pytest.mark.ci), pytest.param(1, marks=pytest.mark.slow)]
)
def test_two_machines_train_together_and_a_killed_worker_is_restarted(
    machines, start, tmp_path, restarts
):
    iterations = "100" if restarts else "2"
    start("SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", "5", restarts=restarts)
    output = tmp_path / "output"
    if restarts:
        wait_for((output / "last_checkpoint").exists)
        workers = [machine.worker() for machine in machines]
        os.kill(workers[1], signal.SIGKILL)
        wait_for(lambda: machines[0].worker() not in (None, workers[0]))
    outputs = [machine.output for machine in machines]
    assert [machine.run.wait(200) for machine in machines] == [0, 0], outputs[0].read_text()
    assert "Rank of current process: 1. World size: 2" in (output / "log.txt.rank1").read_text()
    resumed = re.search(r"Starting training from iteration [1-9]", (output / "log.txt").read_text())
    assert bool(resumed) == bool(restarts) and (output / "model_final.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["worker", "machine 0", "machine 1", "silence"])
def test_training_ends_when_one_machine_does(machines, start, tmp_path, fault):
    start("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "5")
    wait_for((tmp_path / "output" / "last_checkpoint").exists)
    survivors = machines
    if fault == "worker":
        os.kill(machines[1].worker(), signal.SIGKILL)
    elif fault == "silence":  # as if the link were cut
        machines[1].send(signal.SIGSTOP)
        survivors = machines[:1]
    else:
        machines[int(fault[-1])].send(signal.SIGKILL)
        survivors = [machines[1 - int(fault[-1])]]
    wait_for(lambda: all(machine.worker() is None for machine in survivors))
    if fault != "silence":  # torchrun itself waits longer
        for machine in survivors:
            assert machine.run.wait(120) != 0, machine.output.read_text()

"""Two machines, network namespaces of this one, train together and do not outlive each other."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOST = 10  # seconds
KEYS = [
    "DATASETS.TRAIN", "('fruits',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "(96,)", "OUTPUT_DIR", "output",
    "DISTRIBUTED.LOST_TIMEOUT", str(LOST),
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

    def start(self, command, cwd, named=False):
        # Without a name of its own it has one that leads to no address of it, as on many machines.
        name = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        with open(cwd / f"stdout {self.rank}", "w") as out, open(self.stderr_file(cwd), "w") as err:
            self.run = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *(name if named else []), *command],
                cwd=cwd, stdout=out, stderr=err,
            )  # fmt: skip
        self.cwd = cwd

    def stderr_file(self, cwd):
        return cwd / f"stderr {self.rank}"

    def stdout(self):
        return (self.cwd / f"stdout {self.rank}").read_text()

    def stderr(self):
        return self.stderr_file(self.cwd).read_text()

    def pids(self):
        done = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def kill(self):
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def trains(self):
        """Whether there is a process that torchrun has started."""
        environ = [Path(f"/proc/{pid}/environ").read_bytes() for pid in self.pids()]
        return any(b"\0LOCAL_RANK=" in each for each in environ)

    def kill_worker(self):
        """The process that trains, as the kernel does when memory runs out."""
        (pid,) = (
            pid for pid in self.pids()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # fmt: skip
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

    def start(how, *keys, options=([], [])):
        for machine in machines:
            if how == "torchrun":
                command = [
                    "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0].name}:29500",
                    str(ROOT / "train_net.py"),
                ]  # fmt: skip
            else:
                command = [
                    str(ROOT / "train_net.py"), "--num-machines", "2",
                    "--machine-rank", str(machine.rank),
                    "--dist-url", f"tcp://{machines[0].address}:29500",
                ]  # fmt: skip
            command += ["--dataset", "fruits", str(photographs.json_file), str(photographs.images)]
            command += ["--config-file", str(ROOT / "configs" / "quick_start.yaml"), *KEYS, *keys]
            command += options[machine.rank]
            machine.start([sys.executable, *command], tmp_path, named=how == "torchrun")

    return start


def wait_for_training(machines):
    """Until it has done some steps."""
    deadline = time.monotonic() + 120
    while not any("Starting training" in machine.stdout() for machine in machines):
        assert time.monotonic() < deadline, [machine.stderr() for machine in machines]
        assert all(machine.run.poll() is None for machine in machines), machines[0].stderr()
        time.sleep(0.2)
    time.sleep(3)


@pytest.mark.parametrize("how", ["launcher", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_machines_train_together(machines, start, tmp_path, how):
    start(how, "SOLVER.MAX_ITER", "2")
    assert [machine.run.wait(200) for machine in machines] == [0, 0], machines[0].stderr()
    assert (
        "Rank of current process: 1. World size: 2"
        in (tmp_path / "output" / "log.txt.rank1").read_text()
    )
    assert (tmp_path / "output" / "model_final.pth").is_file()


@pytest.mark.parametrize("how", ["launcher", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_config_that_differs_is_told_on_both(machines, start, how):
    start(how, options=([], ["SOLVER.BASE_LR", "0.5"]))
    statuses = [machine.run.wait(120) for machine in machines]
    for machine, status in zip(machines, statuses):
        lines = machine.stderr().splitlines()
        assert sum("differ in SOLVER.BASE_LR (0.05 and 0.5)" in line for line in lines) == 1, lines
        if how == "launcher":
            assert status == 2 and not any("Traceback" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["worker", "machine 0", "machine 1", "link"])
@pytest.mark.parametrize("how", ["launcher", "torchrun"])
def test_what_ends_one_machine_ends_the_other_within_a_minute(
    machines, start, record_property, how, fault
):
    if (how, fault) == ("torchrun", "worker"):
        pytest.skip("the same as on one machine: torchrun ends the machine, and its end the other")
    start(how, "SOLVER.MAX_ITER", "100000")
    wait_for_training(machines)
    began = time.monotonic()
    survivors = machines
    if fault == "worker":
        machines[1].kill_worker()
    elif fault == "link":
        ip("-n", machines[0].name, "link", "set", machines[0].link, "down")
    else:
        machines[int(fault[-1])].kill()
        survivors = [machines[1 - int(fault[-1])]]
    if (how, fault) == ("torchrun", "link"):
        # torchrun itself may wait for its rendezvous behind the link; training has ended.
        while not all("No sign of life" in machine.stderr() for machine in machines):
            assert time.monotonic() - began < 60, machines[0].stderr()
            time.sleep(0.2)
        time.sleep(2)
        assert not any(machine.trains() for machine in machines)
    else:
        for machine in survivors:
            assert machine.run.wait(150) == 1, machine.stderr()
    seconds = time.monotonic() - began
    print(f"{how}, {fault}: {seconds:.1f} s until the other side ended")
    assert seconds < 60
    if (how, fault) == ("torchrun", "machine 0"):  # which has torchrun's own store
        assert "The connection to the C10d store has failed" in machines[1].stderr()
        return
    for machine in survivors:
        lines = [line for line in machine.stderr().splitlines() if "train_net.py: error: " in line]
        assert len(lines) == 1, machine.stderr()
        if fault == "worker":
            assert "process 0 (rank 1) was ended by SIGKILL" in lines[0]
            assert ("On machine 1 (" in lines[0]) == (machine is machines[0])
        elif fault == "link":
            other = 1 - machine.rank
            assert f"No sign of life from machine {other} (" in lines[0]
            assert f"in {LOST} s (DISTRIBUTED.LOST_TIMEOUT)" in lines[0]
        else:
            assert "has lost another" in lines[0]

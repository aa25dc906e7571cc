"""tools/slurm.sh, with stand-ins for Slurm's commands and for training."""

import os
import signal
import subprocess

import pytest
from conftest import ROOT, wait_for

SCRIPT = ROOT / "tools" / "slurm.sh"
STAND_INS = {
    # Starts a task on each of two machines, forwards SIGTERM, and returns the highest status.
    "srun": r"""
echo "$*" >srun.txt
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${tasks[@]}"' TERM
for i in 0 1; do export SLURM_NODEID=$i; "$@" & tasks[i]=$!; done
highest=0
for task in "${tasks[@]}"; do
    while :; do
        status=0; wait "$task" || status=$?
        kill -0 "$task" 2>/dev/null || break
    done
    ((status > highest)) && highest=$status
done
exit "$highest"
""",
    "scontrol": r"""
echo "$*" >>scontrol.txt
[ "$1 $2" != "show hostnames" ] || printf 'node7\nnode9\n'
""",
    # torchrun: exits with $STATUS, or without one runs until SIGTERM and exits with 1.
    "python": r"""
trap 'exit 1' TERM
echo "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*" >"task$SLURM_NODEID.txt"
[ -z "${STATUS-}" ] || exit "$STATUS"
while :; do sleep 0.05; done
""",
}


@pytest.fixture
def job(tmp_path):
    """Start the script as the batch script of a job."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train_net.py").touch()
    jobs = []

    def start(*args, **environ):
        environ = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "41007",
            "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
            **environ,
        }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = ["bash", str(SCRIPT), *args]
        jobs.append(subprocess.Popen(command, cwd=tmp_path, env=environ, **pipes))
        return jobs[-1]

    yield start
    for each in jobs:
        each.kill()
        each.communicate()


def requeued(tmp_path):
    return "requeue 41007" in (tmp_path / "scontrol.txt").read_text().splitlines()


def test_every_machine_runs_torchrun_with_resume(job, tmp_path):
    run = job("--config-file", "a b.yaml", "SEED", "1", STATUS="0", SLURM_CPUS_PER_TASK="16")
    assert run.wait(30) == 0, run.stderr.read()
    for rank in (0, 1):
        torchrun = (tmp_path / f"task{rank}.txt").read_text()
        assert torchrun.startswith("1 -m torch.distributed.run --nnodes 2 --nproc-per-node 8 ")
        assert "--rdzv-endpoint node7:11007 train_net.py --resume " in torchrun
        assert torchrun.endswith(" --config-file a b.yaml SEED 1\n")
    assert "--cpus-per-task=16" in (tmp_path / "srun.txt").read_text()
    assert not requeued(tmp_path)


@pytest.mark.parametrize(
    "signum, again",
    [(signal.SIGUSR1, True), (signal.SIGTERM, False)],  # Slurm requeues what it preempts
    ids=["time limit", "cancelled"],
)
def test_signal_ends_training_and_requeues_the_job_at_its_time_limit(job, tmp_path, signum, again):
    run = job()
    wait_for(lambda: len([*tmp_path.glob("task*.txt")]) == 2)
    run.send_signal(signum)
    assert run.wait(30) == 1
    assert requeued(tmp_path) == again


def test_job_that_fails_is_not_requeued(job, tmp_path):
    assert job(STATUS="2").wait(30) == 2
    assert not requeued(tmp_path)


def test_wrong_directory_is_named(job, tmp_path):
    (tmp_path / "train_net.py").unlink()
    run = job()
    assert run.wait(30) == 2
    assert f"there is no train_net.py in {tmp_path}: run sbatch where it is." in run.stderr.read()

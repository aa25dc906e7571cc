#!/usr/bin/env python3
"""
Check what days of training need, in minutes on the built-in data: that a run which is killed again
and again ends with the weights of one that was not, and that memory does not grow.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from gnws_d2.utils.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parent.parent

# In every process of a training: a checkpoint takes as long to write as on a slow network disk.
_SLOW_DISK = """
import builtins, time

class SlowFile:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *args):
        self.file.close()
    def __getattr__(self, name):
        return getattr(self.file, name)
    def write(self, data):
        time.sleep({delay})
        return self.file.write(data)

def slow_open(file, *args, open=builtins.open, **kwargs):
    opened = open(file, *args, **kwargs)
    return SlowFile(opened) if str(file).endswith(".pth.part") else opened

builtins.open = slow_open
"""


def command(output_dir: Path, args: argparse.Namespace, *opts: str) -> list[str]:
    return [
        "--config-file", str(ROOT / "configs" / "quick_start.yaml"),
        "--num-gpus", str(args.processes), "--dist-url", "auto",
        "OUTPUT_DIR", str(output_dir), "DATALOADER.NUM_WORKERS", str(args.workers),
        "DATASETS.TEST", "()", "SOLVER.MAX_ITER", str(args.iterations), *opts,
    ]  # fmt: skip


def start(arguments: list[str], output_dir: Path, **environ: str) -> subprocess.Popen:
    # In a session of its own, so that all of its processes can be killed at once.
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "stdout.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train_net.py"), *arguments],
            env={**os.environ, **environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen, output_dir: Path) -> None:
    if process.wait() != 0:
        raise UserError(f"The training failed: see {output_dir / 'stdout.txt'}.")


def test_kills(args: argparse.Namespace) -> None:
    """
    Train once without interruption, and once killed with SIGKILL at random moments, every other
    time while a checkpoint is written to a slow disk, and resumed each time.
    """
    period = ["SOLVER.CHECKPOINT_PERIOD", str(args.period)]
    whole, killed = (Path(args.output) / name for name in ("whole", "killed"))
    finish(start(command(whole, args, *period), whole), whole)

    rng = random.Random(args.seed)
    # Which Python runs at the start of every process.
    slow = Path(args.output) / "slow" / "sitecustomize.py"
    slow.parent.mkdir()
    slow.write_text(_SLOW_DISK.format(delay=args.delay))
    path = os.pathsep.join([str(slow.parent.resolve()), os.environ.get("PYTHONPATH", "")])
    last = killed / "last_checkpoint"
    kills = kills_while_writing = 0
    while True:
        for part in killed.glob("*.part"):  # of the kill before
            part.unlink()
        process = start(["--resume", *command(killed, args, *period)], killed, PYTHONPATH=path)
        started = time.monotonic()
        if kills < args.kills and kills % 2 == 0:
            new = rng.randint(0, 1)  # checkpoints to let it write before
            while process.poll() is None and not (new <= 0 and any(killed.glob("*.part"))):
                before = last.exists() and last.read_text()
                time.sleep(0.01)
                new -= (last.exists() and last.read_text()) != before
            time.sleep(rng.uniform(0, args.max_delay))
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, args.max_wait) if kills < args.kills else None)
        if process.poll() is not None:
            finish(process, killed)
            break
        kill(process)
        kills += 1
        writing = [path.name for path in killed.glob("*.part")]
        kills_while_writing += bool(writing)
        print(
            f"kill {kills} after {time.monotonic() - started:.1f} s, "
            f"last checkpoint {last.read_text() if last.exists() else 'none'}"
            + "".join(f", while it wrote {name}" for name in writing),
            flush=True,
        )
    if kills < args.kills:
        raise UserError(f"The run was over after {kills} kills: give more --iterations.")

    weights = [
        torch.load(d / "model_final.pth", weights_only=True)["model"] for d in (whole, killed)
    ]
    different = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    if different:
        raise UserError(f"{len(different)} weights differ; the first is {different[0]}.")
    print(
        f"{args.processes} processes, {args.workers} workers: after {kills} kills, "
        f"{kills_while_writing} of them while a checkpoint was written, all {len(weights[0])} "
        "weights are bit-equal to those of the uninterrupted run."
    )


def test_memory(args: argparse.Namespace) -> None:
    """
    Train, and compare resident memory and open files of all processes at an early iteration with
    those at the end.
    """
    output = Path(args.output) / "memory"
    process = start(command(output, args, "SOLVER.CHECKPOINT_PERIOD", "500"), output)
    samples: list[tuple[int, int, int]] = []
    while process.poll() is None:
        iteration = _iteration(output)
        if iteration and (not samples or iteration > samples[-1][0]):
            try:
                samples.append((iteration, *_usage(process.pid)))
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                break
        time.sleep(0.2)
    finish(process, output)
    samples.pop()  # while they ended
    early, late = next(s for s in samples if s[0] >= args.iterations // 10), samples[-1]
    for iteration, rss, files in samples[:: max(1, len(samples) // 10)] + [late]:
        print(f"iteration {iteration}: resident memory {rss / 2**20:.1f} MiB, {files} open files")
    growth = late[1] / early[1] - 1
    print(
        f"From iteration {early[0]} to {late[0]}: memory {growth:+.1%}, open files "
        f"{late[2] - early[2]:+d}."
    )
    if growth > 0.03 or late[2] > early[2]:
        raise UserError("Memory or open files grew.")


def _iteration(output: Path) -> int:
    """The last one that Detectron2 has logged, every 20."""
    log = output / "metrics.json"
    lines = log.read_text().splitlines() if log.exists() else []
    return 20 * len(lines)


def _usage(pid: int) -> tuple[int, int]:
    """Bytes resident and number of open files, of a process and those it has started."""
    pids, rss, files = [pid], 0, 0
    for p in pids:
        proc = Path(f"/proc/{p}")
        for task in (proc / "task").iterdir():
            pids += map(int, (task / "children").read_text().split())
        rss += int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        files += len(list((proc / "fd").iterdir()))
    return rss, files


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tests = parser.add_subparsers(dest="test", required=True)
    kill_parser = tests.add_parser("kill", help=test_kills.__doc__)
    memory_parser = tests.add_parser("memory", help=test_memory.__doc__)
    kill_parser.add_argument("--kills", type=int, default=20)
    kill_parser.add_argument("--period", type=int, default=3, help="SOLVER.CHECKPOINT_PERIOD")
    kill_parser.add_argument("--max-wait", type=float, default=12, help="seconds until a kill")
    kill_parser.add_argument("--max-delay", type=float, default=0.5, help="seconds into a writing")
    kill_parser.add_argument("--delay", type=float, default=0.005, help="seconds for each write")
    kill_parser.add_argument("--seed", type=int, default=0, help="of the moments")
    for sub, run, iterations in (
        (kill_parser, test_kills, 100),
        (memory_parser, test_memory, 2000),
    ):
        sub.add_argument("--processes", type=int, default=1)
        sub.add_argument("--workers", type=int, default=2, help="of the data loader")
        sub.add_argument("--iterations", type=int, default=iterations)
        sub.add_argument("--output", default="output/stress_test", help="must not exist")
        sub.set_defaults(run=run)
    args = parser.parse_args()
    if os.path.exists(args.output):
        raise UserError(f"--output {args.output} exists: name another directory, or remove it.")
    args.run(args)


if __name__ == "__main__":
    main()

"""
Which operators run on a GPU: the Triton kernels where they give PyTorch's numbers on this GPU, and
of those and PyTorch's own the fastest for each shape.
"""

import functools
import importlib
import importlib.util
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor

from .check import find_difference

# Seconds after which a check counts as failed: compiling for a GPU takes 3.
CHECK_TIMEOUT = 60
_ROUNDS, _RUNS = 4, 3  # of each candidate, in turns
_MARGIN = 0.9  # of the time of the first candidate that another must stay below: clocks are noisy

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """The fastest of some implementations, and the seconds of each."""

    winner: str
    seconds: dict[str, float]


# By operation, dtype and device: whether the kernels may run.
_passed: dict[tuple[str, torch.dtype, torch.device], bool] = {}
# By operation and shape, sizes rounded to powers of two.
_choices: dict[Hashable, Choice] = {}
_seconds_spent = 0.0


def can_choose(x: Tensor) -> bool:
    """
    Whether there is a choice: `x` is on a GPU, not empty, and neither traced, as traces hold
    PyTorch's operators only, nor compiled by torch.compile, which writes kernels of its own.
    """
    if not x.is_cuda or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return x.numel() > 0


def get_kernels(name: str, x: Tensor, *args: int) -> ModuleType | None:
    """
    Args:
        name: "group_norm" or "weight_standardization".
        x: tensor on a GPU to run the kernels on.
        args: other arguments of ``unsupported_reason`` in the module of that name.

    Returns:
        The module of that name, or None if its kernels cannot run on `x` or fail
        :func:`passes_check`; then a warning says why, once for each reason.
    """
    if not has_triton(x.device):
        reason = "Triton is not installed or does not support this GPU"
    else:
        kernels = _import(name)
        reason = kernels.unsupported_reason(x, *args)
        if not reason:
            return kernels if passes_check(name, x.dtype, x.device) else None
    message = f"PyTorch's own operators run in place of Triton kernels: {reason}."
    log_first_n(logging.WARNING, message, key="message")
    return None


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and supports the GPU `device`."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and torch.cuda.get_device_capability(device) >= (7, 0)


def passes_check(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """
    Whether the kernels of an operation give PyTorch's numbers, forward and backward, on small
    inputs in `dtype` on `device`. Computed once per process; a warning says what differs.
    """
    key = name, dtype, device
    if key not in _passed:
        try:
            check = functools.partial(find_difference, _import(name), dtype, device)
            failure = _run_apart(check, device, CHECK_TIMEOUT)
        except Exception as e:  # compilers and drivers raise almost anything
            failure = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        _passed[key] = not failure
        if failure:
            logger.warning(
                f"PyTorch's own operators run in place of the Triton kernels of {name} in {dtype}, "
                f"which fail their check: {failure}. Please report this, with the output of "
                '"python -m detectron2.utils.collect_env".'
            )
    return _passed[key]


def forbid(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Have PyTorch's own operators run, as if the kernels had failed :func:`passes_check`."""
    _passed[name, dtype, device] = False


def fastest(
    key: Hashable, candidates: Mapping[str, Callable[[], Any]], device: torch.device
) -> str:
    """
    Return the name of the fastest of `candidates`, which are timed in turns at the first call with
    `key`: the first, unless another is faster by a tenth. One that raises an error is out.
    """
    choice = _choices.get(key)
    if choice is None:
        first = next(iter(candidates))
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return first  # nothing can be timed in a CUDA graph
        seconds = _run_apart(functools.partial(_time_all, candidates, device), device, None)
        if not seconds:
            return first  # which raises its own error, such as OutOfMemoryError
        winner = min(seconds, key=seconds.__getitem__)
        if seconds[winner] > _MARGIN * seconds.get(first, float("inf")):
            winner = first
        choice = _choices[key] = Choice(winner, seconds)
    return choice.winner


def summarize() -> str:
    """Return a sentence on what has been chosen in this process; "" if nothing was timed."""
    if not _choices:
        return ""
    counts = Counter(choice.winner for choice in _choices.values())
    pairs = [(c.seconds.get("torch", c.seconds[c.winner]), c) for c in _choices.values()]
    before, after = sum(t for t, _ in pairs), sum(c.seconds[c.winner] for _, c in pairs)
    names = ", ".join(f"{name} for {count}" for name, count in counts.most_common())
    return (
        f"The fastest operators for {len(_choices)} shapes: {names}; each once takes "
        f"{after * 1e3:.2f} ms, with PyTorch's alone {before * 1e3:.2f} ms. To check, compile and "
        f"time the kernels took {_seconds_spent:.1f} s."
    )


@functools.cache
def _import(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _run_apart(function: Callable[[], Any], device: torch.device, timeout: float | None) -> Any:
    """
    Run `function` in a thread on the current stream: no autocast, grad mode or hook of the caller
    applies there. Returns its result; raises its error, or TimeoutError.
    """
    global _seconds_spent
    begin = time.perf_counter()
    done: list[tuple[Any, BaseException | None]] = []
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> None:
        try:
            with torch.cuda.stream(stream):  # type: ignore[arg-type]  # None is for the CPU
                done.append((function(), None))
        except BaseException as e:
            done.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    _seconds_spent += time.perf_counter() - begin
    if not done:
        raise TimeoutError(f"no result within {timeout} seconds")
    result, error = done[0]
    if error is not None:
        raise error
    return result


def _time_all(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device
) -> dict[str, float]:
    seconds: dict[str, float] = {}
    left = dict(candidates)
    for _ in range(1 + _ROUNDS):  # the first round compiles
        for name, run in list(left.items()):
            try:
                seconds[name] = min(_time(run, device), seconds.get(name, float("inf")))
            except Exception as e:
                del left[name]
                seconds.pop(name, None)
                logger.warning(f"{name} cannot run here: {' '.join(str(e).split())[:300]}")
    return seconds


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run, of several in a row: as long as it keeps the GPU or the CPU busy."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(_RUNS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _RUNS

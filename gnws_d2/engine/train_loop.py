"""A training step that accumulates gradients and keeps NaN and infinity from the weights."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..utils.errors import UserError
from ..utils.signals import received_signal

_MAX_SKIPPED = 3  # in a row


def _nan_if_diverged(forward: Callable, *args: Any) -> Any:
    """Call `forward`; if proposals are not finite, return a loss of NaN over all parameters."""
    try:
        return forward(*args)
    except FloatingPointError:
        parameters = forward.__self__.parameters()  # type: ignore[attr-defined]
        total = torch.stack([p.sum() for p in parameters if p.requires_grad]).sum()
        return {"loss of the proposals": total * math.nan}


class FiniteTrainer(AMPTrainer):
    """
    :class:`AMPTrainer`, also for float32 and for CPUs, that accumulates gradients, and checks the
    losses and the gradients before each step of the optimizer. If a loss is infinite or NaN in one
    process, all processes stop, or skip the step: they agree in one collective per iteration, which
    also shares signals. After a step ``stop_signal`` is the same in all processes: the number of
    the signal that one of them has received, or 0.

    Proposals that are infinite or NaN, for which Detectron2 raises FloatingPointError, count as a
    loss of NaN.
    """

    def __init__(
        self,
        *args: Any,
        skip: bool,
        last_checkpoint: Callable[[], str],
        accumulate_steps: int = 1,
        precision: str = "",
    ):
        """
        `args` are those of :class:`SimpleTrainer`; `last_checkpoint` returns the path to name in an
        error, or "". `precision` is ``SOLVER.AMP.PRECISION``, or "" for float32. For `skip` and
        `accumulate_steps` see ``SOLVER.ON_NON_FINITE`` and ``SOLVER.ACCUMULATE_STEPS``.
        """
        model, *_ = args
        self._device = next(model.parameters()).device
        scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "float16")
        super().__init__(*args, grad_scaler=scaler)
        # Inside DistributedDataParallel: the other processes wait for the gradients of this one.
        inner = getattr(model, "module", model)
        inner.forward = partial(_nan_if_diverged, inner.forward)
        self.precision = getattr(torch, precision or "float32")
        self.accumulate_steps = accumulate_steps
        self.skip, self.last_checkpoint = skip, last_checkpoint
        self.num_skipped = self.num_skipped_in_a_row = self.stop_signal = 0

    def run_step(self) -> None:
        """Raise :class:`UserError` for what is not finite, with its images."""
        # As in AMPTrainer, which makes one pass and requires a GPU.
        assert self.model.training, "model was changed to eval mode!"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self._files = [record.get("file_name", "?") for record in batch]
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        size, autocast = len(batch) // self.accumulate_steps, self.precision != torch.float32
        loss_dict: dict[str, Tensor] = {}
        for first in range(0, len(batch), size):
            is_last = first + size == len(batch)
            distributed = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if distributed and not is_last else contextlib.nullcontext():
                with torch.autocast(self._device.type, self.precision, enabled=autocast):
                    losses = self.model(batch[first : first + size])
                losses = {name: loss / self.accumulate_steps for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                loss_dict[name] = loss_dict.get(name, 0) + loss.detach()
        if issues := self._find_issues(loss_dict):
            self._skip_or_stop(issues)
            return
        self.num_skipped_in_a_row = 0
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _find_issues(self, loss_dict: dict[str, Tensor]) -> list[str]:
        """Return what is not finite, and in which images. It is the same list in all processes."""
        finite = torch.stack(list(loss_dict.values())).isfinite().all()
        if self._agree(bool(finite)):
            return self._find_gradient_issues()
        issues = [
            f"{name} is {loss.item()} (images {', '.join(self._files)})"
            for name, loss in loss_dict.items()
            if not math.isfinite(loss.item())
        ]
        return [issue for issues in comm.all_gather(issues) for issue in issues]

    def _agree(self, finite: bool) -> bool:
        """Return whether `finite` is True in all processes; share signals and bad images."""
        bad_images = getattr(self.data_loader, "num_bad_images", 0)
        received = [received_signal() == s for s in (signal.SIGTERM, signal.SIGINT)]
        status = torch.tensor([not finite, bad_images, *received], device=self._device)
        if comm.get_world_size() > 1:
            dist.all_reduce(status)
        not_finite, bad_images, sigterm, sigint = status.tolist()
        if bad_images:
            get_event_storage().put_scalar("bad_images", bad_images, smoothing_hint=False)
        self.stop_signal = signal.SIGTERM if sigterm else signal.SIGINT if sigint else 0
        return not not_finite

    def _find_gradient_issues(self) -> list[str]:
        if self.grad_scaler.is_enabled():  # it skips such steps and lowers its scale
            return []
        # DDP has averaged the gradients: they are the same in all processes.
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named], math.inf))
        if norms.isfinite().all():
            return []
        name = next(name for name, grad in named if not grad.isfinite().all())
        files = [file for files in comm.all_gather(self._files) for file in files]
        return [f"the gradient of {name} is not finite (images {', '.join(files)})"]

    def _skip_or_stop(self, issues: list[str]) -> None:
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        if self.skip and self.num_skipped_in_a_row < _MAX_SKIPPED:
            logging.getLogger(__name__).warning(
                f"Iteration {self.iter}: {'; '.join(issues)}. The step is skipped "
                f"({self.num_skipped} so far), as SOLVER.ON_NON_FINITE is skip."
            )
            return
        in_a_row = f", {_MAX_SKIPPED} iterations in a row" if self.skip else ""
        raise UserError(
            f"Iteration {self.iter}: {'; '.join(issues)}{in_a_row}. The last checkpoint is "
            f"{self.last_checkpoint() or 'not written yet'}. Look at the images, or lower "
            "SOLVER.BASE_LR; SOLVER.ON_NON_FINITE skip skips such steps."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run in float32 may be resumed with a scaler.
        scaler = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scaler})

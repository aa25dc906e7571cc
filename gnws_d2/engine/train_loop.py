"""Detectron2's training step, in which no number that is not finite reaches the weights."""

import logging
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..utils.errors import UserError

_MAX_SKIPPED = 3  # in a row


class _SkipStep(Exception):
    pass


class FiniteTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` that checks the losses and the gradients before each step of the
    optimizer. A loss that is infinite or NaN in one process is so for all: they agree in one
    collective per iteration, which also shares signals.

    Set ``received_signal`` when this process gets SIGTERM or SIGINT; ``stop_signal`` is then the
    same in all processes after the next step. 0 is none.
    """

    def __init__(self, *args: Any, skip: bool, last_checkpoint: Callable[[], str], **kwargs: Any):
        """
        Args:
            args, kwargs: see :class:`SimpleTrainer`. The data loader is a :class:`TrainLoader`.
            skip: leave such a step out, unless it is the third in a row (``SOLVER.ON_NON_FINITE``).
            last_checkpoint: returns the path to name in the error, or "".
        """
        super().__init__(*args, **kwargs)
        self.skip, self.last_checkpoint = skip, last_checkpoint
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self.received_signal = self.stop_signal = 0
        self._files: list[str] = []
        self._data_loader_iter_obj = self._remember_files()

    def _remember_files(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.data_loader:
            self._files = [record.get("file_name", "?") for record in batch]
            yield batch

    def run_step(self) -> None:
        """
        Raises:
            UserError: names the iteration, what is not finite, the images and the last checkpoint.
        """
        try:
            super().run_step()
        except FloatingPointError as e:  # of Detectron2, about the proposals
            self._stop([f"{e} ({', '.join(self._files)})"])
        except _SkipStep:
            return
        self.num_skipped_in_a_row = 0

    def _write_metrics(
        self, loss_dict: dict[str, Tensor], data_time: float, *args: Any, **kwargs: Any
    ) -> None:
        # Detectron2 calls this between backward and the step of the optimizer.
        finite = torch.stack([loss.detach() for loss in loss_dict.values()]).isfinite().all()
        if self._agree(bool(finite)):
            # DDP has averaged the gradients: they are the same in all processes.
            issues = list(self._gradient_issues())
        else:
            issues = [
                f"{name} is {loss.item()} (images {', '.join(self._files)})"
                for name, loss in loss_dict.items()
                if not math.isfinite(loss.item())
            ]
            issues = [issue for issues in comm.all_gather(issues) for issue in issues]
        if issues:
            self.num_skipped += 1
            self.num_skipped_in_a_row += 1
            if not self.skip or self.num_skipped_in_a_row == _MAX_SKIPPED:
                self._stop(issues)
            logging.getLogger(__name__).warning(
                f"Iteration {self.iter}: {'; '.join(issues)}. The step is left out "
                f"({self.num_skipped} so far), as SOLVER.ON_NON_FINITE is skip."
            )
            raise _SkipStep
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)

    def _agree(self, finite: bool) -> bool:
        """Whether `finite` is True in all processes; also share signals and bad images."""
        bad_images = getattr(self.data_loader, "num_bad_images", 0)
        received = [self.received_signal == s for s in (signal.SIGTERM, signal.SIGINT)]
        device = next(self.model.parameters()).device
        status = torch.tensor([not finite, bad_images, *received], device=device)
        if comm.get_world_size() > 1:
            dist.all_reduce(status)
        not_finite, bad_images, sigterm, sigint = status.tolist()
        if bad_images:
            get_event_storage().put_scalar("bad_images", bad_images, smoothing_hint=False)
        self.stop_signal = signal.SIGTERM if sigterm else signal.SIGINT if sigint else 0
        return not not_finite

    def _gradient_issues(self) -> Iterator[str]:
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named], math.inf))
        if not norms.isfinite().all():
            name = next(name for name, grad in named if not grad.isfinite().all())
            files = [file for files in comm.all_gather(self._files) for file in files]
            yield f"the gradient of {name} is not finite (images {', '.join(files)})"

    def _stop(self, issues: list[str]) -> None:
        checkpoint = self.last_checkpoint()
        in_a_row = f", {_MAX_SKIPPED} iterations in a row" if self.skip else ""
        raise UserError(
            f"Iteration {self.iter}: {'; '.join(issues)}{in_a_row}. "
            + (f"The last checkpoint is {checkpoint}. " if checkpoint else "No checkpoint yet. ")
            + "Look at the images, or lower SOLVER.BASE_LR; SOLVER.ON_NON_FINITE skip leaves out "
            "such steps."
        )


class FiniteAMPTrainer(FiniteTrainer, AMPTrainer):
    """The same for :class:`AMPTrainer`, whose scaler checks the gradients."""

    def _gradient_issues(self) -> Iterator[str]:
        return iter(())

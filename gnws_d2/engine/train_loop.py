"""Detectron2's training step, in which no number that is not finite reaches the weights."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from ..utils.errors import UserError

_MAX_SKIPPED = 3  # in a row


class _SkipStep(Exception):
    pass


class FiniteTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` that checks the losses and the gradients before each step of the
    optimizer, in all processes together: what is infinite or NaN in one is so for all.
    """

    def __init__(self, *args: Any, skip: bool, last_checkpoint: Callable[[], str], **kwargs: Any):
        """
        Args:
            args, kwargs: see :class:`SimpleTrainer`.
            skip: leave such a step out, unless it is the third in a row (``SOLVER.ON_NON_FINITE``).
            last_checkpoint: returns the path to name in the error, or "".
        """
        super().__init__(*args, **kwargs)
        self.skip, self.last_checkpoint = skip, last_checkpoint
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self._files: list[str] = []
        self.model.register_forward_pre_hook(self._remember_files)

    def _remember_files(self, model: nn.Module, inputs: tuple[list[dict[str, Any]]]) -> None:
        self._files = [record.get("file_name", "?") for record in inputs[0]]

    def run_step(self) -> None:
        """
        Raises:
            UserError: names the iteration, what is not finite, the images and the last checkpoint.
        """
        try:
            super().run_step()
        except FloatingPointError as e:  # Detectron2's, of the proposals
            self._stop([f"{e} ({', '.join(self._files)})"])
        except _SkipStep:
            return
        self.num_skipped_in_a_row = 0

    def _write_metrics(
        self, loss_dict: dict[str, Tensor], data_time: float, *args: Any, **kwargs: Any
    ) -> None:
        # What Detectron2 calls between backward and the step of the optimizer.
        faults = [
            f"{name} is {value} (images {', '.join(self._files)})"
            for name, loss in loss_dict.items()
            if not math.isfinite(value := loss.item())
        ]
        faults = [fault for faults in comm.all_gather(faults) for fault in faults]
        # DDP has averaged the gradients: they are the same in all processes.
        faults = faults or list(self._gradient_faults())
        if faults:
            self.num_skipped += 1
            self.num_skipped_in_a_row += 1
            if not self.skip or self.num_skipped_in_a_row == _MAX_SKIPPED:
                self._stop(faults)
            logging.getLogger(__name__).warning(
                f"Iteration {self.iter}: {'; '.join(faults)}. The step is left out "
                f"({self.num_skipped} so far), as SOLVER.ON_NON_FINITE is skip."
            )
            raise _SkipStep
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)

    def _gradient_faults(self) -> Iterator[str]:
        named = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        grads = [grad for _, grad in named]
        if not torch.nn.utils.get_total_norm(grads, math.inf).isfinite():
            name = next(name for name, grad in named if not grad.isfinite().all())
            files = [file for files in comm.all_gather(self._files) for file in files]
            yield f"the gradient of {name} is not finite (images {', '.join(files)})"

    def _stop(self, faults: list[str]) -> None:
        checkpoint = self.last_checkpoint()
        in_a_row = f", {_MAX_SKIPPED} iterations in a row" if self.skip else ""
        raise UserError(
            f"Iteration {self.iter}: {'; '.join(faults)}{in_a_row}. "
            + (f"The last checkpoint is {checkpoint}. " if checkpoint else "No checkpoint yet. ")
            + "Look at the images, or lower SOLVER.BASE_LR; SOLVER.ON_NON_FINITE skip leaves out "
            "such steps."
        )

    def state_dict(self) -> dict[str, Any]:
        counts = {"num_skipped": self.num_skipped, "in_a_row": self.num_skipped_in_a_row}
        return {**super().state_dict(), "non_finite": counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        counts = state_dict.get("non_finite", {"num_skipped": 0, "in_a_row": 0})
        self.num_skipped, self.num_skipped_in_a_row = counts.values()


class FiniteAMPTrainer(FiniteTrainer, AMPTrainer):
    """The same for :class:`AMPTrainer`, whose scaler looks after the gradients."""

    def _gradient_faults(self) -> Iterator[str]:
        return iter(())

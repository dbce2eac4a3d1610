"""One step of a trainer, from gradients to the scale's move: it ends made or not made, whatever raises on the way."""

from __future__ import annotations

from torch.optim import Optimizer

from halfstep.scale.progress import Progress, note_half_written
from halfstep.scale.scaler import GradScaler
from halfstep.transaction import to_the_end


class Attempt:
    """A step under way.

    Args:
        scaler: may be disabled.
        optimizer: it steps.

    Attributes:
        spoils_gradients: they are unscaled or clipped in memory: a step that is not made cannot be made with them
            again.
    """

    def __init__(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self.spoils_gradients = False
        self._scaler, self._optimizer = scaler, optimizer
        self._progress = None if scaler.is_enabled() else Progress(optimizer)  # the scaler has one of its own
        self._applied: bool | None = None
        self._is_closed = False

    def ended(self, *, applied: bool) -> None:
        """The optimizer has stepped, or was not to."""
        self._applied = applied

    def close(self, *, zero_grad: bool) -> None:
        """What follows a step: gradients go, buffers are put back if it was not applied, the scale moves.

        Raises:
            LossScaleError: too many steps in a row were skipped.
        """
        if zero_grad:
            to_the_end(lambda: self._optimizer.zero_grad(set_to_none=True))
        if not self._scaler.is_enabled():
            to_the_end(lambda: self._scaler.stepped_outside(self._optimizer, applied=self._applied is not False))
        self._is_closed = True
        if self._scaler.is_under_way():
            self._scaler.update()

    def interrupted(self, error: BaseException, *, zero_grad: bool) -> None:
        """Something has raised: do what follows a step that was made, or see that it can be made again."""
        scaler, optimizer = self._scaler, self._optimizer
        made = self._applied is not None or scaler.has_stepped(optimizer)
        if not made and self._progress is not None and self._progress.has_moved():
            made = True
            if not self._progress.is_whole:
                note_half_written(error, optimizer)
        if made:
            if not self._is_closed or scaler.is_under_way():
                self.close(zero_grad=zero_grad)
        elif self.spoils_gradients:
            error.add_note(
                "halfstep: the step was not made. Its gradients had been unscaled or clipped, and are dropped: call "
                "backward() again"
            )
            self._applied = False
            to_the_end(lambda: optimizer.zero_grad(set_to_none=True))
            to_the_end(lambda: scaler.stepped_outside(optimizer, applied=False))
            scaler.abandon(optimizer)
        else:
            scaler.abandon(optimizer)

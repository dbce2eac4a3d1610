"""`BadStepWatch`: the first bad steps of a run, each saved so that it can be run again.

A run that diverges on its third day cannot be asked what happened: the batch is gone, the random numbers are, and
often the weights hold NaN. So a watch remembers of the step under way what costs next to nothing, and writes it to a
file when the step turns out to be bad::

    batches                 all since the last step, as they were handed out; by reference
    random states           before each batch
    buffers                 copied when they changed since the last copy: the forward pass writes to them
    parameters, optimizer   not copied: they change only in the step, which a bad one does not take

That last line is the loss scaler's doing where the policy scales the loss. Elsewhere the watch looks at the gradients
before the optimizer steps, and a step whose gradients hold inf or NaN is not taken. (For this the host waits for the
device, once per watched step. Some optimizers could skip on the device, but then `StepResult` would have to say what
was done before anybody knows.)

Bad is a step with a loss or a gradient that is not finite. A loss scaler looks for its scale by skipping steps, which
is no defect, so skipped steps count only when the loss itself is not finite, or when there are several in a row:
`SETTLING_SKIPS` before the first step that was taken (from 2**16 down to 2**6), and `SETTLED_SKIPS` later.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfstep.observe.step_start import StepStart, bare
from halfstep.observe.watch import GradientReading, GradientWatch, StepWatch, UnreadGradients, summarise
from halfstep.version import __version__

FORMAT = 1
SETTLING_SKIPS = 10
SETTLED_SKIPS = 3
#: Not taking steps for so long is worth another warning.
MANY_HELD_BACK = 50


class BadStepWarning(UserWarning):
    """A step was bad; the message says where it was saved, or why it was not."""


class Trainer(Protocol):
    """What is watched: `halfstep.MixedPrecision`."""

    model: nn.Module

    @property
    def policy(self) -> object: ...

    @property
    def scaler(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...


class BadStepWatch:
    """Remembers the step under way, and saves it if it is bad. Made by `halfstep.MixedPrecision.watch`, which see.

    Attributes:
        saved: the files that were written.
        step: number of the step under way, from 1 on.
    """

    def __init__(
        self,
        trainer: Trainer,
        save: Callable[[object, str | os.PathLike[str]], None],
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        keep: int = 3,
    ) -> None:
        if every < 1 or keep < 0:
            raise ValueError(f"every={every} has to be 1 or more, and keep={keep} 0 or more")
        self.folder = Path(folder)
        self.saved: list[Path] = []
        self.step = 1
        self._trainer = trainer
        self._save = save
        self._every, self._keep = every, keep
        replicated = [part for part in trainer.model.modules() if isinstance(part, nn.parallel.DistributedDataParallel)]
        self._averages = bool(replicated)
        model = bare(trainer.model)
        self._before = StepStart(model)
        self._gradients = GradientWatch(model.named_parameters(), when="backward" if replicated else "accumulated")
        self._losses: list[Tensor] = []
        self._in_a_row = 0
        self._reported_row = False
        self._settled = False
        self._reading: GradientReading | None = None
        self._last: Callable[[], StepWatch] | None = None
        self._stopped = False
        self._closed = False

    def __call__(self, loader: Iterable[Any]) -> WatchedLoader:
        """The loader, whose batches are remembered as they are handed out, with the random states before each."""
        return WatchedLoader(loader, self)

    def __enter__(self) -> BadStepWatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, and let go of everything; files stay."""
        self._closed = True
        self._gradients.remove()
        self._begin()

    @property
    def last(self) -> StepWatch | None:
        """The last watched step: its largest gradient, where, and whether it was taken. Waits for the device."""
        return None if self._last is None else self._last()

    def remember(self, batch: Any) -> None:
        """A batch that the loop gets now."""
        if not self._remembers():
            return
        try:
            self._before.remember(batch)
        except Exception as error:  # whatever a batch is, the run goes on
            self._stop(f"the batch of step {self.step} cannot be remembered: {error!r}")

    def note_loss(self, loss: Tensor) -> None:
        """A loss, before its backward pass; called by `MixedPrecision.backward`."""
        self._gradients.active = self._looks()
        if self._looks():
            self._losses.append(loss.detach())

    def holds_back(self, *, already_stepped: bool = False) -> bool:
        """Look before the optimizer steps, where nothing else does; whether the step must not be taken.

        Args:
            already_stepped: the backward pass has stepped the parameters.
        """
        if not self._looks():
            return False
        self._reading, losses = self._gradients.take().read_with(self._losses)
        elsewhere = self._is_bad_elsewhere(bool(self._reading.nonfinite))
        if not self._reading.nonfinite and not elsewhere and all(map(math.isfinite, losses)):
            return False
        held_back = not already_stepped and (elsewhere or bool(self._reading.nonfinite))
        if held_back:
            done = "The step is not taken: weights and optimizer stay as they were before it"
        elif already_stepped:
            done = (
                "The backward pass has stepped the weights already (release_gradients=True), so they are saved as after"
            )
        else:
            done = "Its gradients are finite, so the step is taken; saved are the weights before it"
        self._report(self._reading, losses, None, done, applied=not held_back)
        return held_back

    def stepped(self, *, applied: bool, scale: float | None) -> None:
        """The step is over, gradients and loss scale are still as they were; called by `MixedPrecision.step`."""
        if self._closed:
            return
        scaled = self._trainer.scaler.is_enabled()
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if self._looks():
            unread = self._gradients.take() if self._reading is None else _Read(self._reading)
            step = self.step
            self._last = lambda: summarise(step, unread.read(), applied=applied, scale=scale)
            if scaled and not applied:
                self._skipped(unread, scale)
        if applied:
            self._settled, self._reported_row = True, False
        elif not scaled and self._in_a_row == MANY_HELD_BACK:
            _warn(
                f"{MANY_HELD_BACK} steps in a row were not taken up to step {self.step}: their gradients are not "
                "finite. Stop the run, and replay one of the steps that were saved"
            )
        self.step += 1
        self._begin()

    def _skipped(self, unread: UnreadGradients | _Read, scale: float | None) -> None:
        reading, losses = unread.read_with(self._losses)
        several = self._in_a_row >= (SETTLED_SKIPS if self._settled else SETTLING_SKIPS) and not self._reported_row
        if several or not all(map(math.isfinite, losses)):
            self._reported_row |= several
            done = "The loss scaler skipped the step: weights and optimizer are as they were before it"
            self._report(reading, losses, scale, done, applied=False)

    def _begin(self) -> None:
        self._before.forget()
        self._losses.clear()
        self._reading = None
        self._gradients.take()

    def _looks(self) -> bool:
        return not self._closed and (self.step - 1) % self._every == 0

    def _remembers(self) -> bool:
        # Looking goes on when nothing more can be saved: steps are still not to be taken, and other ranks ask.
        return self._looks() and not self._stopped and len(self.saved) < self._keep

    def _is_bad_elsewhere(self, bad: bool) -> bool:
        """Whether another rank's gradients are bad: all take the step, or none does."""
        if self._averages or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return bad
        device = next(iter(self._before.devices), "cpu")
        flag = torch.tensor(float(bad), dtype=torch.float32, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def _report(
        self, reading: GradientReading, losses: list[float], scale: float | None, done: str, *, applied: bool
    ) -> None:
        """Save the step, and say so; or say once why not."""
        what = _what(self.step, reading, losses, self._in_a_row if scale is not None else 0)
        if not self._remembers():
            return
        try:
            content = self._content(reading, losses, scale, what, done, applied=applied)
            path = self._write(content)
        except Exception as error:  # a full disk, a folder that cannot be written to: never the end of a run
            self._stop(f"{what}. {done}. It could not be saved: {error}")
            return
        self.saved.append(path)
        rest = "" if content["missing"] == {} else f" (without {len(content['missing'])} things: see Replay.missing)"
        last = ". Further bad steps are not saved" if len(self.saved) == self._keep else ""
        _warn(
            f"{what}. {done}. Saved{rest} to {path}: replay it with "
            f"halfstep.doctor.replay({str(path)!r}), as docs/watch.md shows{last}"
        )

    def _stop(self, why: str) -> None:
        self._stopped = True
        self._before.forget()
        _warn(f"{why}. No further step is saved")

    def _content(
        self, reading: GradientReading, losses: list[float], scale: float | None, what: str, done: str, *, applied: bool
    ) -> dict[str, Any]:
        return {
            "kind": "halfstep bad step",
            "format": FORMAT,
            "halfstep": __version__,
            "torch": str(torch.__version__),
            "step": self.step,
            "policy": str(self._trainer.policy),
            "what": what,
            "done": done,
            "applied": applied,
            "scale": scale,
            "losses": losses,
            "gradients": dict(reading.amax),
            **self._before.content(),
            "scaler": self._trainer.scaler.state_dict(),
            "mp": self._trainer.state_dict(),
        }

    def _write(self, content: dict[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = _claim(self.folder, self.step)
        try:
            try:
                self._save(content, path)
            except ValueError as error:  # halfstep.CheckpointError
                if isinstance(error.__cause__, OSError):
                    raise
                # Most likely the optimizer's state is sharded. The gradients can be replayed without it.
                content["mp"] = None
                content["missing"]["mp"] = f"the optimizer's state: {error}"
                self._save(content, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


class WatchedLoader:
    """A data loader whose batches are remembered; in all else it is the loader."""

    def __init__(self, loader: Iterable[Any], watch: BadStepWatch) -> None:
        self._loader = loader
        self._watch = watch

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self._watch.remember(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises what the loader's own len would

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Read:
    """A reading that the host has, where an unread one is asked."""

    def __init__(self, reading: GradientReading) -> None:
        self._reading = reading

    def read(self) -> GradientReading:
        return self._reading

    def read_with(self, numbers: list[Tensor]) -> tuple[GradientReading, list[float]]:
        return self._reading, UnreadGradients({}).read_with(numbers)[1]


def _claim(folder: Path, step: int) -> Path:
    """A new, empty file, that no other process and no earlier run has or gets."""
    rank = ""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        rank = f"-rank{dist.get_rank()}"
    number = 1
    while True:
        path = folder / f"step-{step:06d}{rank}{f'-{number}' if number > 1 else ''}.pt"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def _what(step: int, reading: GradientReading, losses: list[float], in_a_row: int) -> str:
    said = []
    bad_losses = [loss for loss in losses if not math.isfinite(loss)]
    if bad_losses:
        said.append(f"the loss is {bad_losses[0]}")
    if bad := reading.nonfinite:
        rest = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        said.append(f"the gradient of {bad[0]}{rest} is {reading.amax[bad[0]]}")
    if in_a_row > 1:
        said.append(f"it is skipped step {in_a_row} in a row")
    return f"step {step} is bad: " + ("; ".join(said) or "gradients of another rank are not finite")


def _warn(message: str) -> None:
    """Warn at the line of the user's loop that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("halfstep", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, BadStepWarning, stacklevel=level)

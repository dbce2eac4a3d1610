"""Skipped steps: known on the device at once, and on the host only when somebody has to know.

`torch.amp.GradScaler` with a fused optimizer never waits for the device. Counting skips must not change that, so the
answers are collected as tensors and read together: when asked, or when the count could have reached its limit. After
a good step nothing has to be read for ``max_skipped - 1`` updates, and still the error comes at the exact update.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from halfstep.scale.diagnosis import Cause
from halfstep.transfer import moved

#: Unread answers are read at this number even if nobody asks.
MOST_UNREAD = 1000


@dataclass(frozen=True)
class Skip:
    """A skipped step, as ``on_skip`` is told of it."""

    cause: Cause
    scale: float  #: the loss scale of the gradients that overflowed
    next_scale: float  #: the loss scale from now on
    in_a_row: int  #: skipped updates in a row, this one included
    in_all: int  #: skipped updates of the run, this one included


class Verdict:
    """Whether gradients overflowed.

    Args:
        found_inf: above 0 if they did; on the device.
        overflowed: the same, where the host knows it.
    """

    def __init__(self, found_inf: Tensor, overflowed: bool | None = None) -> None:
        self.found_inf = found_inf
        self._overflowed = overflowed

    @property
    def is_known(self) -> bool:
        return self._overflowed is not None

    @property
    def overflowed(self) -> bool:
        """Waits for the device, the first time."""
        if self._overflowed is None:
            self._overflowed = bool(self.found_inf.item())
        return self._overflowed

    def know(self, overflowed: bool) -> None:
        """The host has read it, with other things."""
        self._overflowed = overflowed


def read_together(numbers: Sequence[Tensor], verdict: Verdict | None) -> list[float]:
    """Numbers of one element each, for the host; the verdict becomes known in the same wait for the device."""
    asked = list(numbers)
    if verdict is not None and not verdict.is_known:
        asked.append(verdict.found_inf)
    if not asked:
        return []
    # Put together where the others would have to be waited for, if they came from there.
    device = next((n.device for n in asked if n.device.type != "cpu"), asked[0].device)
    values: list[float] = torch.stack([moved(n.detach().reshape(()), device, torch.float64) for n in asked]).tolist()
    if len(asked) > len(numbers) and verdict is not None:
        verdict.know(bool(values.pop()))
    return values


class Verdicts:
    """The last verdict on each optimizer, and on all of them together."""

    def __init__(self) -> None:
        self.last: Verdict | None = None
        #: With PyTorch's state of the step that it is of, which is made anew for each.
        self._of: weakref.WeakKeyDictionary[Optimizer, tuple[Verdict, dict[str, Any]]] = weakref.WeakKeyDictionary()

    def forget(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """A step of this optimizer begins: a verdict on another is of the past."""
        if optimizer in self._of and self._of[optimizer][1] is not state:
            del self._of[optimizer]

    def get(self, optimizer: Optimizer) -> Verdict | None:
        return self._of[optimizer][0] if optimizer in self._of else None

    def present(self, optimizer: Optimizer, states: dict[int, dict[str, Any]], device: torch.device) -> Verdict | None:
        """The verdict on a step that can be made now, its gradients being unscaled; else on the last one."""
        state = states.get(id(optimizer), {})
        ready = state.get("stage") is OptState.UNSCALED
        return self.of(optimizer, state, device) if ready else self.get(optimizer)

    def of(self, optimizer: Optimizer, state: dict[str, Any], device: torch.device) -> Verdict:
        """The verdict on the step under way, from PyTorch's per-optimizer state."""
        self.forget(optimizer, state)
        if optimizer not in self._of:
            self.last = Verdict(total(state["found_inf_per_device"].values(), device))
            self._of[optimizer] = (self.last, state)
        return self._of[optimizer][0]

    def on(self, optimizer: Optimizer, state: dict[str, Any], device: torch.device) -> Verdict:
        """The same for whoever steps nothing: `last` stays what it is."""
        known = self._of.get(optimizer)
        if known is not None and known[1] is state:
            return known[0]
        return Verdict(total(state["found_inf_per_device"].values(), device))

    def together(self, states: dict[int, dict[str, Any]], device: torch.device) -> Verdict | None:
        """The verdict on an iteration; None if nothing was checked in it."""
        known = {id(optimizer): verdict for optimizer, (verdict, _) in self._of.items()}
        if len(states) == 1:
            ((only, state),) = states.items()
            if only in known and state["stage"] is OptState.STEPPED and state["found_inf_per_device"]:
                return known[only]
        found: list[Tensor] = []
        answers: list[bool | None] = []
        for key, state in states.items():
            flags = state["found_inf_per_device"].values()
            if flags:
                found += flags
                verdict = known.get(key) if state["stage"] is OptState.STEPPED else None
                answers.append(verdict.overflowed if verdict is not None and verdict.is_known else None)
        if not found:
            return None
        return Verdict(total(found, device), True if True in answers else None if None in answers else False)


def total(flags: Iterable[Tensor], device: torch.device) -> Tensor:
    """One flag for several, on ``device``: above 0 if any of them is. Free of waiting."""
    there = [moved(flag, device) for flag in flags]
    if len(there) == 1:
        return there[0] if there[0].dim() == 0 else there[0].reshape(())
    if not there:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack([flag.reshape(()) for flag in there]).sum()


class SkipCount:
    """Updates in which a step was skipped: all of them, and the last ones in a row."""

    def __init__(self, in_all: int = 0, in_a_row: int = 0) -> None:
        self._in_all = in_all
        self._in_a_row = in_a_row
        self._unread: list[Verdict] = []

    def with_one_more(self, verdict: Verdict) -> SkipCount:
        """The count after another update. Free of waiting, but where answers have piled up."""
        following = SkipCount(self._in_all, self._in_a_row)
        following._unread = [*self._unread, verdict]
        if all(each.is_known for each in following._unread) or len(following._unread) >= MOST_UNREAD:
            following._read()
        return following

    def may_have_reached(self, limit: int) -> bool:
        """Whether ``limit`` skips in a row are possible; False needs no reading."""
        return self._in_a_row + len(self._unread) >= limit

    @property
    def in_all(self) -> int:
        self._read()
        return self._in_all

    @property
    def in_a_row(self) -> int:
        self._read()
        return self._in_a_row

    def state(self) -> dict[str, int]:
        """For a state dict. Waits for the device where answers are unread."""
        return {"_skipped_steps": self.in_all, "_skipped_in_a_row": self.in_a_row}

    def loaded(self, state: dict[str, Any]) -> SkipCount:
        """A count that goes on from what `state` returned; where that says nothing, from this one."""
        return SkipCount(state.get("_skipped_steps", self.in_all), state.get("_skipped_in_a_row", self.in_a_row))

    def _read(self) -> None:
        unknown = [verdict.found_inf for verdict in self._unread if not verdict.is_known]
        answers = iter(torch.stack(unknown).tolist() if unknown else [])
        in_all, in_a_row = self._in_all, self._in_a_row
        for verdict in self._unread:
            skipped = verdict.overflowed if verdict.is_known else bool(next(answers))
            in_all += skipped
            in_a_row = in_a_row + 1 if skipped else 0
        self._in_all, self._in_a_row, self._unread = in_all, in_a_row, []

"""HS203, HS205, HS206: the course of the loss scale, and what it says about an overflow.

A scaler that skips steps is doing its work while its first scale is too high (HS206, a note). It is of no use where the
forward pass overflows: an inf reached the very loss that was scaled (HS203). It has failed when its scale falls below 1
or step after step is skipped (HS205): PyTorch's reaches 0 after 166 such steps without a word.

Every `torch.amp.GradScaler`, subclasses included, is followed by wrapping its ``scale`` and ``update``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from halfstep import formats
from halfstep.doctor.finding import Finding, Severity

#: Skips in a row from which a scaler is not settling any more: 65536 halved ten times is 64.
_TOO_MANY = 10
#: What `Finding.numbers` calls the tensor that a backward pass starts from, among what an effect can reach.
LOSS = "the loss"
#: Below it, 1 / scale is beyond FP32.
_SMALLEST_INVERTIBLE = 2.0**-126
_FORWARD_CAUSES = ("HS101", "HS102", "HS104", "HS105", "HS110", "HS403")


@dataclass(frozen=True)
class ScaleStep:
    """One ``update`` of a scaler."""

    scale: float  #: of the gradients of this step
    applied: bool


class ScaleCourse:
    """The loss scale and skips of everything that runs while entered.

    Attributes:
        scale: the loss scale in use; None before any loss was scaled.
        steps: one per update.
    """

    def __init__(self) -> None:
        self.scale: float | None = None
        self.steps: list[ScaleStep] = []
        self._inside = False
        self._patched: list[tuple[type, str, Any]] = []

    def __enter__(self) -> ScaleCourse:
        for cls in _with_subclasses(torch.amp.GradScaler):
            for name, wrap in (("scale", self._scaling), ("update", self._updating)):
                if name in vars(cls):
                    original = vars(cls)[name]
                    self._patched.append((cls, name, original))
                    setattr(cls, name, wrap(original))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for cls, name, original in self._patched:
            setattr(cls, name, original)
        self._patched.clear()

    def note(self, scale: float, applied: bool) -> None:
        """A step of a loop that scales without a scaler."""
        self.scale = scale
        self.steps.append(ScaleStep(scale, applied))

    def judge(self, findings: Sequence[Finding]) -> list[Finding]:
        """The findings in the light of the course: overflow of scaled gradients is the scaler's business first."""
        settling = [finding for finding in findings if _lower_scale_helps(finding)]
        in_a_row = self._skipped_at_the_end()
        lowest = min((step.scale for step in self.steps), default=1.0)
        collapsed = in_a_row >= _TOO_MANY or lowest < 1.0
        forward = [f for f in findings if f.code in _FORWARD_CAUSES and f.place and f.place.phase == "forward"]
        judged = [finding for finding in findings if finding not in settling]
        if collapsed:  # dividing by a scale that has become 0 is what came of it
            judged = [finding for finding in judged if finding.code != "HS102" or lowest >= _SMALLEST_INVERTIBLE]
        lost = [cause for cause in forward if cause.numbers.get("reached") == LOSS]
        skipped = sum(not step.applied for step in self.steps)
        if collapsed:
            said = f"{in_a_row} steps in a row were skipped and the loss scale fell to {lowest:g}"
            judged.append(self._collapse(said, in_a_row, lowest))
            judged += self._hopeless(said, in_a_row, lowest, forward)
        elif skipped and lost:
            said = f"{skipped} of {len(self.steps)} steps were skipped"
            judged += self._hopeless(said, in_a_row, lowest, lost)
        elif settling:
            judged.append(self._settling(settling))
        return judged

    def _skipped_at_the_end(self) -> int:
        applied = [i for i, step in enumerate(self.steps) if step.applied]
        return len(self.steps) - 1 - applied[-1] if applied else len(self.steps)

    def _collapse(self, said: str, in_a_row: int, lowest: float) -> Finding:
        return Finding(
            "HS205",
            None,
            said,
            "Nothing is trained any more; a scale that reaches 0 writes NaN into every weight.",
            "Stop, and repair what overflows. halfstep.GradScaler stops by itself and says why.",
            Severity.ERROR,
            {"skipped_in_a_row": in_a_row, "lowest_scale": lowest, "steps": len(self.steps)},
        )

    def _hopeless(self, said: str, in_a_row: int, lowest: float, forward: Sequence[Finding]) -> Iterator[Finding]:
        for cause in forward[:1]:
            yield Finding(
                "HS203",
                cause.place,
                f"{said}, but it is the forward pass that overflows ({cause.code} here)",
                "The forward pass runs before the scale is multiplied in: no scale can help.",
                cause.remedy,
                Severity.ERROR,
                {"skipped_in_a_row": in_a_row, "lowest_scale": lowest, "steps": len(self.steps)},
            )

    def _settling(self, settling: Sequence[Finding]) -> Finding:
        first = settling[0]
        skipped = sum(not step.applied for step in self.steps)
        return replace(
            first,
            code="HS206",
            what=f"scaled gradients overflow at loss scale {first.numbers['loss_scale']:g}"
            + (f"; {skipped} of {len(self.steps)} steps were skipped" if self.steps else ""),
            consequence="Ordinary while the scaler looks for its scale: a skipped step leaves the model as it was.",
            remedy="Nothing to do, or start lower (init_scale).",
            severity=Severity.NOTE,
            count=sum(finding.count for finding in settling),
        )

    # ------------------------------------------------------------------ following scalers

    def _scaling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scaler, *args, **kwargs)
            if not self._inside and scaler.is_enabled():
                self.scale = float(scaler.get_scale())
            return result

        return scale

    def _updating(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside or not scaler.is_enabled():
                return original(scaler, *args, **kwargs)
            before = float(scaler.get_scale())
            states = list(getattr(scaler, "_per_optimizer_states", {}).values())
            found = any(float(flag) > 0 for state in states for flag in state["found_inf_per_device"].values())
            self._inside = True
            try:
                result = original(scaler, *args, **kwargs)
            finally:
                self._inside = False
            self.scale = float(scaler.get_scale())
            self.steps.append(ScaleStep(before, not (found or self.scale < before)))
            return result

        return update


def _lower_scale_helps(finding: Finding) -> bool:
    """Whether it is an overflow of scaled gradients that a scale of 1 would not have."""
    if finding.code != "HS101" or finding.place is None or finding.place.phase != "backward":
        return False
    scale, amax = finding.numbers.get("loss_scale", 1.0), finding.numbers.get("fp32_amax", 0.0)
    assert not isinstance(scale, str) and not isinstance(amax, str)
    return scale > 1 and amax / scale < formats.FORMATS["fp16"].overflow_threshold


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    subclasses: list[type[Any]] = cls.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)

"""The catalogue of findings: every code with its title and what finds it.

A code never changes its meaning and is never used again. Each has a page, ``pages/HS101.md``, that ``halfstep explain
HS101`` shows: what it is, how it looks, the smallest reproduction, what to do about it, and threads of people who met
it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

#: examine: seen in ops that ran · predict: from one FP32 step · lint: before the first step · run: in the run's course
Source = Literal["examine", "predict", "lint", "run"]


@dataclass(frozen=True)
class Code:
    """One entry of the catalogue."""

    code: str
    title: str
    source: Source

    @property
    def page(self) -> str:
        """The documentation page, in Markdown."""
        return files("halfstep.doctor").joinpath("pages", f"{self.code}.md").read_text(encoding="utf-8")


class UnknownCodeError(ValueError):
    """There is no finding of this code."""


def _catalogue(*codes: tuple[str, Source, str]) -> Mapping[str, Code]:
    return MappingProxyType({code: Code(code, title, source) for code, source, title in codes})


CODES: Mapping[str, Code] = _catalogue(
    # range
    ("HS101", "examine", "a result is beyond the format's largest number"),
    ("HS102", "examine", "an op makes inf or NaN in FP32 too"),
    ("HS103", "examine", "an overflow turned into a wrong finite number"),
    ("HS104", "examine", "a softmax over nothing but -inf"),
    ("HS105", "examine", "division or logarithm of a zero that rounding made"),
    ("HS106", "examine", "values flush to zero"),
    ("HS107", "predict", "this op will overflow in the format"),
    ("HS108", "predict", "the format is not usable for this model"),
    ("HS109", "predict", "little headroom below the format's largest number"),
    ("HS110", "examine", "the data hold inf or NaN"),
    # loss scale
    ("HS201", "examine", "gradients flush to zero"),
    ("HS202", "predict", "gradients will flush to zero without a loss scale"),
    ("HS203", "run", "no loss scale can help: the forward pass overflows"),
    ("HS204", "predict", "no static loss scale fits all gradients"),
    ("HS205", "run", "the loss scale collapsed"),
    ("HS206", "run", "the loss scale is still settling"),
    ("HS207", "lint", "a loss scaler where the format needs none"),
    ("HS208", "lint", "fp16 training without a loss scaler"),
    # updates and state
    ("HS301", "examine", "weight updates are lost to rounding"),
    ("HS302", "examine", "accumulated gradients are lost to rounding"),
    ("HS303", "examine", "a running sum or average stands still"),
    ("HS304", "lint", "16-bit parameters without FP32 masters"),
    ("HS305", "lint", "optimizer state in 16 bits"),
    ("HS306", "lint", "the learning rate is below what the weights can take up"),
    ("HS307", "lint", "beta rounds to 1 in the state's format"),
    ("HS308", "lint", "eps rounds to zero in the parameters' format"),
    ("HS309", "lint", "weight decay rounds away in the parameters' format"),
    ("HS310", "lint", "running statistics or averages kept in 16 bits"),
    ("HS311", "lint", "a compiler may remove this optimizer's compensation"),
    # casts and constants
    ("HS401", "examine", "a constant rounds to zero"),
    ("HS402", "examine", "a constant rounds to one"),
    ("HS403", "examine", "a constant is beyond the format's range"),
    ("HS404", "examine", "positions collide"),
    ("HS405", "examine", "different inputs become equal"),
    ("HS406", "examine", "a difference cancels to rounding noise"),
    ("HS407", "examine", "one op multiplies the rounding error"),
    ("HS408", "examine", "a discrete decision differs from FP32's"),
    ("HS409", "lint", "positions or frequencies stored in 16 bits"),
    ("HS410", "lint", "cross-entropy of probabilities under autocast"),
    # hardware and set-up
    ("HS501", "lint", "autocast has no effect"),
    ("HS502", "lint", "fp16 where the hardware has no fast fp16"),
    ("HS503", "lint", "bf16 where the hardware emulates it"),
    ("HS504", "lint", "a compiled model was examined in eager mode"),
    ("HS505", "lint", "a checkpoint's 16-bit weights and an optimizer made for FP32"),
    ("HS506", "run", "a detector failed"),
    ("HS507", "run", "the FP32 shadow could not follow an op"),
    ("HS508", "lint", "gradients are reduced across ranks in 16 bits"),
)


def get(code: str) -> Code:
    """The entry of a code.

    Raises:
        UnknownCodeError: no such code; near ones are named.
    """
    known = CODES.get(code.strip().upper())
    if known is None:
        near = difflib.get_close_matches(code.strip().upper(), CODES, n=3)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise UnknownCodeError(f"there is no finding {code!r}.{hint} `halfstep explain` lists all.")
    return known

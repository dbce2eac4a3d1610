"""Optimizer state in 16 bits: moments, the betas and eps that work on them, and compensation under a compiler.

A moment is a running average, ``v = beta * v + (1 - beta) * g**2``. In 16 bits it can only fall if ``beta * v`` rounds
to something below v; with beta2 = 0.999 a thousandth has to go, and bf16's spacing is a hundredth. The average then
rises with every large gradient and never comes down.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lints.keeping import Group
from halfstep.doctor.lints.parameters import unmoved_significands
from halfstep.doctor.lints.setting import LOW_PRECISION, Setting, finding, some
from halfstep.formats import Format, of

_AVERAGES = ("betas", "alpha", "rho", "momentum")  # hyperparameters that multiply state in every step
_FP32_STATE = "Keep the state in FP32: FP32 parameters under autocast, or masters (halfstep.MasterWeights(optimizer))."


def moments(setting: Setting) -> Iterator[Finding]:
    """HS305: moments in 16 bits, or what will be: PyTorch gives state its parameter's dtype."""
    for optimizer in dict.fromkeys(id(group.optimizer) for group in setting.groups):
        groups = [group for group in setting.groups if id(group.optimizer) == optimizer]
        by_format: dict[Format, list[tuple[Tensor, list[str], bool]]] = {}
        for group in groups:
            bare = {id(p) for p in group.bare}
            for parameter, states in group.moments:
                for format in dict.fromkeys(of(dtype) for dtype in states.values()):
                    names = [name for name, dtype in states.items() if of(dtype) == format]
                    by_format.setdefault(format, []).append((parameter, names, id(parameter) in bare))
        trained = sum(len(group.parameters) for group in groups)
        for format, found in by_format.items():
            first, names, _ = found[0]
            deliberate = not any(is_bare for _, _, is_bare in found)  # an optimizer that thought of rounding chose this
            limit = (
                f"In fp16 the square of a gradient below {(format.smallest_subnormal / 2) ** 0.5:.1e} is zero."
                if format.emin > -126
                else f"In {format} an average moves in steps of 1/{2 ** (format.mantissa_bits + 1)} of itself or more."
            )
            yield finding(
                "HS305",
                setting.at_parameter(groups[0].name, first),
                Severity.NOTE if deliberate else Severity.WARNING,
                f"{groups[0].name} keeps {' and '.join(names)} in {format} for "
                f"{some(len(found), trained, 'trainable parameter')}; first: {setting.name(first)}",
                limit,
                _FP32_STATE,
                parameters=len(found),
                of_parameters=trained,
                format=str(format),
            )


def betas(setting: Setting) -> Iterator[Finding]:
    """HS307: numbers of the state's format that a beta, multiplied with them, leaves where they are."""
    said = set()
    for group, parameter, format in _low_state(setting):
        for name, beta in group.numbers(*_AVERAGES):
            if not 0 < beta < 1:
                continue
            share = unmoved_significands(beta, format)
            if not share or (key := (group.name, name, beta, format.name)) in said:
                continue
            said.add(key)
            yield finding(
                "HS307",
                setting.at_parameter(group.name, parameter),
                Severity.WARNING,
                f"multiplied by {name} = {beta:g}, {share:.0%} of all {format} numbers round back to themselves, and "
                f"{group.name}'s state is in {format}",
                "The average rises with large gradients and never falls again: the steps become too small, and stay so."
                if share == 1
                else "The average stops falling at the first such number that it comes to.",
                f"{_FP32_STATE} Or take a beta that is at least {format.eps / 2:.2g} below 1.",
                share=share,
                beta=beta,
                format=str(format),
            )


def eps(setting: Setting) -> Iterator[Finding]:
    """HS308: an eps that is added to 16-bit numbers and is nothing there. Not fused: those add in FP32."""
    said = set()
    for group, parameter, format in _low_state(setting):
        if group.rounds_once:
            continue
        for name, value in group.numbers("eps"):
            if value <= 0 or value >= format.tiny or (key := (group.name, value, format.name)) in said:
                continue
            said.add(key)
            is_zero = value <= format.smallest_subnormal / 2
            limit = format.smallest_subnormal if is_zero else format.tiny
            yield finding(
                "HS308",
                setting.at_parameter(group.name, parameter),
                Severity.ERROR if is_zero else Severity.NOTE,
                f"{name} = {value:g} {'rounds to zero' if is_zero else 'is subnormal'} in {format}, in which "
                f"{group.name} adds it to the root of its state (the smallest "
                f"{'' if is_zero else 'normal '}number is {limit:.2g})",
                "Where the squared gradients are zero the update is 0/0 = NaN, or inf, in the first step."
                if is_zero
                else "It is rounded by more than the format rounds elsewhere.",
                f"{_FP32_STATE} Or take an eps of {format.tiny:.1e} or more, or a fused optimizer, which adds in FP32."
                if is_zero
                else _FP32_STATE,
                eps=value,
                format=str(format),
            )


def compensation(setting: Setting) -> Iterator[Finding]:
    """HS311: an optimizer that carries rounding errors along, and a compiler that simplifies rounding away."""
    said = set()
    for group in setting.groups:
        optimizer: Any = group.optimizer
        low = [p for p in group.parameters if p.dtype in LOW_PRECISION]
        # halfstep's own do not count as compensated here: they refuse to be traced.
        if not group.compensated or not low or id(optimizer) in said:
            continue
        compiled = _compiled_step(optimizer)
        if compiled is None or _casts_are_kept():
            continue
        said.add(id(optimizer))
        yield finding(
            "HS311",
            setting.at_parameter(group.name, low[0]),
            Severity.WARNING,
            f"{group.name} carries rounding errors of {len(low)} 16-bit parameters from step to step, and {compiled}",
            "Inductor removes casts to 16 bits and back, so the error that it computes is zero and small updates are "
            "lost again, without a word.",
            "Set torch._inductor.config.emulate_precision_casts = True, or do not compile the step; "
            "halfstep.optim's remainders are integers and survive.",
            parameters=len(low),
        )


def _low_state(setting: Setting) -> Iterator[tuple[Group, Tensor, Format]]:
    """Per group the format that all of its state is in, where that is 16 bits by no choice of the optimizer's."""
    for group in setting.groups:
        bare = {id(p) for p in group.bare}
        formats: dict[Format, Tensor] = {}
        for parameter, states in group.moments:
            if id(parameter) in bare and group.all_moments_low:
                for dtype in states.values():
                    formats.setdefault(of(dtype), parameter)
        for format, parameter in formats.items():
            yield group, parameter, format


def _compiled_step(optimizer: Any) -> str | None:
    """What of the step is compiled: itself, or a function of the optimizer's own module that it calls."""
    if _is_compiled(optimizer.step) or _is_compiled(type(optimizer).step):
        return "its step is compiled"
    step: Any = type(optimizer).step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    home = sys.modules.get(step.__module__)
    for name in getattr(getattr(step, "__code__", None), "co_names", ()):
        if _is_compiled(getattr(home, name, None)):
            return f"its step calls {name}, which is compiled"
    return None


def _is_compiled(function: Any) -> bool:
    function = getattr(function, "__func__", function)
    return callable(getattr(function, "_torchdynamo_orig_callable", None))


def _casts_are_kept() -> bool:
    config = sys.modules.get("torch._inductor.config")
    return bool(getattr(config, "emulate_precision_casts", False))

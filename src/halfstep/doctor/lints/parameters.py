"""Weights in 16 bits: what remembers their updates, and whether the updates are large enough to be seen.

A number of m mantissa bits at magnitude 2^E is one of a grid with spacing ``ulp = 2^(E - m)``. Rounded to nearest, an
update below ulp / 2 changes nothing, today or after a million steps. Adam's updates have about the size of the
learning rate, so the weights that it cannot move are known before the first step: all from a certain power of two on.

Decoupled weight decay multiplies by ``1 - lr * weight_decay``. That moves a weight by the same share wherever it is, so
whether it rounds away depends on the significand only, and all 2^m of them can be tried.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lints import asking
from halfstep.doctor.lints.keeping import Group
from halfstep.doctor.lints.setting import LOW_PRECISION, Setting, finding, format_of, some
from halfstep.formats import Format, round_to
from halfstep.optim.layout import local

_WITH_MASTERS = (
    "Step them with FP32 masters (halfstep.MasterWeights(optimizer), halfstep.optim.AdamW, or a {format}-master "
    "policy), or keep the parameters in FP32 and let autocast compute in {format} ({format}-mixed)."
)
_FEW = 0.01  # of a group's weights: below, an update that is lost here and there is like any rounding
_MOST = 0.5
_LOOKED_AT = 2**20  # of a parameter's weights, evenly spaced: of a large model all would take minutes


def without_masters(setting: Setting) -> Iterator[Finding]:
    """HS304: 16-bit parameters that nothing remembers beyond their 16 bits."""
    said = {id(p) for _, _, parameters in _of_checkpoints(setting) for p in parameters}
    for name, certain, format, bare, total in _bare(setting):
        left = [p for p in bare if id(p) not in said]
        if not left:
            continue
        elements = sum(p.numel() for p in left)
        keeps = (
            "keeps nothing of an update that their bits cannot hold"
            if certain
            else "may or may not make FP32 masters in its first step: it is not known here"
        )
        yield finding(
            "HS304",
            setting.at_parameter(name, left[0]),
            Severity.WARNING if certain else Severity.NOTE,
            f"{some(len(left), total, 'trainable parameter')} ({elements:,} elements) "
            f"{'is' if total == 1 else 'are'} {format}, and {name} {keeps}; first: {setting.name(left[0])}",
            _lost_below(format),
            _WITH_MASTERS.format(format=format),
            parameters=len(left),
            of_parameters=total,
            elements=elements,
            format=str(format),
        )


def from_checkpoint(setting: Setting) -> Iterator[Finding]:
    """HS505: HS304, where the model says that it was loaded in its checkpoint's 16-bit format."""
    for path, module, parameters in _of_checkpoints(setting):
        format = format_of(parameters[0])
        stepped = next(g.name for g in setting.groups if any(p is parameters[0] for p in g.bare))
        elements = sum(p.numel() for p in parameters)
        trained = sum(p.requires_grad for p in module.parameters())
        place = setting.at_module(path, module, setting.name(parameters[0]))
        yield finding(
            "HS505",
            place,
            Severity.WARNING,
            f"{type(module).__name__} was loaded in its checkpoint's {format}, as its config says, and {stepped} "
            f"steps {some(len(parameters), trained, 'trainable parameter')} ({elements:,} elements) in it without FP32 "
            "masters",
            f"{_lost_below(format)} Scripts written when models were loaded in FP32 do this without a change.",
            f"Load it in FP32 (from_pretrained(..., dtype=torch.float32)) and train under {format}-mixed; or keep it "
            f"in {format} and step it with FP32 masters (halfstep.MasterWeights(optimizer), a {format}-master policy).",
            parameters=len(parameters),
            of_parameters=trained,
            elements=elements,
            format=str(format),
        )


def learning_rate(setting: Setting) -> Iterator[Finding]:
    """HS306: the share of a group's 16-bit weights that an update of the size of the learning rate does not move."""
    for group in setting.groups:
        lr = _largest_learning_rate(group)
        if not group.certain or not lr:
            continue
        for format, parameters in _by_format(group.bare).items():
            normalised = asking.is_normalised(group.optimizer, group.options)
            if normalised is None:
                normalised = "betas" in group.options
            if normalised:
                lost, total = _unmoved_by(lr, format, parameters)
                size = f"an update of the learning rate's size, {lr:g},"
            else:
                lost, total = _unmoved_by_gradients(lr / (1 - (group.number("momentum") or 0.0)), parameters)
                size = f"the learning rate {lr:g} times the gradients that are there now"
            if not total or lost / total < _FEW:
                continue
            share = lost / total
            yield finding(
                "HS306",
                setting.at_parameter(group.name, parameters[0]),
                Severity.ERROR if share >= _MOST else Severity.WARNING,
                f"{size} is below half the {format} spacing of {share:.1%} of the weights "
                f"({lost:,} of {total:,} looked at in {some(len(parameters), len(parameters), 'parameter')}; "
                f"first: {setting.name(parameters[0])})",
                "Rounded to nearest, such an update changes nothing, in this step or in any later one.",
                _WITH_MASTERS.format(format=format) + " A larger learning rate is no substitute.",
                share=share,
                weights=total,
                learning_rate=lr,
                format=str(format),
            )


def weight_decay(setting: Setting) -> Iterator[Finding]:
    """HS309: decoupled weight decay that rounds away. Not where the step rounds decay and update together (fused)."""
    said = set()
    for group in setting.groups:
        lr, decay = _largest_learning_rate(group), group.number("weight_decay")
        if not lr or not decay or not group.options.get("decoupled_weight_decay"):
            continue
        if group.rounds_once or not group.certain:
            continue
        for format, parameters in _by_format(group.bare).items():
            share = unmoved_significands(1 - lr * decay, format)
            if not share or (key := (group.name, lr * decay, format.name)) in said:
                continue
            said.add(key)
            yield finding(
                "HS309",
                setting.at_parameter(group.name, parameters[0]),
                Severity.WARNING,
                f"multiplied by 1 - lr * weight_decay = 1 - {lr * decay:g}, {share:.0%} of all {format} numbers round "
                f"back to themselves ({some(len(parameters), len(parameters), 'parameter')}; "
                f"first: {setting.name(parameters[0])})",
                "Weights are not decayed." if share == 1 else "Decay ends at the first such number it comes to.",
                f"{_WITH_MASTERS.format(format=format)} Or use a fused optimizer, which rounds once.",
                share=share,
                decay=lr * decay,
                format=str(format),
            )


def unmoved_significands(factor: float, format: Format) -> float:
    """The share of a format's numbers that, multiplied by ``factor``, round back to themselves.

    All numbers of one octave are tried; in every other octave of normal numbers it is the same.
    """
    steps = torch.arange(2**format.mantissa_bits, dtype=torch.float64, device="cpu")
    significands = 1 + steps / 2**format.mantissa_bits
    return float((round_to(significands * factor, format) == significands).double().mean())


def smallest_unmoved(update: float, format: Format) -> float:
    """The magnitude from which on ``update`` is below half the spacing: a power of two, 0, or inf for never."""
    if update < format.ulp(0.0) / 2:
        return 0.0
    for exponent in range(format.emin, format.emax + 1):
        if update < format.ulp(math.ldexp(1.0, exponent)) / 2:
            return math.ldexp(1.0, exponent)
    return math.inf


def _unmoved_by(update: float, format: Format, parameters: Iterable[Tensor]) -> tuple[int, int]:
    limit = smallest_unmoved(update, format)
    lost = total = 0
    for parameter in parameters:
        if not parameter.is_meta:
            ours = local(parameter.detach()).reshape(-1)
            ours = ours[:: max(1, ours.numel() // _LOOKED_AT)]
            lost += int(torch.count_nonzero(ours.abs() >= limit))
            total += ours.numel()
    return lost, total


def _unmoved_by_gradients(factor: float, parameters: Iterable[Tensor]) -> tuple[int, int]:
    """Of the weights whose gradient is not zero: how many ``factor * gradient`` does not move."""
    lost = total = 0
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse or parameter.is_meta:
            continue
        update = local(gradient.detach()).float().abs() * factor
        spacing = format_of(parameter).ulp(local(parameter.detach()).float())
        lost += int(((update > 0) & (update < spacing / 2)).sum())
        total += int((update > 0).sum())
    return lost, total


def _largest_learning_rate(group: Group) -> float:
    """A schedule may begin at zero: it leaves its base, or its peak, in the group."""
    return max((abs(value) for _, value in group.numbers("lr", "initial_lr", "max_lr")), default=0.0)


def _by_format(parameters: Iterable[Tensor]) -> dict[Format, list[Tensor]]:
    found: dict[Format, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        found[format_of(parameter)].append(parameter)
    return found


def _bare(setting: Setting) -> Iterator[tuple[str, bool, Format, list[Tensor], int]]:
    """Per optimizer and format: name, whether it is certain, format, bare parameters, and how many it trains."""
    for optimizer in dict.fromkeys(id(group.optimizer) for group in setting.groups):
        groups = [group for group in setting.groups if id(group.optimizer) == optimizer]
        certain = any(group.certain for group in groups)
        total = sum(len(group.parameters) for group in groups)
        for format, bare in _by_format(p for group in groups for p in group.bare).items():
            yield groups[0].name, certain, format, bare, total


def _of_checkpoints(setting: Setting) -> list[tuple[str, nn.Module, list[Tensor]]]:
    """Outermost modules whose config declares a 16-bit dtype, with the bare parameters in that dtype."""
    bare = {id(p): p for group in setting.groups if group.certain for p in group.bare}
    found = []
    for path, module in setting.parts():
        declared = _declared(module)
        if declared not in LOW_PRECISION:
            continue
        ours = [bare.pop(id(p)) for p in module.parameters() if id(p) in bare and p.dtype is declared]
        if ours:
            found.append((path, module, ours))
    return found


def _declared(module: nn.Module) -> torch.dtype | None:
    """The dtype that the module's ``config`` gives as its own, as Transformers' models do."""
    config = getattr(module, "config", None)
    if config is None or isinstance(config, torch.dtype | Tensor | nn.Module):
        return None
    # The second is the name before Transformers 4.56; where both exist, asking for it draws a warning.
    value: Any = getattr(config, "dtype", None) if hasattr(config, "dtype") else getattr(config, "torch_dtype", None)
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), None)
    return value if isinstance(value, torch.dtype) else None


def _lost_below(format: Format) -> str:
    denominator = 2 ** (format.mantissa_bits + 2)
    return (
        f"In {format}, an update below 1/{denominator} to 1/{denominator // 2} of the weight rounds away, and late in "
        "training most are."
    )

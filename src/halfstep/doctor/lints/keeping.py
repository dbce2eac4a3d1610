"""How optimizers keep what they train: which 16-bit parameters have nothing but their 16 bits, and which state has.

A 16-bit parameter is safe where something remembers what its bits cannot: an FP32 master, the remainder to one, a
compensation, or rounding that is right in the mean. halfstep's own optimizers say which. Of others it is seen from
what they hold: an FP32 tensor anywhere on them that rounds to the parameter is its master, a state of its shape in
small integers a remainder, and options and states that speak of Kahan, compensation or stochastic rounding are
believed. PyTorch's own keep nothing (`halfstep.doctor.lints.asking`). An optimizer of somebody else's that has not
stepped yet may make masters in its first step, so nothing is certain of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.doctor.lints import asking
from halfstep.optim import MasterOptimizer, MasterWeights
from halfstep.optim.layout import local
from halfstep.policy import Policy

LOW_PRECISION = (torch.float16, torch.bfloat16)
_COMPENSATION = ("kahan", "compensat", "shift")
_MASTERS = ("master", "remainder", "error_bits", "ecc")
_STOCHASTIC = ("stochastic",)


@dataclass(frozen=True)
class Group:
    """One parameter group.

    Attributes:
        optimizer: that steps it: the innermost one, or halfstep's masters around it.
        options: its hyperparameters.
        parameters: those that require a gradient.
        bare: the 16-bit ones among them that nothing remembers beyond their 16 bits.
        moments: state in 16 bits per parameter, by name: there now, or what the first step would make.
        all_moments_low: whether every state of those parameters is in 16 bits.
        certain: whether that is known; False: an optimizer unknown here, before its first step.
        rounds_once: whether an update is computed in FP32 and rounded once, when it is written.
        compensated: whether it carries rounding errors to the next step.
    """

    optimizer: Optimizer
    options: Mapping[str, Any]
    parameters: tuple[Tensor, ...]
    bare: tuple[Tensor, ...]
    moments: tuple[tuple[Tensor, Mapping[str, torch.dtype]], ...]
    all_moments_low: bool
    certain: bool
    rounds_once: bool
    compensated: bool

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    def numbers(self, *names: str) -> list[tuple[str, float]]:
        """The options of these names that are numbers; the items of a tuple as ``betas[0]``."""
        found: list[tuple[str, float]] = []
        for name in names:
            value = self.options.get(name)
            items = enumerate(value) if isinstance(value, tuple | list) else [(None, value)]
            for index, item in items:
                if isinstance(item, bool) or not isinstance(item, int | float | Tensor):
                    continue
                if not isinstance(item, Tensor) or item.numel() == 1:
                    found.append((name if index is None else f"{name}[{index}]", float(item)))
        return found

    def number(self, name: str) -> float | None:
        return next((value for _, value in self.numbers(name)), None)


def groups_of(optimizers: Iterable[Optimizer], policy: Policy | None) -> tuple[Group, ...]:
    """The groups of all optimizers; of wrappers those within, once."""
    inner: dict[int, Optimizer] = {}
    within_masters: set[int] = set()
    for optimizer in optimizers:
        found = _innermost(optimizer)
        inner[id(found)] = found
        if isinstance(found, MasterWeights):
            within_masters.add(id(found.optimizer))
    kept = [optimizer for key, optimizer in inner.items() if key not in within_masters]
    return tuple(group for optimizer in kept for group in _groups(optimizer, policy))


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer behind wrappers that hold one in ``optimizer`` (Accelerate's does)."""
    while not isinstance(optimizer, MasterOptimizer | MasterWeights):
        held = getattr(optimizer, "optimizer", None)
        if not isinstance(held, Optimizer) or held is optimizer:
            break
        optimizer = held
    return optimizer


def _groups(optimizer: Optimizer, policy: Policy | None) -> Iterator[Group]:
    copies = None
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        trained = tuple(p for p in group["params"] if p.requires_grad)
        low = [p for p in trained if p.dtype in LOW_PRECISION]
        if isinstance(optimizer, MasterOptimizer):
            nearest = options.get("master") == "none" and options.get("rounding") == "nearest"
            yield Group(optimizer, options, trained, tuple(low) if nearest else (), (), False, True, True, False)
            continue
        if isinstance(optimizer, MasterWeights) or (policy is not None and policy.storage == "split"):
            yield Group(optimizer, options, trained, (), (), False, True, True, False)
            continue
        stepped = any(optimizer.state.get(p) for p in trained)
        compensated = _says(optimizer, options, _COMPENSATION) or any(
            _matches(name, _COMPENSATION) and isinstance(value, Tensor)  # None where it is switched off
            for p in low
            for name, value in optimizer.state.get(p, {}).items()
        )
        remembered = compensated or _says(optimizer, options, (*_MASTERS, *_STOCHASTIC))
        if copies is None and low and not remembered:
            copies = list(_float32_tensors({n: v for n, v in vars(optimizer).items() if n != "param_groups"}))
        bare = () if remembered else tuple(p for p in low if not _has_copy(p, optimizer, copies or []))
        moments = tuple(_moments(optimizer, options, trained, stepped, remembered))
        yield Group(
            optimizer,
            options,
            trained,
            bare,
            tuple((p, low_ones) for p, low_ones, _ in moments if low_ones),
            all(not wide for _, low_ones, wide in moments if low_ones),
            certain=stepped or asking.steps_as_torch(optimizer),
            rounds_once=bool(options.get("fused")),
            compensated=compensated,
        )


def _moments(
    optimizer: Optimizer, options: Mapping[str, Any], parameters: Iterable[Tensor], stepped: bool, remembered: bool
) -> Iterator[tuple[Tensor, dict[str, torch.dtype], bool]]:
    """Per parameter its state in 16 bits, and whether there is other floating state of its shape."""
    predicted: dict[torch.dtype, dict[str, torch.dtype]] = {}
    for parameter in parameters:
        kept: Mapping[str, Any] = optimizer.state.get(parameter, {})
        shaped = {
            name: value.dtype
            for name, value in kept.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
        }
        if not kept and not stepped and not remembered and parameter.dtype in LOW_PRECISION:
            if parameter.dtype not in predicted:
                predicted[parameter.dtype] = asking.state_dtypes(optimizer, options, parameter.dtype)
            shaped = predicted[parameter.dtype]
        shaped = {name: dtype for name, dtype in shaped.items() if not _matches(name, (*_COMPENSATION, *_MASTERS))}
        low = {name: dtype for name, dtype in shaped.items() if dtype in LOW_PRECISION}
        yield parameter, low, len(low) < len(shaped)


def _says(optimizer: Optimizer, options: Mapping[str, Any], words: tuple[str, ...]) -> bool:
    """Whether an option or attribute of such a name is on. An option that is None is: "where parameters need it"."""
    named = [*options.items(), *((n, v) for n, v in vars(optimizer).items() if isinstance(v, bool | str))]
    return any(_matches(name, words) and value not in (False, "none") for name, value in named)


def _matches(name: object, words: tuple[str, ...]) -> bool:
    return isinstance(name, str) and any(word in name.lower() for word in words)


def _has_copy(parameter: Tensor, optimizer: Optimizer, float32: list[Tensor]) -> bool:
    """Whether the optimizer holds what the parameter's bits drop."""
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and not value.is_floating_point():
            remainder = value.dtype is torch.int16 or _matches(name, _MASTERS)  # int8 alone may be a moment
            if remainder:
                return True
    if parameter.is_meta:
        return False
    ours = local(parameter.detach())
    sample = _sample(ours)
    return any(
        copy.numel() == ours.numel()
        and copy.device == ours.device
        and bool(torch.equal(_sample(copy.detach()).to(ours.dtype), sample))
        for copy in float32
    )


def _sample(tensor: Tensor) -> Tensor:
    """Up to 1024 elements, evenly spaced: enough to know a copy by."""
    return tensor.reshape(-1)[:: max(1, tensor.numel() // 1024)]


def _float32_tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Every FP32 tensor with more than one element in nested containers."""
    if isinstance(value, Tensor):
        if value.dtype is torch.float32 and value.numel() > 1 and not value.is_meta:
            yield local(value)
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _float32_tensors(item, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from _float32_tensors(item, depth - 1)

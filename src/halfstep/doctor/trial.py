"""Running a program with a `Remedy`: what is not the program's is changed around it, and taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from halfstep.autocast import keep_fp32
from halfstep.doctor.event import LOW_PRECISION
from halfstep.doctor.examination import Change
from halfstep.doctor.remedy import NotTriedError, Remedy
from halfstep.observe.place import Place
from halfstep.optim import MasterOptimizer, MasterWeights


def changes(remedy: Remedy) -> Change | None:
    """The change to single ops that a remedy asks for; None if it asks for none."""
    if not remedy.fp32_at and not remedy.constants:
        return None
    lines = {(line.op, line.file, line.line) for line in remedy.fp32_at}
    constants = {(c.at.op, c.at.file, c.at.line, c.value): c.better for c in remedy.constants}

    def change(
        func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        if (place.op, place.file, place.line) in lines:
            return func, tree_map(_wide, args), tree_map(_wide, kwargs)
        if constants and place.file is not None:

            def better(value: Any) -> Any:
                is_number = isinstance(value, int | float) and not isinstance(value, bool) and place.line is not None
                return constants.get((place.op, str(place.file), place.line or 0, value), value) if is_number else value

            return func, tree_map(better, args), tree_map(better, kwargs)
        return func, args, kwargs

    return change


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in LOW_PRECISION else value


@contextlib.contextmanager
def applied(
    remedy: Remedy, modules: Iterable[nn.Module], optimizers: Iterable[Optimizer], device_type: str
) -> Iterator[None]:
    """What of a remedy concerns modules, optimizers and losses. Its policy and `changes` are the caller's.

    Raises:
        NotTriedError: there is nothing that it could be put to.
        NoSuchModuleError: no module has this path.
    """
    with contextlib.ExitStack() as stack:
        if remedy.islands:
            for patterns, module in _owned(remedy.islands, modules):
                stack.enter_context(keep_fp32(module, patterns, device_type))
        if remedy.masters:
            stepped = [o for o in optimizers if not isinstance(o, MasterOptimizer | MasterWeights)]
            if not stepped:
                raise NotTriedError(
                    "the optimizer is made inside of what was examined: masters have to be put in there"
                )
            for optimizer in stepped:
                stack.enter_context(_mastered(optimizer))
        if remedy.loss_scale is not None:
            stack.enter_context(scaled_losses(remedy.loss_scale))
        yield


def _owned(islands: Iterable[str], modules: Iterable[nn.Module]) -> Iterator[tuple[list[str], nn.Module]]:
    left = set(islands)
    for module in modules:
        paths = {name for name, _ in module.named_modules()}
        mine = sorted(left & paths)
        left -= set(mine)
        if mine:
            yield mine, module
    if left:
        raise NotTriedError(f"no module is named {', '.join(sorted(left))}")


@contextlib.contextmanager
def _mastered(optimizer: Optimizer) -> Iterator[None]:
    """Step on FP32 masters: 16-bit parameters get them, and FP32 gradients and state with them."""
    masters = MasterWeights(optimizer)
    original = optimizer.step
    of_its_own = vars(optimizer).get("step")
    inside = False

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return original(*args, **kwargs)
        inside = True
        try:
            return masters.step(*args, **kwargs)
        finally:
            inside = False

    optimizer.step = step  # type: ignore[method-assign]  # of this one object, for the time of the trial
    try:
        yield
    finally:
        del optimizer.step
        if of_its_own is not None:
            optimizer.step = of_its_own  # type: ignore[method-assign]  # as it was


@contextlib.contextmanager
def scaled_losses(scale: float) -> Iterator[None]:
    """Backward passes start from ``scale`` instead of 1."""
    original = torch.autograd.backward

    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        given = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
        given += [None] * (len(roots) - len(given))
        scaled = [torch.full_like(t, scale) if g is None else g * scale for t, g in zip(roots, given, strict=True)]
        return original(roots, scaled, *args, **kwargs)

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original

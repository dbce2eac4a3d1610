"""Emulation: an op in a 16-bit format by FP32 arithmetic with rounded inputs and outputs.

Tensors stay real 16-bit tensors and only the arithmetic between them is done in FP32::

    16-bit inputs -> to FP32 (exact) -> op in FP32 -> round to 16 bits (nearest even, overflow to inf)

The alternative, FP32 tensors that hold only 16-bit values, would lose PyTorch's own dtype flow: autocast's rules, type
promotion, and every dtype check of a model would see FP32. This way only the kernels that a machine lacks are replaced.

Backward needs no code of its own. The three steps are ordinary differentiable ops, and autograd of a cast is the
opposite cast: the gradient arrives in 16 bits, the op's backward runs in FP32 on the rounded operands, and its results
are rounded to 16 bits (to inf above the format's largest value, to 0 below half its smallest) before they go on; a
weight's gradient becomes FP32 after that. It holds in double backward too, and it lives in the graph, so that backward
may run anywhere. The price is memory: the op saves FP32 copies of its inputs, 4 bytes per element more than the real
thing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from halfstep.autocast.containers import map_tensors


class _Now(threading.local):
    def __init__(self) -> None:
        self.format: torch.dtype | None = None
        self.unlisted = False


_now = _Now()


def takes(args: Any, kwargs: Any, low: torch.dtype) -> bool:
    """Whether an op on these arguments would compute in ``low``: its floating tensors all have that dtype."""
    dtypes = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()}
    return dtypes == {low}


def rounded(op: Any, args: Any, kwargs: Any, low: torch.dtype) -> Any:
    """``op`` in FP32 arithmetic on inputs of dtype ``low``, its FP32 outputs rounded to ``low``."""
    with listed_as(low):
        result = op(*map_tensors(args, _up(low)), **map_tensors(kwargs, _up(low)))
        return map_tensors(result, lambda t: t.to(low) if t.dtype is torch.float32 else t)


def format_now() -> torch.dtype | None:
    """The format being emulated by the op that runs in this thread, if any."""
    return _now.format


@contextlib.contextmanager
def listed_as(format: torch.dtype | None) -> Iterator[None]:
    """The ops inside are the emulated product itself, of this format."""
    before = _now.format, _now.unlisted
    _now.format, _now.unlisted = format, False
    try:
        yield
    finally:
        _now.format, _now.unlisted = before


@contextlib.contextmanager
def unlisted() -> Iterator[None]:
    """The ops inside are steps of an emulation (scaling, rounding), which an explanation leaves out."""
    before, _now.unlisted = _now.unlisted, True
    try:
        yield
    finally:
        _now.unlisted = before


def is_unlisted() -> bool:
    """Whether the op that runs in this thread is such a step."""
    return _now.unlisted


def _up(low: torch.dtype) -> Any:
    return lambda tensor: tensor.float() if tensor.dtype is low else tensor

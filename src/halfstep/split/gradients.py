"""Gradients of split parameters in bfloat16 between a backward pass and its step: 2 bytes each instead of 4.

The gradient that a 16-bit product gives a weight *is* bfloat16; autocast hands it on as FP32. So narrowing the first
one that arrives loses nothing, unless it is a sum already (a tied weight, a penalty): that is rounded to nearest, once.
A second one (accumulation) finds the first: both are added in FP32, and the sum stays FP32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from halfstep.split.tensor import SplitTensor


class NarrowGradients:
    """Keeps the gradients of these parameters in bfloat16 where they are not accumulated; `remove` ends it.

    Args:
        parameters: those that are split are taken, the others left alone.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if isinstance(p, SplitTensor) and p.requires_grad]
        self._handles: list[Any] = []
        for parameter in self.parameters:
            parameter.grad_dtype = None  # any may be set
            self._hook(parameter)

    def _hook(self, parameter: SplitTensor) -> None:
        is_first = True

        def before(gradient: Tensor) -> None:
            nonlocal is_first
            present = parameter.grad
            is_first = present is None
            if present is not None and present.dtype is torch.bfloat16:
                parameter.grad = present.float()

        def after(_: Tensor) -> None:
            present = parameter.grad
            if is_first and present is not None and present.dtype is torch.float32:
                parameter.grad = present.to(torch.bfloat16)

        self._handles.append(parameter.register_hook(before))  # type: ignore[no-untyped-call]
        self._handles.append(parameter.register_post_accumulate_grad_hook(after))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Gradients are FP32 again from the next backward pass on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

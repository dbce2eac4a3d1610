"""One operation on many tensors, in as few launches as PyTorch has: its ``_foreach`` functions, by device and format.

On a device a model's hundreds of small tensors cost more to ask for than to compute. Where PyTorch has no kernel for
many at once, as on the CPU, these functions go through them one by one, and so do these here with tensors whose class
has a meaning of its own (DTensor) and with sparse ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfstep.optim.layout import PLAIN


def copy_(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source, of whatever format, into its destination of the same shape."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for destination, source in zip(destinations, sources, strict=True):
        if _is_strided(destination) and _is_strided(source):
            kind = (destination.device, destination.dtype, source.device, source.dtype)
            for tensors, tensor in zip(kinds.setdefault(kind, ([], [])), (destination, source), strict=True):
                tensors.append(tensor)
        else:
            destination.copy_(source)
    for together in kinds.values():
        torch._foreach_copy_(*together)


def float32_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float32, without gradients."""
    copies = [
        torch.empty_like(tensor.detach(), dtype=torch.float32)
        if _is_strided(tensor)
        else tensor.detach().to(torch.float32, copy=True)
        for tensor in tensors
    ]
    strided = [index for index, tensor in enumerate(tensors) if _is_strided(tensor)]
    copy_([copies[index] for index in strided], [tensors[index].detach() for index in strided])
    return copies


def multiply_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors of one device by a factor (0-d) there."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        # The kernel for many takes a factor of the tensors' own format.
        if _is_strided(tensor) and tensor.dtype is factor.dtype:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        else:
            tensor.mul_(factor)
    for together in kinds.values():
        torch._foreach_mul_(together, factor)


def norms(tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """The norm of each, accumulated in float32; 0-d."""
    kinds: dict[Any, list[int]] = {}
    found: list[Tensor] = [torch.empty(0, dtype=torch.float32, device="cpu")] * len(tensors)
    for index, tensor in enumerate(tensors):
        if _is_strided(tensor):
            kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
        else:
            found[index] = torch.linalg.vector_norm(tensor, norm_type, dtype=torch.float32)
    for indices in kinds.values():
        together = torch._foreach_norm([tensors[index] for index in indices], norm_type, dtype=torch.float32)
        for index, norm in zip(indices, together, strict=True):
            found[index] = norm
    return found


def _is_strided(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.layout is torch.strided

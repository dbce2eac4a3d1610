"""Norms of gradients, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_norm(parameters: Iterable[Tensor]) -> float | None:
    """2-norm of all gradients together, in FP32; None without gradients. Waits for their device."""
    norm = gradient_norm_there(parameters)
    return None if norm is None else float(norm)


def gradient_norm_there(parameters: Iterable[Tensor]) -> Tensor | float | None:
    """The same on the device of the first gradient, float32 0-d, without waiting; a number if they are sharded."""
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    if not gradients:
        return None
    gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    gradients = [g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm) if hasattr(norm, "to_local") else norm

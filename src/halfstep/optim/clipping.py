"""The norm of gradients in FP32, and the factors that unscale and clip them.

The formulas are PyTorch's (``torch.nn.utils.clip_grad``, ``torch.amp.grad_scaler``), so that a step equals the loop
that anyone would write by hand with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from halfstep.optim import foreach
from halfstep.transfer import moved


def total_norm(parameters: Iterable[Tensor], norm_type: float) -> Tensor:
    """The norm of all gradients together, accumulated in FP32 from whatever format they are in; 0-d.

    Sharded (DTensor) gradients count with all their shards.
    """
    # Empty ones have no largest value.
    gradients = [dense_values(p.grad) for p in parameters if p.grad is not None and p.grad.numel()]
    if not gradients:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    norms = foreach.norms(gradients, norm_type)
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    together = torch.stack([norm.to(norms[0].device) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(together, norm_type)
    return total


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of this norm by: at most 1."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, in FP32; by FP64 where the device has it, because some compilers' FP32 division is not exact."""
    exact = torch.float32 if scale.device.type == "mps" else torch.float64
    return scale.to(exact).reciprocal().float()


def multiply_(gradients: Iterable[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply gradients by each of the factors (0-d), one after the other, in place."""
    if not factors:
        return
    there: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        there.setdefault(gradient.device, []).append(gradient)
    for device, together in there.items():
        for factor in factors:
            foreach.multiply_(together, moved(factor, device))


def dense_values(gradient: Tensor) -> Tensor:
    """A gradient's values; a sparse one's are added up where an index occurs twice, in FP32."""
    return gradient.float().coalesce().values() if gradient.is_sparse else gradient

"""One look at all gradients: their norm, whether inf or NaN is among them, and each one's largest magnitude.

This is the first of the two passes of a step, and reads each gradient once. Sharded gradients are looked at where they
are, and the ranks that hold the other parts agree on the sums.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfstep.optim import backends
from halfstep.optim.backends import BackendName
from halfstep.optim.clipping import clip_coefficient
from halfstep.optim.layout import flat, is_dense, is_sharded, local
from halfstep.optim.update import Survey
from halfstep.transfer import moved


@torch.no_grad()
def survey_of(gradients: Sequence[Tensor], backend: BackendName = "auto") -> Survey:
    """Survey gradients of any shape, device and sharding; the result is on the first one's device.

    Args:
        gradients: float32, bfloat16 or float16; DTensors may be among them, on every rank of their mesh alike.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    for gradient in gradients:
        if gradient.is_sparse:
            raise RuntimeError(
                f"halfstep.optim does not take sparse gradients (one is of shape {tuple(gradient.shape)}): build the "
                "embedding with sparse=False, or give its parameters to torch.optim.SparseAdam"
            )
    if not gradients:
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        found_inf = torch.zeros((), dtype=torch.float32, device="cpu")
        return Survey(total, found_inf, torch.zeros(0, dtype=torch.float32, device="cpu"))
    device = local(gradients[0]).device
    squares: list[Tensor] = []
    of_each: list[Tensor | None] = [None] * len(gradients)
    sets = _alike(gradients)
    for indices in sets.values():
        parts = [local(gradients[i]) for i in indices]
        one = backends.choose(backend, parts[0].device)[0].survey(
            [flat(part if is_dense(part) else part.contiguous()) for part in parts]
        )
        if is_sharded(gradients[indices[0]]):
            total, largest = _agree(gradients[indices[0]], one.sum_of_squares, one.amax)
            one = Survey(total, (~largest.isfinite()).any().float(), largest)
        if len(sets) == 1:
            return one
        squares.append(moved(one.sum_of_squares, device))
        # Views. Places in a tensor, given by a list of numbers, would be a copy from the host that it waits for.
        for index, largest in zip(indices, moved(one.amax, device).unbind(), strict=True):
            of_each[index] = largest
    amax = torch.stack([largest for largest in of_each if largest is not None])
    return Survey(functools.reduce(torch.add, squares), (~amax.isfinite()).any().float(), amax)


def gradient_coefficient(survey: Survey, max_norm: float, inverse_scale: Tensor | float) -> Tensor:
    """What gradients are multiplied by: the inverse scale, times what `torch.nn.utils.clip_grad_norm_` would."""
    norm = survey.sum_of_squares.sqrt() * inverse_scale
    return (clip_coefficient(norm, max_norm) * inverse_scale).float()


def _alike(gradients: Sequence[Tensor]) -> dict[Any, list[int]]:
    """Indices of gradients by device and sharding: each set is one pass and one exchange between ranks."""
    sets: dict[Any, list[int]] = {}
    for index, gradient in enumerate(gradients):
        kind: Any = gradient.device
        if is_sharded(gradient):
            kind = (gradient.device, gradient.device_mesh, tuple(gradient.placements))  # type: ignore[attr-defined]
        sets.setdefault(kind, []).append(index)
    return sets


def _agree(pattern: Any, squares: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and maximum over the ranks that hold the other parts; replicas hold the same and are not counted twice."""
    import torch.distributed as dist

    # MAX over ranks may lose a NaN; as inf it survives, and says the same.
    amax = torch.where(amax.isnan(), torch.inf, amax)
    for dimension, placement in enumerate(pattern.placements):
        if placement.is_shard():
            group = pattern.device_mesh.get_group(dimension)
            dist.all_reduce(squares, group=group)
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    return squares, amax

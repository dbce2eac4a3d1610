"""An optimizer's gradients: collected by kind, divided by the scale, checked, and the answer agreed across ranks.

One kernel call per kind (device, format, sharding) divides and looks for inf and NaN. That kernel looks *before* it
multiplies: a scaled 1e10 times 1e38 is inf and goes unseen. With a scale of at least 1 the quotient is never larger
than the scaled value, so one look is enough; where smaller scales are allowed, a second one follows.

Sharded (DTensor) gradients go in calls of their own, one per placement: the kernel then agrees on the answer over their
mesh, but takes the placement of the first gradient for that of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import _MultiDeviceReplicator
from torch.optim import Optimizer

from halfstep.scale.surveyed import Surveying
from halfstep.scale.watch import Watch
from halfstep.transaction import to_the_end
from halfstep.transfer import moved

#: "auto": all ranks, wherever there are several and their gradients may differ; None: each rank for itself.
Group: TypeAlias = "dist.ProcessGroup | Literal['auto'] | None"
Kind: TypeAlias = tuple[Any, ...]


class HalfGradientError(ValueError):
    """FP16 gradients without FP32 masters; the message names the parameter and what can be done."""


def parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every parameter of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


def holds_fp16(optimizer: Optimizer) -> bool:
    """Whether any gradient is FP16: divided by the scale as it is, it could lose what the scale was for."""
    return any(p.grad is not None and p.grad.dtype is torch.float16 for p in parameters(optimizer))


def by_kind(optimizer: Optimizer, allow_fp16: bool, name_of: Callable[[Tensor], str]) -> dict[Kind, list[Tensor]]:
    """The optimizer's gradients as dense tensors that share their memory, by device, format and sharding.

    Raises:
        HalfGradientError: a gradient is FP16, and ``allow_fp16`` is not given.
    """
    kinds: dict[Kind, list[Tensor]] = {}
    sharded_type = _sharded_type()
    for parameter in parameters(optimizer):
        gradient = parameter.grad
        if gradient is None:
            continue
        dtype = gradient.dtype
        if dtype is torch.float16 and not allow_fp16:
            raise HalfGradientError(_half_gradient(name_of(parameter), parameter, isinstance(optimizer, Surveying)))
        if gradient.is_sparse:
            if dtype is torch.float16:  # duplicate indices are added up, and may overflow in the sum
                parameter.grad = gradient = gradient.coalesce()
            gradient = gradient._values()
        if dtype.is_complex:
            gradient = torch.view_as_real(gradient)
        kind: Kind = (gradient.device, dtype)
        if isinstance(gradient, sharded_type):
            kind += (gradient.device_mesh, tuple(gradient.placements))
        kinds.setdefault(kind, []).append(gradient)
    return kinds


def multiply_(
    optimizer: Optimizer,
    factor: Tensor,
    found_inf: Tensor,
    watched: Watch,
    group: Group,
    *,
    allow_fp16: bool,
    look_again: bool,
) -> dict[torch.device, Tensor]:
    """Multiply an optimizer's gradients by ``factor``, in place; returns a flag per device, agreed across ranks.

    Args:
        factor: FP32, 1 element; 1 / scale.
        found_inf: FP32, 1 element, 0.
        watched: knows the names of parameters, and which are replicated.
        group: who agrees.
        allow_fp16: multiply FP16 gradients too, as they are.
        look_again: look for inf and NaN also in the products.

    Raises:
        HalfGradientError: a gradient is FP16, and ``allow_fp16`` is not given.
    """
    kinds = by_kind(optimizer, allow_fp16, lambda parameter: watched.name_of(parameter, optimizer))
    division = Division(kinds, factor, found_inf, look_again=look_again)
    to_the_end(division.write, "the division of gradients")
    return agreed(division.flags, found_inf, optimizer, watched, group)


def agreed(
    flags: dict[torch.device, Tensor], found_inf: Tensor, optimizer: Optimizer, watched: Watch, group: Group
) -> dict[torch.device, Tensor]:
    """An optimizer's flags, the same on all ranks that have to agree; as they are where none has to."""
    ranks = agreeing_ranks(group, optimizer, watched.is_replicated)
    return flags if ranks is None else agree_(flags, found_inf, ranks)


class Division:
    """Gradients multiplied by a factor, in place, and a flag per device, above 0 where inf or NaN was found.

    Args:
        kinds: the gradients, `by_kind`.
        factor: FP32, 1 element; 1 / scale.
        found_inf: FP32, 1 element: the flags start as copies of it.
        look_again: also look at the products.
    """

    def __init__(self, kinds: dict[Kind, list[Tensor]], factor: Tensor, found_inf: Tensor, *, look_again: bool) -> None:
        factors, flags = _MultiDeviceReplicator(factor), _MultiDeviceReplicator(found_inf)
        calls = [(gradients, flags.get(kind[0]), factors.get(kind[0])) for kind, gradients in kinds.items()]
        if look_again:
            ones = {device: torch.ones_like(factors.get(device)) for device, *_ in kinds}
            calls += [(gradients, flags.get(kind[0]), ones[kind[0]]) for kind, gradients in kinds.items()]
        self._calls = calls
        self._made: list[None] = []
        self.flags: dict[torch.device, Tensor] = flags._per_device_tensors

    @torch.no_grad()
    def write(self) -> None:
        """Do what has not been done. Nothing tells of a gradient whether it was divided, so each call is counted as it
        returns, by the interpreter's own code: no signal comes between the two."""
        left = self._calls[len(self._made) :]
        if left:
            self._made.extend(map(torch._amp_foreach_non_finite_check_and_unscale_, *zip(*left, strict=True)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return isinstance(tensor, _sharded_type())


def _sharded_type() -> Any:
    """DTensor's class, or no class at all where nothing has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def agreeing_ranks(group: Group, optimizer: Optimizer, is_replicated: Callable[[Tensor], bool]) -> Any:
    """The process group to agree in; None where there is nothing to agree on.

    Decided from parameters, never from gradients: those a rank may lack, and then it would be missing in the exchange.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    if group != "auto":
        return group
    if dist.get_world_size() == 1 or all(is_sharded(p) or is_replicated(p) for p in parameters(optimizer)):
        return None
    return dist.group.WORLD


def agree_(flags: dict[torch.device, Tensor], found_inf: Tensor, group: Any) -> dict[torch.device, Tensor]:
    """Set every rank's flags to the largest of all ranks, by one all-reduce of one number."""
    device = found_inf.device  # the loss's: the backend serves it, which is not sure of an offloaded gradient's
    largest = found_inf.clone()
    for flag in flags.values():
        largest = torch.maximum(largest, moved(flag, device))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return {d: moved(largest, d) for d in flags} or {device: largest}


def smallest_of_ranks(scale: float, device: torch.device, group: Group) -> float:
    """The smallest of all ranks' scales: gradients that were scaled differently must never be averaged."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        smallest = torch.full((), scale, dtype=torch.float32, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=None if group == "auto" else group)
        scale = float(smallest.item())
    return scale


def _half_gradient(name: str, parameter: Tensor, surveying: bool) -> str:
    found = (
        f"the gradient of {name} (shape {tuple(parameter.shape)}) is float16: divided by the loss scale in float16, "
        "values below 3e-8 become 0, and updates below half an ulp are lost. "
    )
    if surveying:
        return found + (
            "This optimizer divides in float32, while it steps: leave unscale_() out, and clip with "
            "MixedPrecision.step(max_grad_norm=...), or optimizer.clipped_step(max_norm, inverse_scale=...)"
        )
    return found + (
        "Either load the model in float32 and let "
        "autocast lower it (policy 'fp16-mixed'); or keep FP32 masters, which the scaler unscales instead "
        "(halfstep.MasterWeights(optimizer), or policy 'fp16-master'); or train in bfloat16, which needs no loss scale"
    )

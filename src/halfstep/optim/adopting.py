"""The FP32 values of a parameter that was just put into 16 bits, handed to its optimizer as their master.

A policy with 16-bit parameters casts a model that was built, and perhaps trained for a while, in FP32. What the cast
drops is the first thing that a master is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.optim import masters, pages
from halfstep.optim.layout import flat, is_dense, is_sharded, like, local

if TYPE_CHECKING:
    from halfstep.optim.base import MasterOptimizer


@torch.no_grad()
def adopt(
    optimizer: MasterOptimizer,
    parameter: Tensor,
    float32: Tensor,
    group: dict[str, Any],
    kept_as: tuple[str, torch.dtype] | None,
) -> None:
    """`halfstep.optim.base.MasterOptimizer.adopt`, of a parameter in ``group``.

    Args:
        kept_as: what `halfstep.optim.masters.extra` says of it.
    """
    if float32.shape != parameter.shape:
        raise ValueError(f"a master of shape {tuple(float32.shape)} for a parameter of shape {tuple(parameter.shape)}")
    ours = local(parameter.detach())
    dense = ours if is_dense(ours) else ours.contiguous()
    kept: Tensor | None = None
    if kept_as is not None:
        state: dict[str, Any] = optimizer.state[parameter]
        if not state:
            state.update(optimizer.new_state(parameter, group, optimizer.rule(group)))
        name, dtype = kept_as
        if name not in state or state[name].dtype is not dtype:  # steps were taken in FP32, where it needs none
            state[name] = pages.zeros_like(parameter, dtype)
        if not is_sharded(state[name]):
            state[name] = like(state[name], dense)
        kept = flat(local(state[name]))
    values = local(float32.detach()).to(dense.device, torch.float32)
    masters.encode(flat(like(values, dense)).clone(), flat(dense), kept)
    if dense is not ours:
        ours.copy_(dense)
    torch.autograd.graph.increment_version(parameter)
    optimizer._jobs.forget(parameter)

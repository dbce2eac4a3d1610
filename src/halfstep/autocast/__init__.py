"""A policy applied to computation: the autocast region, what leaves it, and parameters stored in 16 bits.

Three things that every user of autocast has to get right stand here once:

* `autocast` enters the region (and says which TF32 setting "FP32" means);
* `to_float32` brings what leaves the region back to FP32, through any nesting of containers, so that a loss computed
  outside is computed in FP32;
* `store_parameters` puts parameters into the policy's format for the master-weight policies, leaving normalisation
  layers in FP32: their statistics and gains are few bytes and do not survive 8 bits of mantissa.

Source of the op lists: PyTorch's own autocast of the device (``aten/src/ATen/autocast_mode.h``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from halfstep.policy import Policy

#: Layers whose parameters stay FP32 when a policy stores parameters in 16 bits.
FP32_ISLANDS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)

LOW_PRECISION = (torch.float16, torch.bfloat16)


def autocast(policy: Policy, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass runs under ``policy`` on ``device_type``; FP32 policies change nothing."""
    if not policy.lowers:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=policy.compute_dtype)


@contextlib.contextmanager
def float32_precision(policy: Policy) -> Iterator[None]:
    """Make FP32 mean FP32, or TF32, on CUDA while a policy is in effect; 16-bit policies leave PyTorch's settings.

    PyTorch's default lets cuDNN convolutions use TF32, so a run that is to be the FP32 reference has to say so.
    """
    if policy.lowers or not torch.cuda.is_available():
        yield
        return
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = policy.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


def to_float32(value: Any) -> Any:
    """``value`` with every 16-bit floating tensor in it cast to FP32 (differentiably).

    Goes through tuples, named tuples, lists, mappings (``ModelOutput`` included) and dataclasses; anything without a
    16-bit tensor inside comes back as the same object.
    """
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in LOW_PRECISION else value
    if isinstance(value, Mapping):
        cast = {key: to_float32(item) for key, item in value.items()}
        if all(cast[key] is item for key, item in value.items()):
            return value
        return _rebuild_mapping(value, cast)
    if isinstance(value, list | tuple):
        items = [to_float32(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_fields"):  # a named tuple takes its items one by one
            return type(value)(*items)
        return type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        cast = {name: to_float32(item) for name, item in fields.items()}
        changed = {name: item for name, item in cast.items() if item is not fields[name]}
        if not changed:
            return value
        twin = copy.copy(value)  # not replace(): fields may be init=False or checked in __post_init__
        for name, item in changed.items():
            object.__setattr__(twin, name, item)
        return twin
    return value


def store_parameters(
    module: nn.Module, policy: Policy, only: set[int] | None = None
) -> dict[torch.Tensor, torch.Tensor]:
    """Put the FP32 parameters of ``module`` into the policy's 16-bit format, in place.

    Parameters keep their identity, so optimizers that hold them go on holding them. Parameters of normalisation
    layers, buffers, and parameters that are not FP32 stay as they are.

    Args:
        only: convert just the parameters whose ``id`` is in this set (those an optimizer steps).

    Returns:
        Per converted parameter its FP32 values, for its master. Empty for a policy without master weights.

    Raises:
        FloatingPointError: a value does not fit the format (FP16 ends at 65504); names the parameter. Nothing is
            converted then.
    """
    if not policy.master_weights:
        return {}
    islands = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, FP32_ISLANDS)
        for parameter in part.parameters(recurse=False)
    }
    chosen = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.dtype is torch.float32 and id(parameter) not in islands and (only is None or id(parameter) in only)
    }
    limit = torch.finfo(policy.compute_dtype).max
    cast = {name: parameter.detach().to(policy.compute_dtype) for name, parameter in chosen.items()}
    for name, value in cast.items():
        too_large = value.isinf() & chosen[name].isfinite()
        if too_large.any():
            amax = chosen[name].detach()[too_large].abs().max().item()
            raise FloatingPointError(
                f"parameter {name!r} holds {amax:.6g}, which {policy.compute} (largest value {limit:.6g}) cannot: "
                "use a policy with FP32 parameters, or bf16"
            )
    float32: dict[torch.Tensor, torch.Tensor] = {parameter: parameter.detach() for parameter in chosen.values()}
    for name, parameter in chosen.items():
        parameter.data = cast[name]
    return float32


def _rebuild_mapping(value: Mapping[Any, Any], cast: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return cast
    twin = copy.copy(value)  # keeps the class, its attributes and order: OrderedDict, ModelOutput, defaultdict
    for key, item in cast.items():
        twin[key] = item  # type: ignore[index]  # a Mapping that cannot be set raises: its class is at fault
    return twin

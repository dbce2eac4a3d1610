"""The parameters of a model, put into planes and taken out again: the same objects, before and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halfstep.split.tensor import SplitTensor, exchange, held, make_plain


def split_parameters(
    model: nn.Module,
    wanted: Callable[[str, nn.Parameter], bool] | None = None,
    upper: torch.dtype = torch.bfloat16,
) -> dict[str, str]:
    """Store a model's FP32 weights as two 16-bit planes, in place: 4 bytes each, and no cast to 16 bits any more.

    Parameters keep their identity: optimizers that hold them go on. Vectors and scalars (biases, norms) stay plain:
    they are few, and autocast leaves norms in FP32. Call it before DistributedDataParallel, which holds on to what
    a parameter was.

    Args:
        wanted: asked with name and parameter which of them to store so; default: all with two dimensions or more.
        upper: the format of the upper plane, bfloat16 or float16: what autocast would cast them to.

    Returns:
        By name, the parameters that were wanted and stay plain, and why.
    """
    left: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, SplitTensor) or nn.parameter.is_lazy(parameter):  # the latter has no values yet
            continue
        if not (wanted(name, parameter) if wanted else parameter.dim() >= 2):
            continue
        reason = _why_not(parameter, upper)
        if not reason:
            _store(parameter, upper)
        else:
            left[name] = reason
    return left


def plain_parameters(model: nn.Module) -> None:
    """Make every parameter a plain FP32 one again.

    Raises:
        RuntimeError: a graph or a weak reference holds one of them.
    """
    for parameter in model.parameters():
        make_plain(parameter)


def _why_not(parameter: nn.Parameter, upper: torch.dtype) -> str:
    if parameter.dtype is not torch.float32:
        return f"it is {str(parameter.dtype).removeprefix('torch.')}"
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}"
    if parameter.is_meta:
        return "it has no values yet"
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size():
        return "it is a piece of a larger tensor"
    if parameter.is_shared():  # type: ignore[no-untyped-call]  # torch's own method
        return "its memory is shared between processes"
    if held(parameter):
        return "a graph or a weak reference holds it"
    largest = torch.finfo(upper).max
    if upper is torch.float16 and (amax := _largest(parameter)) > largest:
        return f"it holds {amax:.6g}, and the largest float16 is {largest:.6g}"
    return ""


def _largest(parameter: Tensor) -> float:
    """The largest finite magnitude."""
    values = parameter.detach().abs()
    return values.where(values.isfinite(), 0.0).max().item() if values.numel() else 0.0


@torch.no_grad()
def _store(parameter: nn.Parameter, upper: torch.dtype) -> None:
    exchange(parameter, nn.Parameter(SplitTensor.of(parameter, upper), parameter.requires_grad))

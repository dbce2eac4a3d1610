"""The parameters of a model, put into planes and taken out again: the same objects, before and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halfstep.split.tensor import SplitTensor, held, make_plain


def split_parameters(model: nn.Module, wanted: Callable[[str, nn.Parameter], bool] | None = None) -> dict[str, str]:
    """Store a model's FP32 weights as two 16-bit planes, in place: 4 bytes each, and no cast to bfloat16 any more.

    Parameters keep their identity: optimizers that hold them go on. Vectors and scalars (biases, norms) stay plain:
    they are few, and autocast leaves norms in FP32. Call it before DistributedDataParallel, which holds on to what
    a parameter was.

    Args:
        wanted: asked with name and parameter which of them to store so; default: all with two dimensions or more.

    Returns:
        By name, the parameters that were wanted and stay plain, and why.
    """
    left: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, SplitTensor) or nn.parameter.is_lazy(parameter):  # the latter has no values yet
            continue
        if not (wanted(name, parameter) if wanted else parameter.dim() >= 2):
            continue
        reason = _why_not(parameter)
        if not reason:
            _store(parameter)
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


def _why_not(parameter: nn.Parameter) -> str:
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
    return ""


@torch.no_grad()
def _store(parameter: nn.Parameter) -> None:
    new: Tensor = nn.Parameter(SplitTensor.of(parameter), parameter.requires_grad)
    new.grad = parameter.grad
    torch.utils.swap_tensors(parameter, new)  # type: ignore[no-untyped-call]  # torch's own function

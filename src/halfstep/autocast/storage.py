"""Parameters stored as a policy wants them: in its 16-bit format, or in the two planes of `halfstep.split`.

Normalisation layers stay FP32: their statistics and gains are few bytes and do not survive 8 bits of mantissa. So do
the modules that the policy names in ``keep_fp32``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from halfstep.autocast.islands import find
from halfstep.policy import Policy
from halfstep.split import split_parameters

#: Layers whose parameters stay FP32 when a policy stores parameters in 16 bits.
FP32_ISLANDS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


@torch.no_grad()  # may run inside a checkpointed forward, where saved tensors are counted
def store_parameters(
    module: nn.Module, policy: Policy, only: set[int] | None = None
) -> dict[torch.Tensor, torch.Tensor]:
    """Put the FP32 parameters of ``module`` into the policy's 16-bit format, in place.

    Parameters keep their identity, so optimizers that hold them go on holding them. Parameters of normalisation
    layers and of modules that ``policy.keep_fp32`` names, buffers, and parameters that are not FP32 stay as they are.

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
    islands = _islands(module, policy)
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


def store_in_planes(module: nn.Module, policy: Policy, only: set[int] | None = None) -> dict[str, str]:
    """Put the FP32 matrices of ``module`` into planes, where ``policy.storage`` is ``"split"``.

    What computes in FP32 (normalisation layers, ``keep_fp32``, reparametrised weights) stays plain, and vectors do.

    Args:
        only: just the parameters whose ``id`` is in this set.

    Returns:
        By name, what would have been put into planes and could not, and why. Empty for another storage.
    """
    if policy.storage != "split":
        return {}
    islands = _islands(module, policy)

    def wanted(name: str, parameter: nn.Parameter) -> bool:
        is_matrix = parameter.dim() >= 2 and parameter.dtype is torch.float32
        return is_matrix and id(parameter) not in islands and (only is None or id(parameter) in only)

    return split_parameters(module, wanted)


def _islands(module: nn.Module, policy: Policy) -> set[int]:
    """The identities of the parameters that are used in FP32."""
    kept = [part for part in module.modules() if isinstance(part, FP32_ISLANDS) or _reparametrised(part)]
    islands = {id(parameter) for part in kept for parameter in part.parameters(recurse=False)}
    for island in find(module, policy.keep_fp32).values():
        islands |= {id(parameter) for parameter in island.parameters()}
    return islands


def _reparametrised(module: nn.Module) -> bool:
    """Whether its parameters are combined with FP32 buffers outside autocast: spectral and weight normalisation."""
    return isinstance(module, ParametrizationList) or any(
        name.endswith(("_orig", "_g", "_v")) and hasattr(module, name.rpartition("_")[0]) for name in module._parameters
    )

"""Parameters stored as a policy wants them: FP32 as they are, or in the two planes of `halfstep.split`.

What computes in FP32 anyway stays as it is: normalisation layers, and the modules that the policy names in
``keep_fp32``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from halfstep.autocast.islands import find
from halfstep.policy import Policy
from halfstep.split import split_parameters

#: Layers whose parameters stay as they are when a policy stores parameters in planes.
FP32_ISLANDS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


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

    return split_parameters(module, wanted, policy.compute_dtype)


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

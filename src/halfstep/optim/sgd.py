"""SGD with masters and momentum in few bytes; a drop-in for torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from halfstep.optim import rules
from halfstep.optim.backends import BackendName
from halfstep.optim.base import MasterOptimizer
from halfstep.optim.masters import Master, Rounding
from halfstep.optim.moments import State
from halfstep.optim.options import check_not_negative, torch_options


class SGD(MasterOptimizer):
    """``torch.optim.SGD`` for 16-bit (and FP32) parameters.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in PyTorch.
        master, state, rounding, backend, seed, release_gradients: as in `halfstep.optim.AdamW`; the state is the
            momentum.

    Raises:
        TypeError: a parameter is neither float32, bfloat16 nor float16.
        ValueError: a hyperparameter or option is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        master: Master = "exact",
        state: State = "fp32",
        rounding: Rounding | None = None,
        backend: BackendName = "auto",
        seed: int = 0,
        release_gradients: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"Nesterov momentum needs momentum > 0 and dampening 0, not {momentum:g} and {dampening:g}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            **torch_options(foreach=foreach, fused=fused, differentiable=differentiable),
        }
        super().__init__(
            params,
            defaults,
            master=master,
            state=state,
            rounding=rounding,
            backend=backend,
            seed=seed,
            release_gradients=release_gradients,
        )

    def rule(self, group: dict[str, Any]) -> rules.SGD:
        """SGD with this group's hyperparameters."""
        names = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")
        return rules.SGD(**{name: group[name] for name in names})

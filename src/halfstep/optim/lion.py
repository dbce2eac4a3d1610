"""Lion with masters and momentum in few bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from halfstep.optim import rules
from halfstep.optim.backends import BackendName
from halfstep.optim.base import MasterOptimizer
from halfstep.optim.masters import Master, Rounding
from halfstep.optim.moments import State
from halfstep.optim.options import check_betas, check_not_negative, torch_options


class Lion(MasterOptimizer):
    """Lion: every element moves by the learning rate, in the direction of the momentum's sign.

    Take a learning rate 3 to 10 times smaller, and a weight decay 3 to 10 times larger, than for AdamW.

    Args:
        betas: of the direction and of the momentum.
        weight_decay: decoupled.
        master, state, rounding, backend, seed, release_gradients: as in `halfstep.optim.AdamW`; the state is the
            momentum.

    Raises:
        TypeError: a parameter is neither float32, bfloat16 nor float16.
        ValueError: a hyperparameter or option is out of range.

    Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, algorithm 2 and section 5.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": check_betas(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            **torch_options(foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable),
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

    def rule(self, group: dict[str, Any]) -> rules.Lion:
        """Lion with this group's hyperparameters."""
        beta1, beta2 = group["betas"]
        return rules.Lion(group["lr"], float(beta1), float(beta2), group["weight_decay"], group["maximize"])

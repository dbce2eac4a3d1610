"""AdamW and Adam with masters and states in few bytes; drop-ins for torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from halfstep.optim import rules
from halfstep.optim.backends import BackendName
from halfstep.optim.base import MasterOptimizer
from halfstep.optim.masters import Master, Rounding
from halfstep.optim.moments import State
from halfstep.optim.options import check_betas, check_not_negative, torch_options


class Adam(MasterOptimizer):
    """``torch.optim.Adam`` for 16-bit (and FP32) parameters: `halfstep.optim.AdamW` with L2 weight decay.

    Args:
        decoupled_weight_decay: True makes it AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
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
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": check_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
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

    def rule(self, group: dict[str, Any]) -> rules.Adam:
        """Adam with this group's hyperparameters."""
        beta1, beta2 = group["betas"]
        return rules.Adam(
            lr=group["lr"],
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


class AdamW(Adam):
    """``torch.optim.AdamW`` for 16-bit (and FP32) parameters.

    ::

        optimizer = halfstep.optim.AdamW(model.to(torch.bfloat16).parameters(), lr=3e-4)

    ========== ============ =============================================================================
    master     state        bytes per parameter, with weight and gradient in 16 bits
    ========== ============ =============================================================================
    ``exact``  ``fp32``     14; the same numbers as with FP32 parameters, bit for bit (fp16: from 2^-16 up)
    ``exact``  ``bf16``     10
    ``24bit``  ``8bit``     7.1; 5.1 with ``release_gradients=True``
    ========== ============ =============================================================================

    (FP32 parameters with PyTorch's AdamW: 16. That one has a loop, a foreach and a fused form, whose last bits differ:
    which of them these numbers are on a CPU says ``docs/optimizers.md``; on CUDA it is open until measured.)

    Args:
        params: parameters or groups of them; float32, bfloat16 and float16, also mixed.
        lr: a number, or a tensor of one element.
        betas, eps, weight_decay, amsgrad, maximize: as in PyTorch.
        master: where the FP32 master of a 16-bit parameter is kept: `halfstep.optim.masters`.
        state: the format of the moments: `halfstep.optim.moments`.
        rounding: "stochastic", "nearest", or "kahan" (with ``master="none"``); None: stochastic where there is no
            master, else to nearest.
        backend: "auto", or one of `halfstep.optim.backends`.
        seed: of stochastic rounding.
        release_gradients: step in the backward pass and keep no gradients: `halfstep.optim.release`.
        foreach, fused, capturable: taken and not needed; every step is fused and may be captured.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: a hyperparameter or option is out of range, ``differentiable=True`` among them.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        options["decoupled_weight_decay"] = True
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

"""`MixedPrecision`: a training loop under a policy, in three calls.

::

    mp = halfstep.MixedPrecision(model, optimizer)     # policy="auto"
    for x, y in loader:
        with mp.autocast():
            loss = criterion(model(x), y)
        mp.backward(loss)
        step = mp.step(max_grad_norm=1.0)
        if step.applied:
            scheduler.step()

What `MixedPrecision.step` does, in this order::

    gradients to FP32 on the masters                    (master-weight policies)
    unscale, in FP32; look for inf and NaN              (loss-scaling policies)
    clip by the norm of the unscaled gradients          (if asked)
    optimizer.step() on the masters, cast back          unless inf or NaN was found: then nothing changes,
                                                        running statistics of the forward pass included
    move the loss scale; zero the gradients

Accumulate by calling ``backward(loss / n)`` n times before ``step``. The optimizer stays the user's: schedulers and
checkpoints go on using it, and its state dict; `MixedPrecision.state_dict` holds it with masters and loss scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfstep import hardware
from halfstep.autocast import LOW_PRECISION, autocast, float32_precision, keep_fp32, recomputation, store_parameters
from halfstep.autocast.explanation import Explanation, explain
from halfstep.optim import MasterWeights
from halfstep.policy import Policy, resolve
from halfstep.scale import GradScaler


@dataclass(frozen=True)
class StepResult:
    """What one `MixedPrecision.step` did."""

    applied: bool  #: False: the gradients held inf or NaN and the model is as it was
    scale: float | None  #: the loss scale of this step's gradients; None without loss scaling
    grad_norm: float | None  #: 2-norm of the unscaled gradients before clipping; None unless clipping was asked for


class MixedPrecision:
    """A model and its optimizer under a policy.

    Args:
        model: on its device already. Under a master-weight policy its parameters are put into 16 bits, in place;
            normalisation layers stay FP32.
        optimizer: any torch optimizer over the model's parameters.
        policy: a policy, its name, or "auto" for this device's best.
        scaler: the loss scaler to use instead of a default `GradScaler`; only where the policy scales the loss.

    Attributes:
        policy: the policy in effect.
        reason: why this policy.
        scaler: the loss scaler; disabled where the policy does not scale.
        islands: the modules that the policy keeps in FP32; ``islands.remove()`` makes them ordinary again.

    Raises:
        UnknownPolicyError: no policy has this name.
        NoSuchModuleError: a ``keep_fp32`` pattern matches no module.
        ValueError: the model has no parameters, or they are in a 16-bit format that the policy does not train.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        policy: str | Policy = "auto",
        *,
        scaler: GradScaler | None = None,
    ) -> None:
        first = next(model.parameters(), None)
        if first is None:
            raise ValueError(f"{type(model).__name__} has no parameters: nothing to train")
        self.device_type = first.device.type
        self.policy, self.reason = resolve(str(policy), hardware.detect(self.device_type))
        self.model = model
        self.optimizer = optimizer
        _require_format(model, self.policy)
        self.islands = keep_fp32(model, self.policy.keep_fp32, self.device_type)
        self.masters = MasterWeights(optimizer) if self.policy.master_weights else None
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # Parameters that another optimizer trains stay FP32: it has no masters for them. Frozen ones need none.
        chosen = {id(p) for p in model.parameters() if id(p) in stepped or not p.requires_grad}
        for parameter, float32 in store_parameters(model, self.policy, chosen).items():
            if self.masters is not None and id(parameter) in stepped:
                self.masters.adopt(parameter, float32)
        if scaler is not None and not self.policy.loss_scaling:
            raise ValueError(f"{self.policy} does not scale the loss: a scaler would only cost a pass over memory")
        self.scaler = scaler or GradScaler(self.device_type, enabled=self.policy.loss_scaling)
        self.scaler.watch(model)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context for the forward pass and the loss."""
        if self.policy.loss_scaling and self.model.training and torch.is_grad_enabled():
            self.scaler.keep_statistics(self.model)
        with float32_precision(self.policy), autocast(self.policy, self.device_type):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward through ``loss`` (one element), scaled where the policy scales; adds to ``.grad``.

        Args:
            kwargs: ``retain_graph``, ``create_graph``, ``inputs``, as in `torch.Tensor.backward`.
        """
        with float32_precision(self.policy), recomputation(self.policy, self.device_type):
            self.scaler.scale(loss).backward(**kwargs)

    def step(self, *, max_grad_norm: float | None = None, zero_grad: bool = True) -> StepResult:
        """Update the model from the gradients, unless they hold inf or NaN.

        Args:
            max_grad_norm: clip the unscaled gradients to this 2-norm.
            zero_grad: set gradients to None afterwards.

        Raises:
            LossScaleError: too many steps in a row were skipped.
            RuntimeError: no gradient exists: `backward` was not called since the last step.
        """
        if not any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"]):
            raise RuntimeError("step() found no gradients: call backward(loss) first, on a loss of this model")
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        grad_norm = None
        masters = self.masters
        with masters.exchanged() if masters is not None else contextlib.nullcontext():
            self.scaler.unscale_(self.optimizer)
            if max_grad_norm is not None:
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                grad_norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
            self.scaler.step(self.optimizer)
        applied = self.scaler.step_was_applied
        if applied and masters is not None:
            masters.cast_back()
        if zero_grad:
            self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return StepResult(applied, scale, grad_norm)

    def explain(self, *batch: Any, **kwargs: Any) -> Explanation:
        """Which op runs in which format, how often and in which module, in a forward pass of ``model(*batch)``.

        Changes nothing: no gradients, and buffers and random number generators are put back. ``print`` it.
        """

        def run() -> None:
            with self.autocast():
                self.model(*batch, **kwargs)

        return explain(self.model, run, str(self.policy))

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimizer with masters, and loss scale: tensors and plain values, for ``torch.save``."""
        optimizer = self.masters.state_dict() if self.masters is not None else self.optimizer.state_dict()
        return {"policy": str(self.policy), "optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of the same policy; load the model's own state dict first.

        Raises:
            ValueError: the state is of another policy, or does not fit the optimizer.
        """
        if state_dict.get("policy") != str(self.policy):
            raise ValueError(
                f"this state is of policy {state_dict.get('policy')!r}, this run's is {str(self.policy)!r}: "
                "build MixedPrecision with the policy of the state, or load only the model's weights"
            )
        (self.masters or self.optimizer).load_state_dict(state_dict["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state_dict["scaler"])


def _require_format(model: nn.Module, policy: Policy) -> None:
    stored = policy.compute_dtype if policy.master_weights else torch.float32
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in LOW_PRECISION and parameter.dtype is not stored:
            low = str(parameter.dtype).removeprefix("torch.")
            kind = "bf16-master" if parameter.dtype is torch.bfloat16 else "fp16-master"
            raise ValueError(
                f"parameter {name!r} is {low}, and {policy} trains FP32 parameters: small updates to it would be "
                f"lost. Load the model in float32 (dtype=torch.float32), or use policy {kind!r}, which adds FP32 "
                "master weights"
            )

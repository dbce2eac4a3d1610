"""Dynamic loss scaling: a `torch.amp.GradScaler` that cannot collapse to zero.

FP16 gradients below 2^-25 become zero, so the loss is multiplied by a scale before backward and the gradients are
divided by it before the step. The scale follows the gradients::

    found_inf: the step is skipped, scale = max(scale * backoff_factor, min_scale)
    growth_interval good steps in a row: scale = min(scale * growth_factor, max_scale)

`GradScaler` subclasses PyTorch's, so every library that takes PyTorch's takes it. It adds a floor and a cap (PyTorch's
own reaches 0 after 166 bad steps, and the next finite step then writes NaN into every weight), a flag that tells
whether the step was applied, counts of skipped steps, and an error with a diagnosis instead of skipping for ever.

`KeptStatistics` completes "a skipped step leaves the model as it was": running statistics of normalisation layers are
updated by the *forward* pass, before anybody knows that the step will be skipped.

Source: Micikevicius et al. 2018, Mixed Precision Training; ``torch/amp/grad_scaler.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import OptState


class LossScaleError(FloatingPointError):
    """Too many steps in a row were skipped; the message says why and what to do."""


class GradScaler(torch.amp.GradScaler):
    """PyTorch's gradient scaler with a floor, a cap, a skip flag, and an end to skipping.

    Args:
        device: "cuda" or "cpu", as in PyTorch.
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in PyTorch.
        min_scale: the scale never falls below this; 1, or ``init_scale`` where that is lower.
        max_scale: the scale never grows above this; 2^24, or ``init_scale`` where that is higher.
        max_skipped: raise `LossScaleError` when this many steps in a row were skipped; 0 never does.

    Raises:
        ValueError: not ``0 < min_scale <= init_scale <= max_scale``.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float | None = None,
        max_scale: float | None = None,
        max_skipped: int = 50,
    ) -> None:
        min_scale = min(1.0, init_scale) if min_scale is None else min_scale
        max_scale = max(2.0**24, init_scale) if max_scale is None else max_scale
        if not 0 < min_scale <= init_scale <= max_scale:
            raise ValueError(
                f"loss scales must satisfy 0 < min_scale <= init_scale <= max_scale, "
                f"not {min_scale:g}, {init_scale:g}, {max_scale:g}"
            )
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._min_scale = min_scale
        self._max_scale = max_scale
        self._max_skipped = max_skipped
        self._skipped_steps = 0
        self._skipped_in_a_row = 0
        self._last_found_inf: list[torch.Tensor] = []
        # Since the last update, for the diagnosis; bounded, should a script never call update.
        self._losses: deque[torch.Tensor] = deque(maxlen=256)

    @property
    def step_was_applied(self) -> bool:
        """Whether the last `step` changed the parameters. Reads the device, so it waits for it."""
        return not any(bool(found_inf.item()) for found_inf in self._last_found_inf)

    @property
    def skipped_steps(self) -> int:
        """Iterations (calls of `update`) so far in which a step was skipped."""
        return self._skipped_steps

    def scale(self, outputs: Any) -> Any:
        """Multiply the loss, or each of several, by the scale; a 16-bit loss is scaled in FP32, where it fits."""
        if not self.is_enabled():
            return outputs
        if isinstance(outputs, torch.Tensor):
            self._losses.append(outputs.detach())
            return super().scale(outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs)
        if isinstance(outputs, Iterable):
            scaled = [self.scale(output) for output in outputs]
            return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled
        raise ValueError(f"scale() takes a tensor or several, not {type(outputs).__name__}")

    def check_unscaled(self, optimizer: torch.optim.Optimizer) -> None:
        """Look for inf and NaN in gradients that were unscaled as they arrived; stands in for `unscale_`."""
        if not self.is_enabled():
            return
        self._check_inf_per_device(optimizer)  # type: ignore[no-untyped-call,unused-ignore]
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.UNSCALED

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step ``optimizer`` unless its gradients hold inf or NaN; `step_was_applied` then says which.

        Returns what ``optimizer.step`` returns, None when skipped.
        """
        result = super().step(optimizer, *args, **kwargs)
        if self.is_enabled():
            found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            self._last_found_inf = [found_inf.clone() for found_inf in found.values()]
        return result

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Move the scale by what the steps since the last call found, inside its floor and cap.

        Raises:
            LossScaleError: ``max_skipped`` iterations in a row were skipped.
        """
        if not self.is_enabled():
            return
        found_inf = [f for s in self._per_optimizer_states.values() for f in s["found_inf_per_device"].values()]
        skipped = new_scale is None and any(bool(f.item()) for f in found_inf)
        if isinstance(new_scale, torch.Tensor):
            new_scale = new_scale.reshape(()) if new_scale.numel() == 1 else new_scale
        elif new_scale is not None:
            new_scale = float(new_scale)
        super().update(new_scale)
        assert self._scale is not None  # update() raised otherwise
        self._scale.clamp_(self._min_scale, self._max_scale)
        self._skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._max_skipped and self._skipped_in_a_row >= self._max_skipped:
            raise LossScaleError(self._diagnosis())
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.is_enabled():
            state |= {
                "min_scale": self._min_scale,
                "max_scale": self._max_scale,
                "max_skipped": self._max_skipped,
                "_skipped_steps": self._skipped_steps,
                "_skipped_in_a_row": self._skipped_in_a_row,
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of PyTorch's own scaler (floor, cap and counts then stay as they are)."""
        super().load_state_dict(state_dict)
        if self.is_enabled():
            self._min_scale = state_dict.get("min_scale", self._min_scale)
            self._max_scale = state_dict.get("max_scale", self._max_scale)
            self._max_skipped = state_dict.get("max_skipped", self._max_skipped)
            self._skipped_steps = state_dict.get("_skipped_steps", self._skipped_steps)
            self._skipped_in_a_row = state_dict.get("_skipped_in_a_row", self._skipped_in_a_row)
            scale = min(max(self.get_scale(), self._min_scale), self._max_scale)
            self._init_scale = scale
            if self._scale is not None:
                self._scale.fill_(scale)

    def _diagnosis(self) -> str:
        said = f"{self._skipped_in_a_row} steps in a row were skipped; the loss scale is {self.get_scale():g}. "
        if not all(torch.isfinite(loss).all() for loss in self._losses):
            return said + (
                "The loss itself is not finite, so no loss scale can help: the forward pass overflows or the data "
                "hold inf or NaN. Use bf16 or fp32 (for the modules that overflow), or check the data."
            )
        return said + (
            "The loss is finite, its gradients are not, at this scale too: they exceed fp16's 65504, or the "
            "backward pass divides by zero. Use bf16, or fp32 for the modules whose gradients overflow."
        )


class KeptStatistics:
    """Running statistics of a model's normalisation layers, put back when a step is skipped."""

    def __init__(self) -> None:
        self._kept: dict[torch.Tensor, torch.Tensor] = {}
        self._modules: set[int] = set()

    def keep(self, module: nn.Module) -> None:
        """Remember ``module``'s running statistics, unless they are remembered since the last step already."""
        if id(module) in self._modules:
            return
        self._modules.add(id(module))
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
                for buffer in part.buffers(recurse=False):
                    self._kept.setdefault(buffer, buffer.clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the remembered values back, and forget them."""
        for buffer, value in self._kept.items():
            buffer.copy_(value)
        self.forget()

    def forget(self) -> None:
        self._kept.clear()
        self._modules.clear()

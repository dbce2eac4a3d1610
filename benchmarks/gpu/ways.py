"""Ways to train: one step of the same model by PyTorch alone, or by a policy and an optimizer of halfstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import halfstep
from gpu.model import loss_of

SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
MAX_NORM = 1.0

Make = Callable[[Any], torch.optim.Optimizer]


def fused(parameters: Any) -> torch.optim.Optimizer:
    """PyTorch's fastest AdamW."""
    return torch.optim.AdamW(parameters, **SETTINGS, fused=True)


def ours(**how: Any) -> Make:
    """halfstep's AdamW, with masters and state stored like this."""
    return lambda parameters: halfstep.optim.AdamW(parameters, **SETTINGS, **how)


@dataclass(frozen=True)
class Way:
    """How a step is made. ``policy`` is halfstep's; without one the step is a loop in plain PyTorch."""

    name: str
    products: str  #: the format of matrix products, for their share of what the card could do
    policy: str = ""
    optimizer: Make = fused
    autocast: torch.dtype | None = None  #: of the loop in plain PyTorch
    parameters: torch.dtype = torch.float32  #: the model's own format before anything touches it
    scaler: Callable[[str], Any] | None = None

    @property
    def on_a_gpu_only(self) -> bool:
        """Formats that a CPU has no products in, or none at a bearable speed."""
        return self.products in ("fp16", "tf32")


_BF16, _FP16 = torch.bfloat16, torch.float16

BASELINE = Way("torch bf16 autocast", "bf16", autocast=_BF16)
_IN_PLANES, _NARROW = "bf16-master", "bf16-master:grads=bf16"
#: The order is that of running: when time is short, the last are left out.
WAYS = (
    BASELINE,
    Way("halfstep bf16-mixed", "bf16", "bf16-mixed"),
    Way("halfstep bf16-master", "bf16", _IN_PLANES),
    Way("halfstep bf16-master, bf16 gradients, halfstep AdamW", "bf16", _NARROW, ours()),
    Way(
        "halfstep 16-bit model, 24bit + 8bit", "bf16", _IN_PLANES, ours(master="24bit", state="8bit"), parameters=_BF16
    ),
    Way("torch pure bf16", "bf16", parameters=_BF16),
    Way("torch tf32", "tf32"),
    Way("torch fp32", "fp32"),
    Way("halfstep bf16-mixed, halfstep AdamW", "bf16", "bf16-mixed", ours()),
    Way("torch fp16 autocast, torch scaler", "fp16", autocast=_FP16, scaler=torch.amp.GradScaler),
    Way("torch fp16 autocast, halfstep scaler", "fp16", autocast=_FP16, scaler=halfstep.GradScaler),
    Way("halfstep fp16-mixed", "fp16", "fp16-mixed"),
    Way("halfstep fp16-mixed, halfstep AdamW", "fp16", "fp16-mixed", ours()),
    Way("halfstep bf16-master, bf16 gradients, 8-bit state", "bf16", _NARROW, ours(state="8bit")),
    Way("halfstep 16-bit model, exact + fp32", "bf16", _IN_PLANES, ours(), parameters=_BF16),
    Way("halfstep 16-bit model, MasterWeights", "bf16", _IN_PLANES, parameters=_BF16),
    Way("halfstep 16-bit model, none + bf16", "bf16", _IN_PLANES, ours(master="none", state="bf16"), parameters=_BF16),
    Way("halfstep fp16-master, halfstep AdamW", "fp16", "fp16-master", ours()),
    Way("halfstep tf32", "tf32", "tf32"),
    Way("halfstep fp32", "fp32", "fp32"),
)


def named(*names: str) -> list[Way]:
    """These ways, in this order."""
    by_name = {way.name: way for way in WAYS}
    return [by_name[name] for name in names]


class Trainer:
    """A model and its optimizer on their way; ``step()`` trains on a batch of ids once.

    ``loss`` is that of the last step, on the device.
    """

    def __init__(self, way: Way, model: nn.Module, ids: Tensor, *, clip: bool = True, compiled: bool = False) -> None:
        self.way, self.model, self.ids = way, model, ids
        self.device = ids.device.type
        self.max_norm = MAX_NORM if clip else None
        self.optimizer = way.optimizer(model.parameters())
        self.mp = halfstep.MixedPrecision(model, self.optimizer, way.policy) if way.policy else None
        self.scaler = way.scaler(self.device) if way.scaler else None
        self.called: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
        self.loss: Tensor | None = None
        if self.device == "cuda" and not way.policy:  # policies set it themselves
            torch.set_float32_matmul_precision("high" if way.products == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = way.products == "tf32"

    def step(self) -> None:
        if self.mp is None:
            self._by_pytorch()
            return
        with self.mp.autocast():
            loss = loss_of(self.called, self.ids)
        self.mp.backward(loss)
        self.mp.step(max_grad_norm=self.max_norm)
        self.loss = loss.detach()

    def _by_pytorch(self) -> None:
        optimizer, scaler, low = self.optimizer, self.scaler, self.way.autocast
        with torch.autocast(self.device, low or torch.bfloat16, enabled=low is not None):
            loss = loss_of(self.called, self.ids)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if self.max_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def loss_scale(self) -> float | None:
        """What the loss is scaled by now; None where it is not."""
        scaler = self.scaler if self.mp is None else self.mp.scaler
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None

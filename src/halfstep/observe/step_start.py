"""`StepStart`: what a step began with, kept until it is over: batches, random states, and the model.

Nothing large is copied. Batches are kept by reference, and parameters stay where they are until the optimizer steps.
Buffers, which a forward pass may write to, are copied where they are small or belong to a normalisation layer; of
others (masks, tables) only those whose version counters say that they changed. Counters alone would not do: batch
normalisation writes to its running statistics without counting, and so may kernels of extensions.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from halfstep.observe.batches import Encoded, encode
from halfstep.observe.randomness import RandomStates

#: Batches that are kept at most, should a loop never step.
MOST_BATCHES = 256
#: Buffers of so many elements are copied without asking whether they changed.
SMALL = 16_384


@dataclass(frozen=True)
class _Batch:
    encoded: Encoded
    random: RandomStates


class StepStart:
    """What the step under way began with.

    Args:
        model: see `bare`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.devices = sorted({parameter.device for parameter in model.parameters()}, key=str)
        self._model = model
        self._buffers = _Buffers(model)
        self._batches: list[_Batch] = []
        self._beyond = 0

    def remember(self, batch: Any) -> None:
        """A batch that the loop gets now; the first one since `forget` begins the step."""
        if not self._batches:
            self._buffers.keep()
        if len(self._batches) < MOST_BATCHES:
            self._batches.append(_Batch(encode(batch), RandomStates.now(self.devices)))
        else:
            self._beyond += 1

    def forget(self) -> None:
        """The step is over."""
        self._batches.clear()
        self._beyond = 0

    def content(self) -> dict[str, Any]:
        """Tensors and plain values: the model and the batches as they were; and what could not be kept, by place."""
        missing: dict[str, str] = {}
        for index, batch in enumerate(self._batches):
            notes = batch.encoded.missing | batch.encoded.altered()
            missing |= {place.replace("batch", f"batches[{index}]", 1): note for place, note in notes.items()}
        if not self._batches:
            missing["batches"] = "none was seen: iterate over watch(loader)"
            self._buffers.keep()
        if self._beyond:
            missing["batches"] = f"the first {MOST_BATCHES} are kept, and not the {self._beyond} after them"
        return {
            "batches": [{"batch": each.encoded.value, "random": each.random.plain()} for each in self._batches],
            "missing": missing,
            "parameters": {name: local(each).detach() for name, each in self._model.named_parameters()},
            "buffers": self._buffers.before(),
            "training": [name for name, module in self._model.named_modules() if module.training],
        }


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, whose parameters have the names that users know."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    sharded: Any = tensor
    return sharded.to_local() if hasattr(tensor, "to_local") else tensor


class _Buffers:
    """A model's buffers as they were at the start of the step."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (f"{path}.{name}" if path else name, module, name)
            for path, module in model.named_modules(remove_duplicate=False)
            for name in module._buffers
        ]
        self._kept: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Bring the copies to what the buffers are now."""
        copies: list[Tensor] = []
        sources: list[Tensor] = []
        for place, module, name in self._places:
            buffer = module._buffers.get(name)
            if buffer is None:
                self._kept.pop(place, None)
                continue
            version = -1 if buffer.is_inference() else buffer._version
            part = local(buffer).detach()
            known = self._kept.get(place)
            if known is None or known[0]() is not buffer or known[2].shape != part.shape:
                self._kept[place] = (weakref.ref(buffer), version, part.clone())
            elif known[1] != version or version < 0 or part.numel() <= SMALL or isinstance(module, _NormBase):
                copies.append(known[2])
                sources.append(part)
                self._kept[place] = (known[0], version, known[2])
        if copies:
            torch._foreach_copy_(copies, sources)  # one kernel for many, on devices

    def before(self) -> dict[str, Tensor]:
        """The copies, by the buffers' names."""
        return {place: copy for place, (_, _, copy) in self._kept.items()}

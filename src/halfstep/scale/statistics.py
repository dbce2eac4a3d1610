"""Running statistics of normalisation layers, put back when a step is skipped.

They complete "a skipped step leaves the model as it was": the *forward* pass updates them, before anybody knows that
the step will be skipped, and with PyTorch's scaler alone one overflow leaves NaN in them for good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfstep.transfer import moved


class KeptStatistics:
    """Running statistics of a model's normalisation layers, put back when a step is skipped."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}
        self._modules: set[int] = set()

    def keep(self, module: nn.Module) -> None:
        """Remember ``module``'s running statistics, unless they are remembered since the last step already."""
        if id(module) in self._modules:
            return
        self._modules.add(id(module))
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
                for buffer in part.buffers(recurse=False):
                    if buffer not in self._kept:
                        self._kept[buffer] = buffer.detach().clone()

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Put the remembered values back, and forget them.

        Args:
            where: 1 element; nothing is put back unless it is above 0. The host need not know which.
        """
        conditions: dict[torch.device, Tensor] = {}
        for buffer, value in self._kept.items():
            if where is not None:
                if buffer.device not in conditions:
                    conditions[buffer.device] = moved(where, buffer.device) > 0
                value = torch.where(conditions[buffer.device], value, buffer)
            buffer.copy_(value)
        self.forget()

    def forget(self) -> None:
        self._kept.clear()
        self._modules.clear()

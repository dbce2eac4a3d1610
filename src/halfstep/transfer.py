"""Small tensors moved between devices without the host waiting where it need not."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``, in ``dtype`` if one is given; itself where it is that already.

    Nobody waits for a copy to a device: what reads it there is queued behind it. A copy to the host's memory is waited
    for: PyTorch makes one that is not into pinned memory, where the host would read what was there before.
    """
    return tensor.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")

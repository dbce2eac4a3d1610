"""Numbers for the host, read from devices in as few waits as there are devices.

A host that waits in the middle of a step has nothing queued when it goes on, so the device waits in turn. What is to be
known of a step is therefore left where it was computed, and read at the end, when its time is taken anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

#: A number that may still be on its device, as a tensor of one element; None: there is none.
OnDevice: TypeAlias = Tensor | float | None


def read(values: Sequence[OnDevice], devices: Iterable[torch.device] = ()) -> list[float | None]:
    """``values`` as Python numbers, bit for bit; tensors have one element.

    Args:
        devices: CUDA devices to wait for as well: when this returns, they have done all that was asked of them.
    """
    places: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            places.setdefault(value.device, []).append(place)
    copies: list[tuple[list[int], Tensor]] = []
    for device, here in places.items():
        numbers = [value.detach().reshape(()) for place in here if isinstance(value := values[place], Tensor)]
        # Float64 holds all of them exactly; MPS has none.
        wide = [number if device.type == "mps" else number.double() for number in numbers]
        # To the CPU without blocking is into pinned memory, and right only after the wait below.
        copies.append((here, torch.stack(wide).to("cpu", non_blocking=device.type == "cuda")))
    for device in {device for device in (*places, *devices) if device.type == "cuda"}:
        torch.cuda.synchronize(device)
    found: list[float | None] = [None if isinstance(value, Tensor) else value for value in values]
    for here, copy in copies:
        for place, number in zip(here, copy.tolist(), strict=True):
            found[place] = float(number)
    return found

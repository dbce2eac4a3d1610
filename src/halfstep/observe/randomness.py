"""The states of all random number generators that a training step may draw from: taken, kept, and put back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """Python's, NumPy's (if it was imported), PyTorch's on the CPU and on devices; as they were at one moment."""

    python: Any
    numpy: Any  #: as ``numpy.random.get_state()`` has it; None where NumPy was not imported
    cpu: Tensor
    devices: Mapping[str, Tensor] = field(default_factory=dict)  #: by name, ``cuda:0``

    @classmethod
    def now(cls, devices: Iterable[torch.device] = ()) -> RandomStates:
        """As they are now. Waits for no device: their generators count on the host."""
        numpy = sys.modules.get("numpy")
        states = {}
        for device in devices:
            module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
            if hasattr(module, "get_rng_state"):
                states[str(device)] = module.get_rng_state(*_index(device))
        return cls(
            random.getstate(), None if numpy is None else numpy.random.get_state(), torch.get_rng_state(), states
        )

    def set(self) -> None:
        """Put all generators back to this; those of devices that this machine lacks are left out."""
        random.setstate(self.python)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for name, state in self.devices.items():
            device = torch.device(name)
            if has_device(device):
                module: Any = torch.get_device_module(device)
                module.set_rng_state(state, *_index(device))

    def plain(self) -> dict[str, Any]:
        """Tensors and plain values, for `halfstep.save`."""
        numpy = self.numpy
        if numpy is not None:
            name, keys, *rest = numpy
            numpy = (str(name), torch.from_numpy(keys.astype("int64")), int(rest[0]), int(rest[1]), float(rest[2]))
        return {"python": self.python, "numpy": numpy, "cpu": self.cpu, "devices": dict(self.devices)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> RandomStates:
        """The states that `plain` gave."""
        numpy = values["numpy"]
        if numpy is not None:
            name, keys, *rest = numpy
            numpy = (name, keys.numpy().astype("uint32"), *rest)
        return cls(values["python"], numpy, values["cpu"], values["devices"])


@contextlib.contextmanager
def random_states(states: RandomStates) -> Iterator[None]:
    """Within, all generators go on from ``states``; afterwards from where they were."""
    before = RandomStates.now([device for name in states.devices if has_device(device := torch.device(name))])
    try:
        states.set()
        yield
    finally:
        before.set()


def has_device(device: torch.device) -> bool:
    """Whether this machine has this device."""
    if device.type == "cpu":
        return True
    module: Any = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        return False
    return device.index is None or not hasattr(module, "device_count") or device.index < module.device_count()


def _index(device: torch.device) -> tuple[Any, ...]:
    return () if device.type == "mps" else (device,)  # the one device of its kind takes no argument

"""Putting a program back to where it was, so that a step can run again: modules, optimizers, random numbers."""

from __future__ import annotations

import copy
import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from halfstep.autocast.buffers import BufferSnapshot


class Snapshot:
    """The state of a program from when it is entered: of each module before its first call, of each optimizer before
    its first step, of all random number generators at once.

    What the program keeps elsewhere (a data loader's position, counters of its own, a loss scaler) is not in it.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # by id: itself, its values, its gradient
        self._optimizers: dict[int, tuple[Optimizer, dict[Any, Any], list[dict[str, Any]]]] = {}
        self._modules: set[int] = set()
        self._buffers = BufferSnapshot()
        self._handles: list[Any] = []
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._devices = _device_states()

    def __enter__(self) -> Snapshot:
        self._handles = [
            register_module_forward_pre_hook(self._called),
            register_optimizer_step_pre_hook(self._stepping),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, tensors in place."""
        self._buffers.restore()
        for tensor, value, gradient in self._tensors.values():
            tensor.copy_(value)
            tensor.grad = None if gradient is None else gradient.clone()
        for optimizer, state, groups in self._optimizers.values():
            optimizer.state.clear()
            optimizer.state.update({key: _fresh(value) for key, value in state.items()})
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: _fresh(value) for key, value in values.items()})
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        if self._devices is not None:
            torch.cuda.set_rng_state_all(self._devices)

    def _called(self, module: nn.Module, args: Any) -> None:
        if id(module) not in self._modules:
            self._modules |= {id(part) for part in module.modules()}
            self._buffers.keep(module)
            for parameter in module.parameters():
                self._keep(parameter)

    def _stepping(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._keep(parameter)
            state = {key: _fresh(value) for key, value in optimizer.state.items()}
            groups = [{k: _fresh(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            self._optimizers[id(optimizer)] = (optimizer, state, groups)

    def _keep(self, tensor: Tensor) -> None:
        if id(tensor) not in self._tensors:
            gradient = None if tensor.grad is None else tensor.grad.clone()
            self._tensors[id(tensor)] = (tensor, tensor.detach().clone(), gradient)


def _fresh(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _fresh(item) for key, item in value.items()}
    return copy.deepcopy(value) if isinstance(value, list | tuple) else value


def _device_states() -> list[Tensor] | None:
    # The state before CUDA's first use needs no keeping: nothing was drawn.
    is_used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch lacks it
    return torch.cuda.get_rng_state_all() if is_used else None

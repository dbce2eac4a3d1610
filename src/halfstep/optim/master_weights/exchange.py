"""Masters exchanged for parameters in an optimizer's own lists, and back.

The exchange is made in the same lists, so that an optimizer that keeps them (LBFGS) keeps its own, and the state is
moved along, because torch keys it by tensor. While it lasts the optimizer knows only masters; outside it knows only
parameters, and masters wait in `Exchange.masters`.

Each of these moves can be interrupted anywhere and made again, or undone: state is moved to where the masters' places
say it belongs, and not from where it is thought to be; and masters that an optimizer wrote are ahead of their
parameters until they are cast back, which `Exchange.follow` makes up for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.autocast import LOW_PRECISION
from halfstep.optim import backends, foreach, pages
from halfstep.optim.backends import native
from halfstep.optim.clipping import multiply_
from halfstep.optim.layout import is_plain, local


class Exchange:
    """The masters of one optimizer's 16-bit parameters, and who stands in its lists.

    Args:
        optimizer: any torch optimizer.
        masters: FP32, by parameter.

    Attributes:
        is_made: whether masters stand in their parameters' places.
        has_multiplied: whether gradients of parameters without masters were multiplied, in place, when they were last
            pulled.
    """

    def __init__(self, optimizer: Optimizer, masters: dict[Tensor, Tensor]) -> None:
        self.optimizer = optimizer
        self.masters = masters
        self.is_made = False
        self.has_multiplied = False
        self._room = pages.Room()
        self._lent: list[tuple[Tensor, int]] = []  # masters, with their versions when the optimizer got them

    def master_of(self, parameter: Tensor) -> Tensor:
        """The master of a parameter, made now if there is none; the parameter itself if it is not 16-bit."""
        if parameter.dtype not in LOW_PRECISION:
            return parameter
        if parameter not in self.masters:
            self.masters[parameter] = parameter.detach().float()
        return self.masters[parameter]

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, also while masters stand in their place."""
        return [parameter for parameters in self._own() for parameter in parameters]

    def make(self, needed: Collection[Tensor] = ()) -> None:
        """Put masters in their parameters' places: of those that are trained, that have one, or that are ``needed``."""
        own = self._own()
        stand_ins = [[self._stand_in(p, p in needed) for p in parameters] for parameters in own]
        self._lent = [(master, master._version) for master in self.masters.values()]
        self.is_made = True
        self._put(stand_ins)

    def undo(self) -> None:
        """Put the parameters back in their places; also those of groups that came or went meanwhile."""
        own = self._own()
        self._put(own)
        self.is_made = False

    def is_ahead(self) -> bool:
        """Whether masters were written since they were lent to the optimizer, and not cast back."""
        return any(master._version != version for master, version in self._lent)

    def settle(self) -> None:
        """Nobody has masters any more: what is written to them from here on does not put them ahead."""
        self._lent = []

    @torch.no_grad()
    def follow(self) -> None:
        """Bring masters up to date with parameters that were changed, made FP32, or taken away, from outside."""
        if self.is_ahead():  # a step was interrupted behind the optimizer's
            self.cast_back()
        held = set(self.parameters())
        for parameter in list(self.masters):
            if parameter not in held or parameter.dtype not in LOW_PRECISION:
                del self.masters[parameter]
        # Of sharded (DTensor) ones each rank looks at its shard.
        _follow([(local(parameter), local(master)) for parameter, master in self.masters.items()])

    @torch.no_grad()
    def current(self) -> dict[Tensor, Tensor]:
        """The masters as `follow` would make them, which is left to the next step: nothing changes here.

        Masters that do round to their parameters are themselves, the others new tensors.
        """
        held = set(self.parameters())
        present = {p: m for p, m in self.masters.items() if p in held and p.dtype in LOW_PRECISION}
        return {p: m if rounds_to(m, p) else _followed(p, m) for p, m in present.items()}

    @torch.no_grad()
    def pull_gradients(self, factors: Sequence[Tensor]) -> None:
        """Give masters their parameters' gradients, in FP32, and multiply all gradients by ``factors`` (0-d, FP32)."""
        present = [(parameter, parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        low = [(self.masters[p], gradient) for p, gradient in present if p in self.masters]
        self.drop_gradients()  # also of those that have none this time
        copies = self._room.float32_of([gradient for _, gradient in low])
        for (master, _), copy in zip(low, copies, strict=True):
            master.grad = copy
        own = [gradient for p, gradient in present if p not in self.masters]
        self.has_multiplied = bool(own) and bool(factors)
        multiply_([*copies, *own], factors)

    def drop_gradients(self) -> None:
        """Free the masters' gradients; the parameters keep theirs."""
        for master in self.masters.values():
            master.grad = None
        self._room.lend()

    @torch.no_grad()
    def cast_back(self) -> None:
        """Write every master, rounded to nearest, into its parameter."""
        present = [parameter for parameter in self.parameters() if parameter in self.masters]
        foreach.copy_(present, [self.masters[parameter] for parameter in present])
        self.settle()

    def _own(self) -> list[list[Tensor]]:
        present = [list(group["params"]) for group in self.optimizer.param_groups]
        if not self.is_made:
            return present
        parameter_of = {id(master): parameter for parameter, master in self.masters.items()}
        return [[parameter_of.get(id(tensor), tensor) for tensor in tensors] for tensors in present]

    def _stand_in(self, parameter: Tensor, needed: bool) -> Tensor:
        trained = parameter.requires_grad or parameter.grad is not None
        return self.master_of(parameter) if trained or needed or parameter in self.masters else parameter

    def _put(self, replacement: Sequence[Sequence[Tensor]]) -> None:
        """Put ``replacement``, one list per group, into the groups' lists, and move the state along.

        State in a 16-bit format becomes FP32 where it moves to a master: Adagrad makes its state when it is
        constructed, a plain ``load_state_dict`` casts it to the parameter's format, others may have stepped before.
        """
        state = self.optimizer.state
        for group, new in zip(self.optimizer.param_groups, replacement, strict=True):
            group["params"][:] = new
        standing = {id(tensor) for tensors in replacement for tensor in tensors}
        for parameter, master in self.masters.items():
            old, new_key = (parameter, master) if id(master) in standing else (master, parameter)
            if old not in state:
                continue
            values = state[old]
            if new_key is master:
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
                        values[key] = value.float()
            state[new_key] = values
            del state[old]


def rounds_to(master: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter is its master's rounding; of a sharded (DTensor) one, this rank's part. Waits for it."""
    return bool((local(parameter) == local(master).to(parameter.dtype)).all())


def _followed(parameter: Tensor, master: Tensor) -> Tensor:
    return torch.where(parameter == master.to(parameter.dtype), master, parameter.float())


def _follow(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set masters anew where they do not round to their parameters: plain tensors, in pairs.

    Without asking the device whether any is to be: the host would wait for it, between a backward pass and its step.
    """
    kernels: dict[tuple[Any, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for parameter, master in pairs:
        if (kernel := _kernel_for(parameter, master)) is not None:
            kernels.setdefault((kernel, parameter.device), []).append((parameter, master))
            continue
        same = parameter == master.to(parameter.dtype)
        if parameter.device.type != "cpu" or not bool(same.all()):
            master.copy_(torch.where(same, master, parameter.float()))
    for (kernel, _), chosen in kernels.items():
        kernel(chosen)


def _kernel_for(parameter: Tensor, master: Tensor) -> Callable[[Sequence[tuple[Tensor, Tensor]]], None] | None:
    """The compiled kernel that can compare these, element beside element; None if there is none."""
    device = parameter.device.type
    alike = parameter.device == master.device and parameter.stride() == master.stride()
    if not (alike and is_plain(parameter, device) and is_plain(master, device)):
        return None
    if device == "cpu":
        return None if native.missing() else native.follow
    if device != "cuda" or backends.lacking(device):
        return None
    from halfstep.optim.backends import cuda

    return cuda.follow

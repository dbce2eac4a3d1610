"""What is linted: the modules, the optimizers, and what they will run under; with names for everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lints.keeping import Group, groups_of
from halfstep.formats import Format, of
from halfstep.hardware import DeviceFacts
from halfstep.observe.place import Phase, Place
from halfstep.policy import Policy

LOW_PRECISION = (torch.float16, torch.bfloat16)
#: What torch.compile adds to the paths of the modules within.
_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class Named:
    """A parameter's name, and the module that holds it."""

    name: str
    module: str
    module_type: str


class Setting:
    """Everything that a rule may look at.

    Attributes:
        modules: the outermost ones.
        groups: the optimizers' parameter groups, each with what is known of how they are kept.
        training: whether parameters are going to change.
        scales: whether the loss is scaled, by a scaler that is switched on.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[Optimizer],
        policy: Policy | None,
        scaler: Any,
        facts: DeviceFacts | None,
        training: bool | None,
    ) -> None:
        self.modules = tuple(modules)
        self.optimizers = tuple(optimizers)
        self.policy = policy
        self.scaler = scaler
        self.facts = facts
        self.training = bool(self.optimizers) if training is None else training
        self.groups: tuple[Group, ...] = groups_of(self.optimizers, policy)
        self._parts = list(_parts(self.modules))
        self._names: dict[int, Named] = {}
        for path, part in self._parts:
            for name, parameter in part.named_parameters(recurse=False):
                # The outermost module's own parameters have no path before them; its class stands for it in places.
                full = name if part in self.modules else f"{path}.{name}"
                self._names.setdefault(id(parameter), Named(full, path, type(part).__name__))

    @property
    def scales(self) -> bool:
        return self.scaler is not None and bool(self.scaler.is_enabled())

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module once, with its path from the outermost one; that one under the name of its class."""
        return iter(self._parts)

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter of the modules once."""
        seen: set[int] = set()
        for _, part in self._parts:
            for parameter in part.parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def trained(self) -> list[Tensor]:
        """The parameters that change: those that optimizers step; without optimizers, those that require gradients."""
        if self.groups:
            return [parameter for group in self.groups for parameter in group.parameters]
        return [parameter for parameter in self.parameters() if parameter.requires_grad] if self.training else []

    def name(self, parameter: Tensor) -> str:
        """The parameter's name; its shape where it is in none of the modules."""
        named = self._names.get(id(parameter))
        return named.name if named else f"one of shape {tuple(parameter.shape)} that is in no module"

    def at_parameter(self, op: str, parameter: Tensor, phase: Phase = "optimizer") -> Place:
        named = self._names.get(id(parameter))
        if named is None:
            return Place(op, phase)
        return Place(op, phase, named.module, named.module_type, parameter=named.name)

    def at_module(self, path: str, module: nn.Module, parameter: str | None = None) -> Place:
        kind = type(module).__name__
        return Place(kind, "forward", path, kind, parameter=parameter)


def at_device(what: str, facts: DeviceFacts | None) -> Place:
    """The place of a finding about the whole run on a device."""
    return Place(what, "forward", module_type=facts.name if facts else "")


def format_of(tensor: Tensor) -> Format:
    return of(tensor.dtype)


def some(count: int, total: int, what: str) -> str:
    """``3 of 98 parameters``, ``all 98 parameters``, ``the one parameter``."""
    if total == 1:
        return f"the one {what}"
    return f"all {total:,} {what}s" if count == total else f"{count:,} of {total:,} {what}s"


def finding(
    code: str,
    place: Place | None,
    severity: Severity,
    what: str,
    consequence: str,
    remedy: str,
    **numbers: float | int | str,
) -> Finding:
    """A finding, in the order in which it is read."""
    return Finding(code, place, what, consequence, remedy, severity, numbers)


def _parts(modules: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()
    for module in modules:
        for path, part in module.named_modules(memo=seen):
            kept = [piece for piece in path.split(".") if piece and piece != _COMPILED]
            yield ".".join(kept) or type(part).__name__, part

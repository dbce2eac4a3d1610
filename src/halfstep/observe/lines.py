"""What `halfstep.observe.attribution` keeps: scopes and lines where ops are booked, and what goes on in each thread."""

from __future__ import annotations

from typing import Any

from torch import nn

from halfstep.observe.names import Tree
from halfstep.observe.place import Phase, Place
from halfstep.observe.stepping import Step


class Scope:
    """A module with the lines that were run in it; the code outside of all modules is one too."""

    __slots__ = ("lines", "module", "parent", "type")

    def __init__(self, module: str, kind: str, parent: Scope | None) -> None:
        self.module, self.type, self.parent = module, kind, parent
        self.lines: dict[tuple[int, int], Line] = {}


class Line:
    """A line in a module: where ops are booked. Keeps its code object, so that its address is not used again."""

    __slots__ = ("backward", "code", "file", "forward", "number", "optimizer", "scope")

    def __init__(self, scope: Scope, code: Any, file: str | None, number: int | None) -> None:
        self.scope, self.code, self.file, self.number = scope, code, file, number
        self.forward: dict[Any, Place] = {}
        self.backward: dict[Any, Place] = {}
        self.optimizer: dict[Any, Place] = {}

    def place(self, known: dict[Any, Place], func: Any, phase: Phase) -> Place:
        found = known.get(func)
        if found is None:
            scope = self.scope
            found = Place(op_name(func), phase, scope.module, scope.type, self.file, self.number)
            known[func] = found
        return found


class Call:
    """A module that runs: its scope, and the node evaluated when it was called (then it is recomputation)."""

    __slots__ = ("module", "node", "scope", "tree")

    def __init__(self, module: nn.Module, scope: Scope, tree: Tree | None, node: Any) -> None:
        self.module, self.scope, self.tree, self.node = module, scope, tree, node


class Thread:
    """What is going on in one thread."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.stepping: list[Step] = []
        self.numbers: dict[int, Line] = {}
        self.next = -1  # the first number not yet noted; -1: not known
        self.line: Line | None = None  # of the op before
        self.is_forward = False  # whether ops ran here outside of a backward pass


def op_name(func: Any) -> str:
    """``mm``, of the overload ``torch.ops.aten.mm.default``."""
    packet = getattr(func, "overloadpacket", None)
    return packet.__name__ if packet is not None else str(getattr(func, "__name__", func))

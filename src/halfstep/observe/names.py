"""Names of modules and parameters: dotted paths below the outermost module that was called.

Wrappers that change no numbers leave no trace in a path: what is ``blocks.3.mlp`` in a plain run is ``blocks.3.mlp``
under ``DistributedDataParallel``, ``torch.compile`` and checkpoint wrappers too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

#: Names of children that wrappers hold their module under.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)


@dataclass
class Tree:
    """One outermost module, with the paths of all modules below it as they were at the last look."""

    root: weakref.ref[nn.Module]
    paths: dict[int, tuple[weakref.ref[nn.Module], str]] = field(default_factory=dict)


class Names:
    """Paths below every outermost module seen; nothing here keeps a module or a tensor alive."""

    def __init__(self) -> None:
        self._trees: dict[int, Tree] = {}
        self._parameters: dict[int, tuple[weakref.ref[Tensor], str, str]] = {}

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """The outermost modules called that are still alive, in the order of their first calls."""
        alive = (tree.root() for tree in self._trees.values())
        return tuple(root for root in alive if root is not None)

    def add_root(self, root: nn.Module) -> Tree:
        """The tree of an outermost module; walked once, and again when it turns out to have grown."""
        tree = self._trees.get(id(root))
        if tree is None or tree.root() is not root:
            self._trees.pop(id(root), None)  # an address used again
            tree = self._trees[id(root)] = Tree(weakref.ref(root))
            self._walk(tree, root)
        return tree

    def path(self, tree: Tree, module: nn.Module) -> str | None:
        """The dotted path of a module below a root, empty for the root itself; None where it is not in the tree."""
        for attempt in range(2):
            known = tree.paths.get(id(module))
            if known is not None and known[0]() is module:
                return known[1]
            root = tree.root()
            if attempt == 0 and root is not None:
                self._walk(tree, root)
        return None

    def refresh(self) -> None:
        """Look at all trees again: for parameters that came after the first call."""
        for tree in list(self._trees.values()):
            root = tree.root()
            if root is not None:
                self._walk(tree, root)

    def parameter(self, tensor: Tensor) -> tuple[str, str] | None:
        """Dotted name of a parameter and the class of the module that owns it; None where no root has it."""
        known = self._parameters.get(id(tensor))
        return None if known is None or known[0]() is not tensor else known[1:]

    def _walk(self, tree: Tree, root: nn.Module) -> None:
        tree.paths = {}
        taken = {name for ref, name, _ in self._parameters.values() if ref() is not None}
        for path, module in _modules(root, "", set()):
            tree.paths[id(module)] = (weakref.ref(module), path)
            for name, parameter in module._parameters.items():
                if parameter is not None and self.parameter(parameter) is None:
                    full = _free(f"{path}.{name}" if path else name, root, taken)
                    taken.add(full)
                    self._parameters[id(parameter)] = (weakref.ref(parameter), full, type(module).__name__)


def _free(name: str, root: nn.Module, taken: set[str]) -> str:
    # Two networks in one script (a generator and a critic) may both have a "0.weight": the second gets its root's class
    # in front.
    if name in taken:
        name = f"{type(root).__name__}.{name}"
    number, free = 2, name
    while free in taken:
        free, number = f"{name}#{number}", number + 1
    return free


def _modules(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, path if _hides(module, name) else f"{path}.{name}" if path else name, seen)


def _hides(module: Any, child: str) -> bool:
    return child in _WRAPPED or (child == "module" and isinstance(module, _PARALLEL))

"""The graph of a loss, walked: its nodes, and the leaves that they end at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph behind ``roots``, once; those that accumulate into a leaf hold it as ``variable``."""
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Any] = set(stack)
    while stack:
        node = stack.pop()
        assert node is not None
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def leaf_of(node: Any) -> Tensor | None:
    """The leaf that a node accumulates into; None for any other node."""
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None

"""The smallest set that still helps: delta debugging over modules.

Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input" (2002), the algorithm ddmin: halves, then
quarters, then their complements, until no single item can be left out. Of n items it asks some n log n times at worst,
and 2 log n times where one is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def smallest(items: Sequence[Item], helps: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """Items of which none can be left out, in their order.

    Args:
        items: all of them together help.
        helps: asked of subsets, each at most once.
    """
    answers: dict[tuple[int, ...], bool] = {}

    def ask(chosen: Sequence[int]) -> bool:
        key = tuple(chosen)
        if key not in answers:
            answers[key] = helps([items[i] for i in chosen])
        return answers[key]

    left, parts = list(range(len(items))), 2
    while len(left) >= 2:
        size = -(-len(left) // parts)
        chunks = [left[i : i + size] for i in range(0, len(left), size)]
        found = next((chunk for chunk in chunks if len(chunk) < len(left) and ask(chunk)), None)
        if found is not None:
            left, parts = found, 2
            continue
        rests = [[i for i in left if i not in chunk] for chunk in chunks] if parts > 2 or len(left) > 2 else []
        rest = next((rest for rest in rests if rest and ask(rest)), None)
        if rest is not None:
            left, parts = rest, max(parts - 1, 2)
        elif parts >= len(left):
            break
        else:
            parts = min(2 * parts, len(left))
    return [items[i] for i in left]

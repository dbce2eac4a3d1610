"""Random numbers for a comparison: run k of every policy draws the same ones, another k others.

At the start all generators are seeded by the seed's index, for scripts that seed nothing. A script's own calls of the
seeding functions then get its seed plus an offset that depends on the index; index 0 leaves them as they are.
``torch.Generator`` objects that a script seeds itself are out of reach: pass the seed as an argument there.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch

#: Far from the small seeds people type, so that seed 1 of run 0 is not seed 0 of run 1.
OFFSET = 1_000_003


@contextlib.contextmanager
def seeded(index: int) -> Iterator[None]:
    """Seed everything for run ``index``, and shift the seeds that the script sets itself."""
    random.seed(index)
    numpy.random.seed(index)
    torch.manual_seed(index)
    owners: list[tuple[Any, str]] = [
        (random, "seed"),
        (numpy.random, "seed"),
        (numpy.random, "default_rng"),
        (torch, "manual_seed"),
        (torch.random, "manual_seed"),
        (torch.cuda, "manual_seed"),
        (torch.cuda, "manual_seed_all"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in owners]
    if index:
        for owner, name, original in before:
            setattr(owner, name, _shifted(original, index * OFFSET))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _shifted(original: Any, offset: int) -> Any:
    @functools.wraps(original)
    def seed(*args: Any, **kwargs: Any) -> Any:
        # The seed is the first argument, whatever its name: seed, a, …
        if args:
            args = (_moved(args[0], offset), *args[1:])
        elif kwargs:
            first = next(iter(kwargs))
            kwargs[first] = _moved(kwargs[first], offset)
        return original(*args, **kwargs)

    return seed


def _moved(value: Any, offset: int) -> Any:
    if isinstance(value, int | numpy.integer) and not isinstance(value, bool):
        return (int(value) + offset) % 2**32
    return value

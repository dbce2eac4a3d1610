"""Batches taken apart and made again; random states likewise."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import halfstep
from halfstep.observe.batches import KIND, MOST_ITEMS, Fields, decode, encode
from halfstep.observe.randomness import RandomStates, random_states


@dataclass(frozen=True, slots=True)
class Example:
    image: Tensor
    tags: dict[str, int] = field(default_factory=dict)


class Graph:
    """An object that is nothing but its attributes."""

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes
        self.made = "with __init__"


class Image(Tensor):
    """A subclass that adds nothing to the numbers."""


Pair = namedtuple("Pair", ["left", "right"])


class Encoding(UserDict):  # type: ignore[type-arg]
    pass


def there_and_back(batch: Any, path: Path, **options: Any) -> Any:
    encoded = encode(batch)
    assert encoded.missing == {}
    halfstep.save(encoded.value, path / "batch.pt")
    return decode(halfstep.load(path / "batch.pt"), **options)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return type(b) in (Tensor, type(a)) and a.dtype == b.dtype and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, numpy.ndarray | numpy.generic):
        return type(a) is type(b) and a.dtype == b.dtype and bool(numpy.all(a == b))
    if isinstance(a, dict | UserDict):
        return len(a) == len(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(3),
        (torch.randn(2), torch.tensor([True, False]), torch.zeros(2, 0, dtype=torch.float16)),
        {"x": [torch.ones(2), {"deep": (1, 2.5, "text", None, 1j)}], 3: torch.Size([2, 3]), None: torch.float16},
        [[1, 2, 3], ("a", "b"), [], {}],
        {KIND: "a user's own key", 5: torch.ones(1)},
        {("a", 1): 2},
        (b"bytes", b"", bytearray(b"more"), {1, 2}, frozenset({"a"})),
        [numpy.arange(6).reshape(2, 3), numpy.float32(0.5), numpy.zeros((0, 2)), numpy.int64(3), numpy.bool_(True)],
        OrderedDict(b=1, a=2),
        Encoding(ids=torch.arange(3), text=["a"]),
        torch.tensor([[0.0, 2.0], [0.0, 0.0]]).to_sparse(),
        pack_sequence([torch.ones(3), torch.ones(2)]),
        torch.ones(2).as_subclass(Image),
        nn.Parameter(torch.ones(2)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_there_and_back(batch: Any, tmp_path: Path) -> None:
    back = there_and_back(batch, tmp_path)
    assert equal(batch, back)
    if type(batch) in (list, tuple, dict, PackedSequence):
        assert type(back) is type(batch)


def test_types_that_are_given_come_back(tmp_path: Path) -> None:
    batch = [Example(torch.ones(2), {"a": 1}), Graph(torch.arange(2)), Pair(1, torch.ones(1)), Encoding(x=1)]
    graph = batch[1]
    assert isinstance(graph, Graph)
    graph.made = "changed"
    back = there_and_back(batch, tmp_path, types=[Example, Graph, Pair, Encoding])
    assert [type(each) for each in back] == [Example, Graph, Pair, Encoding]
    assert equal(back[0].image, torch.ones(2)) and back[0].tags == {"a": 1}
    assert back[1].made == "changed" and back[1].nodes.tolist() == [0, 1]
    assert back[2].right.tolist() == [1] and back[3]["x"] == 1


def test_types_that_are_not_given_are_stood_in_for(tmp_path: Path) -> None:
    batch = [Example(torch.ones(2), {"a": 1}), Pair(1, torch.ones(1)), Encoding(x=torch.ones(2), y=[torch.ones(1)])]
    example, pair, encoding = there_and_back(batch, tmp_path)
    assert type(example) is Fields and example.tags == {"a": 1}
    left, right = pair  # named tuples can still be unpacked
    assert (left, right.tolist(), pair.left) == (1, [1.0], 1)
    moved = encoding.to(torch.float64)
    assert moved.x.dtype is moved["y"][0].dtype is torch.float64
    assert dict(**encoding).keys() == {"x", "y"}
    with pytest.raises(AttributeError, match=r"no 'tokens', only x, y\..*types="):
        _ = encoding.tokens


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    endless: list[Any] = [1, {}]
    endless.append(endless)
    encoded = encode(
        {"f": len, "m": nn.Linear(1, 1), "g": iter([1]), "meta": torch.ones(1, device="meta"), "e": endless}
    )
    assert encoded.missing.keys() == {"batch['f']", "batch['m']", "batch['g']", "batch['meta']", "batch['e'][2]"}
    assert "contains itself" in encoded.missing["batch['e'][2]"] and "Linear" in encoded.missing["batch['m']"]
    assert encoded.value["e"] == [1, {}, None]
    halfstep.save(encoded.value, tmp_path / "rest.pt")
    words = encode(numpy.array(["a", "b"]))
    assert list(words.missing) == ["batch"] and "NumPy" in words.missing["batch"]


def test_a_batch_of_too_many_things_costs_no_more_than_the_limit() -> None:
    encoded = encode([[{}] for _ in range(MOST_ITEMS)])
    assert encoded.missing and "more than" in next(iter(encoded.missing.values()))
    assert encode(list(range(10 * MOST_ITEMS))).missing == {}  # numbers and texts are taken in one go


def test_containers_are_copied_and_tensors_are_not() -> None:
    batch = {"x": torch.ones(3), "list": [1, [torch.ones(1)]]}
    encoded = encode(batch)
    x = batch.pop("x")
    batch["list"].append(2)  # type: ignore[union-attr]
    assert encoded.value["x"].data_ptr() == x.data_ptr()  # type: ignore[union-attr]
    assert len(encoded.value["list"]) == 2
    assert encoded.altered() == {}
    encoded.value["list"][1][0].add_(1)
    assert encoded.altered().keys() == {"batch['list'][1][0]"}


def test_inference_tensors_and_leaves_that_require_grad(tmp_path: Path) -> None:
    with torch.inference_mode():
        frozen = torch.ones(2)
    assert encode(frozen).altered() == {}
    assert there_and_back(torch.ones(2, requires_grad=True), tmp_path).requires_grad
    assert not there_and_back(torch.ones(2), tmp_path).requires_grad


def test_a_kind_of_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'hologram'.*update halfstep"):
        decode([{KIND: "hologram"}])


def test_no_type_is_made_that_was_not_asked_for() -> None:
    named = {KIND: "object", "type": "pathlib.Path", "fields": {"x": 1}}
    assert type(decode(named)) is Fields
    with pytest.raises(ValueError):
        decode({KIND: "named tuple", "type": "x", "fields": ["__import__('os')"], "values": [1]})


def draw() -> tuple[Any, ...]:
    return random.random(), numpy.random.rand(), numpy.random.randn(), torch.rand(2).tolist()


def test_random_states_there_and_back(tmp_path: Path) -> None:
    numpy.random.randn()  # leaves half of a pair of normal numbers behind, which is part of the state
    states = RandomStates.now([torch.device("cpu")])
    first = draw()
    halfstep.save(states.plain(), tmp_path / "states.pt")
    loaded = RandomStates.from_plain(halfstep.load(tmp_path / "states.pt"))
    outside = RandomStates.now()
    next_ones = draw()
    outside.set()
    with random_states(loaded):
        assert draw() == first
    assert draw() == next_ones
    with pytest.raises(KeyError), random_states(states):
        raise KeyError
    assert states.devices == {}
    RandomStates(states.python, None, states.cpu, {"cuda:99": states.cpu}).set()  # a device that is not here


def test_numpy_that_was_not_imported_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    states = RandomStates.now()
    assert states.numpy is None and "numpy" not in sys.modules
    RandomStates.from_plain(states.plain()).set()
    assert "numpy" not in sys.modules

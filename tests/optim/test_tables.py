"""Tables of addresses on a CUDA device: when they are sent again, in which stream, and how long they are kept."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from halfstep.optim.backends import cuda

DEVICE = torch.device("cuda", 0)


class Device:
    """What the tables ask of a device: its stream, whether that is captured, and copies, which only count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = 1
        self.captures = False
        self.sent = 0
        monkeypatch.setattr(cuda, "_tables", OrderedDict())
        monkeypatch.setattr(cuda, "_captured", {})
        monkeypatch.setattr(cuda, "_stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captures)
        monkeypatch.setattr(cuda, "_send", self._send)

    def _send(self, host: Tensor, to: torch.device) -> Tensor:
        self.sent += 1
        return host.clone()

    def table(self, *gradients: Tensor) -> Any:
        return cuda._table_of(tuple(map(cuda._place_of_gradient, gradients)), DEVICE)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_a_stream_reads_only_what_was_sent_in_it(device: Device) -> None:
    """Elsewhere the copy may not have come yet; and freed, its memory goes to that stream again at once."""
    gradients = [torch.zeros(8), torch.zeros(8)]
    first = device.table(*gradients)
    device.stream = 2
    second = device.table(*gradients)
    assert second.on_device is not first.on_device
    assert second.plan is not first.plan
    assert device.table(*gradients) is second
    device.stream = 1
    assert device.table(*gradients) is first


def test_gradients_that_come_one_by_one_have_a_table_each(device: Device) -> None:
    gradients = [torch.zeros(8) for _ in range(3)]
    tables = [device.table(gradient) for gradient in gradients]
    sent = device.sent
    assert [device.table(gradient) for gradient in gradients] == tables
    assert device.sent == sent


def test_tables_in_use_outlast_those_that_are_not(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TABLES", 3)
    used, others = torch.zeros(8), [torch.zeros(8) for _ in range(9)]
    table = device.table(used)
    for other in others:
        device.table(other)
        assert device.table(used) is table
    assert len(cuda._tables) == 3


def test_a_capture_keeps_what_was_there_before_it(device: Device) -> None:
    """It is in a stream of its own; torch waits for the device before it, so what others sent is there."""
    gradients = [torch.zeros(8), torch.zeros(8)]
    kept = weakref.ref(device.table(*gradients))
    device.stream, device.captures, sent = 2, True, device.sent
    for _ in range(3):
        assert device.table(*gradients) is kept()
    assert (device.sent, len(cuda._captured)) == (sent, 1)
    cuda._tables.clear()
    gc.collect()
    assert kept() is not None


def test_a_capture_keeps_no_memory_of_its_graph(device: Device) -> None:
    """New addresses: their table is copied anew in each replay, into the graph's memory; only the plan was there."""
    before = device.table(torch.zeros(8), torch.zeros(8))
    plan = weakref.ref(before.plan)
    device.captures = True
    made = weakref.ref(device.table(torch.zeros(8), torch.zeros(8)))
    alone = weakref.ref(device.table(torch.zeros(9)))
    del before
    cuda._tables.clear()
    gc.collect()
    assert made() is None
    assert alone() is None
    assert plan() is not None
    assert len(cuda._captured) == 1

"""Out to plain FP32 and PyTorch's own optimizer, and back: the same numbers and the same training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep import optim

PAIRS = [("AdamW", {}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("SGD", {})]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64, bias=False))
    model.register_buffer("table", torch.arange(4.0))
    return model


def to_bf16(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def feed(model: nn.Module, step: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        parameter.grad = gradient.to(dtype)


def tensors_of(state: Any) -> list[tuple[Any, str, Tensor]]:
    return [(i, k, torch.as_tensor(v)) for i, values in state["state"].items() for k, v in values.items()]


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_torch_goes_on_from_the_export_as_we_do(name: str, options: dict[str, Any]) -> None:
    model = to_bf16(make_model())
    ours = getattr(optim, name)(model.parameters(), lr=1e-3, backend="eager", **options)
    for step in range(5):
        feed(model, step, torch.bfloat16)
        ours.step()
    weights, state = optim.export_fp32(model, ours)
    assert all(value.dtype is torch.float32 for value in weights.values() if value.is_floating_point())
    plain = make_model(1)
    plain.load_state_dict(weights)
    theirs = getattr(torch.optim, name)(plain.parameters(), lr=1e-3, **options)
    theirs.load_state_dict(copy.deepcopy(state))
    for step in range(5, 10):
        feed(model, step, torch.bfloat16)
        feed(plain, step, torch.float32)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.master(p), q)
    # And back, into a new model and optimizer, which then go on alike too.
    again = to_bf16(make_model(2))
    optimizer = getattr(optim, name)(again.parameters(), lr=1e-3, backend="eager", **options)
    optim.import_fp32(again, optimizer, plain.state_dict(), theirs.state_dict())
    for step in range(10, 13):
        feed(again, step, torch.bfloat16)
        feed(plain, step, torch.float32)
        optimizer.step()
        theirs.step()
    for p, q in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(optimizer.master(p), q)


@pytest.mark.parametrize("master", ["fp32", "exact", "24bit", "none"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit"])
def test_export_and_import_give_back_what_the_storage_holds(master: Any, state: Any) -> None:
    model = to_bf16(make_model())
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, master=master, state=state)
    for step in range(3):
        feed(model, step, torch.bfloat16)
        optimizer.step()
    weights, plain = optim.export_fp32(model, optimizer)
    again = to_bf16(make_model(1))
    other = optim.AdamW(again.parameters(), master=master, state=state)
    optim.import_fp32(again, other, weights, plain)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.master(p), other.master(q))
    for (_, key, a), (_, _, b) in zip(tensors_of(plain), tensors_of(optim.export_fp32(again, other)[1]), strict=True):
        # The codes of squares are dithered anew: within a code of each other.
        torch.testing.assert_close(a, b, rtol=0 if state == "fp32" or key == "exp_avg" else 0.05, atol=1e-7)


def test_tied_weights_frozen_ones_and_buffers() -> None:
    model = to_bf16(make_model())
    model.tied = model[0]  # the same module under a second name
    model.frozen = nn.Parameter(torch.ones(3, dtype=torch.float16), requires_grad=False)
    model.low = nn.Buffer(torch.ones(2, dtype=torch.bfloat16))
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])
    feed(nn.Sequential(model[0], model[1], model[2]), 0, torch.bfloat16)
    optimizer.step()
    weights, state = optim.export_fp32(model, optimizer)
    assert weights.keys() == model.state_dict().keys()
    assert weights["0.weight"] is weights["tied.weight"]
    assert weights["frozen"].dtype is weights["low"].dtype is torch.float32
    assert weights["1.num_batches_tracked"].dtype is torch.int64
    assert len(state["state"]) == 5


def test_a_wrong_model_is_refused_and_nothing_changes() -> None:
    model = to_bf16(make_model())
    optimizer = optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0.bias is missing; .*8 in all"):
        optim.import_fp32(model, optimizer, {"0.weight": torch.zeros(96, 64)})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))

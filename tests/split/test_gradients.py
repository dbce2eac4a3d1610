"""Gradients kept in bfloat16: the same training where nothing is added to them, FP32 sums where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import halfstep
from halfstep import optim
from halfstep.policy import PolicyOptionError, parse
from halfstep.split import NarrowGradients, split_parameters


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def trained(policy: str, accumulate: int = 1, **options: Any) -> tuple[list[float], list[Tensor], set[torch.dtype]]:
    model = made()
    mp = halfstep.MixedPrecision(model, optim.AdamW(model.parameters(), 1e-2, **options), policy)
    losses, dtypes = [], set()
    for step in range(30):
        for part in range(accumulate):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step * accumulate + part))
            with mp.autocast():
                loss = functional.cross_entropy(model(x), x[:, :4].argmax(1))
            mp.backward(loss / accumulate)
            losses.append(loss.item())
        dtypes |= {p.grad.dtype for p in model.parameters() if p.dim() > 1 and p.grad is not None}
        mp.step(max_grad_norm=1.0)
    return losses, [p.detach().clone() for p in model.parameters()], dtypes


@pytest.mark.parametrize("options", [{}, {"state": "8bit"}], ids=["fp32", "8bit"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_has_the_bits_of_fp32_gradients(accumulate: int, options: Any) -> None:
    wide = trained("bf16-master", accumulate, **options)
    narrow = trained("bf16-master:grads=bf16", accumulate, **options)
    assert wide[0] == narrow[0] and all(map(torch.equal, wide[1], narrow[1]))
    assert wide[2] == {torch.float32}
    assert narrow[2] == {torch.bfloat16 if accumulate == 1 else torch.float32}


def test_a_thousand_gradients_of_1_are_a_thousand() -> None:
    layer = nn.Linear(1, 2, bias=False)
    split_parameters(layer)
    narrow = NarrowGradients(layer.parameters())
    for count in range(1, 1001):
        layer(torch.ones(1, 1)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype is (torch.bfloat16 if count == 1 else torch.float32)
    assert layer.weight.grad.tolist() == [[1000.0], [1000.0]]
    narrow.remove()
    layer.zero_grad()
    layer(torch.ones(1, 1)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype is torch.float32


def test_what_cannot_be_is_refused() -> None:
    model = made()
    with pytest.raises(ValueError, match=r"needs an optimizer of halfstep\.optim: AdamW wants"):
        halfstep.MixedPrecision(model, torch.optim.AdamW(model.parameters()), "bf16-master:grads=bf16")
    for wrong in ("bf16-mixed:grads=bf16", "fp16-master:grads=bf16", "fp32:grads=bf16"):
        with pytest.raises(PolicyOptionError, match="goes with bf16-master"):
            parse(wrong)
    assert str(parse("bf16-master:grads=bf16")) == "bf16-master:grads=bf16"
    assert parse("bf16-master:grads=fp32") is parse("bf16-master")

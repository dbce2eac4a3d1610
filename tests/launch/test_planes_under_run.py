"""A script under bf16-mixed:storage=split: its parameters stay its own, and it trains as under bf16-mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: What people do around a step: an average, small writes, a hook that clips, a swap, a new optimizer, files.
SCRIPT = """
    import copy
    import torch
    from torch import nn
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5))
    first = model[0].weight
    average = None
    losses = []
    for round in range(3):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(8):
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(8 * round + step))
            loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if average is None:
                average = copy.deepcopy(model)
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters()):
                    a.lerp_(p, 0.1)
                for p in model.parameters():
                    p.mul_(1 - 1e-4)
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(average.state_dict())
    model.load_state_dict(kept)
    dtypes = [str(p.dtype) for p in model.parameters()]
    torch.save({"model": model.state_dict(), "average": average.state_dict(), "losses": losses, "dtypes": dtypes,
                "same": first is model[0].weight, "planes": hasattr(first, "lo")}, "out.pt")
"""


def test_what_a_script_does_around_a_step_reaches_its_weights(launch: Callable[..., Any]) -> None:
    mixed = launch(SCRIPT, "bf16-mixed")
    split = launch(SCRIPT, "bf16-mixed:storage=split")
    assert split.record.header.policy == "bf16-mixed:storage=split"
    assert (mixed.out["planes"], split.out["planes"]) == (False, True)
    assert split.out["same"] and set(split.out["dtypes"]) == {"torch.float32"}
    for name in ("model", "average"):
        for entry, value in split.out[name].items():
            assert type(value) is torch.Tensor and value.dtype is torch.float32
            # One tie that is cast otherwise moves what follows; whatever is lost (an average, a write) moves far more.
            assert torch.allclose(value, mixed.out[name][entry], atol=5e-3), (name, entry)
    assert torch.allclose(torch.tensor(split.out["losses"]), torch.tensor(mixed.out["losses"]), atol=1e-2)
    assert not split.codes


def test_what_cannot_be_kept_so_is_named(launch: Callable[..., Any]) -> None:
    script = """
    import torch
    from torch import nn
    flat = torch.randn(64)
    model = nn.Linear(8, 4)
    model.weight.data = flat[:32].view(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    torch.save({"same": bool((flat[:32].view(4, 8) == model.weight).all())}, "out.pt")
    """
    ran = launch(script, "bf16-mixed:storage=split")
    assert ran.out["same"]
    (notice,) = [n for n in ran.record.notices if n.code == "plain-storage"]
    assert "1 weights of Linear stay plain" in notice.message and "a piece of a larger tensor" in notice.message


def test_a_weight_whose_memory_is_asked_for_is_named_with_the_line(launch: Callable[..., Any]) -> None:
    script = """
    import torch
    from torch import nn
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.weight.data_ptr()
    torch.save({"plain": type(model.weight) is nn.Parameter}, "out.pt")
    """
    ran = launch(script, "bf16-mixed:storage=split")
    (notice,) = [n for n in ran.record.notices if n.code == "plain-storage"]
    assert ran.out["plain"] and "data_ptr() was asked of it" in notice.message and notice.where


def test_16_bit_gradients_are_for_optimizers_that_take_them(launch: Callable[..., Any]) -> None:
    script = """
    import sys
    import torch
    from torch import nn
    from halfstep import optim
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = (torch.optim if "torch" in sys.argv else optim).AdamW(model.parameters(), lr=1e-2)
    losses, dtypes = [], set()
    for step in range(6):
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        dtypes.add(str(model[0].weight.grad.dtype))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save({"losses": losses, "dtypes": sorted(dtypes)}, "out.pt")
    """
    wide, narrow = launch(script, "bf16-master"), launch(script, "bf16-master:grads=bf16")
    assert wide.out["losses"] == narrow.out["losses"] and not wide.codes and not narrow.codes
    assert (wide.out["dtypes"], narrow.out["dtypes"]) == (["torch.float32"], ["torch.bfloat16"])
    other = launch(script, "bf16-master:grads=bf16", "torch")
    assert other.codes == {"fp32-gradients"} and other.out["dtypes"] == ["torch.float32"]

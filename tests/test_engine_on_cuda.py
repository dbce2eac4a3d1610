"""`MixedPrecision` on the device itself: the bits of PyTorch's own loop, and how often a step waits for the device."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep import MixedPrecision, optim
from halfstep.policy import POLICIES, Policy
from halfstep.split import SplitTensor

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

MIXED = [policy for policy in POLICIES.values() if policy.storage == "plain" and not policy.emulate]
STEPS = 5
MAX_NORM = 0.5


def made(device: str) -> nn.Sequential:
    """No attention and no embedding: their backward passes may add up in any order on a GPU."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 8)]
    return nn.Sequential(*layers).to(device)


def batch(step: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 32, generator=generator), torch.randint(8, (16,), generator=generator)
    return x.to(device), y.to(device)


def train(mp: MixedPrecision, device: str, steps: range = range(STEPS)) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step, device)
        with mp.autocast():
            loss = nn.functional.cross_entropy(mp.model(x), y)
        mp.backward(loss)
        mp.step(max_grad_norm=MAX_NORM)
        losses.append(loss.item())
    return losses


def by_hand(policy: Policy, device: str) -> tuple[nn.Module, list[float]]:
    """PyTorch's own recipe."""
    model = made(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, enabled=policy.loss_scaling)
    losses = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if policy.tf32 and device == "cuda" else "highest")
    try:
        for step in range(STEPS):
            x, y = batch(step, device)
            lowered = torch.autocast(device, policy.compute_dtype) if policy.lowers else contextlib.nullcontext()
            with lowered:
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        torch.set_float32_matmul_precision(before)
    return model, losses


@on_devices
@pytest.mark.parametrize("policy", MIXED, ids=str)
def test_a_mixed_policy_has_the_bits_of_the_loop_by_hand(policy: Policy, device: str) -> None:
    their_model, their_losses = by_hand(policy, device)
    model = made(device)
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=0.01), policy)
    assert train(mp, device) == their_losses
    assert all(map(torch.equal, model.parameters(), their_model.parameters()))
    assert len(set(their_losses)) == STEPS


@on_devices
@pytest.mark.parametrize("storage", [("planes", "fp32"), ("planes", "8bit"), ("24bit", "8bit"), ("none", "bf16")])
@pytest.mark.parametrize("policy", ["bf16-master", "fp16-master"])
def test_a_master_policy_trains_as_fp32_does(policy: str, storage: tuple[Any, Any], device: str) -> None:
    """Losses of a few steps within what the format's rounding of activations moves them.

    Of an FP32 model, in planes, and of one that is 16-bit already, with smaller masters.
    """
    _, expected = by_hand(POLICIES["fp32"], device)
    model = made(device)
    master, state = storage
    low = POLICIES[policy].compute_dtype
    if master == "planes":
        master = "exact"
    else:
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.to(low)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, master=master, state=state)
    mp = MixedPrecision(model, optimizer, policy)
    losses = train(mp, device)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.02
    assert model[0].weight.dtype is (torch.float32 if storage[0] == "planes" else low)
    assert isinstance(model[0].weight, SplitTensor) == (storage[0] == "planes")


@on_devices
@pytest.mark.parametrize("policy", ["fp16-mixed", "fp16-master"])
def test_an_overflow_leaves_the_model_as_it_was(policy: str, device: str) -> None:
    model = made(device)
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=0.01), policy)
    train(mp, device)
    before = [p.detach().clone() for p in model.parameters()]
    scale = mp.scaler.get_scale()
    with mp.autocast():
        loss = model(batch(0, device)[0] * 1e7).float().square().mean() * math.inf
    mp.backward(loss)
    result = mp.step()
    assert not result.applied and mp.scaler.get_scale() == scale / 2
    assert all(map(torch.equal, model.parameters(), before))


@on_devices
def test_a_checkpoint_continues_with_the_same_bits(device: str, tmp_path: Path) -> None:
    def start() -> MixedPrecision:
        model = made(device)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, master="24bit", state="8bit")
        return MixedPrecision(model, optimizer, "bf16-master")

    mp = start()
    train(mp, device, range(2))
    halfstep.save({"model": mp.model.state_dict(), "mp": mp.state_dict()}, tmp_path / "run.pt")
    expected = train(mp, device, range(2, STEPS))
    resumed = start()
    state = halfstep.load(tmp_path / "run.pt")
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["mp"])
    assert train(resumed, device, range(2, STEPS)) == expected
    assert all(map(torch.equal, resumed.model.parameters(), mp.model.parameters()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        ("bf16-mixed", lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)),
        ("bf16-mixed", lambda p: optim.AdamW(p, lr=0.01)),
        ("bf16-master", lambda p: optim.AdamW(p, lr=0.01, master="24bit", state="8bit")),
    ],
    ids=["torch", "halfstep", "halfstep-master"],
)
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_the_host_waits_once_where_a_step_clips_and_else_never(
    policy: str, optimizer: Any, max_norm: float | None
) -> None:
    model = made("cuda")
    mp = MixedPrecision(model, optimizer(model.parameters()), policy)
    x, y = batch(0, "cuda")

    def step() -> None:
        with mp.autocast():
            loss = nn.functional.cross_entropy(model(x), y)
        mp.backward(loss)
        mp.step(max_grad_norm=max_norm)

    for _ in range(3):
        step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) <= (0 if max_norm is None else 1), waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_model_trains_as_the_eager_one() -> None:
    losses = []
    for compiled in (False, True):
        model = made("cuda")
        mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=0.01), "bf16-mixed")
        if compiled:
            model.compile()
        losses.append(train(mp, "cuda"))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02

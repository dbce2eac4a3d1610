"""`MixedPrecision` against the loop that one would write by hand with PyTorch alone: equal bit for bit."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep import hardware
from halfstep.engine import MixedPrecision, StepResult
from halfstep.optim import backends
from halfstep.policy import POLICIES, Policy, UnknownPolicyError, choose
from halfstep.scale import GradScaler
from halfstep.split import SplitTensor, join, split

MIXED = [p for p in POLICIES.values() if p.storage == "plain" and p.name != "tf32" and not p.emulate]
SPLIT = [p for p in POLICIES.values() if p.storage == "split"]
SCALED = [p for p in POLICIES.values() if p.loss_scaling]
OVERFLOW_AT = 3
STEPS = 6
MICROBATCHES = 2
MAX_NORM = 0.5


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)
    )


def make_optimizer(parameters: Any, fused: bool | None = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, fused=fused)


def data(step: int, part: int, overflow_at: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + part)
    x, y = torch.randn(6, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)
    return (x * 1e6 if step == overflow_at else x), y  # fp16 ends at 65504


def train(mp: MixedPrecision, steps: range, overflow_at: int | None = None) -> tuple[list[float], list[StepResult]]:
    losses, results = [], []
    for step in steps:
        for part in range(MICROBATCHES):
            x, y = data(step, part, overflow_at)
            with mp.autocast():
                loss = nn.functional.cross_entropy(mp.model(x), y)
            mp.backward(loss / MICROBATCHES)
            losses.append(loss.item())
        results.append(mp.step(max_grad_norm=MAX_NORM))
    return losses, results


def by_hand(policy: Policy, overflow_at: int | None) -> tuple[nn.Module, Any, list[float], list[float], float]:
    """PyTorch's own recipe: autocast, `torch.amp.GradScaler`, clipping between unscale and step.

    Weights that the policy stores in planes are FP32 numbers that these can hold, which in fp16 not all are.
    """
    model = make_model()
    stored = [m.weight for m in model if isinstance(m, nn.Linear)] if policy.storage == "split" else []
    _as_stored(stored, policy)
    # Parameters in planes are stepped in one pass, which has the bits of the fused form.
    optimizer = make_optimizer(model.parameters(), fused=policy.storage == "split" and not backends.lacking("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=policy.loss_scaling)
    losses, norms = [], []
    for step in range(STEPS):
        statistics = {name: b.clone() for name, b in model.named_buffers()}
        for part in range(MICROBATCHES):
            x, y = data(step, part, overflow_at)
            with torch.autocast("cpu", dtype=policy.compute_dtype, enabled=policy.lowers) if policy.lowers else _none():
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss / MICROBATCHES).backward()
            losses.append(loss.item())
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        scaler.step(optimizer)
        scaler.update()
        _as_stored(stored, policy)
        optimizer.zero_grad()
        if step == overflow_at:
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])
    return model, optimizer, losses, norms, scaler.get_scale()


@torch.no_grad()
def _as_stored(weights: list[Tensor], policy: Policy) -> None:
    for weight in weights:
        weight.copy_(join(*split(weight, policy.compute_dtype)))


def _none() -> Any:
    import contextlib

    return contextlib.nullcontext()


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through a state dict; dtypes included."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("policy", MIXED + SPLIT, ids=str)
def test_the_loop_is_the_one_written_by_hand(policy: Policy) -> None:
    overflow_at = OVERFLOW_AT if policy.loss_scaling else None
    their_model, their_optimizer, their_losses, their_norms, their_scale = by_hand(policy, overflow_at)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    mp = MixedPrecision(model, optimizer, policy)
    losses, results = train(mp, range(STEPS), overflow_at)
    assert repr(losses) == repr(their_losses)  # NaN included
    assert repr([r.grad_norm for r in results]) == repr(their_norms)
    assert equal(model.state_dict(), their_model.state_dict())
    assert equal(optimizer.state_dict()["state"], their_optimizer.state_dict()["state"])
    assert [r.applied for r in results] == [step != overflow_at for step in range(STEPS)]
    if policy.loss_scaling:
        assert [r.scale for r in results] == [2.0**16] * 4 + [2.0**15] * 2
        assert mp.scaler.get_scale() == their_scale == 2.0**15
    else:
        assert {r.scale for r in results} == {None}
    assert all(p.grad is None for p in model.parameters())
    assert len(set(losses)) > STEPS  # it did train


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", SCALED, ids=str)
def test_a_skipped_step_leaves_everything_as_it_was(policy: Policy, fused: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
    mp = MixedPrecision(model, optimizer, policy)
    train(mp, range(2))
    before = copy.deepcopy((model.state_dict(), mp.state_dict()["optimizer"]))
    losses, results = train(mp, range(2, 3), overflow_at=2)
    assert not all(map(math.isfinite, losses))
    assert [(r.applied, r.scale) for r in results] == [(False, 2.0**16)]
    assert mp.scaler.get_scale() == 2.0**15
    assert equal(before, (model.state_dict(), mp.state_dict()["optimizer"]))
    assert all(p.grad is None for p in model.parameters())
    assert train(mp, range(3, 4))[1][0].applied


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_equals_the_uninterrupted_one(policy: str) -> None:
    scaler = GradScaler("cpu", 2.0**12, growth_interval=2) if "fp16" in policy else None
    model = make_model()
    mp = MixedPrecision(model, make_optimizer(model.parameters()), policy, scaler=copy.deepcopy(scaler))
    train(mp, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "mp": mp.state_dict()}, file)
    expected = train(mp, range(3, STEPS))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    resumed = make_model()
    for parameter in resumed.parameters():
        nn.init.constant_(parameter, 0.5)
    other = MixedPrecision(resumed, make_optimizer(resumed.parameters()), policy)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["mp"])
    assert train(other, range(3, STEPS)) == expected
    assert equal(resumed.state_dict(), model.state_dict())
    assert equal(other.state_dict(), mp.state_dict())


def test_auto_is_the_devices_policy_and_says_why() -> None:
    model = make_model()
    mp = MixedPrecision(model, make_optimizer(model.parameters()))
    assert (mp.policy, mp.reason) == choose(hardware.detect("cpu"))
    named = MixedPrecision(model, make_optimizer(model.parameters()), "tf32")
    assert named.policy is POLICIES["fp32"] and "tf32 was asked for" in named.reason


@pytest.mark.parametrize("policy", MIXED, ids=str)
def test_16_bit_parameters_are_refused_where_fp32_is_trained(policy: Policy) -> None:
    model = make_model()
    model[3].bfloat16()
    with pytest.raises(ValueError, match=r"parameter '3\.weight' is bfloat16, .*use policy 'bf16-master'"):
        MixedPrecision(model, make_optimizer(model.parameters()), policy)
    model[3].requires_grad_(False)  # frozen weights need no masters
    MixedPrecision(model, make_optimizer([p for p in model.parameters() if p.requires_grad]), policy)


def test_what_cannot_work_is_refused() -> None:
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        MixedPrecision(nn.ReLU(), optimizer)
    with pytest.raises(UnknownPolicyError, match="bf16-mixed"):
        MixedPrecision(model, optimizer, "bf16")
    with pytest.raises(ValueError, match="bf16-mixed does not scale the loss"):
        MixedPrecision(model, optimizer, "bf16-mixed", scaler=GradScaler("cpu"))
    mp = MixedPrecision(model, optimizer, "fp16-mixed")
    with pytest.raises(RuntimeError, match="call backward"):
        mp.step()
    state = mp.state_dict()
    with pytest.raises(ValueError, match="of policy 'fp16-mixed', this run's is 'fp32'"):
        MixedPrecision(model, optimizer, "fp32").load_state_dict(state)
    model = make_model()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5
    left = MixedPrecision(model, make_optimizer(model.parameters()), "fp16-master").left_plain
    assert left == {"0.weight": "it holds 100000, and the largest float16 is 65504"}


@pytest.mark.parametrize("policy", SPLIT, ids=str)
def test_matrices_outside_of_norms_are_stored_in_planes_whoever_steps_them(policy: Policy) -> None:
    model = make_model()
    model[5].requires_grad_(False)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    mp = MixedPrecision(model, make_optimizer(model[:3].parameters()), policy)
    stored = {name: p for name, p in model.named_parameters() if isinstance(p, SplitTensor)}
    assert set(stored) == {"0.weight", "3.weight", "5.weight"} and mp.masters is None and mp.left_plain == {}
    for name, p in model.named_parameters():
        was, value = before[name]
        assert p is was and p.dtype is torch.float32
        exact = policy.compute_dtype is torch.bfloat16 or name not in stored
        assert ((p - value).abs() <= (0 if exact else 2.0**-40)).all()
        assert not exact or torch.equal(p, value)


@pytest.mark.parametrize("policy", SPLIT, ids=str)
def test_a_model_that_is_16_bit_already_stays_so_and_gets_masters(policy: Policy) -> None:
    model = make_model()
    for layer in (model[0], model[3], model[5]):
        layer.to(policy.compute_dtype)
    mp = MixedPrecision(model, make_optimizer(model.parameters()), policy)
    train(mp, range(2))
    low = [p for p in model.parameters() if p.dtype is policy.compute_dtype]
    assert len(low) == 6 and mp.masters is not None and len(mp.masters) == 6 and mp.left_plain == {}
    assert all(torch.equal(mp.masters.of(p).to(p.dtype), p) for p in low)
    assert any((mp.masters.of(p) != p.float()).any() for p in low)


def test_evaluation_keeps_no_statistics_and_autocast_lowers() -> None:
    model = make_model()
    mp = MixedPrecision(model, make_optimizer(model.parameters()), "fp16-mixed")
    with torch.no_grad(), mp.autocast():
        assert model(data(0, 0)[0]).dtype is torch.float16
    moved = {name: b.clone() for name, b in model.named_buffers()}
    train(mp, range(1), overflow_at=0)
    # The skipped step goes back to where it began, not to before the evaluation.
    assert all(torch.equal(buffer, moved[name]) for name, buffer in model.named_buffers())


def test_gradients_can_be_kept() -> None:
    model = make_model()
    mp = MixedPrecision(model, make_optimizer(model.parameters()), "fp32")
    mp.backward(model(data(0, 0)[0]).sum())
    result = mp.step(zero_grad=False)
    assert result == StepResult(applied=True, scale=None, grad_norm=None)
    assert all(p.grad is not None for p in model.parameters())

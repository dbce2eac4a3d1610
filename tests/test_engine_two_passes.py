"""`MixedPrecision` with an optimizer of `halfstep.optim`: what it does with one of `torch.optim`, in two passes."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_engine import data, equal, make_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfstep import optim
from halfstep.engine import MixedPrecision, StepResult
from halfstep.optim import backends, masters
from halfstep.policy import parse
from halfstep.scale import GradScaler, HalfGradientError, LossScaleError, Skip

#: "own": of a model whose linear layers are 16-bit before the policy sees it.
MASTER = ["bf16-master own", "fp16-master own"]
POLICIES = ["fp32", "bf16-mixed", "fp16-mixed", "bf16-master", "fp16-master", *MASTER]
SCALED = ["fp16-mixed", "fp16-master", "fp16-master own"]
STORAGE = list(itertools.product(["fp32", "exact", "24bit", "none"], ["fp32", "bf16", "8bit"]))
NO_CLIPPING = 1e9
STEPS = 6

READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.cpu, Tensor.numpy}


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> Any:
    try:
        backends.choose(request.param, torch.device("cpu"))
    except optim.BackendUnavailableError as error:
        pytest.skip(str(error))
    return request.param


def adamw(parameters: Any, **options: Any) -> optim.AdamW:
    return optim.AdamW(parameters, lr=0.02, **({"backend": "eager"} | options))


def torch_adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.02)


def torch_sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.02)


def kernels(parameters: Any) -> optim.AdamW:
    return optim.AdamW(parameters, lr=0.02, backend="native")


def fused_adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.02, fused=True)


def engine(policy: str, make: Callable[..., Any], scaler: GradScaler | None = None) -> MixedPrecision:
    model = make_model()
    name, _, own = policy.partition(" ")
    if own:
        for layer in (model[0], model[3], model[5]):
            layer.to(parse(name).compute_dtype)
    return MixedPrecision(model, make(model.parameters()), name, scaler=scaler)


def backward(mp: MixedPrecision, step: int, overflow: bool = False) -> list[float]:
    losses = []
    for part in range(2):
        x, y = data(step, part, step if overflow else None)
        with mp.autocast():
            loss = nn.functional.cross_entropy(mp.model(x), y)
        mp.backward(loss / 2)
        losses.append(loss.item())
    return losses


def train(
    mp: MixedPrecision, steps: range, overflow_at: Sequence[int] = (), max_grad_norm: float | None = NO_CLIPPING
) -> tuple[list[float], list[StepResult]]:
    losses, results = [], []
    for step in steps:
        losses += backward(mp, step, step in overflow_at)
        results.append(mp.step(max_grad_norm=max_grad_norm))
    return losses, results


def masters_of(mp: MixedPrecision) -> list[Tensor]:
    parameters = [p for group in mp.optimizer.param_groups for p in group["params"]]
    if isinstance(mp.optimizer, optim.MasterOptimizer):
        return [mp.optimizer.master(p) for p in parameters]
    return [(p if mp.masters is None else mp.masters.of(p)).detach().clone() for p in parameters]


def moments_of(mp: MixedPrecision) -> list[dict[str, Tensor]]:
    states = sorted(mp.state_dict()["optimizer"]["state"].items())
    return [{k: v for k, v in state.items() if k not in masters.NAMES} for _, state in states]


@pytest.mark.parametrize("max_grad_norm", [None, NO_CLIPPING])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_numbers_are_those_of_the_torch_optimizer(policy: str, max_grad_norm: float | None) -> None:
    overflow_at = [3] if policy in SCALED else []
    # Parameters in planes are stepped in one pass, with the bits of the fused form, which are the kernels'.
    in_planes = policy in ("bf16-master", "fp16-master") and _native()
    theirs, ours = engine(policy, torch_adamw), engine(policy, kernels if in_planes else adamw)
    assert ours.masters is None
    losses, results = train(theirs, range(STEPS), overflow_at, max_grad_norm)
    our_losses, our_results = train(ours, range(STEPS), overflow_at, max_grad_norm)
    assert repr(our_losses) == repr(losses) and len(set(losses)) > STEPS
    assert [(r.applied, r.scale) for r in our_results] == [(r.applied, r.scale) for r in results]
    if max_grad_norm is None:
        assert our_results == results
    else:
        norms = [[r.grad_norm for r in each] for each in (our_results, results)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6, nan_ok=True)
    assert equal(masters_of(ours), masters_of(theirs))
    assert equal(ours.model.state_dict(), theirs.model.state_dict())
    if in_planes:  # PyTorch's own fused kernel, which steps vectors, rounds moments its way
        for one, other in zip(moments_of(ours), moments_of(theirs), strict=True):
            assert all(torch.allclose(value, other[name], rtol=1e-6, atol=1e-9) for name, value in one.items())
    else:
        assert equal(moments_of(ours), moments_of(theirs))
    assert ours.scaler.state_dict() == theirs.scaler.state_dict()
    assert all(p.grad is None for p in ours.model.parameters())


@pytest.mark.parametrize(("ours", "torchs"), [(optim.SGD, torch.optim.SGD), (optim.Adam, torch.optim.Adam)])
def test_so_are_those_of_the_others(ours: Any, torchs: Any) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01} | ({"momentum": 0.9} if ours is optim.SGD else {})
    plain = engine("fp16-master own", lambda p: torchs(p, **options))
    mp = engine("fp16-master own", lambda p: ours(p, **options, backend="eager"))
    assert repr(train(mp, range(STEPS), [3])[0]) == repr(train(plain, range(STEPS), [3])[0])
    assert equal(masters_of(mp), masters_of(plain))


@pytest.mark.parametrize("limited_to", [1 / 3, 10.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_clipping_is_one_factor_with_the_inverse_scale(policy: str, limited_to: float, backend: str) -> None:
    """Torch multiplies twice, by 1 / scale and by the clip coefficient, and rounds twice; here it is their product."""
    mp = engine(policy, lambda p: adamw(p, backend=backend))
    inverse = 2.0**-16 if policy in SCALED else 1.0
    references = [master.clone() for master in masters_of(mp)]
    reference = torch_adamw(references) if backend == "eager" else adamw(references, backend=backend)
    for step in range(STEPS):
        backward(mp, step)
        gradients = [p.grad.clone() for p in mp.model.parameters() if p.grad is not None]
        norm = float(mp.optimizer.survey().sum_of_squares.sqrt()) * inverse
        slow_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients)) * inverse
        assert norm == pytest.approx(slow_norm, rel=1e-12 if backend == "eager" else 1e-6)
        limit = slow_norm * limited_to
        coefficient = torch.tensor(min(limit / (norm + 1e-6), 1.0) * inverse, dtype=torch.float64).float()
        for master, gradient in zip(references, gradients, strict=True):
            master.grad = gradient.float() * coefficient
        reference.step()
        assert mp.step(max_grad_norm=limit).grad_norm == norm
        assert equal(masters_of(mp), references)


@pytest.mark.parametrize("policy", ["fp32", "fp16-mixed"])
def test_clipped_it_is_the_torch_optimizer_but_for_that_rounding(policy: str) -> None:
    # In the other policies a rounding of a master moves a 16-bit weight, and with it all gradients.
    mp, theirs = engine(policy, adamw), engine(policy, torch_adamw)
    train(mp, range(STEPS), max_grad_norm=0.2)
    _, results = train(theirs, range(STEPS), max_grad_norm=0.2)
    assert min(r.grad_norm or 0 for r in results) > 0.2
    for index, (ours, torchs) in enumerate(zip(masters_of(mp), masters_of(theirs), strict=True)):
        if index == 1:  # a bias before BatchNorm: its gradient is rounding noise, which Adam makes large
            continue
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("master", "state"), STORAGE)
@pytest.mark.parametrize("policy", SCALED)
def test_a_skipped_step_leaves_every_byte(policy: str, master: Any, state: Any) -> None:
    mp = engine(policy, lambda p: adamw(p, master=master, state=state))
    train(mp, range(2))
    before = copy.deepcopy((mp.model.state_dict(), mp.state_dict()["optimizer"]))
    _, (result,) = train(mp, range(2, 3), [2])
    assert (result.applied, result.scale, mp.scaler.get_scale()) == (False, 2.0**16, 2.0**15)
    assert equal(before, (mp.model.state_dict(), mp.state_dict()["optimizer"]))
    assert train(mp, range(3, 4))[1][0].applied
    assert not equal(before[0], mp.model.state_dict())


def test_the_native_backend_skips_as_well(backend: str) -> None:
    mp = engine("fp16-master own", lambda p: adamw(p, master="24bit", state="8bit", backend=backend))
    train(mp, range(2))
    before = copy.deepcopy((mp.model.state_dict(), mp.state_dict()["optimizer"]))
    assert not train(mp, range(2, 3), [2])[1][0].applied
    assert equal(before, (mp.model.state_dict(), mp.state_dict()["optimizer"]))


@pytest.mark.parametrize("policy", SCALED)
def test_the_scaler_sees_what_it_always_sees(policy: str) -> None:
    """Callback, hysteresis, counts and the error at the limit; with a torch optimizer and with ours."""
    seen = []
    for make in (torch_adamw, adamw):
        told: list[Skip] = []
        scaler = GradScaler("cpu", 2.0**10, hysteresis=2, max_skipped=3, growth_interval=2, on_skip=told.append)
        mp = engine(policy, make, scaler)
        results = [train(mp, range(step, step + 1), [1, 2, 4])[1][0] for step in range(8)]
        states = [scaler.state_dict(), [scaler.was_applied(mp.optimizer), scaler.step_was_applied]]
        with pytest.raises(LossScaleError, match=r"^3 steps in a row were skipped.*The data hold inf") as error:
            for step in range(10, 20):
                x, y = data(step, 0)
                x[0] = math.nan
                with mp.autocast():
                    loss = nn.functional.cross_entropy(mp.model(x), y)
                mp.backward(loss)
                mp.step()
        seen.append(([(r.applied, r.scale) for r in results], told, states, str(error.value)))
    assert seen[0] == seen[1]
    assert [applied for applied, _ in seen[1][0]] == [step not in (1, 2, 4) for step in range(8)]
    assert len(seen[1][1]) == 6


@pytest.mark.parametrize("policy", SCALED)
@pytest.mark.parametrize("make", [torch_adamw, adamw])
def test_below_a_scale_of_1_a_gradient_may_overflow_as_it_is_divided(make: Any, policy: str) -> None:
    mp = engine(policy, make, GradScaler("cpu", 2.0**-3, min_scale=2.0**-4))
    backward(mp, 0)
    norm_layer = mp.model[4].weight  # type: ignore[index]  # FP32 under each policy
    norm_layer.grad[0] = 1e38
    assert not mp.step().applied
    backward(mp, 0)
    norm_layer.grad[0] = 1e37  # times 16 is finite
    assert mp.step().applied


def test_the_host_waits_once() -> None:
    backends.choose("auto", torch.device("cpu"))
    if not _native():
        pytest.skip("the eager backend reads numbers of its own")

    def reads(make: Any, policy: str, limit: float | None) -> list[int]:
        mp = engine(policy, make)
        counts = []
        for step in range(4):
            backward(mp, step, overflow=policy in SCALED and step == 2)
            with Reads() as calls:
                mp.step(max_grad_norm=limit)
            counts.append(calls.count)
        return counts

    def native(parameters: Any) -> Any:
        return adamw(parameters, backend="native")

    for policy in SCALED:
        # A skip takes one more for the loss, one for its data, to find the cause.
        ours = reads(native, policy, 1.0)
        assert ours[:2] == [*ours[3:], 1] == [1, 1]
        # PyTorch's own, that has to ask before it steps and one that is told on the device: no more.
        for limit in (None, 1.0):
            assert reads(torch_sgd, policy, limit) == ours
            assert reads(fused_adamw, policy, limit) == ours
    for policy in ("bf16-master", "bf16-mixed"):
        assert reads(native, policy, None) == [0] * 4
        assert reads(native, policy, 1.0) == [1] * 4
    for make in (torch_sgd, fused_adamw):
        assert reads(make, "bf16-mixed", None) == [0] * 4
        assert reads(make, "bf16-mixed", 1.0) == [1] * 4


def _native() -> bool:
    try:
        backends.choose("native", torch.device("cpu"))
    except optim.BackendUnavailableError:
        return False
    return True


@pytest.mark.parametrize("state", ["fp32", "8bit", "bf16"])
def test_steps_taken_on_plain_parameters_go_on_in_planes(state: Any) -> None:
    model = make_model()
    optimizer = adamw(model.parameters(), state=state)
    train(MixedPrecision(model, optimizer, "fp32"), range(3))
    weights = [p.detach().clone() for p in model.parameters()]
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    mp = MixedPrecision(model, optimizer, "bf16-master")
    after = optimizer.state_dict()["state"]
    assert equal([optimizer.master(p) for p in model.parameters()], weights)
    assert equal(after, moments)
    _, results = train(mp, range(3, 5))
    assert all(r.applied for r in results)
    assert {float(s["step"]) for s in optimizer.state.values()} == {5.0}


def test_a_master_is_adopted_only_where_it_fits() -> None:
    model = make_model()
    optimizer = adamw(model[0].parameters())
    with pytest.raises(ValueError, match=r"shape \(3,\) for a parameter of shape \(16,\)"):
        optimizer.adopt(model[0].bias, torch.zeros(3))
    with pytest.raises(ValueError, match=r"does not step the parameter of shape \(16, 16\)"):
        optimizer.adopt(model[3].weight, torch.zeros(16, 16))


def test_the_users_own_unscaling_and_clipping_count() -> None:
    theirs = make_model()
    optimizer = torch_adamw(theirs.parameters())
    scaler = torch.amp.GradScaler("cpu")
    mp = engine("fp16-mixed", adamw)
    for step in range(STEPS):
        overflow = step == 3
        statistics = copy.deepcopy(dict(theirs.named_buffers()))
        for part in range(2):
            x, y = data(step, part, step if overflow else None)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.cross_entropy(theirs(x), y)
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            for name, buffer in theirs.named_buffers():
                buffer.copy_(statistics[name])
        backward(mp, step, overflow)
        mp.scaler.unscale_(mp.optimizer)
        assert repr(norm) == repr(nn.utils.clip_grad_norm_(mp.model.parameters(), 0.5))
        assert mp.step().applied != overflow
    assert equal(mp.model.state_dict(), theirs.state_dict())


def test_after_unscaling_by_hand_the_norm_is_that_of_what_is_there() -> None:
    by_hand, alone = engine("fp16-mixed", adamw), engine("fp16-mixed", adamw)
    for step in range(3):
        backward(by_hand, step)
        by_hand.scaler.unscale_(by_hand.optimizer)
        backward(alone, step)
        a, b = by_hand.step(max_grad_norm=NO_CLIPPING), alone.step(max_grad_norm=NO_CLIPPING)
        assert a == b and a.largest_gradients == b.largest_gradients
    assert equal(by_hand.model.state_dict(), alone.model.state_dict())


def test_fp16_gradients_are_not_unscaled_by_hand() -> None:
    mp = engine("fp16-master own", adamw)
    backward(mp, 0)
    with pytest.raises(
        HalfGradientError, match=r"parameter '0\.weight'.*clip with MixedPrecision\.step\(max_grad_norm"
    ):
        mp.scaler.unscale_(mp.optimizer)
    assert mp.step(max_grad_norm=1.0).applied


def test_hooks_and_schedulers_go_along() -> None:
    mp = engine("fp16-master own", adamw)
    scheduler = torch.optim.lr_scheduler.LambdaLR(mp.optimizer, lambda step: 1 / (1 + step))
    called: list[str] = []
    mp.optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    mp.optimizer.register_step_post_hook(lambda *_: called.append("after"))
    rates = []
    for step in range(3):
        _, (result,) = train(mp, range(step, step + 1), [1])
        assert mp.scaler.step_scheduler(scheduler) == result.applied
        rates.append(scheduler.get_last_lr()[0] / 0.02)
    assert rates == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    assert called == ["before", "after"] * 3


def test_who_listens_for_the_call_of_step_hears_none_when_it_is_skipped() -> None:
    mp = engine("fp16-master own", adamw)
    heard: list[int] = []
    own = mp.optimizer.step

    def listening(*args: Any, **kwargs: Any) -> Any:
        heard.append(1)
        return own(*args, **kwargs)

    mp.optimizer.step = listening  # type: ignore[method-assign]
    counts = []
    for step in range(3):
        _, (result,) = train(mp, range(step, step + 1), [1])
        counts.append((result.applied, len(heard)))
    assert counts == [(True, 1), (False, 1), (True, 2)]


@pytest.mark.parametrize(
    "scaler", [torch.amp.GradScaler, GradScaler, lambda device, s: GradScaler(device, s, min_scale=0.5)]
)
def test_scalers_drive_it_without_the_engine_and_write_no_gradient(scaler: Any, backend: str) -> None:
    """FP16 parameters and gradients, divided in FP32."""
    weight = nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(0)).half())
    master = weight.detach().float()
    optimizer, reference = adamw([weight], backend=backend), torch_adamw([master])
    scaling = scaler("cpu", 2.0**4)
    for step in range(3):
        scaling.scale((weight.float() * (step + 1) * 2.0**-20).sum()).backward()
        if step == 1:
            weight.grad[0] = math.inf
        before = weight.grad.clone()
        scaling.step(optimizer)
        scaling.update()
        assert torch.equal(weight.grad, before)
        if step != 1:
            master.grad = before.float() / (2.0**4 if step == 0 else 2.0**3)
            reference.step()
        assert torch.equal(optimizer.master(weight), master)
        weight.grad = None
    assert scaling.get_scale() == 2.0**3


def test_a_grad_scale_of_the_users_is_multiplied_in() -> None:
    """PyTorch's scaler takes the product of its scale and what it finds on the optimizer."""
    results = []
    for scaler in (torch.amp.GradScaler("cpu", 4.0), GradScaler("cpu", 4.0)):
        weight = nn.Parameter(torch.ones(3))
        optimizer = optim.SGD([weight], lr=1.0, backend="eager")
        scaler.scale(weight.sum()).backward()
        optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
        scaler.step(optimizer)
        results.append(weight.tolist())
    assert results == [[1 - 1 / 8] * 3] * 2


@pytest.mark.parametrize(("master", "state"), STORAGE)
@pytest.mark.parametrize("policy", ["bf16-master own", "fp16-master own", "fp16-master", "fp16-mixed"])
def test_a_resumed_run_equals_the_uninterrupted_one(policy: str, master: Any, state: Any) -> None:
    def make(parameters: Any) -> optim.AdamW:
        return adamw(parameters, master=master, state=state)

    mp = engine(policy, make)
    train(mp, range(3), [1] if policy in SCALED else [], 0.5)
    file = io.BytesIO()
    torch.save({"model": mp.model.state_dict(), "mp": mp.state_dict()}, file)
    expected = train(mp, range(3, STEPS), (), 0.5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = engine(policy, make)
    for parameter in other.model.parameters():
        nn.init.constant_(parameter, 0.5)
    other.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["mp"])
    assert train(other, range(3, STEPS), (), 0.5) == expected
    assert equal(other.model.state_dict(), mp.model.state_dict())
    assert equal(other.state_dict(), mp.state_dict())
    assert equal(masters_of(other), masters_of(mp))


@pytest.mark.parametrize("policy", ["bf16-mixed", "fp16-master", "fp16-master own"])
def test_the_largest_gradients_are_a_by_product(policy: str) -> None:
    mp = engine(policy, adamw)
    mp.model[0].bias.requires_grad_(False)  # type: ignore[index]
    backward(mp, 0)
    mp.model[3].weight.grad[1, 1] = math.inf  # type: ignore[index]
    inverse = 2.0**-16 if policy in SCALED else 1.0
    expected = {n: float(p.grad.abs().max()) * inverse for n, p in mp.model.named_parameters() if p.grad is not None}
    with Reads() as calls:
        largest = mp.step(max_grad_norm=1.0).largest_gradients
        assert largest is not None and len(largest) == len(expected) == 9
        before = calls.count
        assert dict(largest) == expected and largest["3.weight"] == math.inf
        assert calls.count == before + 1
    assert "0.bias" not in largest
    other = engine(policy, torch_adamw)
    backward(other, 0)
    assert other.step().largest_gradients is None


@pytest.mark.parametrize("policy", ["fp32", "fp16-mixed"])
def test_sparse_gradients_are_refused_by_name(policy: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    mp = MixedPrecision(model, adamw(model.parameters()), policy)
    mp.backward(model(torch.tensor([1, 2])).sum())
    with pytest.raises(RuntimeError, match=r"sparse gradients .*shape \(5, 3\)"):
        mp.step()


@pytest.mark.parametrize("policy", POLICIES)
def test_released_gradients_step_in_backward(policy: str) -> None:
    kept, released = engine(policy, adamw), engine(policy, lambda p: adamw(p, release_gradients=True))
    with pytest.raises(RuntimeError, match="call backward"):
        released.step()
    for step in range(3):
        for mp in (kept, released):
            x, y = data(step, 0)
            with mp.autocast():
                loss = nn.functional.cross_entropy(mp.model(x), y)
            mp.backward(loss)
        assert all(p.grad is None for p in released.model.parameters())
        assert kept.step() == released.step()
    assert equal(released.model.state_dict(), kept.model.state_dict())
    assert equal(masters_of(released), masters_of(kept))
    with released.autocast():
        loss = released.model(data(0, 0)[0]).sum()
    released.backward(loss)
    with pytest.raises(ValueError, match=r"max_grad_norm=1 comes too late.*release\.max_grad_norm = 1"):
        released.step(max_grad_norm=1.0)

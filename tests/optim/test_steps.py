"""A step: loss scaling and skips, clipping, parameters of every kind and layout, what is refused, and torch.compile."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from storage_cases import BACKENDS, LOW, MASTERS, all_same, everything, feed, made, references, same_bits
from torch import Tensor, nn

import halfstep
from halfstep import optim
from halfstep.optim import surveying
from halfstep.optim.update import Survey

Make = Callable[..., Any]
FORMATS = [*LOW, torch.float32]
#: Of a parameter that is resized: its format and master, and the entry that is easily forgotten.
RESIZED = [
    (torch.float32, "exact", ""),
    (torch.bfloat16, "none", ""),
    (torch.bfloat16, "exact", "remainder"),
    (torch.bfloat16, "24bit", "remainder"),
    (torch.float16, "exact", "fp16_remainder"),
    (torch.bfloat16, "fp32", "master"),
]


# Loss scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, halfstep.GradScaler])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("master", "rounding"), [("exact", None), ("24bit", "stochastic"), ("none", "kahan")])
def test_a_skipped_step_leaves_every_byte(
    dtype: torch.dtype, scaler_of: Make, master: str, rounding: str | None, backend: str
) -> None:
    parameters = made(dtype)
    parameters.append(nn.Parameter(torch.randn(70, 64).to(dtype)))
    optimizer = optim.AdamW(parameters, lr=0.01, master=master, rounding=rounding, state="8bit", backend=backend)
    plain = made(dtype)
    plain.append(nn.Parameter(parameters[-1].detach().clone()))
    other = optim.AdamW(plain, lr=0.01, master=master, rounding=rounding, state="8bit", backend=backend)
    scaler = scaler_of("cpu", init_scale=4.0)
    for step in range(6):
        feed(parameters, step, scaler.get_scale())
        feed(plain, step)
        overflows = step in (1, 3)
        for run, factor in ((parameters, scaler.get_scale()), (plain, 1.0)):
            run[-1].grad = torch.full_like(run[-1], 0.5 * factor)
        if overflows:
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = (torch.inf, torch.nan)[step // 2]
        before, scale = everything(optimizer), scaler.get_scale()
        scaler.scale(torch.ones(()))  # makes the scale's tensor, as the loss of a loop would
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert all_same(everything(optimizer), before) and scaler.get_scale() == scale / 2
        else:
            other.step()
    assert all_same(everything(optimizer), everything(other))
    assert not hasattr(optimizer, "found_inf") and optimizer.state[parameters[0]]["step"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6, torch.inf])
def test_clipped_step_is_unscale_clip_step(max_norm: float, dtype: torch.dtype, backend: str) -> None:
    parameters = made(dtype)
    reference = references(parameters)
    ours = optim.SGD(parameters, lr=0.01, momentum=0.9, backend=backend)  # Adam would not notice a factor
    theirs = torch.optim.SGD(reference, lr=0.01, momentum=0.9, foreach=False)
    inverse: Tensor | float
    for step in range(5):
        feed(parameters, step, 8.0)
        for p, r in zip(parameters, reference, strict=True):
            r.grad = None if p.grad is None else p.grad.float() / 8
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        norm = torch.nn.utils.clip_grad_norm_(reference, max_norm)
        theirs.step()
        inverse = 0.125 if step % 2 else torch.tensor(0.125)
        survey = ours.clipped_step(max_norm, inverse_scale=inverse)
        torch.testing.assert_close((survey.sum_of_squares.sqrt() / 8).float(), norm, rtol=1e-6, atol=0)
        assert survey.found_inf == 0
        assert all(
            p.grad is None or (g is not None and same_bits(p.grad, g))
            for p, g in zip(parameters, gradients, strict=True)
        )
    for p, r in zip(parameters, reference, strict=True):
        torch.testing.assert_close(ours.master(p), r.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_step_skips_what_is_not_finite_and_says_so(backend: str) -> None:
    parameters = made(torch.float16)
    optimizer = optim.AdamW(parameters, backend=backend)
    for step, bad in enumerate((0.0, torch.nan, torch.inf)):
        feed(parameters, step)
        before = everything(optimizer)
        if bad:
            assert parameters[1].grad is not None
            parameters[1].grad[3] = bad
        survey = optimizer.clipped_step(1.0)
        assert survey.found_inf == float(bad != 0)
        assert survey.amax.isfinite().tolist() == [True, not bad, *[True] * 5]
        assert all_same(everything(optimizer), before) == bool(bad)
    optimizer.clipped_step(1.0, skip=False)
    assert parameters[1].isnan().any() or optimizer.master(parameters[1]).isnan().any()


# Parameters of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_the_layout_of_parameters_and_gradients_does_not_matter(state: str, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(8, 16, 8, 8)
    # Groups of an 8-bit state follow memory: there, only layouts with one order of elements give the same numbers.
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.contiguous(),
        lambda t: torch.cat([t, t], 1)[:, :16],
        lambda t: torch.stack([t, t], 4)[..., 0],
    ]
    if state == "fp32":
        layouts += [
            lambda t: t.to(memory_format=torch.channels_last),
            lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        ]
    results = []
    for layout in layouts:
        for of_gradient in (layouts[0], layouts[-1], lambda t: t[:, :1].expand(t.shape)):
            p = nn.Parameter(layout(start.to(dtype, copy=True)))
            optimizer = optim.AdamW([p], lr=0.01, state=state, backend=backend)
            for step in range(3):
                g = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
                p.grad = of_gradient(g.expand(8, 16, 8, 8))
                optimizer.step()
            assert p.stride() == layout(start.to(dtype)).stride()
            results.append((optimizer.master(p), p.detach()))
    for master, parameter in results[1:]:
        assert torch.equal(master, results[0][0]) and torch.equal(parameter, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_may_change_its_layout_between_steps(backend: str) -> None:
    for state in ("fp32", "8bit"):
        convolution = nn.Conv2d(32, 16, 3).bfloat16()
        other = copy.deepcopy(convolution)
        pair = [optim.AdamW(m.parameters(), lr=0.01, state=state, backend=backend) for m in (convolution, other)]
        for step in range(6):
            if step == 3:
                other.to(memory_format=torch.channels_last)
            gradient = torch.randn(16, 32, 3, 3, generator=torch.Generator().manual_seed(step))
            for model, optimizer in zip((convolution, other), pair, strict=True):
                model.weight.grad = torch.empty_like(model.weight).copy_(gradient)
                optimizer.step()
        assert other.weight.stride() != convolution.weight.stride()
        first, second = (o.master(m.weight) for o, m in zip(pair, (convolution, other), strict=True))
        torch.testing.assert_close(first, second, rtol=0, atol=0.0 if state == "fp32" else 3e-3)
        average = (first - second).abs().mean().item()
        assert average < 2e-4


def test_a_parameter_that_overlaps_itself_is_refused_as_in_torch() -> None:
    p = nn.Parameter(torch.ones(1, 3).bfloat16().expand(4, 3))
    p.grad = torch.ones(4, 3).bfloat16()
    with pytest.raises(RuntimeError, match="single memory location"):
        optim.SGD([p], lr=0.1).step()


def test_tied_frozen_and_idle_parameters() -> None:
    embedding, head, idle = (
        nn.Embedding(7, 4).bfloat16(),
        nn.Linear(4, 7, bias=False).bfloat16(),
        nn.Linear(2, 2).half(),
    )
    head.weight = embedding.weight
    frozen = nn.Linear(4, 4).bfloat16().requires_grad_(False)
    model = nn.ModuleList([embedding, frozen, head, idle])
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    head(frozen(embedding(torch.arange(7)))).float().square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, False, False, False] and len(optimizer.state) == 1


def test_two_optimizers_over_one_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).bfloat16()
    first, second = optim.AdamW(model[0].parameters(), lr=0.1), optim.SGD(model[1].parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 4).bfloat16()).float().sum().backward()
    first.step()
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [False, False, True, True]
    second.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="does not step the parameter"):
        first.master(model[1].weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_master_is_what_the_parameter_stands_for(dtype: torch.dtype, backend: str) -> None:
    parameters = made(dtype)
    for master, rounding in MASTERS:
        optimizer = optim.SGD(parameters, lr=1e-4, master=master, rounding=rounding, backend=backend)
        for p in parameters:
            assert torch.equal(optimizer.master(p), p.float())  # before the first step, and without one
        feed(parameters, 0)
        before = [p.detach().float() for p in parameters]
        optimizer.step()
        for p, b in zip(parameters, before, strict=True):
            value = optimizer.master(p)
            assert value.dtype is torch.float32 and value.shape == p.shape
            assert value.data_ptr() != p.data_ptr() or not p.numel()
            if p.grad is not None and master in ("fp32", "exact"):
                assert torch.equal(value, b - p.grad.float() * 1e-4) or dtype is torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_of_parameters_grow(backend: str) -> None:
    parameters = made(torch.bfloat16)
    optimizer = optim.AdamW(parameters, backend=backend)
    for step in range(2):
        feed(parameters, step)
        before = [p._version for p in parameters]
        optimizer.step()
        assert [p._version > b for p, b in zip(parameters, before, strict=True)] == [True] * 7 + [False] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_a_step_between_forward_and_backward(backend: str) -> None:
    p = nn.Parameter(torch.ones(3, 3).bfloat16())
    optimizer = optim.SGD([p], lr=0.1, backend=backend)
    loss = (p @ p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_whose_data_was_replaced_is_stepped_where_it_is_now(backend: str) -> None:
    p = nn.Parameter(torch.ones(8).bfloat16())
    optimizer = optim.SGD([p], lr=0.5, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    old = p.data
    p.data = torch.full((8,), 4.0).bfloat16()
    optimizer.step()
    assert p[0] == 3.5 and old[0] == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_tensor_that_was_replaced_is_the_one_used(backend: str) -> None:
    p = nn.Parameter(torch.ones(8).bfloat16())
    optimizer = optim.SGD([p], lr=0.5, momentum=0.5, master="fp32", backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["master"] = torch.full((8,), 0.5001)  # rounds to the parameter
    optimizer.state[p]["momentum_buffer"] = torch.full((8,), 3.0)
    optimizer.step()
    assert torch.equal(optimizer.master(p), torch.full((8,), 0.5001) - 0.5 * 2.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_a_mask_over_parameters_leaves_no_nan(dtype: torch.dtype, backend: str) -> None:
    """Pruning: zeros are written over parameters, whose remainders stay."""
    for master in ("exact", "24bit"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4096).to(dtype))
        optimizer = optim.AdamW([p], lr=1e-3, master=master, backend=backend)
        p.grad = torch.randn_like(p)
        optimizer.step()
        with torch.no_grad():
            p.mul_(torch.arange(4096) % 2)
        optimizer.step()
        assert p.isfinite().all() and optimizer.master(p).isfinite().all()
        assert p[::2].abs().max() < 2e-3


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_formats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"shape \\(2, 3\\) is {dtype}: halfstep.optim steps float32, bfloat16 and"):
        optim.AdamW([nn.Parameter(torch.ones(2, 3, dtype=dtype))])


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = optim.AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter of shape \(5, 3\)\).*SparseAdam"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (optim.AdamW, {"lr": -1.0}, "lr must be at least 0, not -1"),
        (optim.AdamW, {"lr": torch.ones(2)}, r"lr as a tensor must have one element, not \(2,\)"),
        (optim.AdamW, {"eps": -1e-8}, "eps must be at least 0"),
        (optim.AdamW, {"weight_decay": float("nan")}, "weight_decay must be at least 0, not nan"),
        (optim.AdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and less than 1, not 1"),
        (optim.Lion, {"betas": (-0.1, 0.9)}, r"betas\[0\]"),
        (optim.SGD, {"momentum": -0.5}, "momentum must be at least 0"),
        (optim.SGD, {"nesterov": True}, "Nesterov momentum needs momentum > 0 and dampening 0, not 0 and 0"),
        (optim.AdamW, {"master": "fp16"}, "master must be one of 'fp32', 'exact', '24bit', 'none', not 'fp16'"),
        (optim.AdamW, {"state": "4bit"}, "state must be one of 'fp32', 'bf16', '8bit', not '4bit'"),
        (optim.AdamW, {"rounding": "up"}, "rounding must be one of"),
        (optim.AdamW, {"rounding": "kahan"}, "goes with master='none', not 'exact'"),
        (optim.AdamW, {"rounding": "stochastic"}, "master='exact' drops no bits"),
        (optim.AdamW, {"master": "fp32", "rounding": "stochastic"}, "master='fp32' drops no bits"),
        (optim.AdamW, {"backend": "cuda"}, "backend must be one of auto, native, triton, compile, eager, not 'cuda'"),
        (optim.AdamW, {"differentiable": True}, "differentiable=True is not supported"),
        (optim.AdamW, {"foreach": True, "fused": True}, "fused and foreach cannot both be True"),
    ],
)
def test_bad_options_are_refused(make: Make, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        make([nn.Parameter(torch.ones(2))], quantize=True)


def test_a_backend_that_cannot_run_here_says_why() -> None:
    with pytest.raises(optim.BackendUnavailableError, match="backend 'triton' cannot run on cpu: "):
        optim.AdamW([nn.Parameter(torch.ones(2))], backend="triton")


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("master", "rounding"), [("exact", None), ("none", "kahan")])
def test_compiling_a_step_changes_no_bit(master: str, rounding: str | None, backend: str) -> None:
    """`torch.compile` takes away the rounding that a compensation measures, if it may."""
    torch._dynamo.reset()
    runs = [made(torch.bfloat16) for _ in range(3)]
    optimizers = [optim.AdamW(p, lr=0.01, master=master, rounding=rounding, backend=backend) for p in runs]
    compiled = torch.compile(optimizers[1].step, backend="aot_eager")

    @torch.compile(backend="aot_eager")
    def whole_step(factor: Tensor) -> Tensor:
        doubled = factor * 2
        optimizers[2].step()
        return doubled + 1

    for step in range(4):
        for parameters in runs:
            feed(parameters, step)
        optimizers[0].step()
        compiled()
        assert whole_step(torch.ones(())) == 3
    assert all_same(everything(optimizers[0]), everything(optimizers[1]))
    assert all_same(everything(optimizers[0]), everything(optimizers[2]))


def test_a_survey_of_several_sets_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with parameters on several devices: magnitudes stand in the order of the gradients, whatever was looked at."""
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 50, 7, 9)]
    gradients[1][0] = math.inf
    whole = surveying.survey_of(gradients)
    monkeypatch.setattr(surveying, "_alike", lambda _: {"first": [1, 4], "second": [0], "third": [2, 3]})
    several = surveying.survey_of(gradients)
    assert torch.equal(several.amax, whole.amax)
    assert several.found_inf.item() == whole.found_inf.item() == 1
    gradients[1][0] = 2.0
    torch.testing.assert_close(surveying.survey_of(gradients), survey_of_one(gradients), rtol=1e-15, atol=0)


def survey_of_one(gradients: list[Tensor]) -> Survey:
    doubles = torch.cat(gradients).double()
    return Survey(doubles.square().sum(), torch.zeros(()), torch.stack([g.abs().amax() for g in gradients]))


# Parameters that grow or are pruned -----------------------------------------------------------------------------------


def resized(optimizer: Any, resize: Any, entries: tuple[str, ...]) -> nn.Parameter:
    """As Gaussian splatting does it: another parameter in the group's place, with the state moved and resized."""
    group = optimizer.param_groups[0]
    old = group["params"][0]
    state = optimizer.state.pop(old)
    for name in entries:
        state[name] = resize(state[name], True)
    new = nn.Parameter(resize(old.detach(), False))
    group["params"][0] = new
    optimizer.state[new] = state
    return new


def grown(x: Tensor, zeros: bool) -> Tensor:
    return torch.cat([x, torch.zeros_like(x[:5]) if zeros else x[:5]])


def pruned(x: Tensor, zeros: bool) -> Tensor:
    return x[torch.arange(len(x)) % 3 != 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resize", [grown, pruned])
@pytest.mark.parametrize(("dtype", "master", "entry"), RESIZED)
def test_a_parameter_that_is_resized_takes_all_its_state_along_or_says_what_it_lacks(
    dtype: torch.dtype, master: Any, entry: str, resize: Any, backend: str
) -> None:
    def run(entries: tuple[str, ...]) -> tuple[Any, nn.Parameter]:
        torch.manual_seed(0)
        options: Any = {"master": master, "backend": backend}
        p = nn.Parameter(torch.randn(40, 7).to(dtype))
        optimizer = optim.AdamW([("means", p)], lr=0.01, **options)
        p.grad = torch.randn(40, 7).to(dtype)
        optimizer.step()
        p = resized(optimizer, resize, entries)
        p.grad = torch.randn(p.shape).to(dtype)
        return optimizer, p

    moments = ("exp_avg", "exp_avg_sq")
    optimizer, p = run(moments)
    before = p.detach().clone()
    if entry:
        match = rf"parameter 0 'means' of shape \({len(p)}, 7\): {entry} has shape \(40, 7\).*may also be deleted"
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert torch.equal(p, before)
        del optimizer.state[p][entry]
        assert torch.equal(optimizer.master(p), p.float())
    optimizer.step()
    assert not torch.equal(p, before)
    optimizer, p = run((*moments, entry) if entry else moments)
    expected = optimizer.master(p)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    assert torch.equal(optimizer.master(p), expected)
    optimizer, p = run(moments[:1])
    with pytest.raises(ValueError, match=r"exp_avg_sq has shape \(40, 7\)"):
        optimizer.step()


def test_parameters_that_were_replaced_are_let_go() -> None:
    p = nn.Parameter(torch.randn(40, 7))
    optimizer = optim.AdamW([p])
    gone: list[weakref.ref[Tensor]] = []
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        gone.append(weakref.ref(p))
        p = resized(optimizer, grown, ("exp_avg", "exp_avg_sq"))
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert [reference() for reference in gone] == [None] * 3


# Gradients after a scaler's step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, halfstep.GradScaler])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scalers_step_leaves_unscaled_gradients_as_torchs(
    dtype: torch.dtype, scale: float, maximize: bool, scaler_of: Make, backend: str
) -> None:
    """Whatever their order in memory; norms are logged from them, and callbacks look at them."""
    parameters, plain = made(dtype), made(dtype)
    for run in (parameters, plain):
        run.append(nn.Parameter(torch.zeros(300, 200, dtype=dtype)))  # more than is stepped at a time
    optimizers = [
        optim.AdamW(parameters, maximize=maximize, state="8bit", backend=backend),
        torch.optim.AdamW(plain, maximize=maximize, foreach=False),
    ]
    gradients = []
    for run, optimizer in zip((parameters, plain), optimizers, strict=True):
        scaler = scaler_of("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))
        feed(run, 1, scale)
        run[-1].grad = torch.randn(300, 200, generator=torch.Generator().manual_seed(3)).to(dtype) * scale
        run[5].grad = run[5].grad.contiguous()  # in another order than its parameter
        scaler.step(optimizer)
        scaler.update()
        gradients.append([p.grad for p in run])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or same_bits(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [3.0, 1024.0])
def test_unscaling_in_memory_leaves_the_bits_of_the_step(scale: float, dtype: torch.dtype, backend: str) -> None:
    results = []
    for in_memory in (False, True):
        parameters = made(dtype)
        parameters.append(nn.Parameter(torch.randn(300, 200, generator=torch.Generator().manual_seed(3)).to(dtype)))
        optimizer = optim.AdamW(parameters, state="8bit", master="24bit", rounding="stochastic", backend=backend)
        for step in range(3):
            feed(parameters, step, scale)
            parameters[-1].grad = parameters[-1].detach() * (scale / 8)
            before = [None if p.grad is None else p.grad.clone() for p in parameters]
            with optimizer.scaled(torch.tensor(1 / scale), None, in_memory=in_memory):
                optimizer.step()
            for p, old in zip(parameters, before, strict=True):
                kept = not in_memory or dtype is torch.float16
                assert old is None or p.grad is None or not p.grad.any() or torch.equal(p.grad, old) == kept
        results.append(everything(optimizer))
    assert all_same(*results)


@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, halfstep.GradScaler])
def test_fp16_gradients_stay_scaled_and_those_beside_them_do_not(scaler_of: Make) -> None:
    low, wide = nn.Parameter(torch.ones(3).half()), nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([low, wide])
    scaler = scaler_of("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    low.grad, wide.grad = torch.full((3,), 2.0).half(), torch.full((3,), 2.0)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(low.grad, torch.full((3,), 2.0).half()) and torch.equal(wide.grad, torch.full((3,), 2.0**-9))


@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradients_that_a_mixed_precision_step_leaves_are_unscaled_and_clipped(zero_grad: bool) -> None:
    model = nn.Linear(4, 4, bias=False)
    mp = halfstep.MixedPrecision(model, optim.SGD(model.parameters(), lr=0.0), "fp16-mixed")
    mp.scaler = halfstep.GradScaler("cpu", init_scale=1024.0)
    mp.backward(model.weight.sum())
    result = mp.step(max_grad_norm=2.0, zero_grad=zero_grad)
    assert result.applied and result.grad_norm == 4.0
    if zero_grad:
        assert model.weight.grad is None
    else:
        torch.testing.assert_close(model.weight.grad, torch.full((4, 4), 0.5))

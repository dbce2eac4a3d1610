"""Saving and loading optimizers: the same bits after a resume, and every storage into every other."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from typing import Any

import pytest
import torch
from storage_cases import BACKENDS, LOW, MASTERS, STATES, assert_as_torch, same_bits
from torch import Tensor, nn

from halfstep import optim
from halfstep.optim import MasterOptimizer, moments

Storage = tuple[str, str | None]


def made(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[nn.Parameter]:
    """Large enough for 8-bit states: plain, with rows that are no multiple of 64, channels-last; a small and a 0-d one,
    and one that never gets a gradient."""
    torch.manual_seed(seed)
    image = torch.randn(16, 32, 3, 3).to(memory_format=torch.channels_last)
    values = [torch.randn(64, 64), torch.randn(60, 70), image, torch.randn(5), torch.randn(()), torch.randn(3)]
    return [nn.Parameter(v.to(dtype)) for v in values]


def feed(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters[:5]:
        # Sizes that differ between elements, as true ones do.
        size = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(99)) + 0.5
        gradient = torch.randn(parameter.shape, generator=generator) * size
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def train(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        feed(parameters, step)
        optimizer.step()


def twin_of(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def tensors_of(optimizer: MasterOptimizer) -> dict[tuple[int, str], Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {(i, "parameter"): p.detach() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        tensors |= {(i, name): value for name, value in optimizer.state.get(p, {}).items()}
    return tensors


def assert_same(first: MasterOptimizer, second: MasterOptimizer) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert same_bits(ours[key], theirs[key]), key


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("master", "rounding"), MASTERS)
@pytest.mark.parametrize("dtype", LOW)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    dtype: torch.dtype, master: str, rounding: str | None, state: str, backend: str
) -> None:
    options: dict[str, Any] = {"master": master, "rounding": rounding, "state": state, "backend": backend, "seed": 3}
    parameters = made(dtype)
    optimizer = optim.AdamW(parameters, lr=0.01, **options)
    train(optimizer, parameters, range(3))
    weights, saved = [p.detach().clone() for p in parameters], through_a_file(optimizer.state_dict())
    train(optimizer, parameters, range(3, 6))

    resumed = made(dtype, seed=1)
    again = optim.AdamW(resumed, lr=0.5, **options)
    with torch.no_grad():
        for p, w in zip(resumed, weights, strict=True):
            p.copy_(w)
    again.load_state_dict(state_dict=saved)
    assert again.param_groups[0]["lr"] == 0.01
    train(again, resumed, range(3, 6))
    assert_same(optimizer, again)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "options"), [(optim.SGD, {"momentum": 0.9}), (optim.SGD, {}), (optim.Lion, {})])
def test_other_optimizers_resume_too(make: Any, options: dict[str, Any], backend: str) -> None:
    for state in STATES:
        parameters = made()
        optimizer = make(parameters, lr=0.01, state=state, master="24bit", backend=backend, **options)
        train(optimizer, parameters, range(3))
        resumed = twin_of(parameters)
        again = make(resumed, lr=0.01, state=state, master="24bit", backend=backend, **options)
        again.load_state_dict(through_a_file(optimizer.state_dict()))
        for run, p in ((optimizer, parameters), (again, resumed)):
            train(run, p, range(3, 5))
        assert_same(optimizer, again)


def test_loading_after_weights_were_loaded_or_before_is_the_same_for_remainders() -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.01)
    train(optimizer, parameters, range(3))
    saved = through_a_file(optimizer.state_dict())
    late = made(seed=1)
    again = optim.AdamW(late, lr=0.01)
    again.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(late, parameters, strict=True):
            p.copy_(w)
    assert_same(optimizer, again)


def test_a_state_from_before_the_first_step() -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.01)
    optimizer.load_state_dict(optim.AdamW(made(), lr=0.25).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    train(optimizer, parameters, range(2))
    assert all(optimizer.state[p]["step"] == 2 for p in parameters[:5])


def test_parameters_that_the_saved_state_does_not_know_start_anew() -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.01)
    train(optimizer, parameters, range(2))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    parameters[5].grad = torch.ones_like(parameters[5])
    optimizer.step()
    assert optimizer.state[parameters[5]]["step"] == 1


def test_one_state_loaded_twice_is_not_shared() -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=torch.tensor(0.01), state="8bit", master="fp32")
    train(optimizer, parameters, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    others = [optim.AdamW(twin_of(parameters), lr=0.01, state="8bit", master="fp32") for _ in range(2)]
    for other in others:
        other.load_state_dict(state)
        train(other, other.param_groups[0]["params"], range(2, 4))
        other.param_groups[0]["lr"].fill_(7)
    assert torch.equal(state["param_groups"][0]["lr"], torch.tensor(0.01))
    places = [{t.data_ptr() for t in tensors_of(o).values()} for o in (optimizer, *others)]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(places, 2))
    for index, values in before["state"].items():
        assert all(same_bits(value, state["state"][index][name]) for name, value in values.items())
    assert_same(*others)


# Between storages -----------------------------------------------------------------------------------------------------


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of 16-bit numbers at x."""
    info = torch.finfo(dtype)
    return (x.abs().log2().floor().exp2() * info.eps).clamp(min=info.smallest_normal * info.eps)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("given", "wanted"), list(itertools.permutations(MASTERS, 2)))
def test_masters_are_converted(given: Storage, wanted: Storage, dtype: torch.dtype) -> None:
    parameters = made(dtype)
    optimizer = optim.AdamW(parameters, lr=0.001, master=given[0], rounding=given[1])
    train(optimizer, parameters, range(3))
    others = twin_of(parameters)
    other = optim.AdamW(others, lr=0.001, master=wanted[0], rounding=wanted[1])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    exact = {"fp32", "exact"}
    for p, q in zip(parameters, others, strict=True):
        before, after = optimizer.master(p), other.master(q)
        error, unit = (after - before).abs(), spacing(before, dtype)
        if (wanted[0] in exact and dtype is torch.bfloat16) or given[0] == wanted[0] == "24bit":
            assert torch.equal(after, before)
        elif wanted[0] in exact:
            assert (error <= 2.0**-40).all()  # exact from 2^-16 up
        elif wanted[0] == "24bit":
            assert (error <= unit * 2.0**-7).all()
        elif wanted[1] == "kahan":
            assert (error <= unit * 2.0**-8).all() or dtype is torch.float16
            assert (error <= unit * 0.5).all()
        else:
            assert (error <= unit * 0.5).all()
        assert ((p.float() - q.float()).abs() <= unit).all()
        nearest = (p.float() == q.float()).float().mean() if p.numel() > 100 else 1
        assert nearest > 0.99  # parameters stay but on ties
    train(other, others, range(3, 5))
    assert all(q.isfinite().all() for q in others)


@pytest.mark.parametrize(("given", "wanted"), list(itertools.permutations(STATES, 2)))
def test_moments_are_converted(given: str, wanted: str) -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.001, state=given, amsgrad=True)
    train(optimizer, parameters, range(20))
    others = twin_of(parameters)
    other = optim.AdamW(others, lr=0.001, state=wanted, amsgrad=True)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    # And as FP32, to be looked at.
    looked_at = [optim.AdamW(twin_of(parameters), lr=0.001, state="fp32", amsgrad=True) for _ in range(2)]
    looked_at[0].load_state_dict(optimizer.state_dict())
    looked_at[1].load_state_dict(other.state_dict())
    for index in range(5):
        states = [o.state[o.param_groups[0]["params"][index]] for o in looked_at]
        kept = other.state[others[index]]
        fresh = other.new_state(others[index], other.param_groups[0], other.rule(other.param_groups[0]))
        assert kept["step"] == 20 and kept.keys() == fresh.keys()
        assert all(kept[name].dtype is fresh[name].dtype for name in fresh)
        for name, square in (("exp_avg", False), ("exp_avg_sq", True), ("max_exp_avg_sq", True)):
            before, after = (state[name].double() for state in states)
            bound = {"fp32": 0.0, "bf16": 0.004, "8bit": 0.02}[wanted]
            if square:
                before, after = before.sqrt(), after.sqrt()
            assert (after - before).norm() <= bound * before.norm()
    train(other, others, range(20, 22))
    assert all(q.isfinite().all() for q in others)


@pytest.mark.parametrize("state", STATES)
def test_conversion_there_and_back_keeps_fp32_states_shapes_and_layouts(state: str) -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.001, state=state)
    train(optimizer, parameters, range(3))
    flat_order = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in parameters]
    other = optim.AdamW(flat_order, lr=0.001, state=state)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    image, plain = optimizer.state[parameters[2]], other.state[flat_order[2]]
    name = moments.entry(image, "exp_avg")
    assert image[name].stride() != plain[name].stride() == flat_order[2].stride()
    looked_at = []
    for run, source in ((parameters, optimizer), (flat_order, other)):
        copy_of = optim.AdamW(twin_of(run), lr=0.001)
        copy_of.load_state_dict(source.state_dict())
        looked_at.append(copy_of.state[copy_of.param_groups[0]["params"][2]])
        assert torch.equal(source.master(run[2]), optimizer.master(parameters[2]))
    for name in ("exp_avg", "exp_avg_sq"):
        first, second = (s[name].double().abs().sqrt() for s in looked_at)
        assert (first - second).norm() <= (0.02 if state == "8bit" else 0) * first.norm()
    for run, source in ((parameters, optimizer), (flat_order, other)):
        train(source, run, range(3, 6))
    torch.testing.assert_close(
        optimizer.master(parameters[2]), other.master(flat_order[2]), rtol=0, atol=0.0 if state == "fp32" else 2e-4
    )


def test_a_16_bit_state_goes_on_with_fp32_parameters() -> None:
    """A model that was trained in bf16 with exact masters, loaded into FP32 parameters."""
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.01)
    train(optimizer, parameters, range(3))
    wide = [nn.Parameter(p.detach().float()) for p in parameters]
    other = optim.AdamW(wide, lr=0.01)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(parameters, wide, strict=True):
        assert torch.equal(q, optimizer.master(p))
        assert not (set(other.state[q]) & {"remainder", "master"} if q in other.state else set())


# torch's own ----------------------------------------------------------------------------------------------------------

PAIRS = [
    (optim.AdamW, torch.optim.AdamW, {"amsgrad": True}),
    (optim.Adam, torch.optim.Adam, {"weight_decay": 0.1}),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    (optim.SGD, torch.optim.SGD, {}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_torchs_state_is_taken_and_training_goes_on_with_its_bits(
    ours: Any, theirs: Any, options: dict[str, Any], backend: str
) -> None:
    wide = [nn.Parameter(p.detach().float()) for p in made()]
    plain = theirs(wide, lr=0.01, foreach=False, **options)
    for step in range(3):
        feed(wide, step)
        plain.step()
    narrow = twin_of(wide)
    optimizer = ours(narrow, lr=0.5, backend=backend, **options)
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01
    for step in range(3, 6):
        for run in (wide, narrow):
            feed(run, step)
        plain.step()
        optimizer.step()
    for p, q in zip(wide, narrow, strict=True):
        assert_as_torch(q.detach(), p.detach(), backend)


@pytest.mark.parametrize("master", ["fp32", "exact", "24bit", "none"])
@pytest.mark.parametrize("dtype", LOW)
def test_torchs_state_of_16_bit_parameters_is_widened(dtype: torch.dtype, master: str) -> None:
    parameters = made(dtype)
    plain = torch.optim.AdamW(parameters, lr=0.01, foreach=False)
    train(plain, parameters, range(2))
    assert plain.state[parameters[0]]["exp_avg"].dtype is dtype
    others = twin_of(parameters)
    optimizer = optim.AdamW(others, lr=0.01, master=master)
    optimizer.load_state_dict(plain.state_dict())
    for p, q in zip(parameters[:5], others, strict=False):
        kept = optimizer.state[q]["exp_avg"]
        assert kept.dtype is torch.float32 and torch.equal(kept, plain.state[p]["exp_avg"].float())
        assert torch.equal(optimizer.master(q), p.float())
    train(optimizer, others, range(2, 4))


# Refused --------------------------------------------------------------------------------------------------------------


def spoiled(state: dict[str, Any], how: str) -> dict[str, Any]:
    values = state["state"]
    if how == "a group more":
        state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    elif how == "a parameter less":
        state["param_groups"][0]["params"].pop()
    elif how == "another model's moment":
        values[4]["exp_avg"] = torch.zeros(2)
    elif how == "another model's remainder":
        values[3]["remainder"] = torch.zeros(6, dtype=torch.int16)
    elif how == "another model's scale":
        values[2]["exp_avg_sq_scale"] = values[2]["exp_avg_sq_scale"][:-1]
    elif how == "no scale":
        del values[1]["exp_avg_scale"]
    return state


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("a group more", "the state has 2 parameter groups, this optimizer 1"),
        ("a parameter less", "group 0 of the state has 5 parameters, this optimizer's 6"),
        ("another model's moment", r"exp_avg of parameter 4 has shape \(2,\), but a parameter of shape \(\) has \(\)"),
        ("another model's remainder", r"remainder of parameter 3 has shape \(6,\), but a parameter of shape \(5,\)"),
        ("another model's scale", r"exp_avg_sq_scale of parameter 2 has shape \(15, 5\), .* has \(16, 5\)"),
        ("no scale", "exp_avg of parameter 1 are 8-bit codes, but exp_avg_scale is missing"),
    ],
)
@pytest.mark.parametrize("wanted", [("exact", "8bit"), ("fp32", "fp32")])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(
    wanted: tuple[str, str], how: str, match: str
) -> None:
    parameters = made()
    optimizer = optim.AdamW(parameters, lr=0.01, state="8bit")
    train(optimizer, parameters, range(2))
    other = optim.AdamW(made(seed=1), lr=0.5, master=wanted[0], state=wanted[1])
    train(other, other.param_groups[0]["params"], range(1))
    before = {key: value.clone() for key, value in tensors_of(other).items()}
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(spoiled(through_a_file(optimizer.state_dict()), how))
    after = tensors_of(other)
    assert after.keys() == before.keys() and all(same_bits(after[key], before[key]) for key in before)
    assert other.param_groups[0]["lr"] == 0.5
    train(other, other.param_groups[0]["params"], range(1, 2))


# Weights loaded after the optimizer was built -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("master", "rounding"), MASTERS)
def test_weights_loaded_later_win_over_masters(
    master: str, rounding: str | None, dtype: torch.dtype, backend: str
) -> None:
    model, other = nn.Linear(64, 64).to(dtype), nn.Linear(64, 64).to(dtype)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, master=master, rounding=rounding, backend=backend)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    model.load_state_dict(other.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        error = (optimizer.master(p) - q.float()).abs()
        if master == "none" and rounding != "kahan":
            assert not error.any()
        else:
            # Half a spacing; a whole one for a compensation, and in fp16 where the old weight was below 2^-14.
            whole = rounding == "kahan" or dtype is torch.float16
            assert (error <= spacing(q.float(), dtype) * (1.0 if whole else 0.5)).all()
            if master == "fp32" and p.dim() > 1:  # old low bits stay where by chance the old weight is the new one
                assert (error == 0).float().mean() > 0.98
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert ((p.float() - q.float()).abs() <= spacing(q.float(), dtype)).all()


@pytest.mark.parametrize("master", ["fp32", "exact", "24bit", "none"])
def test_a_model_that_changes_its_format_goes_on_and_its_checkpoint_is_of_what_it_is(master: Any) -> None:
    """FP32, then bf16, then FP32 again: each step is taken, and no master of an earlier format comes back."""
    model = torch.nn.Linear(64, 64)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, master=master, backend="eager")

    def step(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()

    step(0)
    model.bfloat16()
    step(1)
    model.float()
    before = model.weight.detach().clone()
    again = torch.nn.Linear(64, 64)
    again.load_state_dict(model.state_dict())
    other = optim.AdamW(again.parameters(), lr=1e-2, master=master, backend="eager")
    other.load_state_dict(optimizer.state_dict())  # before a step in FP32: what the cast lost is still known
    assert ((again.weight.detach() - before).abs() <= before.abs() * 2.0**-8).all()
    dropped = pytest.warns(optim.MastersDroppedWarning, match=r"the format of parameter 0 of shape \(64, 64\), param")
    with contextlib.nullcontext() if master == "none" else dropped:
        step(2)
    step(3)
    assert not {"master", "remainder"} & optimizer.state[model.weight].keys()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.weight, model.weight)


def test_an_fp32_parameter_that_moved_on_keeps_its_value_whatever_old_master_is_saved_with_it() -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = optim.AdamW(model.parameters(), backend="eager")
    state = optimizer.state_dict()
    state["state"][0] = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.zeros(64, 64),
        "exp_avg_sq": torch.zeros(64, 64),
        "master": torch.zeros(64, 64),
    }
    before = model.weight.detach().clone()
    optimizer.load_state_dict(state)
    assert torch.equal(model.weight, before)


def test_a_state_of_another_optimizer_is_refused() -> None:
    """Zeros for what is missing, beside the count of its steps, would make the next update far too large."""
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    lion = optim.Lion([weight], backend="eager")
    weight.grad = torch.ones_like(weight)
    lion.step()
    adam = optim.AdamW([weight], backend="eager")
    with pytest.raises(ValueError, match="has no exp_avg_sq: it is of another optimizer than Adam"):
        adam.load_state_dict(lion.state_dict())
    for kind in (torch.optim.AdamW, optim.AdamW):
        with pytest.raises(KeyError, match="param_groups"):
            kind([weight]).load_state_dict({})
    with pytest.raises(KeyError, match="not the state of an optimizer: it has \\['weight'\\]"):
        adam.load_state_dict({"weight": weight})
    assert not adam.state[weight]
    with pytest.raises(ValueError, match="max_norm must be a positive number, or inf for no clipping, not -1"):
        adam.clipped_step(-1)


# Entries of somebody else ---------------------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Slow weights kept in the state of the optimizer within, as libraries of such wrappers do."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.base.state[p]
                    if "slow_buffer" not in state:
                        state["slow_buffer"] = torch.empty_like(p).copy_(p.detach())
                    state["slow_buffer"].lerp_(p.detach(), 0.5)
                    p.data.copy_(state["slow_buffer"])


@pytest.mark.parametrize(("kind", "options"), [(optim.AdamW, {}), (optim.SGD, {"momentum": 0.9}), (optim.SGD, {})])
@pytest.mark.parametrize("state", STATES)
def test_slow_weights_of_a_lookahead_survive_a_reload(kind: Any, options: dict[str, Any], state: str) -> None:
    def training(weights: list[Tensor], saved: dict[str, Any] | None, steps: range) -> tuple[list[Any], dict[str, Any]]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = kind(parameters, lr=0.01, state=state, backend="eager", **options)
        if saved is not None:
            optimizer.load_state_dict(saved)
        train(Lookahead(optimizer), parameters, steps)
        return [p.detach() for p in parameters], through_a_file(optimizer.state_dict())

    start = [p.detach() for p in made(torch.float32)]
    expected, _ = training(start, None, range(6))
    weights, saved = training(start, None, range(3))
    resumed, _ = training(weights, saved, range(3, 6))
    assert all(same_bits(a, b) for a, b in zip(expected, resumed, strict=True))


def test_entries_of_somebody_else_come_back_as_torch_keeps_them() -> None:
    weight = nn.Parameter(torch.ones(4))
    loaded: list[dict[str, Any]] = []
    for kind in (torch.optim.AdamW, optim.AdamW):
        optimizer = kind([weight])
        weight.grad = torch.ones(4)
        optimizer.step()
        optimizer.state[weight].update(slow=torch.full((2, 2), 7.0), note=3, nested={"a": [torch.ones(1)]})
        again = kind([weight])
        again.load_state_dict(optimizer.state_dict())
        loaded.append({k: v for k, v in again.state[weight].items() if k not in ("step", "exp_avg", "exp_avg_sq")})
    theirs, ours = loaded
    assert ours.keys() == theirs.keys() == {"slow", "note", "nested"}
    assert torch.equal(ours["slow"], theirs["slow"]) and ours["note"] == 3
    assert torch.equal(ours["nested"]["a"][0], theirs["nested"]["a"][0])


def test_entries_of_somebody_else_without_a_step_leave_the_first_step_a_first_one() -> None:
    def moved(extra: dict[str, Any]) -> Tensor:
        weight = nn.Parameter(torch.ones(4))
        optimizer = optim.AdamW([weight], backend="eager")
        saved = optimizer.state_dict()
        saved["state"][0] = extra
        optimizer.load_state_dict(saved)
        weight.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.state[weight].keys() >= {"step", "exp_avg", *extra}
        return weight.detach()

    assert torch.equal(moved({"slow": torch.zeros(4)}), moved({}))


def test_entries_of_somebody_else_keep_their_format_beside_16_bit_weights_and_are_exported() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    slow = torch.full((4, 4), 1 + 2.0**-20)
    optimizer.state[model.weight]["slow"] = slow
    optimizer.load_state_dict(optimizer.state_dict())
    assert same_bits(optimizer.state[model.weight]["slow"], slow)
    assert optimizer.state[model.weight]["slow"].data_ptr() != slow.data_ptr()
    assert same_bits(optim.export_fp32(model, optimizer)[1]["state"][0]["slow"], slow)


# Formats that are not read alike --------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_8_bit_codes_are_no_values_to_torch(amsgrad: bool) -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = optim.AdamW([weight], state="8bit", amsgrad=amsgrad)
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    twin = nn.Parameter(weight.detach().clone())
    before = twin.detach().clone()
    plain = torch.optim.AdamW([twin], amsgrad=amsgrad)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.grad = torch.randn(64, 64)
    with pytest.raises(KeyError, match="exp_avg"):
        plain.step()
    assert torch.equal(twin, before)


def test_8_bit_codes_are_no_momentum_to_torch() -> None:
    """Its SGD begins the momentum anew, as without a state."""
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = optim.SGD([weight], momentum=0.9, state="8bit")
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    loaded, fresh = (nn.Parameter(weight.detach().clone()) for _ in range(2))
    plain, new = torch.optim.SGD([loaded], momentum=0.9), torch.optim.SGD([fresh], momentum=0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, run in ((loaded, plain), (fresh, new)):
        p.grad = torch.ones(64, 64)
        run.step()
    assert torch.equal(loaded, fresh)


def with_old_names(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it was saved before codes and fp16 remainders had names of their own."""
    state["state"] = {
        key: {n.removesuffix("_codes").removeprefix("fp16_"): v for n, v in held.items()}
        for key, held in state["state"].items()
    }
    return state


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("master", ["exact", "24bit"])
@pytest.mark.parametrize("way", ["a file", "a whole optimizer"])
def test_states_with_the_names_of_earlier_versions_load(dtype: torch.dtype, master: str, way: str) -> None:
    options: dict[str, Any] = {"lr": 0.01, "master": master, "state": "8bit"}
    parameters = made(dtype)
    optimizer = optim.AdamW(parameters, **options)
    train(optimizer, parameters, range(3))
    resumed = twin_of(parameters)
    again = optim.AdamW(resumed, **options)
    if way == "a file":
        saved = with_old_names(through_a_file(optimizer.state_dict()))
        assert saved["state"][0].keys() == {"step", "remainder", *OLD_MOMENTS}
        again.load_state_dict(saved)
    else:
        old = with_old_names(copy.deepcopy(optimizer.state_dict()))["state"]
        again.__setstate__({"state": {p: old[i] for i, p in enumerate(resumed) if i in old}})
    assert_same(optimizer, again)
    for run, p in ((optimizer, parameters), (again, resumed)):
        train(run, p, range(3, 5))
    assert_same(optimizer, again)


OLD_MOMENTS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("master", "rounding"), [m for m in MASTERS if m[0] != "none" or m[1] == "kahan"])
@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(LOW)))
def test_what_is_kept_beside_one_16_bit_format_is_not_read_beside_another(
    first: torch.dtype, then: torch.dtype, master: str, rounding: str | None, backend: str
) -> None:
    """After ``model.half()`` or ``bfloat16()`` masters start from the weights as they are, and it is said."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(first)
    optimizer = optim.AdamW(model.named_parameters(), lr=1e-3, master=master, rounding=rounding, backend=backend)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    model.to(then)
    weights = [p.detach().float() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0].update(lr=0.0)
    if master == "fp32":  # which is compared with the parameter, and read in its own format
        optimizer.step()
    else:
        with pytest.warns(
            optim.MastersDroppedWarning, match=r"of parameter 0 'weight' of shape \(64, 64\), parameter 1"
        ):
            optimizer.step()
        assert all(torch.equal(optimizer.master(p), w) for p, w in zip(model.parameters(), weights, strict=True))
    optimizer.step()


@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(LOW)))
def test_export_and_import_around_a_change_of_format_keep_the_masters(first: torch.dtype, then: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(first)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    weights, state = optim.export_fp32(model, optimizer)
    model.to(then)
    optim.import_fp32(model, optimizer, weights, state)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    for name, p in model.named_parameters():
        error = (optimizer.master(p) - weights[name]).abs()
        assert (error <= (0.0 if then is torch.bfloat16 else 2.0**-40)).all()


@pytest.mark.parametrize("master", ["exact", "24bit", "kahan"])
@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(LOW)))
def test_a_file_of_one_16_bit_format_is_read_in_another(first: torch.dtype, then: torch.dtype, master: str) -> None:
    """Where the weights still have the values that were saved, so have the masters; elsewhere the weights win."""
    options: Any = {"master": "none", "rounding": "kahan"} if master == "kahan" else {"master": master}
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to(first)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    other = nn.Linear(64, 64).to(then)
    other.load_state_dict(model.state_dict())
    changed = [p.float() == q.float() for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    again = optim.AdamW(other.parameters(), lr=1e-3, **options)
    again.load_state_dict(saved)
    for p, q, same in zip(model.parameters(), other.parameters(), changed, strict=True):
        error = (again.master(q) - optimizer.master(p)).abs()
        kept = {"24bit": 2.0**-7, "kahan": 2.0**-8, "exact": 2.0**-16}[master]
        least = 2.0**-25 if master == "kahan" else 0.0  # a compensation in fp16 has no smaller spacing
        assert (error[same] <= (kept * spacing(q.float(), then)[same]).clamp(min=least)).all()
        assert (error[~same] <= spacing(q.float(), then)[~same]).all()

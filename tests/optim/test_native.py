"""The compiled backend against the eager one: the same bits, for every combination of formats, rules and sizes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import DTYPES, LR, RULES, STORAGES, CorrectRoots, assert_same_bits, clone, make_job, named

import halfstep
from halfstep.optim import masters
from halfstep.optim.backends import eager, native
from halfstep.optim.rules import Adam, Rule
from halfstep.optim.update import Job

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "there")


def both(ours: Job, theirs: Job, rule: Rule, **options: Any) -> None:
    native.update([ours], rule, **options)
    with CorrectRoots():
        eager.update([theirs], rule, **options)


def compare(job: Job, rule: Rule, rounding: str, what: object, steps: int = 3, scale: float | None = None) -> None:
    ours, theirs = clone(job), clone(job)
    coefficient = None if scale is None else torch.tensor(scale)
    for step in range(steps):
        both(ours, theirs, rule, stochastic=rounding == "stochastic", coefficient=coefficient, found_inf=None)
        assert_same_bits(ours, theirs, (what, step))
        fresh = torch.randn(job.gradient.shape, generator=torch.Generator().manual_seed(step))
        for each in (ours, theirs):
            each.gradient.copy_(fresh)


def is_exact(rule: Rule, state: str) -> bool:
    """What AdamW's loops for 8-bit states compute is compared with a tolerance, below."""
    return state != "8bit" or not isinstance(rule, Adam) or rule.amsgrad


def test_it_is_built_where_there_is_a_compiler() -> None:
    """Or the tests below would be skipped without anybody noticing."""
    if shutil.which("cc") or shutil.which("gcc"):
        assert native.missing() == ""


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_same_bits_as_eager(name: str, dtype: torch.dtype) -> None:
    rule = RULES[name]
    storages = STORAGES if dtype is not torch.float32 else STORAGES[-1:]
    for (master, rounding), state, gradient in itertools.product(storages, ("fp32", "bf16", "8bit"), DTYPES):
        if is_exact(rule, state):
            job = make_job(rule, dtype, gradient, master, rounding, state, shape=(300,))
            what = (name, dtype, master, rounding, state, gradient)
            compare(job, rule, rounding, what, scale=0.37 if name == "adamw" else None)


@needs_library
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 513, 1000, 4099, 40_001])
def test_every_size(n: int) -> None:
    cases: list[tuple[str, torch.dtype, Any, Any, Any]] = [
        ("adamw", torch.bfloat16, "exact", "nearest", "fp32"),
        ("adamw", torch.bfloat16, "exact", "nearest", "bf16"),
        ("adamw", torch.float16, "exact", "nearest", "fp32"),
        ("adamw", torch.float32, "none", "nearest", "fp32"),
        ("amsgrad", torch.bfloat16, "24bit", "stochastic", "8bit"),
        ("lion", torch.float16, "24bit", "stochastic", "8bit"),
    ]
    for name, dtype, master, rounding, state in cases:
        job = make_job(RULES[name], dtype, dtype, master, rounding, state, shape=(n,))
        compare(job, RULES[name], rounding, (name, dtype, n), steps=2)


@needs_library
@pytest.mark.parametrize("shape", [(70, 67), (3, 129), (5, 64), (1, 70_001), (130, 1000)])
def test_groups_of_eight_bits_do_not_cross_rows(shape: tuple[int, int]) -> None:
    for name in ("amsgrad", "sgd-momentum"):
        job = make_job(RULES[name], torch.bfloat16, torch.bfloat16, "24bit", "nearest", "8bit", shape)
        compare(job, RULES[name], "nearest", (name, shape), steps=2)


@needs_library
@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_numbers_and_values_at_the_ends(dtype: torch.dtype, state: str) -> None:
    top = torch.finfo(dtype).max
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, top, -top, 1e-6, 2.0**-24, -(2.0**-133), 1.0])
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    full = torch.tensor([-1, torch.iinfo(bits).max], dtype=bits).view(dtype)  # NaN that overflow where rounding adds
    special = torch.cat((special.to(dtype), full))
    pairs = torch.cartesian_prod(special, special)
    for (master, rounding), name in itertools.product(STORAGES, ("adamw", "amsgrad", "sgd-momentum", "lion")):
        job = make_job(RULES[name], dtype, dtype, master, rounding, state, shape=(len(pairs) + 39,))
        for tensor, values in ((job.parameter, pairs[:, 0]), (job.gradient, pairs[:, 1])):
            tensor[: len(pairs)] = values
        if master == "fp32" and job.kept is not None:
            job.kept.copy_(job.parameter)
        compare(job, RULES[name], rounding, (name, dtype, master, rounding, state))


@needs_library
@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_parameters_with_anything_beside_them(name: str, state: Any) -> None:
    """Also what no encoding leaves: the parameter was written from outside."""
    generator = torch.Generator().manual_seed(0)
    for dtype, (master, rounding) in itertools.product(DTYPES[1:], STORAGES):
        job = make_job(RULES[name], dtype, dtype, master, rounding, state, shape=(1 << 16,))
        job.parameter.view(torch.int16).copy_(torch.arange(-(1 << 15), 1 << 15))
        if job.kept is None:
            continue
        if master == "fp32":
            # Half of them round to the parameter; zeros of the other sign do as well.
            job.kept.copy_(job.parameter).view(torch.int32).add_(
                torch.randint(-(1 << 16), 1 << 16, job.kept.shape, generator=generator).int()
            )
            job.kept[job.parameter == 0] = torch.full((2,), 1e-41).copysign(-job.parameter[job.parameter == 0].float())
            job.gradient[job.parameter == 0] = 0
        else:
            bits = job.kept if job.kept.dtype in (torch.int8, torch.int16) else job.kept.view(torch.int16)
            bits.copy_(torch.randint(-(1 << 15), 1 << 15, bits.shape, generator=generator).to(bits.dtype))
            bits[job.parameter == 0] = torch.tensor([-3, 3]).to(bits.dtype)  # across zero, and not
        compare(job, RULES[name], rounding, (dtype, master, rounding), steps=1)
        job.parameter.neg_()
        compare(job, RULES[name], rounding, (dtype, master, rounding, "negative"), steps=1)


@needs_library
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_states_with_anything_in_them(state: Any) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, torch.inf, torch.nan, 1e-40, 3e38])
    for name, dtype in itertools.product(RULES, DTYPES):
        job = make_job(RULES[name], dtype, dtype, "exact", "nearest", state, shape=(len(values) ** 3,))
        for part, column in zip(job.states, torch.cartesian_prod(values, values, values).unbind(1), strict=False):
            part.copy_(column)
        job.parameter.clamp_(-1, 1)
        compare(job, RULES[name], "nearest", (name, dtype, state), steps=1)


@needs_library
@pytest.mark.parametrize("name", ["adamw", "amsgrad"])
def test_states_of_several_formats(name: str) -> None:
    """No option makes such; the kernels take each state as its row says."""
    low = make_job(RULES[name], torch.bfloat16, torch.bfloat16, state="bf16")
    job = make_job(RULES[name], torch.bfloat16, torch.bfloat16)
    for place in range(len(job.states)):
        states = (*job.states[:place], low.states[place], *job.states[place + 1 :])
        compare(job._replace(states=states), RULES[name], "nearest", (name, place))


def eight_bit_cases() -> Iterator[tuple[Any, ...]]:
    yield torch.float32, "none", "nearest"
    for dtype, (master, rounding) in itertools.product(DTYPES[1:], STORAGES[1:4] + STORAGES[-2:]):
        yield dtype, master, rounding


@needs_library
@pytest.mark.parametrize(("dtype", "master", "rounding"), list(eight_bit_cases()))
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
def test_adamw_with_eight_bits(dtype: torch.dtype, master: Any, rounding: Any, size: float) -> None:
    """A step from the same place: codes one apart at most, and in one of a thousand; scales to a millionth."""
    rule = RULES["adamw"]
    job = make_job(rule, dtype, torch.float32, master, rounding, "8bit", (80, 1000))
    job = job._replace(gradient=torch.randn(80_000).to(dtype))
    coefficient = torch.tensor(size)
    for step in range(4):
        ours, theirs = clone(job), clone(job)
        both(ours, theirs, rule, stochastic=rounding == "stochastic", coefficient=coefficient, found_inf=None)
        for index in (0, 1):
            apart = (ours.states[index].int() - theirs.states[index].int()).abs()
            assert apart.max() <= 1 and (apart > 0).sum() <= 80, (index, apart.max(), (apart > 0).sum())
            torch.testing.assert_close(ours.scales[index], theirs.scales[index], rtol=1e-6, atol=0)
        x, expected = masters.decode(ours.parameter, ours.kept), masters.decode(theirs.parameter, theirs.kept)
        off = (x - expected).abs()
        step_error = 1e-5 * LR + 2.0**-23 * expected.abs()
        assert (off > step_error).sum() <= 80
        spacing = 2.0**-7 if master == "none" else 2.0**-14
        assert (off <= step_error + spacing * expected.abs() + 1e-7).all()
        job = theirs
        job.gradient.copy_(torch.randn(80_000) * (step + 1))


@needs_library
def test_adamw_with_eight_bits_where_it_is_rare() -> None:
    """Groups with NaN, inf, zeros or the smallest numbers, beside others: what is special has the same bits."""
    rule = RULES["adamw"]
    gradient = torch.randn(4096).bfloat16()
    gradient[64] = torch.nan
    gradient[130] = torch.inf
    gradient[192:256] = 0
    gradient[256:320] = 1e-36
    gradient[320:384] = 0
    gradient[330] = 1e-39
    gradient[384:448] = 1e21
    for master, rounding in STORAGES[1:4]:
        job = make_job(rule, torch.bfloat16, torch.bfloat16, master, rounding, "8bit", (4096,))
        job.gradient.copy_(gradient)
        job.parameter[500] = torch.nan
        job.parameter[600] = torch.inf
        ours, theirs = clone(job), clone(job)
        both(ours, theirs, rule, stochastic=rounding == "stochastic", coefficient=None, found_inf=None)
        special = slice(64, 448)
        for (name, a), (_, b) in zip(named(ours), named(theirs), strict=True):
            if name == "step":
                continue
            some = slice(1, 7) if name.startswith("scale") else special
            torch.testing.assert_close(a[some], b[some], rtol=0, atol=0, equal_nan=True, msg=f"{master}: {name}")
        x, expected = masters.decode(ours.parameter, ours.kept), masters.decode(theirs.parameter, theirs.kept)
        torch.testing.assert_close(x, expected, rtol=2.0**-14, atol=1e-8, equal_nan=True)
        assert (ours.states[1].int() - theirs.states[1].int()).abs().max() <= 1


@needs_library
def test_loops_for_any_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without AVX-512 runs; one that has it would never come here."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on the path")
    sources = sorted(str(path) for path in Path(native.__file__).with_name("kernels").glob("*.c"))
    flags = ["-O2", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-DHS_PORTABLE"]
    library = tmp_path / "portable.so"
    subprocess.run([compiler, *flags, *sources, "-o", str(library), "-lm"], check=True)
    portable = native._open(library)
    monkeypatch.setattr(native, "_library", lambda: portable)
    for dtype, state in itertools.product(DTYPES, ("fp32", "bf16", "8bit")):
        if state == "8bit" and dtype is not torch.float16:  # compared in test_same_bits_on_every_cpu.py
            continue
        for master, rounding in STORAGES:
            job = make_job(RULES["adamw"], dtype, dtype, master, rounding, state, (3, 131))
            compare(job, RULES["adamw"], rounding, (dtype, state, master, rounding))


@needs_library
def test_a_skipped_step_changes_no_byte() -> None:
    for name, state in itertools.product(RULES, ("fp32", "8bit")):
        job = make_job(RULES[name], torch.bfloat16, torch.bfloat16, "24bit", "stochastic", state)  # type: ignore[arg-type]
        before = clone(job)
        options: dict[str, Any] = {"stochastic": True, "coefficient": torch.tensor(0.5)}
        native.update([job], RULES[name], found_inf=torch.tensor(1.0), **options)
        assert_same_bits(job, before, name)
        native.update([job], RULES[name], found_inf=torch.tensor(0.0), **options)
        assert job.step == 1 and not torch.equal(job.parameter, before.parameter)


@needs_library
@pytest.mark.parametrize("offset", [1, 3])
def test_tensors_that_are_not_aligned(offset: int) -> None:
    for name, state, dtype in itertools.product(("adamw", "amsgrad"), ("fp32", "bf16", "8bit"), DTYPES):
        at_offset = make_job(RULES[name], dtype, dtype, "24bit", "nearest", state, (4160,), offset=offset)  # type: ignore[arg-type]
        aligned = make_job(RULES[name], dtype, dtype, "24bit", "nearest", state, (4160,))  # type: ignore[arg-type]
        for job in (at_offset, aligned):
            native.update([job], RULES[name], stochastic=False, coefficient=None, found_inf=None)
        assert_same_bits(at_offset, aligned, (name, state, dtype))


@needs_library
def test_threads_and_neighbours_do_not_change_a_bit() -> None:
    shapes = [(3, 40_001), (0,), (64,), (100_000,), (1,), (300, 77), (2, 65_536)] * 3
    cases: list[tuple[str, Any, Any]] = [
        ("adamw", "exact", "fp32"),
        ("adamw", "24bit", "8bit"),
        ("lion", "none", "8bit"),
    ]
    for name, master, state in cases:
        rule = RULES[name]
        jobs = [
            make_job(rule, torch.bfloat16, torch.bfloat16, master, "stochastic", state, shape, seed)._replace(
                ordinal=seed
            )
            for seed, shape in enumerate(shapes)
        ]
        alone = [clone(job) for job in jobs]
        options: dict[str, Any] = {"stochastic": True, "coefficient": None, "found_inf": None}
        for job in alone:
            native.update([job], rule, **options)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 64):
                torch.set_num_threads(threads)
                together = [clone(job) for job in jobs]
                native.update(together, rule, **options)
                for one, other in zip(together, alone, strict=True):
                    assert_same_bits(one, other, (name, threads))
        finally:
            torch.set_num_threads(before)


@needs_library
def test_a_child_after_fork_steps_as_well() -> None:
    script = """
import os, torch
from halfstep.optim.backends import native
from halfstep.optim.rules import SGD
from halfstep.optim.update import Job
torch.set_num_threads(2)
p = torch.zeros(400_000)
job = Job(p, torch.ones(400_000), None, (), (), torch.zeros(()), 400_000, 0, 0)
def value_after_a_step():
    native.update([job], SGD(1.0, 0, 0, False, 0, False), stochastic=False, coefficient=None, found_inf=None)
    return p[0].item() if p[0] == p[200_000] == p[-1] else None
assert value_after_a_step() == -1
child = os.fork()
if child == 0:
    os._exit(0 if value_after_a_step() == -2 else 1)
assert os.waitpid(child, 0)[1] == 0
assert value_after_a_step() == -2
"""
    source = Path(halfstep.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120, env=environment)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-22, 1e-5, 1.0, 1e4, 1e25])
def test_survey(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (0, 1, 63, 64, 65, 1023, 1025, 200_001)
    gradients = [(torch.randn(n, generator=generator).double() * size).to(dtype) for n in lengths]
    for special in (None, torch.inf, -torch.inf, torch.nan):
        for place in (0, 1000, 200_000):
            looked_at = [g.clone() for g in gradients]
            if special is not None:
                looked_at[-1][place] = special
            ours, theirs = native.survey(looked_at), eager.survey(looked_at)
            torch.testing.assert_close(ours.amax, theirs.amax, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(ours.found_inf, theirs.found_inf)
            torch.testing.assert_close(ours.sum_of_squares, theirs.sum_of_squares, rtol=1e-6, atol=0, equal_nan=True)


@needs_library
def test_a_survey_of_equal_elements_does_not_drift() -> None:
    """The worst for sums in FP32: every rounding goes the same way."""
    for value in (0.1, 1 / 3, 1.0009765):
        gradient = torch.full((1_000_000,), value)
        ours = native.survey([gradient]).sum_of_squares.item()
        assert ours == pytest.approx(1e6 * gradient[0].double().item() ** 2, rel=1e-6)


@needs_library
def test_a_survey_of_nothing() -> None:
    survey = native.survey([])
    assert survey.sum_of_squares == 0 and survey.found_inf == 0 and survey.amax.shape == (0,)


@needs_library
def test_tensors_that_do_not_go_together_are_refused() -> None:
    rule = RULES["adamw"]
    good = make_job(rule, torch.bfloat16, torch.bfloat16)
    options: dict[str, Any] = {"stochastic": False, "coefficient": None, "found_inf": None}
    before = clone(good)
    for wrong in (
        good._replace(gradient=good.gradient[1:]),
        good._replace(gradient=torch.zeros(2000, dtype=torch.bfloat16)[::2]),
        good._replace(states=(good.states[0], good.states[1][1:])),
        good._replace(ordinal=7, kept=torch.zeros(3, dtype=torch.int16)),
    ):
        with pytest.raises(ValueError, match=f"parameter {wrong.ordinal}: all its tensors must have its 1000 elements"):
            native.update([good, wrong], rule, **options)
    with pytest.raises(ValueError, match="dtypes do not go together"):
        native.update(
            [good, good._replace(states=(good.states[0], good.states[1].int().to(torch.int8)))], rule, **options
        )
    with pytest.raises(ValueError, match=r"coefficient: one float32 .* not 1 of torch\.float64"):
        native.update([good], rule, **{**options, "coefficient": torch.tensor(1.0, dtype=torch.float64)})
    with pytest.raises(ValueError, match="shape \\(3,\\) must be float32, bfloat16 or float16"):
        native.survey([torch.zeros(3, dtype=torch.float64)])
    assert_same_bits(good, before, "a refused update changes nothing")


def wrong_entries(good: Job) -> dict[str, tuple[Job, str]]:
    """Jobs with one tensor that C would take for another, and what is said of it."""
    long, first, second = torch.zeros(1000, dtype=torch.float64), good.states[0], good.states[1]
    step, halves = torch.zeros((), dtype=torch.bfloat16), torch.zeros(16, dtype=torch.float16)
    host = "in the host's memory \\(cpu\\), not "
    floats = f"must be float32, bfloat16 or float16 {host}"
    return {
        "parameter": (good._replace(parameter=long), f"^parameter 3 {floats}torch.float64 on cpu"),
        "parameter elsewhere": (good._replace(parameter=first.to("meta")), f"^parameter 3 {floats}torch.* on meta"),
        "gradient": (good._replace(gradient=long), f"gradient of parameter 3 {floats}torch.float64 on cpu"),
        "gradient elsewhere": (good._replace(gradient=first.to("meta")), f"gradient of parameter 3 {floats}.* on meta"),
        "integer gradient": (
            good._replace(gradient=long.to(torch.int16)),
            f"gradient of .* {floats}torch.int16 on cpu",
        ),
        "kept": (good._replace(kept=long), "compensation of parameter 3 must be .* not torch.float64 on cpu"),
        "kept elsewhere": (good._replace(kept=first.to("meta")), "compensation of parameter 3 must be .* on meta"),
        "state": (good._replace(states=(first, long)), "exp_avg_sq of parameter 3 must be .* not torch.float64 on cpu"),
        "fp16 state": (good._replace(states=(first.half(), second)), "exp_avg of .* not torch.float16 on cpu"),
        "state elsewhere": (good._replace(states=(first.to("meta"), second)), "exp_avg of .* on meta"),
        "scale": (
            good._replace(scales=(halves, halves)),
            f"exp_avg_scale of .* must be float32 {host}torch.float16 on cpu",
        ),
        "scale elsewhere": (good._replace(scales=(halves.float().to("meta"),) * 2), "exp_avg_scale of .* on meta"),
        "step": (
            good._replace(step=step),
            f"step of parameter 3 must be float32 {host}torch.bfloat16 on cpu.*load_state",
        ),
        "long step": (good._replace(step=step.double()), f"step of .* must be float32 {host}torch.float64 on cpu"),
        "step elsewhere": (good._replace(step=step.float().to("meta")), "step of .* not torch.float32 on meta"),
        "empty step": (good._replace(step=torch.zeros(0)), "step of parameter 3: one number"),
    }


@needs_library
@pytest.mark.parametrize("name", wrong_entries(make_job(RULES["adamw"], torch.bfloat16, torch.bfloat16)))
def test_what_c_would_take_for_another_is_refused_by_its_name(name: str) -> None:
    good = make_job(RULES["adamw"], torch.bfloat16, torch.bfloat16)._replace(ordinal=3)
    wrong, said = wrong_entries(good)[name]
    before = clone(good)
    with pytest.raises(ValueError, match=said):
        native.update([good, wrong], RULES["adamw"], stochastic=False, coefficient=None, found_inf=None)
    assert_same_bits(good, before, "a refused update changes nothing")


@needs_library
def test_a_gradient_is_looked_at_in_every_step_and_numbers_too() -> None:
    """What is known of a job from an earlier step does not tell of these."""
    rule = RULES["adamw"]
    job = make_job(rule, torch.bfloat16, torch.bfloat16)._replace(notes={})
    options: dict[str, Any] = {"stochastic": False, "coefficient": None, "found_inf": None}
    native.update([job], rule, **options)
    for wrong in (job.gradient.double(), job.gradient.to("meta"), job.gradient.to(torch.int16)):
        with pytest.raises(ValueError, match="gradient of parameter 3 must be"):
            native.update([job._replace(gradient=wrong)], rule, **options)
        with pytest.raises(ValueError, match=r"a gradient of shape \(1000,\) must be float32, bfloat16 or float16"):
            native.survey([job.gradient, wrong])
    for number in (torch.tensor(1.0).bfloat16(), torch.tensor(1.0, device="meta"), torch.ones(2)):
        for what in ("coefficient", "found_inf"):
            with pytest.raises(ValueError, match=f"{what}: one float32 in the host's memory, not"):
                native.update([job], rule, **{**options, what: number})


@needs_library
def test_a_count_of_steps_that_somebody_exchanged_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = halfstep.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["step"] = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"step of parameter 0 must be float32 .* not torch.float64"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())  # as it says
    optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 2


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(native._loaded()._name)
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert "was built from other sources" in str(native._open(path))
    assert "does not load" in str(native._open(path.with_name("update.py")))

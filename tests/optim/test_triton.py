"""Triton kernels against the oracle in torch operations.

With ``TRITON_INTERPRET=1`` Triton runs kernels on the host's memory, but only if that is set before it is imported, and
then torch's own compiler cannot use it. So one test runs this file again in a process of its own, where ``device`` is
the CPU; here it is a CUDA device, and without one these cases are skipped.

**Tolerance.** The kernels round where they are written to, torch's operations here and there fuse a product and a sum:
an ulp of an operand a step, of 2^-24, so FP32 values agree within 2^-21 of the largest. Where a value is rounded to
fewer bits such a difference moves one in about 2^8 (of 24-bit masters and 8-bit codes) to the neighbour, and what
follows from it by as much: a few elements in a hundred may differ by up to 2^-5 of the largest.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfstep.optim import masters, moments
from halfstep.optim.arrivals import Tally
from halfstep.optim.backends import cuda, eager
from halfstep.optim.rules import SGD, Adam, Lion, Rule
from halfstep.optim.update import Job

pytest.importorskip("triton", reason="needs Triton, which is there for Linux only")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: (parameter, master, rounding)
STORAGES: list[tuple[torch.dtype, Any, Any]] = [
    (FP32, "exact", "nearest"),
    *itertools.product((BF16, FP16), ("fp32", "exact", "24bit", "none"), ("nearest", "stochastic")),
    *itertools.product((BF16, FP16), ("none",), ("kahan",)),
]
STATES: list[Any] = ["fp32", "bf16", "8bit"]
RULES: dict[str, Rule] = {
    "adamw": Adam(1e-2, 0.9, 0.999, 1e-8, 0.1, decoupled=True, amsgrad=False, maximize=False),
    "adamw-amsgrad": Adam(1e-2, 0.9, 0.95, 1e-6, 0.1, decoupled=True, amsgrad=True, maximize=True),
    "adam": Adam(1e-2, 0.9, 0.999, 1e-8, 0.1, decoupled=False, amsgrad=False, maximize=False),
    "adam-betas": Adam(1e-2, 0.0, 0.4, 1e-8, 0.0, decoupled=False, amsgrad=True, maximize=False),
    "sgd": SGD(0.1, 0.0, 0.0, nesterov=False, weight_decay=0.1, maximize=True),
    "sgd-momentum": SGD(0.1, 0.9, 0.2, nesterov=False, weight_decay=0.0, maximize=False),
    "sgd-nesterov": SGD(0.1, 0.9, 0.0, nesterov=True, weight_decay=0.1, maximize=True),
    "lion": Lion(1e-2, 0.9, 0.99, 0.1, maximize=False),
    "lion-far": Lion(1e-2, 0.4, 0.3, 0.0, maximize=True),
}
#: Of whole groups, or of rows with a part of one; of less than a group; of none.
SHAPES = [[(2, 128), (37,), (0, 4)], [(5, 70), (1,), (0, 4)]]
if INTERPRETED:  # numpy computes, and warns of what kernels do with inf and NaN
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    import triton

    if triton.__version__.startswith("3.6."):  # its interpreter takes int() of arrays of one element: no more in numpy
        from triton.runtime import interpreter

        def patch_tensor(tensor: Any, scope: Any, original: Any = interpreter._patch_lang_tensor) -> None:
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_tensor


@pytest.fixture
def device() -> str:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; these cases run interpreted in test_interpreted_on_the_host")
    return "cpu" if INTERPRETED else "cuda"


gpu = pytest.mark.skipif(False, reason="") if INTERPRETED else pytest.mark.gpu


def make_job(
    shape: tuple[int, ...], rule: Rule, storage: tuple[torch.dtype, Any, Any], state: Any, device: str, ordinal: int = 0
) -> Job:
    """A parameter before its first step; 8-bit states whatever its size, but of empty ones."""
    generator = torch.Generator().manual_seed(ordinal)
    dtype, master, rounding = storage
    numel = math.prod(shape)
    state = state if numel else "fp32"
    parameter = torch.empty(numel, dtype=dtype, device=device)
    extra = masters.extra(master, rounding, dtype)
    kept = None if extra is None else torch.zeros(numel, dtype=extra[1], device=device)
    masters.encode(torch.randn(numel, generator=generator).to(device), parameter, kept)
    dtypes = [(moments.SQUARE_DTYPES if square else moments.SIGNED_DTYPES)[state] for _, square in rule.states]
    groups = math.prod(moments.scale_shape(shape))
    return Job(
        parameter,
        gradient=parameter,
        kept=kept,
        states=tuple(torch.zeros(numel, dtype=d, device=device) for d in dtypes),
        scales=tuple(torch.zeros(groups, device=device) if state == "8bit" else None for _ in dtypes),
        step=torch.zeros((), device=device),
        row=moments.row_length(shape),
        seed=7,
        ordinal=ordinal,
    )


def make_jobs(rule: Rule, storage: tuple[torch.dtype, Any, Any], state: Any, device: str, shapes: int = 1) -> list[Job]:
    return [make_job(shape, rule, storage, state, device, index) for index, shape in enumerate(SHAPES[shapes])]


def with_gradients(jobs: Sequence[Job], dtype: torch.dtype, seed: int) -> list[Job]:
    """New gradients, in new places; some small beside their neighbours, so that codes of squares would be 0."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(job.parameter.numel(), generator=generator) * 0.1 for job in jobs]
    for gradient in gradients:
        gradient[2::4] *= 1e-4
    return [job._replace(gradient=g.to(job.parameter.device, dtype)) for job, g in zip(jobs, gradients, strict=True)]


def tensors(job: Job) -> list[Tensor]:
    """All that a step may change."""
    return [t for t in (job.parameter, job.kept, *job.states, *job.scales, job.step) if t is not None]


def copy_of(jobs: Sequence[Job]) -> list[Job]:
    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    return [
        job._replace(
            parameter=job.parameter.clone(),
            kept=copy(job.kept),
            states=tuple(s.clone() for s in job.states),
            scales=tuple(copy(s) for s in job.scales),
            step=job.step.clone(),
        )
        for job in jobs
    ]


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def values(job: Job) -> list[Tensor]:
    """The FP32 values that a job's storage stands for."""
    decoded = [moments.decode(s, scale, job.row) for s, scale in zip(job.states, job.scales, strict=True)]
    return [masters.decode(job.parameter, job.kept), *decoded] if job.parameter.numel() else []


def assert_close(ours: Sequence[Job], oracles: Sequence[Job]) -> None:
    """See the module's docstring."""
    for ordinal, (job, oracle) in enumerate(zip(ours, oracles, strict=True)):
        assert job.step.item() == oracle.step.item()
        for index, (x, y) in enumerate(zip(values(job), values(oracle), strict=True)):
            assert torch.equal(x.isfinite(), y.isfinite()) and torch.equal(x.isnan(), y.isnan())
            difference, largest = (x - y).nan_to_num(0).abs(), y.nan_to_num(0, 0, 0).abs().amax()
            place = f"job {ordinal}, value {index}: differs by up to {difference.amax()}, largest {largest}"
            assert (difference <= 2**-5 * largest).all(), place
            assert (difference > 2**-21 * largest).sum() <= 1 + 0.05 * x.numel(), place


def step_both(ours: Sequence[Job], oracles: Sequence[Job], rule: Rule, **options: Any) -> None:
    options = {"stochastic": False, "coefficient": None, "found_inf": None} | options
    cuda.update(ours, rule, **options)
    eager.update([o._replace(gradient=job.gradient) for job, o in zip(ours, oracles, strict=True)], rule, **options)


#: Every storage with every state under AdamW, every rule with every state, gradients of each dtype in turn.
CASES = [("adamw", storage, state) for storage in STORAGES for state in STATES]
CASES += [
    (rule, STORAGES[index % len(STORAGES)], state)
    for index, (rule, state) in enumerate(itertools.product([r for r in RULES if r != "adamw"], STATES))
]
if os.environ.get("HALFSTEP_ALL_CASES"):
    CASES = list(itertools.product(RULES, STORAGES, STATES))


@gpu
@pytest.mark.parametrize(
    ("case", "name", "storage", "state"),
    [(index, *case) for index, case in enumerate(CASES)],
    ids=["-".join((rule, str(s[0])[6:], *s[1:], state)) for rule, s, state in CASES],
)
def test_steps_are_those_of_the_oracle(
    case: int, name: str, storage: tuple[torch.dtype, Any, Any], state: Any, device: str
) -> None:
    rule = RULES[name]
    ours = make_jobs(rule, storage, state, device, case // 3 % 2)
    oracles = copy_of(ours)
    coefficient = torch.tensor(0.5, device=device)
    for step in range(2):
        dtype = (FP32, BF16, FP16, storage[0])[(case + case // 3) % 4]
        ours = with_gradients(ours, dtype, seed=step)
        step_both(
            ours,
            oracles,
            rule,
            stochastic=storage[2] == "stochastic",
            coefficient=coefficient if case % 2 else None,
            found_inf=torch.zeros((), device=device) if case % 3 else None,
        )
    assert_close(ours, oracles)


@gpu
@pytest.mark.parametrize("state", STATES)
def test_one_call_takes_jobs_of_all_storages(state: Any, device: str) -> None:
    rule = RULES["adamw"]
    kinds = [s for s in STORAGES if s[2] == "nearest"]
    ours = [make_job((2, 96), rule, storage, state, device, i) for i, storage in enumerate(kinds)]
    ours = [*with_gradients(ours[::2], BF16, 1), *with_gradients(ours[1::2], FP32, 2)]
    oracles = copy_of(ours)
    step_both(ours, oracles, rule)
    assert_close(ours, oracles)


@gpu
def test_more_jobs_than_a_program_prepares_each_with_its_own_step(device: str) -> None:
    rule = RULES["adamw"]
    shapes = [(0,), *[(3,)] * 2, *[(0,)] * 126, *[(3,)] * 2]  # empty ones count their steps too
    ours = [make_job(shape, rule, (BF16, "exact", "nearest"), "fp32", device, i) for i, shape in enumerate(shapes)]
    for index, job in enumerate(ours):
        job.step.fill_(index)
    ours = with_gradients(ours, BF16, 0)
    oracles = copy_of(ours)
    step_both(ours, oracles, rule)
    assert_close(ours, oracles)


@gpu
@pytest.mark.parametrize("shape", [(9000,), (3, 5000), (600, 15)], ids=str)
def test_parameters_of_several_chunks(shape: tuple[int, ...], device: str) -> None:
    rule = RULES["adamw"]
    ours = with_gradients([make_job(shape, rule, (BF16, "24bit", "stochastic"), "8bit", device)], BF16, 0)
    oracles = copy_of(ours)
    step_both(ours, oracles, rule, stochastic=True)
    assert_close(ours, oracles)


@gpu
def test_parameters_that_do_not_begin_at_a_multiple_of_16_bytes(device: str) -> None:
    rule = RULES["adamw"]
    whole = make_job((4, 64), rule, (BF16, "exact", "nearest"), "fp32", device)
    whole = with_gradients([whole], BF16, 0)[0]
    assert whole.kept is not None
    odd = [whole._replace(parameter=whole.parameter[3:], gradient=whole.gradient[1:-2], kept=whole.kept[3:],
                          states=tuple(s[3:] for s in whole.states), row=253)]  # fmt: skip
    oracles = copy_of(odd)
    step_both(odd, oracles, rule)
    assert_close(odd, oracles)


@gpu
@pytest.mark.parametrize(
    ("name", "storage"),
    [*[("adamw-amsgrad", s) for s in STORAGES], ("sgd-nesterov", STORAGES[3]), ("lion", STORAGES[4])],
    ids=str,
)
def test_a_skip_leaves_every_byte(name: str, storage: tuple[torch.dtype, Any, Any], device: str) -> None:
    rule = RULES[name]
    jobs = with_gradients([make_job((3, 70), rule, storage, "8bit", device)], storage[0], 0)
    jobs[0].gradient[5] = math.inf
    jobs[0].states[0].view(torch.uint8).random_(0, 256)  # bytes that a decode and encode would change
    before = [t.clone() for t in tensors(jobs[0])]
    for flag in (1.0, math.inf):
        found_inf = torch.tensor(flag, device=device)
        cuda.update(jobs, rule, stochastic=True, coefficient=None, found_inf=found_inf)
        assert all(map(same_bytes, tensors(jobs[0]), before))
    cuda.update(jobs, rule, stochastic=True, coefficient=None, found_inf=torch.zeros((), device=device))
    assert not all(map(same_bytes, tensors(jobs[0]), before))


@gpu
@pytest.mark.parametrize(("name", "dtype"), [*[(name, BF16) for name in RULES], ("adamw", FP16), ("sgd", FP16)])
def test_exact_masters_get_the_bits_of_fp32_parameters(dtype: torch.dtype, name: str, device: str) -> None:
    rule = RULES[name]
    exact = [make_job((3, 70), rule, (dtype, "exact", "nearest"), "bf16", device)]
    start = masters.decode(exact[0].parameter, exact[0].kept)
    plain = [exact[0]._replace(parameter=start, kept=None, states=tuple(s.clone() for s in exact[0].states),
                               step=exact[0].step.clone())]  # fmt: skip
    for step in range(4):
        exact = with_gradients(exact, FP16, step)
        plain = [plain[0]._replace(gradient=exact[0].gradient)]
        cuda.update(exact, rule, stochastic=False, coefficient=None, found_inf=None)
        cuda.update(plain, rule, stochastic=False, coefficient=None, found_inf=None)
        x, y = masters.decode(exact[0].parameter, exact[0].kept), plain[0].parameter
        same = (x == y) if dtype is BF16 else (x == y) | (y.abs() < 2**-16)  # below, fp16 is within 2^-40
        assert same.all() and torch.allclose(x, y, rtol=0, atol=2**-40)
        plain[0].parameter.copy_(x)
        assert all(map(same_bytes, exact[0].states, plain[0].states))


@gpu
def test_every_fp32_exponent_is_stored_as_the_oracle_stores_it(device: str) -> None:
    """SGD with a rate of 0 writes the master that it read: here the bits of all exponents, inf and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    high = torch.arange(512, dtype=torch.int64).repeat_interleave(6) << 23
    bits = high | torch.randint(0, 1 << 23, high.shape, generator=generator)
    low = torch.arange(512, dtype=torch.int64) << 23
    ties = [low + offset for offset in (0, 1, 0x8000, 0x18000, 0x7FFFFF, 0x1000, 0x3000)]
    bits = torch.cat([bits, *ties])
    x = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).to(torch.int32).view(FP32).to(device)
    rule = SGD(1.0, 0.0, 0.0, nesterov=False, weight_decay=0.0, maximize=False)
    for dtype, master, rounding in STORAGES:
        job = make_job((x.numel(),), rule, (dtype, master, rounding), "fp32", device)
        # The gradient takes 0 to x, and nothing else: all numbers between are x or 0.
        job.parameter.zero_()
        job = job._replace(kept=None if job.kept is None else torch.zeros_like(job.kept), gradient=-x)
        oracle = copy_of([job])[0]
        step_both([job], [oracle], rule, stochastic=rounding == "stochastic")
        for ours, theirs in zip(tensors(job), tensors(oracle), strict=True):
            nan = torch.zeros_like(ours, dtype=torch.bool)
            if ours.is_floating_point():
                nan = theirs.isnan()
                assert torch.equal(ours.isnan(), nan)
            zero = (ours == 0) & (theirs == 0)
            assert ((ours == theirs) | nan | zero).all(), (dtype, master, rounding)


@gpu
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_spoils_what_it_spoils_in_the_oracle(
    value: float, state: Any, device: str
) -> None:
    rule = RULES["adamw-amsgrad"]
    ours = with_gradients([make_job((3, 70), rule, (BF16, "exact", "nearest"), state, device)], FP32, 0)
    ours[0].gradient[71] = value
    oracles = copy_of(ours)
    step_both(ours, oracles, rule)
    assert not values(ours[0])[0].isfinite().all()
    assert_close(ours, oracles)


@gpu
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_a_learning_rate_on_the_device(name: str, device: str) -> None:
    rule = RULES[name]
    ours = with_gradients(make_jobs(rule, (FP32, "exact", "nearest"), "fp32", device), FP32, 0)
    oracles = copy_of(ours)
    lr = torch.tensor([rule.lr], device=device)
    moving = type(rule)(**{**{f: getattr(rule, f) for f in rule.__dataclass_fields__}, "lr": lr})
    for factor in (1.0, 0.5):
        lr.mul_(factor)
        step_both(ours, oracles, moving)
    assert_close(ours, oracles)


@gpu
def test_the_table_goes_to_the_device_again_only_where_something_moved(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    send = cuda._send

    def counted(host: Tensor, to: torch.device) -> Tensor:
        sent.append(host.shape)
        return send(host, to)

    monkeypatch.setattr(cuda, "_send", counted)
    rule = RULES["lion"]
    jobs = with_gradients(make_jobs(rule, (BF16, "none", "nearest"), "fp32", device), BF16, 0)
    cuda.update(jobs, rule, stochastic=False, coefficient=None, found_inf=None)
    first = len(sent)
    cuda.update(jobs, rule, stochastic=False, coefficient=None, found_inf=None)
    assert len(sent) == first
    moved = with_gradients(jobs, BF16, 1)
    cuda.update(moved, rule, stochastic=False, coefficient=None, found_inf=None)
    assert len(sent) == first + 1  # the addresses, not the chunks


@gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("spoiled", [None, math.inf, -math.inf, math.nan])
def test_survey(dtype: torch.dtype, spoiled: float | None, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(9_000 if device == "cpu" else 3_000_000), 1, 0, 64, 77]
    gradients = [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]
    gradients.append(torch.full((5,), 1e-3, dtype=FP32, device=device))
    gradients[0][3], gradients[0][-2], gradients[4][0] = -40.0, 50.0, -30.0
    if spoiled is not None:
        gradients[4][70] = spoiled
    ours, oracle = cuda.survey(gradients), eager.survey(gradients)
    assert ours.found_inf.dtype is FP32 and ours.sum_of_squares.dtype is torch.float64
    assert ours.found_inf.item() == oracle.found_inf.item() == (spoiled is not None)
    assert torch.equal(ours.amax.nan_to_num(-1), oracle.amax.nan_to_num(-1))
    torch.testing.assert_close(ours.sum_of_squares, oracle.sum_of_squares, rtol=1e-12, atol=0, equal_nan=True)
    assert same_bytes(cuda.survey(gradients).sum_of_squares, ours.sum_of_squares)


@gpu
@pytest.mark.parametrize("scale", [None, 2.0**-11, 2.0**3])
@pytest.mark.parametrize("limit", [None, 0.1, 30.0, math.inf])
def test_gradients_that_arrive_one_by_one(limit: float | None, scale: float | None, device: str) -> None:
    """The bits of torch's operations on what the same backend finds in each gradient."""
    generator = torch.Generator().manual_seed(5)
    inverse = None if scale is None else torch.tensor(scale, device=device)
    one = torch.ones((), device=device) if inverse is None else inverse
    ours, twin = Tally(torch.device(device)), Tally(torch.device(device))
    before = None
    for index, size in enumerate((9_000, 1, 0, 77, 3_000)):
        gradient = torch.randn(size, generator=generator).to(device, (FP32, BF16, FP16)[index % 3])
        if index == 3:
            gradient[70] = math.inf
            before = torch.tensor(60.0, device=device)
        if index == 4:
            gradient[7] = 6e4
            gradient = gradient.float() * 2.0**110  # overflows when divided by a scale of 1 / 8
        arrival = cuda.arrive(gradient, ours, inverse, before, limit)
        survey = cuda.survey([gradient])
        found = twin.add(survey, one)
        for name, value in arrival.survey._asdict().items():
            assert same_bytes(value, getattr(survey, name)), name
        assert arrival.found_inf.item() == found.item() == float(index == 3 or (index == 4 and scale == 8))
        assert same_bytes(ours.sum_of_squares, twin.sum_of_squares)
        assert same_bytes(ours.found_inf, twin.found_inf)
        assert (arrival.coefficient is None) == (limit is None)
        if limit is not None and arrival.coefficient is not None:
            assert same_bytes(arrival.coefficient, twin._limited(limit, one, before))


@gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_masters_follow_their_parameters(dtype: torch.dtype, device: str) -> None:
    """All 2^16 halves beside numbers at and about the middles to their neighbours; one that begins anywhere; none."""
    parameter = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    middle = ((parameter.double() + (parameter.view(torch.int16) + 1).view(dtype).double()) / 2).float()
    near = [(middle.view(torch.int32) + distance).view(FP32) for distance in (-1, 0, 1)]
    parameters = [parameter.to(device)] * 3 + [parameter[7:1000].to(device), parameter[:0].to(device)]
    masters_ = [m.to(device) for m in (*near, -parameter[7:1000].float(), torch.zeros(0))]
    expected = [torch.where(p == m.to(dtype), m, p.float()) for p, m in zip(parameters, masters_, strict=True)]
    cuda.follow(list(zip(parameters, masters_, strict=True)))
    for found, wanted in zip(masters_, expected, strict=True):
        nan = wanted.isnan()
        assert torch.equal(found.isnan(), nan)
        assert torch.equal(found[~nan].view(torch.int32), wanted[~nan].view(torch.int32))


def test_survey_of_nothing() -> None:
    survey = cuda.survey([])
    assert (survey.sum_of_squares.item(), survey.found_inf.item(), survey.amax.numel()) == (0, 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_in_a_cuda_graph_are_those_outside(device: str) -> None:
    """Captured with gradients in new places; replayed with new values, with a skip, and after the cache moved on."""
    rule = RULES["adamw"]
    ours = with_gradients(make_jobs(rule, (BF16, "exact", "nearest"), "8bit", device), BF16, 0)
    oracles = copy_of(ours)
    found_inf, coefficient = torch.zeros((), device=device), torch.ones((), device=device)
    options: dict[str, Any] = {"stochastic": False, "coefficient": coefficient, "found_inf": found_inf}
    step_both(ours, oracles, rule, **options)
    ours = with_gradients(ours, BF16, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.update(ours, rule, **options)
    for seed, flag in ((1, 0.0), (2, 1.0), (3, 0.0)):
        for job, new in zip(ours, with_gradients(ours, BF16, seed), strict=True):
            job.gradient.copy_(new.gradient)
        found_inf.fill_(flag)
        graph.replay()
        eager.update([o._replace(gradient=j.gradient) for j, o in zip(ours, oracles, strict=True)], rule, **options)
        step_both(copy_of(ours), copy_of(oracles), rule, **options)
    assert_close(ours, oracles)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device(device: str) -> None:
    lr = torch.tensor(1e-2, device=device)
    rule = Adam(lr, 0.9, 0.999, 1e-8, 0.1, decoupled=True, amsgrad=False, maximize=False)
    ours = make_jobs(rule, (BF16, "24bit", "stochastic"), "8bit", device)
    found_inf, coefficient = torch.zeros((), device=device), torch.ones((), device=device)
    batches = [with_gradients(ours, BF16, seed) for seed in range(3)]
    cuda.update(batches[0], rule, stochastic=True, coefficient=coefficient, found_inf=found_inf)  # compiles
    tally = Tally(torch.device(device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            cuda.survey([job.gradient for job in batch])
            cuda.arrive(batch[0].gradient, tally, coefficient, coefficient, 1.0)
            cuda.update(batch, rule, stochastic=True, coefficient=coefficient, found_inf=found_inf)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_interpreted_on_the_host() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) > len(CASES)

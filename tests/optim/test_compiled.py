"""The backend through torch.compile: the eager one's numbers, and a refusal where the compiler drops a rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from halfstep import optim
from halfstep.optim import backends
from halfstep.optim.backends import compiled

pytestmark = [
    pytest.mark.skipif(bool(compiled.missing("cpu")), reason=compiled.missing("cpu") or "-"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's compiler imports what torch has deprecated
]

SHAPES = [(48, 100), (5,), (64, 128), (0,)]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def parameters_of(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def keeps_roundings() -> bool:
    """Whether this PyTorch's compiler, asked to, keeps a rounding whose result goes on in FP32: not before 2.12."""
    graph = torch.compile(lambda x: x - x.bfloat16().float(), options={"emulate_precision_casts": True})
    lost: Tensor = graph(torch.linspace(1, 2, 100))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return bool((lost != 0).any())


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master": "none", "rounding": "kahan"}),
        (torch.bfloat16, {"master": "fp32", "state": "bf16"}),
        (torch.bfloat16, {"master": "24bit", "state": "8bit"}),
    ],
    ids=["exact", "kahan", "fp32-bf16", "24bit-8bit"],
)
def test_steps_are_those_of_the_eager_backend(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Compiled arithmetic may fuse a multiplication with an addition: masters agree to a few units in the last place.

    Where state has fewer bits, the code of an element in a few thousand falls on the other side, and moves its update
    by as much as a code.
    """
    compares = options.get("rounding") == "kahan" or options.get("master") == "fp32"
    if compares and not keeps_roundings():
        weight = parameters_of(dtype)[0]
        weight.grad = torch.ones_like(weight)
        with pytest.raises(compiled.LostRoundingError):
            optim.AdamW([weight], backend="compile", **options).step()
        return
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    kinds = (("compile", ours), ("eager", theirs))
    optimizers = [optim.AdamW(p, lr=1e-3, backend=name, **options) for name, p in kinds]  # type: ignore[arg-type]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    for step in range(4):
        for parameters in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            if step == 2:
                with optimizer.scaled(torch.tensor(0.5), torch.tensor(1.0)):
                    before = [optimizer.master(p) for p in optimizer.param_groups[0]["params"]]
                    optimizer.step()
                    after = [optimizer.master(p) for p in optimizer.param_groups[0]["params"]]
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            else:
                optimizer.step()
            scheduler.step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1  # for all lengths
    coarse = options.get("state") in ("bf16", "8bit")
    for p, q in zip(ours, theirs, strict=True):
        found, expected = (o.master(x) for o, x in zip(optimizers, (p, q), strict=True))
        error = (found - expected).abs()
        assert error.numel() == 0 or error.max() <= (2e-4 if coarse else 1e-6)
        assert (error > 1e-5).float().mean().nan_to_num() < 0.01


def test_a_compiler_that_drops_the_rounding_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``emulate_precision_casts`` inductor turns the compensation into zeros."""
    graph = torch.compile(compiled._update, dynamic=True)
    monkeypatch.setattr(compiled, "_graph", lambda: graph)
    monkeypatch.setattr(compiled, "_checked", set())
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optim.AdamW([weight], master="none", rounding="kahan", backend="compile")
    weight.grad = torch.ones_like(weight)
    before: Tensor = weight.detach().clone()
    with pytest.raises(compiled.LostRoundingError, match="use backend='eager', or master='exact'"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_backends_by_name_and_device() -> None:
    backend, reason = backends.choose("compile", torch.device("cpu"))
    assert (backend.name, reason) == ("compile", "asked for")
    with pytest.raises(ValueError, match="backend must be one of auto, native, triton, compile, eager, not 'fast'"):
        backends.choose("fast", torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(backends.BackendUnavailableError, match="'triton' cannot run on cpu: its kernels work in a GPU"):
        backends.choose("triton", torch.device("cpu"))
    assert backends.choose("auto", torch.device("mps"))[0].name == "compile"


def test_without_the_compiled_kernels_one_warning_and_the_eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.optim.backends import native

    backends._load.cache_clear()
    backends._notice.cache_clear()
    monkeypatch.setattr(native, "missing", lambda: "there was no C compiler when halfstep was installed")
    try:
        with pytest.warns(backends.SlowOptimizerWarning, match="many times slower.*no C compiler"):
            optimizer = optim.AdamW([torch.nn.Parameter(torch.ones(3))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()  # warns no more: a second warning would be an error here
        with pytest.raises(backends.BackendUnavailableError, match="no C compiler"):
            optim.AdamW([torch.nn.Parameter(torch.ones(3))], backend="native")
    finally:
        backends._load.cache_clear()
        backends._notice.cache_clear()

"""`GradientWatch` against the gradients themselves."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halfstep import optim
from halfstep.observe.watch import GradientReading, GradientWatch, UnreadGradients, summarise


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def slow_amax(model: nn.Module) -> dict[str, float]:
    """The oracle: every element of every gradient, one by one."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values = [abs(x) for x in parameter.grad.double().flatten().tolist()]
            found[name] = math.nan if any(map(math.isnan, values)) else max(values)
    return found


def test_it_reads_the_largest_magnitude_of_every_gradient_in_order_of_arrival() -> None:
    model = two_layers()
    watch = GradientWatch(model.named_parameters())
    model(torch.randn(3, 6)).square().sum().backward()
    reading = watch.read()
    assert reading.amax == slow_amax(model)
    assert list(reading.amax)[-1].startswith("0.")  # the layer nearest to the loss comes first
    assert next(iter(reading.amax)).startswith("2.")
    assert reading.nonfinite == ()
    assert reading.largest == max(slow_amax(model).items(), key=lambda item: item[1])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_first_bad_gradient_is_the_one_nearest_to_the_loss(bad: float) -> None:
    model = two_layers()
    watch = GradientWatch(dict(model.named_parameters()))
    hidden = model[1](model[0](torch.randn(3, 6)))
    hidden.register_hook(lambda grad: grad + bad)
    model[2](hidden).sum().backward()
    reading = watch.read()
    assert set(reading.nonfinite) == {"0.weight", "0.bias"}
    assert reading.nonfinite == tuple(name for name in reading.amax if name.startswith("0."))
    assert reading.largest is not None and reading.largest[0] == reading.nonfinite[0]
    assert {name: math.isfinite(x) for name, x in reading.amax.items()} == {
        name: math.isfinite(x) for name, x in slow_amax(model).items()
    }


def test_accumulation_is_seen_whole_and_a_taken_step_is_forgotten() -> None:
    model = two_layers()
    watch = GradientWatch(model.named_parameters())
    for factor in (3.0, -1.0):
        (model(torch.ones(2, 6)).sum() * factor).backward()
    assert watch.read().amax == slow_amax(model)
    taken = watch.take()
    assert watch.read().amax == {} and watch.read().largest is None
    assert taken.read().amax == slow_amax(model)


def test_the_order_is_that_of_the_last_arrivals() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    watch = GradientWatch({"p": p, "q": q})
    for parameter in (p, q, p):
        parameter.sum().backward()
    assert list(watch.read().amax.items()) == [("q", 1.0), ("p", 2.0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(7, dtype=dtype))
    watch = GradientWatch({"p": parameter})
    gradient = torch.randn(7, dtype=dtype) * 100
    torch.autograd.backward([parameter], [gradient])
    values = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    assert watch.read().amax == {"p": float(values.double().abs().max())}


def test_sparse_empty_and_frozen() -> None:
    sparse, empty, frozen = nn.Embedding(10, 4, sparse=True), nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2))
    frozen.requires_grad_(False)
    watch = GradientWatch({"sparse": sparse.weight, "empty": empty, "frozen": frozen})
    (sparse(torch.tensor([1, 1, 3])).sum() * 3 + empty.sum() + frozen.sum()).backward()
    assert empty.grad is not None
    assert watch.read().amax == {"sparse": 3.0}


def test_numbers_are_read_in_the_same_wait() -> None:
    parameter = nn.Parameter(torch.ones(3))
    watch = GradientWatch({"0": parameter})
    parameter.sum().backward()
    reading, numbers = watch.take().read_with([torch.tensor(-7.0), torch.tensor([math.inf], dtype=torch.float16)])
    assert (reading.amax, numbers) == ({"0": 1.0}, [7.0, math.inf])
    assert UnreadGradients({}).read_with([]) == (GradientReading({}), [])


def test_looking_away_and_removing() -> None:
    model = two_layers()
    watch = GradientWatch(model.named_parameters())
    watch.active = False
    model(torch.ones(1, 6)).sum().backward()
    assert watch.read().amax == {}
    watch.active = True
    model(torch.ones(1, 6)).sum().backward()
    assert watch.read().amax == slow_amax(model)
    watch.remove()
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    watch.take()
    model(torch.ones(1, 6)).sum().backward()
    assert watch.read().amax == {}


def test_nothing_is_kept_alive_by_it_and_it_by_nothing() -> None:
    model = two_layers()
    watch = GradientWatch(model.named_parameters())
    gone = weakref.ref(watch)
    del watch
    gc.collect()
    assert gone() is None
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    watch = GradientWatch(model.named_parameters(), when="backward")
    model(torch.ones(1, 6)).sum().backward()
    copied = copy.deepcopy(model)
    copied(torch.ones(1, 6)).sum().backward()
    held = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert held() is None
    assert len(watch.read().amax) == 4


def test_other_hooks_still_run_in_their_order_and_come_after() -> None:
    parameter = nn.Parameter(torch.ones(3))
    seen: list[str] = []
    first = parameter.register_post_accumulate_grad_hook(lambda p: seen.append("first"))

    def free(p: Tensor) -> None:
        seen.append("frees")
        p.grad = None

    parameter.register_post_accumulate_grad_hook(free)
    watch = GradientWatch({"p": parameter})
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append("last"))
    (parameter * 5).sum().backward()
    assert watch.read().amax == {"p": 5.0} and seen == ["first", "frees", "last"]
    first.remove()
    seen.clear()
    (parameter * 6).sum().backward()
    assert watch.read().amax == {"p": 6.0} and seen == ["frees", "last"]


def test_released_gradients_are_seen_before_they_are_freed() -> None:
    model, twin = two_layers(), two_layers()
    optimizer = optim.AdamW(model.parameters(), release_gradients=True)
    watch = GradientWatch(model.named_parameters())
    x = torch.randn(3, 6)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert watch.read().amax == slow_amax(twin)
    optimizer.step()


def test_a_backward_pass_that_fails_does_not_blind_the_next_one() -> None:
    model = two_layers()
    watch = GradientWatch(model.named_parameters(), when="backward")

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("on purpose")

    hidden = model[0](torch.ones(1, 6))
    hidden.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model[2](model[1](hidden)).sum().backward()
    model.zero_grad()
    model(torch.ones(1, 6)).sum().backward()
    assert watch.read().amax == slow_amax(model) != {}


def test_a_step_in_a_line() -> None:
    reading = GradientReading({"b": 2.0, "a": 8.0})
    fine = summarise(3, reading, applied=True, scale=4.0)
    assert (fine.parameter, fine.amax, fine.nonfinite) == ("a", 2.0, ())
    assert str(fine) == "step 3: largest gradient 2 in a, loss scale 4"
    bad = summarise(4, GradientReading({"b": 2.0, "a": math.inf, "c": math.nan}), applied=False, scale=None)
    assert bad.nonfinite == ("a", "c")
    assert str(bad) == "step 4: 2 gradients not finite, first in a; not applied"
    assert str(summarise(5, GradientReading({}), applied=True, scale=None)) == "step 5: no gradients"


def test_under_ddp_and_fsdp2_it_sees_what_the_optimizer_sees(tmp_path: Path) -> None:
    script = Path(__file__).with_name("watch_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "store"), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    for result in results:
        assert result["ddp"]["read"] == result["ddp"]["true"]
        assert result["ddp_bucket_view"]["read"] == result["ddp_bucket_view"]["true"]
        assert result["fsdp2"]["read"] == result["fsdp2"]["true"]
        assert result["ddp_too_early"]["read"] != result["ddp_too_early"]["true"]  # which is why `when` exists
    # A bad step of rank 1 alone: nobody takes it, and each rank saves its own part.
    assert [result["agreed"]["applied"] for result in results] == [[True, False, True]] * 2
    assert results[0]["agreed"]["weights"] == results[1]["agreed"]["weights"]
    assert [result["agreed"]["saved"] for result in results] == [["step-000002-rank0.pt"], ["step-000002-rank1.pt"]]
    assert [result["fsdp2_step"]["applied"] for result in results] == [[True, False, True]] * 2
    assert all(result["fsdp2_step"]["same_gradients"] for result in results)

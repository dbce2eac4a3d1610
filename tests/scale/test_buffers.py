"""Buffers that a forward pass wrote are put back when its step is not taken: all, and those of no other step."""

from __future__ import annotations

import copy
import gc
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.scale import BufferNotPutBackWarning, GradScaler, KeptBuffers


class Averaged(nn.Module):
    """Buffers of every kind: written in place, counted, assigned anew, made in the forward pass, by a kernel, large."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Tensor
        self.seen: Tensor
        self.cache: Tensor | None
        self.mean: Tensor
        self.var: Tensor
        self.table: Tensor
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", None)
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.register_buffer("var", torch.ones(4), persistent=False)
        self.register_buffer("table", torch.zeros(200, 200))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(x.detach().float().mean(0), 0.1)
            self.seen = self.seen + 1
            self.cache = x.detach().float().clone()
            self.table[0, :4] += x.detach().float().mean(0)
        return functional.batch_norm(x.float(), self.mean, self.var, training=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "cumulative": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1)),
    "instance norm": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.InstanceNorm1d(8, track_running_stats=True), nn.Linear(4, 1)
    ),
    "spectral": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1)),
    "old spectral": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1)),
    "own": lambda: nn.Sequential(nn.Linear(4, 4), Averaged(), nn.Linear(4, 1)),
}


def buffers_of(*models: nn.Module) -> dict[str, Tensor | None]:
    """All buffers, those that no state dict has among them, copied."""
    found: dict[str, Tensor | None] = {}
    for index, model in enumerate(models):
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                found[f"{index}.{path}.{name}"] = None if buffer is None else buffer.detach().clone()
    return found


def equal(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return one.keys() == other.keys() and all(
        a is None is b if a is None or b is None else torch.equal(a, b)
        for a, b in ((value, other[name]) for name, value in one.items())
    )


def batch(model: str, bad: bool) -> Tensor:
    x = torch.randn(8, 4)
    if bad:
        x[3, 1] = float("nan")
    return x[None] if model == "instance norm" else x


@pytest.mark.parametrize("evaluates_root", [False, True])
@pytest.mark.parametrize("how", ["fp16-mixed:emulate", "fp32 watched", "bf16-mixed watched", "scaler", "fused scaler"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_is_not_taken_leaves_every_buffer_as_it_was(name: str, how: str, evaluates_root: bool) -> None:
    """Against a twin that was never given the bad batches."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if evaluates_root:
        model.training = False  # the parts are not
    twin = copy.deepcopy(model)
    fused = {"fused": True} if how == "fused scaler" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, **fused)
    scaler, mp, watch = GradScaler("cpu"), None, None
    if "scaler" in how:
        scaler.watch(model)
    else:
        mp = halfstep.MixedPrecision(model, optimizer, how.split()[0])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        if mp is not None and "watched" in how:
            watch = mp.watch(folder)
        applied: list[bool] = []
        for step in range(7):
            before = buffers_of(model)
            bad = step in (0, 3, 4)
            for part in range(2):  # micro-batches
                torch.manual_seed(10 * step + part)
                x = batch(name, bad and part == 1)
                if mp is None:
                    scaler.scale(model(x).sum()).backward()
                else:
                    with mp.autocast():
                        loss = model(x).float().square().mean() * 1e-3
                    mp.backward(loss)
                if not bad and mp is None:
                    twin(x)
            if mp is None:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                applied.append(scaler.step_was_applied)
            else:
                applied.append(mp.step().applied)
            assert equal(before, buffers_of(model)) == bad, step
        if watch is not None:
            watch.close()
    assert applied == [False, True, True, False, False, True, True]
    if mp is None:  # in the same format
        assert equal(buffers_of(model), buffers_of(twin))
    assert all(value is None or bool(value.isfinite().all()) for value in buffers_of(model).values())


@pytest.mark.parametrize("kind", ["mp", "scaler"])
def test_what_is_loaded_in_between_stays(kind: str) -> None:
    for moment in ("before the forward pass", "after backward"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
        trained = {"1.running_mean": torch.full((16,), 5.0), "1.running_var": torch.full((16,), 9.0)}
        trained["1.num_batches_tracked"] = torch.tensor(70)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = GradScaler("cpu", 2.0**100, max_scale=2.0**120)
        if kind == "mp":
            mp = halfstep.MixedPrecision(model, optimizer, "fp16-mixed:emulate")
            scaler = mp.scaler
        else:
            scaler.watch(model)
        model(torch.randn(4, 8))  # a trial: shapes, lazy modules, a profiler
        if moment == "before the forward pass":
            model.load_state_dict(trained, strict=False)
        if kind == "mp":
            with mp.autocast():
                loss = model(torch.randn(4, 8)).float().square().mean() * 1e6
        else:
            loss = model(torch.randn(4, 8)).square().mean() * 1e38
        scaler.scale(loss).backward()
        if moment == "after backward":
            model.load_state_dict(trained, strict=False)
        if kind == "mp":
            assert not mp.step().applied
        else:
            scaler.step(optimizer)
            scaler.update()
            assert not scaler.step_was_applied
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, trained[name]), (moment, name)


def gan() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    return generator, nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


def test_each_of_two_trainers_puts_back_what_its_own_step_wrote() -> None:
    """A generator's step runs the discriminator, and the other way round."""
    generator, judge = gan()
    trainers = [
        halfstep.MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=1e-3), "fp16-mixed:emulate")
        for model in (generator, judge)
    ]
    for step in range(8):
        skips = (step in (2, 5), step in (4, 5))
        for index, mp in enumerate(trainers):
            before = buffers_of(generator, judge)
            z = torch.randn(8, 4) * (1e6 if skips[index] else 1.0)
            with mp.autocast():
                loss = judge(generator(z)).float().square().mean() * 1e-2
            mp.backward(loss)
            assert mp.step().applied is not skips[index]
            generator.zero_grad()
            judge.zero_grad()
            now = buffers_of(generator, judge)
            if skips[index]:
                assert equal(before, now), step
            else:
                assert all(not torch.equal(now[name], before[name]) for name in now), step  # type: ignore[arg-type]
    assert all(bool(buffer.isfinite().all()) for model in (generator, judge) for buffer in model.buffers())


@pytest.mark.parametrize("skips", ["neither", "judge", "generator", "both"])
def test_one_scaler_tells_the_steps_of_two_optimizers_apart(skips: str) -> None:
    """DCGAN: the generator's one forward pass serves both steps; against the same two loops in plain torch."""
    generator, judge = gan()
    scaler = GradScaler("cpu", max_skipped=0)
    scaler.watch(generator)
    scaler.watch(judge)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in (judge, generator)]
    for step in range(5):
        before = buffers_of(generator, judge)
        factors = [float("inf") if step == 3 and skips in (who, "both") else 1.0 for who in ("judge", "generator")]
        scaler.scale(judge(torch.randn(8, 8)).square().mean() * factors[0]).backward()
        fake = generator(torch.randn(8, 4))
        scaler.scale(judge(fake.detach()).square().mean() * factors[0]).backward()
        scaler.step(optimizers[0])
        judged = buffers_of(judge)
        optimizers[1].zero_grad()
        scaler.scale(judge(fake).square().mean() * factors[1]).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        after = buffers_of(generator, judge)
        if step != 3:
            continue
        generators = {name: value for name, value in after.items() if name.startswith("0.")}
        judges = {f"0{name[1:]}": value for name, value in after.items() if name.startswith("1.")}
        kept = equal(generators, {name: value for name, value in before.items() if name.startswith("0.")})
        assert kept == (skips in ("generator", "both"))
        if skips == "generator":  # what the judge's own step kept stays, what the generator's wrote goes
            assert equal(judges, judged)
        was = {f"0{name[1:]}": value for name, value in before.items() if name.startswith("1.")}
        assert equal(judges, was) == (skips in ("judge", "both"))


def test_a_graph_that_waits_goes_on_to_work_and_one_that_must_not_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    kept, optimizer = KeptBuffers(), torch.optim.SGD(model.parameters(), lr=0.1)
    kept.keep(model)
    y = model(torch.randn(8, 4))
    kept.wrote(model)
    kept.before_backward([y.sum()])
    kept.put_back(kept.claim(optimizer))
    y.square().sum().backward()  # batch statistics, and not the running ones

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(3)), nn.Buffer(torch.ones(3))

        def forward(self) -> Tensor:
            self.scale.mul_(2.0)
            return self.weight * self.scale

    counted = Counted()
    kept.keep(counted)
    y = counted()
    kept.wrote(counted)
    kept.put_back(kept.claim(torch.optim.SGD(counted.parameters(), lr=0.1)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_no_load(reentrant: bool) -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.norm, self.first(x), use_reentrant=reentrant)
            return result

    model, scaler = Recomputed(), GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.watch(model)
    before = buffers_of(model)
    for factor in (1.0, float("nan")):
        scaler.scale((model(torch.randn(8, 4)) * factor).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert equal(before, buffers_of(model))


class Large(nn.Module):
    """A table that is written from the ``since``-th forward pass on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.weight, self.table, self.calls, self.since = (
            nn.Parameter(torch.ones(4)),
            nn.Buffer(torch.zeros(300, 300)),
            0,
            since,
        )

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= self.since:
            self.table[0].add_(1.0)
        return (x * self.weight).sum()


def copied_in(act: Callable[[], Any]) -> int:
    """Elements of large tensors that are copied."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._foreach_copy_.default:
                self.count += sum(t.numel() for t in args[0] if t.numel() > 16_384)
            return func(*args, **(kwargs or {}))

    with Copies() as copies:
        act()
    return copies.count


def test_large_buffers_are_copied_only_where_they_are_written() -> None:
    def loop(since: int, bad: int) -> tuple[Large, list[int]]:
        model, scaler, copied = Large(since), GradScaler("cpu"), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler.watch(model)
        for step in range(6):

            def one(step: int = step) -> None:
                loss = model(torch.ones(4)) * (float("inf") if step == bad else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

            copied.append(copied_in(one))
        return model, copied

    table = 300 * 300
    model, copied = loop(since=100, bad=3)
    assert copied == [table, 0, 0, 0, 0, 0]
    for bad in (0, 3):  # the first step is as any other
        model, copied = loop(since=1, bad=bad)
        assert copied == [table] * 6 and model.table[0, 0] == 5
    model, copied = loop(since=3, bad=4)
    assert copied == [table, 0, 0, table, table, table] and model.table[0, 0] == 3
    with pytest.warns(BufferNotPutBackWarning, match=r"'table' of Large \(300, 300\)"):
        model, copied = loop(since=4, bad=3)


def test_a_model_without_buffers_costs_nothing_and_nothing_is_kept_alive() -> None:
    plain, kept = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), KeptBuffers()
    kept.keep(plain)
    kept.wrote(plain)
    assert not kept.are_kept()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mp = halfstep.MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16-mixed")
    with tempfile.TemporaryDirectory() as folder, mp.watch(folder) as watch:
        alive = []
        for _ in watch([None] * 6):
            with mp.autocast():
                loss = model(torch.randn(8, 4)).float().square().mean()
            mp.backward(loss)
            mp.step()
            del loss
            gc.collect()
            alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert alive[2:] == [alive[2]] * 4


def test_unusual_buffers_are_left_in_peace() -> None:
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("expanded", torch.ones(1).expand(3))
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("empty", torch.empty(0))
            self.register_buffer("shape", torch.empty(5, device="meta"))
            with torch.inference_mode():
                self.register_buffer("inferred", torch.ones(3))  # nobody may multiply a parameter by it
            self.register_buffer("same", self.expanded)

        def forward(self) -> Tensor:
            return (self.weight * self.expanded).sum() + (self.sparse @ self.weight[:, None]).sum()

    model, scaler = Unusual(), GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.watch(model)
    for factor in (1.0, float("inf"), 1.0):
        buffers = dict(model.named_buffers(remove_duplicate=False))
        scaler.scale(model() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(buffer is buffers[name] for name, buffer in model.named_buffers(remove_duplicate=False))

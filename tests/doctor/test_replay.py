"""A bad step that was saved, run again: the same bits, wherever it was watched."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.doctor.replay import replay
from halfstep.observe.bad_steps import SETTLED_SKIPS, BadStepWarning

POLICIES = ["fp32", "bf16-mixed", "fp16-mixed", "bf16-master", "fp16-master"]


class Noisy(nn.Module):
    """Random in all the ways a model can be, and with a buffer of its own that the forward pass writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 4))
        self.frozen = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + numpy.random.rand() + self.calls.item() / 100
        out: Tensor = self.body(x * (1 + noise))
        return out


def build(policy: str, seed: int = 0, **options: Any) -> tuple[Noisy, halfstep.MixedPrecision]:
    torch.manual_seed(seed)
    model = Noisy()
    model.train()
    model.frozen.eval()
    return model, halfstep.MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=1e-2, **options), policy)


def micro_step(model: nn.Module, mp: halfstep.MixedPrecision, batch: tuple[Tensor, float]) -> None:
    x, factor = batch
    with mp.autocast():
        loss = model(x).float().square().mean() * factor
    mp.backward(loss)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.detach().clone().view(torch.uint8) for n, p in model.named_parameters() if p.grad is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seed_all(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_bad_step_runs_again_bit_for_bit(policy: str, accumulate: int, clip: float | None, tmp_path: Path) -> None:
    model, mp = build(policy)
    seed_all(5)
    loader = [(torch.randn(6, 8), 1.0) for _ in range(4 * accumulate)]
    loader[3 * accumulate - 1] = (loader[0][0], math.inf)  # the last micro-batch of the third step
    before: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    with mp.watch(tmp_path / "watch") as watch, pytest.warns(BadStepWarning) as said:
        for index, batch in enumerate(watch(loader)):
            if index == 2 * accumulate:
                before = state(model)
            micro_step(model, mp, batch)
            if index == 3 * accumulate - 1:
                gradients = bits(model)
                weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            if (index + 1) % accumulate == 0:
                torch.rand(3)  # what the loop draws elsewhere must not matter
                result = mp.step(max_grad_norm=clip)
                assert result.applied == (index != 3 * accumulate - 1)
                if index == 3 * accumulate - 1:
                    assert same(weights, {name: p.detach() for name, p in model.named_parameters()})
    (path,) = watch.saved
    assert len(said) == 1 and str(path) in str(said[0].message) and "step 3 is bad" in str(said[0].message)
    assert said[0].filename == __file__

    other, other_mp = build(policy, seed=99)
    other.eval()
    seed_all(77)
    step = replay(path)
    step.restore(other_mp)
    assert same(before, state(other))
    assert other.training and not other.frozen.training
    generators = (random.getstate(), torch.get_rng_state(), numpy.random.rand())
    numpy.random.seed(77)
    for batch in step:
        micro_step(other, other_mp, batch)
    assert same(gradients, bits(other)) and gradients
    assert generators[0] == random.getstate() and torch.equal(generators[1], torch.get_rng_state())
    assert generators[2] == numpy.random.rand()
    assert not other_mp.step(max_grad_norm=clip).applied or not other_mp.scaler.is_enabled()
    assert (step.step, step.policy, step.applied, step.missing) == (3, policy, False, {})
    assert len(step.losses) == len(step.batches) == len(step) == accumulate
    assert not math.isfinite(step.losses[-1]) and step.gradients.nonfinite
    assert "step 3 is bad: the loss is" in str(step) and policy in str(step)


def test_the_optimizer_and_the_scale_are_those_of_the_step(tmp_path: Path) -> None:
    model, mp = build("fp16-mixed")
    batch = torch.randn(6, 8)
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning):
        for x, factor in watch([(batch, 1.0)] * 4 + [(batch, math.nan)] + [(batch, 1.0)] * 2):
            if factor != factor:
                optimizer = copy.deepcopy(mp.state_dict())
            micro_step(model, mp, (x, factor))
            mp.step()
    other_mp = build("fp16-mixed", seed=3)[1]
    step = replay(watch.saved[0])
    step.restore(other_mp)
    assert step.scale == other_mp.scaler.get_scale() == optimizer["scaler"]["scale"] != mp.scaler.get_scale()
    for key, value in optimizer["optimizer"]["state"].items():
        assert same(value, other_mp.state_dict()["optimizer"]["state"][key])


def test_weights_stay_clean_and_training_goes_on_after_a_step_that_is_not_taken(tmp_path: Path) -> None:
    model, mp = build("fp32")
    good = torch.randn(6, 8)
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning, match="The step is not taken"):
        for batch in watch([(good, 1.0), (good, math.nan), (good, 1.0)]):
            micro_step(model, mp, batch)
            taken = mp.step().applied
            assert all(p.grad is None for p in model.parameters())
            assert watch.last is not None and watch.last.applied == taken
            assert watch.last.nonfinite == () if taken else len(watch.last.nonfinite) == 6
    assert taken
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_scaler_that_looks_for_its_scale_is_no_bad_step(tmp_path: Path) -> None:
    model, mp = build("fp16-mixed")
    x = torch.randn(6, 8)
    applied = []
    with mp.watch(tmp_path / "watch") as watch:
        for batch in watch([(x, 100.0)] * 12):  # 65536 is too much for it
            micro_step(model, mp, batch)
            applied.append(mp.step().applied)
    assert not applied[0] and not applied[1] and applied[-1]
    assert watch.saved == [] and not (tmp_path / "watch").exists()


def test_several_skipped_steps_in_a_row_are_one_bad_step(tmp_path: Path) -> None:
    model, mp = build("fp16-mixed")
    x = torch.randn(6, 8)
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning, match="skipped step 3 in a row") as said:
        for factor in watch([1.0] + [2.0**40] * (SETTLED_SKIPS + 2) + [1.0] * 2):
            micro_step(model, mp, (x, factor))
            mp.step()
    assert len(said) == len(watch.saved) == 1
    step = replay(watch.saved[0])
    assert step.step == 1 + SETTLED_SKIPS and all(map(math.isfinite, step.losses)) and step.scale == 2.0**14


def test_a_bad_loss_with_good_gradients_is_saved_and_the_step_taken(tmp_path: Path) -> None:
    model, mp = build("fp32")
    with mp.watch(tmp_path) as watch:
        for x in watch([torch.randn(6, 8)]):
            before = state(model)
            loss = model(x).square().mean() + torch.tensor(math.inf)
            with pytest.warns(BadStepWarning, match="the step is taken"):
                mp.backward(loss)
                assert mp.step().applied
    other, other_mp = build("fp32", seed=1)
    step = replay(watch.saved[0])
    step.restore(other_mp)
    assert step.applied and same(state(other), before) and not same(state(model), before)


def test_released_gradients_have_been_stepped_already_and_it_says_so(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = halfstep.optim.AdamW(model.parameters(), release_gradients=True)
    mp = halfstep.MixedPrecision(model, optimizer, "fp32")
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning, match="has stepped the weights") as said:
        for x in watch([torch.ones(2, 4) * math.inf, torch.ones(2, 4)]):
            mp.backward(model(x).sum())
            mp.step()
    assert len(watch.saved) == 2 == len(said)  # the weights are spoilt, so the second is bad too


def test_keep_and_every_and_never_overwriting(tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    for run in range(2):
        model, mp = build("fp32")
        watch = mp.watch(tmp_path, every=2, keep=2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            applied = []
            for batch in watch([(x, math.nan)] * 7):
                micro_step(model, mp, batch)
                applied.append(mp.step(zero_grad=True).applied)
                with torch.no_grad():  # an unwatched step spoils the weights: bring them back
                    model.load_state_dict(build("fp32")[0].state_dict())
        watch.close()
        assert applied == [False, True, False, True, False, True, False]
        assert len(said) == 2 and "Further bad steps are not saved" in str(said[1].message)
        suffix = "" if run == 0 else "-2"
        assert [path.name for path in watch.saved] == [f"step-000001{suffix}.pt", f"step-000003{suffix}.pt"]
    assert len(list(tmp_path.iterdir())) == 4
    assert all(replay(path).losses for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_ends_the_watch_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "watch").write_text("a file where the folder should be")
    model, mp = build("fp32")
    with mp.watch(tmp_path / "watch") as watch, pytest.warns(BadStepWarning, match="could not be saved") as said:
        for batch in watch([(torch.ones(6, 8), math.nan)] * 3):
            micro_step(model, mp, batch)
            assert not mp.step().applied  # bad steps are still not taken
    assert len(said) == 1 and watch.saved == []


def test_a_disk_that_is_full_leaves_no_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model, mp = build("fp32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        mp.watch(tmp_path / "watch") as watch,
        pytest.warns(BadStepWarning, match="could not be saved: .*ulimit") as said,
    ):
        for batch in watch([(torch.ones(6, 8), math.nan)] * 2):
            micro_step(model, mp, batch)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            try:
                mp.step()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1 and list((tmp_path / "watch").iterdir()) == []


@dataclass
class Example:
    pixels: Tensor
    name: str


class Encoding(UserDict):  # type: ignore[type-arg]  # as transformers' BatchEncoding
    """A mapping that is no dict."""

    def to(self, device: str) -> Encoding:
        return Encoding({name: value.to(device) for name, value in self.items()})


def test_batches_of_any_kind(tmp_path: Path) -> None:
    def batch() -> dict[str, Any]:
        return {
            "example": Example(torch.ones(2, 8), "first"),
            "encoding": Encoding({"ids": torch.arange(3)}),
            "rest": [(1, "text", None), numpy.arange(3, dtype=numpy.uint8), lambda: 1],
        }

    model, mp = build("fp32")
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning, match="without 1 things"):
        for each in watch([batch()]):
            example = each.pop("example")  # loops do such things
            micro_step(model, mp, (example.pixels, math.nan))
            mp.step()
    (given,) = replay(watch.saved[0], types=[Example, Encoding]).batches
    assert isinstance(given["example"], Example) and torch.equal(given["example"].pixels, torch.ones(2, 8))
    assert isinstance(given["encoding"], Encoding) and given["encoding"].to("cpu")["ids"].tolist() == [0, 1, 2]
    assert given["rest"][0] == (1, "text", None) and given["rest"][1].dtype == numpy.uint8 and given["rest"][2] is None
    step = replay(watch.saved[0])
    (plain,) = step.batches
    assert plain["example"].name == "first" and plain["encoding"].to("cpu").ids.tolist() == [0, 1, 2]
    assert list(step.missing) == ["batches[0]['rest'][2]"] and "function" in str(step)
    plain["example"].pixels.zero_()
    assert step.batches[0]["example"].pixels.sum() == 16  # made anew


def test_a_batch_changed_in_place_is_told(tmp_path: Path) -> None:
    model, mp = build("fp32")
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning, match="without 1 things"):
        for x in watch([torch.ones(2, 8)]):
            x.mul_(math.nan)
            micro_step(model, mp, (x, 1.0))
            mp.step()
    assert "in place" in replay(watch.saved[0]).missing["batches[0]"]


def test_a_batch_that_breaks_when_looked_at_ends_the_watch_only(tmp_path: Path) -> None:
    class Broken(UserDict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise RuntimeError("no")

    _, mp = build("fp32")
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning, match="cannot be remembered") as said:
        assert len(list(watch([Broken(), Broken()]))) == 2
    assert len(said) == 1


def test_the_loader_stays_what_it_is(tmp_path: Path) -> None:
    _, mp = build("fp32")
    loader = torch.utils.data.DataLoader(range(10), batch_size=2)  # type: ignore[arg-type]
    watch = mp.watch(tmp_path)
    watched = watch(loader)
    assert len(watched) == 5 and watched.batch_size == 2
    assert [batch.tolist() for batch in watched] == [batch.tolist() for batch in loader]
    watch.close()
    with pytest.raises(TypeError):
        len(watch(iter([])))


def test_a_closed_watch_does_nothing_and_a_new_one_replaces_an_old_one(tmp_path: Path) -> None:
    model, mp = build("fp32")
    old = mp.watch(tmp_path / "old")
    new = mp.watch(tmp_path / "new")
    with pytest.warns(BadStepWarning) as said:
        for batch in old(new([(torch.ones(2, 8), math.nan)])):
            micro_step(model, mp, batch)
            assert not mp.step().applied
    assert len(said) == 1 and old.saved == [] and len(new.saved) == 1
    new.close()
    micro_step(model, mp, (torch.ones(2, 8), math.nan))
    assert mp.step().applied  # as without a watch
    del old, new
    assert mp._watched_by() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_watched_run_has_the_same_numbers_as_one_that_is_not(policy: str, tmp_path: Path) -> None:
    def run(watched: bool) -> dict[str, Tensor]:
        model, mp = build(policy)
        seed_all(1)
        loader = [(torch.randn(6, 8), 1.0) for _ in range(4)]
        watch: Callable[[Any], Any] = mp.watch(tmp_path) if watched else list
        for batch in watch(loader):
            micro_step(model, mp, batch)
            mp.step(max_grad_norm=1.0)
        return state(model)

    assert same(run(False), run(True))


def test_errors_say_what_does_not_fit(tmp_path: Path) -> None:
    model, mp = build("fp32")
    with mp.watch(tmp_path) as watch, pytest.warns(BadStepWarning):
        for batch in watch([(torch.ones(2, 8), math.nan)]):
            micro_step(model, mp, batch)
            mp.step()
    step = replay(watch.saved[0])
    with pytest.raises(ValueError, match="policy 'fp32', and this MixedPrecision's is 'bf16-mixed'"):
        step.restore(build("bf16-mixed")[1])
    before = state(other := nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"parameter 'body\.0\.weight' that the model lacks"):
        step.load_model(other)
    assert same(before, state(other))
    wrong = Noisy()
    wrong.body[0] = nn.Linear(8, 17)
    with pytest.raises(ValueError, match=r"shape \(16, 8\).*\(17, 8\)"):
        step.load_model(wrong)
    step.load_model(nn.parallel.DataParallel(model).module)
    halfstep.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no bad step"):
        replay(tmp_path / "other.pt")
    content = halfstep.load(watch.saved[0])
    halfstep.save({**content, "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="format 99"):
        replay(tmp_path / "newer.pt")
    with pytest.raises(halfstep.CheckpointError):
        replay(tmp_path / "nothing.pt")


@pytest.mark.parametrize(("every", "keep"), [(0, 1), (1, -1)])
def test_options_are_checked(every: int, keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has to be"):
        build("fp32")[1].watch(tmp_path, every=every, keep=keep)

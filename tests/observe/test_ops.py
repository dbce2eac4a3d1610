"""The recorded numbers of every op, against Python floats taken apart one by one; and profiles that add up."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from waits import Waits

from halfstep.observe import histogram, ops
from halfstep.observe.attribution import Attribution
from halfstep.observe.histogram import ExponentHistogram
from halfstep.observe.ops import OpObserver
from halfstep.observe.place import Place
from halfstep.observe.profile import OpRecord, Profile, larger, merge
from halfstep.policy import parse


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 10)
        self.out = nn.Linear(10, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        h = functional.gelu(self.wide(self.norm(self.embedding(tokens))))
        return self.out(h)  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: Any = None, micro: int = 1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(micro):
        tokens = torch.randint(11, (4, 5), generator=generator)
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


class Oracle(TorchDispatchMode):
    """Counts the binary exponents of all results with `math.frexp`, by op; slow and obvious."""

    def __init__(self) -> None:
        super().__init__()
        self.exponents: dict[str, Counter[int | str]] = {}
        self.amax: dict[str, float] = {}
        self.inputs: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        largest = max((float(x.detach().abs().max()) for x in inputs), default=None)
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if torch._C._current_autograd_node() is None and largest is not None:
            self.inputs[name] = max(self.inputs.get(name, 0.0), largest)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
        for x in results[:1] if name == "native_layer_norm" else results:
            found = self.exponents.setdefault(name, Counter())
            for value in x.flatten().tolist():
                found[math.frexp(value)[1] - 1 if value and math.isfinite(value) else str(value)] += 1
                self.amax[name] = larger(self.amax.get(name), abs(value)) or 0.0
        return result


VIEWS = {"t", "view", "detach", "expand", "unsqueeze", "squeeze", "alias", "slice", "_unsafe_view", "transpose"}
FILLED = {"ones_like", "zeros_like", "empty", "new_empty", "zeros", "new_zeros"}


def by_op(profile: Profile) -> dict[str, OpRecord]:
    """All records of an op as one, with a place of the name alone."""
    found: dict[str, OpRecord] = {}
    for record in profile.records.values():
        place = Place(record.place.op)
        plain = OpRecord(place, record.dtype, *[getattr(record, name) for name in list(vars(record))[2:]])
        found[record.place.op] = found[record.place.op] + plain if record.place.op in found else plain
    return found


def test_every_result_is_counted_as_python_counts() -> None:
    torch.manual_seed(0)
    model = Model()
    with Oracle() as oracle:
        train(copy.deepcopy(model))
    with OpObserver("profile") as observer:
        train(copy.deepcopy(model))
    assert observer.failures == []
    seen = by_op(observer.profile)
    assert set(oracle.exponents) - set(seen) <= VIEWS | FILLED
    assert set(seen) >= {
        "addmm",
        "mm",
        "native_layer_norm",
        "gelu",
        "gelu_backward",
        "_log_softmax",
        "embedding",
        "sum",
    }
    for name, record in seen.items():
        expected = oracle.exponents[name]
        counts = {e - 127: n for e, n in enumerate(record.histogram.counts.tolist()) if n}
        assert counts == {e: n for e, n in expected.items() if isinstance(e, int)}, name
        assert record.histogram.zeros == expected["0.0"] + expected["-0.0"], name
        assert record.elements == record.histogram.total == sum(expected.values()), name
        assert record.amax == oracle.amax[name], name
        assert record.operand_amax == oracle.inputs.get(name), name
        assert not record.lowered


def test_growth_is_the_largest_ratio_of_one_call() -> None:
    def run() -> None:
        for value in (1.0, 100.0):
            torch.mul(torch.tensor([value]).clone(), 3.0 if value == 1 else 0.5)

    with OpObserver("profile") as observer:
        run()
    (record,) = [r for r in observer.profile.records.values() if r.place.op == "mul"]
    assert (record.calls, record.amax, record.operand_amax, record.growth) == (2, 50.0, 100.0, 3.0)


def test_inputs_are_as_large_as_they_were_when_read() -> None:
    x = torch.ones(3)
    with OpObserver("profile") as observer:
        torch.add(x, 1.0)
        x.mul_(100.0)
        torch.sub(x, 1.0)
    operands = {r.place.op: r.operand_amax for r in observer.profile.records.values()}
    assert operands == {"add": 1.0, "mul_": 1.0, "sub": 100.0}


def test_training_under_observation_is_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    plain = Model()
    seen = copy.deepcopy(plain)
    for model in (plain, seen):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        observer = OpObserver("profile", parse("fp16-mixed:rules=cuda"))
        for step in range(3):
            if model is seen:
                with observer:
                    train(model, optimizer, seed=step)
            else:
                train(model, optimizer, seed=step)
    assert observer.failures == []
    for a, b in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(a, b)


def test_largest_values_are_the_same_however_often_they_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Model()
    profiles = []
    for unread in (2048, 1, 7):
        monkeypatch.setattr(ops, "_UNREAD", unread)
        with OpObserver("profile") as observer:
            train(copy.deepcopy(model))
        assert observer._unread_count < unread
        profiles.append(observer.profile)
    assert profiles[0] == profiles[1] == profiles[2]
    assert profiles[0] == observer.profile  # asking twice changes nothing


def test_scan_has_exact_largest_values_and_a_sampled_histogram() -> None:
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    x[12_345] = 1e9
    with OpObserver("scan") as observer:
        torch.mul(x, 2.0)
    (record,) = observer.profile.records.values()
    assert record.amax == float(torch.tensor(1e9) * 2)
    assert record.operand_amax == 1e9
    assert record.elements == 300_000
    assert 10_000 < record.histogram.total <= 16_384
    exact = ExponentHistogram.of(x * 2)
    assert record.histogram.share_below(0) == pytest.approx(exact.share_below(0), abs=0.02)


@pytest.mark.parametrize("foreach", [True, False])
def test_optimizer_results_are_recorded_where_ops_return_nothing_too(foreach: bool) -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=foreach)
    with OpObserver("profile") as observer:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    records = [r for r in observer.profile.records.values() if r.place.phase == "optimizer" and r.calls]
    updates = [r for r in records if "add_" in r.place.op]
    assert sum(r.elements for r in updates) == 9
    assert max(r.amax for r in updates) == 0.75
    assert sum(int(r.histogram.counts[126]) for r in updates) == 9  # 0.5 and 0.75
    if not foreach:
        assert {r.place.parameter for r in updates} == {"weight", "bias"}
    with OpObserver("scan") as scan:
        optimizer.step()
    assert {r.histogram.total for r in scan.profile.records.values()} == {0}
    assert max(r.amax for r in scan.profile.records.values() if "add_" in r.place.op) == 1.75
    assert all(r.place.phase != "optimizer" for layer in observer.profile.layers().values() for r in layer)


def test_what_is_recorded_and_what_is_not() -> None:
    with OpObserver("profile") as observer:
        x = torch.empty(8).uniform_()
        x.view(2, 4).t()
        torch.ones(2, 3, 4) @ torch.ones(4, 2)
        torch.zeros(3), torch.full((2,), 7.0), torch.arange(3), torch.ones(2, dtype=torch.int64) * 2
        torch.ones(2).masked_fill(torch.tensor([True, False]), -math.inf)
        torch.full((2,), math.inf).sub(math.inf)
        torch.ones(2, dtype=torch.complex64).mul(3j)
        torch.ones(2).to(torch.float8_e4m3fn)
        torch.ones(2, dtype=torch.float64).mul(1e200)
        torch.ones(0).mul(2)
        torch.eye(2).to_sparse()
    assert observer.failures == []
    seen = {(r.place.op, r.dtype): r for r in observer.profile.records.values()}
    assert {op for op, _ in seen} & {"empty", "view", "_unsafe_view", "t", "zeros", "full", "ones"} == set()
    masked = seen["masked_fill", "torch.float32"]
    assert (masked.amax, masked.histogram.infinities) == (math.inf, 1)
    assert math.isnan(seen["sub", "torch.float32"].amax)
    assert seen["sub", "torch.float32"].histogram.nans == 2
    assert seen["mul", "torch.complex64"].amax == 3.0
    assert seen["mul", "torch.float64"].amax == 1e200
    assert seen["_to_copy", "torch.float8_e4m3fn"].amax == 1.0
    assert not any(dtype == "torch.int64" for _, dtype in seen)
    assert (seen["mul", "torch.float32"].elements, seen["mul", "torch.float32"].amax) == (0, 0.0)


def test_parameter_gradients_are_those_the_optimizer_gets() -> None:
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    expected: dict[str, ExponentHistogram] = {}
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(2):
        train(twin, micro=2, seed=step)
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            expected[name] = expected.get(name, ExponentHistogram()) + ExponentHistogram.of(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with OpObserver("profile") as observer:
        for step in range(2):
            train(model, optimizer, micro=2, seed=step)
    assert observer.profile.gradients == expected
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())  # type: ignore[attr-defined]


def test_the_policy_says_which_results_would_be_low() -> None:
    model = Model()
    with OpObserver("profile", parse("fp16-mixed:rules=cuda")) as observer:
        train(model)
    assert observer.failures == []
    low = {(r.place.op, r.place.phase): r.lowered for r in observer.profile.records.values()}
    assert low["addmm", "forward"]
    assert low["mm", "backward"]
    assert low["gelu", "forward"]
    assert not low["native_layer_norm", "forward"]
    assert not low["embedding", "forward"]


def test_an_exception_inside_is_remembered_once_and_the_run_goes_on() -> None:
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    train(twin)
    observer = OpObserver("profile")
    observer._tallies = None  # type: ignore[assignment]
    with observer:
        train(model)
    assert observer.failures
    assert len(observer.failures) == len(set(observer.failures)) <= 16
    assert "embedding: AttributeError" in observer.failures[0]
    assert torch.equal(model.out.weight.grad, twin.out.weight.grad)  # type: ignore[arg-type]


def test_levels_are_checked() -> None:
    with pytest.raises(ValueError, match="not 'shadow'"):
        OpObserver("shadow")  # type: ignore[arg-type]


# ------------------------------------------------------------------ profiles

amaxes = st.floats(min_value=0, width=32) | st.sampled_from([0.0, math.inf, math.nan])
places = st.builds(
    Place,
    op=st.sampled_from(["mm", "add"]),
    phase=st.sampled_from(["forward", "backward"]),
    module=st.sampled_from(["", "a.b"]),
    file=st.sampled_from([None, "t.py"]),
    line=st.sampled_from([None, 3]),
    parameter=st.sampled_from([None, "a.b.weight"]),
)


@st.composite
def histograms(draw: st.DrawFn) -> ExponentHistogram:
    values = draw(st.lists(st.floats(width=32, allow_subnormal=False), max_size=5))
    return ExponentHistogram.of(torch.tensor(values, dtype=torch.float32))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    records = {}
    for place in draw(st.lists(places, max_size=4)):
        dtype = draw(st.sampled_from(["torch.float32", "torch.bfloat16"]))
        numbers = [draw(st.integers(0, 2**60)) for _ in range(2)]
        largest = [draw(st.none() | amaxes) for _ in range(2)]
        histogram = draw(histograms())
        records[place, dtype] = OpRecord(place, dtype, *numbers, draw(amaxes), draw(st.booleans()), histogram, *largest)
    return Profile(records, draw(st.dictionaries(st.sampled_from(["w", "b"]), histograms())))


def plain(profile: Profile) -> tuple[set[str], set[str]]:
    """For comparison: NaN is equal to NaN, and order does not count."""
    gradients = {f"{name} {found.to_json()}" for name, found in profile.gradients.items()}
    return {f"{key} {vars(r) | {'histogram': r.histogram.to_json()}}" for key, r in profile.records.items()}, gradients


@settings(max_examples=60, deadline=None)
@given(profiles(), profiles(), profiles())
def test_profiles_add_up_in_any_order(a: Profile, b: Profile, c: Profile) -> None:
    assert plain(a.merge(b)) == plain(b.merge(a))
    assert plain(a.merge(b).merge(c)) == plain(a.merge(b.merge(c))) == plain(merge([c, a, b]))
    assert plain(a.merge(Profile())) == plain(a)
    for key, record in a.merge(b).records.items():
        parts = [p.records[key] for p in (a, b) if key in p.records]
        assert record.calls == sum(part.calls for part in parts)
        assert record.histogram == ExponentHistogram.merge(part.histogram for part in parts)


@settings(max_examples=60, deadline=None)
@given(profiles())
def test_json_gives_back_the_same_profile(profile: Profile) -> None:
    text = json.dumps(profile.to_json(), allow_nan=False)
    back = Profile.from_json(json.loads(text))
    assert plain(back) == plain(profile)
    assert list(back.records) == list(profile.records)


@pytest.mark.parametrize("values", [{}, {"names": [], "records": [[1]], "gradients": {}}, {"names": 3}, []])
def test_other_json_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="not a profile"):
        Profile.from_json(values)


def test_records_of_different_places_do_not_add_up() -> None:
    a, b = (OpRecord(Place(op), "torch.float32", 1, 1, 1.0, False, ExponentHistogram()) for op in ("mm", "add"))
    with pytest.raises(ValueError, match="do not add up"):
        a + b


def test_the_profile_of_twelve_layers_is_a_small_file() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Embedding(64, 16), nn.TransformerEncoder(layer, 12), nn.Linear(16, 64))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with OpObserver("profile", parse("fp16-mixed")) as observer:
        tokens = torch.randint(64, (2, 32))
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    profile = observer.profile
    assert len(profile.gradients) == len(list(model.parameters()))
    assert len(profile.layers()) > 12 * 5
    assert len(json.dumps(profile.to_json())) < 1_000_000


class Recomputes(nn.Module):
    """A method is checkpointed, behind ops that CUDA computes in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.behind = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def inner(self, x: Tensor) -> Tensor:
        return functional.gelu(self.inside(x)) * 2.0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.softmax(x, -1)
        return self.behind(checkpoint(self.inner, self.before(x), use_reentrant=True))  # type: ignore[no-any-return]


def test_a_device_thread_counts_its_nodes_and_gradients_keep_their_format() -> None:
    """On an accelerator backward has a thread of its own, on which recomputed nodes have the numbers of forward's."""

    def lowered(threads: bool) -> dict[Place, bool]:
        model, results = Recomputes(), []
        with Attribution() as attribution:
            observer = OpObserver("profile", parse("fp16-mixed:rules=cuda"), attribution)

            def run(work: Callable[[], Any]) -> Any:
                def observed() -> None:
                    with observer:
                        results.append(work())

                thread = threading.Thread(target=observed) if threads else None
                if thread is None:
                    observed()
                else:
                    thread.start()
                    thread.join()
                return results[-1]

            out = run(lambda: model(torch.randn(4, 6, requires_grad=True)))
            seed = torch.ones_like(out)
            run(lambda: torch.autograd.backward([out], [seed]))
        assert observer.failures == []
        return {record.place: record.lowered for record in observer.profile.records.values()}

    found = lowered(threads=True)
    assert found == lowered(threads=False)
    assert {low for place, low in found.items() if place.op == "gelu_backward"} == {True}
    assert {low for place, low in found.items() if place.op == "_softmax_backward_data"} == {False}


def test_no_op_of_a_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and largest magnitudes stay where they are until the profile is asked for, and are then what they were."""
    profiles = []
    for counted in (histogram._counted, histogram._counted_on_device):
        monkeypatch.setattr(histogram, "_counted", counted)
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        with Waits() as alone:
            train(copy.deepcopy(model))
        with Waits() as waits, OpObserver("profile", parse("bf16-mixed")) as observer:
            train(model, optimizer)
            train(model, optimizer, micro=2)
        if counted is histogram._counted_on_device:
            assert waits.seen == alone.seen == []
        profiles.append(observer.profile.to_json())
    assert profiles[0] == profiles[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_profile_of_a_device_has_the_ops_of_the_cpu() -> None:
    seen = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(device)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(device)
        with OpObserver("profile", parse("fp16-mixed:rules=cuda")) as observer:
            model(x).square().mean().backward()
        assert observer.failures == [] and observer.attribution.unknown == 0
        profile = observer.profile
        seen.append({(r.place.op, r.place.phase, r.place.module): r.elements for r in profile.records.values()})
        assert all(r.histogram.total == r.elements for r in profile.records.values())
        assert set(profile.gradients) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    products = [{key for key in found if key[0] in ("mm", "addmm", "gelu", "gelu_backward")} for found in seen]
    assert products[0] == products[1]

"""What leaves autocast, and parameters stored in 16 bits."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from halfstep.autocast import autocast, float32_precision, store_in_planes, to_float32
from halfstep.policy import POLICIES
from halfstep.split import SplitTensor

LOW = (torch.float16, torch.bfloat16)
Point = namedtuple("Point", ["x", "y"])


class Named(NamedTuple):
    logits: Any
    size: int = 3


@dataclass
class Plain:
    logits: Any
    extra: Any = None


@dataclass(frozen=True)
class Frozen:
    logits: Any


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Any


@dataclass
class Derived:
    logits: Any
    factor: InitVar[int]  # known only while it is constructed
    product: Any = field(init=False)

    def __post_init__(self, factor: int) -> None:
        self.product = self.logits * factor


@dataclass
class Picky:
    logits: Tensor

    def __post_init__(self) -> None:
        if self.logits.dtype is torch.float32:
            raise TypeError("constructed a second time")


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As in Hugging Face transformers: a dataclass whose fields are also the items of a dict, without the Nones."""

    loss: Any = None
    logits: Any = None
    hidden_states: Any = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is not None:
                self[f.name] = getattr(self, f.name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        make, rest = super().__reduce__()[0], super().__reduce__()[2:]
        return make, tuple(getattr(self, f.name) for f in fields(self)), *rest


def low(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("dtype", LOW)
def test_16_bit_tensors_are_cast_exactly_and_others_stay_the_same_object(dtype: torch.dtype) -> None:
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = to_float32(codes)
    assert wide.dtype is torch.float32
    assert torch.equal(wide.to(dtype).view(torch.int16)[codes == codes], codes.view(torch.int16)[codes == codes])
    for other in (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64):
        tensor = torch.ones(2, dtype=other)
        assert to_float32(tensor) is tensor


leaves = st.sampled_from(["low", "float", "int", "none", "text"])
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | inner.map(Plain)
        | inner.map(Frozen)
        | inner.map(Named)
        | st.tuples(inner, inner).map(lambda pair: Point(*pair))
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)
LEAVES = {"low": torch.ones(1).half(), "float": torch.ones(1), "int": 7, "none": None, "text": "low"}


def fill(nest: Any) -> Any:
    """A description with its leaves put in."""
    if isinstance(nest, str):
        return LEAVES[nest]
    if isinstance(nest, dict):
        return type(nest)((key, fill(item)) for key, item in nest.items())
    if isinstance(nest, Named | Point):
        return type(nest)(*(fill(item) if not isinstance(item, int) else item for item in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(fill(item) for item in nest)
    return type(nest)(fill(nest.logits))


def check(before: Any, after: Any) -> bool:
    """Same structure, 16-bit tensors cast, everything else untouched. Returns whether anything was cast."""
    assert type(after) is type(before)
    if isinstance(before, Tensor):
        assert after.dtype is torch.float32
        assert (after is before) == (before.dtype is torch.float32)
        return after is not before
    if isinstance(before, dict):
        assert list(after) == list(before)
        changed = [check(before[key], after[key]) for key in before]
    elif isinstance(before, list | tuple):
        assert len(after) == len(before)
        changed = [check(b, a) for b, a in zip(before, after, strict=True)]
    elif hasattr(before, "__dataclass_fields__"):
        changed = [check(before.logits, after.logits)]
    else:
        changed = []
    assert (after is before) == (not any(changed))
    return any(changed)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(nests)
def test_any_nesting_keeps_its_structure_and_what_has_nothing_to_cast_its_identity(nest: Any) -> None:
    value = fill(nest)
    check(value, to_float32(value))


def test_dataclasses_are_not_constructed_again() -> None:
    derived = Derived(low(2), 2)
    out = to_float32(derived)
    assert torch.equal(out.product, derived.product.float()) and out.logits.dtype is torch.float32
    assert derived.logits.dtype is torch.bfloat16  # the original is left alone
    assert to_float32(Picky(low(2))).logits.dtype is torch.float32
    assert to_float32(Slotted(low(2))).logits.dtype is torch.float32
    assert to_float32(Plain) is Plain  # a class is no instance


def test_model_output_keeps_attributes_and_items_in_step() -> None:
    states = (low(1), low(2))
    before = ModelOutput(loss=torch.ones(()), logits=low(3), hidden_states=states)
    after = to_float32(before)
    assert type(after) is ModelOutput and list(after) == ["loss", "logits", "hidden_states"]
    for name in after:
        assert after[name] is getattr(after, name)
    assert after.loss is before.loss
    assert torch.equal(after.logits, before.logits.float())
    assert [s.dtype for s in after.hidden_states] == [torch.float32] * 2
    assert before["logits"] is before.logits and before.logits.dtype is torch.bfloat16
    partial = to_float32(ModelOutput(logits=low(1)))
    assert list(partial) == ["logits"] and partial.loss is None
    full = ModelOutput(loss=torch.ones(()))
    assert to_float32(full) is full


def test_other_mappings_and_tuples_of_pytorch() -> None:
    counts: defaultdict[str, Any] = defaultdict(list, {"a": low(1)})
    out = to_float32(counts)
    assert type(out) is defaultdict and out.default_factory is list and out["a"].dtype is torch.float32
    user = to_float32(UserDict({"a": low(1)}))
    assert type(user) is UserDict and user["a"].dtype is torch.float32
    top = to_float32(low(4).max(dim=0))  # torch.return_types.max
    assert type(top) is torch.return_types.max and top.values.dtype is torch.float32
    packed = to_float32(nn.utils.rnn.pack_sequence([low(3, 2), low(1, 2)]))
    assert type(packed) is nn.utils.rnn.PackedSequence and packed.data.dtype is torch.float32
    size = low(2, 3).shape
    assert to_float32(size) is size


def test_gradients_flow_through_the_cast() -> None:
    x = torch.randn(5, requires_grad=True)
    out = to_float32({"y": [x.bfloat16() * 2]})["y"][0]
    out.pow(2).sum().backward()
    y = (x.detach().bfloat16() * 2).float()
    assert x.grad is not None and torch.equal(x.grad, ((2 * y).bfloat16() * 2).float())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=str)
def test_autocast_lowers_matrix_products_to_the_policys_format(policy: Any) -> None:
    a = torch.randn(4, 4)
    with autocast(policy, "cpu"):
        assert (a @ a).dtype is policy.compute_dtype
    with float32_precision(policy):
        assert (a @ a).dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.norms = nn.ModuleList(
            [nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4, affine=True)]
        )
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.register_buffer("table", torch.randn(3))


@pytest.mark.parametrize("name", ["bf16-master", "fp16-master"])
def test_parameters_are_stored_in_place_but_for_fp32_islands(name: str) -> None:
    policy, model = POLICIES[name], Small()
    before = copy.deepcopy(model.state_dict())
    identities = {n: id(p) for n, p in model.named_parameters()}
    assert store_in_planes(model, policy) == {}
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert model.head.weight is model.embed.weight
    stored = {n: p for n, p in model.named_parameters() if isinstance(p, SplitTensor)}
    assert set(stored) == {"embed.weight", "transposed"} and {p.hi.dtype for p in stored.values()} == {
        policy.compute_dtype
    }
    assert model.wide.dtype is torch.float64 and not model.frozen.requires_grad
    for n, p in model.named_parameters():
        assert (p - before[n]).abs().max() <= 2.0**-40 and p.dtype is before[n].dtype
        assert p.stride() == before[n].stride()


def test_policies_with_plain_storage_store_nothing() -> None:
    model = Small()
    pointers = [p.data_ptr() for p in model.parameters()]
    for policy in POLICIES.values():
        if policy.storage == "plain":
            assert store_in_planes(model, policy) == {}
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_only_the_asked_parameters_are_stored() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert store_in_planes(model, POLICIES["bf16-master"], only={id(model[1].weight)}) == {}
    assert [isinstance(p, SplitTensor) for p in model.parameters()] == [False, False, True, False]


@pytest.mark.parametrize("others", [0.0, torch.inf, torch.nan])
def test_a_value_beyond_the_format_stays_plain_and_is_named(others: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 1] = -70000.0
        model[1].weight[1, 1] = others
    left = store_in_planes(model, POLICIES["fp16-master"])
    assert left == {"1.weight": "it holds 70000, and the largest float16 is 65504"}
    assert [isinstance(p, SplitTensor) for p in model.parameters()] == [True, False, False, False]
    assert store_in_planes(model, POLICIES["bf16-master"]) == {}  # bf16 has the range
    assert model[1].weight[0, 1] == -70000.0

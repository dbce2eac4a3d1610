"""`SplitTensor` is the FP32 tensor it was, to whoever looks and writes: each way beside a plain parameter."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from halfstep import MixedPrecision
from halfstep.split import SplitTensor, make_plain, on_plain, split, split_parameters, swap_keeping_hooks


def plain(seed: int = 0, shape: tuple[int, ...] = (6, 4)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def pair(shape: tuple[int, ...] = (6, 4)) -> tuple[nn.Parameter, nn.Parameter]:
    """A split parameter and a plain one with the same values."""
    layer = nn.Module()
    layer.weight = plain(shape=shape)
    assert split_parameters(layer, lambda *_: True) == {}
    assert isinstance(layer.weight, SplitTensor)
    return layer.weight, plain(shape=shape)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.detach().clone().view(torch.int32), theirs.detach().clone().view(torch.int32))


def test_it_looks_like_the_parameter_it_was() -> None:
    ours, theirs = pair()
    assert isinstance(ours, nn.Parameter) and ours.dtype is torch.float32 and ours.is_leaf and ours.requires_grad
    assert ours.shape == theirs.shape and ours.stride() == theirs.stride() and ours.device == theirs.device
    assert ours.is_floating_point() and ours.element_size() == 4 and ours.numel() == 24
    assert repr(ours) == repr(theirs)
    assert ours.tolist() == theirs.tolist() and ours[1, 2].item() == theirs[1, 2].item()
    assert torch.equal(ours, theirs) and torch.allclose(ours, theirs) and same(ours, theirs)


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda p: p.mul_(1.0001).add_(0.25),
    "small steps": lambda p: [p.mul_(1 - 1e-4) for _ in range(100)],
    "a row": lambda p: p[2].fill_(7.0),
    "an element": lambda p: p.__setitem__((1, 1), 3.0),
    "by mask": lambda p: p.masked_fill_(p > 0, 0.1),
    "through .data": lambda p: p.data.clamp_(-0.5, 0.5),
    "through a transposed view": lambda p: p.t()[0].zero_(),
    "through a flat view": lambda p: p.view(-1)[3:9].add_(1.0),
    "through chunks": lambda p: [part.mul_(i + 1.0) for i, part in enumerate(p.chunk(3))],
    "through unbind": lambda p: p.unbind(1)[0].zero_(),
    "through detach": lambda p: p.detach().sub_(1.0),
    "through a diagonal": lambda p: p.diagonal().fill_(1.0),
    "copy_": lambda p: p.copy_(torch.linspace(-1, 1, 24).view(6, 4)),
    "copy_ of a row": lambda p: p.copy_(torch.arange(4.0)),
    "copy_ of float64": lambda p: p.copy_(torch.full((6, 4), 1 / 3, dtype=torch.float64)),
    "out=": lambda p: torch.add(torch.ones(6, 4), 1.5, out=p.data),
    "lerp_": lambda p: p.lerp_(torch.ones(6, 4), 0.3),
    "a foreach": lambda p: torch._foreach_mul_([p, torch.ones(2)], 0.9),
    "foreach with lists": lambda p: torch._foreach_addcdiv_(
        [p.data], [torch.ones(6, 4)], [torch.full((6, 4), 3.0)], 0.1
    ),
    "init": lambda p: nn.init.orthogonal_(p, generator=torch.Generator().manual_seed(1)),
    "its own value": lambda p: p.add_(p),
    ".data set": lambda p: setattr(p, "data", torch.full((6, 4), 0.1)),
    ".data from itself": lambda p: setattr(p, "data", p.data * 3),
    "NaN and inf": lambda p: p.view(-1)[:3].copy_(torch.tensor([float("nan"), float("inf"), -float("inf")])),
    "vector_to_parameters": lambda p: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([p]) * 2, [p]),
    "renorm_": lambda p: p.data.renorm_(2, 0, 0.5),
    "index_add_": lambda p: p.index_add_(0, torch.tensor([0, 2]), torch.ones(2, 4)),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_there(name: str) -> None:
    ours, theirs = pair()
    identity, versions = id(ours), (ours._version, theirs._version)
    with torch.no_grad():
        WRITES[name](ours)
        WRITES[name](theirs)
    assert id(ours) == identity and torch.equal(ours.isnan(), theirs.isnan())
    assert same(ours.nan_to_num(), theirs.nan_to_num())
    if theirs._version > versions[1]:  # what plain PyTorch counts as a new version is one here too
        assert ours._version > versions[0]


def test_copies_are_plain_and_load_without_halfstep() -> None:
    ours, theirs = pair()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.deepcopy(nn.ParameterList([ours]))[0]):
        assert type(copied) is nn.Parameter and same(copied, theirs) and copied.requires_grad
    assert type(ours.detach().clone()) is Tensor and type(ours * 1) is Tensor
    file = io.BytesIO()
    torch.save({"w": ours, "detached": ours.detach()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["w"]) is nn.Parameter and type(loaded["detached"]) is Tensor and same(loaded["detached"], theirs)


def test_a_state_dict_is_read_and_written_through() -> None:
    model, reference = nn.Linear(4, 6), nn.Linear(4, 6)
    reference.load_state_dict(model.state_dict())
    split_parameters(model)
    for state in (model.state_dict(), reference.state_dict()):
        for value in state.values():
            value.mul_(0.7)
    assert same(model.weight, reference.weight)
    other = nn.Linear(4, 6)
    for kind in ({}, {"assign": True}):
        weight = model.weight
        model.load_state_dict(copy.deepcopy(other.state_dict()), **kind)
        assert same(model.weight, other.weight)
        assert (model.weight is weight) == (kind == {})


def test_gradients_and_graphs_are_those_of_a_plain_parameter() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    gradients = []
    for p in pair():
        loss = functional.linear(x, p).pow(2).sum() + p.norm() + (p.t() @ p).trace()
        (first,) = torch.autograd.grad(loss, p, create_graph=True)
        first.pow(2).sum().backward()
        gradients += [first, p.grad]
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])
    assert type(gradients[1]) is Tensor


@pytest.mark.parametrize("kind", ["linear", "conv", "einsum", "bmm", "embedding"])
def test_under_autocast_it_is_the_upper_plane_that_is_multiplied(kind: str) -> None:
    shape = {"conv": (3, 2, 3, 3), "bmm": (2, 4, 3)}.get(kind, (6, 4))
    x = torch.randn({"conv": (1, 2, 5, 5), "bmm": (2, 5, 4)}.get(kind, (5, 4)))
    results = []
    for p in pair(shape):
        with torch.autocast("cpu", torch.bfloat16):
            out = {
                "linear": lambda p: functional.linear(x, p),
                "conv": lambda p: functional.conv2d(x, p),
                "einsum": lambda p: torch.einsum("bi,oi->bo", x, p),
                "bmm": lambda p: torch.bmm(x, p),
                "embedding": lambda p: functional.embedding(torch.tensor([1, 5, 1]), p),
            }[kind](p)
        out.float().pow(2).sum().backward()
        results.append((out, p.grad))
    assert results[0][0].dtype is results[1][0].dtype
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_autocast_gets_the_plane_itself_and_a_script_a_copy() -> None:
    p, _ = pair()
    seen = []

    class Kept(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self) -> None:
            super().__init__(lambda t: (seen.append(t), t)[1], lambda t: t)

    with torch.autocast("cpu", torch.bfloat16), Kept():
        functional.linear(torch.ones(2, 4, requires_grad=True), p)
    assert isinstance(p, SplitTensor)
    assert any(t.dtype is torch.bfloat16 and t.untyped_storage()._cdata == p.hi.untyped_storage()._cdata for t in seen)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for cast in (p.to(torch.bfloat16), p.bfloat16(), p.data.type(torch.bfloat16), p.to("cpu", torch.bfloat16)):
            cast.zero_()
    with torch.no_grad():
        p.bfloat16().zero_()
    assert p.abs().sum() > 0


def test_a_weight_written_between_forward_and_backward_is_the_error_that_fp32_gives() -> None:
    p, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.linear(torch.ones(2, 4, requires_grad=True), p)
    with torch.no_grad():
        p.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


NEEDS_MEMORY: dict[str, Callable[[Any], Any]] = {
    "data_ptr": lambda p: p.data_ptr(),
    "untyped_storage": lambda p: p.untyped_storage().nbytes(),
    "share_memory_": lambda p: p.share_memory_().is_shared(),
    "half": lambda p: setattr(p, "data", p.data.half()),
    "a flat buffer": lambda p: setattr(p, "data", torch.zeros(100)[:24].view(6, 4)),
    "a view as integers": lambda p: p.view(torch.int32),
}


@pytest.mark.parametrize("name", NEEDS_MEMORY)
def test_what_needs_memory_gets_a_plain_parameter_the_same_object_and_it_is_told(name: str) -> None:
    ours, theirs = pair()
    ours.grad, theirs.grad = torch.ones(6, 4), torch.ones(6, 4)
    told: list[str] = []
    on_plain.append(lambda parameter, because: told.append(because))
    try:
        with torch.no_grad():
            NEEDS_MEMORY[name](ours)
            NEEDS_MEMORY[name](theirs)
    finally:
        on_plain.pop()
    assert type(ours) is nn.Parameter and len(told) == 1 and told[0]
    assert ours.dtype is theirs.dtype and torch.equal(ours, theirs) and torch.equal(ours.grad, torch.ones(6, 4))


def test_an_entry_of_a_state_dict_becomes_a_snapshot_and_the_parameter_stays() -> None:
    model = nn.Linear(4, 6)
    split_parameters(model)
    entry = model.state_dict()["weight"]
    assert entry.data_ptr() != 0 and type(entry) is Tensor and same(entry, model.weight)
    assert isinstance(model.weight, SplitTensor)


def test_numpy_is_a_copy_that_cannot_be_written() -> None:
    p, theirs = pair()
    array = p.detach().numpy()
    assert (array == theirs.detach().numpy()).all()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1.0
    with pytest.raises(RuntimeError, match="requires grad"):
        p.numpy()


def test_a_parameter_in_a_graph_cannot_become_plain_and_the_error_says_what_to_do() -> None:
    p, _ = pair()
    out = functional.linear(torch.ones(2, 4), p)
    with pytest.raises(RuntimeError, match="before the forward pass"):
        make_plain(p, "a test")
    out.sum().backward()


def test_compiled_and_functional_calls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    reference = copy.deepcopy(model)
    split_parameters(model)
    x = torch.randn(3, 8)
    expected = reference(x)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # and no graph for each step
        out = compiled(x)
        assert torch.equal(out, reference(x))
        out.sum().backward()
        reference(x).sum().backward()
        assert torch.equal(model[0].weight.grad, reference[0].weight.grad)  # type: ignore[arg-type]
        for m in (model, reference):
            with torch.no_grad():
                for p in m.parameters():
                    p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
            m.zero_grad()
    torch._dynamo.reset()


def test_planes_are_written_in_place_and_take_four_bytes() -> None:
    p, _ = pair((64, 64))
    assert isinstance(p, SplitTensor)
    hi, lo = p.hi, p.lo
    with torch.no_grad():
        p.mul_(2)
    assert p.hi is hi and p.lo is lo
    assert hi.untyped_storage().nbytes() + lo.untyped_storage().nbytes() == 4 * 64 * 64
    assert torch.equal(split(p.joined())[0], hi)


READS: dict[str, Callable[[Any], Tensor]] = {
    "to another dtype": lambda p: p.to(torch.float64),
    "to its own": lambda p: p.float(),
    "to 16 bits": lambda p: p.to(torch.float16),
    "reshape": lambda p: p.reshape(4, 6),
    "contiguous": lambda p: p.t().contiguous(),
    "flatten": lambda p: p.flatten(),
    "chunks": lambda p: torch.cat(p.chunk(3)),
    "a product": lambda p: functional.linear(torch.ones(2, 4), p),
}


@pytest.mark.parametrize("name", READS)
def test_inference_mode_which_hands_on_composite_ops_whole_sees_the_parameter(name: str) -> None:
    ours, theirs = pair()
    with torch.inference_mode():
        found, expected = READS[name](ours), READS[name](theirs)
        assert found.dtype is expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("name", WRITES)
def test_writes_under_inference_mode_arrive(name: str) -> None:
    ours, theirs = pair()
    with torch.inference_mode():
        WRITES[name](ours)
        WRITES[name](theirs)
    assert same(ours, theirs)


def test_autocast_under_inference_mode_gets_the_plane() -> None:
    model = nn.Linear(4, 6)
    split_parameters(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(torch.ones(2, 4)).detach()
        with torch.inference_mode():
            assert torch.equal(model(torch.ones(2, 4)), expected)


@pytest.mark.parametrize("by", ["swap", "backward of the library"])
def test_hooks_are_called_after_pytorch_has_swapped_the_parameter(by: str) -> None:
    model = nn.Linear(4, 6)
    seen: list[str] = []
    model.weight.register_hook(lambda gradient: seen.append("hook"))
    model.weight.register_post_accumulate_grad_hook(lambda _: seen.append("after"))
    mp = MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16-master")
    weight, other = model.weight, nn.Parameter(SplitTensor.of(torch.ones(6, 4)))
    assert isinstance(weight, SplitTensor)
    if by == "swap":
        swap_keeping_hooks(torch.utils.swap_tensors, weight, other)
        model(torch.ones(2, 4)).sum().backward()
    else:
        torch.utils.swap_tensors(weight, other)  # type: ignore[no-untyped-call]
        mp.backward(model(torch.ones(2, 4)).sum())
    assert seen == ["hook", "after"] and torch.equal(model.weight, torch.ones(6, 4))

"""FP32 islands: bit for bit the twin with autocast(enabled=False) written by hand."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.autocast import NoSuchModuleError, autocast, cast_inputs, keep_fp32, store_in_planes
from halfstep.autocast.islands import find
from halfstep.policy import parse
from halfstep.split import SplitTensor

POLICIES = ["bf16-mixed", "fp16-mixed", "bf16-mixed:rules=cuda", "fp16-mixed:emulate"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.wo(torch.relu(self.wi(x))) * scale


class Net(nn.Module):
    def __init__(self, wrap: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.wrap = wrap
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": Mlp()}) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            h = block["norm"](x)
            x = x + (block["mlp"](h) if self.wrap is None else self.wrap(block["mlp"], h))
        return self.head(x)


class Twin(Net):
    """`Net` with islands at blocks.*.mlp.wo and head, as PyTorch's documentation has one write them."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            h = torch.relu(block["mlp"].wi(block["norm"](x)))
            with torch.autocast("cpu", enabled=False):
                h = block["mlp"].wo(h.float())
            x = x + h * 1.0
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


PATTERNS = ("blocks.*.mlp.wo", "head")


def pair(wrap: Callable[..., Any] | None = None) -> tuple[Net, Twin]:
    torch.manual_seed(0)
    net, twin = Net(wrap), Twin()
    twin.load_state_dict(net.state_dict())
    return net, twin


def step(model: nn.Module, policy: str, x: Tensor) -> list[Tensor]:
    """Output, gradients of the parameters, gradient of the input."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with autocast(policy, "cpu"):
        out = model(x)
    out.float().pow(2).sum().backward()
    assert x.grad is not None
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None), x.grad]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(
        g.dtype is w.dtype and torch.equal(g, w) for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_islands_are_the_hand_written_twin_bit_for_bit(policy: str) -> None:
    net, twin = pair()
    x = torch.randn(5, 8)
    plain, want = step(net, policy, x), step(twin, policy, x)
    assert not same(plain, want)
    with keep_fp32(net, PATTERNS) as islands:
        assert list(islands.modules) == ["blocks.0.mlp.wo", "blocks.1.mlp.wo", "blocks.2.mlp.wo", "head"]
        assert same(step(net, policy, x), want)
    assert same(step(net, policy, x), plain)
    assert not any("forward" in module.__dict__ for module in net.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["bf16-mixed", "fp16-mixed"])
def test_under_activation_checkpointing(policy: str, reentrant: bool) -> None:
    net, twin = pair(lambda module, h: checkpoint(module, h, use_reentrant=reentrant))
    keep_fp32(net, PATTERNS)
    x = torch.randn(5, 8)
    assert same(step(net, policy, x), step(twin, policy, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", [True, False], ids=["islands-then-compile", "compile-then-islands"])
def test_compiled_without_a_graph_break(backend: str, before: bool) -> None:
    torch._dynamo.reset()
    net, twin = pair()
    x = torch.randn(5, 8)
    if before:
        keep_fp32(net, PATTERNS)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    if not before:
        plain = step(compiled, "bf16-mixed", x)
        keep_fp32(compiled, PATTERNS)
        assert not same(plain, step(compiled, "bf16-mixed", x))
    # The twin is compiled too: aot_eager's own backward differs from eager's in the last bits.
    compiled_twin = torch.compile(twin, backend=backend, fullgraph=True)
    assert same(step(compiled, "bf16-mixed", x), step(compiled_twin, "bf16-mixed", x))


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="gloo's file store")
@pytest.mark.parametrize("before", [True, False], ids=["islands-then-ddp", "ddp-then-islands"])
@pytest.mark.parametrize("patterns", [PATTERNS, ("module.blocks.*.mlp.wo", "module.head")], ids=["plain", "prefixed"])
def test_under_ddp(process_group: None, before: bool, patterns: tuple[str, ...]) -> None:
    net, twin = pair()
    x = torch.randn(5, 8)
    if before:
        keep_fp32(net, PATTERNS)
    ddp = nn.parallel.DistributedDataParallel(net)
    if not before:
        assert list(keep_fp32(ddp, patterns).modules)[-1] == "head"
    assert same(step(ddp, "bf16-mixed", x), step(twin, "bf16-mixed", x))


def test_copies_and_pickles_have_islands_of_their_own() -> None:
    net, twin = pair()
    keep_fp32(net, PATTERNS)
    x = torch.randn(5, 8)
    want = step(twin, "bf16-mixed", x)
    copied, pickled = copy.deepcopy(net), pickle.dumps(net)
    with torch.no_grad():
        net.head.weight.zero_()  # a copy that still called the original would show it
    assert same(step(copied, "bf16-mixed", x), want)
    assert b"halfstep" not in pickled.replace(__name__.encode(), b"")  # a file loads where there is none
    loaded = pickle.loads(pickled)
    keep_fp32(loaded, PATTERNS)
    assert same(step(loaded, "bf16-mixed", x), want)
    net.load_state_dict(twin.state_dict())
    assert list(net.state_dict()) == list(twin.state_dict())
    file = io.BytesIO()
    torch.save(net, file)


def test_a_forward_that_stood_on_the_instance_is_called_and_put_back() -> None:
    linear = nn.Linear(2, 2)
    original = linear.forward
    calls: list[torch.dtype] = []

    def patched(x: Tensor) -> Tensor:
        calls.append(x.dtype)
        return original(x)

    linear.forward = patched  # type: ignore[method-assign]
    with keep_fp32(nn.Sequential(linear), ["0"]):
        linear(torch.ones(1, 2).bfloat16())
        assert calls == [torch.float32]
        assert inspect.signature(linear.forward) == inspect.signature(patched)
    assert linear.forward is patched


def test_inputs_in_containers_and_keywords_are_cast_and_others_left_alone() -> None:
    class Odd(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, mask: Tensor, more: dict[str, Any]) -> Any:
            return pair[0].dtype, pair[1].dtype, mask.dtype, more["x"].dtype, more["o"]

    model, token = nn.Sequential(Odd()), object()
    keep_fp32(model, ["0"])
    low = torch.ones(2).half()
    seen = model[0]((low, torch.arange(2)), mask=torch.ones(2, dtype=torch.bool), more={"x": low, "o": token})
    assert seen == (torch.float32, torch.int64, torch.bool, torch.float32, token)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("head", ["head"]),
        ("blocks.*.mlp.wo", [f"blocks.{i}.mlp.wo" for i in range(3)]),
        ("blocks.[02].norm", ["blocks.0.norm", "blocks.2.norm"]),
        ("**.wi", [f"blocks.{i}.mlp.wi" for i in range(3)]),
        ("blocks.1", ["blocks.1"]),
        ("blocks.1.**", ["blocks.1"]),
        ("b*", ["blocks"]),
        ("**", ["blocks", "head"]),
        ("*.mlp", []),  # one star is one part
        ("lock", []),
    ],
)
def test_patterns_match_part_by_part(pattern: str, paths: list[str]) -> None:
    assert list(find(Net(), (pattern,))) == paths


def test_a_pattern_that_matches_nothing_names_the_nearest_and_changes_nothing() -> None:
    net, _ = pair()
    with pytest.raises(NoSuchModuleError) as error:
        keep_fp32(net, ["head", "block.*.mlp.wo"])
    assert str(error.value).startswith("keep_fp32 pattern 'block.*.mlp.wo' matches no module of the model. Nearest: ")
    assert "blocks.0.mlp.wo" in str(error.value)
    assert not any("forward" in module.__dict__ for module in net.modules())
    with pytest.raises(NoSuchModuleError, match="It has 0, 1"):
        keep_fp32(nn.Sequential(nn.ReLU(), nn.ReLU()), ["embedding"])


def test_master_policies_leave_the_parameters_of_islands_as_they_are() -> None:
    net, _ = pair()
    assert store_in_planes(net, parse("bf16-master:keep_fp32=blocks.*.mlp+head")) == {}
    assert not any(isinstance(p, SplitTensor) for p in net.parameters())
    assert store_in_planes(net, parse("bf16-master:keep_fp32=**.wo")) == {}
    stored = {n for n, p in net.named_parameters() if isinstance(p, SplitTensor)}
    assert stored == {n for n, _ in net.named_parameters() if n.endswith((".wi.weight", "head.weight"))}


@pytest.mark.parametrize("name", ["bf16-mixed", "fp16-mixed", "bf16-master", "fp16-master"])
def test_mixed_precision_applies_the_policys_islands_and_trains(name: str) -> None:
    net, _ = pair()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    mp = halfstep.MixedPrecision(net, optimizer, f"{name}:keep_fp32=blocks.*.mlp.wo+head:emulate")
    assert mp.policy == parse(str(mp.policy)) and list(mp.islands.modules)[-1] == "head"
    x, losses = torch.randn(16, 8), []
    for _ in range(5):
        with mp.autocast():
            out = net(x)
        assert out.dtype is torch.float32
        loss = out.pow(2).mean()
        mp.backward(loss)
        assert mp.step().applied
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(NoSuchModuleError):
        halfstep.MixedPrecision(net, optimizer, f"{name}:keep_fp32=nothing")


def test_inputs_are_cast_to_a_format_and_the_rest_is_left_alone() -> None:
    class Unknown:
        tensor = torch.ones(1)

    others = [
        torch.ones(2, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8)
    ]
    others.append(torch.ones(2).to(torch.float8_e5m2))
    unknown = Unknown()
    batch = {"x": [torch.ones(2, requires_grad=True), torch.ones(2).half()], "rest": (*others, unknown, 3.5, "text")}
    out = cast_inputs(batch, torch.bfloat16)
    assert [t.dtype for t in out["x"]] == [torch.bfloat16] * 2 and out["rest"] is batch["rest"]
    out["x"][0].sum().backward()
    assert torch.equal(batch["x"][0].grad, torch.ones(2))  # type: ignore[union-attr]
    assert cast_inputs(out, torch.bfloat16) is out

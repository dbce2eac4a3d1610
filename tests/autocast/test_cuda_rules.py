"""CUDA's rules on a CPU: against PyTorch's own lists, op by op; and nothing of them outside their region."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from halfstep.autocast import UnsupportedDeviceError, autocast, kernels, recomputation
from halfstep.autocast.rules import AUTOCAST_KEYS, CPU_LOWER, cuda_rules, plan, unlisted, without_kernel
from halfstep.policy import parse

LOW = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def aten_ops(key: str) -> set[str]:
    return {n.removeprefix("aten::") for n in torch._C._dispatch_get_registrations_for_dispatch_key(key)}


def test_the_table_is_the_dispatchers_list() -> None:
    """A PyTorch that changes its lists fails here: sort the new ops into the table by autocast_mode.h."""
    assert unlisted() == set()
    assert set(cuda_rules()) <= aten_ops("AutocastCUDA")
    assert set(CPU_LOWER) <= aten_ops("AutocastCPU")


def lists() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any], Any, Any]]:
    """PyTorch's test lists as (list, op, args, kwargs, where the op lives, expected dtype or None for low)."""
    from torch.testing._internal.autocast_test_lists import AutocastTestLists

    torch.manual_seed(0)
    given = AutocastTestLists("cpu")
    float32 = torch.float32
    for name, place, expected in [
        ("torch_fp16", torch, None),
        ("torch_fp32", torch, float32),
        ("torch_need_autocast_promote", torch, float32),
        ("nn_fp16", torch._C._nn, None),
        ("nn_fp32", torch._C._nn, float32),
        ("linalg_fp16", torch._C._linalg, None),
        ("methods_fp16", Tensor, None),
        ("methods_fp32", Tensor, float32),
    ]:
        for op, args, *rest in getattr(given, name):
            yield name, op, args, rest[0] if rest and isinstance(rest[0], dict) else {}, place, expected
    for name, place in (("torch_expect_builtin_promote", torch), ("methods_expect_builtin_promote", Tensor)):
        for op, args, expected in getattr(given, name):
            yield name, op, args, {}, place, expected


#: Ops whose kernels a CPU build does not have.
GPU_ONLY = {"cudnn_convolution", "cudnn_convolution_transpose"}
CASES = [
    pytest.param(*case[1:], id=f"{case[0]}-{case[1]}-{i}")
    for i, case in enumerate(lists())
    if case[1] not in GPU_ONLY and not (case[1] == "einsum" or hasattr(case[4], case[1]) is False)
]


def find(place: Any, op: str) -> Any:
    return getattr(place, op)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:Using torch.cross without")
@pytest.mark.parametrize(("op", "args", "kwargs", "place", "expected"), CASES)
def test_op_by_op(op: str, args: Any, kwargs: Any, place: Any, expected: Any) -> None:
    low = torch.float16  # the lists hold fp16 inputs
    function = find(place, op)
    # Matrix products of 8x8 are quick in fp16 too; emulation does not change dtypes.
    for text in ("fp16-mixed:rules=cuda", "fp16-mixed:rules=cuda:emulate"):
        with autocast(text, "cpu"):
            output = function(*args, **kwargs)
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor):
            assert first.dtype is (expected or low), text
    with torch.autocast("cpu", enabled=False):
        to = expected if expected in (torch.float32, None) else None
        if not isinstance(first, Tensor) or to is None:
            return
        reference = function(*cast(args, to), **kwargs)
    assert torch.equal(first, reference) or torch.allclose(first, reference, equal_nan=True, rtol=1e-6)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(cast(v, dtype) for v in value) if isinstance(value, tuple | list) else value


def test_nearly_every_op_of_the_lists_was_run() -> None:
    total = sum(1 for _ in lists())
    assert len(CASES) >= total - 8, f"{len(CASES)} of {total}"


def test_einsum_whose_list_entry_has_no_operands_in_a_tuple() -> None:
    q, k = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        out = torch.einsum("bkhd,bqhd->bqkh", q, k)
    assert torch.equal(out, torch.einsum("bkhd,bqhd->bqkh", q.bfloat16(), k.bfloat16()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bce_is_banned_with_the_remedy_and_its_logits_version_is_not(reduction: str) -> None:
    p, y = torch.rand(4), torch.rand(4)
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        with pytest.raises(RuntimeError, match=r"refuses binary_cross_entropy.*binary_cross_entropy_with_logits"):
            functional.binary_cross_entropy(p, y, reduction=reduction)
        assert functional.binary_cross_entropy_with_logits(p.bfloat16(), y).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.binary_cross_entropy(p, y), functional.binary_cross_entropy(p, y))


def test_rules_that_only_the_cpu_has_are_gone_inside_and_there_outside() -> None:
    low, wide = torch.randn(4, 4).bfloat16(), torch.randn(4, 4)
    image = torch.randn(1, 1, 4, 4, 4).bfloat16()

    def results() -> list[Tensor]:
        return [
            functional.pad(low[None], (1, 1), mode="reflect"),
            functional.max_pool3d(image, 2),
            torch.cat([low, wide]),
        ]

    with torch.autocast("cpu", torch.bfloat16):
        on_cpu = [r.dtype for r in results()]
    plain = results()
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        for got, want in zip(results(), plain, strict=True):  # no rule: PyTorch's type promotion, as on CUDA
            assert got.dtype is want.dtype and torch.equal(got, want)
        # CUDA has a 16-bit kernel for these, and the CPU has none, or not always had one.
        assert torch.equal(functional.avg_pool3d(image, 2), functional.avg_pool3d(image.float(), 2).bfloat16())
        assert torch.equal(low.trace(), low.float().trace().bfloat16())
    assert on_cpu == [torch.float32] * 3 and plain[0].dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert [r.dtype for r in results()] == on_cpu
        assert functional.avg_pool3d(image, 2).dtype is torch.float32


def test_a_composite_op_without_a_rule_lets_its_parts_have_theirs() -> None:
    """cross_entropy is not on CUDA's list. It asks log_softmax for its own dtype, and so rounds log-probabilities to 16
    bits before nll_loss, which is listed, goes to FP32."""
    logits, target = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        loss = functional.cross_entropy(logits, target)
    assert torch.equal(loss, functional.nll_loss(torch.log_softmax(logits, -1).float(), target))
    assert not torch.equal(loss, functional.cross_entropy(logits.float(), target))


def test_an_output_dtype_that_was_asked_for_is_kept() -> None:
    x = torch.randn(4, 4).bfloat16()
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        assert torch.softmax(x, 0, dtype=torch.float64).dtype is torch.float64
        assert x.sum(0, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert torch.arange(3).sum().dtype is torch.int64
        assert torch.softmax(x.double(), 0).dtype is torch.float64
        assert x.double().norm().dtype is torch.float64
        assert (x.double() @ x.double()).dtype is torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.second(self.norm(self.first(x))), -1)


class ByHand(Net):
    """What CUDA's rules do to `Net`, written out."""

    low = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        low = self.low
        h = functional.linear(x.to(low), self.first.weight.to(low), self.first.bias.to(low))
        h = functional.layer_norm(h.float(), (16,), self.norm.weight, self.norm.bias)
        h = functional.linear(h.to(low), self.second.weight.to(low), self.second.bias.to(low))
        return torch.softmax(h, -1, dtype=torch.float32)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x.grad = None
    model(x).pow(2).sum().backward()
    return [p.grad for p in model.parameters()] + [x.grad]  # type: ignore[return-value]


def test_gradients_are_those_of_the_casts_written_by_hand() -> None:
    torch.manual_seed(1)
    net, twin = Net(), ByHand()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(5, 8, requires_grad=True)
    expected = gradients(twin, x)
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        out = net(x)
    net.zero_grad()
    x.grad = None
    out.pow(2).sum().backward()  # outside of the region, as one should
    for got, want in zip([*(p.grad for p in net.parameters()), x.grad], expected, strict=True):
        assert got is not None and torch.equal(got, want)


def test_a_weight_is_cast_once_per_region_and_again_after_it_changed() -> None:
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(4)
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        first, second = torch.mv(weight, x), torch.mv(weight, x)
        assert first.grad_fn.next_functions[0][0] is second.grad_fn.next_functions[0][0]
        with torch.no_grad():
            weight.zero_()
        assert torch.equal(torch.mv(weight, x), torch.zeros(4).bfloat16())
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        third = torch.mv(weight, x)
        assert third.grad_fn.next_functions[0][0] is not first.grad_fn.next_functions[0][0]


def dtypes_in_plain_autocast() -> list[torch.dtype]:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = x.bfloat16()
        out = [x @ x, torch.softmax(low, 0), low.sum(), torch.exp(low), functional.layer_norm(low, (4,))]
        out += [torch.atan2(low, x), nn.GRU(4, 4)(x)[0], functional.binary_cross_entropy(x.sigmoid(), x.sigmoid())]
    return [result.dtype for result in out]


def test_outside_of_regions_nothing_of_them_is_felt_also_after_an_error_and_out_of_order() -> None:
    before = dtypes_in_plain_autocast()
    with pytest.raises(ZeroDivisionError), autocast("bf16-mixed:rules=cuda", "cpu"):
        raise ZeroDivisionError
    assert dtypes_in_plain_autocast() == before
    first = autocast("bf16-mixed:rules=cuda", "cpu")
    with autocast("bf16-mixed:fp32_ops=softmax", "cpu"):
        with first:
            pass
        x = torch.randn(3).bfloat16()
        assert torch.softmax(x, 0).dtype is torch.float32 and x.sum().dtype is torch.bfloat16
    assert dtypes_in_plain_autocast() == before
    x = torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.softmax(x.bfloat16(), 0).dtype is torch.bfloat16
        torch.softmax(x, 0).sum().backward()
    assert x.grad is not None


def test_entering_regions_again_and_again_takes_no_memory() -> None:
    """Nested, in threads, and of alternating policies: `torch.library` keeps something of whatever is registered."""
    x = torch.randn(4, 4)
    policies = ["bf16-mixed:rules=cuda", "fp16-mixed:emulate", "bf16-mixed:fp32_ops=softmax", "bf16-mixed:low_ops=exp"]

    def enter(times: int) -> None:
        for index in range(times):
            with autocast(policies[index % 4], "cpu"), autocast(policies[index % 3], "cpu"):
                x @ x

    def everywhere(times: int) -> None:
        threads = [threading.Thread(target=enter, args=(times,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        enter(times)
        for thread in threads:
            thread.join()

    everywhere(60)
    registered_before = len(kernels._registered), sum(len(lib._op_defs | set(lib._op_impls)) for lib in libraries())
    tracemalloc.start()
    try:
        everywhere(10)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        everywhere(400)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    after = len(kernels._registered), sum(len(lib._op_defs | set(lib._op_impls)) for lib in libraries())
    assert after == registered_before
    assert grown < 2400 * 16  # regions: of each were left 142 bytes and more, of the threads something is


def libraries() -> list[torch.library.Library]:
    return list(kernels._libraries.values())


RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 2}),
    "GRU": (nn.GRU, {}),
    "GRU, two layers in both directions": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "GRU without biases": (nn.GRU, {"bias": False}),
    "RNN tanh": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", ["bf16-mixed:rules=cuda", "fp16-mixed:rules=cuda:emulate"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_are_16_bit_as_cudnns(kind: str, policy: str, packed: bool) -> None:
    """`_cudnn_rnn` is on CUDA's list: outputs and states in 16 bits, gradients of weights in FP32."""
    make, options = RECURRENT[kind]
    if make is nn.LSTM and "emulate" not in policy and without_kernel(torch.bfloat16):
        pytest.skip("this CPU has no LSTM in BF16")
    torch.manual_seed(0)
    layer, x = make(4, 4, **options), torch.randn(5, 2, 4)
    given: Any = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
    expected = layer(given)[0]
    with autocast(policy, "cpu"):
        out, state = layer(given)
    low = LOW[policy.partition(":")[0]]
    data, reference = (out.data, expected.data) if packed else (out, expected)
    assert data.dtype is low and all(s.dtype is low for s in (state if isinstance(state, tuple) else (state,)))
    torch.testing.assert_close(data.float(), reference, rtol=0.02, atol=0.02)
    data.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 and p.grad.any() for p in layer.parameters())


def test_regions_nest_each_with_its_own_rules() -> None:
    x = torch.randn(4, 4).bfloat16()
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        with autocast("bf16-mixed", "cpu"):
            assert torch.softmax(x, 0).dtype is torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.softmax(x, 0).dtype is torch.bfloat16
        with autocast("fp16-mixed:low_ops=softmax", "cpu"):
            assert torch.softmax(x.float(), 0).dtype is torch.float16
        with autocast("fp32", "cpu"):
            assert torch.softmax(x, 0).dtype is torch.float32
        assert torch.softmax(x, 0).dtype is torch.float32


def test_another_threads_plain_autocast_is_untouched_meanwhile() -> None:
    x = torch.randn(16, 16).bfloat16()
    entered, checked = threading.Event(), threading.Event()
    seen: list[list[torch.dtype]] = []
    problems: list[BaseException] = []

    def other() -> None:
        try:
            entered.wait(20)
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(50):
                    seen.append([torch.softmax(x, 0).dtype, x.sum().dtype, (x.float() @ x.float()).dtype])
                functional.binary_cross_entropy(torch.rand(3), torch.rand(3))
            with autocast("fp16-mixed:fp32_ops=mm+matmul", "cpu"):
                seen.append([(x.float() @ x.float()).dtype])
        except BaseException as error:
            problems.append(error)
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        entered.set()
        while not checked.is_set():
            assert torch.softmax(x, 0).dtype is torch.float32
    thread.join()
    assert not problems
    assert seen == [[torch.bfloat16] * 3] * 50 + [[torch.float32]]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", ["rules=cuda", "fp32_ops=layer_norm+softmax", "rules=cuda:emulate"])
def test_checkpointing_recomputes_under_the_same_rules(options: str, reentrant: bool) -> None:
    torch.manual_seed(2)
    net, policy = Net(), parse(f"bf16-mixed:{options}")
    x = torch.randn(5, 8, requires_grad=True)

    def run(checkpointed: bool) -> list[Tensor]:
        net.zero_grad()
        x.grad = None
        with autocast(policy, "cpu"):
            out = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        with recomputation(policy, "cpu"):
            out.float().pow(2).sum().backward()
        return [p.grad for p in net.parameters()] + [x.grad]  # type: ignore[return-value]

    before = dtypes_in_plain_autocast()
    for got, want in zip(run(True), run(False), strict=True):
        assert torch.equal(got, want)
    assert dtypes_in_plain_autocast() == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_rules_hold_in_compiled_code(backend: str) -> None:
    torch.manual_seed(3)
    net = Net()
    x = torch.randn(5, 8)
    with autocast("bf16-mixed:rules=cuda", "cpu"):
        expected = net(x)
        torch._dynamo.reset()
        got = torch.compile(net, backend=backend)(x)
    assert got.dtype is torch.float32 and torch.allclose(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LOW)
def test_user_lists_come_before_every_rule(name: str) -> None:
    low, x = LOW[name], torch.randn(6, 6)
    with autocast(f"{name}:fp32_ops=matmul+gelu:low_ops=cumsum+softmax.int+aten::exp:rules=cuda", "cpu"):
        assert (x @ x).dtype is torch.float32 and torch.equal(x @ x, x.matmul(x))
        assert torch.equal(functional.gelu(x.to(low)), functional.gelu(x.to(low).float()))
        assert torch.cumsum(x, 0).dtype is low and torch.softmax(x, 0).dtype is low
        assert torch.exp(x).dtype is low
        assert functional.linear(x, x).dtype is low  # another op than matmul
        assert torch.cumsum(torch.arange(3), 0).dtype is torch.int64
    with autocast(f"{name}:fp32_ops=sum", "cpu"):
        assert torch.equal(x.to(low).sum(), x.to(low).float().sum())
        assert torch.equal(x.to(low).sum(0), x.to(low).float().sum(0))


def test_a_plan_exists_only_where_something_changes() -> None:
    alone = plan(parse("bf16-mixed:keep_fp32=head"), "cpu")
    assert alone is None if not without_kernel(torch.bfloat16) else alone and alone.rules.keys() == alone.kept
    assert plan(parse("fp16-mixed"), "cuda") is None
    assert plan(parse("bf16-mixed:rules=cuda"), "cuda") is None  # CUDA has CUDA's rules
    assert plan(parse("bf16-mixed:rules=cuda"), "cpu") is plan(parse("bf16-mixed:rules=cuda"), "cpu")
    with pytest.raises(UnsupportedDeviceError, match="cpu, cuda, xpu, mps, not for 'hpu'"):
        plan(parse("bf16-mixed:rules=cuda"), "hpu")
    assert set(AUTOCAST_KEYS) == {"cpu", "cuda", "xpu", "mps"}

"""Fused attention is followed in FP32: what a GPU's kernels refuse to compute there is written out.

The kernels of a GPU are played by ones for the CPU: they take 16 bits only, and their backward passes take the
log-sum-exp of their forward passes and draw dropout's mask again from its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfstep.doctor import Examination, attention, examine
from halfstep.doctor.event import OpEvent, Suspicion
from halfstep.doctor.finding import Severity

aten = torch.ops.aten
Shape = tuple[int, ...]


# ------------------------------------------------------------------ kernels as a GPU has them


def scores(query: Tensor, key: Tensor, bias: Tensor | None, allowed: Tensor | None, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.size(1) // key.size(1), 1)
    found = query.float() @ key.float().mT * (query.size(-1) ** -0.5 if scale is None else scale)
    found = found if bias is None else found + bias.float()
    return found if allowed is None else found.masked_fill(~allowed, -torch.inf)


def diagonal(query: Tensor, key: Tensor, last: bool) -> Tensor:
    queries, keys = query.size(2), key.size(2)
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if last else 0)


def drawn(seed: Tensor, shape: Shape, dropout: float) -> Tensor | float:
    if dropout == 0:
        return 1.0
    generator = torch.Generator().manual_seed(int(seed))
    return (torch.rand(shape, generator=generator) >= dropout) / (1 - dropout)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    dropout: float,
    scale: float | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("only fp16 and bf16 are supported")
    s = scores(query, key, bias, allowed, scale)
    weights = s.softmax(-1).nan_to_num(0.0) * drawn(seed, s.shape, dropout)
    value = value.repeat_interleave(query.size(1) // value.size(1), 1)
    return (weights @ value.float()).to(query.dtype), s.logsumexp(-1)


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    dropout: float,
    scale: float | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("only fp16 and bf16 are supported")
    groups = query.size(1) // key.size(1)
    many_keys, many_values = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    p = (scores(query, key, bias, allowed, scale) - log_sum[..., None]).exp().nan_to_num(0.0)
    mask, g = drawn(seed, p.shape, dropout), gradient.float()
    of_scores = p * (g @ many_values.mT * mask - (g * out.float()).sum(-1, keepdim=True))
    scale = query.size(-1) ** -0.5 if scale is None else scale
    of_query = of_scores @ many_keys * scale
    of_key = (of_scores.mT @ query.float() * scale).unflatten(1, (key.size(1), -1)).sum(2)
    of_value = ((p * mask).mT @ g).unflatten(1, (value.size(1), -1)).sum(2)
    low = query.dtype
    return of_query.to(low), of_key.to(low), of_value.to(low), of_scores.to(low)


def a_seed() -> Tensor:
    return torch.randint(1 << 40, ())


def flash(
    q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, causal: bool = False, debug: bool = False, *, scale: Any = None
) -> Any:
    seed = a_seed()
    out, log_sum = forward(q, k, v, None, diagonal(q, k, True) if causal else None, p, scale, seed)
    return out, log_sum, None, None, q.size(2), k.size(2), seed, torch.zeros(()).long(), q.new_empty(0)


def flash_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    p: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: Any = None,
) -> Any:
    return backward(g, q, k, v, None, diagonal(q, k, True) if causal else None, out, log_sum, p, scale, seed)[:3]


def efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, wanted: bool, p: float = 0.0, causal: bool = False, *, scale: Any = None
) -> Any:
    seed = a_seed()
    out, log_sum = forward(q, k, v, bias, diagonal(q, k, False) if causal else None, p, scale, seed)
    padded = torch.full((*log_sum.shape[:2], -(-q.size(2) // 32) * 32 if wanted else 0), torch.inf)
    padded[..., : q.size(2) if wanted else 0] = log_sum if wanted else 0
    return out, padded, seed, torch.zeros(()).long()


def efficient_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    out: Tensor,
    log_sum: Tensor,
    seed: Tensor,
    offset: Tensor,
    p: float,
    wanted: list[bool],
    causal: bool = False,
    *,
    scale: Any = None,
) -> Any:
    allowed = diagonal(q, k, False) if causal else None
    found = backward(g, q, k, v, bias, allowed, out, log_sum[..., : q.size(2)], p, scale, seed)
    return tuple(x if want else None for x, want in zip(found, wanted, strict=True))


def cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    wanted: bool,
    p: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: Any = None,
) -> Any:
    seed = a_seed()
    out, log_sum = forward(q, k, v, bias, diagonal(q, k, False) if causal else None, p, scale, seed)
    offset = torch.zeros(()).long()
    return out, log_sum[..., None], None, None, q.size(2), k.size(2), seed, offset, q.new_empty(0)


def cudnn_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    seed: Tensor,
    offset: Tensor,
    bias: Any,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    p: float,
    causal: bool,
    *,
    scale: Any = None,
) -> Any:
    return backward(
        g, q, k, v, bias, diagonal(q, k, False) if causal else None, out, log_sum.squeeze(-1), p, scale, seed
    )[:3]


def packed_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    p: float,
    causal: bool,
    debug: bool,
    **options: Any,
) -> Any:
    """Sequences one behind the other, (tokens, heads, width)."""
    parts = []
    for (a, b), (c, d) in zip(
        *(zip(e.tolist()[:-1], e.tolist()[1:], strict=True) for e in (cum_q, cum_k)), strict=True
    ):
        one = [x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d])]
        allowed = diagonal(one[0], one[1], True) if causal else None
        parts.append(forward(*one, None, allowed, 0.0, options.get("scale"), torch.zeros(())))
    out = torch.cat([part.transpose(1, 2)[0] for part, _ in parts])
    seed = torch.zeros(()).long()
    return out, torch.cat([log_sum[0] for _, log_sum in parts], 1), seed, seed, q.new_empty(0)


def packed_flash_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    p: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    **options: Any,
) -> Any:
    parts = []
    for (a, b), (c, d) in zip(
        *(zip(e.tolist()[:-1], e.tolist()[1:], strict=True) for e in (cum_q, cum_k)), strict=True
    ):
        gs, qs, ks, vs, outs = (x[None].transpose(1, 2) for x in (g[a:b], q[a:b], k[c:d], v[c:d], out[a:b]))
        allowed = diagonal(qs, ks, True) if causal else None
        parts.append(
            backward(gs, qs, ks, vs, None, allowed, outs, log_sum[None, :, a:b], 0.0, options.get("scale"), seed)
        )
    return tuple(torch.cat([part[i].transpose(1, 2)[0] for part in parts]) for i in range(3))


KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "_flash_attention_forward": packed_flash,
    "_flash_attention_backward": packed_flash_backward,
}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "CPU")
    yield
    library._destroy()


#: The op of each kernel on (query, key, value), with the options that a test gives it.
ATTENTION: dict[str, Callable[..., Tensor]] = {
    "cpu": lambda q, k, v, bias=None, p=0.0, causal=False, scale=None: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, p, causal, attn_mask=bias, scale=scale
    )[0],
    "flash": lambda q, k, v, p=0.0, causal=False, scale=None: aten._scaled_dot_product_flash_attention(
        q, k, v, p, causal, scale=scale
    )[0],
    "efficient": lambda q, k, v, bias=None, p=0.0, causal=False, scale=None: (
        aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, p, causal, scale=scale)[0]
    ),
    "cudnn": lambda q, k, v, bias=None, p=0.0, causal=False, scale=None: aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, True, p, causal, scale=scale
    )[0],
    "math": lambda q, k, v, bias=None, p=0.0, causal=False, scale=None: aten._scaled_dot_product_attention_math(
        q, k, v, bias, p, causal, scale=scale, enable_gqa=True
    )[0],
}


class Recorder:
    """Keeps what FP32 makes of attention, forward and backward."""

    def __init__(self) -> None:
        self.shadows: dict[str, list[Tensor | None]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def __call__(self, event: OpEvent) -> list[Suspicion]:
        if "attention" in event.name:
            way = "backward" if event.name.endswith("backward") else "forward"
            self.outputs[way] = [value.tensor.clone() for value in event.outputs]
            self.shadows[way] = [None if value.shadow is None else value.shadow.clone() for value in event.outputs]
        return []


def tensors(shapes: list[Shape], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def examined(
    run: Callable[..., Tensor], shapes: list[Shape], dtype: torch.dtype
) -> tuple[Recorder, list[Tensor], list[Any]]:
    """A step through `run` under an examination; what it recorded, the numbers FP32 starts from, and all findings."""
    starts, recorder = tensors(shapes, dtype), Recorder()
    gradient = torch.ones(())
    with Examination(detectors=(recorder,)) as examination:
        leaves = [x.requires_grad_() for x in starts]
        out = run(*(x * 1.01 for x in leaves))  # rounded once, so that FP32 has other numbers
        (out.float().sin().sum() * gradient).backward()
    return recorder, [x.detach().float() * 1.01 for x in starts], examination.findings()


def expected(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients by autograd of the math form in FP32."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    return out.detach(), list(torch.autograd.grad(out.sin().sum(), leaves))


QUERIES: Shape = (2, 4, 9, 8)
CASES: dict[str, tuple[list[Shape], dict[str, Any]]] = {
    "plain": ([QUERIES] * 3, {}),
    "causal": ([QUERIES] * 3, {"causal": True}),
    "scale": ([QUERIES] * 3, {"scale": 0.7}),
    "other lengths and widths": ([QUERIES, (2, 4, 7, 8), (2, 4, 7, 6)], {}),
    "grouped queries": ([QUERIES, (2, 2, 7, 8), (2, 2, 7, 8)], {}),
    "bias": ([QUERIES] * 3, {"bias": True}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["cpu", "flash", "efficient", "cudnn"])
def test_the_shadow_of_fused_attention_is_the_math_form_in_fp32(kernel: str, case: str, dtype: torch.dtype) -> None:
    shapes, options = CASES[case]
    if (kernel, case) in (("flash", "bias"), ("cpu", "grouped queries"), ("cpu", "other lengths and widths")):
        pytest.skip("no such argument")
    if case == "bias":
        bias = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
        bias[..., 5:] = -torch.inf
        options = {"bias": bias}
    recorder, inputs, found = examined(lambda q, k, v: ATTENTION[kernel](q, k, v, **options), shapes, dtype)
    assert found == []
    wide = {name: value.float() if name == "bias" else value for name, value in options.items()}
    out, gradients = expected(lambda q, k, v: ATTENTION["math"](q, k, v, **wide), inputs)
    shadow = recorder.shadows["forward"][0]
    assert shadow is not None and not torch.equal(shadow, recorder.outputs["forward"][0].float())
    torch.testing.assert_close(shadow, out, rtol=1e-4, atol=1e-5)
    for got, want in zip(recorder.shadows["backward"], gradients, strict=False):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_bias_that_is_trained_gets_its_gradient_in_fp32() -> None:
    shapes = [QUERIES, QUERIES, QUERIES, (2, 4, 9, 9)]
    recorder, inputs, found = examined(ATTENTION["efficient"], shapes, torch.float16)
    assert found == []
    _, gradients = expected(ATTENTION["math"], inputs)
    assert len(recorder.shadows["backward"]) == 4
    got = recorder.shadows["backward"][3]
    assert got is not None
    torch.testing.assert_close(got, gradients[3], rtol=1e-3, atol=1e-4)


def test_rows_computed_some_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ATTENTION["efficient"](q, k, v, torch.zeros(1, 1, 9, 9).half(), causal=True)

    whole, _, _ = examined(run, [QUERIES] * 3, torch.float16)
    monkeypatch.setattr(attention, "_SCORES", 2 * 4 * 9 * 2)  # two rows
    parts, _, _ = examined(run, [QUERIES] * 3, torch.float16)
    for way in ("forward", "backward"):
        for a, b in zip(whole.shadows[way], parts.shadows[way], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_log_sum_exp_is_fp32s_in_whatever_layout() -> None:
    for kernel, shape in (("flash", (2, 4, 9)), ("cudnn", (2, 4, 9, 1)), ("efficient", (2, 4, 32)), ("cpu", (2, 4, 9))):
        recorder, (q, k, _), _ = examined(ATTENTION[kernel], [QUERIES] * 3, torch.bfloat16)
        shadow = recorder.shadows["forward"][1]
        assert shadow is not None and shadow.shape == shape
        got = shadow.reshape(2, 4, -1)[..., :9]
        torch.testing.assert_close(got, (q @ k.mT * 8**-0.5).logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_one_behind_the_other(causal: bool) -> None:
    """Of nested tensors: flash attention lines up the last query with the last key."""
    ends = [torch.tensor([0, 3, 10], dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._flash_attention_forward(q, k, v, *ends, 7, 7, 0.0, causal, False)[0]  # type: ignore[no-any-return]

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for (a, b), (c, d) in (((0, 3), (0, 5)), ((3, 10), (5, 12))):
            qs, ks, vs = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
            bias = torch.zeros(b - a, d - c).masked_fill(~diagonal(qs, ks, True), -torch.inf) if causal else None
            outs.append(ATTENTION["math"](qs, ks, vs, bias).transpose(1, 2)[0])
        return torch.cat(outs)

    recorder, inputs, found = examined(packed, [(10, 2, 8), (12, 2, 8), (12, 2, 8)], torch.float16)
    assert found == []
    out, gradients = expected(one_by_one, inputs)
    for got, want in zip(
        [recorder.shadows["forward"][0], *recorder.shadows["backward"]], [out, *gradients], strict=True
    ):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ dropout


@pytest.mark.parametrize("case", ["plain", "causal", "grouped queries"])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_dropout_of_the_shadow_has_the_mask_of_the_run(kernel: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "a_seed", lambda: torch.tensor(5))
    shapes, options = CASES[case]
    before = torch.get_rng_state()
    recorder, inputs, found = examined(
        lambda q, k, v: ATTENTION[kernel](q, k, v, p=0.3, **options), shapes, torch.bfloat16
    )
    assert found == []
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn for it
    mask = drawn(torch.tensor(5), (2, 4, 9, shapes[1][2]), 0.3)
    assert isinstance(mask, Tensor)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = bool(options.get("causal"))
        return aten._scaled_dot_product_attention_math(q, k, v, None, 0.3, causal, mask > 0, enable_gqa=True)[0]  # type: ignore[no-any-return]

    out, gradients = expected(run, inputs)
    for got, want in zip(
        [recorder.shadows["forward"][0], *recorder.shadows["backward"]], [out, *gradients], strict=True
    ):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_mask_that_does_not_give_the_runs_output_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose backward pass draws otherwise: the shadow ends there, which is said, and nothing else is."""
    drew = drawn
    shifted = iter(range(1000))
    monkeypatch.setitem(globals(), "drawn", lambda seed, shape, p: drew(seed + next(shifted), shape, p))
    recorder, _, found = examined(lambda q, k, v: ATTENTION["flash"](q, k, v, p=0.3), [QUERIES] * 3, torch.bfloat16)
    assert recorder.shadows["forward"][0] is None
    assert {f.code for f in found} == {"HS507"}
    assert "could not be recovered from its seed" in found[0].what


def test_what_is_not_written_out_is_said() -> None:
    def run() -> Tensor:
        q = torch.randn(6, 2, 8).half() * 1.01
        ends = torch.tensor([0, 6], dtype=torch.int32)
        slopes = torch.ones(2)
        out = aten._flash_attention_forward(q, q, q, ends, ends, 6, 6, 0.0, False, False, alibi_slopes=slopes)[0]
        return out.float().sum()  # type: ignore[no-any-return]

    found = examine(run)
    assert [(f.code, f.severity) for f in found] == [("HS507", Severity.NOTE)]
    assert "attention with alibi_slopes" in found[0].what


# ------------------------------------------------------------------ findings


class Transformer(nn.Module):
    """One block, whose attention is the kernel asked for."""

    def __init__(self, kernel: str, shrink: float = 1.0) -> None:
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 8)
        self.kernel, self.shrink = kernel, shrink

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2).contiguous() for y in self.qkv(x).chunk(3, -1))
        v = v * self.shrink
        y = ATTENTION[self.kernel](q, k, v, causal=True) / self.shrink
        return x + self.leave(y.transpose(1, 2).flatten(2)).repeat(1, 1, 4)


def codes(
    kernel: str, dtype: torch.dtype, shrink: float, device: str = "cpu"
) -> list[tuple[str, str | None, int | None]]:
    torch.manual_seed(0)
    model = Fused("", shrink) if kernel == "sdpa" else Transformer(kernel, shrink)
    model, x = model.to(device), torch.randn(3, 7, 8).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(device, dtype):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()

    examined = examine(step, device_type=device)
    found = [f for f in examined if f.severity > Severity.NOTE or f.code in ("HS506", "HS507")]
    return [(f.code, f.place and f.place.op, f.place and f.place.line) for f in found]  # type: ignore[misc]  # None and None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kernel", ["cpu", "flash", "efficient", "cudnn", "math"])
def test_a_clean_transformer_has_no_findings(kernel: str, dtype: torch.dtype) -> None:
    assert codes(kernel, dtype, 1.0) == []


@pytest.mark.parametrize("kernel", ["cpu", "flash", "efficient", "cudnn"])
def test_what_is_lost_before_fused_attention_is_found_behind_it(kernel: str) -> None:
    """Values that flush to zero in fp16: they reach the loss through attention, whichever kernel computes it."""
    line = Transformer.forward.__code__.co_firstlineno + 3
    found = codes(kernel, torch.float16, 1e-9)
    assert ("HS106", "mul", line) in found
    assert set(found) == set(codes("math", torch.float16, 1e-9))


def test_a_score_that_overflows_on_the_way_is_told_from_one_that_does_not() -> None:
    """HS101 asks what the op gives in FP32 on the run's own inputs."""
    q = torch.full((1, 1, 4, 8), 60000.0).half()

    def run() -> Tensor:
        out = aten._scaled_dot_product_flash_attention(q * 0.001, q * 0.001, q * 1.09)[0]
        return (out * 0 + aten._scaled_dot_product_flash_attention(q, q, q)[0] * 2).float().sum()  # type: ignore[no-any-return]

    assert "HS101" in [f.code for f in examine(run)]


# ------------------------------------------------------------------ the kernels of a GPU

on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKENDS |= {"cudnn": SDPBackend.CUDNN_ATTENTION}


def attends(kernel: str, q: Tensor, k: Tensor, v: Tensor, p: float, causal: bool) -> Tensor:
    try:
        with sdpa_kernel(BACKENDS[kernel]):
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
    except RuntimeError as error:
        if "No available kernel" in str(error):
            pytest.skip(f"no {kernel} attention here")
        raise


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kernel", BACKENDS)
@pytest.mark.filterwarnings("ignore")  # of PyTorch, why it does not take the other kernels
def test_the_kernels_of_a_device_are_followed(kernel: str, dropout: float) -> None:
    recorder = Recorder()
    leaves = [torch.randn(2, 4, 200, 64, device="cuda").half().requires_grad_() for _ in range(3)]
    with Examination(detectors=(recorder,)) as examination:
        out = attends(kernel, *(x * 1.01 for x in leaves), dropout, True)
        out.float().sin().sum().backward()
    told = [f.what for f in examination.findings()]
    if kernel == "cudnn" and dropout and told:
        pytest.skip(f"cuDNN's dropout: {told[0]}")
    assert told == []
    for way in ("forward", "backward"):
        for got, shadow in list(zip(recorder.outputs[way], recorder.shadows[way], strict=True))[
            : 1 if way == "forward" else 3
        ]:
            assert shadow is not None
            assert (got.float() - shadow).norm() < 0.01 * shadow.norm()
    if not dropout:
        wide = [(x.detach().float() * 1.01).requires_grad_() for x in leaves]
        math = nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
        shadow = recorder.shadows["forward"][0]
        assert shadow is not None
        torch.testing.assert_close(shadow, math.detach(), rtol=1e-3, atol=1e-4)


class Fused(Transformer):
    """The same block through PyTorch's own choice of a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2).contiguous() for y in self.qkv(x).chunk(3, -1))
        v = v * self.shrink
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) / self.shrink
        return x + self.leave(y.transpose(1, 2).flatten(2)).repeat(1, 1, 4)


@pytest.mark.gpu
@on_device
def test_findings_on_a_device_are_those_of_the_cpu() -> None:
    line = Fused.forward.__code__.co_firstlineno + 3
    for device in ("cpu", "cuda"):
        assert codes("sdpa", torch.float16, 1.0, device) == []
        found = codes("sdpa", torch.float16, 1e-9, device)
        assert ("HS106", "mul", line) in found
        assert "HS507" not in {code for code, _, _ in found}

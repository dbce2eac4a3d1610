"""Fused attention in FP32: the same function of the same arguments, written out.

The fused kernels of a GPU are made for 16 bits and refuse float32, so that running one again on shadows, as the doctor
does with any other op, would end the shadow at every transformer block. What they compute is known::

    P = softmax(scale Q Kᵀ + bias, where the mask allows)        lse = log of the softmax's denominator
    W = P ∘ kept / (1 - p)                                       out = W V

    dV = Wᵀ dO        dW = dO Vᵀ        dP = dW ∘ kept / (1 - p)
    dS = P ∘ (dP - rowsum(dP ∘ P))      dQ = scale dS K          dK = scale dSᵀ Q        dbias = dS

(Dao et al. 2022, "FlashAttention", algorithm 4, without the tiling; PyTorch's ``_scaled_dot_product_attention_math``.)
The backward kernels take the output and its log-sum-exp from the forward pass; here both follow from the shadows. Rows
are computed some at a time, so that the matrix of scores, which the fused kernels never hold, stays small.

Dropout: the kernel draws its mask inside, from a seed and an offset that it returns, and only itself knows how. But its
backward kernel draws the same mask again. With Q = K = 0 and lse = 0 every P is 1, and for a dO that is 1 in row i and
column i, dV holds row i of the mask in column i: as many rows at a time as there are columns. The mask is used only if
the run's own inputs give the run's own output with it.

Of keys and values with fewer heads than the queries (grouped queries) each serves the next few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from halfstep.doctor.shadow import named, widened

_BY_HEADS = (  # (batch, heads, length, width)
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
#: (batch, length, heads, width), or sequences one behind the other: (tokens, heads, width).
_BY_TOKENS = ("_flash_attention", "_efficient_attention")
_FUSED = frozenset(
    f"aten::{name}"
    for name in (
        *_BY_HEADS,
        *(f"{name}_backward" for name in _BY_HEADS),
        *(f"{name}_{way}" for name in _BY_TOKENS for way in ("forward", "backward")),
    )
)
#: Arguments that change what is computed in ways not written out here.
_UNKNOWN = ("q_descale", "alibi_slopes", "seqused_k", "block_table", "seqlen_k", "window_size")

#: Scores held at a time: 256 MiB of float32.
_SCORES = 1 << 26
#: How far, by norms, an output may be from the one that the recovered dropout mask gives: 16 bits are 2**-8 off.
_CLOSE = 2.0**-4

#: What stands for a tensor in FP32.
Replace = Callable[[Tensor], Tensor]


def is_fused(func: Any) -> bool:
    """Whether an op is a fused attention kernel, forward or backward."""
    return func._schema.name in _FUSED


def in_fp32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, replace: Replace) -> tuple[Any, ...]:
    """What a fused attention kernel would return in FP32.

    Args:
        func: an op of which `is_fused` is true, with its arguments.
        result: what it returned. Seeds and lengths are taken from there, and a log-sum-exp of an unknown layout. None:
            only the floating results are wanted.
        replace: the float32 tensor to compute with in the place of a floating argument.

    Raises:
        NotImplementedError: an argument asks for what is not written out here, or a dropout mask cannot be recovered.
    """
    given = _given(func, args, kwargs)
    asked = [name for name in _UNKNOWN if given.get(name) is not None]
    if asked:
        raise NotImplementedError(f"attention with {' and '.join(asked)}")
    is_backward = func._schema.name.endswith("backward")
    dropout = float(given["dropout_p"])
    kept = _kept(func, given, result) if dropout > 0 else None
    calls = _calls(func, given, replace, kept)
    if is_backward:
        gradient = _by_heads(func, replace(given["grad_out" if "grad_out" in given else "grad_out_"]).float())
        wants_bias = _returned(result, 3) is not None
        found = _gradients(func, given, calls, gradient, wants_bias)
    else:
        found = _outputs(func, given, calls, _returned(result, 1))
    if result is None:
        return tuple(found)
    return tuple(
        fp32 if isinstance(value, Tensor) and fp32 is not None else value
        for value, fp32 in zip_longest(result, found[: len(result)])
    )


def _returned(result: Any, position: int) -> Tensor | None:
    value = result[position] if result is not None and len(result) > position else None
    return value if isinstance(value, Tensor) else None


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, left-out ones with their defaults."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return defaults | {argument.name: value for argument, value in named(func, args, kwargs)}


# ------------------------------------------------------------------ the function


@dataclass(frozen=True)
class _Call:
    """Attention of one batch.

    Attributes:
        query, key, value: float32, (batch, heads, length, width); the heads of keys and values divide the queries'.
        bias: added to the scores, or bool, true where they count; four dimensions, broadcast.
        lowest, highest: a query sees the keys from so many behind it up to so many ahead; None: all.
        kept: bool, (batch, heads, queries, keys), false where dropout put a zero.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    lowest: int | None
    highest: int | None
    scale: float
    dropout: float
    kept: Tensor | None

    def rows(self) -> Iterator[slice]:
        """The queries, some at a time."""
        batch, heads, length, _ = self.query.shape
        at_once = max(1, _SCORES // max(1, batch * heads * self.key.size(2)))
        for start in range(0, length, at_once):
            yield slice(start, min(start + at_once, length))

    def probabilities(self, rows: slice) -> tuple[Tensor, Tensor]:
        """P and the log-sum-exp of some rows. A row that may look at nothing is all zeros, as in the kernels."""
        key = _repeated(self.key, self.query)
        scores = self.query[:, :, rows] @ key.transpose(-1, -2) * self.scale
        if self.bias is not None:
            bias = self.bias[:, :, rows] if self.bias.size(2) > 1 else self.bias
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else scores + bias
        if self.lowest is not None or self.highest is not None:
            queries = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=scores.device)
            ahead = torch.arange(key.size(2), dtype=torch.int64, device=scores.device) - queries[:, None]
            if self.lowest is not None:
                scores = scores.masked_fill(ahead < self.lowest, -torch.inf)
            if self.highest is not None:
                scores = scores.masked_fill(ahead > self.highest, -torch.inf)
        log_sum = torch.logsumexp(scores, -1)
        return scores.softmax(-1).masked_fill_((log_sum == -torch.inf)[..., None], 0.0), log_sum

    def dropped(self, weights: Tensor, rows: slice) -> Tensor:
        """Dropout of some rows."""
        if self.kept is None:
            return weights
        return weights * self.kept[:, :, rows] * (1.0 / (1.0 - self.dropout) if self.dropout < 1 else 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output, (batch, heads, queries, width), and the log-sum-exp, (batch, heads, queries)."""
        value = _repeated(self.value, self.query)
        out = self.query.new_empty((*self.query.shape[:3], value.size(3)))
        log_sum = self.query.new_empty(self.query.shape[:3])
        for rows in self.rows():
            weights, log_sum[:, :, rows] = self.probabilities(rows)
            out[:, :, rows] = self.dropped(weights, rows) @ value
        return out, log_sum

    def backward(self, gradient: Tensor, wants_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of queries, keys, values and the bias for that of the output."""
        key, value = _repeated(self.key, self.query), _repeated(self.value, self.query)
        of_query, of_key, of_value = torch.empty_like(self.query), torch.zeros_like(key), torch.zeros_like(value)
        of_bias = self.query.new_empty((*self.query.shape[:3], key.size(2))) if wants_bias else None
        for rows in self.rows():
            weights, _ = self.probabilities(rows)
            of_value += self.dropped(weights, rows).transpose(-1, -2) @ gradient[:, :, rows]
            of_weights = self.dropped(gradient[:, :, rows] @ value.transpose(-1, -2), rows)
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
            of_query[:, :, rows] = of_scores @ key * self.scale
            of_key += of_scores.transpose(-1, -2) @ self.query[:, :, rows] * self.scale
            if of_bias is not None:
                of_bias[:, :, rows] = of_scores
        if of_bias is not None and self.bias is not None:
            of_bias = of_bias.sum_to_size(self.bias.shape)
        return of_query, _gathered(of_key, self.key), _gathered(of_value, self.value), of_bias


def _repeated(few: Tensor, query: Tensor) -> Tensor:
    """Keys or values for each head of the queries."""
    groups = query.size(1) // max(1, few.size(1))
    return few if groups == 1 else few.repeat_interleave(groups, 1)


def _gathered(gradient: Tensor, few: Tensor) -> Tensor:
    """The gradient of what `_repeated` repeated."""
    if gradient.size(1) == few.size(1):
        return gradient
    return gradient.reshape(few.size(0), few.size(1), -1, *few.shape[2:]).sum(2)


# ------------------------------------------------------------------ the kernels' arguments and results


def _by_heads(func: Any, tensor: Tensor) -> Tensor:
    """(batch, heads, length, width), whatever the kernel's layout; of sequences in a row, the batch is one."""
    if func._schema.name.startswith("aten::_scaled_dot_product"):
        return tensor
    return (tensor[None] if tensor.dim() == 3 else tensor).transpose(1, 2)


def _as_kernel(func: Any, tensor: Tensor, like: Tensor) -> Tensor:
    """Back into the kernel's layout."""
    if func._schema.name.startswith("aten::_scaled_dot_product"):
        return tensor
    return tensor.transpose(1, 2).reshape(*like.shape[:-1], tensor.size(3))


def _calls(func: Any, given: dict[str, Any], replace: Replace, kept: Tensor | None) -> list[tuple[slice, slice, _Call]]:
    """The batch, or the sequences in it one by one, each with its queries and its keys among all of them."""
    query, key, value = (_by_heads(func, replace(given[name]).float()) for name in ("query", "key", "value"))
    bias = next((given[name] for name in ("attn_bias", "attn_mask", "bias") if given.get(name) is not None), None)
    if bias is not None:
        bias = bias if bias.dtype is torch.bool else replace(bias).float()
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    scale = given["scale"] if given.get("scale") is not None else query.size(3) ** -0.5
    calls = []
    for queries, keys in _sequences(given, query.size(2), key.size(2)):
        part = (query[:, :, queries], key[:, :, keys], value[:, :, keys])
        band = _band(func, given, part[1].size(2) - part[0].size(2))
        calls.append((queries, keys, _Call(*part, bias, *band, float(scale), float(given["dropout_p"]), kept)))
    return calls


def _sequences(given: dict[str, Any], queries: int, keys: int) -> list[tuple[slice, slice]]:
    ends = [given.get(f"cum_seq_{of}", given.get(f"cu_seqlens_{of}")) for of in "qk"]
    if ends[0] is None or ends[1] is None:
        return [(slice(0, queries), slice(0, keys))]
    pairs = zip(pairwise(ends[0].tolist()), pairwise(ends[1].tolist()), strict=True)
    return [(slice(*one), slice(*other)) for one, other in pairs]


def _band(func: Any, given: dict[str, Any], ahead: int) -> tuple[int | None, int | None]:
    """How far a query may look back and ahead. Flash attention lines up the last query with the last key, the others
    the first with the first."""
    name = func._schema.name
    is_flash = "flash" in name and not name.removesuffix("_backward").endswith("for_cpu")
    kind = int(given.get("custom_mask_type") or 0)  # of efficient attention: 1 first with first, 2 last with last
    last = ahead if is_flash or kind == 2 else 0
    left, right = (given.get(f"window_size_{side}") for side in ("left", "right"))
    lowest = None if left is None or left < 0 else last - int(left)
    highest = None if right is None or right < 0 else last + int(right)
    if given.get("is_causal") or kind:
        highest = last if highest is None else min(highest, last)
    return lowest, highest


def _outputs(
    func: Any, given: dict[str, Any], calls: Sequence[tuple[slice, slice, _Call]], log_sum_there: Tensor | None
) -> list[Tensor | None]:
    computed = [call.forward() for _, _, call in calls]
    out = torch.cat([out for out, _ in computed], 2)
    log_sum = _fitted(torch.cat([log_sum for _, log_sum in computed], 2), log_sum_there)
    return [_as_kernel(func, out, given["query"]), log_sum]


def _fitted(log_sum: Tensor, there: Tensor | None) -> Tensor | None:
    """The log-sum-exp in the kernel's layout; None where that is not known, or where it was not asked for."""
    if there is None or there.numel() == log_sum.numel():
        return log_sum if there is None else log_sum.reshape(there.shape)
    if there.dim() == 3 and there.shape[:2] == log_sum.shape[:2] and there.size(2) > log_sum.size(2):
        padded = there.detach().to(torch.float32, copy=True)  # rows up to a multiple of the kernel's block
        padded[..., : log_sum.size(2)] = log_sum
        return padded
    return None


def _gradients(
    func: Any,
    given: dict[str, Any],
    calls: Sequence[tuple[slice, slice, _Call]],
    gradient: Tensor,
    wants_bias: bool,
) -> list[Tensor | None]:
    computed = [call.backward(gradient[:, :, queries], wants_bias) for queries, _, call in calls]
    of_query, of_key, of_value = (torch.cat([found[i] for found in computed], 2) for i in range(3))  # type: ignore[misc]  # only the fourth may be None
    tensors = (given["query"], given["key"], given["value"])
    found = [_as_kernel(func, x, like) for x, like in zip((of_query, of_key, of_value), tensors, strict=True)]
    of_bias = computed[0][3] if len(computed) == 1 else None
    bias = next((given[name] for name in ("attn_bias", "bias") if given.get(name) is not None), None)
    return [*found, of_bias if bias is None or of_bias is None else of_bias.reshape(bias.shape)]


# ------------------------------------------------------------------ dropout


def _kept(func: Any, given: dict[str, Any], result: Any) -> Tensor:
    """What dropout kept, (batch, heads, queries, keys), asked of the backward kernel; see the module."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_backward")
    known = dict(given)
    if not func._schema.name.endswith("backward"):
        if result is None:
            raise NotImplementedError("attention with dropout, without its seed")
        known |= {returned.name: value for returned, value in zip(func._schema.returns, result, strict=True)}
        known["out"], known["logsumexp"] = result[0], result[1]
    if name not in _BY_HEADS or "logsumexp" not in known:
        raise NotImplementedError(f"dropout inside of {name}")
    known.setdefault("philox_seed", known.get("rng_state"))
    known.setdefault("philox_offset", known.get("unused"))
    kept = _probed(getattr(torch.ops.aten, f"{name}_backward").default, known)
    ((_, _, call),) = _calls(func, given, widened, kept)
    out, own = call.forward()[0], known["out"].detach().float()
    error = torch.where(own.isfinite(), own - out, 0.0)
    if float(torch.linalg.vector_norm(error)) > _CLOSE * float(torch.linalg.vector_norm(out)):
        raise NotImplementedError(f"the mask that {name} dropped by: it could not be recovered from its seed")
    return kept


def _probed(backward: Any, known: dict[str, Any]) -> Tensor:
    query, key, value = known["query"], known["key"], known["value"]
    batch, heads, queries, width = query.shape
    keys, columns = key.size(2), value.size(3)
    log_sum = known["logsumexp"].detach().clone()
    (log_sum[..., :queries] if log_sum.dim() == 3 else log_sum).zero_()  # but for the inf that pads it
    zeros = {
        "query": torch.zeros_like(query),
        "key": key.new_zeros((batch, heads, keys, width)),
        "value": value.new_zeros((batch, heads, keys, columns)),
        "out": torch.zeros_like(known["out"]),
        "logsumexp": log_sum,
        "attn_bias": None,
        "grad_input_mask": [True, True, True, False],
    }
    kept = torch.empty((batch, heads, queries, keys), dtype=torch.bool, device=query.device)
    for start in range(0, queries, columns):
        rows = min(columns, queries - start)
        one_each = torch.zeros_like(known["out"])
        one_each[:, :, start : start + rows].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        values = known | zeros | {"grad_out": one_each, "grad_out_": one_each}
        arguments = {argument.name: values[argument.name] for argument in backward._schema.arguments}
        of_value = backward(**arguments)[2]
        kept[:, :, start : start + rows] = of_value.transpose(-1, -2)[:, :, :rows] != 0
    return kept

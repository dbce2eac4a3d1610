"""Which op ran in which format, and where: what autocast did, seen in one forward pass.

A dispatch mode sees every op below autocast, with the dtypes that it really computes in, islands, rules and op lists
included; emulated ops are named so. Views and other ops that compute nothing are left out. Casts are listed as ``cast``
with both formats: a module with many of them pays for its mixture.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfstep.autocast import emulate
from halfstep.autocast.buffers import BufferSnapshot

if TYPE_CHECKING:
    from rich.table import Table

_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_EMULATED = {**_FORMATS, torch.float8_e4m3fn: "fp8"}
_CASTS = ("_to_copy", "_autocast_to_reduced_precision", "_autocast_to_full_precision")
_NO_ARITHMETIC = ("empty", "empty_like", "empty_strided", "new_empty", "clone", "copy_", "lift_fresh", "detach")


@dataclass(frozen=True)
class OpUse:
    """One op in one module."""

    op: str  #: PyTorch's name, or "cast"
    format: str  #: of its result: fp32, bf16, fp16, fp64; "… emulated"; for a cast "fp32 → bf16"
    count: int
    module: str  #: path of the innermost module it ran in; empty: in the model itself


@dataclass(frozen=True)
class Explanation:
    """Op × format × count × module of one forward pass; ``str`` and rich print it as a table."""

    policy: str
    uses: tuple[OpUse, ...]  #: in the order of their first run

    def formats(self, op: str) -> dict[str, int]:
        """How often ``op`` ran in each format, over all modules."""
        counts: Counter[str] = Counter()
        for use in self.uses:
            if use.op == op:
                counts[use.format] += use.count
        return dict(counts)

    def __str__(self) -> str:
        rows = [("module", "op", "format", "count"), *((u.module, u.op, u.format, str(u.count)) for u in self.uses)]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{m:{widths[0]}}  {o:{widths[1]}}  {f:{widths[2]}}  {c:>{widths[3]}}".rstrip() for m, o, f, c in rows]
        return "\n".join([f"One forward pass under {self.policy}", "", *lines])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"One forward pass under {self.policy}")
        for name in ("module", "op", "format"):
            table.add_column(name)
        table.add_column("count", justify="right")
        for use in self.uses:
            table.add_row(Text(use.module), Text(use.op), Text(use.format), str(use.count))
        return table


def explain(model: nn.Module, run: Callable[[], Any], policy: str) -> Explanation:
    """Call ``run``, a forward pass of ``model``, without gradients, and tell what ran.

    Leaves no trace: buffers and random number generators (Python's, NumPy's, PyTorch's) are put back.
    """
    seen = _Seen()
    with _untouched(model), _module_paths(model, seen), torch.no_grad(), seen:
        run()
    return Explanation(policy, tuple(OpUse(op, form, count, path) for (path, op, form), count in seen.counts.items()))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.path = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if emulate.is_unlisted():
            return result
        name = func.__name__.partition(".")[0]
        ins, outs = _formats((args, kwargs)), _formats(result)
        emulated = emulate.format_now()
        if name in _CASTS:
            if ins and outs and ins[0] != outs[0] and emulated is None:
                self.counts[self.path[-1], "cast", f"{ins[0]} → {outs[0]}"] += 1
        elif not (_is_view(func) or name in _NO_ARITHMETIC) and (outs or ins):
            form = (outs or ins)[0] if emulated is None else f"{_EMULATED[emulated]} emulated"
            self.counts[self.path[-1], name.removeprefix("_"), form] += 1
        return result


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _formats(values: Any) -> list[str]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return [_FORMATS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")) for tensor in tensors]


@contextmanager
def _module_paths(model: nn.Module, seen: _Seen) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}
    enter = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: seen.path.append(names.get(module, seen.path[-1]))
    )
    leave = nn.modules.module.register_module_forward_hook(
        lambda module, _, __: (seen.path.pop(), None)[1], always_call=True
    )
    try:
        yield
    finally:
        enter.remove()
        leave.remove()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    buffers, numpy = BufferSnapshot(), sys.modules.get("numpy")
    buffers.keep(model)
    devices = sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        # Values come back, so their versions do: whoever keeps buffers would take another for a load.
        with _unsafe_preserve_version_counter(tuple(model.buffers())), torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        buffers.restore()

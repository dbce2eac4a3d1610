"""`SplitTensor`: a float32 tensor to everybody, two 16-bit planes in memory.

What asks for the tensor's dtype, values, gradient or version, and what writes to it (in place, through views, through
``.data``), meets the FP32 tensor. Only two things see more: autocast's cast to 16 bits is the upper plane itself, no
copy and no time; and the kernels of `halfstep.optim` step both planes in one pass. For an op that PyTorch dispatches:

    autocast's cast to its format      the upper plane
    a view (transpose, slice, detach)  the same view of both planes: what is written to it arrives
    a lookup in an embedding           rows of both planes, joined
    zeros_like and its kin             by shape alone
    all else                           on the joined tensor; what it wrote is split again, in place

A *copy* (clone, deepcopy, pickle, what an op returns) is a plain FP32 tensor: it loads without halfstep.

What wants memory itself (``data_ptr``, ``untyped_storage``, ``share_memory_``, a view as another dtype, ``.data`` set
to a piece of a larger tensor) cannot be served by a tensor without storage. A parameter then becomes a plain FP32
parameter, the same object, for good (`make_plain`; `on_plain` is told); another tensor, such as an entry of a state
dict, becomes a plain snapshot.

Modelled on PyTorch's traceable wrapper subclasses (``torch/testing/_internal/two_tensor.py``).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from halfstep.split.planes import join, split

aten = torch.ops.aten
Op = Any  # torch._ops.OpOverload, whose stubs say little
Handler = Callable[..., Any]


class SplitTensor(Tensor):
    """See the module. Make one with `SplitTensor.of`; `halfstep.split.store` puts them into a model."""

    hi: Tensor  #: bfloat16 or float16: the nearest to each element
    lo: Tensor  #: int16: what is missing to the element's bits
    notes: dict[str, Any]  #: where others may keep what they derive from the planes

    @staticmethod
    def __new__(cls, hi: Tensor, lo: Tensor) -> SplitTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            hi.shape,
            strides=hi.stride(),
            storage_offset=hi.storage_offset(),
            dtype=torch.float32,
            layout=hi.layout,
            device=hi.device,
        )

    def __init__(self, hi: Tensor, lo: Tensor) -> None:
        self.hi, self.lo, self.notes = hi, lo, {}

    @classmethod
    def of(cls, x: Tensor, upper: torch.dtype = torch.bfloat16) -> SplitTensor:
        """A new tensor with the values of a float32 one; its upper plane is bfloat16 or float16."""
        return cls(*split(x, upper))

    def joined(self) -> Tensor:
        """The values as a new plain float32 tensor, outside of any graph."""
        x = join(self.hi, self.lo)
        for told in on_temporary:
            told(x)
        return x

    def write(self, x: Tensor) -> None:
        """Put the values of a float32 tensor of this shape in place of these."""
        hi, lo = split(x, self.hi.dtype)
        for told in on_temporary:
            told(hi)
            told(lo)
        with _versions_counted():
            self.hi.copy_(hi)
            self.lo.copy_(lo)

    # Subclass protocols of PyTorch -----------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["hi", "lo"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> SplitTensor:
        return SplitTensor(inner["hi"], inner["lo"])

    def __repr__(self) -> str:  # type: ignore[override]
        inner = self.joined()
        return repr(nn.Parameter(inner, self.requires_grad) if isinstance(self, nn.Parameter) else inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._copy()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copy().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's own method

    def _copy(self) -> Tensor:
        """A plain tensor with these values; a parameter where this is one."""
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors can be copied deeply or pickled; detach() this one first")
        plain = self.joined()
        return nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _FUNCTIONS.get(function)
        if special is not None:
            return special(function, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, op: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # declared as a builtin
        kwargs = kwargs or {}
        handler = _OPS.get(op)
        if handler is not None:
            result = handler(op, args, kwargs)
            if result is not NotImplemented:
                return result
        if _is_made_of_others(op):  # under inference_mode PyTorch leaves it to us to take them apart
            return op.decompose(*args, **kwargs)
        if _is_view(op) and isinstance(args[0], SplitTensor):
            return _viewed(op, args, kwargs)
        name = op._schema.name
        if name.startswith(("aten::_foreach_", "aten::_fused_")):
            return _one_by_one(op, args, kwargs)
        return _on_joined(op, args, kwargs)


# Ops ------------------------------------------------------------------------------------------------------------------


def _on_joined(op: Op, args: Any, kwargs: Any) -> Any:
    """Any op: on plain tensors, and what it wrote split again."""
    plain: dict[int, tuple[SplitTensor, Tensor]] = {}

    def unwrap(value: Any) -> Any:
        if not isinstance(value, SplitTensor):
            return value
        if id(value) not in plain:
            plain[id(value)] = value, value.joined()
        return plain[id(value)][1]

    plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    result = op(*plain_args, **plain_kwargs)
    if op.namespace == "c10d":
        _take_from_collective(result, plain.values())
    if not op._schema.is_mutable:
        return result
    if op.namespace == "_c10d_functional":
        for _, tensor in plain.values():
            torch.ops._c10d_functional.wait_tensor(tensor)
    for argument, value in _arguments(op, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for written in value if isinstance(value, list | tuple) else [value]:
                if isinstance(written, SplitTensor):
                    written.write(plain[id(written)][1])
                    if isinstance(value, list | tuple):  # of tensors in lists PyTorch leaves that to the kernel
                        torch.autograd.graph.increment_version(written)
    back = {id(tensor): wrapper for wrapper, tensor in plain.values()}
    return tree_map(lambda value: back.get(id(value), value) if isinstance(value, Tensor) else value, result)


def _take_from_collective(result: Any, plain: Iterable[tuple[SplitTensor, Tensor]]) -> None:
    """What ``dist.broadcast(x)`` and its kin wrote: schemas do not name it, and it is there only after their Work."""
    for value in result if isinstance(result, list | tuple) else [result]:
        if isinstance(value, torch.ScriptObject):  # the Work
            value.wait()  # type: ignore[attr-defined]  # a method of the class registered by torch.distributed
    for wrapper, tensor in plain:
        if not torch.equal(wrapper.joined(), tensor):  # what was only read keeps its version
            wrapper.write(tensor)


def _one_by_one(op: Op, args: Any, kwargs: Any) -> Any:
    """An op on lists of tensors, element by element: no more than one of them is joined at a time."""
    lists = [value for value in (*args, *kwargs.values()) if _is_list_with_split(value)]
    count = max(len(value) for value in lists)
    if count == 1:
        return _on_joined(op, args, kwargs)

    def at(index: int) -> Callable[[Any], Any]:
        return lambda value: [value[index]] if isinstance(value, list | tuple) and len(value) == count else value

    results = []
    for index in range(count):
        pick = at(index)
        one = [pick(value) for value in args], {name: pick(value) for name, value in kwargs.items()}
        has_split = any(_is_list_with_split(value) for value in (*one[0], *one[1].values()))
        results.append(_on_joined(op, *one) if has_split else op(*one[0], **one[1]))
    if results[0] is None:
        return None
    return [result[0] for result in results]


def _is_list_with_split(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, SplitTensor) for item in value)


def _viewed(op: Op, args: Any, kwargs: Any) -> Any:
    """A view op, on both planes."""
    of = args[0]
    if torch.is_inference_mode_enabled() and not of.is_inference():
        with torch.inference_mode(False):  # no tensor of that mode can be a view of one that is not
            return _viewed(op, args, kwargs)
    hi, lo = op(of.hi, *args[1:], **kwargs), op(of.lo, *args[1:], **kwargs)
    if isinstance(hi, Tensor):
        return SplitTensor(hi, lo)
    return type(hi)(SplitTensor(h, low) for h, low in zip(hi, lo, strict=True))


def _arguments(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(op._schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


_composite: dict[Op, bool] = {}


def _is_made_of_others(op: Op) -> bool:
    """Whether an op has no kernel of its own; its schema says only that it may return a view (``to``, ``reshape``)."""
    known = _composite.get(op)
    if known is None:
        known = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        _composite[op] = known
    return known


_views: dict[Op, bool] = {}


def _is_view(op: Op) -> bool:
    known = _views.get(op)
    if known is None:
        schema = op._schema
        shares = [result.alias_info is not None and not result.alias_info.is_write for result in schema.returns]
        known = _views[op] = bool(shares) and all(shares) and not schema.is_mutable
    return known


def _cast(op: Op, args: Any, kwargs: Any) -> Any:
    """``x.to(dtype)``: the upper plane where it has that type; the plane itself for autocast, which only reads it."""
    x = args[0]
    others = {name: value for name, value in kwargs.items() if name != "dtype" and value not in (None, False)}
    if others.pop("device", x.device) != x.device or others or not isinstance(x, SplitTensor):
        return NotImplemented
    if kwargs.get("dtype") is not x.hi.dtype:
        return NotImplemented
    if not _casts_for_autocast():
        return x.hi.clone()
    with _versions_counted():  # a backward pass that saved it must see that the weight was written meanwhile
        return x.hi.detach()


def _versions_counted() -> Any:
    """Where PyTorch has switched off for us what shares and moves version counters: on again."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


def _casts_for_autocast() -> bool:
    """Whether autocast asks, and not a script that may write to what it gets."""
    if _user.casting:
        return False
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting() > 0


def _embedding(op: Op, args: Any, kwargs: Any) -> Any:
    """Rows of both planes: no FP32 table."""
    weight, index = args[0], args[1]
    if not isinstance(weight, SplitTensor) or isinstance(index, SplitTensor):
        return NotImplemented
    return join(op(weight.hi, index), op(weight.lo, index))


def _by_shape(op: Op, args: Any, kwargs: Any) -> Any:
    """``zeros_like`` and its kin: only shape, strides and device of the tensor count."""
    if not isinstance(args[0], SplitTensor):
        return NotImplemented
    kwargs = {**kwargs, "dtype": torch.float32 if kwargs.get("dtype") is None else kwargs["dtype"]}
    return op(args[0].hi, *args[1:], **kwargs)


def _copy(op: Op, args: Any, kwargs: Any) -> Any:
    """``x.copy_(y)``: planes from planes where both have them."""
    into, source = args[0], args[1]
    if isinstance(into, SplitTensor) and isinstance(source, SplitTensor) and into.hi.dtype is source.hi.dtype:
        with _versions_counted():
            into.hi.copy_(source.hi)
            into.lo.copy_(source.lo)
        return into
    if not isinstance(into, SplitTensor):
        return NotImplemented
    if isinstance(source, SplitTensor):
        source = source.joined()
    into.write(source.to(torch.float32).expand(into.shape) if source.shape != into.shape else source.float())
    return into


def _zero(op: Op, args: Any, kwargs: Any) -> Any:
    with _versions_counted():
        args[0].hi.zero_()
        args[0].lo.zero_()
    return args[0]


#: Ops that do not go the usual way; `register` adds to them.
_OPS: dict[Op, Handler] = {
    aten._to_copy.default: _cast,
    aten.embedding.default: _embedding,
    aten.copy_.default: _copy,
    aten.zero_.default: _zero,
    **dict.fromkeys(
        (
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.empty_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.new_zeros.default,
            aten.new_ones.default,
            aten.new_empty.default,
            aten.new_full.default,
            aten.new_empty_strided.default,
        ),
        _by_shape,
    ),
}


def register(op: Op, handler: Handler) -> None:
    """Let ``handler(op, args, kwargs)`` do an op that meets split tensors; it returns NotImplemented to leave it."""
    _OPS[op] = handler


# Functions ------------------------------------------------------------------------------------------------------------


class _User(threading.local):
    casting = False  # a script's own cast is under way, not autocast's


_user = _User()

#: Told, with the parameter and why, when a parameter becomes plain.
on_plain: list[Callable[[Tensor, str], None]] = []

#: Told of each tensor that is made for the time of one op, which dispatch modes do not see.
on_temporary: list[Callable[[Tensor], None]] = []


def parts(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a tensor's memory: both planes, the upper first, or the tensor itself."""
    return (x.hi, x.lo) if isinstance(x, SplitTensor) else (x,)


@contextlib.contextmanager
def _original() -> Iterator[None]:
    with torch._C.DisableTorchFunctionSubclass():
        yield


def _user_cast(function: Any, args: Any, kwargs: Any) -> Any:
    before, _user.casting = _user.casting, True
    try:
        with _original():
            return function(*args, **kwargs)
    finally:
        _user.casting = before


def _set_data(function: Any, args: Any, kwargs: Any) -> Any:
    """``x.data = y``: the values of y where they can be kept in planes; else x is plain from here on."""
    x, new = args
    if isinstance(new, SplitTensor) and not (isinstance(x, SplitTensor) and _same_but_for_values(x, new)):
        new = new.joined()
    if isinstance(x, SplitTensor) and not isinstance(new, SplitTensor):
        of_its_own = new.numel() * new.element_size() == new.untyped_storage().nbytes()
        fits = new.dtype is torch.float32 and new.shape == x.shape and new.device == x.device
        if fits and not of_its_own and held(x):  # as in vector_to_parameters, of a vector with a graph
            warnings.warn(
                "the .data of a parameter in two 16-bit planes was set to a piece of another tensor while a graph "
                "holds it: the values are taken, but what is written to that tensor later does not reach the parameter",
                stacklevel=4,
            )
        if fits and (of_its_own or held(x)):
            with torch.no_grad():
                x.write(new)
            return None
        make_plain(x, "its .data was set to a piece of another tensor" if not of_its_own else "its .data was replaced")
    elif isinstance(x, SplitTensor):
        x.hi, x.lo = new.hi, new.lo
        return None
    with _original():
        return function(x, new)


def _same_but_for_values(x: SplitTensor, y: Any) -> bool:
    return x.shape == y.shape and x.device == y.device and x.hi.dtype is y.hi.dtype


#: Parts of PyTorch that ask every tensor for its storage and know that a subclass like this one has none.
_KNOWS_WRAPPERS = ("torch._subclasses", "torch._dynamo", "torch._functorch", "torch._inductor", "torch.utils")


def _needs_memory(function: Any, args: Any, kwargs: Any) -> Any:
    asking = sys._getframe(2).f_globals.get("__name__", "")
    if asking.startswith(_KNOWS_WRAPPERS):
        with _original():
            return function(*args, **kwargs)
    name = getattr(function, "__name__", str(function))
    for value in (*args, *kwargs.values()):
        if isinstance(value, SplitTensor):
            make_plain(value, f"{name}() was asked of it")
    with _original():
        return function(*args, **kwargs)


def _numpy(function: Any, args: Any, kwargs: Any) -> Any:
    """A copy, and one that says so: what was written into it would be lost."""
    if args[0].requires_grad and not kwargs.get("force"):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
    array = args[0].joined().numpy(force=kwargs.get("force", False))
    array.flags.writeable = False
    return array


def _view(function: Any, args: Any, kwargs: Any) -> Any:
    dtype = kwargs.get("dtype", args[1] if len(args) > 1 else None)
    if isinstance(dtype, torch.dtype) and dtype is not torch.float32:
        return _needs_memory(function, args, kwargs)
    with _original():
        return function(*args, **kwargs)


def _new_zeros(function: Any, args: Any, kwargs: Any) -> Any:
    """Of these FSDP2 makes its shards, plain ones."""
    if sys._getframe(2).f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
        warnings.warn(
            "fully_shard makes plain FP32 shards of a parameter in two 16-bit planes, which are gathered and cast as "
            "those of any FP32 parameter. Call fully_shard first, and make the optimizer and MixedPrecision after it",
            stacklevel=4,
        )
    with _original():
        return function(*args, **kwargs)


_FUNCTIONS: dict[Any, Handler] = {
    Tensor.new_zeros: _new_zeros,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.numpy: _numpy,
    Tensor.tolist: lambda function, args, kwargs: args[0].joined().tolist(),
    Tensor.__array__: lambda function, args, kwargs: _numpy(Tensor.numpy, args[:1], {}),
    Tensor.view: _view,
    **dict.fromkeys(
        (
            Tensor.data_ptr,
            Tensor.untyped_storage,
            Tensor.storage,
            Tensor.share_memory_,
            Tensor.is_shared,
            Tensor.set_,
            Tensor.resize_,
            Tensor.__dlpack__,
            Tensor.pin_memory,
        ),
        _needs_memory,
    ),
    **dict.fromkeys((Tensor.to, Tensor.bfloat16, Tensor.type), _user_cast),
}


class PlainCopies:
    """Plain float32 tensors in the place of split ones: what shares planes shares memory there too."""

    def __init__(self) -> None:
        self._wholes: dict[int, tuple[Tensor, Tensor]] = {}  # by the upper plane's storage, which is held here

    def of(self, x: SplitTensor) -> Tensor:
        storage = x.hi.untyped_storage()
        if storage._cdata not in self._wholes:
            everything = (storage.nbytes() // x.hi.element_size(),), (1,), 0
            whole = join(x.hi.as_strided(*everything), x.lo.as_strided(*everything))
            self._wholes[storage._cdata] = x.hi, whole
        return self._wholes[storage._cdata][1].as_strided(x.size(), x.stride(), x.storage_offset())


def held(x: Tensor) -> bool:
    """Whether a graph or a weak reference holds a tensor, so that PyTorch cannot exchange what it is."""
    return x._use_count() > 1 or bool(weakref.getweakrefs(x))  # type: ignore[attr-defined]


def exchange(x: Tensor, new: Tensor) -> None:
    """Make ``x`` the tensor that ``new`` is: the same object, with its gradient, hooks and attributes."""
    new.grad = x.grad
    torch._C._autograd._unsafe_set_version_counter((new,), (max(x._version, new._version),))
    attributes = {name: value for name, value in vars(x).items() if name not in ("hi", "lo", "notes")}
    vars(new).update(attributes)
    if x.is_leaf:
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(x, hooks) is not None:
                setattr(new, hooks, getattr(x, hooks))
    torch.utils.swap_tensors(x, new)  # type: ignore[no-untyped-call]  # torch's own function


def swap_keeping_hooks(swap: Callable[[Tensor, Tensor], None], x: Tensor, y: Tensor) -> None:
    """``torch.utils.swap_tensors``, which PyTorch calls for a subclass where it sets ``.data`` of a plain parameter.

    A plain parameter keeps its hooks then. Those of swapped tensors stay listed at them and are called no more, so they
    are set again. Where both hold the same planes (``model.float()``) there is nothing to swap.
    """
    if not isinstance(x, SplitTensor) and not isinstance(y, SplitTensor):
        return swap(x, y)
    if isinstance(x, SplitTensor) and isinstance(y, SplitTensor) and _same_memory(x.hi, y.hi):
        x.requires_grad_(y.requires_grad)
        return None
    swap(x, y)
    set_hooks_again(x)
    set_hooks_again(y)
    return None


def set_hooks_again(x: Tensor) -> None:
    """Have the hooks called that are listed at a leaf tensor, also where it was swapped since they were registered."""
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if x.is_leaf and getattr(x, hooks) is not None:
            setattr(x, hooks, getattr(x, hooks))


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.dtype is y.dtype and x.is_set_to(y)


def make_plain(x: Tensor, because: str = "") -> None:
    """Make a split tensor a plain float32 tensor with its values: the same object, its gradient and hooks kept.

    Raises:
        RuntimeError: PyTorch cannot exchange it now, because a graph or a weak reference holds it; what to do.
    """
    if not isinstance(x, SplitTensor):
        return
    is_parameter = isinstance(x, nn.Parameter)
    if is_parameter and held(x):
        raise RuntimeError(
            f"a parameter that is stored in two 16-bit planes must become a plain one{because and f' ({because})'}, "
            "and PyTorch cannot exchange it while a graph or a weak reference holds it: do this before the forward "
            "pass, or call halfstep.split.plain_parameters(model) first"
        )
    plain: Tensor = x.joined()
    if is_parameter:
        plain = nn.Parameter(plain, x.requires_grad)
    exchange(x, plain)
    if is_parameter:
        for told in on_plain:
            told(x, because)

"""Policies: which format where, and whether the loss is scaled.

A policy is a frozen value; ``str(policy)`` is its name and ``parse(str(policy)) == policy``, so the same text serves
as command-line argument, log line and JSON. `choose` picks one for a device and returns *(policy, reason)*: the
reason is always printed and recorded.

================= =============== ==================== =============
name              parameters      compute              loss scaling
================= =============== ==================== =============
fp32              fp32            fp32                 none
tf32              fp32            fp32, TF32 matmuls   none
bf16-mixed        fp32            autocast to bf16     none
fp16-mixed        fp32            autocast to fp16     dynamic
bf16-master       fp32, split (¹) autocast to bf16     none
fp16-master       fp32, split (¹) autocast to fp16     dynamic
fp8-mixed:emulate fp32            autocast to bf16 (²) none
================= =============== ==================== =============

(¹) to whoever looks FP32, and the master; in memory a 16-bit plane and what is missing to FP32 (`halfstep.split`), so
that nothing is cast. ``storage=split`` makes a ``-mixed`` policy the same. A model whose parameters are 16-bit already
keeps them, with FP32 masters in the optimizer. (²) the operands of matrix products are rounded to float8 around FP32
arithmetic. It exists only emulated, and ``auto`` never takes it.

Options follow the name, fields separated by ``:`` and items by ``+``, in this order when written::

    bf16-mixed:keep_fp32=blocks.*.mlp.wo+head:fp32_ops=softmax:low_ops=cumsum:rules=cuda:storage=split:grads=bf16:emulate

Neither commas (which separate policies), spaces nor shell operators: the text goes unquoted, but for ``*``, wherever a
name goes. A character of a pattern that means something here is written as ``%`` and its two hexadecimal digits.
"""

from __future__ import annotations

import difflib
import functools
import re
import string
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from urllib.parse import unquote

import torch

from halfstep.hardware import DeviceFacts

Rules = Literal["torch", "cuda"]
Storage = Literal["plain", "split"]
Grads = Literal["fp32", "bf16"]


def _storage_of(name: str) -> Storage:
    return "split" if name.endswith("-master") else "plain"


#: What a policy computes in: its 16-bit format, or FP32.
_FORMAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LISTS = ("keep_fp32", "fp32_ops", "low_ops")


class UnknownPolicyError(ValueError):
    """This text names no policy; the message lists those that exist."""


class PolicyOptionError(UnknownPolicyError):
    """A policy's option cannot be: an unknown op or option, or one that has nothing to act on."""


@dataclass(frozen=True)
class Policy:
    """Which format where, and whether the loss is scaled.

    Lists may be given for the fields of several items; they are kept as tuples. Op names are PyTorch's own
    (``softmax``, ``layer_norm``, ``aten::mm``; one overload as ``softmax.int``).

    Raises:
        PolicyOptionError: an op that PyTorch does not have or that is in both lists, an empty pattern, or an option for
            lowered computation on a policy that lowers nothing.
    """

    name: str
    compute_dtype: torch.dtype = torch.float32  #: what autocast lowers matrix products to; float32: no autocast
    tf32: bool = False  #: float32 matrix products may run in TF32
    loss_scaling: bool = False  #: dynamic, because gradients of this format underflow
    float8: bool = False  #: matrix products round their operands to float8; only with `emulate`
    keep_fp32: tuple[str, ...] = ()  #: module-path globs that stay FP32: parameters and computation
    fp32_ops: tuple[str, ...] = ()  #: ops that compute in FP32, whatever the rules say
    low_ops: tuple[str, ...] = ()  #: ops that compute in compute_dtype, whatever the rules say
    rules: Rules = "torch"  #: autocast lists: the device's own, or CUDA's on every device
    emulate: bool = False  #: round around FP32 arithmetic instead of using 16-bit kernels
    #: FP32 parameters as they are, or as two 16-bit planes (`halfstep.split`); None: what the name says.
    storage: Storage | None = None
    grads: Grads = "fp32"  #: gradients of split parameters, between backward and step, where nothing is accumulated

    def __post_init__(self) -> None:
        if self.storage is None:
            object.__setattr__(self, "storage", _storage_of(self.name))
        for field in ("keep_fp32", "fp32_ops", "low_ops"):
            given = getattr(self, field)
            items = (given,) if isinstance(given, str) else tuple(given)
            if field != "keep_fp32":
                items = tuple(item.removeprefix("aten::") for item in items)
            object.__setattr__(self, field, items)
        self._check()

    def _check(self) -> None:
        if self.rules not in get_args(Rules):
            raise PolicyOptionError(f"rules are {' or '.join(get_args(Rules))}, not {self.rules!r}")
        if not all(self.keep_fp32):
            raise PolicyOptionError("keep_fp32 holds an empty pattern; give module paths such as blocks.*.mlp.wo")
        listed: dict[str, str] = {}
        for field in ("fp32_ops", "low_ops"):
            for name in getattr(self, field):
                for overload in overloads(name):
                    if listed.setdefault(overload, field) != field:
                        raise PolicyOptionError(f"op {name!r} is in fp32_ops and in low_ops: it can only run in one")
        if self.float8 and not self.emulate:
            raise PolicyOptionError(
                f"{self.name} exists only emulated: native float8 is not built. Use {self.name}:emulate, which rounds "
                "operands to float8 around FP32 arithmetic (for its effect on training, not for speed)"
            )
        if self.storage not in get_args(Storage):
            raise PolicyOptionError(f"storage is {' or '.join(get_args(Storage))}, not {self.storage!r}")
        if self.storage == "split" and (not self.lowers or self.float8):
            raise PolicyOptionError(
                f"storage=split keeps parameters ready for 16-bit products: it goes with bf16-mixed and fp16-mixed, "
                f"not with {self.name}"
            )
        if self.grads not in get_args(Grads):
            raise PolicyOptionError(f"grads is {' or '.join(get_args(Grads))}, not {self.grads!r}")
        if self.grads == "bf16" and (self.storage != "split" or self.compute_dtype is not torch.bfloat16):
            raise PolicyOptionError(
                f"grads=bf16 keeps gradients as bfloat16 products give them: it goes with bf16-master, not {self.name}"
            )
        if self.storage == "plain" and _storage_of(self.name) == "split":
            raise PolicyOptionError(f"{self.name}:storage=plain is {self.name.replace('-master', '-mixed')}")
        used = [field for field, _ in self._written()]
        if used and not self.lowers:
            raise PolicyOptionError(f"{self.name} lowers nothing, so {', '.join(used)} would have no effect")

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{field}={text}" if text else field for field, text in self._written())])

    def _written(self) -> list[tuple[str, str]]:
        """The options that differ from a plain policy's, with their text; the text of a flag is empty."""
        found = [(field, "+".join(_quote(item) for item in getattr(self, field))) for field in _LISTS]
        found.append(("rules", self.rules if self.rules != "torch" else ""))
        found.append(("storage", str(self.storage) if self.storage != _storage_of(self.name) else ""))
        found.append(("grads", self.grads if self.grads != "fp32" else ""))
        return [(field, text) for field, text in found if text] + ([("emulate", "")] if self.emulate else [])

    @property
    def compute(self) -> str:
        """The name of the format that matrix products run in: fp32, tf32, bf16, fp16 or fp8."""
        if self.float8:
            return "fp8"
        return "tf32" if self.tf32 else _FORMAT_NAMES[self.compute_dtype]

    @property
    def lowers(self) -> bool:
        """Whether autocast has anything to do."""
        return self.compute_dtype is not torch.float32


#: The policies by their text; a name alone is one, but for ``fp8-mixed``, which is nothing without ``emulate``.
POLICIES: dict[str, Policy] = {
    str(policy): policy
    for policy in (
        Policy("fp32"),
        Policy("tf32", tf32=True),
        Policy("bf16-mixed", torch.bfloat16),
        Policy("fp16-mixed", torch.float16, loss_scaling=True),
        Policy("bf16-master", torch.bfloat16),
        Policy("fp16-master", torch.float16, loss_scaling=True),
        Policy("fp8-mixed", torch.bfloat16, float8=True, emulate=True),
    )
}
_BY_NAME = {policy.name: policy for policy in POLICIES.values()}


def parse(text: str | Policy) -> Policy:
    """The policy that this text means: a name, and options after it. A policy is itself.

    >>> parse("bf16-mixed:rules=cuda:keep_fp32=head").keep_fp32
    ('head',)

    Raises:
        UnknownPolicyError: no such name ("auto" is not a policy but the question; see `choose`).
        PolicyOptionError: an option that does not exist, stands twice, or cannot be.
        TypeError: it is neither a text nor a policy.
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str):
        raise TypeError(f"a policy is a name such as 'bf16-mixed', or a Policy, not {type(text).__name__} {text!r}")
    name, options = _split(text)
    try:
        policy = _BY_NAME[name]
    except KeyError:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f" Did you mean {str(_BY_NAME[near[0]])!r}?" if near else ""
        raise UnknownPolicyError(f"unknown policy {name!r}.{hint} Known: auto, {', '.join(POLICIES)}.") from None
    asked = replace(policy, **{"emulate": False, **options})
    return policy if asked == policy else asked


@functools.cache
def overloads(op: str) -> tuple[str, ...]:
    """The overloads of PyTorch that an op's name means, as ``aten::softmax.int``; those that write into arguments not.

    Raises:
        PolicyOptionError: PyTorch has no such op (near misses are named), or only ones that write into arguments.
    """
    name = op if "::" in op else f"aten::{op}"
    named = [known for known in _known_ops() if known == name or ("." not in name and known.startswith(f"{name}."))]
    if not named:
        names = sorted({known.partition(".")[0].removeprefix("aten::") for known in _known_ops()})
        near = difflib.get_close_matches(op.partition(".")[0], names, n=3)
        near += [n for n in names if n.startswith(f"{op}_") and n not in near][:2]
        hint = f" Near: {', '.join(near)}." if near else ""
        raise PolicyOptionError(f"PyTorch {torch.__version__} has no op {op!r}.{hint}")
    fit = []
    for known in named:
        schema = torch._C._get_schema(*_name_and_overload(known))
        takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
        if takes_tensors and not schema.is_mutable:
            fit.append(known)
    if not fit:
        raise PolicyOptionError(
            f"op {op!r} writes into its arguments or takes no tensors, so its inputs cannot be cast; "
            f"name the op that returns a new tensor{f', {op[:-1]!r}' if op.endswith('_') else ''}"
        )
    return tuple(fit)


def choose(facts: DeviceFacts) -> tuple[Policy, str]:
    """The policy for a device, and why: BF16 where native, else FP16 with scaling where native, else FP32."""
    bf16, fp16 = facts.formats["bf16"], facts.formats["fp16"]
    if bf16.support == "native":
        return POLICIES["bf16-mixed"], (
            f"bf16 is native here ({bf16.because}); it has fp32's range, so no loss scaling is needed"
        )
    if fp16.support == "native":
        return POLICIES["fp16-mixed"], (
            f"no native bf16 ({bf16.because}), but fp16 is native ({fp16.because}); "
            "its range is small, so the loss is scaled"
        )
    return POLICIES["fp32"], (
        f"no 16-bit format is known to be faster here: bf16 is {bf16.support} ({bf16.because}), "
        f"fp16 is {fp16.support} ({fp16.because})"
    )


def resolve(text: str, facts: DeviceFacts) -> tuple[Policy, str]:
    """The policy in effect on a device for what was asked, and why.

    "auto" is chosen by `choose`; options after it hold if the chosen policy lowers anything. A named policy is taken as
    asked, with a word about what the device makes of it; ``tf32`` on a device without TF32 computes in FP32, and is
    reported as the ``fp32`` that it is.

    Raises:
        UnknownPolicyError: no such name.
        PolicyOptionError: no such option.
    """
    name, options = _split(text)
    if name == "auto":
        policy, reason = choose(facts)
        if not options:
            return policy, reason
        replace(POLICIES["bf16-mixed"], **options)  # a wrong option is one on every device
        if policy.lowers:
            return replace(policy, **options), reason
        return policy, f"{reason}; {', '.join(options)} would have no effect on it"
    policy = parse(text)
    if policy.float8:
        bf16 = facts.formats["bf16"]
        return policy, (
            "as asked; operands of matrix products are rounded to fp8 around FP32 arithmetic (slower, not faster); "
            f"the rest is bf16, which is {bf16.support} here ({bf16.because})"
        )
    support = facts.formats[policy.compute]
    if policy.compute == "tf32" and support.support == "missing":
        return POLICIES["fp32"], f"tf32 was asked for, but is missing here ({support.because}): this is fp32"
    if policy.emulate:
        return policy, f"as asked; {policy.compute} is emulated by rounding around FP32 arithmetic"
    if support.support == "native":
        return policy, f"as asked; {policy.compute} is native here ({support.because})"
    return policy, f"as asked; note that {policy.compute} is {support.support} here ({support.because})"


def file_name(text: str) -> str:
    """A policy's text as part of a file name: itself, or without what some systems refuse, and told apart."""
    safe = "".join(c if c in _SAFE_IN_FILE_NAMES else "-" for c in text)
    return text if safe == text else f"{safe}-{zlib.crc32(text.encode()):08x}"


# ------------------------------------------------------------------ the text

_SAFE_IN_FILE_NAMES = frozenset(string.ascii_letters + string.digits + "._-+")

_PLAIN = frozenset(string.ascii_letters + string.digits + "._-*?[]!")


def _quote(item: str) -> str:
    return "".join(c if c in _PLAIN else "".join(f"%{byte:02X}" for byte in _encode(c)) for c in item)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options; a double colon (``aten::mm``) does not separate."""
    name, *fields = re.split(r"(?<!:):(?!:)", text.strip())
    options: dict[str, Any] = {}
    for field in fields:
        key, equals, value = field.partition("=")
        if key in options:
            raise PolicyOptionError(f"option {key!r} stands twice in {text.strip()!r}")
        if key in _LISTS and value:
            options[key] = tuple(unquote(item, errors="surrogatepass") for item in value.split("+"))
        elif key in ("rules", "storage", "grads") and value:
            options[key] = value
        elif key == "emulate" and not equals:
            options[key] = True
        else:
            near = difflib.get_close_matches(key, [*_LISTS, "rules", "storage", "grads", "emulate"], n=1)
            hint = f" Did you mean {near[0]!r}?" if near and near[0] != key else ""
            raise PolicyOptionError(
                f"unknown option {field!r} in policy {text.strip()!r}.{hint} Options: "
                "keep_fp32=PATTERN+…, fp32_ops=OP+…, low_ops=OP+…, rules=torch or rules=cuda, storage=plain or "
                "storage=split, grads=fp32 or grads=bf16, emulate."
            )
    return name, options


@functools.cache
def _known_ops() -> tuple[str, ...]:
    return tuple(sorted(torch._C._dispatch_get_all_op_names()))


def _name_and_overload(qualified: str) -> tuple[str, str]:
    name, _, overload = qualified.partition(".")
    return name, overload

"""What FP32 is computed in: PyTorch's switches for TF32 and BF16 inside FP32 products, held at what a policy says.

An FP32 product is not always one. PyTorch lets cuDNN's convolutions and recurrent layers use TF32 by default; a line
that many scripts begin with, ``torch.set_float32_matmul_precision("high")``, allows it for matrix products; and
``"medium"`` multiplies in BF16 on a CPU that can. So a run that is to be the FP32 reference has to say so.

There are two generations of switches. Kernels go by the newer one: a precision ("none", "ieee", "tf32", "bf16") for
each operation of a backend, where "none" takes the backend's, and that takes the one of all (``generic``)::

    generic.all ── cuda.all ─── cuda.matmul, cuda.conv, cuda.rnn
                └─ mkldnn.all ─ mkldnn.matmul, mkldnn.conv, mkldnn.rnn

The older one (``torch.backends.cuda.matmul.allow_tf32``, ``torch.backends.cudnn.allow_tf32``,
``torch.set_float32_matmul_precision``) writes the newer one as well; reading it raises where the two disagree, which
they do once both have been used. Nothing here reads the older one unless they are made to agree before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from halfstep.policy import Policy

#: What FP32 products are to be computed in on CUDA; on a CPU they are FP32 under both.
Float32 = Literal["ieee", "tf32"]

_OPS = ("matmul", "conv", "rnn")
_BACKENDS = ("cuda", "mkldnn")
_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


def float32_of(policy: Policy) -> Float32 | None:
    """What a policy makes of FP32 products; None where it leaves PyTorch's settings.

    Under a 16-bit policy FP32 products are what it keeps in FP32 by name, and are that; where it names nothing, none
    are left inside autocast for a switch to change.
    """
    if policy.lowers and not policy.keep_fp32 and not policy.fp32_ops:
        return None
    return "tf32" if policy.tf32 else "ieee"


@contextlib.contextmanager
def float32_precision(policy: Policy) -> Iterator[None]:
    """Make FP32 mean FP32, or TF32, while a policy is in effect, and put PyTorch's switches back as they were.

    A 16-bit policy that keeps nothing in FP32 leaves them. Costs microseconds where the switches are right already,
    tens of them where they are not.
    """
    wanted = float32_of(policy)
    if wanted is None or (is_held(wanted) and _agree()):
        yield
        return
    before = Float32Switches.read()
    try:
        hold(wanted)
        yield
    finally:
        before.put_back()


def is_held(wanted: Float32) -> bool:
    """Whether FP32 products are computed in ``wanted``, by the switches that kernels read."""
    tf32 = wanted == "tf32"
    on_cuda = all((_get("cuda", op) == "tf32") is tf32 and _get("cuda", op) != "bfx9" for op in _OPS)
    on_cpu = {"ieee", "none", "tf32"} if tf32 else {"ieee", "none"}
    return on_cuda and all(_get("mkldnn", op) in on_cpu for op in _OPS)


def hold(wanted: Float32) -> None:
    """Set all switches, the older ones with them, so that whoever reads those inside meets no contradiction."""
    torch._C._set_cublas_allow_tf32(wanted == "tf32")
    torch._C._set_cudnn_allow_tf32(wanted == "tf32")
    # What is set back to "none" inside, as torch.backends.cudnn.flags does, must not fall to a TF32 from above.
    for backend in ("generic", *_BACKENDS):
        _set(backend, "all", "none")
    for op in _OPS:
        _set("cuda", op, wanted)
        _set("mkldnn", op, "ieee")


def _agree() -> bool:
    """Whether the older switches can be read, as compilers and ``torch.backends.cudnn.flags`` do."""
    try:
        torch._C._get_cublas_allow_tf32()
        torch._C._get_cudnn_allow_tf32()
        torch._C._get_float32_matmul_precision()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Float32Switches:
    """All switches as they stand, of both generations.

    A switch can be asked only for what it comes to, not for whether that is its own value or one it takes from above.
    `read` finds out by changing what is above for a moment.
    """

    precisions: dict[tuple[str, str], str | None]  #: each switch's own; None: PyTorch's default, never set
    matmul: str  #: the older one of matrix products: highest, high or medium
    cudnn: bool  #: the older one of convolutions

    @classmethod
    def read(cls) -> Float32Switches:
        """As they are now."""
        own: dict[tuple[str, str], str | None] = {("generic", "all"): _get("generic", "all")}
        _set("generic", "all", "none")
        for backend in _BACKENDS:
            own[backend, "all"] = _get(backend, "all")
            _set(backend, "all", "none")
            own.update({(backend, op): _get(backend, op) for op in _OPS})
        # The default of convolutions, since PyTorch 2.12: TF32 unless something above says otherwise.
        _set("cuda", "all", "ieee")
        own.update({("cuda", op): None for op in _OPS if own["cuda", op] == "tf32" and _get("cuda", op) == "ieee"})
        # With nothing but FP32 in the newer switches, the older ones can be read.
        for backend, op in (("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"), ("mkldnn", "matmul")):
            if own[backend, op] is not None:
                _set(backend, op, "ieee")
        matmul = torch._C._get_float32_matmul_precision()
        try:
            cudnn = torch._C._get_cudnn_allow_tf32()
        except RuntimeError:  # it says yes, they say no
            cudnn = True
        for (backend, op), precision in own.items():
            if precision is not None:
                _set(backend, op, precision)
        return cls(own, matmul, cudnn)

    def put_back(self) -> None:
        """Make them so again.

        The default of convolutions, once written over, cannot be set again: it becomes TF32 by name, as after PyTorch's
        own ``torch.backends.cudnn.flags``. That differs where ``torch.backends.fp32_precision`` is set later.
        """
        unset = [switch for switch, precision in self.precisions.items() if precision is None]
        now = Float32Switches.read() if unset else None
        # The older ones first, because they write the newer ones.
        torch._C._set_float32_matmul_precision(self.matmul)
        if now is None or now.cudnn != self.cudnn:
            torch._C._set_cudnn_allow_tf32(self.cudnn)
        for (backend, op), precision in self.precisions.items():
            if precision is not None:
                _set(backend, op, precision)
            elif now is not None and (now.cudnn != self.cudnn or now.precisions[backend, op] is not None):
                _set(backend, op, "tf32")

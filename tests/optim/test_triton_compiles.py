"""Triton kernels pass its compiler, which needs no device: it compiles for one that is not there.

What is asked of the result is what the host's interpreter cannot show: that nothing was contracted, that square roots
and divisions are the rounded ones, and that a thread loads more than one element at a time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.optim.backends import cuda

pytest.importorskip("triton", reason="needs Triton, which is there for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: Types of the kernels' arguments, as Triton writes them.
ARGUMENTS = {
    "table": "*i64", "chunks": "*i32", "numbers": "*fp32", "found_inf": "*fp32", "coefficient": "*fp32",
    "lr_tensor": "*fp32", "count": "i32", "first_chunk": "i32", "spans": "*i32", "sums": "*fp64", "maxima": "*i32",
    "total": "*fp64", "amax": "*fp32", "flag": "*fp32", "running": "*fp64", "any_found": "*fp32", "found": "*fp32",
    "inverse": "*fp32", "before": "*fp32", "limit": "i64",
}  # fmt: skip
WHOLE = {"GROUPS": cuda.GROUPS, "TILES": cuda.TILES}
PLAIN = {**WHOLE, "MAXIMIZE": False, "STOCHASTIC": False, "RAGGED": False, "ALIGNED": True}
ADAMW = {**PLAIN, "DECOUPLED": True, "COUPLED": False, "AMSGRAD": False, "STATE2": None}
FORMATS = {
    "exact": {"WEIGHT": BF16, "GRAD": BF16, "MASTER": torch.int16, "STATE0": FP32, "STATE1": FP32},
    "smallest": {"WEIGHT": BF16, "GRAD": BF16, "MASTER": torch.int8, "STATE0": torch.int8, "STATE1": torch.uint8},
    "fp16": {"WEIGHT": FP16, "GRAD": FP16, "MASTER": torch.int8, "STATE0": BF16, "STATE1": BF16},
    "fp16-exact": {"WEIGHT": FP16, "GRAD": FP32, "MASTER": torch.int16, "STATE0": FP32, "STATE1": FP32},
    "kahan": {"WEIGHT": BF16, "GRAD": BF16, "MASTER": BF16, "STATE0": FP32, "STATE1": FP32},
    "fp32-master": {"WEIGHT": FP16, "GRAD": FP16, "MASTER": FP32, "STATE0": FP32, "STATE1": FP32},
    "fp32": {"WEIGHT": FP32, "GRAD": FP32, "MASTER": None, "STATE0": FP32, "STATE1": FP32},
}
ONE_STATE = {name: {k: v for k, v in kind.items() if k != "STATE1"} for name, kind in FORMATS.items()}
NONE = {name: {**kind, "MASTER": None} for name, kind in ONE_STATE.items()}
COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"adam-{name}": ("adam", {**ADAMW, **kind}) for name, kind in FORMATS.items()},
    "adam-all-at-once": ("adam", {**ADAMW, **FORMATS["smallest"], "COUPLED": True, "AMSGRAD": True, "MAXIMIZE": True,
                                  "STATE2": torch.uint8, "STOCHASTIC": True, "RAGGED": True}),
    "adam-unaligned": ("adam", {**ADAMW, **FORMATS["fp16"], "STOCHASTIC": True, "ALIGNED": False, "found_inf": None}),
    "sgd": ("sgd", {**PLAIN, **NONE["exact"], "MOMENTUM": False, "NESTEROV": False, "COUPLED": True,
                    "STOCHASTIC": True, "STATE0": None, "coefficient": None}),
    "sgd-nesterov": ("sgd", {**PLAIN, **NONE["fp16"], "MOMENTUM": True, "NESTEROV": True, "COUPLED": False,
                             "STOCHASTIC": True}),
    "lion": ("lion", {**PLAIN, **ONE_STATE["smallest"], "DECOUPLED": True}),
    "prepare": ("prepare", {"ADAM": True, "BLOCK": 128, "found_inf": None, "lr_tensor": None}),
    "prepare-on-device": ("prepare", {"ADAM": False, "BLOCK": 128}),
    "survey-chunk": ("survey_chunk", {**WHOLE, "GRAD": BF16, "ALIGNED": True}),
    "survey-gradient": ("survey_gradient", {"BLOCK": 1024}),
    "arrive": ("arrive", {"LIMITED": True, "BLOCK": 1024}),
    "arrive-unlimited": ("arrive", {"LIMITED": False, "BLOCK": 1024, "inverse": None, "before": None}),
    "follow-bf16": ("follow", {**WHOLE, "WEIGHT": BF16, "ALIGNED": True}),
    "follow-fp16": ("follow", {**WHOLE, "WEIGHT": FP16, "ALIGNED": True}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "capability"), [*[(kind, 80) for kind in COMPILED], ("adam-exact", 75), ("adam-smallest", 90)]
)
def test_kernels_compile_for_a_device_that_is_not_here(
    kind: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, constants = COMPILED[kind]
    kernel = getattr(cuda._kernels(), name)
    constants = {k: cuda._dtype(v) if isinstance(v, torch.dtype) else v for k, v in constants.items()}
    types = {n: "constexpr" if n in constants else ARGUMENTS.get(n, "fp32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n].startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=cuda._OPTIONS)
    assert compiled.asm["cubin"]
    ptx = compiled.asm["ptx"]
    assert not re.search(r"(sqrt|div)\.(approx|full)", ptx), "a square root or division that is not rounded"
    assert ".ftz" not in ptx, "subnormal numbers are taken for zero"
    if name == "adam":
        elements = 1024 // 128
        fused = 2 + constants["COUPLED"]
        assert len(re.findall(r"\bfma\.rn\.f32\b", ptx)) == fused * elements, "contracted"
    if name == "arrive":
        assert "fma.rn.f64" not in re.sub(r"(?s)// begin inline.*?// end inline", "", ptx), "contracted"
    if name == "arrive" and constants["LIMITED"]:
        assert str(0x3EB0C6F7A0B5ED8D) in ptx or "0d3EB0C6F7A0B5ED8D" in ptx, "1e-6 as a float32"
    if constants.get("ALIGNED"):
        assert "ld.global.v" in ptx, "loads of single elements"

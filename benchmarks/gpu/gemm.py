"""Matrix products of each format, as a share of the datasheet."""

from __future__ import annotations

import torch

from gpu import datasheet, timing
from gpu.section import Section
from gpu.timing import Step

FORMATS = ("bf16", "fp16", "tf32", "fp32", "fp8")
SIZES = (8192, 4096, 2048)


def gemm(s: Section) -> None:
    for size in (256,) if s.tiny else SIZES:
        for form in FORMATS if s.cuda else ("fp32", "bf16", "fp8"):
            name = f"{form} {size}"
            if s.has_time(name, 1):
                with s.part(name):
                    steps = 3 if s.tiny or form == "fp32" else 20
                    found = timing.times(s.device, product(form, size, s.device), warm=3, steps=steps, most_seconds=2)
                    rate = 2 * size**3 / found.median * 1e3
                    share = datasheet.share(rate, datasheet.peak(s.device, form))
                    s.measure(name, **found.values(), tflops=round(rate / 1e12, 3), of_datasheet=share)


def product(form: str, size: int, device: str) -> Step:
    """One product of square matrices in a format; the operands are cast already."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    if form == "fp8":
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()  # the second has to be column after column
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(form, torch.float32)
    p, q = a.to(dtype), b.to(dtype)
    return lambda: p @ q

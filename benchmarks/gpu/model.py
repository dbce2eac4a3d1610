"""A decoder in plain PyTorch: GPT-2's (LayerNorm, GELU, biases, learned positions) or LLaMA's (RMSNorm, SwiGLU,
rotary positions, no biases)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Size:
    """The shape of a decoder; ``mlp`` is the width inside its MLPs, 0 for four times its own."""

    width: int
    layers: int
    heads: int
    context: int
    vocabulary: int
    tied: bool = True
    llama: bool = False
    mlp: int = 0
    checkpointing: bool = False

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward: 6 per weight of a product, and those of attention.

        Attention is counted whole, as is usual for MFU (PaLM, arXiv 2204.02311, appendix B), although half is masked.
        """
        hidden = self.mlp or 4 * self.width
        weights = self.layers * (4 * self.width**2 + (3 if self.llama else 2) * self.width * hidden)
        return 6 * (weights + self.vocabulary * self.width) + 12 * self.layers * self.width * self.context


#: GPT-2 small; one of a billion parameters; LLaMA 7B; and what only shows that a section runs.
SMALL = Size(768, 12, 12, 1024, 50304)
LARGE = Size(2048, 16, 16, 1024, 50304, tied=False)
SEVEN_BILLION = Size(4096, 32, 32, 2048, 32000, tied=False, llama=True, mlp=11008, checkpointing=True)
TINY = Size(64, 2, 2, 32, 128)
TINY_LLAMA = Size(64, 2, 2, 32, 128, tied=False, llama=True, mlp=128, checkpointing=True)


class Block(nn.Module):
    """Attention, then an MLP; each reads a normalized copy of the residual stream and adds to it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, hidden, bias = size.width, size.mlp or 4 * size.width, not size.llama
        norm = nn.RMSNorm if size.llama else nn.LayerNorm
        self.heads, self.llama = size.heads, size.llama
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, (2 if size.llama else 1) * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.llama:
            q, k = rotated(q), rotated(k)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, width))
        hidden = self.up(self.norm2(x))
        if self.llama:
            gate, hidden = hidden.chunk(2, -1)
            hidden = functional.silu(gate) * hidden
        else:
            hidden = functional.gelu(hidden, approximate="tanh")
        out: Tensor = x + self.down(hidden)
        return out


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: (B, heads, T, D) -> (B, heads, T, D)."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Decoder(nn.Module):
    """ids (B, T) -> logits (B, T, vocabulary). Weights come from torch's generator, on the default device."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = None if size.llama else nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList([Block(size) for _ in range(size.layers)])
        self.norm = (nn.RMSNorm if size.llama else nn.LayerNorm)(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        if size.tied:
            self.head.weight = self.tokens.weight
        self.checkpointing = size.checkpointing
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def decoder(size: Size, device: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """The same weights each time; made in ``dtype`` from the start, without an FP32 copy."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Decoder(size)
    finally:
        torch.set_default_dtype(before)


def loss_of(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Cross entropy of the next token: ids (B, T + 1) -> 0-d."""
    return functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def batch_of(size: Size, rows: int, device: str) -> Tensor:
    """Random ids (rows, context + 1), the same each time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(size.vocabulary, (rows, size.context + 1), generator=generator).to(device)

"""Train a small GPT on the English text that every CPython ships.

A decoder-only transformer (pre-norm, causal attention, learned positions, GELU MLP) reads bytes and predicts
the next one. The text is Python's own language reference, ``pydoc_data.topics``: nothing is downloaded. Its
last tenth is held out. The loop is the usual one: AdamW with weight decay on matrices only, linear warm-up
and cosine decay, gradient accumulation, clipping, and checkpoints from which a run continues exactly.

    python gpt.py                                                             # about 10 M parameters
    python gpt.py --layers 2 --width 64 --heads 2 --context 64 --lr 3e-3      # seconds on a laptop
"""

import argparse
import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

VOCABULARY = 256  # every byte is a token


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.project(y.transpose(1, 2).reshape(B, T, width))
        return out


class Block(nn.Module):
    """Attention, then a GELU MLP; each reads a normalized copy of the residual stream and adds to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class GPT(nn.Module):
    """Byte-level language model: ids (B, T) -> logits (B, T, 256), for T up to ``args.context``."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, args.width)
        self.positions = nn.Embedding(args.context, args.width)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.Sequential(*[Block(args.width, args.heads, args.dropout) for _ in range(args.layers)])
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's 0.02, but for the embeddings: the first LayerNorm divides by their size, and at 0.02
                # the first gradients are so large that the loss leaps while the learning rate warms up.
                nn.init.normal_(p, std=0.2 if name in ("tokens.weight", "positions.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if args.tie:
            self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.dropout(x))))
        return logits


def load_text() -> tuple[Tensor, Tensor]:
    """The training and the held-out bytes (the last tenth), as 1-D uint8 tensors."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def cut(data: Tensor, starts: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets, each (len(starts), context), cut from ``data`` at ``starts``."""
    rows = data[starts[:, None] + torch.arange(args.context + 1)].long().to(args.device)
    return rows[:, :-1], rows[:, 1:]


def next_byte_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def validate(model: nn.Module, held_out: Tensor, args: argparse.Namespace) -> float:
    """Loss over ``--eval-batches`` batches cut at evenly spaced places: the same text in every call."""
    model.eval()
    starts = torch.linspace(0, len(held_out) - args.context - 1, args.eval_batches * args.batch).long()
    batches = [cut(held_out, s, args) for s in starts.view(args.eval_batches, args.batch)]
    losses = [next_byte_loss(model, x, y).item() for x, y in batches]
    model.train()
    return sum(losses) / len(losses)


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW that decays matrices but not biases and norms, with linear warm-up and cosine decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    warmup: int = args.warmup
    decay: int = max((args.decay_steps or args.steps) - warmup, 1)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))

    def factor(step: int) -> float:
        """1/warmup up to 1, then the cosine down to 0.1."""
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / decay, 1.0))

    return optimizer, LambdaLR(optimizer, factor)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked before any work starts."""

    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT on the text of Python's language reference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=count, default=6, help="transformer blocks")
    add("--width", type=count, default=384, help="features per token, a multiple of --heads")
    add("--heads", type=count, default=6, help="attention heads per block")
    add("--context", type=count, default=256, help="bytes per sequence")
    add("--dropout", type=float, default=0.0, help="dropout probability")
    add("--tie", action="store_true", help="share the embedding's weight with the output layer")
    add("--steps", type=count, default=100, help="optimizer steps in all")
    add("--batch", type=count, default=4, help="sequences per forward pass")
    add("--accumulate", type=count, default=1, help="forward passes per optimizer step")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--warmup", type=int, default=10, help="steps of linear warm-up")
    add("--decay-steps", type=count, help="step of the lowest learning rate, if not --steps")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=1, help="of weights, batches and dropout")
    add("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    add("--log-every", type=count, default=10, help="steps between printed lines")
    add("--eval-every", type=count, default=50, help="steps between validations")
    add("--eval-batches", type=count, default=4, help="batches per validation")
    add("--checkpoint", type=Path, help="file to save to at each validation")
    add("--resume", type=Path, help="checkpoint to continue from")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    if args.checkpoint and not args.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint {args.checkpoint}: there is no folder {args.checkpoint.parent}")
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train, printing losses as they come."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data, held_out = load_text()
    model = GPT(args).to(args.device)
    optimizer, scheduler = build_optimizer(model, args)
    done = 0
    if args.resume:
        saved = torch.load(args.resume, map_location="cpu", weights_only=True)
        done = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])  # draws the batches that the saved run would have drawn next
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters on {args.device}", flush=True)
    for step in range(done + 1, args.steps + 1):
        start, total = time.perf_counter(), torch.zeros((), device=args.device)
        for _ in range(args.accumulate):
            x, y = cut(data, torch.randint(len(data) - args.context, (args.batch,)), args)
            loss = next_byte_loss(model, x, y) / args.accumulate
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 1 or step % args.log_every == 0 or step == args.steps:
            line = f"step {step:5d}  loss {total.item():.4f}  norm {norm.item():.3f}"
            print(f"{line}  {1000 * (time.perf_counter() - start):.0f} ms", flush=True)
        if step % args.eval_every == 0 or step == args.steps:
            print(f"step {step:5d}  validation loss {validate(model, held_out, args):.4f}", flush=True)
            if args.checkpoint:
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
                torch.save(state, args.checkpoint)


if __name__ == "__main__":
    main()

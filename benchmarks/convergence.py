"""Does training with masters in few bytes end where FP32 training ends? ``python benchmarks/convergence.py``.

**Part 1, pretraining.** The built-in GPT trains under FP32 with PyTorch's AdamW, over several seeds, and with 16-bit
parameters under `halfstep.optim.AdamW` for each pair of master and state, from the same initial weights and on the same
batches. The question is asked of each pair: is the held-out loss different from FP32's on the same seed by more than
seeds differ among themselves?

**Part 2, fine-tuning.** A GPT-2 of the Transformers package is trained in FP32 on English, saved as a bf16 checkpoint,
loaded as ``from_pretrained`` does by default (in bf16) and fine-tuned on Python code at a small learning rate: with
PyTorch's AdamW on the bf16 weights, with masters, and, for comparison, loaded in FP32. Also counted: how many weights
had moved after 5 steps. Needs ``pip install transformers``.

Written to ``benchmarks/results/convergence.json``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import halfstep
from halfstep import optim
from halfstep.autocast import FP32_ISLANDS
from halfstep.workloads import gpt

RESULTS = Path(__file__).resolve().parent / "results" / "convergence.json"
SIZE = ["--layers", "2", "--width", "96", "--heads", "4", "--context", "64", "--batch", "16", "--eval-batches", "16"]
MASTERS = ("fp32", "exact", "24bit", "none")
STATES = ("fp32", "bf16", "8bit")
#: FP16 arithmetic is 40 times slower than FP32 on this kind of machine: its products are FP32's, rounded.
POLICIES = {"bf16": "bf16-master", "fp16": "fp16-master:emulate"}


def pretrain(seed: int, steps: int, master: str | None, state: str, rounding: str | None, low: str) -> float:
    """Held-out loss, nats per byte, after ``steps``; master None: FP32 with PyTorch's AdamW."""
    args = gpt.parse_args([*SIZE, "--steps", str(steps), "--seed", str(seed), "--warmup", str(max(1, steps // 20))])
    torch.manual_seed(seed)
    data, held_out = gpt.load_text()
    model = gpt.GPT(args)
    theirs, _ = gpt.build_optimizer(model, args)
    if master is None:
        policy, optimizer = "fp32", theirs
    else:
        policy = POLICIES[low]
        for module in model.modules():  # masters are of 16-bit parameters; an FP32 one is its own
            if not isinstance(module, FP32_ISLANDS):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(halfstep.parse_policy(policy).compute_dtype)
        groups = [{k: g[k] for k in ("params", "weight_decay")} for g in theirs.param_groups]
        options: Any = {"master": master, "state": state, "rounding": rounding}
        optimizer = optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), **options)
    scheduler = LambdaLR(optimizer, lambda step: _warm_up_and_cosine(step, args.warmup, steps))
    mp = halfstep.MixedPrecision(model, optimizer, policy)
    torch.manual_seed(seed + 1000)
    for _ in range(steps):
        x, y = gpt.cut(data, torch.randint(len(data) - args.context, (args.batch,)), args)
        with mp.autocast():
            loss = gpt.next_byte_loss(model, x, y)
        mp.backward(loss)
        if mp.step(max_grad_norm=args.clip).applied:
            scheduler.step()
    with mp.autocast():
        return gpt.validate(model, held_out, args)


def _warm_up_and_cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0))


def pretraining(steps: int, seeds: int, pair_seeds: int, pool: Executor, say: Callable[[str], None]) -> dict[str, Any]:
    """Every pair against FP32, seed by seed."""
    rows: list[tuple[str, str, str, str | None]] = []
    rows += [("bf16", master, state, None) for master in MASTERS for state in STATES]
    rows += [("bf16", "24bit", "8bit", "stochastic"), ("bf16", "none", "fp32", "kahan")]
    rows += [("bf16", "none", "fp32", "nearest")]
    rows += [("fp16", "exact", "fp32", None), ("fp16", "24bit", "8bit", None), ("fp16", "none", "bf16", None)]
    runs = [pool.submit(pretrain, seed, steps, None, "fp32", None, "bf16") for seed in range(seeds)]
    asked = [
        [pool.submit(pretrain, seed, steps, master, state, rounding, low) for seed in range(pair_seeds)]
        for low, master, state, rounding in rows
    ]
    reference = [run.result() for run in runs]
    say(f"fp32: {reference}")
    pairs = []
    for (low, master, state, rounding), of_pair in zip(rows, asked, strict=True):
        losses = [run.result() for run in of_pair]
        differences = [a - b for a, b in zip(losses, reference, strict=False)]
        pairs.append(
            {
                "parameters": low,
                "master": master,
                "state": state,
                "rounding": rounding,
                "losses": losses,
                "mean_difference": statistics.mean(differences),
                "differences": differences,
            }
        )
        say(f"{low} {master} {state} {rounding or ''}: {statistics.mean(differences):+.4f}  {differences}")
    return {
        "steps": steps,
        "size": " ".join(SIZE),
        "fp32_losses": reference,
        "seed_spread": max(reference) - min(reference),
        "pairs": pairs,
    }


def english_and_code() -> tuple[Tensor, Tensor]:
    """Bytes of English (the language reference) and of Python code (this interpreter's ``ast``-parsable library)."""
    english, _ = gpt.load_text()
    folder = Path(ast.__file__).parent
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("[a-d]*.py")))
    return english, torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)


def finetuning(pretrain_steps: int, steps: int, lr: float, seeds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """A bf16 checkpoint loaded the default way, with and without masters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    english, code = english_and_code()
    held_out = code[len(code) * 9 // 10 :]
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 128, "n_layer": 4, "n_head": 4}
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **options))
    _train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), english, pretrain_steps, seed=0)
    say(f"pretrained: loss on held-out code {_loss(model, held_out):.4f}")
    start = _loss(model, held_out)

    def make(name: str, loaded: nn.Module) -> Any:
        parameters = loaded.parameters()
        if name.startswith("torch"):
            return torch.optim.AdamW(parameters, lr=lr)
        if name == "MasterWeights(torch AdamW)":
            return halfstep.MasterWeights(torch.optim.AdamW(parameters, lr=lr))
        options: dict[str, Any] = {
            "AdamW exact": {},
            "AdamW 24bit, 8bit": {"master": "24bit", "state": "8bit"},
            "AdamW none, stochastic": {"master": "none"},
        }[name]
        return optim.AdamW(parameters, lr=lr, **options)

    names = ["torch, loaded in FP32", "torch, loaded by default (bf16)", "MasterWeights(torch AdamW)"]
    names += ["AdamW exact", "AdamW 24bit, 8bit", "AdamW none, stochastic"]
    rows: dict[str, dict[str, Any]] = {name: {"losses": [], "moved_after_5": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        for seed in range(seeds):
            for name in names:
                asked = {"dtype": torch.float32} if name.endswith("FP32") else {}
                loaded = GPT2LMHeadModel.from_pretrained(folder, **asked)
                rows[name]["dtype"] = str(loaded.dtype)
                optimizer = make(name, loaded)
                before = copy.deepcopy([p.detach() for p in loaded.parameters()])
                held = isinstance(optimizer, optim.MasterOptimizer | halfstep.MasterWeights)
                _train(loaded, optimizer, code[: len(code) * 9 // 10], 5, seed)
                after = [_master(optimizer, p) if held else p for p in loaded.parameters()]
                moved = sum((a != b.float()).sum().item() for a, b in zip(after, before, strict=True))
                rows[name]["moved_after_5"].append(moved / sum(p.numel() for p in before))
                _train(loaded, optimizer, code[: len(code) * 9 // 10], steps - 5, seed + 100)
                rows[name]["losses"].append(_loss(loaded, held_out))
                say(f"{name} seed {seed}: {rows[name]['losses'][-1]:.4f}, moved {rows[name]['moved_after_5'][-1]:.1%}")
    return {"pretrain_steps": pretrain_steps, "steps": steps, "lr": lr, "loss_before": start, "rows": rows}


def _master(optimizer: Any, parameter: Tensor) -> Tensor:
    found: Tensor = (optimizer.master if hasattr(optimizer, "master") else optimizer.of)(parameter)
    return found


def _batch(data: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - 65, (16,), generator=generator)
    return data[starts[:, None] + torch.arange(64)].long()


def _train(model: Any, optimizer: Any, data: Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids = _batch(data, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype is torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _loss(model: Any, data: Tensor) -> float:
    model.eval()
    generator = torch.Generator().manual_seed(12345)
    batches = [_batch(data, generator) for _ in range(32)]
    return statistics.mean(model(input_ids=ids, labels=ids).loss.float().item() for ids in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of pretraining, and of fine-tuning")
    parser.add_argument("--seeds", type=int, default=5, help="of FP32: how far do seeds lie apart?")
    parser.add_argument("--pair-seeds", type=int, default=1, help="of each pair, compared seed by seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of pretraining, a thread each")
    parser.add_argument("--lr", type=float, default=2e-5, help="of fine-tuning")
    parser.add_argument("--part", choices=["pretraining", "finetuning", "both"], default="both")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {"torch": torch.__version__, "halfstep": halfstep.__version__, "machine": platform.processor() or "?"}
    result |= {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}

    def say(line: str) -> None:
        print(line, flush=True)

    if args.part != "finetuning":
        with ProcessPoolExecutor(args.processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            result["pretraining"] = pretraining(args.steps, args.seeds, args.pair_seeds, pool, say)
    if args.part != "pretraining":
        result["finetuning"] = finetuning(args.steps, args.steps, args.lr, args.pair_seeds, say)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

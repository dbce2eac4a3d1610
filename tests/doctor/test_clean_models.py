"""Sound models are left in peace: no finding above a note, from any part of the doctor.

A doctor that cries wolf is switched off. So here are models and habits as people train with, each with something that
a detector might stumble over: masks and padding, tied weights, routers, averages, frozen 16-bit backbones, losses that
take logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import halfstep
from halfstep.doctor import Examination, Finding, Severity
from halfstep.doctor.lint import lint
from halfstep.doctor.predict import findings_of, predict
from halfstep.observe.ops import OpObserver
from halfstep.policy import parse
from halfstep.workloads import gpt

transformers = pytest.importorskip("transformers")

POLICIES = ("fp32", "bf16-mixed", "fp16-mixed:emulate")
CUDA_RULES = ("bf16-mixed:rules=cuda", "fp16-mixed:emulate:rules=cuda")
STEPS = 2


@dataclass
class Training:
    """What is trained: a loss, and what else a loop does."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: Optimizer
    accumulate: int = 1
    after: Callable[[], object] = field(default=lambda: None)


def adamw(model: nn.Module, loss: Callable[[], Tensor], **others: Any) -> Training:
    return Training(model.train(), loss, torch.optim.AdamW(model.parameters(), lr=1e-3), **others)


def above_note(findings: Sequence[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.severity > Severity.NOTE]


def failures(findings: Sequence[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.code in ("HS506", "HS507")]


def check(make: Callable[[], Training], policy: str) -> None:
    """Lint, examine two steps, and, of an FP32 run, predict."""
    torch.manual_seed(1)
    training = make()
    mp = halfstep.MixedPrecision(training.model, training.optimizer, policy)
    scaler = mp.scaler if mp.scaler.is_enabled() else None
    linted = lint(training.model, training.optimizer, policy=mp.policy, scaler=scaler)
    assert above_note(linted) == [] == failures(linted)

    def step() -> None:
        for _ in range(training.accumulate):
            with mp.autocast():
                loss = training.loss() / training.accumulate
            mp.backward(loss)
        mp.step(max_grad_norm=1.0)
        training.after()

    with Examination() as examination:
        for _ in range(STEPS):
            step()
    assert above_note(examination.findings()) == [] == failures(examination.findings())
    if policy == "fp32":
        with OpObserver("profile", parse("fp16-mixed")) as observer:
            step()
        predictions = predict(observer.profile)
        for lowered in ("bf16-mixed", "fp16-mixed"):
            assert above_note(findings_of(predictions, parse(lowered))) == []


# ------------------------------------------------------------------ models, as they come


IDS = torch.arange(2 * 14).reshape(2, 14) * 7 % 59 + 3
MASK = torch.ones_like(IDS)
MASK[0, 9:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def from_transformers(kind: str, config: Any, batch: dict[str, Tensor] | None = None) -> Training:
    model = getattr(transformers, kind)(config)
    given = TEXT if batch is None else batch
    return adamw(model, lambda: model(**given).loss)


def builtin_gpt() -> Training:
    model = gpt.GPT(gpt.parse_args(["--layers", "1", "--width", "32", "--heads", "4", "--context", "16"]))
    ids = torch.randint(0, 256, (2, 17))
    return adamw(model, lambda: functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


def conv_net() -> Training:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 10)),
    )
    x, y = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    return adamw(model, lambda: functional.cross_entropy(model(x), y))


def bert() -> Training:
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=32)
    return from_transformers("BertForMaskedLM", config)


def t5() -> Training:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return from_transformers("T5ForConditionalGeneration", config)


def llama() -> Training:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2)
    return from_transformers("LlamaForCausalLM", config)


def gpt2() -> Training:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return from_transformers("GPT2LMHeadModel", config)


def vit() -> Training:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=16, patch_size=4, num_labels=10)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 10, (4,))}
    return from_transformers("ViTForImageClassification", config, batch)


def whisper() -> Training:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16}
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 20, "max_target_positions": 32}
    config = transformers.WhisperConfig(**sizes, **depth, **tokens, **lengths)
    batch = {"input_features": torch.randn(2, 16, 40), "labels": LABELS}
    return from_transformers("WhisperForConditionalGeneration", config, batch)


def mixtral() -> Training:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = transformers.MixtralConfig(**SIZES, **experts, num_hidden_layers=1, num_key_value_heads=2)
    ids = torch.randint(3, 64, (8, 24))  # so many that some go to another expert in bf16
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return from_transformers("MixtralForCausalLM", config, batch)


MODELS = (builtin_gpt, conv_net, bert, t5, llama, gpt2, vit, whisper, mixtral)
CASES = [(make, policy) for make in MODELS for policy in POLICIES]
CASES += [(make, policy) for make in (bert, conv_net) for policy in CUDA_RULES]


@pytest.mark.parametrize(("make", "policy"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_nothing_is_wrong_with(make: Callable[[], Training], policy: str) -> None:
    check(make, policy)


# ------------------------------------------------------------------ habits of training


def small(*, width: int = 32, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, outputs))


def classified(model: nn.Module, **others: Any) -> Callable[[], Tensor]:
    x, y = torch.randn(16, 16), torch.randint(0, 8, (16,))
    return lambda: functional.cross_entropy(model(x), y, **others)


def left_padding() -> Training:
    """Rows of attention in which every key is masked."""
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    config = transformers.LlamaConfig(
        **SIZES, num_hidden_layers=1, num_key_value_heads=2, attn_implementation="eager", pad_token_id=0
    )
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}
    return from_transformers("LlamaForCausalLM", config, batch)


def average_of_weights() -> Training:
    model = small()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return adamw(model, classified(model), after=lambda: averaged.update_parameters(model))


def accumulation() -> Training:
    model = small()
    return adamw(model, classified(model), accumulate=4)


class Adapted(nn.Module):
    """A frozen 16-bit layer with an FP32 adapter of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small().to(torch.bfloat16).requires_grad_(False)
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # its weights are in 16 bits already
            hidden = self.backbone(x.bfloat16())
        return hidden.float() + 2.0 * self.up(self.down(x))


def adapters() -> Training:
    model = Adapted()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(model, classified(model), torch.optim.AdamW(trained, lr=1e-3))


class Tied(nn.Module):
    """Token embedding and output layer are one weight; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.LayerNorm(32))
        self.output = nn.Linear(32, 64, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.body(self.embedding(ids)))


def tied_weights() -> Training:
    model, ids = Tied(), IDS * MASK
    return adamw(model, lambda: functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), ignore_index=0))


def with_optimizer(make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[], Training]:
    def training() -> Training:
        model = small()
        return Training(model, classified(model), make(list(model.parameters())))

    return training


def label_smoothing() -> Training:
    model = small()
    return adamw(model, classified(model, label_smoothing=0.1))


def accuracy() -> Training:
    """A metric beside the loss: choices that nothing is steered by."""
    model = small()
    x, y = torch.randn(64, 16), torch.randint(0, 8, (64,))
    hits: list[float] = []

    def loss() -> Tensor:
        logits = model(x)
        hits.append((logits.detach().topk(3, dim=-1).indices == y[:, None]).any(-1).float().mean().item())
        hits.append((logits.argmax(-1) == y).float().mean().item())
        return functional.cross_entropy(logits, y)

    return adamw(model, loss)


def distillation() -> Training:
    student, teacher = small(), small(width=64).requires_grad_(False)
    x = torch.randn(16, 16)

    def loss() -> Tensor:
        with torch.no_grad():
            target = functional.log_softmax(teacher(x) / 2, -1)
        return (
            functional.kl_div(
                functional.log_softmax(student(x) / 2, -1), target, log_target=True, reduction="batchmean"
            )
            * 4
        )

    return adamw(student, loss)


def contrastive() -> Training:
    model = small()
    x = torch.randn(16, 16)
    near = x + 0.1 * torch.randn(16, 16)

    def loss() -> Tensor:
        one, other = functional.normalize(model(x), dim=-1), functional.normalize(model(near), dim=-1)
        similarity = one @ other.t() / 0.07
        return functional.cross_entropy(similarity, torch.arange(16)) - functional.cosine_similarity(one, other).mean()

    return adamw(model, loss)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.output = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x)[0][:, -1])


def recurrent() -> Training:
    model, x, y = Recurrent(), torch.randn(4, 6, 16), torch.randint(0, 8, (4,))
    return adamw(model, lambda: functional.cross_entropy(model(x), y))


class Block(nn.Module):
    """As in diffusion models: group norm, SiLU, the time by sines and cosines, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(4, 16), nn.Linear(16, 16)
        self.down, self.up = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phases = time[:, None].float() * torch.exp(-torch.arange(8) * 0.9)
        condition = self.time(torch.cat([phases.sin(), phases.cos()], -1))
        hidden = functional.silu(self.norm(self.into(x))) + condition[:, :, None, None]
        return self.out(hidden + self.up(functional.silu(self.down(hidden))))


def diffusion() -> Training:
    model, x, noise, time = Block(), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randint(0, 1000, (4,))
    return adamw(model, lambda: functional.mse_loss(model(x + noise, time).float(), noise))


def masked_choices() -> Training:
    """Actions that are not allowed have a score of -inf, and no probability."""
    model, x = small(), torch.randn(16, 16)
    forbidden = torch.rand(16, 8) < 0.4
    forbidden[:, 0] = False

    def loss() -> Tensor:
        scores = functional.log_softmax(model(x).masked_fill(forbidden, -torch.inf), -1)
        entropy = -(scores.exp() * scores.masked_fill(forbidden, 0.0)).sum(-1).mean()
        return -scores[:, 0].mean() - 0.01 * entropy

    return adamw(model, loss)


def momentum(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)


def adam_foreach(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, foreach=True)


def adam_fused(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def adafactor(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adafactor(parameters)


def own_adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return halfstep.optim.AdamW(parameters, lr=1e-3)


HABITS = {
    "left padding": left_padding,
    "average of weights": average_of_weights,
    "accumulation": accumulation,
    "adapters": adapters,
    "tied weights": tied_weights,
    "label smoothing": label_smoothing,
    "accuracy": accuracy,
    "distillation": distillation,
    "contrastive": contrastive,
    "recurrent": recurrent,
    "diffusion": diffusion,
    "masked choices": masked_choices,
    **{make.__name__: with_optimizer(make) for make in (momentum, adam_foreach, adam_fused, adafactor, own_adamw)},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("habit", HABITS)
def test_nothing_is_wrong_with_the_habit(habit: str, policy: str) -> None:
    check(HABITS[habit], policy)


@pytest.mark.parametrize("policy", ["bf16-master", "fp16-master:emulate"])
@pytest.mark.parametrize("make", [own_adamw, adam_foreach])
def test_nothing_is_wrong_with_masters(make: Callable[[list[nn.Parameter]], Optimizer], policy: str) -> None:
    check(with_optimizer(make), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_wrong_with_two_networks_against_each_other(policy: str) -> None:
    torch.manual_seed(1)
    makes, judges = small(outputs=16), small(outputs=1)
    real, noise = torch.randn(16, 16), torch.randn(16, 16)
    pairs = [(net, torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))) for net in (makes, judges)]
    maker, judge = (halfstep.MixedPrecision(net, optimizer, policy) for net, optimizer in pairs)
    with Examination() as examination:
        for _ in range(STEPS):
            with judge.autocast():
                scores = torch.cat([judges(real), judges(makes(noise).detach())]).float()
                target = torch.cat([torch.ones(16, 1), torch.zeros(16, 1)])
                loss = functional.binary_cross_entropy_with_logits(scores, target)
            judge.backward(loss)
            judge.step()
            with maker.autocast():
                loss = functional.binary_cross_entropy_with_logits(judges(makes(noise)).float(), torch.ones(16, 1))
            maker.backward(loss)
            maker.step()
            judges.zero_grad()
    findings = examination.findings()
    scaler = maker.scaler if maker.scaler.is_enabled() else None
    findings += lint([makes, judges], [optimizer for _, optimizer in pairs], policy=maker.policy, scaler=scaler)
    assert above_note(findings) == [] == failures(findings)


@pytest.mark.parametrize("lowered", [None, torch.bfloat16, torch.float16])
def test_nothing_is_wrong_with_generation(lowered: torch.dtype | None) -> None:
    """Prompts padded on the left; keys and values kept from token to token; candidates drawn from the likeliest."""
    torch.manual_seed(1)
    model = gpt2().model.eval()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 8, "pad_token_id": 0}
    autocast = torch.autocast("cpu", dtype=lowered, enabled=lowered is not None)
    with Examination() as examination, torch.no_grad(), autocast:
        examination.returned(model.generate(IDS, attention_mask=mask, **options))
    assert above_note(examination.findings()) == [] == failures(examination.findings())

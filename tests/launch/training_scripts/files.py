"""Checkpoints in every order and form, copies, programs, and runs that go on under another policy."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from pathlib import Path

import numpy
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, batch, distance, held_out, largest_difference, loss_of, made, weights


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=SMALL)


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def trained(steps: int = 10):
    model = made()
    optimizer = adamw(model)
    training.train(model, optimizer, steps)
    return model, optimizer


@scenario("resumed and uninterrupted are the same, bit for bit; distance", library=True)
def resumed_in_any_order() -> Numbers:
    """Resumed from state dicts: model first, optimizer first, after a step of the new pair."""
    model, optimizer = trained()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    start = weights(model)
    training.train(model, optimizer, 10, 10)
    numbers = {"moved": distance(model, start)}
    for order in (("model", "optimizer"), ("optimizer", "model"), ("step", "model", "optimizer")):
        resumed = made(1)
        its = adamw(resumed)
        for part in order:
            if part == "step":
                training.train(resumed, its, 2)
            else:
                {"model": resumed, "optimizer": its}[part].load_state_dict(copy.deepcopy(saved[part]))
        training.train(resumed, its, 10, 10)
        numbers[f"apart, {', '.join(order)}"] = largest_difference(resumed, model)
    return numbers


@scenario("resumed and uninterrupted are the same, bit for bit; distance", library=True)
def optimizer_made_before_or_after_loading() -> Numbers:
    """The model loaded, then an optimizer made for it; `assign=True`, with the optimizer made after."""
    model, optimizer = trained()
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    training.train(model, optimizer, 10, 10)
    numbers = {}
    for assign in (False, True):
        resumed = made(1)
        resumed.load_state_dict(copy.deepcopy(saved[0]), assign=assign)
        its = adamw(resumed)
        its.load_state_dict(copy.deepcopy(saved[1]))
        training.train(resumed, its, 10, 10)
        numbers[f"apart, assign={assign}"] = largest_difference(resumed, model)
    return {**numbers, "moved": distance(resumed, made())}


@scenario("resumed and uninterrupted are the same, bit for bit; distance", library=True)
def resumed_on_the_meta_device() -> Numbers:
    """A model built on meta, its weights assigned from a file."""
    model, optimizer = trained()
    saved = through_a_file((model.state_dict(), optimizer.state_dict()))
    training.train(model, optimizer, 10, 10)
    with torch.device("meta"):
        resumed = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    resumed.load_state_dict(saved[0], assign=True)
    its = adamw(resumed)
    its.load_state_dict(saved[1])
    training.train(resumed, its, 10, 10)
    return {"apart": largest_difference(resumed, model), "moved": distance(resumed, made())}


@scenario("what was loaded is there, bit for bit; distance after it", library=True)
def weights_loaded_after_the_first_call() -> Numbers:
    """A learning rate finder: trained, then put back to the start, state and all."""
    model = made()
    optimizer = adamw(model)
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    before = weights(model)
    training.train(model, optimizer, 10)
    straight = weights(model)
    training.train(model, optimizer, 5)
    model.load_state_dict(start[0])
    off = largest_difference(model, before)
    optimizer.load_state_dict(start[1])
    training.train(model, optimizer, 10)
    return {"off": off, "apart": largest_difference(model, straight), "moved": distance(model, before)}


@scenario("values written through the dict are the model's, bit for bit", library=True)
def state_dict_read_and_written_through() -> Numbers:
    """Entries of `state_dict()` are the weights themselves: they show steps, and what is written arrives."""
    model, optimizer = trained()
    state = model.state_dict()
    training.train(model, optimizer, 5, 10)
    stale = max(float((state[name] - p.detach()).abs().max()) for name, p in model.named_parameters())
    state["0.weight"].mul_(0.5)
    state["2.weight"][0] = 0.25
    off = float((state["0.weight"] - model[0].weight.detach()).abs().max())
    row = float((model[2].weight[0] - 0.25).abs().max())
    best = {name: value.clone() for name, value in model.state_dict().items()}
    start = weights(model)
    training.train(model, optimizer, 5, 15)
    moved = distance(model, start)
    model.load_state_dict(best)
    return {"stale": stale, "off": off, "row": row, "moved": moved, "back": largest_difference(model, start)}


@scenario("dtypes, names and sizes; no halfstep in the file", 0.0, library=True)
def what_is_in_the_file() -> Numbers:
    """A checkpoint's entries: FP32, of plain types, as large as they must be."""
    model, optimizer = trained()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    size = len(file.getvalue())
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return {
        "odd types": sum(type(value) is not torch.Tensor for value in saved["model"].values()),
        "other dtypes": sum(value.dtype is not torch.float32 for value in saved["model"].values()),
        "entries": sum(len(state) for state in saved["optimizer"]["state"].values()),
        "kilobytes": round(size / 4096),
        "halfstep": float(b"halfstep" in file.getvalue()),
    }


@scenario(
    "no halfstep in the file",
    differs=dict.fromkeys(
        ("lib bf16-mixed", "lib bf16-master", "lib fp16-master:emulate"),
        "the model holds hooks of halfstep, which must be installed where it is loaded; state dicts do not",
    ),
    library=True,
)
def what_is_in_a_pickled_model() -> Numbers:
    """`torch.save((model, optimizer))` and pickle, whole."""
    model, optimizer = trained()
    whole = io.BytesIO()
    torch.save((model, optimizer), whole)
    return {"saved": float(b"halfstep" in whole.getvalue()), "pickled": float(b"halfstep" in pickle.dumps(model))}


@scenario("resumed and uninterrupted are the same, bit for bit; distance", library=True)
def whole_model_saved() -> Numbers:
    """`torch.save(model)` and pickle of a trained model; the copy is trained on."""
    model, optimizer = trained()
    copies = [through_a_file(model, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    state = copy.deepcopy(optimizer.state_dict())
    training.train(model, optimizer, 5, 10)
    numbers = {}
    for i, other in enumerate(copies):
        its = adamw(other)
        its.load_state_dict(copy.deepcopy(state))
        training.train(other, its, 5, 10)
        numbers[f"apart {i}"] = largest_difference(other, model)
    return {**numbers, "moved": distance(model, made())}


@scenario("what is read is what was trained, bit for bit; distance", needs="safetensors", library=True)
def safetensors_files() -> Numbers:
    """`save_file`, `save_model` and back."""
    from safetensors.torch import load_file, load_model, save_file, save_model

    model, _ = trained()
    save_file(model.state_dict(), "state.safetensors")
    save_model(model, "model.safetensors")
    one, two = made(1), made(2)
    one.load_state_dict(load_file("state.safetensors"))
    load_model(two, "model.safetensors")
    moved = distance(one, made())
    return {"state": largest_difference(one, model), "model": largest_difference(two, model), "moved": moved}


@scenario("dtypes; what is read is what was trained, bit for bit; distance", needs="transformers", library=True)
def pretrained_model_saved() -> Numbers:
    """A GPT-2 of Transformers: trained, `save_pretrained`, `from_pretrained`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    start, optimizer = weights(model), adamw(model)
    for i in range(3):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(i))
        training.step(model, optimizer, lambda ids=ids: model(input_ids=ids, labels=ids).loss)
    model.save_pretrained("saved")
    loaded = GPT2LMHeadModel.from_pretrained("saved")
    others = sum(p.dtype is not torch.float32 for p in loaded.parameters())
    dtype = json.loads(Path("saved/config.json").read_text())["dtype"]
    return {
        "moved": distance(model, start),
        "apart": largest_difference(loaded, model),
        "others": others,
        "float32": float(dtype == "float32"),
        "tied": float(model.lm_head.weight is model.transformer.wte.weight),
    }


@scenario("resumed and uninterrupted are the same, bit for bit; distance", library=True)
def distributed_checkpoint() -> Numbers:
    """`dcp.save` and `dcp.load` with `get_state_dict` and `set_state_dict`, which loads the optimizer first."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    model, optimizer = trained()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id="checkpoint", no_dist=True)
    training.train(model, optimizer, 10, 10)
    resumed = made(1)
    its = adamw(resumed)
    into = dict(zip(("model", "optimizer"), get_state_dict(resumed, its), strict=True))
    dcp.load(into, checkpoint_id="checkpoint", no_dist=True)
    set_state_dict(resumed, its, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
    training.train(resumed, its, 10, 10)
    return {"apart": largest_difference(resumed, model), "moved": distance(resumed, made())}


@scenario("what is read is what was trained, bit for bit; distance", library=True)
def arrays_saved_by_numpy() -> Numbers:
    """`numpy.savez` of all weights, and back by `from_numpy`."""
    model, _ = trained()
    numpy.savez("weights.npz", **{name: p.detach().numpy() for name, p in model.named_parameters()})
    read = numpy.load("weights.npz")
    other = made(1)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(torch.from_numpy(read[name]))
    return {"apart": largest_difference(other, model), "moved": distance(other, made())}


@scenario("the loaded part is there, bit for bit; distance after it", library=True)
def a_part_of_a_file() -> Numbers:
    """`strict=False` with a file that has only the first layer, during training."""
    model, optimizer = trained()
    torch.manual_seed(3)
    part = {"0.weight": torch.randn(32, 8) * 0.2, "other": torch.zeros(1)}
    missing, unexpected = model.load_state_dict(part, strict=False)
    off = float((model[0].weight.detach() - part["0.weight"]).abs().max())
    start = weights(model)
    training.train(model, optimizer, 10, 10)
    return {"off": off, "keys": len(missing) * 10 + len(unexpected), "moved": distance(model, start)}


@scenario("the best weights are back, bit for bit", library=True)
def early_stopping() -> Numbers:
    """The best weights kept by deepcopy of the state dict, put back at the end."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    best, best_loss = None, float("inf")
    for epoch in range(6):
        training.train(model, optimizer, 3, 3 * epoch)
        if epoch == 3:
            optimizer.param_groups[0]["lr"] = 0.5
        if held_out(model) < best_loss:
            best_loss, best, then = held_out(model), copy.deepcopy(model.state_dict()), weights(model)
    model.load_state_dict(best)
    return {"loss": held_out(model), "off": largest_difference(model, then)}


@scenario("no casts in the program; FP32 weights, the model's bit for bit; what it says")
def jit_traced_and_scripted() -> Numbers:
    """`torch.jit.trace` and `torch.jit.script` of a trained model, saved and loaded."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    model, _ = trained()
    x = batch(0)[0]
    numbers, exact = {}, copy.deepcopy(model).double()
    expected = exact[2].forward(exact[1].forward(exact[0].forward(x.double()))).detach()
    for name, made_program in (
        ("trace", lambda: torch.jit.trace(model, x)),
        ("script", lambda: torch.jit.script(model)),
    ):
        file = io.BytesIO()
        torch.jit.save(made_program(), file)
        file.seek(0)
        program = torch.jit.load(file)
        casts = str(program.inlined_graph).count("aten::to(") + str(program.inlined_graph).count("autocast")
        numbers[f"{name}: casts"] = casts
        numbers[f"{name}: other dtypes"] = sum(p.dtype is not torch.float32 for p in program.parameters())
        numbers[f"{name}: apart"] = largest_difference(program, model)
        error = float((program(x).detach().double() - expected).abs().max())
        numbers[f"{name}: far"] = float(error > 0.05)
    return numbers


@scenario("FP32 weights, the model's bit for bit; what the program says; distance after it", library=True)
def exported_program() -> Numbers:
    """`torch.export` of a trained model, saved, loaded and run."""
    model, optimizer = trained()
    model.eval()
    x = batch(0)[0]
    torch.export.save(torch.export.export(model, (x,)), "program.pt2")
    program = torch.export.load("program.pt2").module()
    exact = copy.deepcopy(model).double()
    expected = exact[2].forward(exact[1].forward(exact[0].forward(x.double()))).detach()
    far = float((program(x).detach().double() - expected).abs().max() > 0.05)
    others = sum(p.dtype is not torch.float32 for p in program.parameters())
    apart = largest_difference(program.state_dict().values(), model.state_dict().values())
    start = weights(model)
    training.train(model, optimizer, 5, 10)
    return {"far": far, "others": others, "apart": apart, "moved": distance(model, start)}


@scenario("distance; it is shared", library=True)
def shared_memory() -> Numbers:
    """`share_memory()` during training; training goes on in the shared weights."""
    model, optimizer = trained()
    before = weights(model)
    model.share_memory()
    off, shared = largest_difference(model, before), sum(p.is_shared() for p in model.parameters())
    training.train(model, optimizer, 10, 10)
    still = sum(p.is_shared() for p in model.parameters())
    return {"off": off, "shared": shared, "still": still, "moved": distance(model, before)}


@scenario("values in memory are those of the tensor; distance", library=True)
def memory_addresses() -> Numbers:
    """`data_ptr`, `untyped_storage` and a view as another dtype, as flat buffers use them."""
    model, optimizer = trained()
    before = weights(model)
    pointers = len({p.data_ptr() for p in model.parameters()})
    nbytes = model[2].weight.untyped_storage().nbytes()
    bits = model[0].weight.detach().view(torch.int32)
    off = float((bits.view(torch.float32) - model[0].weight.detach()).abs().max())
    training.train(model, optimizer, 10, 10)
    return {"pointers": pointers, "bytes": nbytes, "off": off, "moved": distance(model, before)}


@scenario("distance; the flat buffer is the weights", library=True)
def one_flat_buffer() -> Numbers:
    """All weights made views of one flat tensor during training, which is written to directly."""
    model, optimizer = trained()
    before = weights(model)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    place = 0
    for p in model.parameters():
        p.data = flat[place : place + p.numel()].view_as(p)
        place += p.numel()
    training.train(model, optimizer, 5, 10)
    moved = distance(model, before)
    flat.mul_(0.5)
    off = float((nn.utils.parameters_to_vector(model.parameters()).detach() - flat).abs().max())
    return {"moved": moved, "off": off}


def _part(part: int, lr: float = 2e-3) -> Numbers:
    """A script that resumes where a file is."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    file, off = Path("checkpoint.pt"), 0.0
    if part:
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        off = max(float((p.detach() - saved["model"][name]).abs().max()) for name, p in model.named_parameters())
    start, first = weights(model), loss_of(model, 40 * part).item()
    training.train(model, optimizer, 40, 40 * part)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    off += float(largest_difference(torch.load(file)["model"].values(), model.state_dict().values()))
    return {"off": off, "first loss": first, "loss": held_out(model), "moved": distance(model, start)}


@scenario("what was saved is loaded, bit for bit; losses and distance", 0.06, parts=("", "", ""))
def continued_under_the_same_policy(part: int) -> Numbers:
    """A run in three parts"""
    return _part(part)


@scenario("what was saved is loaded, bit for bit; losses and distance", 0.06, parts=("", "plain", ""))
def continued_without_a_policy_between(part: int) -> Numbers:
    """A run in three parts, the second without halfstep"""
    return _part(part)


@scenario("what was saved is loaded, bit for bit; losses and distance", 0.06, parts=("", "bf16-mixed", ""))
def continued_under_another_policy_between(part: int) -> Numbers:
    """A run in three parts, the second under another policy"""
    return _part(part)


@scenario("what was saved is loaded, bit for bit; losses and distance", 0.06, parts=("plain", "bf16-master", ""))
def continued_from_other_policies(part: int) -> Numbers:
    """A run in three parts, begun without halfstep"""
    return _part(part)


@scenario("what was saved is loaded, bit for bit; losses and distance", 0.06, parts=("", "fp32", "plain"))
def continued_without_a_policy(part: int) -> Numbers:
    """A run in three parts, ended without halfstep"""
    return _part(part)


@scenario("distance of each layer in the second part", parts=("", "plain"))
def frozen_layer_resumed_without_a_policy(part: int) -> Numbers:
    """A layer that was frozen in the first part, with its optimizer, and trained in the second"""
    model = made()
    optimizer = adamw(model)
    model[0].requires_grad_(False)
    if part:
        saved = torch.load("checkpoint.pt")
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        model[0].requires_grad_(True)
    start = weights(model)
    training.train(model, optimizer, 10, 10 * part)
    torch.save((model.state_dict(), optimizer.state_dict()), "checkpoint.pt")
    now = weights(model)
    return {"first": distance(now[:2], start[:2]), "second": distance(now[2:], start[2:])}


@scenario("the model's weights count, bit for bit; distance", library=True)
def a_file_with_masters_of_an_earlier_version() -> Numbers:
    """An optimizer state with entries that PyTorch does not know, `"master"` among them, older than the weights."""
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for i, p in enumerate(model.parameters()):
        state["state"][i]["master"] = torch.zeros_like(p.detach())
        state["state"][i]["other"] = torch.ones(3)
    before = weights(model)
    optimizer.load_state_dict(state)
    off = largest_difference(model, before)
    training.train(model, optimizer, 5, 10)
    carried = sum("other" in optimizer.state[p] for p in model.parameters())
    return {"off": off, "moved": distance(model, before), "carried": carried}

"""States of master weights: saved, loaded, copied, a run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, feed, fp32_copy, groups_of, make_parameters, tensors_of
from torch import nn

from halfstep.optim import MasterWeights


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_run_continues_as_the_uninterrupted_one(name: str, model_first: bool) -> None:
    def run(parameters: list[nn.Parameter], masters: MasterWeights, steps: range) -> None:
        for step in steps:
            feed(parameters, step)
            masters.step()

    whole = make_parameters(torch.bfloat16)
    whole_masters = MasterWeights(OPTIMIZERS[name](groups_of(whole)))
    run(whole, whole_masters, range(5))
    file = io.BytesIO()
    torch.save({"optimizer": whole_masters.state_dict(), "model": [p.detach() for p in whole]}, file)
    saved_copy = copy.deepcopy(whole_masters.state_dict())
    run(whole, whole_masters, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make_parameters(torch.bfloat16, seed=9)
    resumed_masters = MasterWeights(OPTIMIZERS[name](groups_of(resumed)))
    for load_model in (True, False) if model_first else (False, True):
        if not load_model:
            resumed_masters.load_state_dict(saved["optimizer"])
            continue
        with torch.no_grad():
            for parameter, value in zip(resumed, saved["model"], strict=True):
                parameter.copy_(value)
    assert all(torch.equal(p, value) for p, value in zip(resumed, saved["model"], strict=True))
    for one, other in zip(tensors_of(resumed_masters.state_dict()), tensors_of(saved_copy), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    run(resumed, resumed_masters, range(5, 10))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b) and torch.equal(whole_masters.of(a), resumed_masters.of(b))
    for one, other in zip(
        tensors_of(whole_masters.state_dict()), tensors_of(resumed_masters.state_dict()), strict=True
    ):
        assert torch.equal(one, other)


def test_a_plain_state_is_loaded_with_fp32_moments_and_masters_from_the_parameters() -> None:
    reference = fp32_copy(make_parameters(torch.bfloat16))
    plain = torch.optim.AdamW(groups_of(reference), lr=0.01)
    for step in range(3):
        feed(reference, step)
        plain.step()
    parameters = [nn.Parameter(p.detach().bfloat16()) for p in reference]
    optimizer = torch.optim.AdamW(groups_of(parameters), lr=0.3)
    masters = MasterWeights(optimizer)
    masters.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    own, theirs = optimizer.state_dict()["state"], plain.state_dict()["state"]
    for index in theirs:
        assert all(torch.equal(own[index][k], theirs[index][k]) for k in theirs[index])
        assert own[index]["exp_avg"].dtype is torch.float32
    for parameter in parameters:
        assert torch.equal(masters.of(parameter), parameter.float())
    feed(parameters, 4)
    masters.step()
    assert all(any(key is p for p in parameters) for key in optimizer.state)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    parameters = make_parameters(torch.bfloat16)
    masters = MasterWeights(torch.optim.SGD(parameters, lr=0.1, momentum=0.5))
    feed(parameters, 0)
    masters.step()
    state = copy.deepcopy(masters.state_dict())
    before = copy.deepcopy(state)
    state["state"][1]["master"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"master of parameter 1 has shape \(2, 2\), the parameter \(5,\)"):
        masters.load_state_dict(state)
    with pytest.raises(ValueError, match="param"):
        masters.load_state_dict({**before, "param_groups": before["param_groups"] * 2})
    for one, other in zip(tensors_of(before), tensors_of(masters.state_dict()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original_would(copied: Any) -> None:
    parameters = make_parameters(torch.bfloat16)
    masters = MasterWeights(torch.optim.AdamW(parameters, lr=0.01))
    feed(parameters, 0)
    masters.step()
    twins, twin_masters = copied((parameters, masters))
    for step in (1, 2):
        for group, each in ((parameters, masters), (twins, twin_masters)):
            feed(group, step)
            each.step()
    for one, twin in zip(parameters, twins, strict=True):
        assert one is not twin and torch.equal(one, twin)
        assert torch.equal(masters.of(one), twin_masters.of(twin))


def test_masters_of_other_weights_are_named_and_not_taken() -> None:
    """Trained with masters, then on by other means, then with masters again: what was trained last counts."""
    parameters = make_parameters(torch.bfloat16)
    masters = MasterWeights(torch.optim.SGD(parameters, 0.1))
    feed(parameters, 0)
    masters.step()
    old = copy.deepcopy(masters.state_dict())
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(3.0)
    later = [p.detach().clone() for p in parameters]
    masters = MasterWeights(torch.optim.SGD(parameters, 0.0))
    masters.load_state_dict({**old, "param_groups": [{**g, "lr": 0.0} for g in old["param_groups"]]})
    feed(parameters, 1)
    with pytest.warns(UserWarning, match=r"masters of other weights .* \(parameters 0 "):
        masters.step()
    assert all(torch.equal(p, value) for p, value in zip(parameters, later, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masters.step()


def test_a_state_that_is_read_while_an_average_is_swapped_in_changes_nothing() -> None:
    parameters = make_parameters(torch.bfloat16)
    masters = MasterWeights(torch.optim.SGD(parameters, 1e-4))
    for step in range(3):
        feed(parameters, step)
        masters.step()
    kept = [p.detach().clone() for p in parameters]
    before = [masters.of(p).clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        saved = masters.state_dict()["state"]
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    assert all((entry["master"] == 0).all() for entry in saved.values() if "master" in entry)
    feed(parameters, 9)
    masters.step()
    again = [masters.of(p) for p in parameters]
    low = [p.dtype is torch.bfloat16 and p.requires_grad for p in parameters]
    assert any((b.bfloat16() != b).any() for b, is_low in zip(before, low, strict=True) if is_low)
    for one, other, p, is_low in zip(again, before, parameters, low, strict=True):
        if is_low and p.grad is not None:
            assert torch.equal(one, other.sub(p.grad.float(), alpha=1e-4))

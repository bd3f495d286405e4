"""Param groups in parts for a step: what an optimizer writes into its own stays, and frozen weights stay too."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import hashes, tiny_bert
from torch import nn

from hf_unfreeze import Unfreezer
from hf_unfreeze.errors import OptimizerError


class Counting(torch.optim.Optimizer):
    """Adam that counts its steps in the param group, as timm's Adan (a number) and optimi's StableAdamW (a tensor) do;
    ``eager`` counts where nothing has a gradient, too."""

    def __init__(self, parameters, kind, eager):
        super().__init__(parameters, {"lr": 1e-2, "weight_decay": 0.1, "step": kind(0), "seen": []})
        self.kind, self.eager = kind, eager

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained and not self.eager:
                continue
            group["step"] += 1
            group["seen"].append(int(group["step"]))
            group["last"] = float(group["step"])
            for p in trained:
                moments = self.state[p]
                if not moments:
                    moments.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
                moments["m"].lerp_(p.grad, 0.1)
                moments["v"].lerp_(p.grad**2, 0.01)
                first, second = 1 - 0.9 ** int(group["step"]), 1 - 0.99 ** int(group["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * moments["m"] / first / ((moments["v"] / second).sqrt() + 1e-8))


def counted(kind, eager, schedule, stop=7, resumed=None, **options):
    """Weights and groups after some steps, and what was to be saved after three; from there on where it is given."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = Counting(model.parameters(), kind, eager)
    first = 0
    if resumed is not None:
        first = 3
        model.load_state_dict(resumed[0])
        optimizer.load_state_dict(resumed[1])
    unfreezer, saved = Unfreezer(model, optimizer, schedule, **options), None
    for step in range(first, stop):
        if step == 3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        unfreezer.step(step)
        model(input_ids=torch.arange(8)[None] + step, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unfreezer.close()
    return hashes(model), optimizer.state_dict()["param_groups"], saved


@pytest.mark.parametrize("kind", [int, torch.tensor])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    "schedule", ["head@0, block[-1]@2step, block[0]@5step", "all@0, -embeddings@4step, -head@5step"]
)
def test_what_an_optimizer_writes_into_its_group_stays(kind, eager, schedule):
    weights, group, _ = counted(kind, eager, schedule)
    parted, parted_group, saved = counted(kind, eager, schedule, group_weight_decay="all=0.1")
    assert group[0]["step"] == 7 and group[0]["seen"] == [1, 2, 3, 4, 5, 6, 7] and group[0]["last"] == 7
    assert parted == weights and parted_group == group
    again = counted(kind, eager, schedule, resumed=saved, group_weight_decay="all=0.1")
    assert again[:2] == (parted, parted_group)
    assert counted(kind, eager, schedule, layer_decay=0.5)[1] == group


def test_what_belongs_to_the_group_as_a_whole_is_refused_with_rates():
    class Estimating(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                gradients = [(p, p.grad) for p in group["params"] if p.grad is not None]
                group["norm"] = sum(float(gradient.norm()) for _, gradient in gradients)
                for parameter, gradient in gradients:
                    parameter.sub_(group["lr"] * gradient)

    def step(**options):
        model = tiny_bert()
        optimizer = Estimating(model.parameters(), {"lr": 0.1})
        unfreezer = Unfreezer(model, optimizer, "all@0", **options)
        unfreezer.step(0)
        model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        return optimizer.param_groups

    assert step()[0]["norm"] > 0
    with pytest.raises(OptimizerError, match="Estimating writes 'norm' into its param group"):
        step(layer_decay=0.5)


def test_a_wrapper_that_shares_the_list_of_groups_steps_with_the_rates():
    """As timm's Lookahead, which steps an optimizer inside over the same list."""

    class Around(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base
            self.param_groups, self.state = base.param_groups, base.state

        def step(self, closure=None):
            self.base.step()

    ends = []
    for wrap in (Around, lambda base: base):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
        unfreezer = Unfreezer(model, optimizer, "all@0", layer_decay=0.5)
        unfreezer.step(0)
        model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        assert len(optimizer.param_groups) == 1
        ends.append(hashes(model))
    assert ends[0] == ends[1]


TORCH = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam)
]


class Matrices(nn.Module):
    """Muon trains nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, values):
        for layer in self.layers:
            values = layer(values).tanh()
        return self.head(values)


@pytest.mark.parametrize("drop_state", [False, True])
@pytest.mark.parametrize("kind", TORCH)
def test_every_optimizer_of_torch_leaves_frozen_weights_alone_or_is_refused(kind, drop_state):
    model = Matrices()
    optimizer = kind(model.parameters(), lr=0.1)
    reasons = {torch.optim.LBFGS: "LBFGS cannot be used: it keeps one direction for all parameters"}
    if drop_state:
        reasons[torch.optim.Adagrad] = "Write drop_state=False"
    if kind in reasons:
        with pytest.raises(OptimizerError, match=reasons[kind]):
            Unfreezer(model, optimizer, "all@0, -block[1]@2step", drop_state=drop_state)
        return
    unfreezer = Unfreezer(model, optimizer, "all@0, -block[1]@2step", drop_state=drop_state)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    weight, moved = model.layers[1].weight, []
    for step in range(4):
        before = weight.detach().clone()
        unfreezer.step(step)
        optimizer.step(closure)
        moved.append(not torch.equal(weight, before))
    assert moved == [True, True, False, False]


def test_a_step_that_failed_leaves_nothing_for_the_next():
    """The group is as it was, and what the parts held is not written into it by a step that needs no parts."""
    model = tiny_bert()
    optimizer = Counting(model.parameters(), int, True)
    unfreezer = Unfreezer(model, optimizer, "all@0", layer_decay="0.5->1.0", total_steps=2)
    unfreezer.step(0)
    model(input_ids=torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
    group = optimizer.param_groups[0]
    group["weight_decay"] = "much"
    with pytest.raises(TypeError):
        optimizer.step()
    group.update(weight_decay=0.1, step=10)
    unfreezer.step(1)
    optimizer.step()
    assert optimizer.param_groups == [group] and group["step"] == 11

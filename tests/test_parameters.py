"""Parameters laid end to end train as they would one by one, and a gradient holds what flowed in its own step alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftbench.kernels import economize
from peftbench.parameters import FlatParameters, SeparateParameters, flattened


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_flattened_parameters_train_as_they_are(weight_decay):
    """Sizes that fill no cache line, two rates, two types, passes that accumulate: torch's AdamW over the tensors themselves."""
    torch.manual_seed(0)
    shapes = [[(3, 5), (7,)], [(2, 2, 2), (1,), (40,)]]
    plain = [[nn.Parameter(torch.randn(shape)) for shape in some] for some in shapes]
    plain[1].append(nn.Parameter(torch.randn(6, dtype=torch.float64)))
    ours = copy.deepcopy(plain)

    def groups_of(parameters):
        return [{"params": some, "lr": lr} for some, lr in zip(parameters, (1e-2, 3e-3), strict=True)]

    def train(parameters, optimizer, clear):
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            for p in [p for some in parameters for p in some] * 2:
                (p.sin() * torch.randn(p.shape, generator=generator)).sum().backward()
            optimizer.step()
            clear()
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 2)

    optimizer = torch.optim.AdamW(groups_of(plain), weight_decay=weight_decay)
    train(plain, optimizer, optimizer.zero_grad)
    with flattened(groups_of(ours)) as flat:
        assert [1, 2] == [len(group["params"]) for group in flat.groups]
        train(ours, torch.optim.AdamW(flat.groups, weight_decay=weight_decay, fused=True), flat.clear_gradients)
    for expected, actual in zip([*plain[0], *plain[1]], [*ours[0], *ours[1]], strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.grad is None
        assert actual.untyped_storage().nbytes() == actual.numel() * actual.element_size()  # a tensor of its own again


def test_parameters_are_their_own_again_after_an_error():
    """What was learned until then stays."""
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(KeyboardInterrupt), flattened([{"params": [parameter], "lr": 1.0}]) as flat:
        flat.groups[0]["params"][0].data.add_(1)
        raise KeyboardInterrupt
    assert [2, 2, 2] == parameter.tolist()
    assert 12 == parameter.untyped_storage().nbytes()


class Uses(nn.Module):
    """Parts that a pass may use or not: linear layer, words and normalization, and the linear layer's tensors without the layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 3, dtype=torch.float64)
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.norm = nn.LayerNorm(3, dtype=torch.float64)
        self.number = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, used, ids):
        x = self.words(ids) if "words" in used else torch.ones(len(ids), 3, dtype=torch.float64)
        for part in used:
            if part == "linear":
                x = self.linear(x)
            elif part == "norm":
                x = self.norm(x)
            elif part == "tensors":
                x = self.number * x @ self.linear.weight + self.linear.bias
        return x.square().sum()


passes = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["words", "linear", "norm", "tensors"]), min_size=1, max_size=4),
        st.lists(st.integers(0, 5), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(passes, min_size=2, max_size=4), way=st.sampled_from([SeparateParameters, FlatParameters]))
def test_a_gradient_is_of_its_own_step(steps, way):
    """Whichever parts the passes of a step go through, in any order: the gradients and their norm are those of torch alone."""
    torch.manual_seed(0)
    plain = Uses()
    ours = copy.deepcopy(plain)
    economize(ours)
    parameters = way([{"params": list(ours.parameters())[:2]}, {"params": list(ours.parameters())[2:]}])
    for some in steps:
        for used, ids in some:
            for model in (plain, ours):
                loss = model(used, torch.tensor(ids))
                if loss.requires_grad:
                    loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        torch.testing.assert_close(parameters.gradient_norm().double(), norm.double(), rtol=1e-6, atol=0)
        for expected, actual in zip(plain.parameters(), ours.parameters(), strict=True):
            nothing = torch.zeros_like(expected)
            torch.testing.assert_close(*(nothing if p.grad is None else p.grad for p in (actual, expected)), rtol=1e-9, atol=1e-9)
        plain.zero_grad()
        parameters.clear_gradients()


def test_released_parameters_are_torchs_again():
    """A gradient that was marked for writing over is no longer, and nothing watches what flows in."""
    parameter = nn.Parameter(torch.ones(3))
    with flattened([{"params": [parameter]}]) as flat:
        flat.clear_gradients()
    for _ in range(2):
        parameter.sum().backward()
    assert [2, 2, 2] == parameter.grad.tolist()
    assert not parameter._backward_hooks
    assert {} == parameter.__dict__


def test_parameters_that_cannot_be_laid_end_to_end_stay_their_own():
    """One that does not train takes no part, and the others are given back at once."""
    trains, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        FlatParameters([{"params": [trains, frozen]}])
    assert (12, 8) == (trains.untyped_storage().nbytes(), frozen.untyped_storage().nbytes())
    assert not trains._backward_hooks


def test_a_norm_of_many_numbers_is_as_exact_as_of_few():
    """Ten million of them, beside the sum in 64 bits."""
    numbers = nn.Parameter(torch.empty(10_000_019))
    with flattened([{"params": [numbers]}]) as flat:
        numbers.grad.normal_(generator=torch.Generator().manual_seed(0))
        expected = numbers.grad.double().square().sum().sqrt()
        torch.testing.assert_close(flat.gradient_norm().double(), expected, rtol=1e-6, atol=0)

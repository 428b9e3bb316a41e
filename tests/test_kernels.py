"""The cheaper kernels are the same mathematics: dropout statistically, embeddings exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from peftbench.kernels import Dropout, RowEmbedding, dropout, economize

N = 200_000
rates = pytest.mark.parametrize("p", [0.02, 0.1, 0.25, 0.5, 0.9])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


@rates
def test_rate_is_p(p):
    """The share of zeros is within four standard deviations of p, as it would be for independent draws."""
    dropped = int((dropout(torch.ones(N), p) == 0).sum())
    assert abs(dropped - N * p) < 4 * (N * p * (1 - p)) ** 0.5
    assert stats.binomtest(dropped, N, p).pvalue > 1e-4


@rates
def test_what_is_kept_is_scaled_so_that_the_mean_stays(p):
    """Kept elements are x / (1 - p), with p to the nearest 1/65536, and the mean of many is the input's."""
    out = dropout(torch.full((N,), 3.0), p)
    kept = out[out != 0]
    exact = round(p * 65536) / 65536
    torch.testing.assert_close(kept, torch.full_like(kept, 3 / (1 - exact)), rtol=1e-6, atol=0)
    sigma_of_mean = 3 * (p / (1 - p) / N) ** 0.5
    assert abs(out.mean().item() - 3) < 4 * sigma_of_mean


@rates
@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_neighbours_are_dropped_independently(p, lag):
    """Four draws share one random number: dropping an element says nothing of those beside it."""
    zero = dropout(torch.ones(N), p) == 0
    both = int((zero[:-lag] & zero[lag:]).sum())
    spread = (N * p**2 * (1 - p**2) + 2 * N * (p**3 - p**4)) ** 0.5
    assert abs(both - (N - lag) * p**2) < 4 * spread


@rates
def test_masks_of_two_calls_are_independent(p):
    """Another call draws another mask, and the two agree as often as chance has it."""
    first, second = (dropout(torch.ones(N), p) == 0 for _ in range(2))
    agree = p**2 + (1 - p) ** 2
    assert abs(int((first == second).sum()) - N * agree) < 4 * (N * agree * (1 - agree)) ** 0.5


@rates
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 4, 5), (0,)])
def test_gradient_passes_where_the_value_passed(p, shape):
    """The backward pass uses the forward pass's mask and scale."""
    x = torch.ones(shape, requires_grad=True)
    out = dropout(x, p)
    out.sum().backward()
    assert shape == out.shape
    assert torch.equal(out.detach(), x.grad)


def test_strides_of_the_input_do_not_matter():
    """A transposed view is dropped element by element like any other tensor."""
    x = torch.arange(1.0, 13.0).view(3, 4).t().requires_grad_()
    out = dropout(x, 0.5)
    out.backward(torch.ones(4, 3))
    torch.testing.assert_close(out.detach(), x.detach() * x.grad)


def test_same_seed_gives_the_same_mask():
    """Masks come from torch's global generator alone."""
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout(torch.ones(1000), 0.3))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_type_is_kept(dtype):
    """Autocast hands over bf16 and gets it back."""
    assert dtype == dropout(torch.ones(8, dtype=dtype), 0.5).dtype


@pytest.mark.parametrize("p", [0.0, 1e-9])
def test_rate_of_zero_is_identity(p):
    """A rate that rounds to zero drops nothing and scales by one."""
    x = torch.randn(1000)
    assert torch.equal(x, dropout(x, p))


@pytest.mark.parametrize("p", [0.999999, 1.0])
def test_rate_of_one_drops_everything(p):
    """A rate that rounds to one leaves zeros, as torch's dropout of 1 does."""
    assert torch.equal(torch.zeros(100), dropout(torch.ones(100), p))


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_module_is_identity_in_evaluation_and_at_rate_zero(p, training):
    """As torch.nn.Dropout."""
    x = torch.randn(100)
    assert torch.equal(x, Dropout(p).train(training)(x))


def test_module_drops_in_training():
    """In training mode the module is the function, and a rate of 1 is torch's."""
    assert 0 < int((Dropout(0.5)(torch.ones(1000)) == 0).sum()) < 1000
    assert torch.equal(torch.zeros(10), Dropout(1.0)(torch.ones(10)))


step = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(step, min_size=1, max_size=4), padding_idx=st.sampled_from([None, 0, 3]), to_none=st.booleans())
def test_row_embedding_is_embedding_over_steps(steps, padding_idx, to_none):
    """Values, accumulated gradients and trained weights are nn.Embedding's over steps of several backward passes each."""
    torch.manual_seed(0)
    reference = nn.Embedding(10, 3, padding_idx=padding_idx).double()
    rows = RowEmbedding(10, 3, padding_idx=padding_idx).double()
    rows.load_state_dict(reference.state_dict())
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in (reference, rows)]
    for accumulated in steps:
        for ids in map(torch.tensor, accumulated):
            factor = torch.randn(len(ids), 3, dtype=torch.float64)
            for module in (reference, rows):
                (module(ids) * factor).sum().backward()
            assert torch.equal(rows.weight[ids], rows(ids))
            torch.testing.assert_close(rows.weight.grad, reference.weight.grad, rtol=1e-9, atol=1e-9)
        for module, optimizer in zip((reference, rows), optimizers, strict=True):
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        torch.testing.assert_close(rows.weight, reference.weight, rtol=1e-9, atol=1e-9)


def test_row_embedding_gradient_by_hand():
    """Row 1 is looked up twice, row 2 once, the padding row 0 never learns, and the step before is forgotten."""
    rows = RowEmbedding(4, 2, padding_idx=0)
    rows(torch.tensor([3])).sum().backward()
    rows.zero_grad()
    rows(torch.tensor([[1, 2], [1, 0]])).sum().backward()
    assert [[0, 0], [2, 2], [1, 1], [0, 0]] == rows.weight.grad.tolist()


def test_row_embedding_looked_up_twice_in_one_pass():
    """Two look-ups that meet in one loss add up."""
    rows = RowEmbedding(3, 1)
    (rows(torch.tensor([0, 1])).sum() + 10 * rows(torch.tensor([1])).sum()).backward()
    assert [[1], [11], [0]] == rows.weight.grad.tolist()


def test_row_embedding_adds_to_a_gradient_that_is_there():
    """As everywhere in torch, a gradient set by the caller is added to."""
    rows = RowEmbedding(3, 1)
    rows.weight.grad = torch.ones(3, 1)
    rows(torch.tensor([1])).sum().backward()
    assert [[1], [2], [1]] == rows.weight.grad.tolist()


@pytest.mark.parametrize("frozen", [True, False])
def test_row_embedding_without_gradient_is_a_plain_lookup(frozen):
    """Frozen or under no_grad nothing is recorded."""
    rows = RowEmbedding(4, 2).requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        out = rows(torch.tensor([[1, 3]]))
    assert not out.requires_grad
    assert torch.equal(rows.weight[[1, 3]][None], out)


def test_economizing_replaces_dropout_and_trainable_embeddings():
    """Only these change, in place and with their weights; frozen embeddings stay torch's."""
    model = nn.ModuleDict(
        {"words": nn.Embedding(5, 2), "frozen": nn.Embedding(5, 2), "drop": nn.Dropout(0.5), "head": nn.Linear(2, 2)}
    )
    model["frozen"].requires_grad_(False)
    weight = model["words"].weight
    economize(model)
    assert [RowEmbedding, nn.Embedding, Dropout, nn.Linear] == [type(module) for module in model.values()]
    assert weight is model["words"].weight


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}], ids=lambda o: next(iter(o)))
def test_economizing_respects_options_of_embeddings(option):
    """An embedding that treats its gradient or weight in a way of its own gives the same values and gradient afterwards."""
    reference, economized = nn.Embedding(5, 2, **option), nn.Embedding(5, 2, **option)
    economized.load_state_dict(reference.state_dict())
    economize(economized)
    ids = torch.tensor([1, 1, 4])
    values = []
    for module in (reference, economized):
        out = module(ids)
        out.sum().backward()
        values.append((out.detach(), module.weight.grad.to_dense()))
    torch.testing.assert_close(values[1], values[0])

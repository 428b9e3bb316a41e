"""Dropout is torch's, statistically: its rate, its independence, its gradient."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

from peftbench.dropout import Masks
from peftbench.kernels import economize

N = 200_000


def dropout(x, p, *, training=True):
    """What an economized dropout of a model makes of x."""
    model = nn.Sequential(nn.Dropout(p)).train(training)
    economize(model)
    return model(x)


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
@pytest.mark.parametrize("modules", [1, 2])
def test_masks_of_two_calls_are_independent(p, modules):
    """Another call, of the same module or another, draws another mask, and the two agree as often as chance has it."""
    model = nn.ModuleList([nn.Dropout(p) for _ in range(modules)])
    economize(model)
    first, second = (model[i % modules](torch.ones(N)) == 0 for i in range(2))
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
def test_dropout_is_identity_in_evaluation_and_at_rate_zero(p, training):
    """As torch.nn.Dropout."""
    x = torch.randn(100)
    assert torch.equal(x, dropout(x, p, training=training))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_masks_are_the_same_in_every_type(dtype, dimensions):
    """The mask is drawn apart from the values: rate and positions do not depend on their type."""
    shape = (1000,) if dimensions == 1 else (50, 20)
    torch.manual_seed(3)
    expected = dropout(torch.ones(shape), 0.3) == 0
    torch.manual_seed(3)
    assert torch.equal(expected, dropout(torch.ones(shape, dtype=dtype), 0.3) == 0)


def test_masks_of_any_sizes_rates_and_types_in_turn_keep_their_rates():
    """Takes that end within a block, across its end and beyond it: zeros are as many as p says, and masks agree by chance alone."""
    masks = Masks()
    for zeros, dtype in ((6554, torch.float32), (32768, torch.bfloat16)):
        p = zeros / 65536
        sizes = [700_000, 700_000, 3, 1_500_000, 700_000, 700_000, 700_000]
        taken = [masks.take(n, zeros, dtype) for n in sizes]
        assert sizes == list(map(len, taken))
        for mask in taken:
            n = len(mask)
            assert {0.0, 1.0} >= set(mask.unique().tolist())
            assert abs(int((mask == 0).sum()) - n * p) <= 4 * (n * p * (1 - p)) ** 0.5 + (3 if n < 10 else 0)
        big = [mask for mask in taken if len(mask) == 700_000]
        agree = p**2 + (1 - p) ** 2
        for first, second in itertools.combinations(big, 2):
            same = int((first == second).sum())
            assert abs(same - 700_000 * agree) < 4 * (700_000 * agree * (1 - agree)) ** 0.5


def test_a_large_mask_leaves_nothing_behind():
    """Ten million numbers go when they are no longer used."""
    masks = Masks()
    masks.take(10_000_000, 6554, torch.float32)
    assert 0 == sum(drawn.untyped_storage().nbytes() for drawn in masks._drawn.values())


def test_masks_drawn_while_predicting_can_be_trained_with():
    """As when dropout stays on for predictions: what is left of the block is no inference tensor."""
    model = nn.Sequential(nn.Dropout(0.5))
    economize(model)
    with torch.inference_mode():
        model(torch.ones(4))
    x = torch.ones(4, requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert torch.equal(out.detach(), x.grad)

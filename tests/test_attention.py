"""Attention over packed rows, with dropout, is attention sentence by sentence; its derivative is the numeric one."""

import pytest
import torch
from encoders import FixedDropout

from peftbench.attention import attend
from peftbench.packing import Spans


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("firsts", [False, True])
def test_attention_s_gradient_is_its_derivative(p, firsts):
    """Sentences of 2, 5 and 1 tokens, two heads, over all tokens or from the first ones alone: numeric derivatives in 64 bits."""
    spans, heads = Spans([2, 5, 1]), 2
    queries = spans.firsts if firsts else spans.tokens
    n = 3 if firsts else len(spans.positions)
    q, k, v = (torch.randn(m, 4, dtype=torch.float64, requires_grad=True) for m in (n, len(spans.positions), len(spans.positions)))

    def attention(*tensors):
        return attend(*tensors, queries.indices(heads), spans.tokens.indices(heads), queries.bias.double(), FixedDropout(p))

    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_attention_is_torchs_sentence_by_sentence(p):
    """Each sentence's part is what torch's attention makes of the sentence alone, with the same weights dropped."""
    lengths, heads = [4, 1, 3], 2
    spans, dropout = Spans(lengths), FixedDropout(p)
    tokens = len(spans.positions)
    q, k, v = torch.randn(3, tokens, 6, dtype=torch.float64)
    indices = spans.tokens.indices(heads)
    out = attend(q, k, v, indices, indices, spans.tokens.bias.double(), dropout)
    rows, _, width, _ = spans.tokens.bias.shape
    mask, scale = dropout.draw(torch.ones(rows, heads, width, width)) or (torch.ones(rows, heads, width, width), 1.0)
    cell = spans.tokens.indices(1)[1].tolist()
    for start, length in zip(spans.starts.tolist(), lengths, strict=True):
        some = slice(start, start + length)
        row, column = divmod(cell[start], width)
        kept = mask[row, :, column : column + length, column : column + length].double()
        split = (x[some].view(length, heads, 3).transpose(0, 1) for x in (q, k, v))
        sentence_q, sentence_k, sentence_v = split
        weights = (sentence_q @ sentence_k.transpose(1, 2) / 3**0.5).softmax(-1) * kept * scale
        torch.testing.assert_close(out[some], (weights @ sentence_v).transpose(0, 1).reshape(length, 6))


def test_attention_takes_any_strides():
    """As of an adapter that multiplies from the other side."""
    spans, heads = Spans([4, 1, 3]), 2
    indices, bias = spans.tokens.indices(heads), spans.tokens.bias
    q, k, v = torch.randn(3, len(spans.positions), 6)
    expected = attend(q, k, v, indices, indices, bias, FixedDropout(0.4))
    strided = (x.t().contiguous().t() for x in (q, k, v))
    assert torch.equal(expected, attend(*strided, indices, indices, bias, FixedDropout(0.4)))


def test_attention_keeps_its_weights_and_their_mask_alone():
    """For the backward pass, of what is as large as the scores; the weights with some dropped are made again."""
    spans, kept = Spans([4, 1, 3]), []
    q, k, v = torch.randn(3, len(spans.positions), 6, requires_grad=True)
    indices, bias = spans.tokens.indices(2), spans.tokens.bias
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(q, k, v, indices, indices, bias, FixedDropout(0.4))
    assert 2 == kept.count(2 * bias.numel())

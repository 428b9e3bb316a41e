"""Where sentences lie in a packed row, and predictions in the order of the examples."""

import copy
import dataclasses
import math

import pytest
import torch
from encoders import LONGEST, classifier, encoded_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2ForSequenceClassification

from peftbench import packing
from peftbench.data import Split
from peftbench.device import Device, DoesNotFit
from peftbench.kernels import economize
from peftbench.layers import make_packable
from peftbench.models import load_tokenizer, locate
from peftbench.packing import (
    ATTENTION_STEP,
    BF16_ROW_STEP,
    ROW_STEP,
    Batches,
    Encoded,
    Spans,
    make_batch,
    predict,
    row_step_on,
    shuffled_rows,
)
from peftbench.phases import Untrained

CPU = Device(name="cpu", precision="fp32", why="test")
BF16 = Device(name="cpu", precision="bf16", why="test")


def test_spans_say_where_sentences_lie():
    """Lengths 6, 1, 8 by hand: one token of filling makes 16."""
    spans = Spans([6, 1, 8])
    assert 1 == spans.filling
    assert [0, 6, 7] == spans.starts.tolist()
    assert [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0] == spans.positions.tolist()


def test_cells_of_attention_by_hand():
    """
    Lengths 6, 1, 8 and a token of filling: the longest has a row of 8 cells, the others and the filling share the next one.

    No cell is left over there. Two heads have a block of cells each.
    """
    spans, no = Spans([6, 1, 8]), -math.inf
    cells, of_tokens = spans.tokens.indices(1)
    assert [*range(7, 15), *range(7), 15] == cells.tolist()
    assert [*range(8, 15), *range(8), 15] == of_tokens.tolist()
    alone, shared = spans.tokens.bias[:, 0]
    assert 0.0 == alone.abs().max()
    assert 6 * [6 * [0] + [no, no]] + [6 * [no] + [0, no]] + [7 * [no] + [0]] == shared.tolist()
    cells, of_tokens = Spans([8, 8]).tokens.indices(2)  # items: (token 0 head 0), (token 0 head 1), (token 1 head 0), ...
    assert [*range(0, 16, 2), *range(1, 16, 2), *range(16, 32, 2), *range(17, 32, 2)] == cells.tolist()
    assert [0, 8, 1, 9, 2, 10] == of_tokens.tolist()[:6]


def test_cells_of_first_tokens_by_hand():
    """The third sentence has the first row and the others the next one: two cells a row, the one left over as that row's first."""
    firsts, no = Spans([6, 1, 8]).firsts, -math.inf
    cells, of_sentences = firsts.indices(1)
    assert ([2, 0, 0, 1], [2, 3, 0]) == (cells.tolist(), of_sentences.tolist())
    assert [[8 * [0], 8 * [0]], [6 * [0] + [no, no], 6 * [no] + [0, no]]] == firsts.bias[:, 0].tolist()


def test_a_cell_that_is_not_used_attends_to_its_row_s_first_sentence():
    """And nothing attends to it: lengths 3 and 6 and filling of 7 tokens have a row of 8 cells each."""
    bias, no = Spans([3, 6]).tokens.bias[:, 0], -math.inf
    assert (3, 8, 8) == bias.shape  # 7, 6 and 3 tokens
    assert [8 * [7 * [0] + [no]], 8 * [6 * [0] + 2 * [no]], 8 * [3 * [0] + 5 * [no]]] == bias.tolist()


def test_filling_never_makes_attention_s_rows_longer():
    """Lengths 3 and 6: 23 tokens of filling to 32 are sentences of the 8 cells that a row has anyway, and of the 7 left."""
    spans = Spans([3, 6], row_step=32)
    assert 23 == spans.filling
    assert [*range(3), *range(6), *range(8), *range(8), *range(7)] == spans.positions.tolist()
    assert (5, 1, 8, 8) == spans.tokens.bias.shape
    assert [0, 3] == spans.starts.tolist()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    heads=st.integers(1, 3),
    step=st.sampled_from([ROW_STEP, BF16_ROW_STEP]),
)
def test_attention_has_a_cell_for_every_token(lengths, heads, step):
    """Shapes come in steps, what is spread is collected again, and a token attends to its sentence's tokens and no other."""
    spans = Spans(lengths, row_step=step)
    n = len(spans.positions)
    assert 0 == n % step
    assert sum(lengths) == n - spans.filling
    assert 0 <= spans.filling < step
    items = torch.randn(n, heads, 2)
    cells = spans.tokens.spread(items)
    assert 0 == cells.shape[2] % ATTENTION_STEP
    assert torch.equal(items, spans.tokens.collect(cells))
    of_token = (spans.positions == 0).cumsum(0).double() - 1
    of_cell = spans.tokens.spread(of_token[:, None, None])  # (R, 1, C, 1)
    weights = spans.tokens.bias.double().softmax(-1)
    torch.testing.assert_close(of_cell, weights @ of_cell)  # the mean over what a cell attends to is its own sentence
    heard = spans.tokens.collect(weights.transpose(-1, -2) @ torch.ones_like(of_cell))
    assert (heard > 0.999).all()  # by itself at least, as a share of its sentence
    firsts = spans.firsts.bias.double().softmax(-1) @ of_cell
    assert list(range(len(lengths))) == spans.firsts.collect(firsts).flatten().round().tolist()


@pytest.mark.parametrize(("name", "precision", "step"), [("cpu", "fp32", 8), ("cpu", "bf16", 32), ("cuda:0", "bf16", 8)])
def test_rows_come_in_longer_steps_where_shapes_are_dear(name, precision, step):
    """In bf16 on a CPU, in training and in prediction alike."""
    device = Device(name=name, precision=precision, why="test")
    assert step == row_step_on(device)
    encoded = Encoded(
        split=Split(name="dev", ids=(7, 8), sentences=("a", "b"), labels=(1, 0)),
        tokens=[torch.tensor([4, 5, 6]), torch.tensor([9])],
        labels=torch.tensor([1, 0]),
    )
    batches = Batches(encoded=encoded, size=2, generator=torch.Generator(), device="cpu", packed=True, row_step=step)
    assert (1, step) == batches.collate([0, 1]).inputs["input_ids"].shape


def test_padded_batch_holds_tokens_mask_and_labels():
    """Rows come in the order asked for, padded with zeros to the longest, which do not count as tokens."""
    encoded = Encoded(
        split=Split(name="dev", ids=(7, 8), sentences=("a", "b"), labels=(1, 0)),
        tokens=[torch.tensor([4, 5, 6]), torch.tensor([9])],
        labels=torch.tensor([1, 0]),
    )
    batch = make_batch(encoded, [1, 0], "cpu", packed=False)
    assert [[9, 0, 0], [4, 5, 6]] == batch.inputs["input_ids"].tolist()
    assert [[1, 0, 0], [1, 1, 1]] == batch.inputs["attention_mask"].tolist()
    assert ([1, 0], [0, 1]) == (batch.rows.tolist(), batch.labels.tolist())


def test_a_batch_is_filled_with_the_models_own_padding():
    """GPT-2 reads the last token before it: each text scores as it does alone."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=9, num_labels=2)
    model, device = GPT2ForSequenceClassification(config).eval(), Device(name="cpu", precision="fp32", why="test")
    tokens = [torch.tensor([4, 5, 6, 3]), torch.tensor([7])]
    split = Split(name="dev", ids=(7, 8), sentences=("a", "b"), labels=(1, 0))
    alone = torch.cat([model(text[None]).logits for text in tokens])
    together = predict(model, Encoded(split=split, tokens=tokens, labels=torch.tensor([1, 0]), padding=9), device, packed=False)
    torch.testing.assert_close(together, alone.detach())


def test_packed_batch_lays_tokens_end_to_end():
    """The same rows in one row, positions restarting, with filling at the end that does not count."""
    encoded = Encoded(
        split=Split(name="dev", ids=(7, 8), sentences=("a", "b"), labels=(1, 0)),
        tokens=[torch.tensor([4, 5, 6]), torch.tensor([9])],
        labels=torch.tensor([1, 0]),
    )
    batch = make_batch(encoded, [1, 0], "cpu", packed=True)
    assert [[9, 4, 5, 6, *[9] * 4]] == batch.inputs["input_ids"].tolist()
    assert [[0, 0, 1, 2, *range(4)]] == batch.inputs["position_ids"].tolist()
    assert ([1, 0], [0, 1]) == (batch.rows.tolist(), batch.labels.tolist())


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 45), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_has_every_row_exactly_once(n, size, seed):
    """For any number of rows and any batch size; only the last batch may be smaller."""
    batches = list(shuffled_rows(n, size, torch.Generator().manual_seed(seed)))
    assert list(range(n)) == sorted(row for batch in batches for row in batch)
    assert -(-n // size) == len(batches)
    assert [size] * (n // size) == [len(batch) for batch in batches][: n // size]


def test_order_comes_from_the_generator_alone():
    """The same generator state gives the same order, the next epoch another one, and the global seed plays no part."""

    def epochs(global_seed):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(5)
        return [[row for batch in shuffled_rows(32, 5, generator) for row in batch] for _ in range(2)]

    first, second = epochs(0)
    assert [first, second] == epochs(1)
    assert first != second


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=9), size=st.integers(1, 10), packed=st.booleans())
def test_predictions_are_in_the_order_of_the_examples_whatever_the_batch_size(lengths, size, packed):
    """Row i is what the untouched model says of text i alone."""
    untouched = classifier("bert").eval()
    packable = copy.deepcopy(untouched)
    assert make_packable(packable)
    encoded = encoded_of(lengths)
    logits = predict(packable, encoded, CPU, packed=packed, batch_size=size)
    with torch.no_grad():
        alone = torch.cat([untouched(input_ids=tokens[None]).logits for tokens in encoded.tokens]).float()
    assert ((len(lengths), 2), torch.float32, False) == (logits.shape, logits.dtype, logits.is_inference())
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_is_without_dropout_and_restores_the_mode(training):
    """Two predictions agree to the bit although the model has dropout, and the model is left in the mode it was in."""
    model = classifier("bert", dropout=0.5).train(training)
    assert make_packable(model)
    economize(model)
    encoded = encoded_of([3, 8, 5])
    first, second = (predict(model, encoded, CPU, packed=True) for _ in range(2))
    assert torch.equal(first, second)
    assert training == model.training


def test_predicting_in_bf16_takes_few_shapes():
    """Six batches of 3 to 31 tokens each are rows of 32."""
    model, shapes = classifier("bert").eval(), []
    assert make_packable(model)
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    predict(model, encoded_of([3, 7, 12, 18, 25, 31]), BF16, packed=True, batch_size=1)
    assert 6 * [(1, 32)] == shapes


def test_predicting_nothing_is_refused_by_name():
    """A split without examples is named."""
    with pytest.raises(ValueError, match="no examples to predict in split 'train'"):
        predict(classifier("bert"), encoded_of([]), CPU, packed=True)


def test_texts_are_encoded_without_padding_and_truncated():
    """Tokens are the words between [CLS] and [SEP], at most max_length of them, with the labels of the split."""
    weights = locate(Untrained(architecture="bert", layers=1, hidden_size=8, attention_heads=1), fetch=None)
    tokenizer = load_tokenizer(weights)
    split = Split(name="dev", ids=(3, 1), sentences=("the plot is dull", "the cast is truly superb"), labels=(0, 1))
    encoded = Encoded.from_split(split, tokenizer, max_length=6)
    words = [tokenizer.convert_ids_to_tokens(tokens.tolist()) for tokens in encoded.tokens]
    assert [["[CLS]", "the", "plot", "is", "dull", "[SEP]"], ["[CLS]", "the", "cast", "is", "truly", "[SEP]"]] == words
    assert (2, [0, 1]) == (len(encoded), encoded.labels.tolist())


def test_predicting_halves_the_batch_where_memory_runs_out(monkeypatch):
    """The same logits in the same order, whichever error says so; one text that does not fit is an error of ours."""
    model, encoded = classifier("bert").eval(), encoded_of([5, 3, 8, 2, 6, 4, 7])
    expected = predict(model, encoded, CPU, packed=False)
    sizes, forward = [], model.forward

    def cramped(room, error):
        def run(**inputs):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > room:
                raise error
            return forward(**inputs)

        return run

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")):
        sizes.clear()
        model.forward = cramped(2, error)
        torch.testing.assert_close(predict(model, encoded, CPU, packed=False, batch_size=8), expected)
        assert [7, 4, 2, 2, 2, 1] == sizes
        model.forward = cramped(0, error)
        with pytest.raises(DoesNotFit, match="split 'train': one text at a time does not fit cpu"):
            predict(model, encoded, CPU, packed=False)
    model.forward = forward
    made = packing.make_batch

    def make_batch(encoded, rows, *arguments, **options):  # which copies the batch to the device
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(encoded, rows, *arguments, **options)

    monkeypatch.setattr(packing, "make_batch", make_batch)
    torch.testing.assert_close(predict(model, encoded, CPU, packed=False, batch_size=8), expected)
    model.forward = cramped(0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        predict(model, encoded, CPU, packed=False)


def test_the_share_of_a_token():
    """Over all texts; a tokenizer without one for unknown words knows them all."""
    encoded = encoded_of([2, 3])
    encoded = dataclasses.replace(encoded, tokens=[torch.tensor([7, 1]), torch.tensor([1, 1, 2])])
    assert [0.6, 0.0, 0.0] == [pytest.approx(encoded.share_of(token)) for token in (1, 9, None)]
    assert 0.0 == dataclasses.replace(encoded, tokens=[]).share_of(1)

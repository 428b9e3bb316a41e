"""Packed batches are padded batches without the padding: same logits, same gradients."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, RobertaConfig

from peftbench.data import Split
from peftbench.device import Device, DoesNotFit
from peftbench.kernels import economize, only_words
from peftbench.layers import make_packable
from peftbench.models import load_tokenizer, locate, prepare
from peftbench.packing import ATTENTION_STEP, ROW_STEP, Encoded, Spans, make_batch, predict, shuffled_rows
from peftbench.phases import Phase, Untrained
from peftbench.training import checkpoint_activations

CPU = Device(name="cpu", precision="fp32", why="test")
VOCABULARY, LONGEST = 50, 12

ATTENTION = {"bert": ["query", "key", "value"], "distilbert": ["q_lin", "k_lin", "v_lin"]}
FEEDFORWARD = {"bert": "output.dense", "distilbert": "ffn.lin2"}
VIRTUAL_TOKENS = {
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
}


def classifier(architecture, *, dropout=0.0):
    labels = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_labels": 2}
    if architecture == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "classifier_dropout": dropout}
        config = BertConfig(**sizes, **drops, **labels)
    else:
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        drops = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
        config = DistilBertConfig(**sizes, **drops, **labels)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def adapter(architecture, method):
    if method == "plain":
        return None
    if method == "LORA":
        return {"peft_type": "LORA", "r": 2, "target_modules": ATTENTION[architecture]}
    if method == "IA3":
        feedforward = FEEDFORWARD[architecture]
        targets = [*ATTENTION[architecture], feedforward]
        return {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": [feedforward]}
    sizes = {"token_dim": 16, "num_layers": 2, "num_attention_heads": 2} if architecture == "distilbert" else {}
    return {"peft_type": method, **VIRTUAL_TOKENS[method], **sizes}


def adapted(architecture, method, *, dropout=0.0):
    phase = Phase(id="X-test", role="backbone", peft=adapter(architecture, method), max_length=32)
    model, groups = prepare(classifier(architecture, dropout=dropout), phase)
    return model, groups


def encoded_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    labels = tuple(i % 2 for i in range(n))
    tokens = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    split = Split("train", tuple(range(n)), tuple(f"text {i}" for i in range(n)), labels)
    return Encoded(split, tokens, torch.tensor(labels))


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits = model(**batch.inputs).logits
    F.cross_entropy(logits, batch.labels).backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def twins():
    """For each architecture and method an untouched model and a packable copy, in fp64 and with every parameter random."""
    pairs = {}
    for architecture in ("bert", "distilbert"):
        for method in ("plain", "LORA", "IA3"):
            untouched, _ = adapted(architecture, method)
            generator = torch.Generator().manual_seed(1)
            for parameter in untouched.parameters():
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            untouched.double().train()
            packable = copy.deepcopy(untouched)
            assert make_packable(packable)
            pairs[architecture, method] = untouched, packable
    return pairs


methods = pytest.mark.parametrize("method", ["plain", "LORA", "IA3"])
architectures = pytest.mark.parametrize("architecture", ["bert", "distilbert"])


@architectures
@methods
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_packed_logits_and_gradients_are_the_padded_model_s(twins, architecture, method, lengths, seed):
    """Whatever the mix of lengths, packing changes neither a logit nor the gradient of any parameter that trains."""
    untouched, packable = twins[architecture, method]
    encoded, rows = encoded_of(lengths, seed), range(len(lengths))
    expected, expected_gradients = loss_and_gradients(untouched, make_batch(encoded, rows, "cpu", packed=False))
    actual, gradients = loss_and_gradients(packable, make_batch(encoded, rows, "cpu", packed=True))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-10)
    assert expected_gradients.keys() == gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@architectures
@methods
@pytest.mark.parametrize("training", [True, False])
def test_padded_input_works_as_before(twins, architecture, method, training):
    """A packable model gives an untouched model's logits for padded input, also right after a packed batch."""
    untouched, packable = (model.train(training) for model in twins[architecture, method])
    encoded = encoded_of([5, 1, 9, 3])
    padded = make_batch(encoded, range(4), "cpu", packed=False)
    packable(**make_batch(encoded, range(4), "cpu", packed=True).inputs)
    expected, actual = untouched(**padded.inputs).logits, packable(**padded.inputs).logits
    for model in (untouched, packable):
        model.train()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@architectures
def test_packed_sentences_do_not_see_each_other(twins, architecture):
    """Each sentence of a row gets the logits it gets alone, without padding or neighbours."""
    untouched, packable = twins[architecture, "plain"]
    encoded = encoded_of([4, 12, 1, 7])
    alone = torch.cat([untouched(input_ids=tokens[None]).logits for tokens in encoded.tokens])
    together = packable(**make_batch(encoded, range(4), "cpu", packed=True).inputs).logits
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@architectures
@pytest.mark.parametrize("packed", [True, False])
def test_attention_with_dropout_is_attention_where_nothing_is_dropped(architecture, packed):
    """The spelled-out CPU attention is torch's: with a rate that rounds to none of 65,536 draws it gives the same numbers."""
    untouched = classifier(architecture).double().train()
    dropping = classifier(architecture, dropout=1e-9).double().train()
    dropping.load_state_dict(untouched.state_dict())
    assert make_packable(dropping)
    economize(dropping)
    encoded = encoded_of([6, 2, 11])
    expected, expected_gradients = loss_and_gradients(untouched, make_batch(encoded, range(3), "cpu", packed=False))
    actual, gradients = loss_and_gradients(dropping, make_batch(encoded, range(3), "cpu", packed=packed))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("bert", method) for method in VIRTUAL_TOKENS] + [("distilbert", "P_TUNING"), ("distilbert", "PROMPT_TUNING")],
)
def test_prompt_learning_falls_back_to_padding_and_trains(architecture, method):
    """Virtual tokens before the text cannot be packed: the model is left as it is and a padded step moves what trains."""
    model, groups = adapted(architecture, method)
    parameters = [p for group in groups for p in group["params"]]
    assert not make_packable(model)
    economize(model)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    batch = make_batch(encoded_of([5, 2, 8]), range(3), "cpu", packed=False)
    model.train()
    F.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Linear(2, 2),
        AutoModelForSequenceClassification.from_config(
            RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ),
    ],
    ids=["not a transformer", "roberta"],
)
def test_other_architectures_are_not_packed(model):
    """What is neither BERT nor DistilBERT is left alone."""
    assert not make_packable(model)


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


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), heads=st.integers(1, 3))
def test_attention_has_a_cell_for_every_token(lengths, heads):
    """Shapes come in steps, what is spread is collected again, and a token attends to its sentence's tokens and no other."""
    spans = Spans(lengths)
    n = len(spans.positions)
    assert 0 == n % ROW_STEP
    assert sum(lengths) == n - spans.filling
    assert 0 <= spans.filling < ROW_STEP
    items = torch.randn(n, heads, 2)
    cells = spans.tokens.spread(items)
    assert 0 == cells.shape[2] % ATTENTION_STEP
    assert torch.equal(items, spans.tokens.collect(cells))
    of_token = torch.arange(len(lengths) + 1).repeat_interleave(torch.tensor([*lengths, spans.filling])).double()
    of_cell = spans.tokens.spread(of_token[:, None, None])  # (R, 1, C, 1)
    weights = spans.tokens.bias.double().softmax(-1)
    torch.testing.assert_close(of_cell, weights @ of_cell)  # the mean over what a cell attends to is its own sentence
    heard = spans.tokens.collect(weights.transpose(-1, -2) @ torch.ones_like(of_cell))
    assert (heard > 0.999).all()  # by itself at least, as a share of its sentence
    firsts = spans.firsts.bias.double().softmax(-1) @ of_cell
    assert list(range(len(lengths))) == spans.firsts.collect(firsts).flatten().round().tolist()


def test_padded_batch_holds_tokens_mask_and_labels():
    """Rows come in the order asked for, padded with zeros to the longest, which do not count as tokens."""
    encoded = Encoded(Split("dev", (7, 8), ("a", "b"), (1, 0)), [torch.tensor([4, 5, 6]), torch.tensor([9])], torch.tensor([1, 0]))
    batch = make_batch(encoded, [1, 0], "cpu", packed=False)
    assert [[9, 0, 0], [4, 5, 6]] == batch.inputs["input_ids"].tolist()
    assert [[1, 0, 0], [1, 1, 1]] == batch.inputs["attention_mask"].tolist()
    assert ([1, 0], [0, 1], 4) == (batch.rows.tolist(), batch.labels.tolist(), batch.tokens)


def test_packed_batch_lays_tokens_end_to_end():
    """The same rows in one row, positions restarting, with filling at the end that does not count."""
    encoded = Encoded(Split("dev", (7, 8), ("a", "b"), (1, 0)), [torch.tensor([4, 5, 6]), torch.tensor([9])], torch.tensor([1, 0]))
    batch = make_batch(encoded, [1, 0], "cpu", packed=True)
    assert [[9, 4, 5, 6, *[9] * 4]] == batch.inputs["input_ids"].tolist()
    assert [[0, 0, 1, 2, *range(4)]] == batch.inputs["position_ids"].tolist()
    assert ([1, 0], [0, 1], 4) == (batch.rows.tolist(), batch.labels.tolist(), batch.tokens)


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


@architectures
@pytest.mark.parametrize("peft", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, peft):
    """Layers that run a second time in the backward pass narrow their rows as they did the first time."""
    model = adapted(architecture, "LORA")[0] if peft else classifier(architecture)
    assert make_packable(model)
    batch = make_batch(encoded_of([6, 2, 11]), range(3), "cpu", packed=True)
    expected, expected_gradients = loss_and_gradients(model.train(), batch)
    checkpoint_activations(model)
    actual, gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(actual, expected)
    assert expected_gradients.keys() == gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=9), size=st.integers(1, 10), packed=st.booleans())
def test_predictions_are_in_the_order_of_the_examples_whatever_the_batch_size(twins, lengths, size, packed):
    """Row i is what the untouched model says of text i alone."""
    untouched, packable = twins["bert", "plain"]
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


def test_predicting_nothing_is_refused_by_name():
    """A split without examples is named."""
    with pytest.raises(ValueError, match="no examples to predict in split 'train'"):
        predict(classifier("bert"), encoded_of([]), CPU, packed=True)


def test_texts_are_encoded_without_padding_and_truncated():
    """Tokens are the words between [CLS] and [SEP], at most max_length of them, with the labels of the split."""
    weights = locate(Untrained(architecture="bert", layers=1, hidden_size=8, attention_heads=1), fetch=None)
    tokenizer = load_tokenizer(weights)
    split = Split("dev", (3, 1), ("the plot is dull", "the cast is truly superb"), (0, 1))
    encoded = Encoded.from_split(split, tokenizer, max_length=6)
    words = [tokenizer.convert_ids_to_tokens(tokens.tolist()) for tokens in encoded.tokens]
    assert [["[CLS]", "the", "plot", "is", "dull", "[SEP]"], ["[CLS]", "the", "cast", "is", "truly", "[SEP]"]] == words
    assert (2, [0, 1]) == (len(encoded), encoded.labels.tolist())


def test_taking_rows_keeps_tokens_labels_and_split_together():
    """Rows may come in any order."""
    taken = encoded_of([1, 2, 3]).take([2, 0])
    assert ((2, 0), [3, 1], [0, 0]) == (taken.split.ids, [len(tokens) for tokens in taken.tokens], taken.labels.tolist())


def test_predicting_halves_the_batch_where_memory_runs_out():
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
    model.forward = cramped(0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        predict(model, encoded, CPU, packed=False)


@pytest.mark.parametrize("padding", [0, 3, None])
def test_the_filling_of_a_packed_row_needs_no_padding_token(padding):
    """It is made of a token that is there, so that a model trains whatever its padding token is."""
    model = AutoModelForSequenceClassification.from_config(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=padding,
        )
    )
    make_packable(model)
    economize(model)
    encoded = encoded_of([3, 5])
    with only_words(model, torch.cat([*encoded.tokens])):
        model(**make_batch(encoded, [0, 1], "cpu", packed=True).inputs).logits.sum().backward()

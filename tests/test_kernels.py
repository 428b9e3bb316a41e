"""The cheaper layers are the same mathematics: linear layers, normalization and embeddings are torch's."""

import copy

import pytest
import torch
from encoders import FixedDropout, classifier, encoded_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from peftbench import kernels
from peftbench.dropout import Dropout
from peftbench.kernels import (
    LayerNorm,
    Linear,
    RowEmbedding,
    cast_frozen,
    economize,
    economize_words,
    gelu_backward,
    only_words,
    project,
)
from peftbench.models import prepare
from peftbench.packing import make_batch
from peftbench.phases import Phase


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


@pytest.mark.parametrize(
    ("name", "avx512", "onednn"),
    [("Intel(R) Xeon(R)", True, False), ("AMD EPYC", True, True), ("AMD EPYC", False, False)],
)
def test_the_library_is_the_one_that_was_quicker(name, avx512, onednn):
    """MKL on Intel's processors and where there is AVX2 alone, oneDNN on others; without MKL always oneDNN."""
    processor = {"cpu_name": name, "avx512_f": avx512}
    assert onednn == kernels.onednn_is_faster(processor, has_mkl=True)
    assert kernels.onednn_is_faster(processor, has_mkl=False)


has_onednn = pytest.mark.skipif(kernels.ONEDNN_LINEAR is None, reason="torch is built without oneDNN")


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=has_onednn)])
@pytest.mark.parametrize("bias", [False, True])
def test_either_library_multiplies(onednn, bias, monkeypatch):
    """Values and gradients in fp32 are torch's, whichever library this processor would choose."""
    monkeypatch.setattr(kernels, "_asks_onednn", lambda: onednn)
    torch.manual_seed(0)
    plain = nn.Linear(5, 3, bias=bias)
    model = nn.Sequential(copy.deepcopy(plain))
    economize(model)
    x = torch.randn(4, 5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, x in zip((plain, model), inputs, strict=True):
        layer(x).sin().sum().backward()
    torch.testing.assert_close(model(inputs[1]), plain(inputs[0]))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for expected, actual in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_an_adapter_that_changes_the_weight_itself_learns():
    """LoRA on parameters makes the weight anew in each pass; its gradients are those of the model as it was."""
    phase = Phase(
        id="X-test",
        role="backbone",
        max_length=12,
        peft={
            "peft_type": "LORA",
            "r": 2,
            "target_modules": [],
            "target_parameters": ["layer.0.output.dense.weight"],
            "init_lora_weights": False,
        },
    )
    models = [prepare(classifier("bert"), phase)[0] for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    economize(models[1])
    batch = make_batch(encoded_of([5, 3]), [0, 1], "cpu", packed=False)
    for model in models:
        F.cross_entropy(model(**batch.inputs).logits, batch.labels).backward()
    learned = [{name: p.grad for name, p in model.named_parameters() if "lora_" in name} for model in models]
    assert 2 == len(learned[0])
    torch.testing.assert_close(learned[1], learned[0])


def linears(*, bias, dtype=torch.float64):
    reference = nn.Linear(3, 2, bias=bias, dtype=dtype)
    model = nn.ModuleList([copy.deepcopy(reference)])
    economize(model)
    assert type(model[0]) is Linear
    return reference, model[0]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    bias=st.booleans(),
    to_none=st.booleans(),
    into=st.booleans(),
    fused=st.booleans(),
)
def test_linear_is_linear_over_steps(steps, bias, to_none, into, fused):
    """Values, accumulated gradients, what flows back and trained weights are nn.Linear's over steps of several passes each."""
    torch.manual_seed(0)
    modules = linears(bias=bias)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused) for module in modules]
    for passes in steps:
        for _ in range(passes):
            x, factor = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 2, dtype=torch.float64)
            inputs = [x.clone().requires_grad_(into) for _ in modules]
            for module, given_x in zip(modules, inputs, strict=True):
                (module(given_x) * factor).sum().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
            for expected, actual in zip(*(module.parameters() for module in modules), strict=True):
                torch.testing.assert_close(actual.grad, expected.grad)
        for module, optimizer in zip(modules, optimizers, strict=True):
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        for expected, actual in zip(*(module.parameters() for module in modules), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_linear_under_autocast_is_autocasts_to_the_bit(frozen):
    """The kept 16-bit weight gives autocast's numbers, and gives way when an optimizer or the user changes the weight."""
    modules = linears(bias=True, dtype=torch.float32)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, fused=True) for module in modules]
    for module in modules:
        module.requires_grad_(not frozen)
    for step in range(4):
        x = torch.randn(5, 3)
        results = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            given_x = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = module(given_x)
            out.float().square().sum().backward()
            results.append([out, given_x.grad, *(p.grad.clone() for p in module.parameters() if not frozen)])
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})
        assert torch.bfloat16 == results[1][0].dtype
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(expected, actual)


def test_a_linear_layer_that_trained_between_two_freezes_uses_what_it_learnt():
    """What was kept in 16 bits before is not used again, though the fused AdamW counts no new version of the weight."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    economize(model)
    model.requires_grad_(False)
    x = torch.ones(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
        model(x).sum().backward()
        optimizer.step()
        model.requires_grad_(False)
        torch.testing.assert_close(model(x), x.bfloat16() @ model[0].weight.bfloat16().t())


def test_linear_whose_bias_alone_trains_stays_torchs():
    """As with PEFT's option to train biases: the gradient of the bias must not be lost."""
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    economize(model)
    model(torch.ones(5, 3)).sum().backward()
    assert [5, 5] == model[0].bias.grad.tolist()


def test_a_frozen_linear_that_has_predicted_can_train_what_is_before_it():
    """The weight kept from inference mode is one that autograd accepts."""
    _, linear = linears(bias=True, dtype=torch.float32)
    linear.requires_grad_(False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        linear(torch.ones(1, 3))
    x = torch.ones(1, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).float().sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0, keepdim=True), rtol=2e-2, atol=1e-2)


def test_linear_without_gradient_records_nothing():
    """Under no_grad, or where neither input nor weight needs it."""
    reference, linear = linears(bias=True)
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(reference(x), linear(x))
    linear.requires_grad_(False)
    assert not linear(x).requires_grad


@settings(max_examples=40, deadline=None)
@given(trained=st.lists(st.booleans(), min_size=1, max_size=3), into=st.booleans(), dimensions=st.sampled_from([2, 3]))
def test_layers_that_share_an_input_are_linear_layers(trained, into, dimensions):
    """Values, gradients of those that train, accumulated over two passes, and the sum of what flows back into the input."""
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.Linear(3, 2 + i, dtype=torch.float64).requires_grad_(trains) for i, trains in enumerate(trained)])
    ours = copy.deepcopy(plain)
    economize(ours)
    for _ in range(2):
        x = torch.randn((2, 4, 3)[-dimensions:], dtype=torch.float64)
        inputs = [x.clone().requires_grad_(into) for _ in range(2)]
        outs = [[layer(inputs[0]) for layer in plain], project(inputs[1], list(ours))]
        for expected, actual in zip(*outs, strict=True):
            torch.testing.assert_close(actual, expected)
        for some in outs:
            loss = sum(out.sin().sum() for out in some)
            if loss.requires_grad:
                loss.backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for expected, actual in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("p", [None, 0.0, 0.4])
@pytest.mark.parametrize("affine", ["trained", "frozen", "none"])
def test_adding_and_normalizing_is_torchs(p, affine):
    """Values and gradients of both inputs and of the normalization, over two passes, with the same elements dropped."""
    dropout = None if p is None else FixedDropout(p)
    plain = nn.LayerNorm(6, elementwise_affine=affine != "none", dtype=torch.float64)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(affine == "trained")
    ours = nn.Sequential(copy.deepcopy(plain))
    economize(ours)
    for _ in range(2):
        inputs = [[x.clone().requires_grad_() for x in pair] for pair in [torch.randn(2, 5, 6, dtype=torch.float64).unbind()] * 2]
        mask, scale = (dropout and dropout.draw(inputs[0][1])) or (1.0, 1.0)
        expected = plain(inputs[0][0] + inputs[0][1] * mask * scale)
        actual = ours[0].after_adding(*inputs[1], dropout)
        torch.testing.assert_close(actual, expected)
        for out in (expected, actual):
            out.sin().sum().backward()
        for theirs, mine in zip(*inputs, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_adding_and_normalizing_keeps_types_apart():
    """As under autocast: what is added in bf16 to fp32 gives fp32, and each gradient is of its input's type."""
    x, added = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    out = LayerNorm(8).after_adding(x, added, FixedDropout(0.5))
    out.square().sum().backward()
    assert (torch.float32, torch.float32, torch.bfloat16) == (out.dtype, x.grad.dtype, added.grad.dtype)


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


@pytest.mark.parametrize("padding", [None, 0])
def test_row_embedding_adds_to_a_gradient_that_is_there(padding):
    """As everywhere in torch, a gradient set by the caller is added to; looking up padding adds nothing to its row."""
    rows = RowEmbedding(3, 1, padding_idx=padding)
    rows.weight.grad = torch.ones(3, 1)
    rows(torch.tensor([1] if padding is None else [1, padding])).sum().backward()
    assert [[1], [2], [1]] == rows.weight.grad.tolist()


@pytest.mark.parametrize("frozen", [True, False])
def test_row_embedding_without_gradient_is_a_plain_lookup(frozen):
    """Frozen or under no_grad nothing is recorded."""
    rows = RowEmbedding(4, 2).requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        out = rows(torch.tensor([[1, 3]]))
    assert not out.requires_grad
    assert torch.equal(rows.weight[[1, 3]][None], out)


def test_row_embedding_on_another_device_is_embedding():
    """It looks up and learns as torch has it; only the rows that occur are there, and get a gradient."""
    model = Words(padding_idx=0).to("meta")
    economize_words(model)
    assert RowEmbedding is type(model.words)
    with only_words(model, torch.tensor([1, 2, 2])):
        model(torch.tensor([1, 2], device="meta")).backward()
        assert (3, 3) == tuple(model.words.weight.shape) == tuple(model.words.weight.grad.shape)
    assert (10, 3) == tuple(model.words.weight.shape)


class Words(nn.Module):
    def __init__(self, *, padding_idx):
        super().__init__()
        self.words = nn.Embedding(10, 3, padding_idx=padding_idx, dtype=torch.float64)
        self.head = nn.Linear(3, 1, dtype=torch.float64)

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        return self.head(self.words(ids)).square().sum()


@pytest.mark.parametrize("padding_idx", [None, 0, 5])
def test_training_over_the_words_that_occur_is_training_over_all(padding_idx):
    """AdamW without weight decay, clipped over all gradients: the same weights, those of absent words to the bit."""
    whole = Words(padding_idx=padding_idx)
    model = copy.deepcopy(whole)
    economize(model)
    before, weight = whole.words.weight.detach().clone(), model.words.weight
    texts = [torch.tensor(ids) for ids in ([7, 2, 2], [5, 9], [2, 7, 5, 0])]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.0, fused=True) for m in (whole, model)]
    with only_words(model, torch.cat(texts)):
        assert 10 > len(model.words.weight)
        for ids in (*texts, *texts):
            for m, optimizer in zip((whole, model), optimizers, strict=True):
                m(ids).backward()
                nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    assert weight is model.words.weight
    assert padding_idx == model.words.padding_idx
    torch.testing.assert_close(model.words.weight, whole.words.weight, rtol=1e-12, atol=1e-12)
    assert torch.equal(before[[1, 3, 4, 6, 8]], model.words.weight[[1, 3, 4, 6, 8]])
    assert not torch.equal(before[[2, 7, 9]], model.words.weight[[2, 7, 9]])
    torch.testing.assert_close(model(texts[0]), whole(texts[0]))


def test_a_word_that_was_not_announced_is_an_error_and_what_was_learnt_stays():
    """Nothing is looked up in a wrong row, and leaving on an error restores the whole weight."""
    model = Words(padding_idx=None)
    economize(model)
    with pytest.raises(IndexError), only_words(model, torch.tensor([1, 2])):
        model.words.weight.data += 1
        expected = model.words.weight.detach().clone()
        model(torch.tensor([1, 3]))
    assert (10, 3) == model.words.weight.shape
    assert torch.equal(expected, model.words.weight[[1, 2]])


def test_frozen_words_are_left_alone():
    """Under PEFT the word embedding does not train and stays as it is."""
    model = Words(padding_idx=None)
    model.words.requires_grad_(False)
    economize(model)
    with only_words(model, torch.tensor([1, 2])):
        assert 10 == len(model.words.weight)


def test_economizing_replaces_dropout_linear_layers_and_trainable_embeddings():
    """Only these change, in place and with their weights; frozen embeddings stay torch's."""
    model = nn.ModuleDict(
        {"words": nn.Embedding(5, 2), "frozen": nn.Embedding(5, 2), "drop": nn.Dropout(0.5), "head": nn.Linear(2, 2)}
    )
    model["frozen"].requires_grad_(False)
    weight = model["words"].weight
    economize(model)
    assert [RowEmbedding, nn.Embedding, Dropout, Linear] == [type(module) for module in model.values()]
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


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_output_of_a_linear_layer_may_be_added_to_in_place(shape, frozen):
    """As some adapters do; the gradient is that of torch's layer."""
    torch.manual_seed(0)
    x, plain = torch.randn(shape, requires_grad=True), nn.Linear(4, 3).requires_grad_(not frozen)
    model = nn.Sequential(copy.deepcopy(plain))
    economize(model)
    gradients = []
    for layer in (plain, model):
        out = layer(x)
        out += x.sum()
        out.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters() if not frozen)])
        x.grad = None
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_frozen_linear_layers_cast_once_give_the_numbers_of_autocast():
    """Those that train keep fp32; outputs and gradients are the same to the bit."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 2))
    cast = copy.deepcopy(plain)
    cast_frozen(cast, torch.bfloat16)
    assert [torch.bfloat16, torch.float32] == [cast[0].weight.dtype, cast[2].weight.dtype]
    x, results = torch.randn(5, 8), []
    for model in (plain, cast):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.sum().backward()
        results.append([out, model[2].weight.grad])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    ("peft", "cast"),
    [
        ({"peft_type": "LORA"}, True),
        ({"peft_type": "IA3", "feedforward_modules": []}, True),
        ({"peft_type": "LORA", "use_dora": True}, False),
        ({"peft_type": "GLORA"}, False),
    ],
)
def test_frozen_layers_whose_adapter_reads_their_weights_are_left(peft, cast):
    """It would do its own arithmetic in fewer digits; those beside it, which no adapter has, are cast in any case."""
    phase = Phase(id="X-test", role="backbone", max_length=32, peft={**peft, "target_modules": ["query"]})
    model, _ = prepare(classifier("bert"), phase)
    cast_frozen(model, torch.bfloat16)
    attention = model.get_base_model().bert.encoder.layer[0].attention.self
    types = [layer.weight.dtype for layer in (attention.query.base_layer, attention.key)]
    assert [torch.bfloat16 if cast else torch.float32, torch.bfloat16] == types


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_derivative_of_gelu_is_autograd_s_in_fp64(monkeypatch, dtype, error, avx512):
    """And in fp32 with AVX-512 that of torch itself, to the bit, from which oneDNN's differs."""
    monkeypatch.setattr(kernels, "_has_avx512", lambda: avx512)
    x, gradient = torch.randn(2, 80, 96, dtype=dtype)
    exact = x.double().requires_grad_()
    F.gelu(exact).backward(gradient.double())
    into = gelu_backward(gradient, x)
    torch.testing.assert_close(into, exact.grad.to(dtype), rtol=error, atol=error)
    usual = torch.ops.aten.gelu_backward(gradient, x)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    native = torch.ops.aten.gelu_backward(gradient, x)
    assert torch.equal(into, native if dtype == torch.float32 and avx512 else usual)

"""The layers over packed rows are transformers' over padded ones: same logits, same gradients."""

import copy

import pytest
import torch
from encoders import ATTENTION, LONGEST, VIRTUAL_TOKENS, VOCABULARY, adapted, classifier, encoded_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig
from transformers.activations import GELUActivation

from peftbench.kernels import economize, only_words
from peftbench.layers import Parts, make_packable
from peftbench.models import prepare
from peftbench.packing import BF16_ROW_STEP, ROW_STEP, Row, make_batch
from peftbench.phases import Phase
from peftbench.training import checkpoint_activations


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits = model(**batch.inputs).logits
    F.cross_entropy(logits, batch.labels).backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def packed_batch(encoded, rows, *, one_row=False, row_step=ROW_STEP):
    """In rows that sentences share for attention, as on a CPU, or in a single one, as on a GPU."""
    if not one_row:
        return make_batch(encoded, rows, "cpu", packed=True, row_step=row_step)
    row = Row(encoded, rows)
    return row.batch(row.numbers)


def test_a_decoder_is_not_packed():
    """Its tokens do not attend to those behind them, which no packed layer knows."""
    model = classifier("bert")
    model.config.is_decoder = True
    assert not make_packable(model)


@pytest.fixture(scope="module")
def twins():
    """For each architecture and method an untouched model and packable copies, in fp64 and with every parameter random."""
    models = {}
    for architecture in ("bert", "distilbert"):
        for method in ("plain", "LORA", "IA3"):
            untouched, _ = adapted(architecture, method)
            generator = torch.Generator().manual_seed(1)
            for parameter in untouched.parameters():
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            untouched.double().train()
            copies = [copy.deepcopy(untouched) for _ in range(2)]
            assert all(make_packable(model) for model in copies)
            economize(copies[1])
            models[architecture, method] = untouched, *copies
    return models


methods = pytest.mark.parametrize("method", ["plain", "LORA", "IA3"])
economized = pytest.mark.parametrize("economized", [False, True])
architectures = pytest.mark.parametrize("architecture", ["bert", "distilbert"])


@architectures
@methods
@pytest.mark.parametrize(("economized", "one_row"), [(False, False), (True, False), (False, True)])
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    row_step=st.sampled_from([ROW_STEP, BF16_ROW_STEP]),
)
def test_packed_logits_and_gradients_are_the_padded_model_s(
    twins, architecture, method, economized, one_row, lengths, seed, row_step
):
    """Whatever the mix of lengths, packing changes neither a logit nor the gradient of any parameter that trains."""
    untouched, packable = twins[architecture, method][0], twins[architecture, method][1 + economized]
    encoded, rows = encoded_of(lengths, seed), range(len(lengths))
    expected, expected_gradients = loss_and_gradients(untouched, make_batch(encoded, rows, "cpu", packed=False))
    actual, gradients = loss_and_gradients(packable, packed_batch(encoded, rows, one_row=one_row, row_step=row_step))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-10)
    assert expected_gradients.keys() == gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@architectures
@methods
@economized
@pytest.mark.parametrize("training", [True, False])
def test_padded_input_works_as_before(twins, architecture, method, economized, training):
    """A packable model gives an untouched model's logits for padded input, also right after a packed batch."""
    untouched, packable = (twins[architecture, method][i].train(training) for i in (0, 1 + economized))
    encoded = encoded_of([5, 1, 9, 3])
    padded = make_batch(encoded, range(4), "cpu", packed=False)
    packable(**make_batch(encoded, range(4), "cpu", packed=True).inputs)
    expected, actual = untouched(**padded.inputs).logits, packable(**padded.inputs).logits
    for model in (untouched, packable):
        model.train()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@architectures
@pytest.mark.parametrize("one_row", [False, True])
def test_packed_sentences_do_not_see_each_other(twins, architecture, one_row):
    """Each sentence of a row gets the logits it gets alone, without padding or neighbours."""
    untouched, packable, _ = twins[architecture, "plain"]
    encoded = encoded_of([4, 12, 1, 7])
    alone = torch.cat([untouched(input_ids=tokens[None]).logits for tokens in encoded.tokens])
    together = packable(**packed_batch(encoded, range(4), one_row=one_row).inputs).logits
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@architectures
@pytest.mark.parametrize("packed", [True, False])
def test_attention_with_dropout_is_attention_where_nothing_is_dropped(architecture, packed):
    """With a rate that rounds to none of 65,536 draws: our attention over packed rows, transformers' own over padded ones."""
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


@architectures
@pytest.mark.parametrize(
    ("precision", "onednn", "digits"),
    [(torch.float64, False, 1e-10), (torch.float32, False, 1e-5), (torch.float32, True, 1e-5), (torch.bfloat16, False, 0.03)],
)
def test_a_plain_layer_as_one_operation_is_its_parts_one_by_one(architecture, precision, onednn, digits, monkeypatch):
    """With dropout, over two passes that add up, from the same masks; under autocast to the digits that bf16 has."""
    monkeypatch.setattr("peftbench.kernels._asks_onednn", lambda: onednn)
    model = classifier(architecture, dropout=0.3).to(torch.float64 if precision == torch.float64 else torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    encoded, results = encoded_of([6, 2, 11, 3]), []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(Parts, "are_plain", lambda _: False)
        copied = copy.deepcopy(model).train()
        assert make_packable(copied)
        torch.manual_seed(5)
        economize(copied)
        for rows in ([0, 1, 2], [3, 2]):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                batch = make_batch(encoded, rows, "cpu", packed=True)
                loss = F.cross_entropy(copied(**batch.inputs).logits, batch.labels)
            operations = [name for name in operations_behind(loss) if name.startswith(("_Layer", "_Attention"))]
            assert operations == 2 * (["_LayerBackward"] if whole else ["_AttentionBackward"])
            loss.backward()
        assert all(p.grad is not None for p in copied.parameters())
        results.append({"loss": loss, **{name: p.grad for name, p in copied.named_parameters()}})
    for name, expected in results[1].items():
        if not name.endswith(("key.bias", "k_lin.bias")):  # whose gradient is 0 but for rounding
            assert (results[0][name] - expected).norm() <= digits * expected.norm(), name


@architectures
@pytest.mark.parametrize("change", ["frozen", "words frozen", "activation", "nothing dropped", "padded"])
def test_a_layer_of_another_kind_runs_in_parts(architecture, change):
    """Where it is not known as one operation, where autograd would not see it, or where its parts one by one are faster."""
    model = classifier(architecture, dropout=0.0 if change == "nothing dropped" else 0.3).train()
    assert make_packable(model)
    for name, module in model.named_modules():
        if change == "frozen" and name.endswith(
            "0.attention.out_lin" if architecture == "distilbert" else "0.attention.output.dense"
        ):
            module.requires_grad_(False)
        if change == "words frozen" and name.endswith("embeddings"):
            module.requires_grad_(False)
        if change == "activation" and isinstance(module, GELUActivation):
            module.act = F.silu
    economize(model)
    batch = make_batch(encoded_of([6, 2]), range(2), "cpu", packed=change != "padded")
    loss = F.cross_entropy(model(**batch.inputs).logits, batch.labels)
    assert operations_behind(loss).count("_LayerBackward") == (1 if "frozen" in change else 0)
    loss.backward()
    assert all((p.grad is not None and p.grad.any()) == p.requires_grad for p in model.parameters() if p.dim() > 1)


def operations_behind(tensor):
    """The names of all operations of autograd's graph, each as often as it is there."""
    found, names = {tensor.grad_fn}, []
    queue = [tensor.grad_fn]
    while queue:
        node = queue.pop()
        names.append(node.name())
        new = {following for following, _ in node.next_functions if following is not None} - found
        found |= new
        queue += new
    return names


LAYERS = {"bert": "encoder.layer", "distilbert": "transformer.layer"}
DROPOUTS = {
    "bert": ["attention.self.dropout", "attention.output.dropout", "output.dropout"],
    "distilbert": ["attention.dropout", "ffn.dropout"],
}


@economized
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("architecture", "dropout"), [(a, dropout) for a in DROPOUTS for dropout in DROPOUTS[a]])
def test_each_dropout_of_a_layer_is_used(architecture, dropout, layer, economized):
    """One that drops everything, in the last layer or before: the logits of transformers' layer on padded input."""
    untouched = classifier(architecture).double()
    untouched.set_attn_implementation("eager")
    untouched.base_model.get_submodule(f"{LAYERS[architecture]}.{layer}.{dropout}").p = 1.0
    model = copy.deepcopy(untouched)
    assert make_packable(model)
    if economized:
        economize(model)
    encoded = encoded_of([6, 2, 11])
    expected, everything = (
        untouched.train(mode)(**make_batch(encoded, range(3), "cpu", packed=False).inputs).logits for mode in (True, False)
    )
    actual = model.train()(**make_batch(encoded, range(3), "cpu", packed=True).inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(everything, expected)


@pytest.mark.parametrize("method", ["LORA", "VERA", "LOHA", "LOKR", "HRA", "MISS"])
@architectures
def test_adapters_train_in_bf16(architecture, method):
    """Some give fp32 where autocast would give bf16: gradients come near those of the padded model in fp32."""
    peft = {"peft_type": method, "r": 2, "target_modules": ATTENTION[architecture]}
    phase = Phase(id="X-test", role="backbone", peft=peft, max_length=32)
    untouched, _ = prepare(classifier(architecture, dropout=1e-9), phase)
    generator = torch.Generator().manual_seed(1)
    for parameter in untouched.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model = copy.deepcopy(untouched)
    assert make_packable(model)
    economize(model)
    encoded = encoded_of([6, 2, 11])
    expected, expected_gradients = loss_and_gradients(untouched.train(), make_batch(encoded, range(3), "cpu", packed=False))
    with torch.autocast("cpu", torch.bfloat16):
        batch = make_batch(encoded, range(3), "cpu", packed=True)
        logits = model.train()(**batch.inputs).logits.float()
        loss = F.cross_entropy(logits, batch.labels)
    loss.backward()
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.cat([some[name].flatten() for name in expected_gradients]) for some in (gradients, expected_gradients))
    assert 0.05 > (ours - theirs).norm() / theirs.norm()


def test_a_layer_that_an_adapter_has_wrapped_is_not_packed():
    """PEFT keeps a copy of a whole layer that it trains: the model takes padded batches as before."""
    peft = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "modules_to_save": ["layer.0"]}
    model, _ = prepare(classifier("bert"), Phase(id="X-test", role="backbone", peft=peft, max_length=32))
    assert not make_packable(model)
    economize(model)
    loss_and_gradients(model.train(), make_batch(encoded_of([5, 2]), range(2), "cpu", packed=False))


@architectures
def test_an_adapter_that_averages_over_padding_is_not_packed(architecture):
    """Its logits, which it would not leave alone, are those that PEFT gives for padded sentences."""
    model, _ = adapted(architecture, "LILY")
    batch = make_batch(encoded_of([5, 2, 8]), range(3), "cpu", packed=False)
    expected = model.eval()(**batch.inputs).logits
    with model.disable_adapter():
        assert not torch.equal(expected, model(**batch.inputs).logits)
    assert not make_packable(model)
    economize(model)
    torch.testing.assert_close(model(**batch.inputs).logits, expected)


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

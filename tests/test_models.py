"""Roles become classifiers: the layers asked for, the adapter asked for, and nothing else trains."""

import copy
import json

import pytest
import torch
from encoders import VIRTUAL_TOKENS, adapter
from peft import PeftType, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    ByT5Tokenizer,
    DistilBertConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peftbench.data import grammar_words
from peftbench.models import (
    LABELS,
    ModelError,
    artifact_bytes,
    count_parameters,
    encoder_layers,
    load_classifier,
    load_tokenizer,
    locate,
    prepare,
    save_classifier,
    tokenizer_identity,
)
from peftbench.phases import Phase, Pretrained, Untrained

TINY = Untrained(architecture="bert", layers=1, hidden_size=8, attention_heads=1)
QUERY = {"bert": "query", "distilbert": "q_lin"}
HEAD = {"bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}

# By hand, with 50 words, 32 positions, 16 wide, 32 in the feed-forward layer, 2 layers.
LAYER = 4 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 2 * (16 + 16)
DENSE_HEAD, OUTPUT_HEAD = 16 * 16 + 16, 16 * 2 + 2
EMBEDDINGS = {"bert": (50 + 32 + 2) * 16 + 2 * 16, "distilbert": (50 + 32) * 16 + 2 * 16}
TOTAL = {name: words + 2 * LAYER + DENSE_HEAD + OUTPUT_HEAD for name, words in EMBEDDINGS.items()}
HEAD_SIZE = {"bert": OUTPUT_HEAD, "distilbert": DENSE_HEAD + OUTPUT_HEAD}  # BERT's dense layer is its pooler, part of the encoder
LORA_SIZE = 2 * (16 * 2 + 2 * 16)  # rank 2 on the query of both layers

architectures = pytest.mark.parametrize("architecture", ["bert", "distilbert"])


def classifier(architecture, *, layers=2, labels=2, seed=0):
    sizes = {"vocab_size": 50, "max_position_embeddings": 32, "num_labels": labels}
    if architecture == "bert":
        shape = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(**shape, **sizes)
    else:
        config = DistilBertConfig(dim=16, n_layers=layers, n_heads=2, hidden_dim=32, **sizes)
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def lora(architecture, **changes):
    return {"peft_type": "LORA", "r": 2, "target_modules": [QUERY[architecture]], **changes}


def phase_with(peft=None, **changes):
    return Phase(id="X-test", role="backbone", peft=peft, **{"max_length": 32, **changes})


def load(folder, layers=()):
    return load_classifier(locate(Pretrained(source=str(folder), layers=layers), fetch=None))


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_weights(expected, actual):
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.fixture
def saved(tmp_path):
    def save(architecture="bert", **options):
        model = classifier(architecture, **options)
        save_classifier(model, load_tokenizer(locate(TINY, fetch=None)), tmp_path / "checkpoint")
        return model, tmp_path / "checkpoint"

    return save


@architectures
@pytest.mark.parametrize("layers", [(2, 4, 6), (6,), (1, 2, 3, 4, 5, 6)])
def test_layers_kept_are_exactly_those_of_the_checkpoint(saved, architecture, layers):
    """Layers count from 1; each keeps its weights, all else of the checkpoint stays, and the configuration says how many."""
    original, folder = saved(architecture, layers=6)
    model = load(folder, layers)
    assert len(layers) == len(encoder_layers(model)) == model.config.num_hidden_layers
    for kept, number in zip(encoder_layers(model), layers, strict=True):
        assert_same_weights(encoder_layers(original)[number - 1].state_dict(), kept.state_dict())

    def outside(m):
        return {name: tensor for name, tensor in m.state_dict().items() if ".layer." not in name}

    assert_same_weights(outside(original), outside(model))


@architectures
def test_model_of_fewer_layers_survives_saving(saved, architecture, tmp_path):
    """What was cut out of a checkpoint loads again as it was, with its tokenizer."""
    _, folder = saved(architecture, layers=6)
    model = load(folder, (2, 4, 6))
    save_classifier(model, load_tokenizer(locate(TINY, fetch=None)), tmp_path / "cut")
    assert_same_weights(model.state_dict(), load(tmp_path / "cut").state_dict())
    tokenizer = load_tokenizer(locate(Pretrained(source=str(tmp_path / "cut")), fetch=None))
    assert tokenizer_identity(load_tokenizer(locate(TINY, fetch=None))) == tokenizer_identity(tokenizer)


def test_layers_that_were_kept_find_the_prefix_of_theirs(saved):
    """Layers know their place by a number of their own, by which they look up the keys that a prefix puts before theirs."""
    _, folder = saved(layers=4)
    model, _ = prepare(load(folder, (2, 4)), phase_with(adapter("bert", "PREFIX_TUNING"), max_length=8))
    assert (3, 2) == model(input_ids=torch.full((3, 8), 5), attention_mask=torch.ones(3, 8, dtype=torch.long)).logits.shape


@pytest.mark.parametrize("layers", [(7,), (2, 4, 8), (0, 2), (-1,)])
def test_layers_that_the_checkpoint_does_not_have_are_refused(saved, layers):
    """Layers are counted from 1 to the checkpoint's number."""
    _, folder = saved(layers=6)
    with pytest.raises(ValueError, match="layers"):
        load(folder, layers)


def test_too_many_layers_say_how_many_there_are(saved):
    """The message has what was asked for and what there is."""
    _, folder = saved(layers=6)
    with pytest.raises(ModelError, match=r"layers \(2, 4, 8\) were asked for, .*checkpoint has layers 1 to 6"):
        load(folder, (2, 4, 8))


def test_checkpoint_with_another_number_of_labels_is_refused(saved):
    """A three-way classifier is no sentiment teacher; the message names the folder."""
    _, folder = saved(labels=3)
    with pytest.raises(ModelError, match=r"checkpoint classifies into 3 labels, wanted 2"):
        load(folder)


def test_a_head_of_another_architecture_with_three_labels_is_refused(tmp_path):
    """RoBERTa's has two layers, and the message is ours; the encoder alone loads, with a new head."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=400, num_labels=3, **sizes))
    save_classifier(model, load_tokenizer(locate(TINY, fetch=None)), tmp_path)
    with pytest.raises(ModelError, match=r"classifies into 3 labels, wanted 2.*as model.base_model.save_pretrained saves it"):
        load(tmp_path)
    model.base_model.save_pretrained(tmp_path)
    assert 2 == load(tmp_path).num_labels


def test_what_an_adapter_can_be_put_on_is_named():
    """Where nothing has the name asked for."""
    with pytest.raises(ModelError, match=r"linear layers are query, key, value, dense, classifier$"):
        prepare(classifier("bert"), phase_with(lora("bert", target_modules=["nowhere"])))


def test_pickled_checkpoint_is_refused(saved):
    """Weights are data: a checkpoint that only exists as a pickle is never opened."""
    model, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model.safetensors; pickled weights can run code"):
        load(folder)


def test_damaged_checkpoint_is_refused(saved):
    """A file cut short is named like any other checkpoint that does not load."""
    _, folder = saved()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load a two-label classifier"):
        load(folder)


def test_checkpoint_without_a_head_gets_one_from_the_seed(saved):
    """An encoder alone loads without a word; its head is drawn from torch's generator, its encoder is not."""
    model, folder = saved()
    encoder = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded = load(folder)
        assert_same_weights(encoder, {name: tensor for name, tensor in loaded.state_dict().items() if name in encoder})
        heads.append(loaded.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("tuned", [False, True])
@architectures
def test_a_checkpoint_whose_weights_are_named_otherwise_is_refused(saved, architecture, tuned):
    """As by DistributedDataParallel: transformers would draw the whole encoder at random and say nothing."""
    model, folder = saved(architecture)
    renamed = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"checkpoint lacks \d\d weights of the encoder, such as {architecture}\.embeddings"):
        load_classifier(locate(Pretrained(source=str(folder)), fetch=None), tuned=tuned)


def test_a_checkpoint_with_fewer_layers_than_it_says_is_refused(saved):
    """The upper ones would be random."""
    _, folder = saved(layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks 16 weights of the encoder, such as bert\.encoder\.layer\.2\."):
        load(folder)


def test_a_pooler_that_the_checkpoint_lacks_trains_under_peft(saved):
    """As of a BERT that was trained to fill in words: frozen, it would stay random between encoder and head."""
    model, folder = saved()
    weights = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for kept in (False, True):
        if kept:
            model.save_pretrained(folder)
        weights = locate(Pretrained(source=str(folder)), fetch=None)
        for shapes_only in (False, True):  # as a run and a plan have it
            adapted, _ = prepare(load_classifier(weights, shapes_only=shapes_only), phase_with(lora("bert")))
            assert kept != any(".pooler." in name for name in trainable_names(adapted))


@pytest.mark.parametrize("change", [{"hidden_act": "nope"}, {"id2label": ["a", "b"]}, {"hidden_dropout_prob": "0.1"}])
@pytest.mark.parametrize("how", [{}, {"tuned": True}, {"shapes_only": True}])
def test_a_configuration_that_cannot_be_read_is_refused(saved, change, how):
    """Whatever the library makes of it; the message names the folder."""
    _, folder = saved()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=r"cannot (load a two-label classifier from|read the architecture in) .*checkpoint: "):
        load_classifier(locate(Pretrained(source=str(folder)), fetch=None), **how)


def test_running_out_of_memory_is_no_fault_of_the_checkpoint(saved, monkeypatch):
    """The library's error stays what it is."""
    _, folder = saved()

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", full)
    with pytest.raises(MemoryError):
        load(folder)


def test_labels_have_their_names(saved):
    """Label 1 is positive in every model, whatever the checkpoint called it."""
    _, folder = saved()
    assert [LABELS, LABELS] == [load(folder).config.id2label, load_classifier(locate(TINY, fetch=None)).config.id2label]


@architectures
def test_untrained_weights_come_from_the_seed(architecture):
    """The same seed gives the same random model, another seed another one, both of the shape asked for."""
    weights = locate(Untrained(architecture=architecture, layers=3, hidden_size=8, attention_heads=2), fetch=None)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(load_classifier(weights))
    assert_same_weights(models[0].state_dict(), models[1].state_dict())
    assert not torch.equal(models[0].classifier.weight, models[2].classifier.weight)
    assert (3, len(grammar_words()) + 4, 8) == (len(encoder_layers(models[0])), *models[0].get_input_embeddings().weight.shape)


def test_identity_is_the_content(saved, tmp_path):
    """A copy under another name is the same model; other weights, configuration or layers are another one."""
    _, folder = saved(layers=2)
    before = locate(Pretrained(source=str(folder)), fetch=None).identity
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert before == locate(Pretrained(source=str(moved)), fetch=None).identity
    assert before != locate(Pretrained(source=str(moved), layers=(1,)), fetch=None).identity
    classifier("bert", seed=1).save_pretrained(moved)
    assert before != locate(Pretrained(source=str(moved)), fetch=None).identity


def test_identity_of_untrained_weights_is_their_shape():
    """Two random models of one shape are the same role; the seed is not part of it."""
    wider = Untrained(architecture="bert", layers=1, hidden_size=16, attention_heads=1)
    assert locate(TINY, fetch=None).identity == locate(TINY, fetch=None).identity
    assert locate(TINY, fetch=None).identity != locate(wider, fetch=None).identity


def test_a_checkpoint_without_a_tokenizer_is_refused(saved):
    """Else transformers would make one up to which every word is unknown, and the case would pass at the level of chance."""
    _, folder = saved()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"checkpoint has no tokenizer, wanted tokenizer.json or vocab.txt;"):
        locate(Pretrained(source=str(folder)), fetch=None)


@pytest.mark.parametrize("beside", ["word2vec.model", "vocab.json", "merges.txt"])
def test_what_makes_no_tokenizer_is_none(saved, beside):
    """Other files of that ending, or half of one."""
    _, folder = saved()
    (folder / "tokenizer.json").unlink()
    (folder / beside).write_text("{}")
    with pytest.raises(ModelError, match="checkpoint has no tokenizer"):
        locate(Pretrained(source=str(folder)), fetch=None)


@pytest.mark.parametrize("beside", ["vocab.json", "merges.txt", "spiece.model"])
def test_what_an_older_tokenizer_has_left_beside_a_newer_is_no_part_of_the_identity(saved, beside):
    """Nobody reads it; on the Hub it is not even fetched."""
    _, folder = saved()
    before = locate(Pretrained(source=str(folder)), fetch=None).identity
    (folder / beside).write_text("{}")
    assert before == locate(Pretrained(source=str(folder)), fetch=None).identity


def test_a_tokenizer_may_be_a_vocabulary_and_merges(saved):
    """As an older RoBERTa's; both files are part of the identity."""
    _, folder = saved()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    weights = locate(Pretrained(source=str(folder)), fetch=None)
    assert [0, 6, 4, 2] == load_tokenizer(weights)("aba")["input_ids"]
    (folder / "merges.txt").write_text("#version: 0.2\nb a\n")
    assert weights.identity != locate(Pretrained(source=str(folder)), fetch=None).identity


def test_a_damaged_tokenizer_is_refused(saved):
    """The message names the folder."""
    _, folder = saved()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .*checkpoint"):
        load_tokenizer(locate(Pretrained(source=str(folder)), fetch=None))


@pytest.mark.parametrize(
    ("what", "load"),
    [
        ("tokenizer", load_tokenizer),
        ("two-label classifier", load_classifier),
        ("architecture", lambda weights: load_classifier(weights, shapes_only=True)),
    ],
)
def test_code_of_a_checkpoint_does_not_run(saved, monkeypatch, what, load):
    """An architecture that transformers does not know is refused, and nobody is asked whether to trust its code."""
    _, folder = saved()
    (folder / "mine.py").write_text("raise SystemExit('code of the checkpoint ran')")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoTokenizer": [None, "mine.Tokenizer"]}}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "tokenizer_class": "MineTokenizer", **config}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    weights = locate(Pretrained(source=str(folder)), fetch=None)
    with pytest.raises(ModelError, match=what):
        load(weights)


def test_an_asset_that_there_is_not_is_refused():
    """The message lists those there are."""
    with pytest.raises(ModelError, match="asset:nope is not an asset; there are asset:encoder"):
        locate(Pretrained(source="asset:nope"), fetch=None)


def test_more_tokens_than_positions_are_refused():
    """On a GPU the first such text would end every later case, too."""
    prepare(classifier("bert"), phase_with(max_length=32))
    with pytest.raises(ModelError, match="X-test: max_length must be at most 32, the model's positions, got 33"):
        prepare(classifier("bert"), phase_with(max_length=33))


@pytest.mark.parametrize("method", VIRTUAL_TOKENS)
def test_virtual_tokens_take_positions_too(method):
    """Which an adapter puts before each text."""
    phases = [phase_with(adapter("bert", method), max_length=length) for length in (29, 30)]
    prepare(classifier("bert"), phases[0])
    with pytest.raises(ModelError, match="must be at most 29, the model's positions less 3 virtual tokens, got 30"):
        prepare(classifier("bert"), phases[1])


def test_positions_may_begin_behind_the_paddings():
    """As RoBERTa's do: of 34 with padding at 1 there are 32, and a text of 33 tokens would ask for one more."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, max_position_embeddings=34, pad_token_id=1, **sizes))
    prepare(model, phase_with(max_length=32))
    assert (1, 2) == model(input_ids=torch.full((1, 32), 5)).logits.shape
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 33), 5))
    with pytest.raises(ModelError, match="must be at most 32, the model's positions, got 33"):
        prepare(model, phase_with(max_length=33))


@pytest.mark.parametrize("names", [("POSITIVE", "NEGATIVE"), ("NEGATIVE", "POSITIVE"), ("LABEL_0", "LABEL_1")])
def test_a_teacher_that_calls_its_first_label_positive_is_refused(saved, names):
    """Taken as it is, its accuracy would be that of its errors; a model whose head is new anyway may say what it likes."""
    _, folder = saved()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": dict(enumerate(names))}))
    weights = locate(Pretrained(source=str(folder)), fetch=None)
    load_classifier(weights)
    if names[0] == "POSITIVE":
        with pytest.raises(ModelError, match="label 0 is 'POSITIVE' and 1 is 'NEGATIVE', wanted 0 for negative"):
            load_classifier(weights, tuned=True)
    else:
        load_classifier(weights, tuned=True)


def test_assets_are_fetched_by_name(saved):
    """A source that begins with asset: asks for that asset's folder."""
    _, folder = saved()
    asked = []
    weights = locate(Pretrained(source="asset:encoder"), lambda asset: asked.append(asset.name) or folder)
    assert (["encoder"], str(folder)) == (asked, weights.folder)


def test_one_word_is_one_token_at_tiny_scale():
    """Every word of the grammar is known, between [CLS] and [SEP]; others are [UNK]."""
    tokenizer = load_tokenizer(locate(TINY, fetch=None))
    ids = tokenizer(" ".join(grammar_words()))["input_ids"]
    assert [2, *range(4, 4 + len(grammar_words())), 3] == ids
    assert [2, 1, 3] == tokenizer("xylophone")["input_ids"]


@architectures
def test_full_fine_tuning_trains_everything(architecture):
    """Without PEFT the model stays as it is, in one group; total and trainable are counted by hand."""
    model = classifier(architecture)
    prepared, groups = prepare(model, phase_with(learning_rate=3e-5))
    assert prepared is model
    assert [(3e-5, len(list(model.parameters())))] == [(group["lr"], len(group["params"])) for group in groups]
    assert (TOTAL[architecture], TOTAL[architecture]) == count_parameters(prepared)


@architectures
def test_lora_counts_are_exact(architecture):
    """Adapter and head train; the frozen copy that peft keeps of the head is no part of the model."""
    model, groups = prepare(classifier(architecture), phase_with(lora(architecture), learning_rate=5e-4))
    trainable = LORA_SIZE + HEAD_SIZE[architecture]
    assert (TOTAL[architecture] + LORA_SIZE, trainable) == count_parameters(model)
    assert [(5e-4, trainable)] == [(group["lr"], sum(p.numel() for p in group["params"])) for group in groups]
    copies = sum(p.numel() for name, p in model.named_parameters() if "original_module" in name)
    assert HEAD_SIZE[architecture] == copies
    assert sum(p.numel() for p in model.parameters()) - copies == count_parameters(model)[0]


def test_shared_parameter_counts_once():
    """Tied weights are one tensor."""
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert (9, 9) == count_parameters(nn.Sequential(first, second))


PEFT_METHODS = {
    "LORA": {},
    "IA3": {"feedforward_modules": []},
    "LOHA": {"r": 2},
    "VERA": {"r": 2},
}


@architectures
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_head_always_trains_under_peft(architecture, method):
    """Every part of the head that the checkpoint may lack is trained, whatever the method."""
    peft = {"peft_type": method, "target_modules": [QUERY[architecture]], **PEFT_METHODS[method]}
    model = classifier(architecture)
    adapted, _ = prepare(model, phase_with(peft))
    for part in HEAD[architecture]:
        assert any(f".{part}.modules_to_save" in name for name in trainable_names(adapted))


@architectures
def test_head_trains_under_a_method_that_saves_no_modules(architecture):
    """As TRAINABLE_TOKENS, whose configuration has no place for them."""
    peft = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 6], "target_modules": ["word_embeddings"]}
    model, _ = prepare(classifier(architecture), phase_with(peft))
    names = trainable_names(model)
    assert 2 * 16 + HEAD_SIZE[architecture] == count_parameters(model)[1]
    assert all(any(f".{part}." in name for name in names) for part in HEAD[architecture])


@architectures
@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("ADALORA", "chooses its ranks while it trains"),
        ("POLY", "must be told the task of each example"),
        ("MULTITASK_PROMPT_TUNING", "must be told the task of each example"),
    ],
)
def test_a_method_that_does_not_train_by_the_loss_alone_is_refused(architecture, method, why):
    """AdaLoRA without its updates is no AdaLoRA: all ranks would stay."""
    with pytest.raises(ModelError, match=rf"{method} {why}.*Use one such as "):
        prepare(classifier(architecture), phase_with({"peft_type": method, "target_modules": [QUERY[architecture]]}))


@pytest.mark.parametrize("spelled", ["lora", PeftType.LORA])
def test_a_method_may_be_spelled_as_peft_does(spelled):
    """As its enumeration or in small letters; of the head one copy trains, the other stays as it was."""
    model, _ = prepare(classifier("bert"), phase_with(lora("bert", peft_type=spelled)))
    assert LORA_SIZE + HEAD_SIZE["bert"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_modules_to_save_are_a_list():
    """A word would be taken for its letters."""
    with pytest.raises(ModelError, match="X-test: peft's modules_to_save must be a list of names, got 'classifier'"):
        prepare(classifier("bert"), phase_with(lora("bert", modules_to_save="classifier")))


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_start_from_data_is_refused(start):
    """Else peft begins with other weights, and the record would name a method that did not run."""
    with pytest.raises(ModelError, match=f"X-test: init_lora_weights '{start}' begins from a pass over the data"):
        prepare(classifier("bert"), phase_with(lora("bert", init_lora_weights=start)))


@architectures
@pytest.mark.parametrize("extra", [[], ["classifier"], ["classifier", "LayerNorm"]])
def test_modules_to_save_of_the_user_do_not_freeze_the_head(architecture, extra):
    """Naming further modules to train does not take the head away."""
    model, _ = prepare(classifier(architecture), phase_with(lora(architecture, modules_to_save=extra)))
    for part in [*HEAD[architecture], *extra]:
        assert any(f".{part}.modules_to_save" in name for name in trainable_names(model))


@architectures
def test_unfrozen_layers_without_a_rate_of_their_own_take_the_phases(architecture):
    """One rate, one group, with everything that trains in it."""
    phase = phase_with(lora(architecture), unfreeze_top_layers=1, learning_rate=5e-4)
    model, [group] = prepare(classifier(architecture), phase)
    assert 5e-4 == group["lr"]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in group["params"]}


@architectures
@pytest.mark.parametrize("adapted", [False, True])
def test_layer_decay_multiplies_downwards(architecture, adapted):
    """Head and top layer get the rate, each layer further down half of the one above, embeddings half of the lowest."""
    phase = phase_with(lora(architecture) if adapted else None, learning_rate=1.0, layer_decay=0.5)
    model, groups = prepare(classifier(architecture, layers=3), phase)
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    expected = {"layer.0.": 0.25, "layer.1.": 0.5, "layer.2.": 1.0, "classifier": 1.0, "embeddings": 0.125}
    for part, rate in expected.items():
        assert {rate} == {got for name, got in rates.items() if part in name} or (adapted and part == "embeddings")


@architectures
@pytest.mark.parametrize("unfrozen_learning_rate", [1e-4, 2e-4])
@pytest.mark.parametrize("top", [1, 2])
def test_unfreezing_trains_exactly_the_top_layers_in_a_group_of_their_own(architecture, top, unfrozen_learning_rate):
    """Of the encoder the top layers' own weights train, at their own rate; the rest is adapter and head."""
    base = classifier(architecture, layers=3)
    wanted = {id(p) for layer in list(encoder_layers(base))[-top:] for p in layer.parameters()}
    phase = phase_with(
        lora(architecture), unfreeze_top_layers=top, learning_rate=5e-4, unfrozen_learning_rate=unfrozen_learning_rate
    )
    model, groups = prepare(base, phase)
    assert [5e-4, unfrozen_learning_rate] == [group["lr"] for group in groups]
    assert wanted == {id(p) for p in groups[1]["params"]}
    assert LORA_SIZE * 3 // 2 + HEAD_SIZE[architecture] == sum(p.numel() for p in groups[0]["params"])
    assert top * LAYER == sum(p.numel() for p in groups[1]["params"])
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert len(set(in_groups)) == len(in_groups)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(in_groups)
    assert LORA_SIZE * 3 // 2 + HEAD_SIZE[architecture] + top * LAYER == count_parameters(model)[1]


@architectures
def test_a_phase_sets_the_model_s_dropout_and_leaves_the_adapter_s(architecture):
    """Every dropout of the model has the phase's share; without one it keeps the checkpoint's."""
    for share in (None, 0.0, 0.25):
        model, _ = prepare(classifier(architecture), phase_with(lora(architecture, lora_dropout=0.5), dropout=share))
        own = {m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora" not in name}
        adapter = {m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora" in name}
        assert {0.5} == adapter
        assert own == (
            {share} if share is not None else {m.p for m in classifier(architecture).modules() if isinstance(m, nn.Dropout)}
        )


def test_unfreezing_more_layers_than_there_are_is_refused():
    """The message names the phase and says how many there are."""
    with pytest.raises(ModelError, match="X-test: cannot unfreeze 3 top layers, the encoder has 2"):
        prepare(classifier("bert"), phase_with(lora("bert"), unfreeze_top_layers=3))


@pytest.mark.parametrize(
    "peft",
    [
        lora("bert", target_modules=["nowhere"]),
        lora("bert", bogus=3),
        lora("bert", r=0),
        {"peft_type": "NOPE"},
    ],
    ids=["matches no module", "unknown option", "rank 0", "unknown method"],
)
def test_peft_configuration_that_does_not_apply_names_the_phase(peft):
    """The error has the phase and the configuration, whatever peft raised inside."""
    with pytest.raises(ModelError, match=r"^X-test: peft cannot apply") as refused:
        prepare(classifier("bert"), phase_with(peft))
    assert peft["peft_type"] in str(refused.value)


@architectures
def test_peft_configuration_of_the_caller_is_left_as_it_is(architecture):
    """peft extends lists in place; a phase that is used twice must not notice."""
    settings = lora(architecture, modules_to_save=["classifier"])
    before = copy.deepcopy(settings)
    for _ in range(2):
        prepare(classifier(architecture), phase_with(settings))
    assert before == settings


@architectures
@pytest.mark.parametrize("method", ["full", "LORA", "LORA + layer"])
def test_artifact_is_what_trained_in_four_bytes_a_parameter(architecture, method):
    """Full fine-tuning ships the model, PEFT what it changed; a safetensors header comes on top."""
    peft = None if method == "full" else lora(architecture)
    model, groups = prepare(classifier(architecture), phase_with(peft, unfreeze_top_layers=int("layer" in method)))
    shipped = TOTAL[architecture] if peft is None else LORA_SIZE + HEAD_SIZE[architecture] + LAYER * ("layer" in method)
    tensors = sum(len(group["params"]) for group in groups)
    assert 4 * shipped < artifact_bytes(model) < 4 * shipped + 200 * tensors + 100
    if method == "LORA":
        assert shipped == sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())


def test_model_without_encoder_layers_is_refused():
    """Its class is named."""
    with pytest.raises(ModelError, match="Linear has no encoder layers"):
        encoder_layers(nn.Linear(2, 2))


def test_a_tokenizer_in_python_has_an_identity():
    """By what it saves, as there is no other form of it."""
    first, again, other = (ByT5Tokenizer(extra_ids=n) for n in (5, 5, 6))
    assert tokenizer_identity(first) == tokenizer_identity(again) != tokenizer_identity(other)


def test_an_adapter_beside_the_weights_is_refused(saved):
    """transformers would attach it, whatever the weights' fingerprint says."""
    _, folder = saved()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"checkpoint has an adapter, adapter_config.json; merge it"):
        locate(Pretrained(source=str(folder)), fetch=None)


def test_tokenizer_identity_is_what_it_does():
    """Two tokenizers of one vocabulary are the same; one more word makes another."""
    first, second = (load_tokenizer(locate(TINY, fetch=None)) for _ in range(2))
    assert tokenizer_identity(first) == tokenizer_identity(second)
    second.add_tokens(["xylophone"])
    assert tokenizer_identity(first) != tokenizer_identity(second)


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    """Its words would be looked up beyond the embeddings."""
    weights = locate(TINY, fetch=None)
    model, tokenizer = load_classifier(weights), load_tokenizer(weights)
    model.resize_token_embeddings(20)
    save_classifier(model, tokenizer, tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer has ids up to \d+, the model embeds 20; they are of different"):
        load_classifier(locate(Pretrained(source=str(tmp_path)), fetch=None))


def test_a_peft_task_of_another_kind_is_refused():
    """peft would ask the classifier for what only a generator has."""
    phase = Phase(id="E-x", role="student", epochs=1, peft={"peft_type": "LORA", "task_type": "CAUSAL_LM"})
    with pytest.raises(ModelError, match="E-x: peft's task_type must be SEQ_CLS or left out, got 'CAUSAL_LM'"):
        prepare(load_classifier(locate(TINY, fetch=None)), phase)


@architectures
def test_untrained_weights_bring_no_dropout_into_the_encoder(architecture):
    """A phase that asks for none trains without, whatever the library's configuration has by default."""
    weights = locate(Untrained(architecture=architecture, layers=1, hidden_size=8, attention_heads=1), fetch=None)
    names = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = load_classifier(weights).config.to_dict()
    assert [0.0, 0.0] == [config[name] for name in names if name in config]

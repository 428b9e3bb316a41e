"""Architectures other than BERT and DistilBERT: what of them is the head, and where their heads look."""

import json

import pytest
import torch
from encoders import encoded_of
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from peftbench.device import Device
from peftbench.models import ModelError, load_classifier, load_tokenizer, locate, prepare, save_classifier
from peftbench.packing import Encoded, predict
from peftbench.phases import Phase, Pretrained, Untrained

VOCABULARY = 400
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
CONFIGS = {
    "roberta": (RobertaConfig(vocab_size=VOCABULARY, **SIZES), "query"),
    "electra": (ElectraConfig(vocab_size=VOCABULARY, embedding_size=16, **SIZES), "query"),
    "deberta": (DebertaV2Config(vocab_size=VOCABULARY, **SIZES), "query_proj"),
    "modernbert": (ModernBertConfig(vocab_size=VOCABULARY, **SIZES, **IDS), "Wqkv"),
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64), "c_attn"),
    "t5": (T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2), "q"),
}
WORDS = locate(Untrained(architecture="bert", layers=1, hidden_size=8, attention_heads=1), fetch=None)
CPU = Device(name="cpu", precision="fp32", why="test")


def classifier(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", CONFIGS)
def test_all_that_lies_on_the_encoder_trains_under_peft(architecture):
    """Poolers and dense layers of the head, too, which no checkpoint of an encoder brings: frozen, they would stay random."""
    config, query = CONFIGS[architecture]
    model = classifier(config)
    encoder = model.base_model
    head = [p for p in model.parameters() if all(p is not q for q in encoder.parameters())]
    sizes = sorted(p.numel() for p in head)
    phase = Phase(id="X-test", role="backbone", max_length=16, peft={"peft_type": "LORA", "r": 2, "target_modules": [query]})
    adapted, _ = prepare(model, phase)
    trained = [p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name]
    assert sizes
    assert sizes == sorted(p.numel() for p in trained)


@pytest.mark.parametrize("of_model", [None, 7, 0])
@pytest.mark.parametrize("pads", [False, True])
def test_a_head_that_reads_the_last_token_finds_it_before_the_padding(tmp_path, of_model, pads):
    """GPT-2's: whatever tokenizer and configuration say of padding, a text's logits do not depend on what it is batched with."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=of_model)
    tokenizer = load_tokenizer(WORDS)
    tokenizer.eos_token = "[SEP]"
    if not pads:
        tokenizer.pad_token = None
    save_classifier(classifier(config), tokenizer, tmp_path)
    if not pads:
        saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
        saved.pop("pad_token", None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    weights = locate(Pretrained(source=str(tmp_path)), fetch=None)
    model, texts = load_classifier(weights), encoded_of([2, 9, 5, 12])
    padding = load_tokenizer(weights).pad_token_id
    assert padding == model.config.pad_token_id == (0 if pads else 3)
    together = predict(
        model, Encoded(split=texts.split, tokens=texts.tokens, labels=texts.labels, padding=padding), CPU, packed=False
    )
    with torch.no_grad():
        alone = torch.cat([model(input_ids=tokens[None]).logits for tokens in texts.tokens])
    torch.testing.assert_close(together, alone)


def test_a_head_that_reads_the_last_token_needs_something_to_pad_with(tmp_path):
    """A tokenizer without padding and end leaves nothing that a text may not hold."""
    tokenizer = load_tokenizer(WORDS)
    tokenizer.pad_token = None
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=7)
    save_classifier(classifier(config), tokenizer, tmp_path)
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification reads a text's last token, and its tokenizer has none"):
        load_classifier(locate(Pretrained(source=str(tmp_path)), fetch=None))


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_hide_a_texts_last_token(method):
    """peft gives the model embeddings in place of ids then, and GPT-2 takes the batch's last position, but for a prefix."""
    config, _ = CONFIGS["gpt2"]
    peft = {"peft_type": method, "num_virtual_tokens": 3, "token_dim": 16, "num_layers": 2, "num_attention_heads": 2}
    phase = Phase(id="X-test", role="backbone", max_length=16, peft=peft)
    if method == "PREFIX_TUNING":
        prepare(classifier(config), phase)
    else:
        with pytest.raises(ModelError, match=f"X-test: GPT2.* reads a text's last token, which it cannot find behind {method}"):
            prepare(classifier(config), phase)


def test_virtual_tokens_are_as_wide_as_embeddings():
    """ELECTRA's are narrower than its layers; peft would fail at the first text."""
    config = ElectraConfig(vocab_size=VOCABULARY, embedding_size=8, **SIZES)
    peft = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    phases = [Phase(id="X-test", role="backbone", max_length=16, peft={**peft, **width}) for width in ({}, {"token_dim": 8})]
    with pytest.raises(
        ModelError, match=r"X-test: Electra.* embeds tokens as 8 numbers and PROMPT_TUNING's.* have 16; .* token_dim 8"
    ):
        prepare(classifier(config), phases[0])
    model, _ = prepare(classifier(config), phases[1])
    assert (1, 2) == model(input_ids=torch.full((1, 4), 5), attention_mask=torch.ones(1, 4)).logits.shape


def test_the_padding_of_a_model_whose_positions_depend_on_it_stays(tmp_path):
    """RoBERTa counts from it; saved with the tokenizer's, a teacher would come back as another model."""
    config = RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1, **SIZES)
    model = classifier(config)
    save_classifier(model, load_tokenizer(WORDS), tmp_path)
    loaded = load_classifier(locate(Pretrained(source=str(tmp_path)), fetch=None))
    assert 1 == loaded.config.pad_token_id
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_head_that_reads_the_padding_is_refused(tmp_path):
    """XLNet's reads the last position of a batch, and would read another one on the left."""
    config = XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=32)
    save_classifier(classifier(config), load_tokenizer(WORDS), tmp_path)
    with pytest.raises(ModelError, match="XLNetForSequenceClassification reads a batch's last tokens, padding included"):
        load_classifier(locate(Pretrained(source=str(tmp_path)), fetch=None))

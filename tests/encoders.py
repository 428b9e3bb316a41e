"""Small encoders with random weights, texts as random tokens, and a dropout that drops the same in every call."""

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig

from peftbench.data import Split
from peftbench.dropout import Dropout
from peftbench.models import prepare
from peftbench.packing import Encoded
from peftbench.phases import Phase

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
    if method == "LILY":
        sizes = {"r": 2, "stride_A": 1, "num_B": 2}
        return {"peft_type": "LILY", **sizes, "target_modules": ATTENTION[architecture], "init_weights": False}  # not as zeros
    sizes = {"token_dim": 16, "num_layers": 2, "num_attention_heads": 2} if architecture == "distilbert" else {}
    return {"peft_type": method, **VIRTUAL_TOKENS[method], **sizes}


def adapted(architecture, method, *, dropout=0.0):
    phase = Phase(id="X-test", role="backbone", peft=adapter(architecture, method), max_length=16)
    model, groups = prepare(classifier(architecture, dropout=dropout), phase)
    return model, groups


def encoded_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    labels = tuple(i % 2 for i in range(n))
    tokens = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    split = Split(name="train", ids=tuple(range(n)), sentences=tuple(f"text {i}" for i in range(n)), labels=labels)
    return Encoded(split=split, tokens=tokens, labels=torch.tensor(labels))


class FixedDropout(Dropout):
    """Drops the same elements in every call, so that a numeric derivative sees one function."""

    def draw(self, x):
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= self.p
        return (mask.to(x.dtype), 1 / (1 - self.p)) if self.training and self.p else None

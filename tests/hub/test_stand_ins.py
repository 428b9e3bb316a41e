"""Stand-ins with random weights are found where the thesis scale looks for its repositories, without the Hub."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import BertConfig, DistilBertConfig

from benchmarks import stand_ins
from peftbench.models import load_classifier, load_tokenizer, locate
from peftbench.phases import SCALES, Untrained

SMALL = {
    "bert-large": BertConfig(vocab_size=200, hidden_size=16, num_hidden_layers=8, num_attention_heads=2, intermediate_size=32),
    "distilbert": DistilBertConfig(vocab_size=200, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
}


@pytest.fixture
def tokenizer(hub, monkeypatch, tmp_path):
    """A folder with one, small architectures, and a Hub that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(stand_ins, "CONFIGS", SMALL)
    source = Untrained(architecture="bert", layers=1, hidden_size=16, attention_heads=2)
    load_tokenizer(locate(source, fetch=None)).save_pretrained(tmp_path / "tokenizer")
    yield tmp_path / "tokenizer"
    assert not hub.requests


def test_the_thesis_scale_loads_them(tokenizer):
    """All three roles, the teacher with a head of its own; what a layer adds is drawn smaller the more layers there are."""
    before = torch.get_rng_state()
    stand_ins.write_repositories(tokenizer, Path(constants.HF_HUB_CACHE))
    assert torch.equal(before, torch.get_rng_state())
    scale = SCALES["thesis"]
    for role, layers in ((scale.backbone, 8), (scale.student, 2), (scale.teacher, 8)):
        weights = locate(role, fetch=None)
        assert stand_ins.COMMIT == weights.commit
        assert load_tokenizer(weights)("the film")["input_ids"]
        model = load_classifier(weights, tuned=role is scale.teacher)
        deviations = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
        added = [deviation for name, deviation in deviations.items() if name.endswith(stand_ins.ADDED)]
        assert 2 * layers == len(added)
        assert added == pytest.approx([0.02 * (2 * layers) ** -0.5] * len(added), rel=0.15)


def test_they_replace_nothing(tokenizer):
    """Not even each other."""
    stand_ins.write_repositories(tokenizer, Path(constants.HF_HUB_CACHE))
    with pytest.raises(
        FileExistsError, match=r"stand-ins replace nothing, and this is there already: .*bert-large-uncased.*HF_HOME"
    ):
        stand_ins.write_repositories(tokenizer, Path(constants.HF_HUB_CACHE))

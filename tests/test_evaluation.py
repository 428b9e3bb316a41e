"""Metrics are sklearn's, need no network, and are refused for labels that are none."""

import socket
import tempfile
from pathlib import Path

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, BertConfig

from peftbench.data import DataError, Split
from peftbench.device import Device
from peftbench.evaluation import latency_ms, score
from peftbench.layers import make_packable
from peftbench.models import ModelError
from peftbench.packing import BF16_ROW_STEP, ROW_STEP, Encoded

CPU = Device(name="cpu", precision="fp32", why="test")


def split_of(labels, name="dev"):
    n = len(labels)
    return Split(name=name, ids=tuple(range(n)), sentences=tuple(f"text {i}" for i in range(n)), labels=tuple(labels))


def logits_of(predicted):
    return torch.tensor([[0.5, 1.5] if label else [0.25, -1.0] for label in predicted]).reshape(-1, 2)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_metrics_are_those_of_sklearn_and_scipy(pairs):
    """Accuracy, F1 of label 1 and Wilson's interval, whatever the confusion."""
    predicted, gold = zip(*pairs, strict=True)
    quality, _ = score(logits_of(predicted), split_of(gold))
    hits = sum(p == g for p, g in pairs)
    interval = binomtest(hits, len(pairs)).proportion_ci(method="wilson")
    assert accuracy_score(gold, predicted) == pytest.approx(quality.accuracy, rel=1e-12)
    assert f1_score(gold, predicted, zero_division=0) == pytest.approx(quality.f1, rel=1e-12)
    assert (interval.low, interval.high) == pytest.approx(quality.accuracy_ci95, rel=1e-9, abs=1e-12)
    assert len(pairs) == quality.n


def test_metrics_by_hand():
    """Two hits of label 1, one miss, one false alarm, one hit of label 0: 3/5 and 4/6."""
    quality, predictions = score(logits_of([1, 1, 0, 1, 0]), split_of([1, 1, 1, 0, 0]))
    assert (0.6, 4 / 6, 5) == (quality.accuracy, quality.f1, quality.n)
    gold, predicted = predictions.masks()
    assert 0b00110 == predicted ^ gold
    assert bytes([0b11010000]) == predictions.predicted


@pytest.mark.parametrize(
    ("predicted", "gold", "accuracy", "f1"),
    [
        ([0, 0], [0, 0], 1.0, 0.0),
        ([1, 1], [1, 1], 1.0, 1.0),
        ([0, 0], [1, 1], 0.0, 0.0),
        ([1, 1], [0, 0], 0.0, 0.0),
        ([1], [1], 1.0, 1.0),
    ],
    ids=["no positives anywhere", "only positives", "all missed", "all false alarms", "one example"],
)
def test_degenerate_splits_have_metrics(predicted, gold, accuracy, f1):
    """F1 without a hit is 0, never an error or NaN."""
    quality, _ = score(logits_of(predicted), split_of(gold))
    assert (accuracy, f1) == (quality.accuracy, quality.f1)


def test_tie_is_label_zero():
    """Equal logits are the first label, as argmax has it."""
    assert 1.0 == score(torch.zeros(1, 2), split_of([0]))[0].accuracy


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_are_none_are_refused_by_split(label):
    """GLUE's test split carries -1: scoring it is meaningless and names split and row."""
    with pytest.raises(DataError, match=rf"split 'test' has label {label} \(row 2, 2 times\)"):
        score(logits_of([1, 0, 0]), split_of([1, label, label], name="test"))


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(2, 2), torch.zeros(3, 3), torch.zeros(3)],
    ids=["too few", "three labels", "one number each"],
)
def test_logits_that_do_not_fit_are_refused_by_split(logits):
    """One row of two numbers an example."""
    with pytest.raises(ValueError, match=r"split 'dev' of 3 needs logits of shape \(n, 2\)"):
        score(logits, split_of([0, 1, 0]))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_the_models_fault(broken):
    """An error that explains itself: a case that ends in it has no traceback."""
    with pytest.raises(ModelError, match="1 of 3 logits of split 'dev' are not finite; lower the learning rate or"):
        score(torch.tensor([[0.0, 1.0], [0.0, broken], [0.0, 1.0]]), split_of([0, 1, 0]))


def test_predictions_name_the_split_they_belong_to():
    """Only predictions of the same examples may be compared in pairs."""
    split = split_of([0, 1])
    _, predictions = score(logits_of([0, 1]), split)
    assert split.fingerprint == predictions.split_fingerprint


def test_scoring_uses_no_network_and_leaves_no_file(tmp_path, monkeypatch):
    """`evaluate` neither fetches a script nor keeps a cache: sockets are closed to it and every folder stays as it was."""

    def refuse(*_):
        raise AssertionError("scoring opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    caches = [Path(evaluate.config.HF_EVALUATE_CACHE), Path(evaluate.config.HF_MODULES_CACHE)]
    before = [sorted(cache.rglob("*")) for cache in caches]
    score(logits_of([0, 1]), split_of([0, 1]))
    assert before == [sorted(cache.rglob("*")) for cache in caches]
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("packed", "precision", "length"), [(True, "fp32", ROW_STEP), (True, "bf16", BF16_ROW_STEP), (False, "bf16", 2)]
)
@pytest.mark.parametrize("n", [3, 60])
def test_latency_is_of_one_text_at_a_time(packed, precision, length, n):
    """Five warm-ups and the texts asked for, alone, spread evenly through the split; the median is some milliseconds."""
    model = AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    assert make_packable(model)
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    encoded = Encoded(
        split=split_of([i % 2 for i in range(n)]), tokens=[torch.tensor([i + 1, 5]) for i in range(n)], labels=torch.zeros(n).long()
    )
    device = Device(name="cpu", precision=precision, why="test")
    milliseconds = latency_ms(model, encoded, device, packed=packed, texts=30)
    assert 0 < milliseconds < 60_000
    assert {(1, length)} == {tuple(ids.shape) for ids in seen}
    expected = [i * n // 30 + 1 for i in range(30)]
    assert [*expected[:5], *expected] == [int(ids[0, 0]) for ids in seen]

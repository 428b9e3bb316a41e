"""Logits to metrics with their uncertainty, and the latency of a single text."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor, nn

from peftbench.data import Split
from peftbench.device import Device
from peftbench.intervals import wilson_interval
from peftbench.models import ModelError
from peftbench.packing import Encoded, make_batch, row_step_on
from peftbench.records import Predictions, SplitMetrics

METRICS_VERSION = 1
"""Raise it when the same predictions would give other figures: it is part of every case's fingerprint."""

_LABELS = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of predictions that equal the reference; defined here because `evaluate.load` fetches scripts from the Hub."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(description="accuracy", citation="", features=_LABELS)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        hits = sum(int(p) == int(r) for p, r in zip(predictions, references, strict=True))
        return {"accuracy": hits / len(references)}


class F1(evaluate.Metric):  # type: ignore[misc]
    """Harmonic mean of precision and recall of label 1; 0 where there is neither a hit nor a miss."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(description="f1", citation="", features=_LABELS)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        pairs = [(int(p), int(r)) for p, r in zip(predictions, references, strict=True)]
        hits, errors = pairs.count((1, 1)), pairs.count((1, 0)) + pairs.count((0, 1))
        return {"f1": 2 * hits / (2 * hits + errors) if hits + errors else 0.0}


def score(logits: Tensor, split: Split) -> tuple[SplitMetrics, Predictions]:
    """
    Metrics of one split.

    Args:
        logits: Shape (len(split), 2).

    Raises:
        DataError: If the split has labels outside {0, 1}.
        ModelError: If a logit is not finite.
        ValueError: If there is not one row of logits an example.
    """
    split.check_labels()
    if logits.shape != (len(split), 2):
        raise ValueError(f"split {split.name!r} of {len(split)} needs logits of shape (n, 2), got {tuple(logits.shape)}")
    if broken := int((~torch.isfinite(logits)).any(dim=1).sum()):
        raise ModelError(
            f"{broken} of {len(split)} logits of split {split.name!r} are not finite; "
            "lower the learning rate or, if nothing was trained, take another precision, such as fp32"
        )
    predicted = logits.argmax(dim=1).tolist()
    with tempfile.TemporaryDirectory() as scratch:  # nothing is written there, but evaluate makes its folders
        metrics = evaluate.combine([kind(keep_in_memory=True, cache_dir=scratch, seed=0) for kind in (Accuracy, F1)])
        figures = metrics.compute(predictions=predicted, references=list(split.labels))
    hits = sum(p == label for p, label in zip(predicted, split.labels, strict=True))
    interval = wilson_interval(hits, len(split))
    quality = SplitMetrics(accuracy=figures["accuracy"], f1=figures["f1"], n=len(split), accuracy_ci95=interval)
    return quality, Predictions.from_labels(predicted, split.labels, split.fingerprint)


def latency_ms(model: nn.Module, encoded: Encoded, device: Device, *, packed: bool, texts: int = 30) -> float:
    """Median milliseconds from token ids to logits for one text alone, over texts spread evenly through the split."""
    rows = [i * len(encoded) // texts for i in range(texts)]
    step = row_step_on(device)
    model.eval()
    times = []
    with torch.inference_mode(), device.autocast():
        for row in [*rows[:5], *rows]:  # the first few warm caches up
            device.synchronize()
            began = time.perf_counter()
            model(**make_batch(encoded, [row], device.name, packed=packed, row_step=step).inputs).logits.cpu()
            device.synchronize()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[5:])

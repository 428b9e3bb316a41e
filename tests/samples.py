"""Records as a run would leave them, without running anything, and git."""

import random
import subprocess

from peftbench.intervals import wilson_interval
from peftbench.records import SCHEMA_VERSION, Efficiency, ParameterCounts, Predictions, Record, SplitMetrics

REWRITTEN = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""For sessions in this process, which has loaded the plugin before, with warnings as errors."""

NOTHING = {
    "schema_version": SCHEMA_VERSION,
    "learning_curve": (),
    "data": {},
    "predictions": {},
    "machine": {},
    "versions": {},
    "commit": {},
}
"""What every record has, with nothing in it."""


def predictions(n, wrong, *, split="dev", seed=0):
    """Labels drawn by the split's name; the examples whose positions are in ``wrong`` predicted otherwise."""
    rng = random.Random(split)
    gold = [rng.randrange(2) for _ in range(n)]
    return Predictions.from_labels([g ^ (i in wrong) for i, g in enumerate(gold)], gold, split_fingerprint=f"{split}-{seed}")


def passed(phase_id="B-lora", *, run="20260101T000000Z-aaaaaa", wrong=(), n=900, seconds=60.0, trainable=1000, **changes):
    """A passed record with ``n`` examples in dev and in test, of which dev's ``wrong`` ones are predicted wrongly."""
    phase, _, name = phase_id.partition("-")
    dev, test = predictions(n, set(wrong)), predictions(n, set(), split="test")
    accuracy = 1 - len(set(wrong)) / n
    quality = SplitMetrics(accuracy=accuracy, f1=accuracy, n=n, accuracy_ci95=wilson_interval(accuracy * n, n))
    return Record(
        **{
            **NOTHING,
            "run_id": run,
            "phase": phase,
            "name": name,
            "scale": "mini",
            "seed": 42,
            "outcome": "passed",
            "fingerprint": "f" * 64,
            "config": {"epochs": 2},
            "dev": quality,
            "test": SplitMetrics(accuracy=1.0, f1=1.0, n=n, accuracy_ci95=wilson_interval(n, n)),
            "majority_accuracy": 0.5,
            "parameter_counts": ParameterCounts(total=10_000, trainable=trainable),
            "train_runtime_seconds": seconds,
            "evaluation_seconds": 3.0,
            "samples_per_second": 100.0 * 60 / seconds if seconds else None,
            "efficiency": Efficiency.from_costs(accuracy=accuracy, trainable=trainable, seconds=seconds),
            "learning_curve": ((1, 0.7), (10, 0.3)),
            "peak_memory_bytes": 2**30,
            "peak_memory_scope": "process",
            "artifact_bytes": 2**20,
            "latency_ms": 5.0,
            "data": {"fingerprint": "d" * 64, "source": "samples", "sizes": {"dev": n, "test": n, "train": 9000}},
            "predictions": {"dev": dev, "test": test},
            "machine": {"id": "m1", "processor": "x"},
            "versions": {"torch": "2"},
            "commit": {"id": "c" * 40, "dirty": False, "changes": None},
            **changes,
        }
    )


def failed(phase_id="B-lora", *, run="20260101T000000Z-aaaaaa", error="RuntimeError: no", **changes):
    """A failed record."""
    phase, _, name = phase_id.partition("-")
    facts = {"scale": "mini", "seed": 42, "outcome": "failed", "fingerprint": None, "config": {}, "error": error}
    return Record(run_id=run, phase=phase, name=name, **{**NOTHING, **facts, **changes})


def git(folder, *arguments):
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

"""Records in the formats of other tools."""

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from peftbench.metrics import METRICS, Metric
from peftbench.records import Record
from peftbench.summary import Summary, summarize


def to_bencher(records: Sequence[Record]) -> dict[str, Any]:
    """
    Bencher Metric Format: benchmark → measure → value.

    Its bounds are the 95% interval of accuracy and, of all else, the least and the most of several seeds.

    Source: https://bencher.dev/docs/reference/bencher-metric-format/
    """
    exported: dict[str, Any] = {}
    for name, summary in _named(records):
        measures = exported.setdefault(name, {})
        for metric in METRICS.values():
            values = _values(metric, summary)
            if not values:
                continue
            value = statistics.fmean(values)
            measure = measures[metric.name] = {"value": value}
            if metric.name == "accuracy" and (interval := summary.accuracy_ci95(*summary.measured[0].predictions)):
                measure["lower_value"], measure["upper_value"] = interval
            elif len(values) > 1:
                measure["lower_value"], measure["upper_value"] = min(values), max(values)
    return exported


def to_github_action(records: Sequence[Record], better: Literal["higher", "lower"]) -> list[dict[str, Any]]:
    """
    What github-action-benchmark calls ``customBiggerIsBetter`` or ``customSmallerIsBetter``: a list of entries.

    Source: https://github.com/benchmark-action/github-action-benchmark#examples
    """
    entries = []
    for name, summary in _named(records):
        for metric in METRICS.values():
            values = _values(metric, summary)
            if metric.better != better or not values:
                continue
            entry = {"name": f"{name} {metric.name}", "unit": metric.unit or "fraction", "value": statistics.fmean(values)}
            if len(values) > 1:
                entry["range"] = f"± {statistics.stdev(values):.4g}"
            first = summary.first
            entry["extra"] = f"run {first.run_id}, scale {first.scale}, seeds {', '.join(str(r.seed) for r in summary.measured)}"
            entries.append(entry)
    return entries


def to_pytest_benchmark(records: Sequence[Record]) -> dict[str, Any]:
    """
    What ``pytest --benchmark-json`` writes: an entry a phase, whose rounds are its seeds' training times.

    The last seed's record is where a case leaves its own, and those of the others are beside it.
    """
    from pytest_benchmark import __version__
    from pytest_benchmark.stats import Stats

    entries = []
    for summary in _passed(records):
        *others, last = (record.to_json() for record in summary.measured)
        name = summary.first.phase_id + ("-tiny" if summary.first.scale == "tiny" else "")  # as pytest names the case
        stats: Any = Stats()  # type: ignore[no-untyped-call]
        for record in summary.measured:
            stats.update(record.train_runtime_seconds or 0.0)
        figures = {field: getattr(stats, field) for field in Stats.fields if hasattr(stats, field)}
        entries.append(
            {
                "group": "training" if any(record.train_runtime_seconds for record in summary.measured) else "no training",
                "name": f"test_phase[{name}]",
                "fullname": f"benchmarks/test_phases.py::test_phase[{name}]",
                "params": None,
                "param": name,
                "extra_info": {"peftbench": last, "peftbench_other_seeds": others},
                "options": {
                    "disable_gc": False,
                    "timer": "train_runtime_seconds",
                    "min_rounds": 1,
                    "max_time": 0.0,
                    "min_time": 0.0,
                    "warmup": False,
                },
                "stats": {**figures, "iterations": 1},
            }
        )
    one = records[0]
    return {
        "machine_info": dict(one.machine),
        "commit_info": {"id": one.commit.get("id"), "dirty": one.commit.get("dirty")},
        "benchmarks": entries,
        "datetime": one.run_id,
        "version": __version__,
    }


def _passed(records: Sequence[Record]) -> list[Summary]:
    return summarize(record for record in records if record.outcome == "passed")


def _named(records: Sequence[Record]) -> list[tuple[str, Summary]]:
    return [(f"{summary.first.phase_id}-{summary.first.scale}", summary) for summary in _passed(records)]


def _values(metric: Metric, summary: Summary) -> list[float]:
    return [value for record in summary.measured if (value := metric.value(record)) is not None]

"""Records to text for people; the only place that formats."""

import csv
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

from peftbench.metrics import METRICS, Metric
from peftbench.records import Plan, Record
from peftbench.summary import Summary, pareto_front, summarize
from peftbench.verdicts import Point, Row, Verdict

HEADERS = (
    "phase",
    "dev acc % [95%]",
    "test acc % [95%]",
    "test F1 %",
    "trained",
    "params",
    "train",
    "acc/M",
    "acc/min",
    "peak",
    "ships",
    "front",
)


def render_summary(records: Sequence[Record]) -> str:
    """
    The table at the end of a session, one row a phase, and the lines that explain it.

    Several seeds give means, with the standard deviation behind ± for accuracy.
    """
    from tabulate import tabulate

    blocks = []
    for scale in sorted({record.scale for record in records}):
        summaries = summarize(record for record in records if record.scale == scale)
        front = pareto_front(summaries)
        rows = [_row(summary, front) for summary in summaries]
        table = tabulate(rows, headers=HEADERS, tablefmt="simple", disable_numparse=True, colalign=("left",) + ("right",) * 11)
        blocks.append("\n".join([table, *_notes(summaries)]))
    return "\n\n".join(blocks)


def render_plans(plans: Sequence[Plan], seconds: Sequence[float], *, matrix_rate: float, free_bytes: int | None) -> str:
    """
    What phases will cost, one row each, and whether it fits.

    Args:
        plans: Of the phases, in their order.
        seconds: Estimated duration of each.
        matrix_rate: Multiplications and additions a second that the estimate goes by.
        free_bytes: Memory of the device; None where it has no memory of its own.
    """
    from tabulate import tabulate

    rows = [
        [
            plan.phase,
            render_count(plan.trainable),
            plan.examples,
            plan.steps,
            render_count(plan.tokens),
            f"{plan.training_flops / 1e12:.1f}",
            f"{plan.other_flops / 1e12:.1f}",
            render_bytes(plan.memory_bytes),
            plan.examples_at_once,
            render_duration(duration),
        ]
        for plan, duration in zip(plans, seconds, strict=True)
    ]
    headers = ["phase", "trained", "examples", "steps", "tokens", "TFLOP train", "other", "memory", "at once", "about"]
    lines = [tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=("left",) + ("right",) * 9)]
    lines.append(
        f"all: about {render_duration(sum(seconds))}, at {matrix_rate / 1e9:.0f} GFLOP/s measured for a matrix product here"
    )
    lines.append("TFLOP: matrix products, forward and backward; other: evaluation and the teacher's logits; at once: examples")
    if free_bytes is None:
        lines.append("memory: weights, gradients, optimizer and activations; the device shares the machine's memory")
        return "\n".join(lines)
    needed = max((plan.memory_bytes for plan in plans), default=0)
    verdict = "fits" if needed <= free_bytes else "does not fit"
    lines.append(f"memory: {verdict}: needs {render_bytes(needed)} of the {render_bytes(free_bytes)} that are free")
    return "\n".join(lines)


def render_results(records: Sequence[Record], *, table: str, reach: float | None = None) -> str:
    """
    What a thesis or a pull request shows of some records: one row a phase, the table of each scale in its own right.

    Args:
        table: A format of `tabulate`.
        reach: A dev accuracy; adds the updates and the training time after which each phase was first seen to have it.
    """
    from tabulate import tabulate

    headers = [*HEADERS, *([] if reach is None else [f"steps to {100 * reach:g}%", f"time to {100 * reach:g}%"])]
    blocks = []
    for scale in sorted({record.scale for record in records}):
        summaries = summarize(record for record in records if record.scale == scale)
        front = pareto_front(summaries)
        rows = [[*_row(summary, front), *([] if reach is None else _reaching(summary, reach))] for summary in summaries]
        plain = [[_plain(cell) for cell in row] for row in rows]
        align = ("left",) + ("right",) * (len(headers) - 1)
        blocks.append(tabulate(plain, headers=headers, tablefmt=table, disable_numparse=True, colalign=align))
    return "\n\n".join(blocks)


def render_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV, RFC 4180, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def render_comparison(rows: Sequence[Row], *, table: str = "simple") -> str:
    """
    A comparison as a table, one row a phase and metric, and how many of each verdict there are.

    Args:
        table: A format of `tabulate`.
    """
    from tabulate import tabulate

    cells = []
    for row in rows:
        metric = METRICS.get(row.metric)
        interval = f"[{', '.join(render_difference(metric, end) for end in row.ci95)}]" if row.ci95 and metric else ""
        cells.append(
            [
                *map(printable, (row.phase, row.metric)),
                *(render_value(metric, value) for value in (row.base, row.head)),
                "" if row.difference is None else render_difference(metric, row.difference),
                interval,
                row.verdict,
                printable(row.reason),
            ]
        )
    headers = ["phase", "metric", "base", "head", "difference", "95% interval", "verdict", "why"]
    align = ("left", "left", "right", "right", "right", "right", "left", "left")
    text: str = tabulate(cells, headers=headers, tablefmt=table, disable_numparse=True, colalign=align if cells else None)
    counts = Counter(row.verdict for row in rows)
    return f"{text}\n\n{', '.join(f'{counts[verdict]} {verdict}' for verdict in get_args(Verdict) if counts[verdict])}"


def render_history(traced: Mapping[str, Sequence[Point]], metric: Metric) -> str:
    """A sparkline and a table for each phase, the oldest commit first."""
    from tabulate import tabulate

    blocks = []
    for phase, points in traced.items():
        rows = [
            [
                printable(point.commit[:12]),
                printable(point.subject[:50]),
                render_value(metric, point.value),
                point.records,
                printable(", ".join(point.marks)),
                f"{point.shift} from here" if point.shift else "",
            ]
            for point in points
        ]
        values = [point.value for point in points]
        table = tabulate(rows, headers=["commit", "subject", metric.name, "records", "marks", "level"], disable_numparse=True)
        blocks.append(f"{printable(phase)}  {metric.name}  {sparkline(values)}\n{table}")
    blocks.append(
        f"{metric.name}: {metric.better} is better; level: where it got better or worse than all since the shift before, "
        "by more than noise\nmarks: dirty, changes that were not committed; unknown, to git here; failed; other ..., not compared"
    )
    return "\n\n".join(blocks)


def sparkline(values: Sequence[float | None]) -> str:
    """One character a value, from the lowest to the highest of them; a blank where there is none."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    steps = "▁▂▃▄▅▆▇█"
    scale = (len(steps) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else steps[round((value - low) * scale)] for value in values)


def printable(text: str) -> str:
    """The text without what would steer a terminal, on one line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def render_value(metric: Metric | None, value: float | None) -> str:
    """A metric's value for people; ``None`` for the metric is an outcome, a share of seeds."""
    if value is None:
        return "-"
    if metric is None:
        return {0.0: "failed", 1.0: "passed"}.get(value, f"{100 * value:.0f}% passed")
    if not metric.unit:
        return f"{100 * value:.1f}%"
    if metric.unit == "s":
        return render_duration(value)
    if metric.unit == "B":
        return render_bytes(value)
    if metric.unit == "parameters":
        return render_count(value)
    return f"{value:.1f} {metric.unit}"


def render_difference(metric: Metric | None, value: float) -> str:
    """A difference with its sign, in percentage points where the metric is a fraction."""
    if metric is None:
        return ""
    sign = "-" if value < 0 else "+"
    return sign + (f"{100 * abs(value):.1f} pt" if not metric.unit else render_value(metric, abs(value)))


def render_duration(seconds: float) -> str:
    """Seconds for people: 0.42 s, 42 s, 4:02 min, 1:04:02 h."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d} h"


def render_bytes(size: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if round(size) < 1024:
            return f"{size:.0f} {unit}" if size >= 9.95 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def render_count(count: float) -> str:
    """A number of parameters for people: 770, 12.3k, 4.56M."""
    if count < 999.5:
        return f"{count:.0f}"
    return f"{count / 1e3:.1f}k" if count < 999_950 else f"{count / 1e6:.2f}M"


def _row(summary: Summary, front: set[str]) -> list[str]:
    first = summary.first
    name = first.phase_id
    if not summary.passed:
        return [name, "failed", *[""] * 10]
    counts = summary.passed[0].parameter_counts
    assert counts is not None
    return [
        name + (f" ×{len(summary.passed)}" if len(summary.passed) > 1 else ""),
        _accuracy(summary, "dev"),
        _accuracy(summary, "test"),
        _number(summary.mean("test.f1"), 100, 1),
        render_count(counts.trainable),
        render_count(counts.total),
        render_duration(summary.mean("train_runtime_seconds") or 0.0) if counts.trainable else "-",
        _number(summary.mean("efficiency.accuracy_per_million_params"), 1, 3),
        _number(summary.mean("efficiency.accuracy_per_minute"), 1, 3),
        render_bytes(summary.mean("peak_memory_bytes") or 0.0),
        render_bytes(summary.mean("artifact_bytes") or 0.0),
        "*" if name in front else "",
    ]


def _reaching(summary: Summary, accuracy: float) -> tuple[str, str]:
    """Steps and time until a dev accuracy was seen, the mean over seeds if all of them saw it."""
    reached = [found for record in summary.passed if (found := record.reaching(accuracy))]
    if not any(record.dev_curve for record in summary.passed):
        return "not measured", "not measured"
    if len(reached) < len(summary.passed):
        return "never", "never"
    steps, seconds = (statistics.fmean(column) for column in zip(*reached, strict=True))
    return f"{steps:.0f}", render_duration(seconds)


def _accuracy(summary: Summary, split: str) -> str:
    mean, deviation = summary.mean(f"{split}.accuracy"), summary.deviation(f"{split}.accuracy")
    quality = summary.passed[0].dev if split == "dev" else summary.passed[0].test
    if mean is None or quality is None:
        return "-"
    if deviation is not None:
        return f"{100 * mean:.1f} ± {100 * deviation:.1f}"
    low, high = quality.accuracy_ci95
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _notes(summaries: Sequence[Summary]) -> list[str]:
    records = [record for summary in summaries for record in summary.records]
    passed = [record for record in records if record.outcome == "passed"]
    lines = []
    if passed:
        one = passed[0]
        sizes = ", ".join(f"{name} {size}" for name, size in sorted(one.data.get("sizes", {}).items()))
        lines.append(
            f"scale {one.scale}: {one.data.get('source')} ({sizes}); majority {_number(one.majority_accuracy, 100, 1)}% of dev"
        )
        lines.append(
            "acc/M, acc/min: dev accuracy per million trained parameters, per minute of training; trained: scalars an optimizer"
        )
        lines.append(
            "step may change; ships: bytes to store; front *: none is as good in dev acc, trained, train and better in one"
        )
    for record in passed[:1]:
        overlaps = {name: record.data.get(f"{name}_sentences_in_train", 0) for name in ("dev", "test")}
        lines += [f"warning: {count} {name} sentences also stand in train" for name, count in overlaps.items() if count]
    teachers = {(c.training_seconds, c.logit_seconds, c.cache, r.phase) for r in passed if (c := r.teacher_cost)}
    for training, logits, cache, phase in sorted(teachers, key=lambda t: t[3]):
        spent = f"tuning {render_duration(training)}, logits {render_duration(logits)}, when first made"
        lines.append(f"{phase} also needs the teacher: {spent}; cache {cache} here")
    if seeds := sorted({len(summary.passed) for summary in summaries if len(summary.passed) > 1}):
        lines.append(f"×{', ×'.join(map(str, seeds))}: means over that many seeds; ±: their standard deviation")
    lines += [f"{r.phase}-{r.name} seed {r.seed} failed: {_first_line(r.error)}" for r in records if r.outcome == "failed"]
    return lines


def _plain(text: str) -> str:
    """A cell of Markdown or LaTeX that is nothing but text."""
    return printable(text).replace("|", "/").replace("<", "(").replace(">", ")")


def _safe(value: object) -> object:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _first_line(text: str | None) -> str:
    return next(iter((text or "").splitlines()), "no reason recorded")[:300]

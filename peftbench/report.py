"""Records to text for people; the only place that formats."""

import csv
import io
import json
import os
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from peftbench.metrics import METRICS, Metric
from peftbench.records import PEAK_SINCE_START, ParameterCounts, Plan, Record
from peftbench.summary import Summary, by_scale, differing, pareto_front
from peftbench.verdicts import Point, Row, Verdict

Cell = tuple[float | None, str]
"""What a table sorts by, and what it shows."""

Column = Callable[[Summary, Collection[str]], Cell]
"""Its cell for a phase of which a seed was measured; the names are those of the phases on the front."""

QUALITY: Mapping[str, Column] = {
    "dev acc % [95%]": lambda phase, _: (phase.mean("dev.accuracy"), render_accuracy(phase, "dev")),
    "over maj.": lambda phase, _: _cell(_excess(phase), lambda share: f"{100 * share:+.1f} pt"),
    "acc/M": lambda phase, _: _cell(phase.mean("efficiency.accuracy_per_million_params"), "{:.3f}".format),
    "acc/min": lambda phase, _: _cell(phase.mean("efficiency.accuracy_per_minute"), "{:.3f}".format),
    "front": lambda phase, front: (1, "*") if phase.first.phase_id in front else (0, ""),
    "test acc % [95%]": lambda phase, _: (phase.mean("test.accuracy"), render_accuracy(phase, "test")),
    "test F1 %": lambda phase, _: _cell(phase.mean("test.f1"), lambda share: f"{100 * share:.1f}"),
}
COST: Mapping[str, Column] = {
    "trained": lambda phase, _: _cell(_counts(phase).trainable, render_count),
    "params": lambda phase, _: _cell(_counts(phase).total, render_count),
    "train": lambda phase, _: _cell(phase.mean("train_runtime_seconds") or None, render_duration),
    "peak": lambda phase, _: _cell(phase.mean("peak_memory_bytes"), render_bytes),
    "ships": lambda phase, _: _cell(phase.mean("artifact_bytes"), render_bytes),
    "latency": lambda phase, _: _cell(phase.mean("latency_ms"), lambda value: f"{value:.1f} ms"),
    "texts/s": lambda phase, _: _cell(_texts_per_second(phase), "{:.0f}".format),
}
"""What a phase is good for, and what it takes, by heading: two tables, as one would be too wide for a terminal or a page."""

LEGEND = (
    "over maj.: dev accuracy beyond that of always answering the more frequent label; acc/M, acc/min: dev accuracy per million "
    "trained parameters, per minute of training; front *: the interval of dev acc is above the majority, and no other trained "
    "phase is at least as good in all of dev acc, trained and train, and better in one; trained: parameters that training may "
    "change; ships: bytes to store; latency: of one text alone; texts/s: in evaluation, dev and test"
)
LEGEND_WIDTH = 118
"""Characters to a line of it, where lines do not wrap by themselves."""

POOLED = "accuracy and f1 are over dev and test together"
"""Which the tables of results show apart."""

_MARKDOWN = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|`\\~$"})
_EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])|\*+(?=\S)|(?<=\S)\*+")
"""What Markdown may take for it: underscores at a word's edge, and stars that do not stand alone."""


def render_summary(records: Sequence[Record]) -> str:
    """
    The tables at the end of a session, one row a phase, and the lines that explain them.

    Several seeds give means, with the standard deviation behind ± for accuracy.
    """
    blocks = []
    for summaries in by_scale(records).values():
        tables = "\n\n".join(_tables(summaries, "simple"))
        blocks.append("\n".join([tables, *map(printable, _note_lines(summaries))]))
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
    lines = [_tabulate(headers, rows)]
    lines.append(
        f"all: about {render_duration(sum(seconds))}, at {matrix_rate / 1e9:.0f} GFLOP/s measured for a matrix product here"
    )
    lines.append("TFLOP: matrix products, forward and backward; other: evaluation and teacher logits; at once: examples per pass")
    if free_bytes is None:
        lines.append("memory: weights, gradients, optimizer and activations; the device shares the machine's memory")
        return "\n".join(lines)
    needed = max((plan.memory_bytes for plan in plans), default=0)
    verdict = "fits" if needed <= free_bytes else "does not fit"
    lines.append(f"memory: {verdict}: needs {render_bytes(needed)} of the {render_bytes(free_bytes)} that are free")
    return "\n".join(lines)


def render_results(records: Sequence[Record], *, table: str, reach: float | None = None) -> str:
    """
    What a thesis or a pull request shows of some records: one row a phase, the tables of each scale in their own right.

    Args:
        table: A format of `tabulate`.
        reach: A dev accuracy; adds the updates and the training time after which each phase was first seen to have it.
    """
    blocks = []
    scales = by_scale(records)
    for scale, summaries in scales.items():
        blocks += [f"{'% ' if table == 'latex_booktabs' else ''}scale {scale}"] if len(scales) > 1 else []
        blocks += _tables(summaries, table, reach)
    return "\n\n".join(blocks)


def explain(summaries: Sequence[Summary]) -> list[str]:
    """What the tables of a scale are of, what their columns mean, and what makes figures say less than they seem to."""
    records = [record for summary in summaries for record in summary.records]
    measured = [record for record in records if record.measured]
    scale = f"scale {records[0].scale}"
    lines = [f"{scale}: {data}" for data in dict.fromkeys(map(_render_data, measured))] or [f"{scale}: nothing was measured"]
    if measured:
        lines.append(LEGEND)
        lines += _render_warnings(summaries)
    lines += _render_teachers(summaries)
    if any(len(summary.measured) > 1 and summary.trains for summary in summaries):
        lines.append("×N: figures are means over N seeds; ±: their standard deviation")
    trained = [summary for summary in summaries if summary.measured and summary.trains]
    if trained and not pareto_front(summaries) and not differing(summaries):
        lines.append("front: empty, as each trained phase has a failed seed or an interval that reaches down to the majority")
    return lines + _render_wanting(summaries) + _render_failures(records)


def render_notes(records: Sequence[Record], *, table: str) -> str:
    """What the tables are of and what their columns mean, as text of that format; in LaTeX as comments."""
    lines = [line for summaries in by_scale(records).values() for line in _note_lines(summaries)]
    return "\n".join(f"% {printable(line)}" if table == "latex_booktabs" else _escape(line, table) for line in lines)


def _note_lines(summaries: Sequence[Summary]) -> list[str]:
    texts = explain(summaries)
    return [line for text in texts for line in (textwrap.wrap(text, LEGEND_WIDTH) if text == LEGEND else [text])]


def short(commit: str, digits: int = 12) -> str:
    """A commit's first digits; the id of a run, where there is no commit, is told whole."""
    return commit[:digits] if re.fullmatch("[0-9a-f]{40,}", commit) else commit


def seen_from(folder: Path, path: Path) -> Path:
    """The path relative to a folder; in full where there is no such way, as between the drives of Windows."""
    try:
        return Path(os.path.relpath(path, folder))
    except ValueError:
        return path.resolve()


def render_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV, RFC 4180, with every column that any of them has; lists as JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _safe(json.dumps(value) if isinstance(value, list) else value) for name, value in row.items()})
    return stream.getvalue()


def render_comparison(rows: Sequence[Row], *, table: str = "simple") -> str:
    """
    A comparison as a table, one row a phase and metric, and how many of each verdict there are.

    Args:
        table: A format of `tabulate`.
    """
    cells = []
    for row in rows:
        metric = METRICS.get(row.metric)
        interval = f"[{', '.join(render_difference(metric, end) for end in row.ci95)}]" if row.ci95 and metric else ""
        cells.append(
            [
                row.phase,
                row.metric,
                *(render_value(metric, value) for value in (row.base, row.head)),
                "" if row.difference is None else render_difference(metric, row.difference),
                interval,
                row.verdict,
                row.reason,
            ]
        )
    headers = ["phase", "metric", "base", "head", "difference", "95% interval", "verdict", "why"]
    text = _tabulate(headers, cells, table, align=("left", "left", "right", "right", "right", "right", "left", "left"))
    counts = Counter(row.verdict for row in rows)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])
    measured = any(METRICS[row.metric].kind == "quality" for row in rows if row.metric in METRICS)
    note = verdicts + (f"; {POOLED}" if measured else "")
    note += (
        "; intervals are not adjusted for several, as p and verdicts are" if any(" adjusted for " in r.reason for r in rows) else ""
    )
    return f"{text}\n\n{'% ' if table == 'latex_booktabs' else ''}{note}"


def render_history(traced: Mapping[str, Sequence[Point]], metric: Metric) -> str:
    """A sparkline and a table for each phase, the oldest commit first."""
    blocks = []
    headers = ["commit", "subject", metric.name, "passed", "marks", "level"]
    for phase, points in traced.items():
        rows = [
            [
                short(point.commit),
                point.subject if len(point.subject) <= 50 else f"{point.subject[:49]}…",
                render_value(metric, point.value),
                point.passed,
                ", ".join(point.marks),
                f"{point.shift} from here" if point.shift else "",
            ]
            for point in points
        ]
        values = [point.value for point in points]
        table = _tabulate(headers, rows, align=("left", "left", "right", "right", "left", "left"))
        blocks.append(f"{printable(phase)}  {metric.name}  {sparkline(values)}\n{table}")
    blocks.append(
        f"{metric.name}: {metric.better} is better{f'; {POOLED}' if metric.kind == 'quality' else ''}\n"
        "level: marks where a phase newly fails, or differs by more than noise, in accuracy and f1 from the commit marked before, "
        "in all else from every commit since; other branches are left out, and so are dirty and unknown ones beside any other\n"
        "marks: dirty, with uncommitted changes; perhaps dirty, git did not say; unknown to git here; failed, the last run of a "
        "seed failed; other ..., not compared; other seed set, compared over the seeds of both, if there are any; mixed ..., of "
        "which the value is that of the latest; no predictions for a seed, which is left out"
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
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def render_name(summary: Summary) -> str:
    """The phase's id, how many seeds its figures are means of, and how many failed."""
    name, seeds = summary.first.phase_id, len(summary.measured)
    if seeds > 1 and summary.trains:
        name += f" ×{seeds}"
    if summary.failed and len(summary.records) > 1:
        return f"{name}, {len(summary.failed)} failed"
    return f"{name}, failed" if summary.failed and seeds else name  # without figures, the first cell says it


def render_cells(summary: Summary, columns: Mapping[str, Column], front: Collection[str]) -> list[Cell]:
    """A phase's cell in each column; the first says so, and the others are empty, if all its seeds failed without figures."""
    if not summary.measured:
        return [(None, "failed"), *[(None, "")] * (len(columns) - 1)]
    return [column(summary, front) for column in columns.values()]


def _render_failures(records: Sequence[Record]) -> list[str]:
    """A line for each case that failed, with the first line of its error."""
    return [f"{r.phase_id} seed {r.seed} failed: {r.reason[:300]}" for r in records if r.outcome == "failed"]


def _render_teachers(summaries: Sequence[Summary]) -> list[str]:
    """A line for each phase that needs a teacher, whose cost is not among the phase's own."""
    lines = []
    teachers: dict[tuple[str, float, float], set[str]] = {}
    for phase, cost in ((record.phase, record.teacher_cost) for summary in summaries for record in summary.measured):
        if cost:
            teachers.setdefault((phase, cost.training_seconds, cost.logit_seconds), set()).add(cost.cache)
    for (phase, training, logits), uses in sorted(teachers.items()):
        tuned = f"the teacher, tuned in {render_duration(training)}, and its" if training else "the published teacher's"
        spent = f"{tuned} logits, {render_duration(logits)}, when first made"
        lines.append(f"{phase}: plus {spent}; cache {' and '.join(sorted(uses, reverse=True))} here")
    return lines


def _render_warnings(summaries: Sequence[Summary]) -> list[str]:
    """A line for each thing that makes figures say less than they seem to."""
    which = {"data": "which", "machines": "whose times"}
    lines = [f"warning: different {what} in one table, {which[what]} cannot be compared; no front" for what in differing(summaries)]
    commits: dict[str, list[str]] = {}
    for summary in summaries:
        for commit in dict.fromkeys(_commit(record) for record in summary.measured):
            commits.setdefault(commit, []).append(summary.first.phase_id)
    if len(commits) > 1:
        places = "; ".join(f"{', '.join(phases)} at {commit}" for commit, phases in commits.items())
        lines.append(f"warning: phases in this table were measured at several commits: {places}")
    if constant := [summary.first.phase_id for summary in summaries if any(map(_answers_alike, summary.measured))]:
        lines.append(f"warning: {', '.join(constant)} gave every sentence of dev one label, which F1 may not show")
    waited = [record for summary in summaries for record in summary.measured if record.waited]
    if waited:
        cases = []
        for summary in summaries:
            seeds = [record.seed for record in summary.measured if record.waited]
            of = f" seed {' and '.join(map(str, seeds))}" if len(seeds) < len(summary.measured) else ""
            cases += [f"{summary.first.phase_id}{of}"] if seeds else []
        most = max(record.processor_wait_fraction or 0 for record in waited)
        much = f"{100 * most:.0f}%" if len(waited) == 1 else f"up to {100 * most:.0f}%"
        lines.append(
            f"warning: {', '.join(cases)} waited for a processor {much} of the time, as when other work runs; its times say little"
        )
    if any(record.peak_memory_scope == PEAK_SINCE_START for summary in summaries for record in summary.measured):
        lines.append("peak is of the process since its start: where an earlier case's was higher, this system does not tell")
    for record in [record for summary in summaries for record in summary.measured][:1]:
        if "held out of train" in str(record.data.get("label_protocol")):
            lines.append("test is held out of train, as the data have no labelled test split")
        overlaps = {name: record.data.get(f"{name}_sentences_in_train", 0) for name in ("dev", "test")}
        lines += [f"warning: {count} {name} sentences also occur in train" for name, count in overlaps.items() if count]
    return lines


def render_accuracy(summary: Summary, split: Literal["dev", "test"]) -> str:
    """In percent with its 95% interval; of several seeds the mean, with their standard deviation behind it."""
    mean = summary.mean(f"{split}.accuracy")
    deviation = summary.deviation(f"{split}.accuracy") if summary.trains else None
    if mean is None:
        return "-"
    interval = summary.interval(split)
    shown = f"{100 * mean:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
    return shown if deviation is None else f"{shown} ±{100 * deviation:.1f}"


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


def _render_data(record: Record) -> str:
    """What it was measured on, and what always answering the more frequent label scores."""
    n, gold, _ = record.labels(["test"])
    of_test = f", {100 * max(gold.bit_count(), n - gold.bit_count()) / n:.1f}% of test" if n else ""
    sizes = ", ".join(f"{name} {size}" for name, size in sorted(record.data.get("sizes", {}).items()))
    majority = "-" if record.majority_accuracy is None else f"{100 * record.majority_accuracy:.1f}"
    return f"{record.data.get('source')} ({sizes}); majority {majority}% of dev{of_test}"


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


def _tables(summaries: Sequence[Summary], table: str, reach: float | None = None) -> list[str]:
    """What the phases are good for, and what they take."""
    front = pareto_front(summaries)
    tables = []
    for columns in ({**QUALITY, **({} if reach is None else _reaching(reach))}, COST):
        rows = [[render_name(one), *(text for _, text in render_cells(one, columns, front))] for one in summaries]
        tables.append(_tabulate(["phase", *columns], rows, table))
    return tables


def _tabulate(
    headers: Sequence[str], rows: Sequence[Sequence[object]], table: str = "simple", *, align: Sequence[str] | None = None
) -> str:
    """Rows in a format of `tabulate`, each cell nothing but text in it; but for the first column to the right, unless told."""
    from tabulate import tabulate

    cells = [[_escape(str(cell), table) for cell in row] for row in rows]
    align = align or ["left"] + ["right"] * (len(headers) - 1)
    text: str = tabulate(cells, headers=headers, tablefmt=table, disable_numparse=True, colalign=align if rows else None)
    return text


def _escape(text: str, table: str) -> str:
    text = printable(text)
    if table == "github":
        text = text.translate(_MARKDOWN).replace("](", "]&#40;")
        return _EMPHASIS.sub(lambda found: f"&#{ord(found[0][0])};" * len(found[0]), text)
    if table == "latex_booktabs":  # tabulate escapes what LaTeX does, but not what pdflatex's first font has not
        return text.replace("→", "to").replace("|", "/").encode("latin-1", "replace").decode("latin-1")
    return text


def _reaching(accuracy: float) -> dict[str, Column]:
    """Steps and time until a dev accuracy was seen."""
    return {
        f"steps to {100 * accuracy:g}%": lambda phase, _: _reached(phase, accuracy, 0, "{:.0f}".format),
        f"time to {100 * accuracy:g}%": lambda phase, _: _reached(phase, accuracy, 1, render_duration),
    }


def _reached(summary: Summary, accuracy: float, part: int, render: Callable[[float], str]) -> Cell:
    """The mean over the seeds that were evaluated while they trained, if all of those saw it."""
    evaluated = [record for record in summary.measured if record.dev_curve]
    reached = [found[part] for record in evaluated if (found := record.reaching(accuracy))]
    if not evaluated:
        return None, "not measured"
    if len(reached) < len(evaluated):
        return None, f"{len(reached)} of {len(evaluated)} seeds" if reached else "never"
    return _cell(statistics.fmean(reached), render)


def _excess(summary: Summary) -> float | None:
    accuracy, majority = summary.mean("dev.accuracy"), summary.measured[0].majority_accuracy
    return None if accuracy is None or majority is None else accuracy - majority


def _counts(summary: Summary) -> ParameterCounts:
    counts = summary.measured[0].parameter_counts
    assert counts is not None
    return counts


def _texts_per_second(summary: Summary) -> float | None:
    """Speed of evaluation, which fills batches."""
    one, seconds = summary.measured[0], summary.mean("evaluation_seconds")
    return sum(split.n for split in (one.dev, one.test) if split) / seconds if seconds else None


def _cell(value: float | None, render: Callable[[float], str]) -> Cell:
    return (None, "-") if value is None else (value, render(value))


def _render_wanting(summaries: Sequence[Summary]) -> list[str]:
    """A line on what phases with a failed seed and figures count for; nothing where there are none."""
    if not any(summary.failed and summary.measured for summary in summaries):
        return []
    return [
        "failed: what a test that failed has measured counts in its phase's figures, but a phase with a failed seed is not on the "
        "front, nor does it keep another from it"
    ]


def _answers_alike(record: Record) -> bool:
    n, _, predicted = record.labels(["dev"])
    return n > 1 and predicted.bit_count() in (0, n)


def _commit(record: Record) -> str:
    commit = short(str(record.commit.get("id") or "an unknown one"))
    return commit + (f" with uncommitted changes {str(record.commit.get('changes'))[:6]}" if record.commit.get("dirty") else "")


def _safe(value: object) -> object:
    """Text that a spreadsheet does not take for a formula, nor a terminal for a command; its lines stay."""
    if not isinstance(value, str):
        return value
    text = "\n".join(map(printable, value.split("\n")))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text

"""Records to one HTML file that needs nothing else: table, trade-offs, history and learning curves."""

import base64
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peftbench.metrics import METRICS
from peftbench.phases import SCALE_NAMES
from peftbench.records import Record
from peftbench.report import (
    COST,
    QUALITY,
    Column,
    explain,
    printable,
    render_accuracy,
    render_cells,
    render_count,
    render_duration,
    render_name,
    render_value,
    seen_from,
    short,
)
from peftbench.summary import Summary, by_scale, pareto_front
from peftbench.verdicts import Point

POINTS_WITH_TIPS = 60
"""Points of a line that can be pointed at one by one; of a longer one only shifts can."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""A phase is told by its marker and its name, not by its colour alone."""

_INK, _FRONT = "#010203", "#040506"
_COLOURS = tuple(f"#0a0b{i:02x}" for i in range(len(MARKERS)))
"""Stand-ins that become variables of the style sheet, so that a picture follows light and dark."""

_SVG = "http://www.w3.org/2000/svg"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #d0d7de; --shade: #f6f8fa; --front: #6e7781;
  --c0: #0072b2; --c1: #b34700; --c2: #00795a; --c3: #a3427c; --c4: #7a5c00; --c5: #2b6ca8; --c6: #59636e; --c7: #333333; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #30363d; --shade: #161b22;
  --front: #9198a1; --c0: #56b4e9; --c1: #f0803c; --c2: #2fc49a; --c3: #e58fc0; --c4: #f0e442; --c5: #8cc4ff; --c6: #9198a1;
  --c7: #dddddd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 40rem) {
  .scroll th:first-child, .scroll td:first-child { white-space: normal; min-width: 6.5rem; max-width: 8rem; }
  .scroll .facts th:first-child { white-space: nowrap; max-width: none; } }
th:first-child, td:first-child, .facts th, .facts td { text-align: left; } .facts td { white-space: normal; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button::after { content: " \\2195"; color: var(--front); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
tbody tr:hover { background: var(--shade); } a { color: var(--c0); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.note { font-size: .85rem; color: var(--front); } .notes { margin-bottom: 1rem; } .notes p { font-size: .85rem; margin: .4rem 0; }
figure { margin: 0; } figcaption { font-size: .85rem; } svg { width: 100%; height: auto; max-width: 38rem; }
svg text { fill: var(--ink); } svg [data-tip]:focus { outline: 2px solid var(--c0); }
#tip { position: fixed; z-index: 1; padding: .3rem .5rem; max-width: 20rem; border: 1px solid var(--faint); border-radius: .3rem;
  background: var(--shade); font-size: .85rem; pointer-events: none; white-space: pre-line; } #tip[hidden] { display: none; }
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  });
}
const tip = document.getElementById("tip");
const show = (mark) => {
  const box = mark.getBoundingClientRect();
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(box.right + 6, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(4, box.top - tip.offsetHeight - 6) + "px";
};
for (const mark of document.querySelectorAll("[data-tip]")) {
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => show(mark));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => { tip.hidden = true; });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
"""


def render_page(
    records: Sequence[Record], label: str, *, history: Mapping[str, Sequence[Point]], link: Callable[[Record], str | None]
) -> str:
    """
    The page of one side's records.

    Args:
        label: Which side, for people.
        history: Accuracy over commits by phase; no lines where it has fewer than two.
        link: Where a record's file is, seen from the page; None for one that is in no history.

    Raises:
        ValueError: If matplotlib is not installed, saying how to get it.
    """
    looks = _Looks(sorted({record.phase_id for record in records} | {_phase_id(phase) for phase in history}))
    body = [f"<h1>peftbench: {escape(label)}</h1>"]
    for place, (scale, summaries) in enumerate(by_scale(records).items()):
        measured = [summary for summary in summaries if summary.measured]
        body.append(f"<h2>Scale {escape(scale)}</h2>")
        body += [_table(summaries, columns, link) for columns in (QUALITY, COST)]
        body.append('<p class="note">A wide table scrolls sideways; a click on a heading sorts.</p>')
        body.append(f'<div class="notes">{"".join(f"<p>{escape(text)}</p>" for text in explain(summaries))}</div>')
        if measured:
            charts = [_trade_off(measured, cost, place, looks) for cost in ("parameters", "minutes")]
            charts += [_curves(measured, place, looks), _dev_curves(measured, place, looks)]
            body.append(f'<div class="charts">{"".join(charts)}</div>')
    if any(len(points) > 1 for points in history.values()):
        body.append(f'<h2>History</h2><div class="charts">{_history(history, looks)}</div>')
    body.append(f"<h2>Measured on</h2>{_facts(records)}")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>peftbench: {escape(label)}</title><style>{STYLE}</style></head>\n<body>\n<main>{''.join(body)}</main>"
        f'<div id="tip" role="status" hidden></div>\n<script>{SCRIPT}</script></body></html>\n'
    )


def _table(summaries: Sequence[Summary], columns: Mapping[str, Column], link: Callable[[Record], str | None]) -> str:
    front = pareto_front(summaries)
    names = ("phase", *columns)
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names) + "<th>records</th>"
    rows = []
    for summary in summaries:
        name = render_name(summary)
        shown: list[tuple[object, str]] = [(name, name), *render_cells(summary, columns, front)]
        values = [("" if value is None else str(value), text) for value, text in shown]
        row = "".join(f'<td data-value="{escape(value)}">{escape(text)}</td>' for value, text in values)
        links = [f'<a href="{escape(found)}">seed {r.seed}</a>' for r in summary.records if (found := link(r))]
        rows.append(f"<tr>{row}<td>{' '.join(links)}</td></tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="results: {escape(names[1])} and more">{table}</div>'


def _trade_off(summaries: Sequence[Summary], cost: str, place: int, looks: "_Looks") -> str:
    """Dev accuracy against trainable parameters or training minutes, with intervals and the front."""
    figure, axes = _figure()
    tips: dict[str, str] = {}
    points: dict[str, tuple[float, float]] = {}
    bars = []
    front = pareto_front(summaries)
    for summary in summaries:
        name = summary.first.phase_id
        counts = summary.measured[0].parameter_counts
        seconds, accuracy = summary.mean("train_runtime_seconds"), summary.mean("dev.accuracy")
        if not counts or not counts.trainable or not seconds or accuracy is None:
            continue
        x = counts.trainable if cost == "parameters" else seconds / 60
        low, high = summary.interval("dev") or (math.nan, math.nan)
        number, colour, marker = looks.of(name)
        ends = [[100 * max(0.0, accuracy - low)], [100 * max(0.0, high - accuracy)]]
        gid = f"point-{place}-{cost}-{number}"
        _, _, [bar] = axes.errorbar([x], [100 * accuracy], yerr=ends, color=colour, linewidth=1)
        bar.set_gid(f"bar-of-{gid}")
        axes.plot([x], [100 * accuracy], marker, color=colour, markersize=9, gid=gid)
        tips[gid] = (
            f"{name}\ndev accuracy {render_accuracy(summary, 'dev')} %\n{render_count(counts.trainable)} trained parameters\n"
            f"{render_duration(seconds)} of training" + ("\non the Pareto front" if name in front else "")
        )
        points[name] = x, 100 * accuracy
        bars.append([(x, 100 * accuracy - ends[0][0]), (x, 100 * accuracy + ends[1][0])])
    if not points:
        return ""
    whole = {summary.first.phase_id for summary in summaries if not summary.failed}
    places = sorted(point for name, point in points.items() if name in whole)
    edge = [(x, y) for x, y in places if not any(other <= x and best >= y for other, best in places if (other, best) != (x, y))]
    if len(edge) > 1:
        axes.step(*zip(*edge, strict=True), "--", where="post", color=_FRONT, linewidth=1, zorder=0)
    axes.margins(x=0.25)
    _scale_logarithmically(axes.xaxis, render_count if cost == "parameters" else "{:g}".format)
    _label(axes, points, bars)
    axes.set_xlabel("trained parameters" if cost == "parameters" else "training, minutes")
    axes.set_ylabel("dev accuracy, %")
    title = f"Accuracy against {'trained parameters' if cost == 'parameters' else 'training time'}"
    others = "phase without a failed seed" if len(whole) < len(summaries) else "phase"
    dashed = f"; dashed: what no other {others} beats on these two" if len(edge) > 1 else ""
    return _embed(figure, f"{title}; bars: 95% interval{dashed}", tips)


def _label(axes: Any, points: Mapping[str, tuple[float, float]], bars: Sequence[Sequence[tuple[float, float]]]) -> None:
    """A name beside each point: right above it, unless something is there, or the edge, and another side has more room."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    around = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in map(axes.transData.transform, points.values())]
    around += [Bbox(axes.transData.transform(bar)).padded(2) for bar in bars]
    for name, point in points.items():
        text = axes.annotate(_text(name), point, xytext=(0, 0), textcoords="offset points", color=_INK)

        def move(side: tuple[int, int], text: Any = text) -> Any:
            text.set(position=side, ha="left" if side[0] > 0 else "right")
            return text.get_window_extent()

        def crowding(side: tuple[int, int]) -> int:
            box = move(side)
            outside: bool = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
            return outside + sum(bool(box.overlaps(other)) for other in around)

        best = min(((8, 5), (-8, 5), (8, -12), (-8, -12)), key=crowding)
        around.append(move(best))


def _curves(summaries: Sequence[Summary], place: int, looks: "_Looks") -> str:
    """Training loss over the share of training."""
    lines = {}
    for summary in summaries:
        if curve := summary.measured[-1].learning_curve:
            steps, losses = zip(*curve, strict=True)
            tip = f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {steps[-1]} steps"
            lines[summary.first.phase_id] = [step / steps[-1] for step in steps], losses, tip
    caption = "Learning curves: mean training loss, each phase over its own steps; under distillation it is another loss"
    return _lines(lines, looks, f"curve-{place}", "share of training", "training loss", caption + _of_seeds(summaries))


def _dev_curves(summaries: Sequence[Summary], place: int, looks: "_Looks") -> str:
    """Dev accuracy over the seconds of training, where it was evaluated meanwhile."""
    lines = {}
    for summary in summaries:
        if curve := summary.measured[-1].dev_curve:
            steps, seconds, reached = zip(*curve, strict=True)
            tip = f"dev accuracy {100 * reached[-1]:.1f}% after {render_duration(seconds[-1])} and {steps[-1]} steps"
            lines[summary.first.phase_id] = seconds, [100 * share for share in reached], tip
    caption = "Dev accuracy against seconds of training, evaluation left out"
    return _lines(lines, looks, f"dev-{place}", "training, seconds", "dev accuracy, %", caption + _of_seeds(summaries))


def _of_seeds(summaries: Sequence[Summary]) -> str:
    return "; of several seeds the last" if any(len(summary.measured) > 1 for summary in summaries) else ""


def _lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], str]],
    looks: "_Looks",
    gid: str,
    across: str,
    up: str,
    caption: str,
) -> str:
    """A line a phase, in the phase's colour and marker; nothing where there are no lines."""
    if not lines:
        return ""
    figure, axes = _figure(legend=[*lines])
    tips = {}
    for name, (xs, ys, tip) in lines.items():
        number, colour, marker = looks.of(name)
        look = {"color": colour, "marker": marker, "markevery": max(1, len(xs) // 6), "markersize": 5, "linewidth": 1.2}
        axes.plot(xs, ys, **look, label=_text(name), gid=f"{gid}-{number}")
        tips[f"{gid}-{number}"] = f"{name}: {tip}"
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    figure.legend(loc="outside upper left", ncols=_legend_columns([*lines]), frameon=False, labelcolor=_INK)
    return _embed(figure, caption, tips)


def _history(history: Mapping[str, Sequence[Point]], looks: "_Looks") -> str:
    """Accuracy over the commits that any phase was measured at, in their order."""
    figure, axes = _figure(legend=[*history])
    tips = {}
    stops = {phase: _stops(points) for phase, points in history.items()}
    commits = _merged(list(stops.values()))
    place = {stop: x for x, stop in enumerate(commits)}
    for i, (phase, points) in enumerate(history.items()):
        _, colour, marker = looks.of(_phase_id(phase))
        known = [(place[stop], point) for stop, point in zip(stops[phase], points, strict=True) if point.value is not None]
        heights = [100 * (point.value or 0.0) for _, point in known]
        axes.plot([x for x, _ in known], heights, color=colour, linewidth=1, label=_text(phase), marker=marker, markersize=4)
        for (x, point), value in zip(known, heights, strict=True):
            if len(known) > POINTS_WITH_TIPS and not point.shift:
                continue
            gid = f"history-{i}-{x}"
            axes.plot([x], [value], marker, color=colour, markersize=9 if point.shift else 5, gid=gid)
            notes = [*point.marks, *([f"{point.shift} from here"] if point.shift else [])]
            tips[gid] = (
                f"{phase} at {short(point.commit)} {point.subject}\naccuracy {render_value(METRICS['accuracy'], point.value)}"
                + (f"\n{', '.join(notes)}" if notes else "")
            )
    every = max(1, math.ceil(len(commits) / 8))
    ends = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, len(commits), every), [_text(short(commit, 7)) for commit, _ in commits[::every]], **ends)
    axes.set_xlabel("commits, oldest first")
    axes.set_ylabel("accuracy, dev and test, %")
    figure.legend(loc="outside upper left", ncols=_legend_columns([*history]), frameon=False, labelcolor=_INK)
    caption = (
        "Accuracy over commits; a larger mark is a shift of the level; at a commit without a mark it failed or was not measured"
    )
    return _embed(figure, caption, tips)


def _stops(points: Sequence[Point]) -> list[tuple[str, int]]:
    """A name for each point: its commit, and how many points of that commit, with other changes, stand before it."""
    met: Counter[str] = Counter()
    stops = []
    for point in points:
        stops.append((point.commit, met[point.commit]))
        met[point.commit] += 1
    return stops


def _merged(sequences: Sequence[Sequence[tuple[str, int]]]) -> list[tuple[str, int]]:
    """What any of several sequences holds, each after what stands before it in the first sequence that has it."""
    merged: list[tuple[str, int]] = []
    met: set[tuple[str, int]] = set()
    for stops in sequences:
        at = 0
        for stop in stops:
            if stop in met:
                at = merged.index(stop) + 1
            else:
                merged.insert(at, stop)
                met.add(stop)
                at += 1
    return merged


@dataclass(frozen=True, slots=True)
class _Looks:
    """Colour and marker of each phase, the same all over the page."""

    phases: Sequence[str]

    def of(self, phase: str) -> tuple[int, str, str]:
        """The phase's number, its colour, and its marker."""
        number = self.phases.index(phase)
        return number, _COLOURS[number % len(_COLOURS)], MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]


def _phase_id(label: str) -> str:
    """The place of a phase's name in a history, which has the scale behind it where there are several."""
    name, _, scale = label.rpartition("-")
    return name if scale in SCALE_NAMES else label


def _legend_columns(names: Sequence[str]) -> int:
    """How many of these names stand side by side in a picture's width."""
    return max(1, min(3, 50 // (6 + max(len(_text(name)) for name in names))))


def _figure(*, legend: Sequence[str] = ()) -> tuple[Any, Any]:
    """Room for a picture, and for a legend of these names."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the HTML report draws with matplotlib, which is missing; pip install matplotlib") from error

    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}):
        rows = math.ceil(len(legend) / _legend_columns(legend)) if legend else 0
        figure = Figure(figsize=(5.0, 3.6 + 0.2 * max(0, rows - 2)), layout="constrained")
        axes: Any = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for part in (*axes.spines.values(), axes.xaxis.label, axes.yaxis.label):
        part.set_color(_INK)
    axes.tick_params(which="both", colors=_INK)
    return figure, axes


def _scale_logarithmically(axis: Any, render: Callable[[float], str]) -> None:
    """Few enough numbers to be read: 1, 2 and 5 of each power of ten, or every so many of the powers alone."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis.axes.set_xscale("log")
    low, high = axis.get_view_interval()
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [part * power for power in powers for part in (1, 2, 5) if low <= part * power <= high]
    if len(ticks) > 6:
        whole = [power for power in powers if low <= power <= high]
        ticks = whole[:: math.ceil(len(whole) / 5)]
    axis.set_major_locator(FixedLocator(ticks) if len(ticks) > 1 else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: render(value)))
    axis.set_minor_locator(NullLocator())


def _embed(figure: Any, caption: str, tips: Mapping[str, str]) -> str:
    """The figure as inline SVG whose marks can be pointed at and reached by the keyboard."""
    import matplotlib

    stream = io.StringIO()
    # Ids in a picture come from the salt; two pictures on a page must not share any.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption + "".join(tips)}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(stream.getvalue())  # noqa: S314 - matplotlib wrote it
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    root.set("role", "group")
    root.set("aria-label", caption)
    targets = set(re.findall(r'(?:href="|url\()#([^")]+)', stream.getvalue()))
    for element in root.iter():
        name = element.get("id", "")
        if name not in {*tips, *targets} and not name.startswith("bar-of-"):  # another picture has the same
            element.attrib.pop("id", None)
        if tip := tips.get(element.get("id", "")):
            for name, value in (("tabindex", "0"), ("role", "img"), ("aria-label", tip.replace("\n", ", ")), ("data-tip", tip)):
                element.set(name, value)
    text = ET.tostring(root, encoding="unicode")
    for stand_in, variable in ((_INK, "ink"), (_FRONT, "front"), *((c, f"c{i}") for i, c in enumerate(_COLOURS))):
        text = text.replace(stand_in, f"var(--{variable})")
    return f"<figure>{text}<figcaption>{escape(caption)}</figcaption></figure>"


def _text(name: str) -> str:
    """A name as matplotlib shows it: a dollar sign would begin mathematics."""
    return printable(name[:40]).replace("$", r"\$")


def _facts(records: Sequence[Record]) -> str:
    facts: dict[str, dict[str, None]] = {}
    for one in [record for record in records if record.measured] or records[:1]:
        dirty = one.commit.get("dirty")
        changed = "yes" if dirty is True else "no" if dirty is False else None
        for name, value in {**one.machine, **one.versions, "commit": one.commit.get("id"), "uncommitted changes": changed}.items():
            if value is not None:
                facts.setdefault(name, {})[str(value)] = None
    known = {name: "; ".join(values) for name, values in facts.items()}
    rows = "".join(f"<tr><th scope='row'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in known.items())
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def link_from(page: Path | None, files: Mapping[tuple[str, str], Path]) -> Callable[[Record], str | None]:
    """Where records are, by run and case, seen from a page (or, without one, from the working directory)."""
    start = page.parent if page else Path()

    def link(record: Record) -> str | None:
        path = files.get((record.run_id, record.case))
        if path is None:
            return None
        seen = seen_from(start, path)
        return seen.as_uri() if seen.is_absolute() else quote(seen.as_posix())

    return link

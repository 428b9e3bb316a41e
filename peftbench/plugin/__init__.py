"""The hooks of pytest around a session; those around a test are in recording.py, the fixtures in fixtures.py."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from peftbench.plugin import fixtures, recording
from peftbench.plugin.options import add_options
from peftbench.plugin.session import SESSION, Session, asked_scale, takes
from peftbench.report import printable, render_comparison, render_summary, seen_from


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tiny: smoke version of a peftbench case; runs only when asked for with -m tiny.")
    config.addinivalue_line("markers", "peer: comparison with another training loop; runs only when asked for with -m peer.")
    session = config.stash[SESSION] = Session(config)
    config.pluginmanager.register(session, "peftbench-session")
    config.pluginmanager.register(recording, "peftbench-recording")
    config.pluginmanager.register(fixtures, "peftbench-fixtures")
    made = [getattr(plugin, "benchmark", None) for plugin in config.pluginmanager.get_plugins()]
    if not any(isinstance(one, type(fixtures.run_phase)) for one in made):  # a fixture of pytest-benchmark or of another
        config.pluginmanager.register(fixtures.NoBenchmark(), "peftbench-no-benchmark")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """All workers of pytest-xdist write into one run."""
    node.workerinput["peftbench_run_id"] = node.config.stash[SESSION].run_id


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Learn from a worker of pytest-xdist of which scales it has left cases out."""
    node.config.stash[SESSION].deselected.update(getattr(node, "workeroutput", {}).get("peftbench_deselected", ()))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that uses our fixtures its scale and seeds, behind its own parameters in the id."""
    options = metafunc.config.stash[SESSION].options
    own = {name for call in metafunc._calls for name in call.params}  # by a marker, a fixture's own or another hook
    if "peft_scale" in metafunc.fixturenames and "peft_scale" not in own:
        main = [] if options.scale == "tiny" else [pytest.param("main", id=pytest.HIDDEN_PARAM)]
        tiny = pytest.param("tiny", id="tiny", marks=pytest.mark.tiny)
        metafunc.parametrize("peft_scale", [*main, tiny], indirect=True, scope="session")
    if "peft_seed" in metafunc.fixturenames and "peft_seed" not in own:
        ids = [f"s{seed}" for seed in options.seeds] if len(options.seeds) > 1 else [pytest.HIDDEN_PARAM]
        metafunc.parametrize("peft_seed", options.seeds, ids=ids, indirect=True)
    if "peft_workbench" not in own and {"peft_workbench", "peft_scale"} <= {*metafunc.fixturenames}:
        # pytest keeps the value of a session's fixture even where another override of what it is made from applies
        override = metafunc._arg2fixturedefs["peft_scale"][-1].baseid
        metafunc.parametrize("peft_workbench", [pytest.param(override, id=pytest.HIDDEN_PARAM)], indirect=True, scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note which are cases; have pytest-benchmark read the clock of their loops, whatever else the test's own marker says."""
    if takes(item, "peft_scale"):
        item.user_properties.append(("peftbench_case", True))  # which a worker of pytest-xdist passes on
        if takes(item, "run_phase") and not item.get_closest_marker("skip"):
            item.user_properties.append(("peftbench_to_record", True))
    if takes(item, "run_phase") and any(map(item.config.pluginmanager.hasplugin, ("benchmark", "pytest_benchmark.plugin"))):
        own = item.get_closest_marker("benchmark")
        settings = {"group": "training", **(own.kwargs if own else {}), "timer": item.config.stash[SESSION].train_runtime_seconds}
        item.add_marker(pytest.mark.benchmark(**settings), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tiny versions and comparisons with peers out unless something in the command line names them, or --lf means them."""
    own = config.stash[SESSION]
    cache = getattr(config, "cache", None) if config.getoption("lf", False) else None
    failed_last = cache.get("cache/lastfailed", {}) if cache else {}
    named = [own.options.scale, *own.asked_for]
    unnamed = [marker for marker in ("tiny", "peer") if not any(marker in text for text in named)]
    cases = [item for item in items if takes(item, "peft_scale")]
    asked_again = [item for item in cases if item.nodeid in failed_last]
    left_out = [item for item in cases if item not in asked_again and any(item.get_closest_marker(marker) for marker in unnamed)]
    if left_out:
        own.set_aside.update(item.nodeid for item in left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Say what would go wrong before hours are spent; in a worker of pytest-xdist the case itself fails, with the same message."""
    own = session.config.stash[SESSION]
    if own.is_worker:
        return
    try:
        own.check(_scales(session.config, session.items))
    except (ValueError, OSError) as error:
        raise pytest.UsageError(f"peftbench: {error}") from error


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Read the options; and where workers of pytest-xdist collect, choose what to compare with by the options alone."""
    own, config = session.config.stash[SESSION], session.config
    options = own.options
    if not (config.pluginmanager.hasplugin("dsession") and options.compare):
        return
    if "tiny" in (options.scale, config.option.markexpr):
        scales = ["tiny"]
    else:
        named = any("tiny" in text for text in own.asked_for)
        scales = [own.main_scale, *(["tiny"] if named else [])]
    problems = []
    for scale in scales:
        try:
            own.choose_bases([scale])
        except (ValueError, OSError) as error:
            problems.append(error)
    if not own.bases and config.getoption("peft_compare"):  # an ini file's is said at the end, and only if there were cases
        raise pytest.UsageError(f"peftbench: {problems[0]}") from problems[0]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    own = config.stash[SESSION]
    scales = _scales(config, items)
    if not scales or own.is_worker:
        return []
    auto = " (auto: with CUDA)" if own.main_scale == "thesis" else " (auto: without CUDA)"
    scale = ", ".join(scales) + (auto if own.options.scale == "auto" and own.main_scale in scales else "")
    device = f"device {own.device.name}, precision {own.device.precision} ({own.device.why})"
    problem = own.settings.commit.get("problem")
    unnamed = "" if own.settings.commit.get("id") else "records will name no commit, and "
    unknown = f"peftbench: {unnamed}nothing can be resumed: {problem}"
    return [f"peftbench: scale {scale}; {device}; run {own.run_id}", *([unknown] if problem else [])]


def _scales(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """The scales of the cases that will run; asks torch only if there are any."""
    cases = [item for item in items if takes(item, "peft_scale")]
    if config.option.collectonly or not cases:
        return []
    return sorted({config.stash[SESSION].scale_name(asked_scale(item)) for item in cases})


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Let the SIGTERM of a batch system or a container end a session of cases as Ctrl-C does, which tells what has passed."""
    main_thread = threading.current_thread() is threading.main_thread()
    spread = session.config.pluginmanager.hasplugin("dsession")  # over workers of pytest-xdist, which alone know the tests
    may_have_cases = spread or _scales(session.config, session.items)
    if not (main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and may_have_cases):
        return (yield)

    def interrupt(*_: object) -> None:
        if spread and not session.config.stash[SESSION].saw_case:  # nothing to tell, and perhaps a project without cases
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return (yield)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a gate that does not hold fail the session, and a report that could not be written."""
    own = session.config.stash[SESSION]
    if own.is_worker:
        session.config.workeroutput["peftbench_deselected"] = sorted(own.deselected)  # type: ignore[attr-defined]
        return
    own.publish_all()
    status = 1 if own.unpublished else 0
    asked = own.saw_case or (own.saw_other_test and session.config.getoption("peft_fail"))
    ran = not any(session.config.getoption(name, False) for name in ("setuponly", "setupplan"))
    if own.options.compare and ran and (own.records or (own.options.gates and asked)):
        from peftbench.gates import Judgement

        try:
            if not own.records:
                raise ValueError("nothing to compare: no case has left a record")
            status = own.judge() or status
        except (ValueError, OSError) as error:
            own.judgement = Judgement(status=2, lines=[str(error)])
            status = 2
    if session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = status


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    records = list(session.records.values())
    if not (records or session.unreadable or session.unpublished or session.judgement):
        return
    terminalreporter.section("peftbench")
    if records:
        _write(terminalreporter, render_summary(records))
    if session.judgement is not None:
        if session.comparison:
            _write(terminalreporter, f"\ncompared with {', '.join(printable(side.label) for side in session.bases)}:")
            _write(terminalreporter, render_comparison(session.comparison))
            for line in session.changes:
                _write(terminalreporter, f"changed: {printable(line)}")
        for line in session.judgement.lines:
            _write(terminalreporter, printable(line), red=session.judgement.status > 0)
    for line in session.describe_times():
        _write(terminalreporter, line)
    for record in records:
        if record.run_id != session.run_id:
            case = f"{record.phase_id} at {record.scale} scale, seed {record.seed}"
            _write(terminalreporter, printable(f"resumed, not run again: {case}, passed in run {record.run_id}"))
    for problem in session.unpublished.values():
        _write(terminalreporter, printable(problem), red=True)
    for problem in sorted(session.unreadable):
        _write(terminalreporter, printable(f"left out of the history: {problem}"), yellow=True)
    if exitstatus == pytest.ExitCode.INTERRUPTED and not session.settings.commit.get("problem"):
        _write(terminalreporter, "interrupted: run the same command with --peft-resume for what has not passed")
    for folder in dict.fromkeys(path.parent for path in session.records):
        _write(terminalreporter, f"records: {seen_from(Path(), folder)}")


def _write(reporter: Any, text: str, **markup: bool) -> None:
    """Lines, with question marks where the output's encoding lacks a sign; pytest would escape the whole text, line ends too."""
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    for line in text.split("\n"):
        reporter.write_line(line.encode(encoding, "replace").decode(encoding), **markup)

"""The hooks of pytest and the fixtures; what they go by stands in options.py, session.py and progress.py."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.errors import PeftbenchError
from peftbench.phases import KD_MAX_LENGTH, SCALES, STANDARD_KD_SUBSETS, Phase, Scale
from peftbench.plugin.options import add_options
from peftbench.plugin.session import Session
from peftbench.records import Record, case_name, describe_error, read_record
from peftbench.report import printable, render_comparison, render_summary, seen_from
from peftbench.store import Store

if TYPE_CHECKING:
    from peftbench.data import Splits
    from peftbench.distill import TeacherLogits
    from peftbench.workbench import Workbench

SESSION = pytest.StashKey[Session]()
RECORD = pytest.StashKey[Record]()
"""The record of the test that is running, until it is written."""
ATTEMPTED = pytest.StashKey[Path]()
"""Where a test has left a record: the next one of the same case, as where failed tests are run again, takes its place."""
FAILURE = pytest.StashKey[str]()
"""Why a test that went on will count as failed, as after a subtest."""


class NoBenchmark:
    """Stands in for pytest-benchmark where it is switched off as a whole (``-p no:benchmark``)."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tiny: smoke version of a peftbench case; runs only when asked for with -m tiny.")
    config.addinivalue_line("markers", "peer: comparison with another training loop; runs only when asked for with -m peer.")
    session = config.stash[SESSION] = Session(config)
    config.pluginmanager.register(session, "peftbench-session")
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(NoBenchmark(), "peftbench-no-benchmark")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """All workers of pytest-xdist write into one run."""
    node.workerinput["peftbench_run_id"] = node.config.stash[SESSION].run_id


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
    if "peft_scale" in getattr(item, "fixturenames", ()):
        item.user_properties.append(("peftbench_case", True))  # which a worker of pytest-xdist passes on
    if "run_phase" in getattr(item, "fixturenames", ()) and item.config.pluginmanager.hasplugin("benchmark"):
        own = item.get_closest_marker("benchmark")
        settings = {"group": "training", **(own.kwargs if own else {}), "timer": item.config.stash[SESSION].train_runtime_seconds}
        item.add_marker(pytest.mark.benchmark(**settings), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tiny versions and comparisons with peers out unless something in the command line names them, or --lf means them."""
    own = config.stash[SESSION]
    cache = getattr(config, "cache", None) if config.getoption("lf", False) else None
    failed_last = cache.get("cache/lastfailed", {}) if cache else {}
    named = [config.option.markexpr, own.options.scale, *own.asked_for]
    unnamed = [marker for marker in ("tiny", "peer") if not any(marker in text for text in named)]
    cases = [item for item in items if "peft_scale" in getattr(item, "fixturenames", ())]
    asked_again = [item for item in cases if item.nodeid in failed_last]
    left_out = [item for item in cases if item not in asked_again and any(item.get_closest_marker(marker) for marker in unnamed)]
    if left_out:
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
        named = any("tiny" in text for text in (config.option.markexpr, *own.asked_for))
        scales = [own.main_scale, *(["tiny"] if named else [])]
    problems = []
    for scale in scales:
        try:
            own.choose_bases([scale])
        except ValueError as error:
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
    cases = [item for item in items if "peft_scale" in getattr(item, "fixturenames", ())]
    if config.option.collectonly or not cases:
        return []
    return sorted({_scale_name(config, getattr(item, "callspec", None)) for item in cases})


def _scale_name(config: pytest.Config, call: Any) -> str:
    """By how the test is parametrized: ``main`` is what the options ask for, as is a test that says nothing."""
    asked = call.params.get("peft_scale", "main") if call else "main"
    return config.stash[SESSION].main_scale if asked == "main" else str(getattr(asked, "name", asked))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Write the record of a case that a fixture of the test has run, where it or another fixture fails."""
    if FAILURE in item.stash:  # of an earlier attempt
        del item.stash[FAILURE]
    try:
        return (yield)
    except BaseException as error:
        if problem := _keep(item, error):
            item.add_report_section("setup", "peftbench", problem)
        raise


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Write the record the moment its test ends, however that ends; what the test made of the case decides the outcome."""
    return (yield from _recording(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Write the record of a case that a fixture of the test runs in the end."""
    return (yield from _recording(item, "teardown"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Let a record say failed wherever its test has, as expected or not: after a subtest, a fixture's end, a strict xfail."""
    report = yield
    is_case = RECORD in item.stash or ATTEMPTED in item.stash or "run_phase" in getattr(item, "fixturenames", ())
    if is_case and (report.failed or (report.skipped and hasattr(report, "wasxfail"))):
        error = describe_error(call.excinfo.value) if call.excinfo else str(report.longrepr or report.wasxfail).strip()
        item.stash[FAILURE] = item.stash.get(FAILURE, error)
        path = item.stash.get(ATTEMPTED, None)
        if path and RECORD not in item.stash and (problem := _fail(item, path, error)):
            report.sections.append(("peftbench", problem))
    return report


def _recording(item: pytest.Item, when: str) -> Generator[None, object, object]:
    try:
        result = yield
    except BaseException as error:
        if problem := _keep(item, error):
            item.add_report_section(when, "peftbench", problem)
        raise
    if problem := _keep(item):
        raise pytest.fail.Exception(problem, pytrace=False)
    return result


def _keep(item: pytest.Item, error: BaseException | None = None) -> str | None:
    """Write the test's record, if it has one; what is wrong if that cannot be done."""
    from unittest import SkipTest

    record = item.stash.get(RECORD, None)
    if record is None:
        return None
    del item.stash[RECORD]
    failure = item.stash.get(FAILURE, None)
    if error and not isinstance(error, pytest.skip.Exception | SkipTest):
        failure = describe_error(error)
    if failure and record.outcome == "passed":
        record = dataclasses.replace(record, outcome="failed", error=failure)
    session = item.config.stash[SESSION]
    store = Store(session.options.outputs, record.scale)
    try:
        path = item.stash[ATTEMPTED] = store.save(record, attempted=item.stash.get(ATTEMPTED, None))
        _tell_benchmark(item, record)
    except (OSError, ValueError) as problem:
        return f"peftbench could not write the record: {problem}"
    session.learn(path)  # now, as pytest makes no report of a test that was interrupted
    item.user_properties.append(("peftbench_record", str(path)))
    return None


def _fail(item: pytest.Item, path: Path, error: str) -> str | None:
    """Make the record of a test that passed until then one that failed; what is wrong if that cannot be done."""
    session = item.config.stash[SESSION]
    try:
        record = read_record(path)
        if record.outcome == "passed":
            record = dataclasses.replace(record, outcome="failed", error=error)
            Store(session.options.outputs, record.scale).replace(record)
            _tell_benchmark(item, record)
            session.learn(path)
    except (OSError, ValueError) as problem:
        session.withdraw(path, f"{path.stem} failed ({error}), but its record could not be changed: {problem}")
        return session.unpublished[path]
    return None


def _tell_benchmark(item: pytest.Item, record: Record) -> None:
    benchmark: Any = getattr(item, "funcargs", {}).get("benchmark")
    if benchmark is not None:
        benchmark.extra_info["peftbench"] = record.to_json()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Let the SIGTERM of a batch system or a container end a session of cases as Ctrl-C does, which tells what has passed."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not (main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and _scales(session.config, session.items)):
        return (yield)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return (yield)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a gate that does not hold fail the session, and a report that could not be written."""
    own = session.config.stash.get(SESSION, None)
    if own is None or own.is_worker:
        return
    own.publish_all()
    status = 1 if own.unpublished else 0
    asked = own.saw_case or (own.saw_other_test and session.config.getoption("peft_fail"))
    if own.options.compare and (own.records or (own.options.gates and asked)):
        from peftbench.gates import Judgement

        try:
            if not own.records:
                raise ValueError("nothing to compare: no case has left a record")
            status = own.judge() or status
        except ValueError as error:
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
        for line in session.judgement.lines if session.options.gates or not session.comparison else ():
            _write(terminalreporter, printable(line), red=True)
    for line in session.describe_times():
        _write(terminalreporter, line)
    resumed = [record for record in records if record.run_id != session.run_id]
    for record in resumed:
        case = f"{record.phase}-{record.name} at {record.scale} scale, seed {record.seed}"
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


@pytest.fixture(scope="session")
def peft_scale(request: pytest.FixtureRequest) -> Scale:
    """The scale of this case: what the options ask for or, where a test is parametrized over it, the one of that name."""
    asked = getattr(request, "param", "main")
    name = request.config.stash[SESSION].main_scale if asked == "main" else asked
    if name not in SCALES:
        pytest.fail(f"peft_scale must be parametrized with main or one of {', '.join(SCALES)}, got {name!r}", pytrace=False)
    return SCALES[name]


@pytest.fixture
def peft_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this case."""
    return int(getattr(request, "param", request.config.stash[SESSION].options.seeds[0]))


@pytest.fixture(scope="session")
def peft_workbench(request: pytest.FixtureRequest, peft_scale: Scale) -> Workbench:
    """What the cases of one scale share."""
    from peftbench.workbench import Workbench

    session = request.config.stash[SESSION]
    if not isinstance(peft_scale, Scale):
        pytest.fail(f"peft_scale must be a Scale, got {peft_scale!r}; parametrize over it with indirect=True", pytrace=False)
    if peft_scale.name not in SCALES:
        pytest.fail(
            f"peft_scale must keep the name of one of the scales, {', '.join(SCALES)}, by which phases and folders go; "
            f"got {peft_scale.name!r}",
            pytrace=False,
        )
    with explained():
        bench = Workbench(peft_scale, session.settings, session.progress, session.progress.say)
        bench.store.check_writable()
    return bench


@pytest.fixture(scope="session")
def sst2(peft_workbench: Workbench) -> Splits:
    """The scale's train, dev and test."""
    with explained():
        return peft_workbench.splits


@pytest.fixture(scope="session")
def teacher_logits(peft_workbench: Workbench) -> TeacherLogits:
    """The teacher's logits on the largest standard KD subset, from the cache if they are there."""
    with explained():
        return peft_workbench.teacher_logits(max(STANDARD_KD_SUBSETS), KD_MAX_LENGTH)


@pytest.fixture(scope="session")
def kd_subsets(peft_workbench: Workbench) -> dict[str, Path]:
    """Folders of the standard KD subsets: ``{"kd_1000": path, "kd_500": path}``."""
    with explained():
        return {f"kd_{size}": peft_workbench.kd_subset(size, KD_MAX_LENGTH) for size in STANDARD_KD_SUBSETS}


@pytest.fixture
def run_phase(
    request: pytest.FixtureRequest, benchmark: Any, peft_scale: Scale, peft_workbench: Workbench, peft_seed: int
) -> Iterator[Callable[[Phase], Record]]:
    """
    Train and evaluate a phase, once to a test and in one test of a session, and return its record.

    The record is written when the test ends. pytest-benchmark reports the time of the training loop.
    """
    session, node = request.config.stash[SESSION], request.node
    called = measured = False

    def run(phase: Phase) -> Record:
        from peftbench.runner import case_fingerprint, failed_record, run_phase

        nonlocal called
        if called:
            raise RuntimeError("run_phase can be called only once per test; parametrize the test over phases")
        called = True
        if peft_workbench.scale != peft_scale:  # as in a class of unittest, whose tests pytest does not parametrize
            raise RuntimeError(
                "peft_scale is overridden here, and pytest has made the other fixtures for a test elsewhere; make this test a "
                "function that takes run_phase, or run it in a session of its own"
            )
        scale, settings, store = peft_workbench.scale, session.settings, peft_workbench.store
        with explained():
            case = case_name(phase.id, scale.name, peft_seed)
            store.check_case(session.run_id, case, attempted=node.stash.get(ATTEMPTED, None))
        try:
            if session.options.resume:
                fingerprint = case_fingerprint(phase, peft_workbench)
                if found := session.find_passed(peft_workbench, fingerprint, peft_seed):
                    session.check_phase(phase)
                    for size in phase.at(scale.name).kd_subsets:  # which somebody may have deleted, or another study replaced
                        peft_workbench.kd_subset(size, phase.at(scale.name).max_length)
                    store.link(found, session.run_id)
                    node.user_properties.append(("peftbench_record", str(store.record_path(found))))
                    pytest.skip(f"resumed: passed with this fingerprint at this commit in run {found.run_id}")

            def train() -> Record:
                nonlocal measured
                measured = True
                session.check_phase(phase)
                record = run_phase(phase, scale, peft_seed, settings, workbench=peft_workbench)
                session.trained_seconds += record.train_runtime_seconds or 0.0
                return record

            if benchmark is not None and not phase.at(scale.name).epochs:
                benchmark.group = "no training"  # whose 0 s would make all others infinitely slow in one table
            record: Record = train() if benchmark is None else benchmark.pedantic(train, rounds=1, iterations=1)
        except pytest.skip.Exception:
            raise
        except BaseException as error:
            node.stash[RECORD] = failed_record(phase, peft_seed, peft_workbench, error)
            with explained():
                raise
        node.stash[RECORD] = record
        return record

    yield run
    if benchmark is not None and not measured:
        benchmark.skipped = True  # a test that was skipped or failed before it got so far is told of that alone


@contextmanager
def explained() -> Iterator[None]:
    """Let errors that explain themselves fail the test without the traceback of a library on top."""
    try:
        yield
    except PeftbenchError as error:
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None

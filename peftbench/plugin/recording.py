"""The record of a test's case: written the moment the test ends, and saying what the test made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from peftbench.plugin.session import SESSION, takes
from peftbench.records import Record, describe_error, read_record
from peftbench.store import Store

RECORD = pytest.StashKey[Record]()
"""The record of the test that is running, until it is written."""
ATTEMPTED = pytest.StashKey[Path]()
"""Where a test has left a record: the next one of the same case, as where failed tests are run again, takes its place."""
BENCHMARK = pytest.StashKey[Any]()
"""The pytest-benchmark fixture of a test that has asked for `run_phase`; None without that plugin."""
FAILURE = pytest.StashKey[str]()
"""Why a test that went on will count as failed, as after a subtest."""


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
    """Write the record of a case that a fixture of the test runs in the end; have a worker's news said."""
    try:
        return (yield from _recording(item, "teardown"))
    finally:
        progress = item.config.stash[SESSION].progress
        item.user_properties.extend(("peftbench_news", line) for line in progress.unsaid)
        progress.unsaid.clear()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Let a record say failed wherever its test has, as expected or not: after a subtest, a fixture's end, a strict xfail."""
    report = yield
    is_case = RECORD in item.stash or ATTEMPTED in item.stash or takes(item, "run_phase")
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
    record = item.stash.get(RECORD, None)
    if record is None:
        return None
    from unittest import SkipTest  # here, where a case has run, and not for every test of every project

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
    benchmark = item.stash.get(BENCHMARK, None)
    if benchmark is not None:
        benchmark.extra_info["peftbench"] = record.to_json()

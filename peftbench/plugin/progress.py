"""How far training is, on the terminal or in a log."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from peftbench.report import render_duration

LOG_LINE_SECONDS = 30.0
TERMINAL_LINE_SECONDS = 0.2


class Progress:
    """
    Shows how far training is: one line that changes on a terminal, a line now and then in a log.

    Attributes:
        first_step: When the session's first optimizer step was done, by `time.monotonic`; None before that.
        training_seconds: Between the first and the last step of each training run, the teacher's included.
        unsaid: Lines of news in a worker of pytest-xdist, which has no terminal: its main process is to say them.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.first_step: float | None = None
        self.training_seconds = 0.0
        self.unsaid: list[str] = []
        self._config = config
        self._what, self._began, self._shown, self._last = "", 0.0, 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done == 1:
            self._what, self._began, self._shown, self._last = what, now, now, now
            self.first_step = self.first_step or now
            return
        self.training_seconds += now - self._last
        self._last = now
        reporter: Any = self._config.pluginmanager.getplugin("terminalreporter")
        live = reporter is not None and reporter.isatty
        if done < total and now - self._shown < (TERMINAL_LINE_SECONDS if live else LOG_LINE_SECONDS):
            return
        self._shown = now
        left = render_duration((now - self._began) / (done - 1) * (total - done))
        line = f"{what}: step {done} of {total}, {left} left"
        if live:
            self._write(lambda reporter: reporter.rewrite(line if done < total else "", erase=True))
        elif done < total and reporter is not None:
            self.say(line)

    def say(self, line: str) -> None:
        """Show a line of news in its own right."""
        if hasattr(self._config, "workerinput"):
            self.unsaid.append(line)
        self._write(lambda reporter: reporter.write_line(f"peftbench: {line}"))

    def _write(self, write: Callable[[Any], None]) -> None:
        plugins = self._config.pluginmanager
        reporter: Any = plugins.getplugin("terminalreporter")
        capture: Any = plugins.getplugin("capturemanager")
        if reporter is not None:
            with capture.global_and_fixture_disabled() if capture else nullcontext():
                reporter.ensure_newline()
                write(reporter)
                reporter.flush()

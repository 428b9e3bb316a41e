"""Where results are kept: the folders under outputs/, and the history of runs, to which records are added."""

import glob
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftbench.errors import PeftbenchError
from peftbench.phases import KD_MAX_LENGTH
from peftbench.records import Record, RecordError, decode_record, read_record
from peftbench.sealed import write_atomically

RESUMED = ".resumed"
"""Ending of a file in a run's folder that stands for a case's record in an earlier run, whose id it holds."""


class OutputsError(PeftbenchError, OSError):
    """Results cannot be written where they were asked for."""


RUN_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]+")
"""What `make_run_id` makes; a run's folder may have another name since."""


def make_run_id() -> str:
    """An id that sorts by time, within a second, too, and does not collide.

    UTC to the second, five hexadecimal digits of its fraction (about a microsecond), three random ones.
    """
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    fraction = (nanoseconds << 20) // 10**9
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(seconds))}-{fraction:05x}{secrets.token_hex(2)[:3]}"


@dataclass(frozen=True, slots=True)
class Store:
    """
    Where results are written under ``outputs/``. What is read from elsewhere, too, is found by `peftbench.history`.

    Args:
        outputs: The folder that the user named.
        scale: Tiny runs live in a tree of their own, apart from real results.
    """

    outputs: Path
    scale: str

    @property
    def root(self) -> Path:
        """Where this scale's tree begins."""
        return self.outputs / "tiny" if self.scale == "tiny" else self.outputs

    @property
    def runs(self) -> Path:
        """The history, to which runs are added and nothing else: a folder a run, a file a case."""
        return self.root / "runs"

    def report_path(self, letter: str) -> Path:
        """The latest result of a phase."""
        return self.root / "reports" / f"phase_{letter.lower()}_metrics.json"

    def kd_path(self, size: int, max_length: int = KD_MAX_LENGTH) -> Path:
        """A KD subset, saved with ``datasets``; one whose teacher saw texts of another length has that in its name."""
        return self.root / "kd" / (f"kd_{size}" if max_length == KD_MAX_LENGTH else f"kd_{size}_length_{max_length}")

    def cache_path(self, kind: Literal["teachers", "logits"], key: str) -> Path:
        """A content-keyed entry of the cache."""
        return self.root / "cache" / kind / key

    @property
    def assets(self) -> Path:
        """Fetched archives, unpacked; shared by all scales."""
        return self.outputs / "cache" / "assets"

    def check_writable(self) -> None:
        """
        Try to write before hours are spent.

        Raises:
            OutputsError: If the folder cannot be made or written, naming it and the option.
        """
        try:
            str(self.outputs).encode()
        except UnicodeEncodeError:  # the libraries that save weights and data take no other
            raise OutputsError(
                f"the outputs folder must have a name in UTF-8, got {str(self.outputs)!a}; give another with --peft-outputs DIR"
            ) from None
        parts = [folder for name in ("runs", "reports", "kd", "cache") if (folder := self.root / name).exists()]
        for folder in (self.root, *parts):
            try:
                probe = folder / f".writable-{secrets.token_hex(4)}"
                write_atomically(probe, "")
                probe.unlink()
            except OSError as error:
                raise OutputsError(
                    f"cannot write to the outputs folder {folder}: {error.strerror or error}; "
                    "give a writable folder with --peft-outputs DIR"
                ) from error

    def record_path(self, record: Record) -> Path:
        """A case of a run."""
        return self.runs / record.run_id / f"{record.case}.json"

    def check_case(self, run_id: str, case: str, *, attempted: Path | None) -> None:
        """
        See that a run has not had a case yet, before it is trained and before it is written.

        Args:
            attempted: The record of an earlier attempt, as of a plugin that runs failed tests again, which may be there.

        Raises:
            RecordError: If the run has measured or resumed it.
        """
        path = self.runs / run_id / f"{case}.json"
        if (path.exists() and path != attempted) or path.with_suffix(RESUMED).exists():
            raise RecordError(
                f"{case} has run already in this run, and a phase is a case of one test: let that test make all checks or, if this "
                "is another phase, give it another id"
            )

    def save(self, record: Record, *, attempted: Path | None = None) -> Path:
        """
        Add a record to the history, whole or not at all.

        Args:
            attempted: As for `check_case`; that record stays beside this one under another name, which nothing reads.

        Raises:
            RecordError: If it could not be read again, or the run has had that case.
        """
        path = self.record_path(record)
        content = _text(record)
        decode_record(content.encode())
        self.check_case(record.run_id, record.case, attempted=attempted)
        if path.exists():
            attempts = len(list(path.parent.glob(f"{glob.escape(path.name)}.attempt-*")))
            shutil.copy2(path, path.with_name(f"{path.name}.attempt-{attempts + 1}"))
        write_atomically(path, content)
        return path

    def replace(self, record: Record) -> None:
        """Write a record over itself, as where its test has failed after all."""
        write_atomically(self.record_path(record), _text(record))

    def link(self, record: Record, run_id: str) -> None:
        """Let another run have a record, too, instead of measuring it again: a file there names the run that did."""
        write_atomically(self.runs / run_id / f"{record.case}{RESUMED}", record.run_id + "\n")

    def publish(self, letter: str, report: Mapping[str, Any]) -> Path:
        """Replace the latest result of a phase."""
        path = self.report_path(letter)
        write_atomically(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
        return path

    def records(self) -> Iterator[Record | RecordError]:
        """The history, by run and case; a file that cannot be read comes as its error."""
        for path in sorted(self.runs.glob("*/[!.]*.json")):
            try:
                yield read_record(path)
            except RecordError as error:
                yield error


def _text(record: Record) -> str:
    return json.dumps(record.to_json(), indent=1) + "\n"

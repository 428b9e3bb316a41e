"""Cases that need not run again, as they have passed in an earlier run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftbench.records import Record, RecordError
from peftbench.store import Store

if TYPE_CHECKING:
    from peftbench.workbench import Workbench


class EarlierRuns:
    """
    The records of earlier runs, and which of them stand for a case of this one.

    Attributes:
        problems: Files that could not be read, and why.
    """

    def __init__(self, store: Store) -> None:
        found = list(store.records())
        self.problems = [str(one) for one in found if isinstance(one, RecordError)]
        readable = [one for one in found if isinstance(one, Record)]
        self._records = sorted(readable, key=lambda record: record.run_id)  # a run's folder may have another name
        self._store = store

    def passed(self, bench: Workbench, fingerprint: str, seed: int) -> Record | None:
        """The newest passed record of the same case at the same commit and changes, with the same versions, on the same device."""
        from peftbench.measure import describe_versions

        same = ("device", "accelerator") if bench.device.kind == "cuda" else ("device", "processor", "cores")
        settings, versions = bench.settings, describe_versions()
        wanted = ("passed", fingerprint, seed, settings.commit, versions, [bench.machine[fact] for fact in same])
        for record in reversed(self._records):
            there = [record.machine.get(fact) for fact in same]
            evaluations = min(settings.evaluations, record.optimizer_steps or 0)
            if (
                (record.outcome, record.fingerprint, record.seed, record.commit, record.versions, there) == wanted
                and len(record.dev_curve or ()) >= evaluations
                and self._store.record_path(record).is_file()  # not so in a run's folder that was renamed
            ):
                return record
        return None

    def why_not(self, bench: Workbench, fingerprint: str, seed: int) -> str | None:
        """Why a case that has passed elsewhere runs again; None if it has not."""
        passed = [r for r in self._records if (r.outcome, r.fingerprint, r.seed) == ("passed", fingerprint, seed)]
        if not passed:
            return None
        last, commit = passed[-1], bench.settings.commit
        where = f"in run {last.run_id}" + (f" at commit {last.commit['id'][:12]}" if last.commit.get("id") else "")
        dirty = " with uncommitted changes" if last.commit.get("dirty") else ""
        if not self._store.record_path(last).is_file():
            same = "runs whose folders were not renamed"
        elif last.commit == commit:
            same = "this machine, these versions and as many evaluations"
        elif {**last.commit, "peftbench": None} == {**commit, "peftbench": None}:
            same = "this very code of peftbench"
        else:
            same = "this commit and these changes"
        case = f"{last.phase_id} with seed {seed}"
        return f"{case} runs again: it passed {where}{dirty}, and only cases of {same} are resumed"

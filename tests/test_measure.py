"""What the machine says: time by the clock, memory by the kernel, the commit by git."""

import json
import mmap
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from peftbench.device import Device
from peftbench.measure import PACKAGES, PeakMemory, ProcessorWait, Stopwatch, describe_commit, describe_machine, describe_versions
from peftbench.sealed import fingerprint

CPU = Device(name="cpu", precision="fp32", why="test")
MEGABYTE = 10**6


def test_stopwatch_reads_the_clock_when_entered_and_left():
    """The difference of two readings, and zero before."""
    watch = Stopwatch(CPU, iter([100.0, 102.5]).__next__)
    assert 0.0 == watch.seconds
    with watch:
        pass
    assert 2.5 == watch.seconds


def test_stopwatch_waits_for_the_device_before_it_reads():
    """Work that was launched before is not counted, work launched inside is."""
    events = []

    class Traced:
        def synchronize(self):
            events.append("synchronize")

    def clock():
        events.append("clock")
        return float(len(events))

    with Stopwatch(Traced(), clock):
        events.append("work")
    assert ["synchronize", "clock", "work", "synchronize", "clock"] == events


def test_what_happens_in_a_pause_does_not_count():
    """Entered at 0, paused from 2 to 7, left at 8; read at 1."""
    watch = Stopwatch(CPU, iter([0.0, 1.0, 2.0, 7.0, 8.0]).__next__)
    with watch:
        assert 1.0 == watch.read()
        with watch.paused():
            pass
    assert 3.0 == watch.seconds


def test_stopwatch_lets_errors_through():
    """What is timed may fail; the time until then is kept."""
    watch = Stopwatch(CPU, iter([1.0, 4.0]).__next__)
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert 3.0 == watch.seconds


def test_stopwatch_starts_anew_each_time():
    """Used twice, it has the seconds of the second time."""
    watch = Stopwatch(CPU, iter([0.0, 5.0, 10.0, 11.0]).__next__)
    for expected in (5.0, 1.0):
        with watch:
            pass
        assert expected == watch.seconds


def fresh_memory(size):
    """``size`` bytes that were written, of pages that no heap could have held already."""
    pages = mmap.mmap(-1, size)
    for _ in range(size // MEGABYTE):
        pages.write(b"1" * MEGABYTE)
    return pages


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_peak_memory_sees_an_allocation_and_forgets_it_after_restart():
    """200 MB that are gone when the peak is read are in it, and after a restart they are not."""
    memory = PeakMemory(CPU)
    memory.restart()
    assert "process resident set during the case" == memory.scope
    before = memory.read_bytes()
    block = fresh_memory(200 * MEGABYTE)
    block.close()
    peak = memory.read_bytes()
    memory.restart()
    after = memory.read_bytes()
    assert 190 * MEGABYTE < peak - before < 230 * MEGABYTE
    assert after < peak - 150 * MEGABYTE


def test_peak_memory_knows_what_was_in_use_before():
    """It is part of the peak."""
    memory = PeakMemory(CPU)
    memory.restart()
    kept = fresh_memory(64 * MEGABYTE)
    assert 60 * MEGABYTE < memory.read_bytes() - memory.before_bytes
    assert memory.before_bytes > 50 * MEGABYTE
    kept.close()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the scheduler's account is Linux's")
def test_who_shares_a_processor_waits_for_it():
    """Two busy processes on one core each wait half of the time; one that sleeps waits for nothing."""
    program = (
        "import os, sys, time; os.sched_setaffinity(0, {int(sys.argv[1])})\n"
        "from peftbench.measure import ProcessorWait\n"
        "print('ready', flush=True); sys.stdin.readline(); wait = ProcessorWait(); began = time.monotonic()\n"
        "while time.monotonic() - began < 1.5: pass\n"
        "print(wait.read_fraction())"
    )
    core = str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", program, core]
    with ExitStack() as stack:
        pair = [stack.enter_context(subprocess.Popen(command, stdin=-1, stdout=-1, text=True)) for _ in range(2)]
        for process in pair:
            assert "ready\n" == process.stdout.readline()
        for process in pair:
            process.stdin.write("go\n")
            process.stdin.flush()
        fractions = [float(process.stdout.readline()) for process in pair]
    assert all(0.25 < fraction < 0.85 for fraction in fractions), fractions
    idle = ProcessorWait()
    time.sleep(0.2)
    assert 0.0 <= idle.read_fraction() <= 1.0


def test_workers_beside_each_other_are_another_machine():
    """One alone is none."""
    ids = {describe_machine(CPU, 2, workers)["id"] for workers in (1, 2, 4)} | {describe_machine(CPU, 2)["id"]}
    assert 3 == len(ids)
    assert "workers" not in describe_machine(CPU, 2)


def test_peak_memory_is_of_a_process_with_torch():
    """Bytes, not kilobytes: torch alone takes more than 50 MB and a test no terabyte."""
    assert 50 * MEGABYTE < PeakMemory(CPU).read_bytes() < 10**12


@pytest.fixture
def git(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "no-config"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "project"
    folder.mkdir()

    def run(*arguments):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run.folder = folder
    return run


def commit_a_file(git):
    git("init", "--quiet")
    (git.folder / "code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    return git("rev-parse", "HEAD")


def test_clean_checkout_is_its_commit(git):
    """No changes, no fingerprint of them; files that git does not track do not count."""
    head = commit_a_file(git)
    (git.folder / "notes.txt").write_text("untracked")
    assert {"id": head, "dirty": False, "changes": None} == describe_commit(git.folder)


def test_what_a_notebook_has_printed_is_no_change(git):
    """Running a tracked notebook saves its output into it; that must not hide the records of before from `--peft-resume`."""
    commit_a_file(git)
    (git.folder / "notebooks").mkdir()
    (git.folder / "notebooks/run.ipynb").write_text("{}")
    git("add", ".")
    git("commit", "--quiet", "-m", "a notebook")
    (git.folder / "notebooks/run.ipynb").write_text('{"outputs": ["42"]}')
    assert describe_commit(git.folder)["dirty"] is False
    assert describe_commit(git.folder / "notebooks")["dirty"] is False


@pytest.mark.parametrize("staged", [True, False])
def test_dirty_checkout_is_told_apart_by_its_changes(git, staged):
    """The same change gives the same fingerprint, another change another one, staged or not."""
    head = commit_a_file(git)
    seen = []
    for text in ("x = 2\n", "x = 3\n", "x = 2\n"):
        (git.folder / "code.py").write_text(text)
        if staged:
            git("add", "code.py")
        seen.append(describe_commit(git.folder))
    assert {(head, True)} == {(commit["id"], commit["dirty"]) for commit in seen}
    assert seen[0] == seen[2] != seen[1]
    assert re.fullmatch("[0-9a-f]{16}", seen[0]["changes"])


def test_commit_is_found_from_a_folder_inside(git):
    """A project may be a part of its repository; changes elsewhere in it count."""
    head = commit_a_file(git)
    (git.folder / "inner").mkdir()
    (git.folder / "code.py").write_text("x = 4\n")
    assert (head, True) == (describe_commit(git.folder / "inner")["id"], describe_commit(git.folder / "inner")["dirty"])


@pytest.mark.parametrize("kind", ["no repository", "no commit", "no folder"])
def test_without_a_commit_all_is_null(git, kind):
    """Nothing is made up where git has nothing to say."""
    if kind == "no commit":
        git("init", "--quiet")
    folder = git.folder / "missing" if kind == "no folder" else git.folder
    assert {"id": None, "dirty": None, "changes": None} == describe_commit(folder)


def test_a_repository_that_git_refuses_is_told_from_none(git):
    """So that nobody takes other code for the same: here its HEAD is broken, elsewhere another user owns it."""
    commit_a_file(git)
    (git.folder / ".git/HEAD").write_text("?")
    assert "git does not read the repository in " in describe_commit(git.folder)["problem"]


def test_untracked_modules_count_wherever_they_are(git):
    """In a folder beside, and with a name that git would quote."""
    commit_a_file(git)
    (git.folder / "inner").mkdir()
    for name in ("hälfte.py", "beside it.py"):
        (git.folder / name).write_text("x = 5\n")
        assert describe_commit(git.folder / "inner")["dirty"] is True
        assert describe_commit(git.folder / "inner") == describe_commit(git.folder)
        (git.folder / name).unlink()


def test_without_git_all_is_null(git, monkeypatch):
    """A machine without git still measures."""
    commit_a_file(git)
    monkeypatch.setenv("PATH", str(git.folder))
    assert {"id": None, "dirty": None, "changes": None} == describe_commit(git.folder)


def test_machine_is_described_with_an_id_of_its_facts():
    """The id is equal exactly where every fact is; the description is JSON."""
    facts = describe_machine(CPU, 3)
    identity = facts.pop("id")
    assert fingerprint(facts)[:16] == identity
    assert ("cpu", None, 3) == (facts["device"], facts["accelerator"], facts["threads"])
    assert 0 < facts["cores"] <= 4096
    assert json.loads(json.dumps(facts)) == facts == {k: v for k, v in describe_machine(CPU, 3).items() if k != "id"}


def test_versions_are_those_that_are_installed():
    """Python and every package that can change a figure."""
    versions = describe_versions()
    assert ["python", *PACKAGES] == list(versions)
    assert (sys.version.split()[0], torch.__version__) == (versions["python"], versions["torch"])

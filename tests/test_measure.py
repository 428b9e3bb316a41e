"""What the machine says: time by the clock, memory by the kernel, the commit by git."""

import json
import mmap
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from peftbench.device import Device
from peftbench.measure import (
    PACKAGES,
    PeakMemory,
    ProcessorWait,
    Stopwatch,
    describe_machine,
    describe_versions,
    processor_model,
    usable_processors,
)
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


def test_waiting_is_that_of_the_threads_there_are(tmp_path):
    """Thread 1 ran 50 and waited 150 since; 2, which had run most, has ended; 3 is new, and ran 50 of 100. Then 2 is another."""

    def write(**account):
        for thread, (ran, waited) in account.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"{ran} {waited} 7\n")

    write(one=(1000, 10), two=(10**9, 0))
    wait = ProcessorWait(tmp_path)
    assert wait.read_fraction() is None  # nothing has happened yet
    (tmp_path / "two/schedstat").unlink()
    write(one=(1050, 160), three=(50, 50))
    assert 200 / 300 == wait.read_fraction()
    write(two=(0, 100))  # another thread, which was given the number of one that has ended
    assert 300 / 400 == wait.read_fraction()
    assert ProcessorWait(tmp_path / "nowhere").read_fraction() is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the scheduler's account is Linux's")
def test_who_shares_a_processor_waits_for_it():
    """Of two busy processes on one core each waits about half of the time, or longer where others are busy, too."""
    program = (
        "import os, sys, time; os.sched_setaffinity(0, {int(sys.argv[1])})\n"
        "from peftbench.measure import ProcessorWait\n"
        "print('ready', flush=True); sys.stdin.readline(); wait = ProcessorWait(); began = time.monotonic()\n"
        "while time.monotonic() - began < 1.5: pass\n"
        "print(wait.read_fraction())"
    )
    command = [sys.executable, "-c", program, str(min(os.sched_getaffinity(0)))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        pair = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(2)]
        for process in pair:
            assert "ready\n" == process.stdout.readline()
        for process in pair:
            process.stdin.write("go\n")
            process.stdin.flush()
        fractions = [float(process.stdout.readline()) for process in pair]
    assert all(0.25 < fraction < 0.97 for fraction in fractions), fractions


def test_workers_beside_each_other_are_another_machine():
    """One alone is none."""
    ids = {describe_machine(CPU, 2, workers)["id"] for workers in (1, 2, 4)} | {describe_machine(CPU, 2)["id"]}
    assert 3 == len(ids)
    assert "workers" not in describe_machine(CPU, 2)


def test_peak_memory_is_of_a_process_with_torch():
    """Bytes, not kilobytes: torch alone takes more than 50 MB and a test no terabyte."""
    assert 50 * MEGABYTE < PeakMemory(CPU).read_bytes() < 10**12


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


@pytest.mark.parametrize(
    ("group", "files", "processors"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/jobs/7", {"cpu.max": "max 100000", "jobs/cpu.max": "100000 100000", "jobs/7/cpu.max": "max 100000"}, 1),
        ("0::/jobs/7", {"cpu.max": "20000 100000"}, 1),
        ("0::/elsewhere", {"other/cpu.max": "100000 100000"}, 4),
        ("5:memory:/\n4:cpu,cpuacct:/docker/3", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("0::/", {"cpu.max": "900000 100000"}, 4),
        (None, {}, 4),
    ],
)
def test_a_containers_share_limits_the_processors(tmp_path, monkeypatch, group, files, processors):
    """The least of what any group around allows, rounded up; none allows more than the four that there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(f"{text}\n")
    if group:
        (tmp_path / "own").write_text(f"{group}\n")
    assert processors == usable_processors(tmp_path / "fs", tmp_path / "own")


def test_processors_without_a_name_are_told_apart_by_their_numbers():
    """As Linux on Arm has them: Neoverse N1 and V2, which a cloud calls by neither name."""
    n1, v2 = (f"processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x0\nCPU part\t: {part}\n" for part in ("0xd0c", "0xd4f"))
    assert "implementer 0x41, variant 0x0, part 0xd0c" == processor_model(n1 * 2)
    assert processor_model(n1) != processor_model(v2)
    assert "AMD EPYC 7" == processor_model("processor\t: 0\nmodel name\t: AMD EPYC 7\ncpu MHz\t: 1\nmodel name\t: AMD EPYC 7\n")
    assert "" == processor_model("")


def test_a_peak_of_before_is_not_taken_for_the_cases(tmp_path):
    """Where the system does not forget, as on macOS: what is no more than the peak before is not known."""
    (tmp_path / "clear_refs").mkdir()  # which cannot be written
    (tmp_path / "status").write_text("VmHWM:\t100 kB\n")
    memory = PeakMemory(CPU, tmp_path)
    memory.restart()
    assert ("process resident set since its start", None) == (memory.scope, memory.read_bytes())
    (tmp_path / "status").write_text("VmHWM:\t130 kB\n")
    assert 130 * 1024 == memory.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_the_machines_memory_is_what_the_kernel_counts():
    """In GiB."""
    kibibytes = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0])
    assert pytest.approx(kibibytes / 2**20, abs=0.06) == describe_machine(CPU, 1)["memory_gib"]

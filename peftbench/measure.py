"""What only the machine knows: elapsed time, peak memory, waiting for a processor, what it is and what runs on it."""

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peftbench.device import Device
from peftbench.records import PEAK_SINCE_START
from peftbench.sealed import fingerprint

PACKAGES = (
    "peftbench",
    "torch",
    "numpy",
    "transformers",
    "peft",
    "datasets",
    "evaluate",
    "tokenizers",
    "pytest",
    "pytest-benchmark",
)


class Stopwatch:
    """Seconds of wall clock between entering and leaving, the device synchronized at both ends."""

    def __init__(self, device: Device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self._device, self._clock = device, clock

    def __enter__(self) -> "Stopwatch":
        self._device.synchronize()
        self._began = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self.read()

    def read(self) -> float:
        """Seconds up to here."""
        self._device.synchronize()
        return self._clock() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        before = self.read()
        yield
        self._began += self.read() - before


class PeakMemory:
    """
    The most memory in use since `restart`, and what was in use then.

    On CUDA what torch's allocator had taken from the device, what it kept for later included; libraries and CUDA graphs take some
    more. On Linux the process's resident set; elsewhere the most since the process began, which tells of a case only where it is
    more than before. ``scope`` says which.
    """

    def __init__(self, device: Device, process: Path = Path("/proc/self")) -> None:
        self._device, self._process = device, process
        self.scope = PEAK_SINCE_START
        self.before_bytes = 0

    def restart(self) -> None:
        """Forget earlier peaks."""
        if self._device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device.name)
            self.scope = "taken from the GPU during the case"
        else:
            try:
                (self._process / "clear_refs").write_text("5")
                self.scope = "process resident set during the case"
            except OSError:
                pass
        self.before_bytes = self._read_bytes()

    def read_bytes(self) -> int | None:
        """The peak in bytes; None where that of the process was before `restart`."""
        peak = self._read_bytes()
        return None if self.scope == PEAK_SINCE_START and peak <= self.before_bytes else peak

    def _read_bytes(self) -> int:
        if self._device.kind == "cuda":
            return torch.cuda.max_memory_reserved(self._device.name)
        try:
            status = (self._process / "status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            pass
        try:
            import resource
        except ImportError:
            import psutil  # Windows

            return int(psutil.Process().memory_info().peak_wset)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class ProcessorWait:
    """
    How long the process's threads have waited for a processor since this was made; on Linux alone.

    They wait where other work has it, where they are more than there are processors, and where the system allows the process no
    more. By the scheduler's own account of each thread: nanoseconds that it ran, and that it was ready to run and did not.

    Args:
        tasks: Where the system keeps the account of each thread, as ``schedstat`` in a folder of its own.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._tasks = tasks
        self._began = self._read()

    def read_fraction(self) -> float | None:
        """
        Share of the time in which its threads wanted a processor that they waited for one.

        Of the threads that there are by now; None where nobody counts.
        """
        ran, waited = 0, 0
        for thread, (has_run, has_waited) in self._read().items():
            run_before, waited_before = self._began.get(thread, (0, 0))
            if has_run < run_before or has_waited < waited_before:  # another thread, under the number of one that has ended
                run_before, waited_before = 0, 0
            ran, waited = ran + has_run - run_before, waited + has_waited - waited_before
        return waited / (ran + waited) if ran + waited else None

    def _read(self) -> dict[str, tuple[int, int]]:
        account = {}
        for path in self._tasks.glob("*/schedstat"):
            try:
                ran, waited, _ = path.read_text().split()
            except OSError:  # it has ended meanwhile
                continue
            account[path.parent.name] = int(ran), int(waited)
        return account


def describe_machine(device: Device, threads: int, workers: int = 1) -> dict[str, Any]:
    """
    What the figures were measured on; ``id`` is equal where times may be compared.

    Args:
        threads: Of an operation on the CPU.
        workers: Processes that run cases beside each other and share the machine.
    """
    facts: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": usable_processors(),
        "threads": threads,
        "memory_gib": _memory_gib(),
        "device": device.kind,
        "accelerator": torch.cuda.get_device_name(device.name) if device.kind == "cuda" else None,
        **({"workers": workers} if workers > 1 else {}),
    }
    return {**facts, "id": fingerprint(facts)[:16]}


def usable_processors(accounts: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """
    Processors that this process may use: those it may run on or, in a container, as many as its share of their time comes to.

    Args:
        accounts: Where the kernel tells of control groups, of version 1 or 2.
        own: Which of them this process is in.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, math.ceil(share)) for share in _shares(accounts, own))])


def _shares(accounts: Path, own: Path) -> Iterator[float]:
    """Processors' worth of time that the control groups around this process allow, where they limit it."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = accounts / "cpu" if controllers else accounts
        for folder in (root / name.lstrip("/"), *(root / name.lstrip("/")).parents):
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if float(quota) > 0:  # neither "max", which is no number, nor -1
                    yield float(quota) / float(period)
            except (OSError, ValueError):
                pass
            if folder == root:
                break


def describe_versions() -> dict[str, str]:
    """Python and the packages whose version can change a figure."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Its model; on Arm, where Linux knows no name, the numbers of maker and part."""
    model = ""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            model = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        else:
            model = processor_model(Path("/proc/cpuinfo").read_text())
    except OSError:
        pass
    return model or platform.processor() or "unknown"


def processor_model(cpuinfo: str) -> str:
    """What Linux calls the processors; empty if it does not."""
    facts = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in cpuinfo.splitlines())]
    names = [value for name, value in facts if name == "model name"]
    numbers = [f"{name[4:]} {value}" for name, value in facts if name in ("CPU implementer", "CPU variant", "CPU part")]
    return names[0] if names else ", ".join(dict.fromkeys(numbers))


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None

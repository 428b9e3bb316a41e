"""What a step frees stays with the process, in huge pages, until it is handed back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench import heap

PROBE = """
import ctypes, json
from pathlib import Path
import torch
from peftbench.heap import release, retain

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

def huge():
    maps = Path("/proc/self/smaps").read_text().split("[heap]")[1:]
    return sum(int(part.split("AnonHugePages:")[1].split()[0]) for part in maps) // 1024

if RETAIN:
    retain()
    retain()
start = resident()
many = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
held = resident()
pages = huge()
del many
kept = resident()
release()
released = resident()
again = [torch.ones(2**18) for _ in range(200)]
print(json.dumps({"start": start, "held": held, "huge": pages, "kept": kept, "released": released, "huge_again": huge()}))
"""

needs_glibc = pytest.mark.skipif(sys.platform != "linux" or not hasattr(heap.ctypes.CDLL(None), "mallopt"), reason="needs glibc")


def probe(*, retain):
    """MiB of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("RETAIN", str(retain))], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


@needs_glibc
def test_what_a_step_frees_is_kept_until_it_is_handed_back():
    found = probe(retain=True)
    assert found["held"] - found["start"] >= 195
    assert found["kept"] >= found["held"] - 5
    assert found["released"] <= found["start"] + 5
    assert found["start"] < 1000, "the reserve is addresses, not memory"


@needs_glibc
def test_the_heap_is_of_huge_pages():
    """Where the system has some on request alone, only those that asked have them."""
    try:
        mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        pytest.skip("this kernel has no transparent huge pages")
    if "[madvise]" not in mode:
        pytest.skip(f"huge pages are not on request here: {mode.strip()}")
    found = probe(retain=True)
    assert found["huge"] >= 150
    assert found["huge_again"] >= 150
    assert probe(retain=False)["huge"] <= 10


def test_other_c_libraries_are_left_alone(monkeypatch):
    class Library:
        """One that knows none of glibc's functions."""

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: Library())
    assert heap._glibc.__wrapped__() is None

"""What a step frees stays with the process, in huge pages, until it is handed back."""

import json
import subprocess
import sys

import pytest

from peftbench import heap

PROBE = """
import json
from pathlib import Path
import torch
from peftbench import heap

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

def heap_maps():
    lines, maps = Path("/proc/self/smaps").read_text().splitlines(), []
    for line in lines:
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith("[heap]")
            if inside:
                maps.append([*(int(end, 16) for end in line.split()[0].split("-")), False])
        elif inside and line.startswith("VmFlags:"):
            maps[-1][2] = "hg" in line.split()
    return maps

def asks_for_huge_pages():
    return sum(end - start for start, end, huge in heap_maps() if huge)

before = asks_for_huge_pages()
heap.retain()
heap.retain()
start = resident()
many = [torch.ones(2**18) for _ in range(400)]  # 1 MiB each
huge = [sum(start <= x.data_ptr() < end for start, end, huge in heap_maps() if huge) for x in many]
held = resident()
del many
kept = resident()
asked = asks_for_huge_pages()
heap.release()
released = resident()
asked_again = asks_for_huge_pages()
beyond = torch.empty(heap.RESERVE + 2**28, dtype=torch.uint8)  # whose pages nobody touches
outside = not any(start <= beyond.data_ptr() < end for start, end, _ in heap_maps())
print(json.dumps(dict(start=start, held=held, kept=kept, released=released, before=before, asked=asked,
    asked_again=asked_again, huge=sum(huge), outside=outside)))
"""

needs_glibc = pytest.mark.skipif(sys.platform != "linux" or heap._glibc() is None, reason="needs glibc")


@pytest.fixture(scope="module")
def found():
    """What a new process found of itself: MiB that were resident; bytes of the heap that ask for huge pages."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@needs_glibc
def test_what_a_step_frees_is_kept_until_it_is_handed_back(found):
    assert found["held"] - found["start"] >= 380
    assert found["kept"] >= found["held"] - 20
    assert found["released"] <= found["start"] + 20
    assert found["start"] < 1000, "the reserve is addresses, not memory"
    assert found["outside"], "what the reserve has no room for is a mapping of its own, handed back when it is freed"


@needs_glibc
@pytest.mark.skipif(not heap.offers_huge_pages(), reason="no huge pages on request here")
def test_the_heap_asks_for_huge_pages(found):
    assert found["before"] == 0
    assert found["asked"] >= heap.RESERVE
    assert found["huge"] >= 380
    assert found["asked_again"] >= heap.RESERVE


@pytest.mark.parametrize(
    ("enabled", "size", "offers"),
    [
        ("always [madvise] never", 2**21, True),
        ("[always] madvise never", 2**21, False),  # which has them without being asked
        ("always madvise [never]", 2**21, False),
        ("always [madvise] never", 2**29, False),
    ],
)
def test_huge_pages_are_asked_for_where_that_helps(enabled, size, offers, tmp_path):
    (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "hpage_pmd_size").write_text(f"{size}\n")
    assert heap.offers_huge_pages(tmp_path) is offers


def test_a_kernel_without_huge_pages_offers_none(tmp_path):
    assert not heap.offers_huge_pages(tmp_path)


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_other_c_libraries_are_left_alone(error, monkeypatch):
    """musl's lacks some functions; on Windows there is no such thing to ask."""

    def no_library(_):
        raise error

    monkeypatch.setattr(heap.ctypes, "CDLL", no_library)
    assert heap._glibc.__wrapped__() is None
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    heap.retain.__wrapped__()
    heap.release()

"""
peftbench's loop beside transformers' Trainer: the same examples, model, precision and number of updates, on this machine, now.

Not part of the default run: ``pytest benchmarks -m peer``, with ``--peft-data DIR`` for SST-2's sentences besides the reviews. Each
contender has a process of its own, and they take turns, so that what else the machine does meets all of them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from tabulate import tabulate

from peftbench.plugin.session import SESSION
from peftbench.sealed import lock, write_atomically
from peftbench.store import Store

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]

EXAMPLES, EXAMPLES_ON_GPU, TINY_EXAMPLES, BATCH = 256, 1024, 32, 16
"""Sentences that each contender learns from. On a GPU 256 are over before many steps are CUDA graphs."""
ROUNDS = 5
"""Of which the first is a cold one, with memory that was not touched before."""
AHEAD = 1.4
"""How many times as fast as a tuned Trainer the loop must be at least; on GPUs it was three to seven times."""
CONTENDERS = {
    "full": ("notebook", "tuned", "peftbench"),
    "lora": ("notebook", "tuned", "peftbench"),
    "kd": ("notebook", "live-teacher", "tuned", "peftbench"),
}
DATA = {"reviews": "reviews", "glue": "sst2", "grammar": "generated"}
MIB = 2**20


def pytest_generate_tests(metafunc):
    """The scale's own data and, where it is given, the folder's."""
    if "source" in metafunc.fixturenames:
        given = metafunc.config.stash[SESSION].options.data
        metafunc.parametrize("source", ["own", "folder"] if given else ["own"])


class Contender:
    """A process of benchmarks/throughput.py."""

    def __init__(self, **spec):
        self.name = spec["contender"]
        script = Path(__file__).with_name("throughput.py")
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the exit; a pipe that nobody reads would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.__exit__(None, None, None)
        self._said.close()

    def ask(self, command):
        """What it answers; fails the test with the end of what it said if it has ended."""
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._said.seek(0)
            pytest.fail(f"{self.name} ended:\n{self._said.read()[-2000:]}", pytrace=False)
        return json.loads(answer)


@pytest.fixture(scope="session")
def report(pytestconfig):
    """Rows of this session by cell, printed as a table at its end."""
    rows = []
    yield rows
    if rows:
        reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(render(rows))


@pytest.mark.parametrize("precision", ["fp32", "native"])
@pytest.mark.parametrize("method", CONTENDERS)
def test_peftbench_is_ahead_of_a_tuned_trainer(source, method, precision, peft_scale, peft_workbench, report):
    """
    On the same work, peftbench's median is well above that of a Trainer as well set up as its user can; on a CPU in no more memory.

    Memory is not judged on a GPU, where graphs spend some to save time, and nothing is at tiny scale, whose matrices are small.
    """
    from peftbench.device import Device  # here, so that collecting the phases beside this file imports no torch

    settings = peft_workbench.settings
    if settings.workers > 1:
        pytest.skip("contenders need the machine to themselves; run this without other workers beside it")
    if precision == "native":
        precision = Device.choose(settings.device).precision
        if precision == "fp32":
            pytest.skip("this device computes in fp32 natively, which is measured already")
    on_gpu = peft_workbench.device.kind == "cuda"
    examples = TINY_EXAMPLES if peft_scale.name == "tiny" else EXAMPLES_ON_GPU if on_gpu else EXAMPLES
    spec = {
        "method": method,
        "precision": precision,
        "scale": peft_scale.name,
        "data": str(settings.data) if source == "folder" else "",
        "device": settings.device,
        "outputs": str(settings.outputs),
        "examples": examples,
    }
    rounds = {name: [] for name in CONTENDERS[method]}
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(contender=name, **spec)) for name in rounds]
        for contender in ROUNDS * contenders:
            rounds[contender.name].append({**contender.ask("round"), **contender.ask("matrices")})

    cell = {"data": "sst2" if source == "folder" else DATA[peft_scale.data], "method": method, "precision": precision}
    rows = [
        {
            **cell,
            "contender": name,
            **summarize([examples / one["seconds"] for one in measured]),
            "peak_memory_bytes": measured[0]["peak_memory_bytes"],  # before the process held the operands of a replay
            "matrix_share": share_of_products(measured),
            "updates": measured[0]["updates"],
            "run_id": settings.run_id,
        }
        for name, measured in rounds.items()
    ]
    report += rows
    publish(Store(settings.outputs, peft_scale.name).root / "reports" / "throughput.json", cell, rows)
    assert {one["updates"] for measured in rounds.values() for one in measured} == {examples // BATCH}
    medians = {row["contender"]: row["examples_per_second"] for row in rows}
    if peft_scale.name != "tiny":
        assert medians["peftbench"] >= AHEAD * medians["tuned"]
        assert medians["peftbench"] > medians["notebook"]
        peaks = {row["contender"]: row["peak_memory_bytes"] for row in rows}
        assert on_gpu or peaks["peftbench"] <= peaks["tuned"]


def summarize(rates):
    """Median, number and relative range of examples per second."""
    median = statistics.median(rates)
    return {"examples_per_second": median, "rounds": len(rates), "spread": (max(rates) - min(rates)) / median}


def share_of_products(measured):
    """Median share of a round that its matrix products take alone; None where they were not run alone."""
    shares = [one["matrix_seconds"] / one["seconds"] for one in measured if one["matrix_seconds"] is not None]
    return statistics.median(shares) if shares else None


def publish(path, cell, rows):
    """Replace the rows of a cell in the file and leave the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path):
        known = json.loads(path.read_text("utf-8")) if path.exists() else []
        others = [row for row in known if any(row[key] != value for key, value in cell.items())]
        write_atomically(path, json.dumps(others + rows, indent=1) + "\n")


def render(rows):
    """The rows as a table, each rate also as what peftbench's is a multiple of."""
    ours = {cell_of(row): row["examples_per_second"] for row in rows if row["contender"] == "peftbench"}
    return tabulate(
        [
            [
                *cell_of(row),
                row["contender"],
                f"{row['examples_per_second']:.1f}",
                f"{100 * row['spread']:.0f}%",
                f"{ours[cell_of(row)] / row['examples_per_second']:.2f} ×",
                f"{row['peak_memory_bytes'] / MIB:.0f} MiB",
                "-" if row["matrix_share"] is None else f"{100 * row['matrix_share']:.0f}%",
            ]
            for row in rows
        ],
        ["data", "method", "precision", "contender", "examples/s", "spread", "peftbench", "peak", "matrix"],
        disable_numparse=True,
        colalign=(*["left"] * 4, *["right"] * 5),
    )


def cell_of(row):
    """What the contenders of a row share."""
    return row["data"], row["method"], row["precision"]

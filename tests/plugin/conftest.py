"""A small study in a folder of its own, run by pytest inside the test."""

import json
import os
import shutil
from pathlib import Path

import pytest
from samples import git

import peftbench.runner  # noqa: F401 - torch and datasets cannot be loaded again after pytester has unloaded them
from peftbench.data import generate_sentences
from peftbench.phases import KD_MAX_LENGTH, SCALES
from peftbench.workbench import Settings, Workbench

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
        assert run_phase(phase).dev.n >= 60
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


@pytest.fixture(scope="session")
def tuned_cache(tmp_path_factory, data_folder):
    """The cache of a session that has tuned the teacher of the small study."""
    settings = Settings(outputs=tmp_path_factory.mktemp("tuned"), run_id="tuned", data=data_folder)
    bench = Workbench(SCALES["tiny"], settings)
    bench.teacher_logits(1000, KD_MAX_LENGTH)
    return bench.store.root / "cache"


@pytest.fixture(autouse=True)
def warm_outputs(pytester, tuned_cache):
    """Most tests are about something else than tuning a teacher: they find it in their outputs."""
    shutil.copytree(tuned_cache, pytester.path / "outputs/tiny/cache")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sessions in processes of their own share the cores, and know nothing of a worker of pytest-xdist that the test runs in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def study(pytester, data_folder):
    """Run pytest over the small study at tiny scale with more arguments, in this process."""
    pytester.makepyfile(test_study=STUDY)

    def run(*arguments, data=data_folder):
        data_option = [f"--peft-data={data}"] if data else []
        return pytester.runpytest_inprocess("-m", "tiny", *data_option, *arguments)

    return run


@pytest.fixture
def commit(pytester):
    """Commit the small study to a new repository."""

    def run():
        for arguments in (["init", "-q"], ["add", "test_study.py"], ["commit", "-q", "-m", "study"]):
            git(pytester.path, *arguments)

    return run


@pytest.fixture
def records(pytester):
    """The records that the study has left, by file name."""

    def read(root="outputs/tiny"):
        paths = sorted((Path(pytester.path) / root / "runs").glob("*/*.json"))
        return {path.name: json.loads(path.read_text("utf-8")) for path in paths}

    return read

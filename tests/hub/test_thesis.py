"""The thesis scale from end to end, as a user starts it: pytest in a process of its own, with a Hub of small repositories."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from peftbench.data import GLUE, LABELLED_TEST, generate_sentences
from peftbench.models import load_classifier, load_tokenizer, locate, save_classifier
from peftbench.phases import SCALES, Untrained

REPOSITORY = Path(__file__).parents[2]
TRAIN_ROWS = 120


@pytest.fixture
def small_hub(hub, tmp_path):
    """The repositories of the thesis scale under their own names, with three-layer models and generated sentences."""
    thesis = SCALES["thesis"]
    for source, architecture in ((thesis.teacher, "bert"), (thesis.backbone, "bert"), (thesis.student, "distilbert")):
        weights = locate(Untrained(architecture=architecture, layers=3, hidden_size=16, attention_heads=2), fetch=None)
        torch.manual_seed(0)
        save_classifier(load_classifier(weights), load_tokenizer(weights), tmp_path / "made")
        hub.add(f"models/{source.source}", {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()})
    splits = generate_sentences(train=TRAIN_ROWS, dev=40, test=40)
    shards = {"train": splits.train, "validation": splits.dev, "test": splits.test}
    files = {}
    for name, split in shards.items():
        labels = [-1] * len(split) if name == "test" else list(split.labels)
        buffer = io.BytesIO()
        pq.write_table(pa.table({"sentence": list(split.sentences), "label": labels, "idx": list(range(len(split)))}), buffer)
        files[f"sst2/{name}-00000-of-00001.parquet"] = buffer.getvalue()
    hub.add(f"datasets/{GLUE}", files)
    rows = zip(reversed(splits.test.sentences), reversed(splits.test.labels), strict=True)
    hub.add(
        f"datasets/{LABELLED_TEST}", {"test.jsonl": "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows).encode()}
    )
    return hub


def run_pytest(hub, folder, *arguments, **environment):
    """The study's phases on a few examples at thesis scale; the models are too small to learn, which is not the point."""
    (folder / "test_small.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r})\n"
        "import dataclasses, pytest\n"
        "from test_phases import PHASES\n"
        "few = lambda p: dataclasses.replace(p, **({'subset': 64, 'epochs': 1} if p.epochs else {'kd_subsets': (64,)}))\n"
        "PHASES = list(map(few, PHASES))\n"
        "@pytest.mark.parametrize('phase', PHASES, ids=lambda phase: phase.id)\n"
        "def test_phase(phase, run_phase):\n"
        "    assert run_phase(phase).outcome == 'passed'\n",
        "utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "test_small.py", "--peft-scale", "thesis", "--peft-device", "cpu", *arguments]
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", **environment}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_XDIST_"))}
    return subprocess.run(command, cwd=folder, env=kept | variables, capture_output=True, text=True, timeout=300, check=False)


def records(folder):
    return {path.stem: json.loads(path.read_text("utf-8")) for path in (folder / "outputs/runs").glob("*/*.json")}


@pytest.mark.slow
def test_all_phases_from_the_hub_and_again_offline(small_hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN are honoured, commits are in the records, and the cache serves HF_HUB_OFFLINE=1."""
    small_hub.repos[f"models/{SCALES['thesis'].teacher.source}"].private = True
    done = run_pytest(small_hub, tmp_path, HF_TOKEN=small_hub.token)
    assert 0 == done.returncode, done.stdout + done.stderr
    found = records(tmp_path)
    assert 5 == len(found)
    by_phase = {record["phase"]: record for record in found.values()}
    thesis = SCALES["thesis"]
    for letter, source in (("A", thesis.teacher), ("B", thesis.backbone), ("C1", thesis.student), ("D", thesis.backbone)):
        assert f"{source.source} at {small_hub.repos[f'models/{source.source}'].commit}" == by_phase[letter]["checkpoint"]
    assert {"train": TRAIN_ROWS, "dev": 40, "test": 40} == by_phase["A"]["data"]["sizes"]
    assert {GLUE, LABELLED_TEST} == set(by_phase["A"]["data"]["revisions"])
    assert {"phase_a_metrics.json", "phase_d_metrics.json"} <= {path.name for path in (tmp_path / "outputs/reports").iterdir()}
    small_hub.requests.clear()
    again = run_pytest(small_hub, tmp_path, "-k", "hybrid", HF_HUB_OFFLINE="1")
    assert 0 == again.returncode, again.stdout + again.stderr
    assert [] == small_hub.requests


def test_what_goes_wrong_is_one_message(small_hub, tmp_path):
    """A private teacher without a token: no traceback, and a record that says why."""
    small_hub.repos[f"models/{SCALES['thesis'].teacher.source}"].private = True
    done = run_pytest(small_hub, tmp_path, "-k", "teacher")
    assert 1 == done.returncode
    assert "HF_TOKEN" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "huggingface_hub/" not in done.stdout
    [record] = records(tmp_path).values()
    assert ("failed", True) == (record["outcome"], "HF_TOKEN" in record["error"])

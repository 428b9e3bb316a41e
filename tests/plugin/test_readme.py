"""The README is true."""

import dataclasses
import re
from pathlib import Path

import peftbench
from peftbench.models import load_classifier, load_tokenizer, locate, save_classifier
from peftbench.phases import Untrained
from peftbench.plugin.options import OPTIONS
from peftbench.records import Record

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def example_with(text):
    """The README's Python that has this text in it."""
    [example] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in code]
    return example


def test_the_example_of_other_models_runs_as_printed(pytester, study, records):
    """The student is the folder's, which the record says."""
    weights = locate(Untrained(architecture="distilbert", layers=1, hidden_size=8, attention_heads=1), fetch=None)
    save_classifier(load_classifier(weights), load_tokenizer(weights), pytester.path / "my-student")
    pytester.makeconftest(example_with("peft_scale"))
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    assert "my-student" == records()["S-small-tiny-s42.json"]["checkpoint"]


def test_the_example_of_a_phase_runs_as_printed(pytester, data_folder, records):
    """The phase that the README adds trains, passes and leaves its record."""
    pytester.makepyfile(test_example=example_with("Phase("))
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, deselected=1)
    assert ["E-ia3-tiny-s42.json"] == list(records())


def test_the_tree_names_every_module():
    """The tree and the package list the same files."""
    package = Path(peftbench.__file__).parent
    modules = {path.name for path in package.glob("[!_]*.py")} | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert modules == set(re.findall(r"^  (\w+(?:\.py|/)) ", README, re.MULTILINE))


def test_the_record_is_described_key_by_key():
    """The page on the record has its keys and no others."""
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "record.md").read_text("utf-8"), re.MULTILINE)
    assert {field.name for field in dataclasses.fields(Record)} == set(re.findall(r"`(\w+)`", " ".join(rows)))


def test_every_option_is_described():
    """The README's table has each option with its ini key, and no others."""
    rows = re.findall(r"^\| `--peft-(\w+)`, `peft_(\w+)` \|", README, re.MULTILINE)
    assert sorted((name, name) for name in (*OPTIONS, "fail", "resume")) == sorted(rows)

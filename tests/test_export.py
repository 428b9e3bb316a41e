"""Exports: each by its format's published rules, or by the tool that reads it."""

import dataclasses
import json
import subprocess
import sys

import jsonschema
import pytest
from samples import failed, passed

from peftbench.export import to_bencher, to_github_action, to_pytest_benchmark
from peftbench.history import read_file

RECORDS = [passed("B-lora", seed=42), passed("B-lora", seed=43, seconds=66.0), passed("C1-full"), failed("D-hybrid")]

BENCHER_SCHEMA = {  # https://bencher.dev/bmf.json
    "$schema": "http://json-schema.org/draft-07/schema",
    "type": "object",
    "patternProperties": {
        ".+": {
            "type": "object",
            "patternProperties": {
                ".+": {
                    "type": "object",
                    "properties": {name: {"type": "number"} for name in ("value", "lower_value", "upper_value")},
                    "required": ["value"],
                }
            },
        }
    },
}


def test_bencher_metric_format():
    """By the schema that Bencher publishes; measures with names of at most 64 characters; a failed phase has no values."""
    exported = to_bencher(RECORDS)
    jsonschema.validate(exported, BENCHER_SCHEMA)
    assert ["B-lora-mini", "C1-full-mini"] == list(exported)
    assert all(len(measure) <= 64 for measures in exported.values() for measure in measures)
    assert {"value": 63.0, "lower_value": 60.0, "upper_value": 66.0} == exported["B-lora-mini"]["train_runtime_seconds"]
    accuracy = exported["C1-full-mini"]["accuracy"]
    assert accuracy["lower_value"] < accuracy["value"] <= accuracy["upper_value"]


@pytest.mark.parametrize(("better", "metric"), [("higher", "accuracy"), ("lower", "train_runtime_seconds")])
def test_github_action_benchmark(better, metric):
    """A list of entries with a name, a unit and a number; each direction in a file of its own."""
    entries = to_github_action(RECORDS, better)
    for entry in entries:
        assert (str, str) == (type(entry["name"]), type(entry["unit"]))
        assert isinstance(entry["value"], int | float)
        assert {"name", "unit", "value"} <= set(entry) <= {"name", "unit", "value", "range", "extra"}
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    assert f"C1-full-mini {metric}" in names
    other = {entry["name"] for entry in to_github_action(RECORDS, "lower" if better == "higher" else "higher")}
    assert not other & set(names)


def test_pytest_benchmark_reads_its_own_format(tmp_path):
    """`pytest-benchmark compare` prints a row a phase."""
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(to_pytest_benchmark(RECORDS)))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=mean,rounds"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert 0 == done.returncode, done.stderr
    assert "test_phase[B-lora]" in done.stdout
    assert "63.0000" in done.stdout


def test_an_export_for_pytest_benchmark_keeps_all_seeds(tmp_path):
    """Read again, it is the records that passed."""
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(to_pytest_benchmark(RECORDS)))
    assert RECORDS[:3] == list(read_file(path).records)


def test_pytest_benchmark_entries_are_named_as_the_cases():
    """A tiny case has that in its id, so that an exported run pairs with one that pytest-benchmark saved."""
    records = [passed(), dataclasses.replace(passed(), scale="tiny")]
    assert ["test_phase[B-lora]", "test_phase[B-lora-tiny]"] == [e["name"] for e in to_pytest_benchmark(records)["benchmarks"]]


def test_github_action_benchmark_says_the_unit():
    """The metric's own; of quality it is a fraction. Two seeds have a range, one has none."""
    entries = {entry["name"]: entry for better in ("higher", "lower") for entry in to_github_action(RECORDS, better)}
    units = {name: entries[f"B-lora-mini {name}"]["unit"] for name in ("accuracy", "train_runtime_seconds", "artifact_bytes")}
    assert {"accuracy": "fraction", "train_runtime_seconds": "s", "artifact_bytes": "B"} == units
    assert "± 4.243" == entries["B-lora-mini train_runtime_seconds"]["range"]
    assert "range" not in entries["C1-full-mini train_runtime_seconds"]


def test_a_phase_that_trains_nothing_is_exported_without_a_training_time():
    """It has no time, and not none of it; for pytest-benchmark its only round takes 0 s."""
    still = [passed("A-teacher", seconds=0.0, trainable=0)]
    assert "train_runtime_seconds" not in to_bencher(still)["A-teacher-mini"]
    assert "A-teacher-mini train_runtime_seconds" not in {entry["name"] for entry in to_github_action(still, "lower")}
    [entry] = to_pytest_benchmark(still)["benchmarks"]
    assert ("no training", 0.0, 1) == (entry["group"], entry["stats"]["mean"], entry["stats"]["rounds"])


def test_one_seed_has_no_bounds_but_those_of_accuracy():
    """Least and most of a single value would be bounds of no width, which any other value breaks."""
    measures = to_bencher(RECORDS)["C1-full-mini"]
    assert {"value": 60.0} == measures["train_runtime_seconds"]
    assert {"value", "lower_value", "upper_value"} == set(measures["accuracy"])

"""Records: every key, JSON both ways, what is refused, and where files lie."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from samples import NOTHING

from peftbench.phases import LORA, Distillation, Phase
from peftbench.records import (
    SCHEMA_VERSION,
    Efficiency,
    MemoryUse,
    ParameterCounts,
    Predictions,
    Record,
    RecordError,
    SplitMetrics,
    TeacherCost,
    decode_record,
    phase_config,
    read_record,
)
from peftbench.store import Store

QUALITY = SplitMetrics(accuracy=0.9, f1=0.91, n=10, accuracy_ci95=(0.6, 0.98))
PASSED = Record(
    schema_version=SCHEMA_VERSION,
    run_id="20250102T030405Z-abcdef",
    phase="D",
    name="hybrid",
    scale="mini",
    seed=42,
    outcome="passed",
    fingerprint="f" * 64,
    config={"epochs": 3, "peft": {"r": 32}},
    checkpoint="asset:encoder",
    dev=QUALITY,
    test=QUALITY,
    majority_accuracy=0.5,
    parameter_counts=ParameterCounts(total=1000, trainable=10),
    train_runtime_seconds=12.5,
    efficiency=Efficiency(accuracy_per_million_params=9e4, accuracy_per_minute=4.32),
    teacher_cost=TeacherCost(training_seconds=30.0, logit_seconds=2.0, cache="hit"),
    learning_curve=((1, 0.7), (2, 0.5)),
    skipped_steps=1,
    replayed_steps=0,
    memory_use=MemoryUse(examples_at_once=8, times_out_of_memory=1, gradient_checkpointing=True),
    predictions={"dev": Predictions.from_labels([1, 0, 1], [1, 1, 1], "s" * 64)},
    data={},
    machine={},
    versions={"torch": "2.6"},
    commit={},
)
FAILED = Record(
    **NOTHING,
    run_id="20250102T030405Z-abcdef",
    phase="C1",
    name="full",
    scale="tiny",
    seed=7,
    outcome="failed",
    fingerprint=None,
    config={},
    error="RuntimeError: out of memory",
)

NUMBERS, WHOLE = st.floats(-1e100, 1e100), st.integers(1 - 2**63, 2**63 - 1)
AMOUNTS, COUNTS = st.floats(0, 1e100), st.integers(0, 2**63 - 1)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | WHOLE | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
MAPPINGS = st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=3)
SHARES = st.floats(0, 1)
QUALITIES = st.builds(SplitMetrics, accuracy=SHARES, f1=SHARES, n=COUNTS, accuracy_ci95=st.tuples(NUMBERS, NUMBERS))
PREDICTIONS = st.builds(
    lambda pairs, name: Predictions.from_labels([p for p, _ in pairs], [g for _, g in pairs], name),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=20),
    st.text(max_size=8),
)
MEASURED = {
    "dev": QUALITIES,
    "test": QUALITIES,
    "parameter_counts": st.builds(ParameterCounts, total=COUNTS, trainable=COUNTS),
    "train_runtime_seconds": AMOUNTS,
    "efficiency": st.builds(Efficiency, accuracy_per_million_params=st.none() | AMOUNTS, accuracy_per_minute=st.none() | AMOUNTS),
}
SIZES = st.fixed_dictionaries({}, optional={"sizes": st.dictionaries(st.text(max_size=8), COUNTS, max_size=2)})
ANY = {
    "schema_version": st.just(SCHEMA_VERSION),
    "run_id": st.text(max_size=8),
    "phase": st.text(max_size=8),
    "name": st.text(max_size=8),
    "scale": st.text(max_size=8),
    "seed": WHOLE,
    "fingerprint": st.none() | st.text(max_size=8),
    "config": MAPPINGS,
    "error": st.none() | st.text(),
    "learning_curve": st.lists(st.tuples(st.integers(1, 2**63 - 1), NUMBERS), max_size=3).map(tuple),
    "peak_memory_bytes": st.none() | COUNTS,
    "teacher_cost": st.none()
    | st.builds(TeacherCost, training_seconds=AMOUNTS, logit_seconds=AMOUNTS, cache=st.sampled_from(["hit", "miss"])),
    "data": st.builds(lambda free, sizes: {key: free[key] for key in free if key != "sizes"} | sizes, MAPPINGS, SIZES),
    "machine": MAPPINGS,
    "commit": MAPPINGS,
    "predictions": st.dictionaries(st.text(max_size=8), PREDICTIONS, max_size=2),
    "versions": st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
}
RECORDS = st.builds(Record, outcome=st.just("passed"), **ANY, **MEASURED) | st.builds(
    Record, outcome=st.just("failed"), **ANY, **{name: st.none() | part for name, part in MEASURED.items()}
)


def changed(path, value, content=None):
    """The JSON of a passed record with one place changed; `path` joins keys by dots."""
    content = PASSED.to_json() if content is None else content
    *keys, last = path.split(".")
    place = content
    for key in keys:
        place = place[key]
    place[last] = value
    return content


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "outputs", "mini")


@given(record=RECORDS)
@hypothesis_settings(deadline=None, max_examples=40)
def test_a_record_survives_json(record):
    """Record to JSON text and back is the identity."""
    assert record == Record.from_json(json.loads(json.dumps(record.to_json())))


@pytest.mark.parametrize("record", [PASSED, FAILED], ids=["passed", "failed"])
def test_a_row_has_single_values_alone(record):
    """No curves and predictions, nor a column for those of a case that has none."""
    assert not {"predictions", "learning_curve", "dev_curve"} & record.to_row().keys()
    taught = dataclasses.replace(record, config={**record.config, "teacher": {"epochs": 1, "peft": None, "distillation": None}})
    assert ["config.teacher.epochs"] == [name for name in taught.to_row() if name.startswith("config.teacher.")]


@pytest.mark.parametrize("record", [PASSED, FAILED], ids=["passed", "failed"])
def test_a_record_survives_its_file(store, record):
    """Record to file and back is the identity."""
    assert record == read_record(store.save(record))


@pytest.mark.parametrize("record", [PASSED, FAILED], ids=["passed", "failed"])
def test_the_contracts_keys_are_at_the_top_level(record):
    """Users' tables read these keys, measured or null."""
    keys = (
        "schema_version run_id phase name scale seed outcome checkpoint dev test parameter_counts train_runtime_seconds efficiency "
        "kd_path evaluation_seconds samples_per_second tokens_per_second peak_memory_bytes artifact_bytes latency_ms "
        "majority_accuracy teacher_cost config data machine versions commit predictions fingerprint"
    )
    assert set() == set(keys.split()) - set(record.to_json())


def test_the_contracts_keys_are_in_the_parts():
    """Quality, parameter counts and efficiency hold what the design page names, and nothing else."""
    content = PASSED.to_json()
    assert {"accuracy", "f1", "n", "accuracy_ci95"} == set(content["dev"]) == set(content["test"])
    assert {"total", "trainable"} == set(content["parameter_counts"])
    assert {"accuracy_per_million_params", "accuracy_per_minute"} == set(content["efficiency"])


def test_a_record_is_written_with_the_schema_of_this_version():
    """The number stands in the file, for whoever reads it later."""
    assert SCHEMA_VERSION == PASSED.to_json()["schema_version"]


def test_a_failed_record_has_null_for_what_was_not_measured():
    """Nothing looks measured that was not."""
    content = FAILED.to_json()
    assert ("failed", "RuntimeError: out of memory") == (content["outcome"], content["error"])
    assert {None} == {content[key] for key in ("dev", "test", "efficiency", "train_runtime_seconds", "parameter_counts")}


def test_a_record_with_nan_is_not_written(store):
    """NaN is not JSON: it is refused before a file is made."""
    with pytest.raises(ValueError):
        store.save(dataclasses.replace(PASSED, train_runtime_seconds=float("nan")))
    assert [] == list(store.runs.rglob("*.json"))


def without(key):
    return {name: value for name, value in PASSED.to_json().items() if name != key}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "", id="empty"),
        pytest.param(json.dumps(PASSED.to_json())[:-40], "", id="truncated"),
        pytest.param("phase,accuracy\nA,0.9\n", "", id="not-json"),
        pytest.param('{"machine_info": {}, "benchmarks": []}', "not a peftbench record", id="foreign"),
        pytest.param("[]", "not a peftbench record", id="a-list"),
        pytest.param("null", "not a peftbench record", id="null"),
        pytest.param("[" * 100_000, "", id="too-deep"),
        pytest.param(json.dumps(changed("train_runtime_seconds", float("nan"))), "'NaN, ", id="nan"),
        pytest.param(json.dumps(changed("config.rate", float("inf"))), "'Infinity}", id="infinity"),
        pytest.param(json.dumps(changed("latency_ms", -float("inf"))), "Infinity, ", id="minus-infinity"),
        pytest.param(
            json.dumps(changed("latency_ms", 0)).replace('"latency_ms": 0', '"latency_ms": 1e999'), "latency_ms", id="1e999"
        ),
        pytest.param(json.dumps(changed("latency_ms", 10**400)), "latency_ms", id="whole-number-beyond-floats"),
        pytest.param(json.dumps(changed("peak_memory_bytes", 10**400)), "record.peak_memory_bytes", id="bytes-beyond-floats"),
        pytest.param(json.dumps(changed("dev.n", 10**400)), "record.dev.n", id="count-beyond-floats"),
        pytest.param(json.dumps(changed("learning_curve", [[10**400, 0.5]])), "record.learning_curve[0][0]", id="step-beyond"),
        pytest.param(
            json.dumps(changed("train_runtime_seconds", 1e200)), "Expected `float` <= 1e+100", id="seconds-beyond-squares"
        ),
        pytest.param(
            json.dumps(changed("learning_curve", [[0, 0.5]])),
            "record.learning_curve[0][0] is 0: Expected `int` >= 1",
            id="step-zero",
        ),
        pytest.param(json.dumps(changed("data", {"sizes": [1]})), "record.data.sizes is [1]: Expected `object`", id="sizes-list"),
        pytest.param(
            json.dumps(changed("data", {"sizes": None})), "record.data.sizes: Expected `object`, got `null`", id="sizes-null"
        ),
        pytest.param(
            json.dumps(changed("data", {"sizes": {"dev": "x"}})),
            "record.data.sizes.dev is 'x': Expected `int`, got `str`",
            id="sizes-text",
        ),
        pytest.param(
            json.dumps(changed("latency_ms", -1.5)), "record.latency_ms is -1.5: Expected `float` >= 0", id="less-than-none"
        ),
        pytest.param(json.dumps(changed("parameter_counts", None)), "null for parameter_counts", id="passed-without-counts"),
        pytest.param(json.dumps(changed("dev", None)), "null for dev", id="passed-without-dev"),
        pytest.param(json.dumps(changed("name", "\ud800")), "surrogate", id="half-a-character"),
        pytest.param(json.dumps(changed("config.x", "\ud800")), "surrogate", id="half-a-character-below"),
        pytest.param(json.dumps(changed("config", {"\ud800": 1})), "surrogate", id="half-a-character-key"),
        pytest.param(json.dumps(changed("versions", {"\ud800": "1"})), "surrogate", id="half-a-version"),
        pytest.param(json.dumps(changed("config.x", "@")).replace('"@"', "1e999"), "config", id="1e999-in-config"),
        pytest.param(json.dumps(changed("schema_version", 7)), "schema_version must be 1 to 6, got 7", id="newer-schema"),
        pytest.param(json.dumps(changed("schema_version", "1")), "schema_version must be 1 to 6, got '1'", id="schema-text"),
        pytest.param(json.dumps(changed("schema_version", True)), "schema_version", id="schema-bool"),
        pytest.param(json.dumps(changed("outcome", "skipped")), "outcome", id="unknown-outcome"),
        pytest.param(json.dumps(changed("teacher_cost.cache", "maybe")), "teacher_cost.cache", id="unknown-choice"),
        pytest.param(json.dumps(changed("predictions.dev.n", 10**12)), "1000000000000 predictions", id="too-few-predictions"),
        pytest.param(
            json.dumps(changed("predictions.dev.gold", "é")), "record.predictions.dev.gold is 'é': Invalid base64", id="not-base64"
        ),
        pytest.param(json.dumps(changed("seed", "42")), "record.seed is '42': Expected `int`", id="seed-text"),
        pytest.param(json.dumps(changed("seed", 42.0)), "record.seed is 42.0: Expected `int`", id="seed-float"),
        pytest.param(json.dumps(changed("seed", True)), "record.seed is True: Expected `int`", id="seed-bool"),
        pytest.param(json.dumps(changed("dev.accuracy", 7.0)), "record.dev.accuracy is 7.0: Expected `float` <= 1.0", id="percent"),
        pytest.param(
            json.dumps(changed("dev.accuracy", True)), "record.dev.accuracy is True: Expected `float`", id="accuracy-bool"
        ),
        pytest.param(
            json.dumps(changed("dev.accuracy", None)), "record.dev.accuracy is None: Expected `float`", id="accuracy-null"
        ),
        pytest.param(json.dumps(changed("dev.accuracy_ci95", [0.1])), "record.dev.accuracy_ci95", id="interval-of-one"),
        pytest.param(json.dumps(changed("dev.accuracy_ci95", ["a", "b"])), "record.dev.accuracy_ci95[0]", id="interval-texts"),
        pytest.param(json.dumps(changed("dev", [])), "record.dev", id="dev-list"),
        pytest.param(json.dumps(changed("config", [])), "record.config", id="config-list"),
        pytest.param(
            json.dumps(changed("versions", {"torch": 2})), "record.versions.torch is 2: Expected `str`", id="version-number"
        ),
        pytest.param(json.dumps(changed("learning_curve", {})), "record.learning_curve", id="curve-mapping"),
        pytest.param(
            json.dumps(changed("predictions.dev", {"n": 3})),
            "record.predictions.dev: Object missing required",
            id="predictions-parts",
        ),
        pytest.param(json.dumps(changed("phase", None)), "record.phase is None: Expected `str`", id="phase-null"),
        pytest.param(json.dumps(without("dev")), "null for dev", id="without-dev"),
        pytest.param(json.dumps(without("outcome")), "outcome", id="without-outcome"),
        pytest.param(json.dumps(without("schema_version")), "no schema_version", id="without-schema"),
        pytest.param(json.dumps(without("fingerprint")), "missing required field `fingerprint`", id="without-fingerprint"),
        pytest.param(json.dumps(without("machine")), "missing required field `machine`", id="without-machine"),
        pytest.param(json.dumps(without("predictions")), "missing required field `predictions`", id="without-predictions"),
        pytest.param(json.dumps(changed("config.x", [2**64])), "record.config must have numbers within", id="config-beyond"),
        pytest.param(json.dumps(changed("machine", {"x": {"y": 1e200}})), "record.machine must have numbers", id="machine-beyond"),
        pytest.param(json.dumps(changed("dev_curve", [[0, 1.0, 0.5]])), "record.dev_curve[0][0] is 0: ", id="dev-step-zero"),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text, said):
    """The error names the file and, where it got that far, the key."""
    path = tmp_path / "D-hybrid-mini-s42.json"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(("path", "allowed"), [("outcome", ("passed", "failed")), ("teacher_cost.cache", ("hit", "miss"))])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(path, allowed):
    """The message lists the allowed names."""
    with pytest.raises(RecordError) as caught:
        Record.from_json(changed(path, "other"))
    assert [] == [name for name in allowed if name not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("key", ["config", "dev"])
@pytest.mark.parametrize("levels", [51, 200, 900])
def test_a_deep_record_is_refused_before_anything_falls_over_it(key, levels):
    """However it was read; a record has four levels, and fifty are let through."""
    deep = functools.reduce(lambda inner, _: {"a": inner}, range(levels), {})
    with pytest.raises(RecordError, match=rf"^record\.{key}"):
        Record.from_json(changed(key, deep))
    assert Record.from_json(changed("config.x", functools.reduce(lambda inner, _: [inner], range(40), []))).to_row()


def test_half_a_character_in_an_error_does_not_keep_a_record_from_being_read(store):
    """A path that is not UTF-8 has such in Python's messages."""
    path = store.save(dataclasses.replace(FAILED, error="no such file: \udcff ü"))
    assert "no such file: ? ü" == read_record(path).error


def test_a_file_that_is_not_utf_8_is_refused_by_name(tmp_path):
    """Bytes of another encoding are an explained error, too."""
    path = tmp_path / "x.json"
    path.write_bytes(b'{"outcome": "\xff"}')
    with pytest.raises(RecordError, match=re.escape(str(path))):
        read_record(path)


def test_a_missing_file_or_a_folder_is_refused_by_name(tmp_path):
    """Callers need one kind of error only."""
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(RecordError, match=re.escape(str(path))):
            read_record(path)


@pytest.mark.parametrize("key", ["precision", "dev_curve", "memory_use"])
def test_a_key_that_came_with_a_later_schema_is_null_in_older_records(key):
    """They are read as this version's."""
    content = {**without(key), "schema_version": 1}
    assert dataclasses.replace(PASSED, **{key: None}) == decode_record(json.dumps(content).encode()) == Record.from_json(content)


def test_a_key_of_a_later_minor_version_is_passed_over():
    """What this version does not know does not keep it from reading the rest."""
    assert PASSED == Record.from_json(changed("energy_joules", 3.0))


def test_a_whole_number_is_a_fraction_too():
    """An accuracy of 1 that another tool wrote is 1.0."""
    accuracy = Record.from_json(changed("dev.accuracy", 1)).dev.accuracy
    assert (1.0, float) == (accuracy, type(accuracy))


def test_efficiency_divides_accuracy_by_millions_and_minutes():
    """0.9 for 300,000 parameters and 90 seconds: 3 per million, 0.6 per minute."""
    efficiency = Efficiency.from_costs(accuracy=0.9, trainable=300_000, seconds=90)
    assert (pytest.approx(3.0), pytest.approx(0.6)) == (efficiency.accuracy_per_million_params, efficiency.accuracy_per_minute)


@pytest.mark.parametrize(
    ("trainable", "seconds", "expected"),
    [(0, 0.0, (None, None)), (0, 60.0, (None, None)), (1_000_000, 0.0, (0.5, None)), (1_000_000, 60.0, (0.5, 0.5))],
)
def test_efficiency_is_null_where_nothing_was_trained(trainable, seconds, expected):
    """Nothing is divided by zero and nothing is infinite."""
    efficiency = Efficiency.from_costs(accuracy=0.5, trainable=trainable, seconds=seconds)
    assert expected == (efficiency.accuracy_per_million_params, efficiency.accuracy_per_minute)


def test_labels_are_packed_the_first_one_in_the_highest_bit():
    """1,0,1 and five fillers are byte 0xa0; the ninth label begins the second byte."""
    packed = Predictions.from_labels([1, 0, 1, 0, 0, 0, 0, 0, 1], [0] * 9, "split")
    assert (b"\xa0\x80", b"\x00\x00") == (packed.predicted, packed.gold)
    assert (9, "split") == (packed.n, packed.split_fingerprint)


@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=70))
@hypothesis_settings(deadline=None, max_examples=60)
def test_predictions_survive_packing(pairs):
    """What comes back is right and wrong for each example, in order; numpy packs the same bits."""
    predicted, gold = [p for p, _ in pairs], [g for _, g in pairs]
    packed = Predictions.from_labels(predicted, gold, "split")
    of_label, of_prediction = packed.masks()
    wrong = f"{of_prediction ^ of_label:0{len(pairs)}b}"[: len(pairs)]
    assert [p == g for p, g in pairs] == [bit == "0" for bit in wrong]
    assert numpy.packbits(numpy.array(predicted, dtype=bool)).tobytes() == packed.predicted
    assert numpy.packbits(numpy.array(gold, dtype=bool)).tobytes() == packed.gold


def test_predictions_without_a_label_each_are_refused():
    """A list that is too short is not filled up in silence."""
    with pytest.raises(ValueError):
        Predictions.from_labels([1, 0, 1], [1, 0, 1, 0, 0], "split")


@pytest.mark.parametrize("label", [-1, 2, 10])
def test_labels_that_are_no_bits_are_refused(label):
    """A label of -1 marks an answer that was not published and can be no prediction."""
    with pytest.raises(ValueError):
        Predictions.from_labels([1, label, 0], [1, 0, 0], "split")


def test_a_phases_configuration_holds_every_hyperparameter():
    """As JSON values, nested ones included; the id and the changes that were already made are left out."""
    phase = Phase(id="D-hybrid", role="backbone", peft=LORA, unfreeze_top_layers=2, distillation=Distillation(alpha=0.5))
    config = phase_config(phase)
    assert {field.name for field in dataclasses.fields(Phase)} - {"id", "at_scale"} == set(config)
    assert {"alpha": 0.5, "temperature": 2.0} == config["distillation"]
    assert config == json.loads(json.dumps(config))


@pytest.mark.parametrize(
    ("version", "unknown"),
    [
        (1, ("skipped_steps", "memory_use", "teacher_checkpoint", "metrics_version", "dev_curve", "precision")),
        (2, ("metrics_version", "dev_curve", "memory_before_bytes")),
        (3, ("precision", "memory_before_bytes")),
        (4, ("processor_wait_fraction",)),
        (5, ("replayed_steps",)),
        (6, ()),
    ],
)
def test_records_of_each_schema_are_read(version, unknown):
    """A file as each version wrote it: its figures are there, and what it did not know is null."""
    path = Path(__file__).parent / f"data/record_schema_{version}.json"
    written, record = json.loads(path.read_text("utf-8")), read_record(path)
    assert (version, SCHEMA_VERSION) == (written["schema_version"], record.schema_version)
    assert dict.fromkeys(unknown) == {name: getattr(record, name) for name in unknown}
    again = record.to_json()
    assert written == {**{key: again[key] for key in written}, "schema_version": version}

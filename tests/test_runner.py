"""One phase, run for real at a shrunken tiny scale, from settings to record."""

import dataclasses
import itertools
import json
import multiprocessing
import pickle
import random
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

from peftbench import heap, runner, workbench
from peftbench.data import DataError, draw, read_glue_folder
from peftbench.distill import read_subset
from peftbench.models import ModelError, artifact_bytes, load_classifier, load_tokenizer, locate, prepare, save_classifier
from peftbench.packing import shuffled_rows
from peftbench.phases import LORA, SCALES, Distillation, Phase, Pretrained, Untrained
from peftbench.records import Record, RecordError
from peftbench.runner import case_fingerprint, failed_record, plan_phases, run_phase
from peftbench.store import OutputsError
from peftbench.workbench import Settings, Workbench

SMALL = {"layers": 1, "hidden_size": 32, "attention_heads": 2}
TINY = dataclasses.replace(
    SCALES["tiny"],
    backbone=Untrained(architecture="bert", **SMALL),
    student=Untrained(architecture="distilbert", **SMALL),
    teacher=Phase(id="T-tune", role="backbone", epochs=5, learning_rate=3e-3, warmup_fraction=0.1),
)
TEACHER = Phase(id="A-teacher", role="teacher", kd_subsets=(60, 30))
FULL = Phase(id="C1-full", role="student", epochs=5, learning_rate=3e-3, warmup_fraction=0.1)
KD = Phase(id="C2-kd", role="student", subset=60, distillation=Distillation(), epochs=2, learning_rate=3e-3)
HYBRID = Phase(
    id="D-hybrid",
    role="backbone",
    subset=30,
    peft={**LORA, "r": 2},
    unfreeze_top_layers=1,
    distillation=Distillation(),
    epochs=2,
    learning_rate=5e-3,
)
GOOD = ("wonderful", "brilliant", "moving", "funny", "delightful", "superb")
BAD = ("dull", "awful", "boring", "clumsy", "dreadful", "stale")


def write_data(folder, *, flipped=False):
    """One clause without negation: 288 distinct sentences, every sixth to dev, every sixth to test."""
    folder.mkdir(parents=True)
    subjects = ["plot", "acting", "music", "dialogue", "ending", "camera", "story", "cast"]
    rows = [
        (f"the {subject} is {strength}{adjective}", int(adjective in GOOD))
        for adjective, strength, subject in itertools.product([*GOOD, *BAD], ["", "very ", "truly "], subjects)
    ]
    parts = {"dev": rows[::6], "test": rows[1::6], "train": [row for i, row in enumerate(rows) if i % 6 > 1]}
    for name, part in parts.items():
        labels = [1 - label if flipped and name == "train" else label for _, label in part]
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for (text, _), label in zip(part, labels, strict=True))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def settings_in(folder, data, **changes):
    outputs = folder / "outputs"
    return Settings(**{"outputs": outputs, "run_id": "run", "data": data, "precision": "fp32", **changes})


def outcome(record):
    """What the seed decides, without the times and the memory of the machine."""
    return record.dev, record.test, record.learning_curve, record.predictions, record.fingerprint


def resident_bytes():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "clauses")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, data):
    """Each phase run once, in order, as one session does."""
    settings = settings_in(tmp_path_factory.mktemp("fresh"), data)
    bench = Workbench(TINY, settings)
    return settings, {phase.id: run_phase(phase, TINY, 42, settings, workbench=bench) for phase in (TEACHER, FULL, KD, HYBRID)}


def test_record_survives_json(fresh):
    """What is written can be read back to an equal record, for every kind of phase."""
    for record in fresh[1].values():
        assert record == Record.from_json(json.loads(json.dumps(record.to_json())))


def test_record_says_what_ran_and_on_what(fresh):
    """Identity, sizes of the data and the shape of the training."""
    record = fresh[1]["C1-full"]
    assert ("C1", "full", "tiny", 42, "passed", None) == (
        record.phase, record.name, record.scale, record.seed, record.outcome, record.error,
    )  # fmt: skip
    assert {"train": 192, "dev": 48, "test": 48} == record.data["sizes"]
    assert (48, 48, 0.5) == (record.dev.n, record.test.n, record.majority_accuracy)
    assert (60, 60) == (record.optimizer_steps, record.learning_curve[-1][0])
    assert "random distilbert, 1 layers of 32" == record.checkpoint
    assert ("packed", None, None) == (record.batching, record.kd_path, record.teacher_cost)


def test_metrics_are_those_of_the_stored_predictions(fresh):
    """Accuracy is the share of the bits that agree."""
    for record, name in itertools.product(fresh[1].values(), ("dev", "test")):
        n, gold, predicted = record.labels([name])
        assert 1 - (gold ^ predicted).bit_count() / n == pytest.approx(getattr(record, name).accuracy, rel=1e-12)


def test_costs_are_positive_and_consistent(fresh):
    """Rates are counts over the same training time; nothing trained has no efficiency."""
    record = fresh[1]["C1-full"]
    assert 5 * 192 == pytest.approx(record.samples_per_second * record.train_runtime_seconds)
    per_minute = record.dev.accuracy / (record.train_runtime_seconds / 60)
    assert per_minute == pytest.approx(record.efficiency.accuracy_per_minute)
    per_million = record.dev.accuracy / (record.parameter_counts.trainable / 1e6)
    assert per_million == pytest.approx(record.efficiency.accuracy_per_million_params)
    assert 0 < record.latency_ms
    assert 10**7 < record.peak_memory_bytes
    teacher = fresh[1]["A-teacher"]
    assert (0.0, 0, None, None) == (
        teacher.train_runtime_seconds, teacher.parameter_counts.trainable, teacher.samples_per_second,
        teacher.efficiency.accuracy_per_minute,
    )  # fmt: skip


def test_simple_sentences_are_learnt(fresh):
    """The teacher and full fine-tuning beat the majority on dev and test."""
    for phase in ("A-teacher", "C1-full"):
        record = fresh[1][phase]
        assert min(record.dev.accuracy, record.test.accuracy) > 0.8 > record.majority_accuracy


def test_teacher_phase_writes_the_subsets_that_the_others_learn_from(fresh, data):
    """30 is the beginning of 60, both the first of the fixed draw, and the records name their folders."""
    settings, records = fresh
    larger, smaller = (read_subset(settings.outputs / "tiny" / "kd" / f"kd_{size}") for size in (60, 30))
    assert draw(read_glue_folder(data).train, 60) == larger.examples
    assert larger.examples.ids[:30] == smaller.examples.ids
    paths = [records[phase].kd_path for phase in ("C2-kd", "D-hybrid")]
    assert ["outputs/tiny/kd/kd_60", "outputs/tiny/kd/kd_30"] == paths


def test_hybrid_trains_adapter_head_and_top_layer(fresh):
    """Rank 2 on query, key and value of 32, the head, and the one encoder layer."""
    layer = 4 * (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 2 * (32 + 32)
    assert 3 * 2 * (32 + 32) + (32 * 2 + 2) + layer == fresh[1]["D-hybrid"].parameter_counts.trainable


@pytest.fixture(scope="module")
def distilled_from_nothing(tmp_path_factory, data):
    """C2 alone in an empty folder, where the teacher has to be tuned first."""
    settings = settings_in(tmp_path_factory.mktemp("again"), data)
    return settings, run_phase(KD, TINY, 42, settings)


def test_same_seed_gives_the_same_subset_bytes_in_another_folder(fresh, distilled_from_nothing):
    """Teacher, logits and data set are made again from nothing and equal file by file."""
    first, second = (files_of(settings.outputs / "tiny" / "kd" / "kd_60") for settings in (fresh[0], distilled_from_nothing[0]))
    assert first == second


@pytest.mark.parametrize("phase", [FULL, HYBRID], ids=lambda phase: phase.id)
def test_same_seed_gives_the_same_metrics_to_the_last_digit(fresh, phase):
    """A case repeated in a session of its own, on the same caches."""
    settings, records = fresh
    assert outcome(records[phase.id]) == outcome(run_phase(phase, TINY, 42, settings))


def test_same_seed_gives_the_same_metrics_whether_or_not_the_teacher_was_cached(fresh, distilled_from_nothing):
    """Tuning a teacher on the way draws random numbers of its own, not those of the case."""
    assert outcome(fresh[1]["C2-kd"]) == outcome(distilled_from_nothing[1])


def test_another_seed_gives_another_run_of_the_same_case(fresh):
    """The fingerprint stays, the course of training does not."""
    settings, records = fresh
    other = run_phase(FULL, TINY, 43, settings)
    assert records["C1-full"].fingerprint == other.fingerprint
    assert records["C1-full"].learning_curve != other.learning_curve


def test_first_run_reports_a_miss_and_what_the_teacher_cost(fresh, distilled_from_nothing):
    """The case that had the teacher tuned says so."""
    for cost in (fresh[1]["A-teacher"].teacher_cost, distilled_from_nothing[1].teacher_cost):
        assert "miss" == cost.cache
        assert min(cost.training_seconds, cost.logit_seconds) > 0


@pytest.mark.parametrize("phase", [TEACHER, KD, HYBRID], ids=lambda phase: phase.id)
def test_second_run_reports_a_cache_hit_and_the_first_cost(fresh, phase):
    """All of it was on disk; the seconds are those of the first time."""
    settings, records = fresh
    cost = run_phase(phase, TINY, 42, settings).teacher_cost
    assert "hit" == cost.cache
    assert records["A-teacher"].teacher_cost.training_seconds == cost.training_seconds
    assert records[phase.id].teacher_cost.logit_seconds == cost.logit_seconds


def test_later_case_of_a_session_reports_a_cache_hit(fresh):
    """C2 finds what A left on disk, also where both share a workbench."""
    assert "hit" == fresh[1]["C2-kd"].teacher_cost.cache


def test_workbench_changes_nothing_but_the_time(fresh):
    """A case on its own gives the figures that it gives among others."""
    settings, records = fresh
    assert outcome(records["C2-kd"]) == outcome(run_phase(KD, TINY, 42, settings))


def test_flipped_training_labels_are_noticed(tmp_path):
    """A model that learnt the opposite scores under a half: dev labels are not touched by training."""
    folder = write_data(tmp_path / "flipped", flipped=True)
    assert run_phase(FULL, TINY, 42, settings_in(tmp_path, folder)).dev.accuracy < 0.5


def test_case_runs_in_any_process(fresh):
    """Arguments and record pass through a spawned child, which gives the same figures."""
    settings, records = fresh
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        record = pool.submit(run_phase, FULL, TINY, 42, settings).result(timeout=300)
    assert outcome(records["C1-full"]) == outcome(record)
    assert record == pickle.loads(pickle.dumps(record))


def test_a_case_leaves_the_number_of_threads_as_it_was(fresh):
    """The tiny scale's one thread is not that of the tests that come after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        record = run_phase(dataclasses.replace(FULL, epochs=1), TINY, 42, fresh[0])
        assert (2, 1) == (torch.get_num_threads(), record.machine["threads"])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(heap._glibc() is None, reason="needs glibc")
def test_what_the_cases_before_have_freed_is_not_counted_as_a_cases(fresh):
    """The heap keeps it from step to step, and hands it back when a case begins."""
    assert heap.retain.cache_info().currsize == 1
    heap.release()
    before = resident_bytes()
    tensors = [torch.ones(2**18) for _ in range(300)]  # 1 MiB each
    del tensors
    assert resident_bytes() >= before + 200 * 2**20
    record = run_phase(dataclasses.replace(FULL, epochs=1), TINY, 42, fresh[0])
    assert record.memory_before_bytes <= before + 50 * 2**20


def test_phase_is_changed_for_its_scale(fresh):
    """The record has the hyperparameters that ran, not those of another scale."""
    phase = dataclasses.replace(FULL, at_scale={"tiny": {"epochs": 1}, "mini": {"epochs": 9}})
    record = run_phase(phase, TINY, 42, fresh[0])
    assert (12, 1) == (record.optimizer_steps, record.config["epochs"])


def test_case_runs_in_bf16(fresh):
    """Mixed precision gives a whole record of a case of its own."""
    record = run_phase(dataclasses.replace(FULL, epochs=1), TINY, 42, dataclasses.replace(fresh[0], precision="bf16"))
    assert ("passed", 12, "packed") == (record.outcome, record.optimizer_steps, record.batching)
    assert fresh[1]["C1-full"].artifact_bytes == record.artifact_bytes


def test_method_that_cannot_be_packed_runs_padded(fresh):
    """Prompt tuning is a phase like any other; the record says how its batches were made."""
    peft = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    record = run_phase(Phase(id="E-prompt", role="backbone", peft=peft, epochs=1, learning_rate=1e-2), TINY, 42, fresh[0])
    assert ("padded to the longest", 4 * 32 + 2 * 32 + 2) == (record.batching, record.parameter_counts.trainable)


def test_test_may_be_the_same_as_dev(fresh, data, tmp_path):
    """A user who has no other copies it; both are scored."""
    folder = shutil.copytree(data, tmp_path / "data")
    shutil.copy(folder / "dev.tsv", folder / "test.tsv")
    settings = dataclasses.replace(fresh[0], data=folder, outputs=tmp_path / "outputs")
    record = run_phase(dataclasses.replace(FULL, epochs=1), TINY, 42, settings)
    assert record.dev == record.test
    assert ["dev", "test"] == sorted(record.predictions)


def test_subset_larger_than_train_is_refused(fresh):
    """The message says what was asked for and what there is."""
    phase = dataclasses.replace(FULL, subset=193)
    with pytest.raises(DataError, match=r"193 examples cannot be drawn from a train split of 192; allowed: 1…192"):
        run_phase(phase, TINY, 42, fresh[0])
    with pytest.raises(DataError, match="1000 examples cannot be drawn"):
        run_phase(dataclasses.replace(TEACHER, kd_subsets=(1000,)), TINY, 42, fresh[0])


@pytest.mark.parametrize("changes", [{}, {"subset": 8}, {"peft": LORA}, {"distillation": Distillation()}])
def test_a_phase_that_would_train_nothing_is_refused(fresh, changes):
    """Epochs that were forgotten are not a passed case at the level of chance."""
    with pytest.raises(ModelError, match=r"X-forgot: with 0 epochs .* set epochs"):
        run_phase(Phase(id="X-forgot", role="student", **changes), TINY, 42, fresh[0])


def test_failed_case_leaves_a_record(fresh):
    """The error, the hyperparameters that ran, where and, once that is known, on what; nothing that was not measured."""
    phase, bench = dataclasses.replace(FULL, at_scale={"tiny": {"epochs": 7}}), Workbench(TINY, fresh[0])
    assert {} == failed_record(phase, 5, bench, ValueError("no data")).data
    passed, splits = fresh[1][FULL.id], bench.splits
    record = failed_record(phase, 5, bench, ValueError("it broke " + "x" * 5000))
    assert (splits.fingerprint, passed.machine) == (record.data["fingerprint"], record.machine)
    assert ("failed", "C1-full-tiny-s5", None, None, 7) == (
        record.outcome, record.case, record.dev, record.fingerprint, record.config["epochs"],
    )  # fmt: skip
    assert record.error.startswith("ValueError: it broke xxx")
    assert 2000 == len(record.error)
    assert record == Record.from_json(json.loads(json.dumps(record.to_json())))


def fingerprint_of(phase, settings, scale=TINY):
    return case_fingerprint(phase, Workbench(scale, settings))


def test_fingerprint_is_the_same_for_the_same_case(fresh):
    """Run id, outputs, project and changes for other scales are no part of it; the record carries it."""
    settings, records = fresh
    elsewhere = dataclasses.replace(settings, run_id="other", outputs=Path("nowhere"), commit={"id": "other"})
    for phase in (TEACHER, FULL, KD, HYBRID):
        with_others = dataclasses.replace(phase, at_scale={"thesis": {"max_length": 7}})
        assert records[phase.id].fingerprint == fingerprint_of(phase, settings) == fingerprint_of(with_others, elsewhere)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "C1-other"},
        {"role": "backbone"},
        {"epochs": 3},
        {"learning_rate": 2e-2},
        {"subset": 50},
        {"peft": {**LORA, "target_modules": ["q_lin"]}},
        {"distillation": Distillation()},
        {"batch_size": 8},
        {"max_length": 95},
        {"warmup_fraction": 0.2},
        {"clip_norm": 2.0},
        {"weight_decay": 0.1},
        {"dropout": 0.0},
        {"layer_decay": 0.9},
        {"at_scale": {"tiny": {"epochs": 4}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fingerprint_changes_with_the_phase(fresh, changes):
    """Every hyperparameter is part of it."""
    assert fresh[1]["C1-full"].fingerprint != fingerprint_of(dataclasses.replace(FULL, **changes), fresh[0])


TWO_LAYERS = {"layers": 2, "hidden_size": 32, "attention_heads": 2}


@pytest.mark.parametrize("phase", [TEACHER, FULL, KD, HYBRID], ids=lambda phase: phase.id)
@pytest.mark.parametrize(
    ("changes", "matters_to"),
    [
        ({"name": "other"}, {"A", "C1", "C2", "D"}),
        ({"student": Untrained(architecture="distilbert", **TWO_LAYERS)}, {"C1", "C2"}),
        ({"backbone": Untrained(architecture="bert", **TWO_LAYERS)}, {"A", "C2", "D"}),
        ({"teacher": dataclasses.replace(TINY.teacher, epochs=6)}, {"A", "C2", "D"}),
    ],
    ids=["name", "student", "backbone", "teacher"],
)
def test_fingerprint_changes_with_the_roles_that_the_phase_uses(fresh, phase, changes, matters_to):
    """Weights and teacher count for those phases that depend on them, and for no other."""
    changed = fresh[1][phase.id].fingerprint != fingerprint_of(phase, fresh[0], dataclasses.replace(TINY, **changes))
    assert (phase.letter in matters_to) == changed


def test_fingerprint_changes_with_the_data(fresh, tmp_path):
    """The same sentences with other labels are other data."""
    settings = dataclasses.replace(fresh[0], data=write_data(tmp_path / "clauses", flipped=True))
    assert fresh[1]["C1-full"].fingerprint != fingerprint_of(FULL, settings)


def test_fingerprint_changes_with_the_precision(fresh):
    """Figures in bf16 are not figures in fp32."""
    assert fresh[1]["C1-full"].fingerprint != fingerprint_of(FULL, dataclasses.replace(fresh[0], precision="bf16"))


def test_fingerprint_changes_with_the_metric_code(fresh, monkeypatch):
    """Raising the version makes old figures incomparable."""
    monkeypatch.setattr(runner, "METRICS_VERSION", runner.METRICS_VERSION + 1)
    assert fresh[1]["C1-full"].fingerprint != fingerprint_of(FULL, fresh[0])


def test_progress_is_told_of_teacher_and_phase(tmp_path, data):
    """Each step of both trainings, under its own name."""
    told = []
    settings = settings_in(tmp_path, data)
    short = dataclasses.replace(TINY, teacher=dataclasses.replace(TINY.teacher, epochs=1))
    phase = dataclasses.replace(KD, epochs=1)
    run_phase(phase, short, 42, settings, workbench=Workbench(short, settings, lambda *step: told.append(step)))
    assert [("tuning the teacher", i, 12) for i in range(1, 13)] + [("C2-kd", i, 4) for i in range(1, 5)] == told


def test_texts_that_the_tokenizer_does_not_know_are_told_of(tmp_path, data, fresh):
    """Once for each split: the tiny one knows the words of its own sentences."""
    for name in ("train", "dev"):
        rows = [
            f"every word of sentence {i} is{' not' * (i % 2)} foreign\t{i % 2}\n" for i in range(1040 if name == "train" else 40)
        ]
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    told = []
    for folder, expected in ((data, 0), (tmp_path, 1)):
        bench = Workbench(TINY, settings_in(tmp_path, folder), notify=told.append)
        for _ in range(2):
            bench.encoded(bench.splits.dev, bench.weights(TINY.student), 96)
        assert expected == len(told)
    assert re.fullmatch(r"\d\d% of the tokens of dev are unknown to the tokenizer of the small random model, .*", told[0])


@pytest.mark.parametrize("knows", [False, True])
def test_a_teacher_with_nothing_to_teach_is_told_of(fresh, tmp_path, data, monkeypatch, knows):
    """What students reach then, they have from the labels."""
    told = []
    bench = Workbench(TINY, settings_in(tmp_path, data), notify=told.append)

    def answers(model, encoded, *_, **__):
        return torch.nn.functional.one_hot(encoded.labels if knows else torch.zeros_like(encoded.labels), 2).float()

    monkeypatch.setattr(workbench, "predict", answers)
    bench.teacher_logits(64, 96)
    if knows:
        assert [] == told
    else:
        [line] = told
        assert re.match(r"the teacher is right on \d\d\.\d% of the 64 examples that it is to teach, and always answering", line)


def test_a_teacher_that_cannot_be_stored_is_not_tuned(data, tmp_path, monkeypatch):
    """Space is looked at before, not after hours."""
    settings, told = settings_in(tmp_path, data), []
    bench = Workbench(TINY, settings, lambda *step: told.append(step))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 9, 9))
    with pytest.raises(OutputsError, match=r"has 0 MiB of free space, and the tuned teacher takes \d+; free some or give"):
        bench.teacher  # noqa: B018 - is tuned here, or is not
    assert [] == told


def test_how_the_teacher_was_tuned_is_in_the_records_that_rest_on_it(data, tmp_path):
    """So that a comparison says what was changed."""
    settings = settings_in(tmp_path, data)
    bench = Workbench(TINY, settings)
    records = [
        run_phase(phase, TINY, 42, settings, workbench=bench) for phase in (TEACHER, dataclasses.replace(KD, epochs=1), FULL)
    ]
    assert [5, 5, None] == [record.config.get("teacher", {}).get("epochs") for record in records]


@pytest.mark.parametrize("subset", [None, 4])
def test_evaluating_while_training_changes_nothing_but_tells(data, tmp_path, subset):
    """The same predictions and losses, also of words that were not trained on; the last point is the trained model's."""
    phase = dataclasses.replace(FULL, subset=subset, epochs=FULL.epochs if subset is None else 8)
    records = [run_phase(phase, TINY, 42, settings_in(tmp_path / str(n), data, evaluations=n)) for n in (0, 4)]
    assert outcome(records[0]) == outcome(records[1])
    assert () == records[0].dev_curve
    steps, seconds, reached = zip(*records[1].dev_curve, strict=True)
    total = records[1].optimizer_steps
    assert tuple(round(total * share) for share in (0.25, 0.5, 0.75, 1.0)) == steps
    assert list(seconds) == sorted(seconds)
    assert seconds[-1] == pytest.approx(records[1].train_runtime_seconds, rel=0.05, abs=0.01)
    assert records[1].dev.accuracy == pytest.approx(reached[-1])
    assert (steps[-1], seconds[-1]) == records[1].reaching(reached[-1]) or max(reached[:-1]) >= reached[-1]
    assert records[1].reaching(1.1) is None


def padded(model, tokenizer, sentences, max_length):
    """Logits of a transformers model as it comes, all sentences padded to the longest."""
    return model(**tokenizer(list(sentences), truncation=True, max_length=max_length, padding=True, return_tensors="pt")).logits


def written_out(phase, seed, bench):
    """Trained parameters of the phase by torch, transformers and peft alone, from what lies on disk; no dropout."""
    train = bench.splits.train
    examples = train if phase.subset is None else draw(train, phase.subset)
    soft = None
    if phase.distillation:
        [folder] = (bench.store.root / "cache/teachers").glob("[!.]*")
        teacher = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            soft = padded(teacher, AutoTokenizer.from_pretrained(folder), examples.sentences, phase.max_length)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    weights = bench.weights(bench.scale.source_of(phase.role))
    tokenizer = load_tokenizer(weights)
    model, groups = prepare(load_classifier(weights), phase)
    optimizer = torch.optim.AdamW(groups, weight_decay=phase.weight_decay, foreach=False, fused=False)
    total = phase.epochs * -(-len(examples) // phase.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, int(phase.warmup_fraction * total), total)
    order, labels = torch.Generator().manual_seed(seed), torch.tensor(examples.labels)
    model.train()
    for _ in range(phase.epochs):
        for rows in shuffled_rows(len(examples), phase.batch_size, order):
            logits = padded(model, tokenizer, [examples.sentences[row] for row in rows], phase.max_length)
            loss = F.cross_entropy(logits, labels[list(rows)])
            if phase.distillation:
                alpha, t = phase.distillation.alpha, phase.distillation.temperature
                target = (soft[list(rows)] / t).softmax(-1)
                softened = (target * (target.log() - (logits / t).log_softmax(-1))).sum(-1).mean()
                loss = alpha * t**2 * softened + (1 - alpha) * loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), phase.clip_norm)
            optimizer.step()
            schedule.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "student"},
        {"role": "student", "weight_decay": 0.1, "clip_norm": 0.3, "warmup_fraction": 0.4, "batch_size": 8},
        {"role": "student", "max_length": 5, "distillation": Distillation(alpha=0.6, temperature=3.0)},
        {"role": "backbone", "distillation": Distillation(), "clip_norm": 0.3, "layer_decay": 0.5},
        {
            "role": "backbone",
            "distillation": Distillation(),
            "peft": {**LORA, "r": 2, "lora_dropout": 0.0},
            "unfreeze_top_layers": 1,
            "unfrozen_learning_rate": 1e-3,
            "weight_decay": 0.1,
            "warmup_fraction": 0.25,
        },
    ],
    ids=["plain", "every number", "distilled short", "distilled backbone", "hybrid"],
)
def test_a_phase_is_the_loop_that_its_numbers_say(fresh, monkeypatch, changes):
    """All that trains after two epochs is what a padded loop with the saved teacher's logits makes of it."""
    phase = Phase(id="X-test", subset=60, epochs=2, learning_rate=3e-3, dropout=0.0, **changes)
    settings, trained = fresh[0], {}

    def keep(model):
        trained.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return artifact_bytes(model)

    monkeypatch.setattr(runner, "artifact_bytes", keep)
    run_phase(phase, TINY, 7, settings)
    expected = written_out(phase, 7, Workbench(TINY, settings))
    assert expected.keys() == trained.keys()
    for name, parameter in expected.items():
        if re.search(r"(key|k_lin)\.(base_layer\.)?bias$", name):
            # Softmax does not see it: its gradient is rounding, which AdamW makes full steps of, from zero, where it trains.
            assert trained[name].any() == parameter.any(), name
            continue
        torch.testing.assert_close(trained[name], parameter, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_teacher_that_says_nothing_finite_leaves_nothing_in_the_cache(tmp_path, data, monkeypatch):
    """As one that overflows in fp16 does: one clear message, and the next run asks a sound teacher anew."""
    settings = settings_in(tmp_path, data)
    with monkeypatch.context() as patched:
        patched.setattr(workbench, "predict", lambda *_, **__: torch.full((192, 2), torch.inf))
        with pytest.raises(ModelError, match=r"the teacher's logits of 192 of 192 texts are not finite in fp32; use another"):
            run_phase(KD, TINY, 42, settings)
    assert "passed" == run_phase(KD, TINY, 42, settings).outcome


@pytest.mark.parametrize("phase", [TEACHER, KD, HYBRID], ids=lambda phase: phase.id)
def test_texts_longer_than_the_teachers_positions_are_refused_before_it_reads_them(tmp_path, data, phase):
    """On a GPU the first that is too long would take every later case with it."""
    with pytest.raises(ModelError, match=r"max_length must be at most 128, the model's positions, got 200"):
        run_phase(dataclasses.replace(phase, max_length=200), TINY, 42, settings_in(tmp_path, data))


def test_a_case_whose_record_nobody_could_read_is_refused_before_it_trains(fresh, monkeypatch):
    """What is measured could not be kept."""
    monkeypatch.setattr(Workbench, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecordError, match=r"record.config must have numbers within 2\^63 and 1e100"):
        run_phase(dataclasses.replace(FULL, clip_norm=1e101), TINY, 42, fresh[0])


def test_a_phase_that_writes_what_the_teacher_says_has_its_cost(fresh):
    """Though it does not learn from it."""
    record = run_phase(dataclasses.replace(FULL, epochs=1, kd_subsets=(60,)), TINY, 42, fresh[0])
    assert fresh[1]["A-teacher"].teacher_cost.training_seconds == record.teacher_cost.training_seconds > 0
    assert fresh[1]["A-teacher"].config["teacher"] == record.config["teacher"]
    assert fresh[1]["C1-full"].teacher_cost is None


def test_an_adapter_of_the_teacher_that_nothing_trains_is_refused(fresh):
    """It would be reported as what one ships."""
    with pytest.raises(ModelError, match="A-x: with 0 epochs"):
        run_phase(Phase(id="A-x", role="teacher", peft=LORA), TINY, 42, fresh[0])


def test_a_plan_is_of_any_study_that_runs(fresh, tmp_path):
    """The teacher reads texts as long as the phase's, and here it could read none of a phase's usual length."""
    tokenizer = load_tokenizer(locate(TINY.backbone, fetch=None))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=2, **sizes)
    save_classifier(BertForSequenceClassification(config), tokenizer, tmp_path)
    scale = dataclasses.replace(TINY, teacher=Pretrained(source=str(tmp_path)))
    short = dataclasses.replace(KD, max_length=32)
    assert ["C2-kd"] == [plan.phase for plan in plan_phases([short], Workbench(scale, fresh[0]))]
    with pytest.raises(ModelError, match="max_length must be at most 64"):
        plan_phases([KD], Workbench(scale, fresh[0]))


def test_a_plan_has_the_teachers_logits_where_they_are_asked_for_first(fresh):
    """In A; alone, in the phase that learns from them; and of what is in the cache by then, nothing."""
    bench = Workbench(TINY, fresh[0])

    def other(*phases):
        return [plan.other_flops for plan in plan_phases(phases, bench)[1:]]

    [silent], [asks] = other(dataclasses.replace(TEACHER, kd_subsets=())), other(TEACHER)
    [alone] = other(KD)
    [_, after] = other(TEACHER, KD)
    [_, more] = other(TEACHER, dataclasses.replace(KD, subset=90))
    assert asks - silent == pytest.approx(alone - after, rel=0.1)
    assert asks == pytest.approx(silent * (96 + 192) / 96, rel=0.1)  # it answers whole blocks: all of train here
    assert more == pytest.approx(after, rel=0.1)

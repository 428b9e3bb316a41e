"""Gates: how they are written, what breaks them, and the exit status."""

import dataclasses

import pytest
from samples import failed, passed, predictions

from peftbench.compare import compare
from peftbench.gates import Gate, judge

LOST = range(45)


def status(base, head, *limits, strict=False):
    return judge(compare(base, head), [Gate.from_text(limit) for limit in limits], strict=strict).status


@pytest.mark.parametrize(
    ("text", "limit", "relative"),
    [
        ("accuracy:0.5pt", 0.005, False),
        ("f1:0pt", 0.0, False),
        ("accuracy:1%", 0.01, True),
        ("train_runtime_seconds:20%", 0.2, True),
        ("latency_ms:1.5", 1.5, False),
        ("peak_memory_bytes:1e6", 1e6, False),
        ("peak_memory_bytes:100MiB", 100 * 2**20, False),
        ("latency_ms:2ms", 2.0, False),
        ("latency_ms:0.01s", 10.0, False),
        ("train_runtime_seconds:1.5min", 90.0, False),
        ("samples_per_second:10", 10.0, False),
    ],
)
def test_a_gate_is_written_as_pytest_benchmark_does(text, limit, relative):
    """A share of the base, points, or the metric's own unit."""
    gate = Gate.from_text(text)
    assert (pytest.approx(limit), relative, text) == (gate.limit, gate.relative, f"{gate.metric.name}:{gate.written}")


@pytest.mark.parametrize(
    "text",
    [
        *("accuracy", "accuracy:", "accuracy:-1pt", "accuracy:nan", "accuracy:5 %", "accuracy:5", "accuracy:101pt"),
        *("accuracy:0.5", "accuracy:0", "accuracy:\u0663pt"),  # half a point or fifty? and a digit, but not ours
        *("speed:3%", "latency_ms:1pt", "latency_ms:1e999"),
    ],
)
def test_a_wrong_gate_says_what_is_allowed(text):
    """The metric's name or its limit."""
    with pytest.raises(
        ValueError, match=r"--fail (must name one of accuracy, f1|\w+: the limit must be written as .*5% \(of the base\))"
    ):
        Gate.from_text(text)


@pytest.mark.parametrize(("limit", "expected"), [("accuracy:2pt", 1), ("accuracy:2.4pt", 1), ("accuracy:2.6pt", 0), ("f1:50%", 0)])
def test_a_loss_beyond_the_limit_is_worse(limit, expected):
    """2.5 points lost."""
    assert expected == status([passed()], [passed(wrong=LOST)], limit)


def test_noise_breaks_no_gate_unless_strict():
    """Five of ten discordant examples more lost than won: 0.3 points that may be chance."""
    base, head = [passed(wrong=range(5))], [passed(wrong=range(5, 15))]
    assert 0 == status(base, head, "accuracy:0.1pt")
    assert 1 == status(base, head, "accuracy:0.1pt", strict=True)


def test_a_gain_breaks_no_gate():
    """Whatever the direction of the metric."""
    limits = ("accuracy:0pt", "train_runtime_seconds:0", "samples_per_second:0")
    assert 0 == status([passed(wrong=LOST)], [passed(seconds=30.0)], *limits)


def test_slower_breaks_a_gate():
    """By the share of the base."""
    assert 1 == status([passed()], [passed(seconds=90.0)], "train_runtime_seconds:20%")
    assert 0 == status([passed()], [passed(seconds=90.0)], "train_runtime_seconds:60%")


def test_a_phase_that_newly_fails_is_worse():
    """Whatever is gated."""
    assert 1 == status([passed()], [failed()], "latency_ms:50%")


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([passed()], [], 2),  # nothing to compare with
        ([passed()], [passed("C1-full")], 2),  # a phase went missing
        ([passed()], [passed(), passed("C1-full")], 0),  # a phase is new
        ([failed()], [failed()], 2),
        ([failed()], [passed()], 2),  # fixed, but nothing was compared
        ([failed(), passed("C1-full")], [passed(), passed("C1-full")], 0),
        ([passed(wrong=LOST)], [passed(), passed("C1-full")], 0),
        ([], [passed()], 2),  # no base
        ([passed()], [passed("B-other")], 2),
        ([passed()], [passed(seed=43)], 2),  # other seeds
        ([passed()], [passed(machine={"id": "m2"})], 0),  # times are not gated
    ],
)
def test_what_cannot_be_told(base, head, expected):
    """2 only where a gate, or a phase of the base, is left open."""
    assert expected == status(base, head, "accuracy:0.5pt")


def test_each_finding_is_a_line():
    """Phase, metric, limit and what it rests on."""
    judgement = judge(compare([passed()], [passed(wrong=LOST)]), [Gate.from_text("accuracy:0.5pt")])
    assert ["B-lora: accuracy is worse by more than 0.5pt (p = 5.7e-14)"] == list(judgement.lines)


def test_a_gate_that_was_held_to_nothing_cannot_tell():
    """Its metric is measured on neither side; another gate's is."""
    sides = [passed(latency_ms=None)], [passed(latency_ms=None)]
    judgement = judge(compare(*sides), [Gate.from_text("accuracy:1pt"), Gate.from_text("latency_ms:5%")])
    assert (2, ["latency_ms:5%: compared in no phase", "accuracy:1pt: kept in 1 phase"]) == (judgement.status, judgement.lines)


def test_a_doubt_leaves_gates_open():
    """Such as records that could not be read; what is worse is worse all the same."""
    gates = [Gate.from_text("accuracy:1pt")]
    judgement = judge(compare([passed()], [passed()]), gates, doubts=["1 file"])
    assert (2, ["1 file"]) == (judgement.status, judgement.lines)
    assert 1 == judge(compare([passed()], [passed(wrong=LOST)]), gates, doubts=["1 file"]).status


def test_a_gate_that_few_examples_cannot_judge_says_so():
    """One point lower may be three for all that 900 examples tell; the gate does not break, and is not called kept."""
    gate = Gate.from_text("accuracy:0.4pt")
    [row] = [row for row in compare([passed(wrong=range(30))], [passed(wrong=range(20, 60))]) if row.metric == "accuracy"]
    assert row.verdict == "no difference shown"
    judgement = judge([row], [gate])
    surely = dataclasses.replace(row, verdict="worse", difference=-0.003, ci95=(-0.009, -0.001))  # and by how much is not sure
    said = ["accuracy:0.4pt: B-lora may be up to 0.9 pt worse, which these records cannot rule out"]
    assert said == judge([surely], [gate]).lines
    assert (0, [f"accuracy:0.4pt: B-lora may be up to {-100 * row.ci95[0]:.1f} pt worse, which these records cannot rule out"]) == (
        judgement.status,
        judgement.lines,
    )


def test_a_gate_tighter_than_single_runs_can_show_says_so():
    """24% slower passes a gate of 20%, but not in silence; two runs a side do without a tolerance, and a strict gate, too."""
    gates = [Gate.from_text("train_runtime_seconds:20%"), Gate.from_text("samples_per_second:30%")]
    judgement = judge(compare([passed()], [passed(seconds=74.4)]), gates)
    much = "B-lora is 14 s worse, which is not shown to be a difference (one run a side, tolerance 25%)"
    said = [f"train_runtime_seconds:20%: {much}", "samples_per_second:30%: kept in 1 phase"]
    assert (0, said) == (judgement.status, judgement.lines)
    assert 1 == judge(compare([passed()], [passed(seconds=74.4)]), gates, strict=True).status
    sides = [[passed(run=f"{i}", seconds=s + i / 10) for i in (1, 2, 3)] for s in (60, 74.4)]
    assert 1 == judge(compare(*sides), gates).status
    kept = judge(compare(sides[0], sides[0]), gates)
    assert (0, ["train_runtime_seconds:20%: kept in 1 phase", "samples_per_second:30%: kept in 1 phase"]) == (
        kept.status,
        kept.lines,
    )


@pytest.mark.parametrize(("lost", "limit"), [(18, 1.0), (36, 2.0), (45, 2.5), (54, 3.0), (90, 5.0), (180, 10.0)])
def test_a_loss_of_as_much_as_the_limit_breaks_no_gate(lost, limit):
    """Whatever rounding makes of it; one example more does. Dev and test have 1,800."""
    assert 0 == status([passed()], [passed(wrong=range(lost))], f"accuracy:{limit}pt")
    assert 1 == status([passed()], [passed(wrong=range(lost + 1))], f"accuracy:{limit}pt")


def test_a_share_is_of_the_base_and_points_are_not():
    """The base is right in half of 1,800: 5% of that are 45 examples."""
    half = range(900)
    for lost, limit, expected in ((44, "accuracy:5%", 0), (46, "accuracy:5%", 1), (46, "accuracy:5pt", 0), (92, "accuracy:5pt", 1)):
        base, head = passed(wrong=half, n=900), passed(wrong=half, n=900)
        head = dataclasses.replace(head, predictions={**head.predictions, "test": predictions(900, range(lost), split="test")})
        assert expected == status([base], [head], limit), (lost, limit)


@pytest.mark.parametrize(
    ("limit", "base", "head", "expected"),
    [
        ("peak_memory_bytes:100MiB", 2**30, 2**30 + 150 * 2**20, 1),
        ("peak_memory_bytes:200MiB", 2**30, 2**30 + 150 * 2**20, 0),
        ("artifact_bytes:1MiB", 2**20, 3 * 2**20, 1),
        ("artifact_bytes:3MiB", 2**20, 3 * 2**20, 0),
    ],
)
def test_a_limit_in_the_metrics_unit_is_held_to(limit, base, head, expected):
    """Bytes, here."""
    name = limit.partition(":")[0]
    assert expected == status([passed(**{name: base})], [passed(**{name: head})], limit)


@pytest.mark.parametrize(
    ("limit", "base", "head", "said"),
    [
        ("evaluation_seconds:50%", 0.05, 0.145, "B-lora is 0.09 s worse, which is not shown to be a difference"),
        ("evaluation_seconds:26%", 0.3, 0.395, "B-lora is 0.10 s worse, which is not shown to be a difference"),
        ("evaluation_seconds:50%", 0.05, 0.05, "less than 0.10 s is not shown in B-lora"),
        ("evaluation_seconds:10%", 10.0, 10.0, "less than 2.50 s is not shown in B-lora"),
        ("artifact_bytes:0B", 2**20, 2**20 + 500, "B-lora is 500 B worse, which is not shown to be a difference"),
        ("artifact_bytes:0B", 2**20, 2**20, "kept in 1 phase"),
        ("evaluation_seconds:50%", 10.0, 10.0, "kept in 1 phase"),
    ],
)
def test_a_limit_below_what_matters_is_not_called_kept(limit, base, head, said):
    """A small difference is none to the verdict, and may be more than the limit all the same."""
    name = limit.partition(":")[0]
    judgement = judge(compare([passed(**{name: base})], [passed(**{name: head})]), [Gate.from_text(limit)])
    [line] = judgement.lines
    assert (0, f"{limit}: {said}") == (judgement.status, line.partition(" (")[0])


def test_a_phase_that_is_missing_leaves_gates_open_beside_one_that_is_not():
    """That another phase keeps the limit says nothing of it."""
    gates = [Gate.from_text("accuracy:1pt")]
    judgement = judge(compare([passed(), passed("C1-full")], [passed()]), gates)
    assert (2, "C1-full: outcome: missing") == (judgement.status, judgement.lines[0][:25])
    other = passed("C1-full", data={"fingerprint": "e" * 64})
    judgement = judge(compare([passed(), passed("C1-full")], [passed(), other]), gates)
    assert (2, "C1-full: accuracy: not comparable") == (judgement.status, judgement.lines[0][:33])


def test_a_gate_that_breaks_hides_no_other():
    """What is said of the others follows, in whichever order they were given."""
    gates = [Gate.from_text(text) for text in ("accuracy:0.5pt", "artifact_bytes:0B", "f1:50%")]
    lines = judge(compare([passed()], [passed(wrong=LOST)]), gates).lines
    assert ["artifact_bytes:0B: kept in 1 phase", "f1:50%: kept in 1 phase"] == lines[1:]

"""Reports: figures for people, a row for each phase and a line for each that failed."""

import csv
import dataclasses
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from samples import NOTHING
from samples import passed as measured

from peftbench.metrics import METRICS
from peftbench.records import Efficiency, ParameterCounts, Plan, Predictions, Record, SplitMetrics, TeacherCost
from peftbench.report import (
    COST,
    QUALITY,
    render_bytes,
    render_comparison,
    render_count,
    render_csv,
    render_duration,
    render_plans,
    render_results,
    render_summary,
    render_value,
    short,
)
from peftbench.summary import summarize
from peftbench.verdicts import Row

LORA = Record(
    **{**NOTHING, "data": {"source": "movie-review snippets", "sizes": {"train": 8241, "dev": 900, "test": 900}}},
    run_id="20250102T030405Z-abcdef",
    phase="B",
    name="lora",
    scale="mini",
    seed=42,
    outcome="passed",
    fingerprint="f" * 64,
    config={},
    dev=SplitMetrics(accuracy=0.85, f1=0.84, n=100, accuracy_ci95=(0.7671, 0.9069)),
    test=SplitMetrics(accuracy=0.8, f1=0.7912, n=100, accuracy_ci95=(0.7111, 0.8666)),
    majority_accuracy=0.514,
    parameter_counts=ParameterCounts(total=22_713_986, trainable=770),
    train_runtime_seconds=242.0,
    efficiency=Efficiency(accuracy_per_million_params=1103.896, accuracy_per_minute=0.2107),
    peak_memory_bytes=3 << 29,
    artifact_bytes=123_456,
    latency_ms=15.46,
    evaluation_seconds=0.5,
)
TEACHER = dataclasses.replace(
    LORA,
    phase="A",
    name="teacher",
    parameter_counts=ParameterCounts(total=22_713_986, trainable=0),
    train_runtime_seconds=0.0,
    efficiency=Efficiency(accuracy_per_million_params=None, accuracy_per_minute=None),
)
FULL = dataclasses.replace(
    LORA, phase="C1", name="full", parameter_counts=ParameterCounts(total=12_000, trainable=12_000), train_runtime_seconds=500.0
)
FAILED = Record(
    **NOTHING,
    run_id="20250102T030405Z-abcdef",
    phase="D",
    name="hybrid",
    scale="mini",
    seed=43,
    outcome="failed",
    fingerprint=None,
    config={},
    error="RuntimeError: out of memory\nTraceback of many lines",
)


def at(seed, accuracy):
    return dataclasses.replace(LORA, seed=seed, dev=dataclasses.replace(LORA.dev, accuracy=accuracy))


def cells(text, phase):
    """The cells of a phase's rows in both tables, by header; columns are as wide as the rule below the headers."""
    found = {}
    lines = text.splitlines()
    for at in [i for i, line in enumerate(lines) if line.startswith("---")]:
        header, rule = lines[at - 1], lines[at]
        row = next(row for row in lines[at + 1 :] if row.startswith(phase))
        start = 0
        for dashes in rule.split("  "):
            end = start + len(dashes)
            found[header[start:end].strip()] = row.ljust(len(rule))[start:end].strip()
            start = end + 2
    assert {"phase", *QUALITY, *COST} == set(found)
    return found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.42, "0.42 s"),
        (9.99, "9.99 s"),
        (10.0, "10 s"),
        (42.4, "42 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (60.0, "1:00 min"),
        (242.0, "4:02 min"),
        (3599.4, "59:59 min"),
        (3599.6, "1:00:00 h"),
        (3842.0, "1:04:02 h"),
        (100_000.0, "27:46:40 h"),
    ],
)
def test_a_duration_is_rendered_for_people(seconds, text):
    """Seconds below a minute, then minutes and hours with a colon."""
    assert text == render_duration(seconds)


@given(seconds=st.integers(60, 10**6))
@settings(deadline=None, max_examples=50)
def test_a_rendered_duration_keeps_every_second(seconds):
    """From a minute on it can be read back without loss."""
    figure = render_duration(seconds).split(" ")[0]
    total = 0
    for part in figure.split(":"):
        total = total * 60 + int(part)
    assert seconds == total


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (5, "5 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (10 << 10, "10 KiB"),
        (123_456, "121 KiB"),
        (1 << 20, "1.0 MiB"),
        (87 << 20, "87 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_bytes_are_rendered_for_people(size, text):
    """In powers of 1024, with a decimal where there is one digit before it."""
    assert text == render_bytes(size)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (770, "770"),
        (999, "999"),
        (1000, "1.0k"),
        (12_345, "12.3k"),
        (1_000_000, "1.00M"),
        (4_560_000, "4.56M"),
        (335_143_938, "335.14M"),
    ],
)
def test_a_count_is_rendered_for_people(count, text):
    """Thousands and millions, as model cards write them."""
    assert text == render_count(count)


@pytest.mark.parametrize(
    ("render", "value", "text"),
    [
        pytest.param(render_duration, 9.999, "10 s", id="seconds"),
        pytest.param(render_bytes, 1023.7, "1.0 KiB", id="bytes"),
        pytest.param(render_bytes, (1 << 20) - 1, "1.0 MiB", id="KiB"),
        pytest.param(render_bytes, (1 << 30) - 1, "1.0 GiB", id="MiB"),
        pytest.param(render_bytes, 10 * 1024 - 1, "10 KiB", id="decimal"),
        pytest.param(render_count, 999_999, "1.00M", id="thousands"),
    ],
)
def test_a_figure_that_rounds_up_to_the_next_unit_is_written_in_it(render, value, text):
    """Nobody reads 1024 KiB, 1000.0k or 10.00 s."""
    assert text == render(value)


def test_the_table_has_a_row_for_each_phase():
    """In the order of the ids, the failed one included."""
    lines = render_summary([FAILED, LORA, TEACHER, FULL]).splitlines()
    assert ["A-teacher", "B-lora", "C1-full", "D-hybrid"] == [line.split(" ")[0] for line in lines[2:6]]


def test_a_row_holds_the_phases_figures():
    """Each under its header, in the unit that the header names."""
    assert {
        "phase": "B-lora",
        "dev acc % [95%]": "85.0 [76.7, 90.7]",
        "over maj.": "+33.6 pt",
        "test acc % [95%]": "80.0 [71.1, 86.7]",
        "test F1 %": "79.1",
        "trained": "770",
        "params": "22.71M",
        "train": "4:02 min",
        "acc/M": "1103.896",
        "acc/min": "0.211",
        "peak": "1.5 GiB",
        "ships": "121 KiB",
        "latency": "15.5 ms",
        "texts/s": "400",
        "front": "*",
    } == cells(render_summary([LORA]), "B-lora")


def test_a_phase_that_trained_nothing_has_dashes_for_its_costs():
    """No time, no efficiency and no place on the front."""
    row = cells(render_summary([TEACHER, LORA]), "A-teacher")
    assert ("0", "-", "-", "-", "") == (row["trained"], row["train"], row["acc/M"], row["acc/min"], row["front"])


def test_no_line_of_the_tables_is_wider_than_a_terminal_shows():
    """Though a phase's figures are of the size that they have in practice, and a seed failed."""
    phase = dataclasses.replace(
        LORA, phase="C1", name="student", parameter_counts=ParameterCounts(total=335_143_938, trainable=123_456_789)
    )
    tables = render_summary([phase, dataclasses.replace(phase, seed=43), dataclasses.replace(FAILED, phase="C1", name="student")])
    assert 120 > max(map(len, tables.partition("\nscale mini")[0].splitlines()))


def test_always_answering_the_same_is_not_over_the_majority():
    """It wins both ratios, and beside them stands what it is worth."""
    head = dataclasses.replace(
        LORA,
        dev=dataclasses.replace(LORA.dev, accuracy=0.514, accuracy_ci95=(0.481, 0.546)),
        parameter_counts=ParameterCounts(total=22_713_986, trainable=1),
        efficiency=Efficiency(accuracy_per_million_params=514_000.0, accuracy_per_minute=30.84),
    )
    row = cells(render_summary([head]), "B-lora")
    assert ("514000.000", "30.840", "+0.0 pt", "") == tuple(row[name] for name in ("acc/M", "acc/min", "over maj.", "front"))


def test_what_was_not_measured_is_a_dash():
    """And no zero."""
    unknown = dict.fromkeys(("majority_accuracy", "peak_memory_bytes", "artifact_bytes", "latency_ms", "evaluation_seconds"))
    row = cells(render_summary([dataclasses.replace(LORA, **unknown)]), "B-lora")
    assert {"-"} == {row[name] for name in ("over maj.", "peak", "ships", "latency", "texts/s")}


def test_a_beaten_phase_has_no_star():
    """Larger, slower and no better."""
    table = render_summary([LORA, FULL])
    assert ("*", "") == (cells(table, "B-lora")["front"], cells(table, "C1-full")["front"])


def test_several_seeds_are_one_row_with_mean_interval_and_deviation():
    """84, 85 and 86% are 85.0 ±1.0; predictions give the interval of the mean; the name tells how many they are."""
    row = cells(render_summary([at(42, 0.84), at(43, 0.85), at(44, 0.86)]), "B-lora")
    assert ("B-lora ×3", "85.0 ±1.0") == (row["phase"], row["dev acc % [95%]"])
    seeds = [measured(seed=42 + i, n=100, wrong=range(wrong)) for i, wrong in enumerate((14, 15, 16))]
    low, high = (100 * bound for bound in summarize(seeds)[0].accuracy_ci95("dev"))
    assert f"85.0 [{low:.1f}, {high:.1f}] ±1.0" == cells(render_summary(seeds), "B-lora")["dev acc % [95%]"]


def test_time_to_an_accuracy_is_that_of_the_seeds_that_were_evaluated():
    """Those without a curve tell nothing; one that stayed below is counted; the mean is over all that saw it."""
    curve = dataclasses.replace(LORA, dev_curve=((10, 1.0, 0.7), (20, 2.0, 0.9)))
    low = dataclasses.replace(LORA, dev_curve=((10, 1.0, 0.7),))
    seeds = {"| 20 ": [curve, LORA], "1 of 2 seeds": [curve, low], "never": [low, LORA], "not measured": [LORA]}
    for expected, records in seeds.items():
        numbered = [dataclasses.replace(record, seed=i) for i, record in enumerate(records)]
        assert expected in " ".join(render_results(numbered, table="github", reach=0.8).split())


@pytest.mark.parametrize("table", ["simple", "github", "latex_booktabs"])
def test_failed_seeds_are_counted_beside_the_name(table):
    """In every format: a mean over two of three seeds is not one over all."""
    failed = dataclasses.replace(FAILED, phase="B", name="lora", seed=44)
    assert "B-lora ×2, 1 failed " in render_results([at(42, 0.84), at(43, 0.85), failed], table=table)
    assert "B-lora, 1 failed " in render_results([at(42, 0.84), failed], table=table)
    assert "B-lora, 2 failed " in render_results([dataclasses.replace(failed, seed=43), failed], table=table)


def test_one_answer_for_all_is_said():
    """F1 may look well all the same, here that of always answering positive; and the front, why it is empty."""
    gold = [1] * 85 + [0] * 15
    same = Predictions.from_labels([1] * 100, gold, "split")
    record = dataclasses.replace(at(42, 0.85), predictions={"dev": same, "test": same}, majority_accuracy=0.85)
    lines = render_summary([record]).splitlines()
    assert "warning: B-lora gave every sentence of dev one label, which F1 may not show" in lines
    assert "front: empty, as each trained phase has a failed seed or an interval that reaches down to the majority" in lines
    assert any(line.endswith("majority 85.0% of dev, 85.0% of test") for line in lines)
    other = Predictions.from_labels([1] * 99 + [0], gold, "split")
    assert "one label" not in render_summary([dataclasses.replace(record, predictions={"dev": other, "test": other})])


@pytest.mark.parametrize("seeds", [[], [at(42, 0.84), at(43, 0.86)]], ids=["alone", "beside two that passed"])
def test_what_a_failed_test_has_measured_is_shown(seeds):
    """A mean without it would flatter, and whoever reads of a failure wants to see how bad it is; only the front is without it."""
    wanting = dataclasses.replace(at(44, 0.70), outcome="failed", error="AssertionError: 0.70 is too low")
    text = render_summary([*seeds, wanting])
    name, mean = ("B-lora ×3, 1 failed", "80.0") if seeds else ("B-lora, failed", "70.0")
    row = cells(text, name)
    assert row["dev acc % [95%]"].startswith(mean)
    assert ("", "4:02 min") == (row["front"], row["train"])
    assert "B-lora seed 44 failed: AssertionError: 0.70 is too low" in text.splitlines()
    why = "a phase with a failed seed is not on the front, nor does it keep another from it"
    assert f"failed: what a test that failed has measured counts in its phase's figures, but {why}" in text


def test_a_failed_phase_has_a_row_and_a_line_that_says_why():
    """The row says failed; the line names phase, seed and the first line of the error."""
    text = render_summary([LORA, FAILED])
    assert "failed" == cells(text, "D-hybrid")["dev acc % [95%]"]
    assert "D-hybrid seed 43 failed: RuntimeError: out of memory" in text.splitlines()
    assert "Traceback" not in text


def test_a_failed_seed_of_a_phase_that_passed_has_its_line():
    """It is not hidden behind the mean of the others."""
    text = render_summary([LORA, dataclasses.replace(FAILED, phase="B", name="lora")])
    assert "B-lora seed 43 failed: RuntimeError: out of memory" in text.splitlines()


@pytest.mark.parametrize("error", [None, "", "\n"])
def test_a_failed_phase_without_words_has_its_row_and_line_all_the_same(error):
    """A record may come without an error text; the table must not fall over it."""
    text = render_summary([dataclasses.replace(FAILED, error=error)])
    assert "failed" == cells(text, "D-hybrid")["dev acc % [95%]"]
    assert "D-hybrid seed 43 failed" in text


def test_only_failed_phases_make_a_table_too():
    """Row and line stand alone."""
    assert "D-hybrid seed 43 failed: RuntimeError: out of memory" == render_summary([FAILED]).splitlines()[-1]


def test_the_lines_below_name_scale_data_and_majority():
    """Whoever reads the table learns on what it was measured."""
    [line] = [line for line in render_summary([LORA]).splitlines() if line.startswith("scale mini: ")]
    assert [] == [part for part in ("movie-review snippets", "dev 900, test 900, train 8241", "51.4% of dev") if part not in line]


def test_the_lines_below_name_the_teachers_cost():
    """A phase that learned from a teacher was not as cheap as its own training."""
    cost = TeacherCost(training_seconds=242.0, logit_seconds=4.5, cache="hit")
    expected = "B: plus the teacher, tuned in 4:02 min, and its logits, 4.50 s, when first made; cache hit here"
    assert expected in render_summary([dataclasses.replace(LORA, teacher_cost=cost)]).splitlines()
    published = dataclasses.replace(cost, training_seconds=0.0)
    expected = "B: plus the published teacher's logits, 4.50 s, when first made; cache hit here"
    assert expected in render_summary([dataclasses.replace(LORA, teacher_cost=published)]).splitlines()


def test_scales_have_a_table_each():
    """Figures of different scales are never in one table."""
    tables = render_summary([LORA, dataclasses.replace(LORA, scale="tiny")]).split("\n\n")
    first, second = tables[1::2]
    assert 4 == len(tables)
    assert ("scale mini:" in first, "scale tiny:" in second) == (True, True)
    assert ("scale tiny:" in first, "scale mini:" in second) == (False, False)


def test_phases_of_several_commits_are_told_apart():
    """As a folder of reports has the latest of each, which may be a phase that is gone."""
    first = measured("B-lora", commit={"id": "a" * 40, "dirty": True, "changes": "0123456789abcdef"})
    records = [first, measured("C1-full", commit={"id": "b" * 40}), measured("D-hybrid", commit={"id": "b" * 40})]
    places = f"B-lora at {'a' * 12} with uncommitted changes 012345; C1-full, D-hybrid at {'b' * 12}"
    assert f"warning: phases in this table were measured at several commits: {places}" in render_summary(records).splitlines()
    assert "several commits" not in render_summary(records[1:])


def test_what_makes_figures_say_less_is_said():
    """Cases that waited long for a processor, with the seeds where others did not, and a test held out of train."""
    data = {**measured().data, "label_protocol": "labels of the files; test held out of train, stratified, seed 42"}
    waited = measured("B-lora", processor_wait_fraction=0.47, data=data)
    others = [measured("D-hybrid", seed=seed, processor_wait_fraction=seed / 100, data=data) for seed in (3, 30)]
    lines = render_summary([waited, *others]).splitlines()
    why = "as when other work runs; its times say little"
    assert f"warning: B-lora, D-hybrid seed 30 waited for a processor up to 47% of the time, {why}" in lines
    [line] = [line for line in render_summary([waited]).splitlines() if "waited" in line]
    assert f"warning: B-lora waited for a processor 47% of the time, {why}" == line
    assert "test is held out of train, as the data have no labelled test split" in lines
    assert not [line for line in render_summary([measured()]).splitlines() if "waited" in line or "held out" in line]


def test_the_count_of_verdicts_is_a_comment_in_latex():
    """So that the file can be taken into a document as it is."""
    row = Row(phase="B-lora", metric="accuracy", base=0.9, head=0.8, verdict="worse", reason="p = 0.01", difference=-0.1)
    assert (
        "% 1 worse; accuracy and f1 are over dev and test together"
        == render_comparison([row], table="latex_booktabs").splitlines()[-1]
    )


def test_what_does_not_compare_is_said_below_the_table_and_has_no_front():
    """Phases of other data, or measured on other machines, in one folder."""
    one = measured("B-lora")
    other_data, other_machine = {"data": {**one.data, "fingerprint": "e" * 64}}, {"machine": {"id": "m2"}}
    for changes, what in ((other_data, "data in one table, which"), (other_machine, "machines in one table, whose times")):
        text = render_summary([one, measured("C1-full", **changes)])
        assert f"warning: different {what} cannot be compared; no front" in text.splitlines()
        assert not [line for line in text.splitlines() if " * " in line and line.startswith(("B-lora", "C1-full"))]
    assert "warning" not in render_summary([one, measured("C1-full")])


def test_the_data_of_each_phase_is_told():
    """A line for each, where they are several."""
    other = {"source": "elsewhere", "sizes": {"dev": 1}, "fingerprint": "e" * 64}
    lines = render_summary([measured("B-lora"), measured("C1-full", data=other)]).splitlines()
    assert 2 == len([line for line in lines if line.startswith("scale mini: ")])


def test_no_records_are_no_table():
    """A session without cases prints nothing."""
    assert "" == render_summary([])


HOSTILE = "\x1b[31m|<img src=x>`![a](http://x/y)`\\|\ud800"


def hostile_tables(table):
    """A table of results and one of a comparison with hostile text wherever a record has text."""
    record = dataclasses.replace(LORA, name=HOSTILE, data={**LORA.data, "source": HOSTILE})
    row = Row(phase=HOSTILE, metric=HOSTILE, verdict="worse", reason=HOSTILE)
    return [render_results([record], table=table), render_comparison([row], table=table).partition("\n\n")[0]]


def test_hostile_text_is_only_text_in_markdown():
    """No cell more than the heading has, no markup, no picture, no code."""
    for text in hostile_tables("github"):
        assert all(1 == len({line.count("|") for line in part.splitlines()}) for part in text.split("\n\n"))
        assert not {"<", "`", "\\", "\x1b", "\ud800"} & set(text)
        assert "](" not in text
        assert "&#124;&#60;img src=x&#62;&#96;![a]&#40;http://x/y)&#96;&#92;&#124;" in text


def test_what_is_quoted_in_markdown_has_no_emphasis():
    """Names of Python, stars, tildes and dollars stay what they are; underscores within a word are none."""
    reason = "TypeError: LoraConfig.__init__() got *2*, ~~x~~, $a_1$, max_length"
    text = render_comparison([Row(phase="B-lora", metric="accuracy", verdict="worse", reason=reason)], table="github")
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    assert f"<td>{reason}</td>" in re.sub(r"<td [^>]*>", "<td>", rendered)
    assert " * |" in render_results([LORA], table="github")  # the front's mark, which stands alone


def test_hostile_text_is_only_text_in_latex():
    """Every character that LaTeX takes for itself is escaped."""
    for text in hostile_tables("latex_booktabs"):
        assert r"?[31m/\ensuremath{<}img" in text
        assert "|" not in text


def test_hostile_text_is_only_text_in_csv():
    """No formula for a spreadsheet and no command for a terminal; lines and commas stay what they are."""
    text = render_csv([{"error": "\x1b[31mno,\nnever", "name": "=1+1", "n": -1}])
    assert [{"error": "?[31mno,\nnever", "name": "'=1+1", "n": "-1"}] == list(csv.DictReader(io.StringIO(text)))


def test_an_arrow_between_phases_is_a_word_in_latex():
    """The fonts that pdflatex begins with have Latin-1 and no arrow."""
    row = Row(phase="B-lora → D-hybrid", metric="accuracy", base=0.85, head=0.82, verdict="worse", reason="p = 0.1, 日")
    text = render_comparison([row], table="latex_booktabs")
    assert "B-lora to D-hybrid" in text
    assert text.encode("latin-1")
    assert "B-lora → D-hybrid" in render_comparison([row], table="github")


def test_the_sessions_end_steers_no_terminal():
    """Neither a name nor what an error quotes."""
    text = render_summary([dataclasses.replace(LORA, name=HOSTILE), dataclasses.replace(FAILED, error=HOSTILE)])
    assert not {"\x1b", "\ud800"} & set(text)


PLAN = Plan(
    phase="B-lora",
    parameters=23_160_000,
    trainable=591_000,
    examples=8241,
    steps=1032,
    tokens=441_700,
    training_flops=18.3e12,
    other_flops=1.04e12,
    examples_at_once=16,
    weight_bytes=200 << 20,
    activation_bytes=51 << 20,
    fixed_seconds=8.3,
)


@pytest.mark.parametrize(
    ("free", "verdict"),
    [
        (15 << 30, "memory: fits: needs 251 MiB of the 15.0 GiB that are free"),
        (250 << 20, "memory: does not fit: needs 251 MiB of the 250 MiB that are free"),
        (None, "shares the machine's memory"),
    ],
)
def test_plan_by_hand(free, verdict):
    """Each figure in its unit, the sum of the durations, and whether the largest phase fits."""
    text = render_plans([PLAN, PLAN], [60.0, 90.4], matrix_rate=3.4e11, free_bytes=free)
    row = text.splitlines()[2].split()
    assert ["B-lora", "591.0k", "8241", "1032", "441.7k", "18.3", "1.0", "251", "MiB", "16", "1:00", "min"] == row
    assert "all: about 2:30 min, at 340 GFLOP/s" in text
    assert verdict in text.splitlines()[-1]


def test_runs_of_a_minute_are_told_apart_where_there_are_no_commits():
    """A commit's first digits name it, a run's do not."""
    assert "c" * 12 == short("c" * 40)
    assert "20260101T102701Z-aaaaaa" == short("20260101T102701Z-aaaaaa")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.8512, "85.1%"),
        ("train_runtime_seconds", 242.0, "4:02 min"),
        ("samples_per_second", 97.06, "97.1 1/s"),
        ("latency_ms", 12.94, "12.9 ms"),
        ("peak_memory_bytes", 3 << 29, "1.5 GiB"),
        ("trainable_parameters", 1_480_000, "1.48M"),
        ("outcome", 1.0, "passed"),
        ("outcome", 0.0, "failed"),
        ("outcome", 2 / 3, "67% passed"),
        ("latency_ms", None, "-"),
    ],
)
def test_a_value_is_rendered_in_its_metrics_unit(name, value, text):
    """Of an outcome, which is no metric, the share of seeds that passed."""
    assert text == render_value(METRICS.get(name), value)

"""The HTML report, opened in a browser: it sorts, tells, asks nobody for anything, and runs no script but its own."""

import dataclasses
import functools
import itertools
import json
import ntpath
import os
import re
import shutil
from html import escape
from pathlib import Path

import pytest
from samples import failed, passed

from peftbench.levels import trace
from peftbench.metrics import METRICS
from peftbench.page import POINTS_WITH_TIPS, _Looks, link_from, render_page
from peftbench.records import MemoryUse, RecordError, SplitMetrics, TeacherCost, decode_record
from peftbench.report import COST, QUALITY, explain, render_csv, render_results, render_summary
from peftbench.store import Store
from peftbench.summary import summarize

BROWSER = os.environ.get("PEFTBENCH_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>\"'$x$"


def page_of(records, *, latest=4, link=lambda record: None):
    return render_page(records[-latest:], "run 1", history=trace(records, METRICS["accuracy"], []), link=link)


def study(**changes):
    """Four phases over three commits, of which the second loses accuracy."""
    records = []
    for day, wrong in enumerate((90, 150, 91), start=1):
        shared = {
            "run": f"2026010{day}T000000Z-aaaaaa",
            "commit": {"id": str(day) * 40, "dirty": False, "changes": None},
            **changes,
        }
        records += [
            passed("A-teacher", wrong=range(80), seconds=0.0, trainable=0, **{**shared, "learning_curve": ()}),
            passed("B-lora", wrong=range(wrong), seconds=120, trainable=591_000, **shared),
            passed(
                "C1-full",
                wrong=range(140),
                seconds=70,
                trainable=17_390_000,
                dev_curve=((5, 35.0, 0.7), (10, 70.0, 0.84)),
                **shared,
            ),
            failed("D-hybrid", run=shared["run"], error="TrainingDiverged: at step 3"),
        ]
    return records


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no chromium here: install it, or name it by PEFTBENCH_BROWSER")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=quiet)
        yield started
        started.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a page's text; what it asks for and says goes into the lists that come with it."""

    def open_(text, **context):
        path = tmp_path / "report.html"
        path.write_text(text, "utf-8")
        page = browser.new_page(**context)
        requests, problems = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        return page, requests, problems

    return open_


def column(table, number):
    return table.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


def test_the_table_sorts_by_value(open_page):
    """Seconds and minutes by their length, the failed phase always last; by mouse and by keyboard."""
    page, _, problems = open_page(page_of(study()))
    quality, cost = page.locator("table").nth(0), page.locator("table").nth(1)
    assert ["A-teacher", "B-lora", "C1-full", "D-hybrid"] == column(quality, 1)
    page.get_by_role("button", name="dev acc").click()
    assert ["A-teacher", "B-lora", "C1-full", "D-hybrid"] == column(quality, 1)
    page.keyboard.press("Enter")
    assert ["C1-full", "B-lora", "A-teacher", "D-hybrid"] == column(quality, 1)
    page.get_by_role("button", name="trained").click()
    assert "descending" == page.locator("th", has_text="trained").get_attribute("aria-sort")
    assert ["C1-full", "B-lora", "A-teacher", "D-hybrid"] == column(cost, 1)
    page.get_by_role("button", name=re.compile("^train ")).click()
    assert ["B-lora", "C1-full", "A-teacher", "D-hybrid"] == column(cost, 1)
    assert [] == problems


def test_the_tables_have_what_the_terminals_have(open_page):
    """The same headings and cells, the two ratios and what keeps them honest among them; what failed is said below."""
    page, _, _ = open_page(page_of(study()))
    for table, columns in zip(page.locator("table:not(.facts)").all(), (QUALITY, COST), strict=True):
        assert ["phase", *columns, "records"] == [heading.strip() for heading in table.locator("th").all_inner_texts()]
    row = page.locator("tr", has_text="B-lora").first.locator("td").all_inner_texts()
    assert ["B-lora", "89.9 [87.7, 91.7]", "+39.9 pt", "1.521", "0.449", "*", "100.0 [99.6, 100.0]", "100.0", ""] == row
    assert page.get_by_text("D-hybrid seed 42 failed: TrainingDiverged: at step 3").is_visible()


def test_each_cell_stands_under_its_heading(open_page):
    """Where there is no test result, where it is zero, and where all seeds of a phase failed."""
    none = SplitMetrics(accuracy=0.0, f1=0.0, n=900, accuracy_ci95=(0.0, 0.004))
    records = [passed(test=none, peak_memory_bytes=None, seconds=60), passed("C1-full", test=None), failed("D-hybrid")]
    page, _, _ = open_page(page_of(records))
    for row in page.locator("table:not(.facts) tbody tr").all():
        assert row.locator("xpath=../../thead/tr/th").count() == row.locator("td").count()
    test_accuracy = 2 + list(QUALITY).index("test acc % [95%]")
    assert ["0.0 [0.0, 0.4]", "-", ""] == column(page.locator("table").first, test_accuracy)


def test_failed_seeds_are_not_hidden(open_page):
    """The name's cell counts them, and a line says why."""
    page, _, _ = open_page(page_of([passed(seed=42), passed(seed=43), failed(seed=44)]))
    assert ["B-lora ×2, 1 failed"] == column(page.locator("table").first, 1)
    assert page.get_by_text("B-lora seed 44 failed: RuntimeError: no").is_visible()


def test_a_mark_tells_its_numbers(open_page):
    """To the pointer, and to the keyboard; Escape takes it away."""
    page, _, _ = open_page(page_of(study()))
    mark = page.locator("[id^=point-0-parameters-1]")
    mark.hover()
    assert page.locator("#tip").is_visible()
    assert "B-lora\ndev accuracy 89.9 [87.7, 91.7] %" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator("[id^=point-0-minutes-2]").focus()
    assert "1:10 min of training" in page.locator("#tip").inner_text()


def test_dev_accuracy_while_training_is_drawn_where_it_was_measured(open_page):
    """One phase has a curve."""
    page, _, _ = open_page(page_of(study()))
    assert 1 == page.locator("[id^=dev-0-]").count()
    assert "C1-full: dev accuracy 84.0% after 1:10 min and 10 steps" == page.locator("[id^=dev-0-]").get_attribute("data-tip")


def test_what_a_phase_costs_besides_is_on_the_page():
    """As below the terminal's table; a phase of which a seed failed is on no line of what nothing beats."""
    cost = TeacherCost(training_seconds=242.0, logit_seconds=4.5, cache="hit")
    page = page_of([passed("C2-kd", teacher_cost=cost)])
    assert "C2: plus the teacher, tuned in 4:02 min, and its logits, 4.50 s, when first made; cache hit here" in page
    good = [passed("B-lora", seed=1, trainable=10, wrong=range(90)), passed("C1-full", trainable=1000)]
    assert "dashed: what no other phase beats" in page_of(good)
    assert "dashed: what no other phase beats" not in page_of([*good, failed("B-lora", seed=2)])


def test_tables_are_explained_as_in_a_terminal():
    """Several seeds, data that differ and a failure are told of in the same words."""
    records = [passed(seed=42), passed(seed=43, data={"fingerprint": "other", "source": "other sentences"}), failed("D-hybrid")]
    page = page_of(records)
    texts = explain(summarize(records))
    assert all(f"<p>{escape(text)}</p>" in page for text in texts)
    for told in ("×N: ", "warning: different data", "other sentences", "D-hybrid seed 42 failed: "):
        assert any(told in text for text in texts), told


def test_pictures_share_no_ids():
    """Of several scales, too, so that a mark and what it refers to are its own picture's."""
    records = [*study(), *(dataclasses.replace(record, scale="thesis") for record in study())]
    ids = re.findall(r'\bid="([^"]*)"', page_of(records, latest=24))
    assert len(ids) == len({*ids}) > 20


@pytest.mark.parametrize(("low", "high"), [(590_000, 1_000_000), (162_000, 22_700_000), (2_050, 335_000_000), (1, 10**12)])
def test_the_axis_of_costs_can_be_read(open_page, low, high):
    """Over any range there are a few numbers, and none is written over another."""
    page, _, _ = open_page(page_of([passed("B-lora", trainable=low), passed("C1-full", trainable=high, wrong=range(9))]))
    texts = page.locator("figure", has_text="trained parameters").first.locator("text")
    boxes = [text.bounding_box() for text in texts.all() if re.fullmatch(r"[\d.]+[kM]?", text.text_content().strip())]
    level = max(box["y"] for box in boxes)
    boxes = sorted((box["x"], box["x"] + box["width"]) for box in boxes if abs(box["y"] - level) < 2)
    assert 2 <= len(boxes) <= 7
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(boxes))


def test_where_nothing_was_trained_there_is_no_trade_off():
    """A teacher alone: no axes without a point on them."""
    page = page_of([passed("A-teacher", seconds=0.0, trainable=0, learning_curve=())])
    assert "Accuracy against" not in page
    assert "<figure>" not in page


def test_curves_say_of_which_seed_they_are():
    """Beside figures that are means."""
    assert "; of several seeds the last" not in page_of(study())
    assert "; of several seeds the last" in page_of([passed(seed=1), passed(seed=2)])


def test_many_phases_have_looks_of_their_own():
    """Sixty-four pairs of colour and marker."""
    looks = _Looks([f"P{number}-x" for number in range(64)])
    assert 64 == len({looks.of(phase)[1:] for phase in looks.phases})


@pytest.mark.parametrize("name", ["E-ia3_keys_and_values", "F-" + "long_" * 18])
def test_the_names_of_lines_are_within_the_picture(open_page, name):
    """In as many columns as there is room for."""
    letters = "BCDF"
    page, _, _ = open_page(page_of([passed(letter + name[1:]) for letter in letters]))
    figure = page.locator("figure", has_text="Learning curves")
    right = figure.locator("svg").bounding_box()
    for letter in letters:
        box = figure.locator("text", has_text=letter + name[1:40]).bounding_box()
        assert box["x"] + box["width"] <= right["x"] + right["width"]


def test_on_a_phone_names_leave_room_for_figures(open_page):
    """A long one is broken, as it stays where it is while the rest scrolls."""
    page, _, _ = open_page(page_of([passed("E-" + "long_" * 19)]))
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.locator("tbody td").first.bounding_box()["width"] < 180


def test_a_shift_is_marked_in_a_long_history():
    """Where single commits cannot be pointed at any more."""
    records = [
        passed(
            run=f"2026{1 + day // 28:02d}{1 + day % 28:02d}T000000Z-aaaaaa",
            wrong=range(90 if day < 40 else 190),
            commit={"id": f"{day + 1:02x}" * 20, "dirty": False, "changes": None},
        )
        for day in range(POINTS_WITH_TIPS + 1)
    ]
    marks = re.findall(r'data-tip="(B-lora at [^"]*)"', page_of(records, latest=1))
    assert 1 == len(marks)
    assert "worse from here" in marks[0]


def test_history_marks_the_shift(open_page):
    """The commit that lost accuracy says so."""
    page, _, _ = open_page(page_of(study()))
    page.locator("#history-1-1").focus()
    assert "B-lora at 222222222222" in page.locator("#tip").inner_text()
    assert "worse from here" in page.locator("#tip").inner_text()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390)])
def test_it_is_readable(open_page, scheme, width):
    """Dark on light, light on dark; on a phone the page itself does not scroll sideways."""
    records = [*study(), failed("E-ia3", error=f"OSError: no file {'long' * 50}")]
    page, _, _ = open_page(page_of(records), color_scheme=scheme, viewport={"width": width, "height": 900})
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (ink, paper)]
    assert abs(brightness[0] - brightness[1]) > 180
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    label = page.locator("svg text").first
    assert ink == label.evaluate("node => getComputedStyle(node).fill")


def test_nothing_leaves_the_file_and_no_foreign_script_runs(open_page):
    """Hostile names in every place that a record has for text."""
    records = [
        dataclasses.replace(
            record, name=HOSTILE, scale="mini", error=HOSTILE, data={**record.data, "source": HOSTILE}, versions={HOSTILE: HOSTILE}
        )
        for record in study(machine={"id": "m1", "processor": HOSTILE})
    ]
    page, requests, problems = open_page(page_of(records, link=lambda record: HOSTILE))
    page.locator("[data-tip]").first.focus()
    page.wait_for_function("!document.getElementById('tip').hidden")
    assert None is page.evaluate("window.hacked ?? null")
    assert 1 == len(requests), requests
    assert HOSTILE in page.locator("#tip").inner_text()
    assert [] == problems


def test_names_stand_clear_of_other_marks_and_bars(open_page):
    """Two phases of nearly the same cost, and a cheap one: no name is written over an interval."""
    costs = {"B-lora": (150, 80.0), "C1-full": (140, 68.0), "D-hybrid": (170, 20.0), "E-ia3": (190, 25.0)}
    records = [passed(name, wrong=range(wrong), seconds=seconds) for name, (wrong, seconds) in costs.items()]
    page, _, _ = open_page(page_of(records))
    chart = page.locator("figure", has_text="training, minutes")
    bars = [bar.bounding_box() for bar in chart.locator("[id^=bar-of-]").all()]
    names = [chart.locator("text", has_text=name).bounding_box() for name in costs]
    assert 4 == len(bars)
    assert [] == [(bar, name) for bar in bars for name in names if crosses(bar, name)]


def crosses(one, other):
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in (("x", "width"), ("y", "height"))
    )


def places(content, *path):
    """Every place in JSON that has a value, as the keys to it; of a long list the first two."""
    yield path
    for key in content if isinstance(content, dict) else range(min(2, len(content))) if isinstance(content, list) else ():
        yield from places(content[key], *path, key)


def test_what_is_read_can_be_shown():
    """Whatever stands in one place of a record: it is refused when it is read, or every table, the CSV and the page are made."""
    good = passed(
        wrong=range(90),
        dev_curve=((5, 35.0, 0.7), (10, 60.0, 0.9)),
        teacher_cost=TeacherCost(training_seconds=3.0, logit_seconds=1.0, cache="hit"),
        memory_use=MemoryUse(examples_at_once=8),
    ).to_json()
    deep = functools.reduce(lambda inner, _: [inner], range(300), [])
    nan, half = float("nan"), "\ud800"
    hostile = (10**400, 2**64, 10**18, 1e300, 1e99, -1, 0, nan, "", [], {}, None, "\0", half, "<script>|$x$", deep)
    read = []
    for path in [path for path in places(good) if path]:
        for value in hostile:
            content = json.loads(json.dumps(good))
            *keys, last = path
            functools.reduce(lambda place, key: place[key], keys, content)[last] = value
            if path != ("phase",):
                content["phase"] = f"P{len(read)}"
            try:
                read.append(decode_record(json.dumps(content).encode()))
            except RecordError:
                continue
            for table in ("simple", "github", "latex_booktabs"):
                assert render_results(read[-1:], table=table, reach=0.8)
            assert render_summary(read[-1:])
            assert render_csv([read[-1].to_row()]).encode()
    assert len(read) > 200
    for i in range(0, len(read), 40):
        assert page_of(read[i : i + 40], latest=40).encode()


def test_links_lead_to_the_records_as_seen_from_the_page(tmp_path):
    """To the files that were read, and to no others."""
    record = passed()
    path = Store(tmp_path / "outputs", "mini").save(record)
    link = link_from(tmp_path / "pages" / "report.html", {(record.run_id, record.case): path})
    assert f"../outputs/runs/{record.run_id}/B-lora-mini-s42.json" == link(record)
    assert link(dataclasses.replace(record, seed=1)) is None


def test_a_link_to_another_drive_is_whole(tmp_path, monkeypatch):
    """Between the drives of Windows no way leads."""
    record = passed()
    path = Store(tmp_path / "outputs", "mini").save(record)
    monkeypatch.setattr("peftbench.report.os.path.relpath", ntpath_between_drives)
    assert path.as_uri() == link_from(Path("report.html"), {(record.run_id, record.case): path})(record)


def ntpath_between_drives(path, start):
    return ntpath.relpath("D:\\outputs", "C:\\pages")


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    """One line, no traceback."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install matplotlib"):
        page_of(study())


def test_commits_of_all_phases_stand_in_one_order():
    """That which the first phase lacks stands between those that it has."""
    records = [one for one in study() if not (one.phase == "A" and one.run_id.startswith("20260102"))]
    assert ["1111111", "2222222", "3333333"] == re.findall(r">(\d{7})</text>", page_of(records))


def test_a_bar_spans_the_interval():
    """It reaches as far above its mark, and below it, as the ends of the interval are from the accuracy."""
    record = passed(wrong=range(90))
    text = page_of([record])
    low, high = map(float, re.search(r'"bar-of-point-0-parameters-0">\s*<path d="M \S+ (\S+)\s+L \S+ (\S+)', text).groups())
    [mark] = map(float, re.findall(r'id="point-0-parameters-0".*?<use [^>]*y="(\S+?)"', text, re.DOTALL))
    lower, upper = record.dev.accuracy_ci95
    assert pytest.approx((upper - 0.9) / (0.9 - lower), rel=1e-3) == (mark - high) / (low - mark)


def test_all_that_was_measured_on_is_said():
    """Every machine, version and commit of what passed; a case that failed has none of its own to tell."""
    records = [passed(name, machine={"id": f"m{i}"}) for i, name in ((1, "B-lora"), (2, "C1-full"))]
    records.append(failed("D-hybrid", machine={"id": "m3"}))
    assert "<th scope='row'>id</th><td>m1; m2</td>" in page_of(records)


def test_the_commits_of_a_history_are_named_below_it():
    """By their first digits, and of many each second or third, so that there are at most eight."""
    few = page_of(study())
    assert [True] * 3 == [f">{str(day) * 7}</text>" in few for day in (1, 2, 3)]
    ids = [f"{day:02d}" * 20 for day in range(1, 18)]
    many = [passed(run=f"202601{i[:2]}T000000Z-aaaaaa", commit={"id": i, "dirty": False, "changes": None}) for i in ids]
    text = page_of(many)
    assert ids[::3] == [i for i in ids if f">{i[:7]}</text>" in text]

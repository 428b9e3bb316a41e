"""The HTML report, opened in a browser: it sorts, tells, asks nobody for anything, and runs no script but its own."""

import dataclasses
import os
import shutil

import pytest
from samples import failed, passed

from peftbench.history import trace
from peftbench.metrics import METRICS
from peftbench.page import link_from, render_page
from peftbench.records import Store

BROWSER = os.environ.get("PEFTBENCH_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>\"'$x$"


def page_of(records, *, link=lambda record: None):
    return render_page(records[-4:], "run 1", history=trace(records, METRICS["accuracy"], []), link=link)


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


def column(page, number):
    return page.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


def test_the_table_sorts_by_value(open_page):
    """Seconds and minutes by their length, the failed phase always last; by mouse and by keyboard."""
    page, _, problems = open_page(page_of(study()))
    assert ["A-teacher", "B-lora", "C1-full", "D-hybrid"] == column(page, 1)
    page.get_by_role("button", name="dev accuracy").click()
    assert ["A-teacher", "B-lora", "C1-full", "D-hybrid"] == column(page, 1)
    page.keyboard.press("Enter")
    assert ["C1-full", "B-lora", "A-teacher", "D-hybrid"] == column(page, 1)
    page.get_by_role("button", name="trained").click()
    assert "descending" == page.locator("th", has_text="trained").get_attribute("aria-sort")
    assert ["C1-full", "B-lora", "A-teacher", "D-hybrid"] == column(page, 1)
    assert "TrainingDiverged: at step 3" in page.locator("tbody").first.inner_text()
    assert [] == problems


def test_a_mark_tells_its_numbers(open_page):
    """To the pointer, and to the keyboard; Escape takes it away."""
    page, _, _ = open_page(page_of(study()))
    mark = page.locator("[id^=point-mini-parameters-1]")
    mark.hover()
    assert page.locator("#tip").is_visible()
    assert "B-lora\ndev accuracy 89.9%" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator("[id^=point-mini-minutes-2]").focus()
    assert "1:10 min of training" in page.locator("#tip").inner_text()


def test_dev_accuracy_while_training_is_drawn_where_it_was_measured(open_page):
    """One phase has a curve."""
    page, _, _ = open_page(page_of(study()))
    assert 1 == page.locator("[id^=dev-mini-]").count()
    assert "C1-full: dev accuracy 84.0% after 1:10 min and 10 steps" == page.locator("[id^=dev-mini-]").get_attribute("data-tip")


def test_history_marks_the_shift(open_page):
    """The commit that lost accuracy says so."""
    page, _, _ = open_page(page_of(study()))
    page.locator("#history-1-1").focus()
    assert "B-lora at 222222222222" in page.locator("#tip").inner_text()
    assert "worse from here" in page.locator("#tip").inner_text()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390)])
def test_it_is_readable(open_page, scheme, width):
    """Dark on light, light on dark; on a phone the page itself does not scroll sideways."""
    page, _, _ = open_page(page_of(study()), color_scheme=scheme, viewport={"width": width, "height": 900})
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


def test_links_lead_to_the_records_as_seen_from_the_page(tmp_path):
    """To the files that were read, and to no others."""
    record = passed()
    path = Store(tmp_path / "outputs", "mini").save(record)
    link = link_from(tmp_path / "pages" / "report.html", {(record.run_id, record.case): path})
    assert f"../outputs/runs/{record.run_id}/B-lora-mini-s42.json" == link(record)
    assert link(dataclasses.replace(record, seed=1)) is None


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    """One line, no traceback."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        page_of(study())

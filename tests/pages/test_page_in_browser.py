"""The page of a run in a real browser: by mouse, by keys, with hostile texts, in the dark, fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from made_runs import PIECES, made_record, made_run, metrics_row, write_rows

from ppo_engine.pages.report.page import write_page
from ppo_engine.settings.schema import PPOConfig, PPOSettings, RunConfig

HOSTILE = (
    "</script><script>hacked()</script>",
    "<img src=x onerror=hacked()>",
    "<!--",
    "javascript:hacked()",
    "\u202egnp.exe",
    "\u0645\u0631\u062d\u0628\u0627",
    "x" * 30_000,
)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class Opened:
    """A page, and what went wrong in it: errors of its program, and what its policy forbade."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1300, "height": 900}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # others may use the machine
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._listen)
        self.page.on("request", lambda asked: self.requests.append(asked.url))
        self.page.add_init_script("window.hacked = () => { window.wasHacked = true; };")
        self.page.goto(file.resolve().as_uri())

    def _listen(self, said: Any) -> None:
        if said.type == "error":
            self.faults.append(said.text)


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of runs; at the end nothing must have gone wrong in it, or been asked for."""
    opened: list[Opened] = []

    def open_page(*runs: Path, **context: Any) -> Any:
        file = tmp_path / "page.html"
        write_page(runs, file)
        opened.append(Opened(browser, file, **context))
        return opened[-1].page

    yield open_page
    for one in opened:
        assert one.page.locator("html").get_attribute("data-ready")
        assert one.faults == []
        assert set(one.requests) == {one.page.url.partition("#")[0]}
        one.context.close()


def plot(page: Any, metric: str) -> Any:
    return page.locator("figure.curve", has=page.get_by_text(metric, exact=False)).first


def test_hostile_texts_are_shown_and_never_run(show: Open, tmp_path: Path) -> None:
    record = made_record(1, pieces=[*PIECES[:3], *HOSTILE], prompt=HOSTILE[0])
    config = PPOConfig(run=RunConfig(output_dir=HOSTILE[1]))
    run = made_run(tmp_path / HOSTILE[1], records=[record], config=config, held_out=HOSTILE)
    rows = [{**metrics_row(n), f"rewards/{HOSTILE[1]}/mean": n, HOSTILE[0]: 1} for n in (1, 2)]
    write_rows(run / "metrics.jsonl", rows)
    page = show(run)
    page.eval_on_selector_all("details", "all => all.forEach((fold) => { fold.open = true; })")
    for row in page.locator("#rollouts table.sorted tbody tr").all():
        row.click()
    for hostile in HOSTILE[:4]:
        assert page.get_by_text(hostile).count() > 0
    assert page.get_by_text("⟨U+202E⟩").count() > 0
    assert page.get_by_text("(10,000 more characters)").count() > 0
    assert page.locator("img, iframe, object, a[href^=javascript]").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("window.wasHacked") is None


def test_the_policy_stops_what_got_in_all_the_same(browser: Any, tmp_path: Path) -> None:
    write_page([made_run(tmp_path / "run")], tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    opened.page.evaluate(
        """() => {
            document.body.append(Object.assign(document.createElement("script"),
                { textContent: "hacked()" }));
            const image = document.createElement("div");
            image.innerHTML = "<img src=x onerror=hacked()>";
            document.body.append(image);
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.wasHacked") is None
    assert any("Content Security Policy" in fault for fault in opened.faults)
    opened.context.close()


def drawn(place: Any) -> str:
    """What stands there once it has been drawn anew."""
    place.page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
    )
    return str(place.inner_text())


def test_curves_by_keys(show: Open, tmp_path: Path) -> None:
    page = show(made_run(tmp_path / "run"))
    curve = plot(page, "objective/scores")
    canvas, readout = curve.locator("canvas"), curve.locator("output")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    assert drawn(readout) == "step 1: 0.2424 ± 1"
    page.keyboard.press("ArrowRight")
    assert drawn(readout).startswith("step 2: ")
    page.keyboard.press("End")
    assert drawn(readout).startswith("step 20: ")
    page.keyboard.press("+")  # around the cursor: the first steps are out of sight
    canvas.hover(position={"x": 60, "y": 50})
    assert drawn(readout).startswith(("step 10: ", "step 11: "))
    canvas.focus()
    page.keyboard.press("Escape")
    canvas.hover(position={"x": 60, "y": 50})
    assert drawn(readout).startswith("step 1: ")
    assert "0.2424 to" in canvas.get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    for _ in range(70):  # closer than numbers can tell apart
        page.keyboard.press("+")
    page.keyboard.press("Escape")
    canvas.hover(position={"x": 60, "y": 50})
    assert drawn(readout).startswith("step 1: ")


def test_curves_by_mouse(show: Open, tmp_path: Path) -> None:
    page = show(made_run(tmp_path / "run"))
    first, other = plot(page, "objective/scores"), plot(page, "objective/kl")
    box = first.locator("canvas").bounding_box()
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(middle + 60, box["y"] + 60, steps=4)
    page.mouse.up()
    left = {"x": 58, "y": 50}

    def leftmost(curve: Any) -> int:
        curve.locator("canvas").hover(position=left)
        return int(drawn(curve.locator("output")).split()[1].rstrip(":"))

    assert leftmost(first) == leftmost(other) > 8  # all curves zoom together
    first.locator("canvas").dblclick()
    assert leftmost(first) == leftmost(other) == 1
    page.get_by_label("Find a metric").fill("entropy")
    assert page.locator("figure.curve:visible").count() == 1
    page.get_by_label("Find a metric").fill("")
    log = page.get_by_label("logarithmic axis of policy/approx_kl")
    assert log.get_attribute("aria-pressed") == "true"  # over several powers of ten
    log.click()
    assert log.get_attribute("aria-pressed") == "false"
    before = first.locator("canvas").screenshot()
    page.get_by_label("Smoothing").focus()
    page.keyboard.press("End")
    assert first.locator("canvas").screenshot() != before


def test_a_response_token_by_token(show: Open, tmp_path: Path) -> None:
    record = made_record(20)
    page = show(made_run(tmp_path / "run", records=[made_record(1), record]))
    table = page.locator("#rollouts table.sorted")
    assert table.locator("tbody tr").count() == 8
    table.get_by_role("button", name="score").click()
    best = max(range(8), key=record.score.__getitem__)
    assert table.locator("tbody tr").first.locator("td").first.inner_text() == str(best + 1)
    assert table.locator("th", has_text="score").get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="2", exact=True).focus()
    page.keyboard.press("Enter")
    response = page.locator("article.response")
    assert "Response 2 of step 20" in response.inner_text()
    tokens = response.locator(".token")
    assert tokens.count() == 12
    assert response.locator(".environment .token").count() == 2
    assert response.locator(".special").all_inner_texts() == ["<|im_end|>"]
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    panel = response.locator("dl.numbers")
    shown = dict(
        zip(panel.locator("dt").all_inner_texts(), panel.locator("dd").all_inner_texts(),
            strict=True)
    )  # fmt: skip
    place = 12 + 1
    assert shown["number"] == "2 of 12"
    value = record.arrays["values"][place]
    assert float(shown["value"].replace("\u2212", "-")) == pytest.approx(value, rel=1e-3)
    ratio = record.arrays["ratio"][place]
    assert float(shown["ratio after / before"]) == pytest.approx(ratio, rel=1e-3)
    assert shown["clipped"] == ("yes" if record.arrays["clipped"][place] else "no")
    page.keyboard.press("ArrowRight")
    assert "the environment" in panel.inner_text() and "value" not in panel.inner_text()
    page.keyboard.press("End")
    assert "12 of 12" in panel.inner_text()
    tokens.nth(4).hover()
    assert "5 of 12" in panel.inner_text()


def test_colours_tell_the_numbers(show: Open, tmp_path: Path) -> None:
    record = made_record(1)
    page = show(made_run(tmp_path / "run", records=[record]))

    def colors() -> list[str]:
        return page.eval_on_selector_all(
            ".token", "tokens => tokens.map(token => token.style.backgroundColor)"
        )

    choice = page.get_by_label("Colour by")
    choice.select_option("clipped")
    clipped = record.arrays["clipped"][:12]
    assert [bool(color) for color in colors()] == clipped.tolist()
    choice.select_option("advantages")
    blue = ["42, 111, 187" in color for color in colors()]
    assert blue == (record.arrays["advantages"][:12] > 0).tolist()
    choice.select_option("none")
    assert not any(colors())
    choice.select_option("kl")
    page.get_by_role("button", name="next →").click()
    assert page.get_by_label("Colour by").input_value() == "kl"  # it stays
    assert colors()[2:4] == ["", ""] and any(colors())


def test_where_the_critic_changed_its_mind(show: Open, tmp_path: Path) -> None:
    record = made_record(1)
    values = record.arrays["values"]
    values[:12] = 0.0
    values[7:12] = 5.0
    page = show(made_run(tmp_path / "run", records=[record]))
    first = page.locator(".jumps button").first
    assert "(token 7): 0 → 5" in first.inner_text()
    first.click()
    assert page.evaluate("document.activeElement.dataset.i") == "7"
    page.mouse.move(1, 1)  # not over what scrolls beneath it
    trace = page.locator("figure.trace canvas")
    trace.focus()
    page.keyboard.press("Home")
    assert "token 1: value 0 · return" in drawn(page.locator("figure.trace output"))
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.i") == "0"


def test_a_group_beside_itself(show: Open, tmp_path: Path) -> None:
    record = made_record(1, group_size=4, critic=False)
    page = show(made_run(tmp_path / "run", records=[record]))
    cards = page.locator(".card")
    assert cards.count() == 4
    order = sorted(range(4), key=lambda i: -record.score[i])
    names = [text.split("\n")[0] for text in cards.all_inner_texts()]
    assert names == [f"Response {i + 1}" for i in order]
    assert "advantage" in cards.first.inner_text()
    assert page.locator("figure.trace").count() == 0  # no critic
    cards.last.get_by_role("button").click()
    assert f"Response {order[-1] + 1} of step 1" in page.locator("article.response").inner_text()
    assert cards.last.get_attribute("aria-current") == "true"


def test_what_is_looked_for_is_found(show: Open, tmp_path: Path) -> None:
    page = show(made_run(tmp_path / "run", records=[made_record(1), made_record(9)]))
    rows = page.locator("#rollouts table.sorted tbody tr")
    page.get_by_label("Show", exact=True).select_option("cut")
    assert rows.count() == 2
    page.get_by_label("Find in prompts and responses").fill("CASE 3")
    assert rows.count() == 1
    page.get_by_label("Step", exact=True).select_option("0")
    assert rows.count() == 8
    assert "of step 1" in page.locator("article.response").inner_text()


def test_before_against_after(show: Open, tmp_path: Path) -> None:
    page = show(made_run(tmp_path / "run"))
    held_out = page.locator("#held-out")
    figures = held_out.locator("table.figures").inner_text()
    assert "eval/scores\t0 ± 0.25\t2 ± 0.25" in figures
    row = held_out.locator("table.sorted tbody tr").first.inner_text()
    assert "before 0" in row and "after 0" in row and "20" in row


def test_runs_over_each_other(show: Open, tmp_path: Path) -> None:
    one = made_run(tmp_path / "one")
    other = made_run(
        tmp_path / "other",
        config=PPOConfig(steps=20, ppo=PPOSettings(kl_coef=0.5)),
        objective__scores=7.0,
    )
    page = show(one, other)
    settings = page.locator("#settings table.settings").first.inner_text()
    assert "ppo.kl_coef\t0.05\t0.5" in settings and "clip_range" not in settings
    curve = plot(page, "objective/scores")
    curve.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    told = drawn(curve.locator("output"))
    assert f"{one} 0.2424" in told and f"{other} 7" in told
    page.get_by_label(f"show {other}").uncheck()
    curve.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    assert str(other) not in drawn(curve.locator("output"))


def test_notes_and_problems_are_read(show: Open, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", objective__entropy=0.01)
    (run / "samples.jsonl").write_text("torn\ntorn\n{}\n")
    page = show(run)
    notes = page.locator(".notes li").all_inner_texts()
    assert "The policy's entropy is near 0" in notes[0] and "in 20 of 20 steps" in notes[0]
    assert notes[1].startswith("samples.jsonl: 2 skipped")


def test_light_and_dark(show: Open, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")

    def ink_and_paper(scheme: str) -> list[int]:
        page = show(run, color_scheme=scheme)
        shown = page.evaluate(
            "() => { const style = getComputedStyle(document.body); "
            "return [style.color, style.backgroundColor]; }"
        )
        return [int(color.split("(")[1].split(",")[0]) for color in shown]

    assert ink_and_paper("light") == [28, 255]
    assert ink_and_paper("dark") == [231, 20]


def test_every_control_has_a_name_and_is_reached_by_keys(show: Open, tmp_path: Path) -> None:
    page = show(made_run(tmp_path / "run", records=[made_record(1)]))
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, canvas")].filter((one) =>
            !one.textContent.trim() && !one.getAttribute("aria-label") && !one.labels?.length)
            .length"""
    )
    assert nameless == 0
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "INPUT", "BUTTON", "CANVAS", "SUMMARY"} <= seen


@pytest.mark.slow
def test_a_long_run_is_drawn_within_two_seconds(show: Open, tmp_path: Path) -> None:
    """Made, not trained: 10,000 steps, three records of 64 responses of 512 tokens."""
    records = [made_record(step, responses=64, tokens=512) for step in (1, 5_000, 10_000)]
    run = made_run(tmp_path / "run", records=records)
    more = {f"extra/{n}": 0.123456789 * n for n in range(40)}
    write_rows(run / "metrics.jsonl", ({**metrics_row(step), **more} for step in range(1, 10_001)))
    page = show(run)
    # Seconds of its thread, which others on the machine do not lengthen.
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        found = devtools.send("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in found if one["name"] == "TaskDuration")

    before = seconds()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    took = seconds() - before
    print(f"drawn in {took:.2f} s")
    assert page.evaluate(
        "() => [...SIGHT.plots.values()].some((plot) => plot.seen && !plot.stale && plot.x)"
    )
    assert 0 < took < 2

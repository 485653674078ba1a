"""Decisions on the disk: each once, none lost, whatever happens in between."""

from __future__ import annotations

import os
import random
import signal

import pytest
from ranking import candidates, read_rows, row, write_rows
from tiny import tiny_tokenizer

from ppo_engine.data.preferences import load_preferences
from ppo_engine.errors import MachineError, UserError
from ppo_engine.pages.ranking.decision import decide
from ppo_engine.pages.ranking.journal import Journal

ORDER = [2, 0, 3, 1]


def made(candidate, ranks=(0, 1, 2, 3), annotator="ada", mark=""):
    return decide(candidate, annotator, ORDER, ranks, 1.25, mark)


def test_a_row_is_our_format_and_read_as_it_is(tmp_path):
    journal, [one, two, three, four] = Journal(tmp_path / "r.jsonl"), candidates(4)
    journal.put(made(one, [1, 0, 1, None]))
    journal.put(made(two, mark="all_bad"))
    journal.put(made(three, mark="skipped"))
    journal.put(made(four, [7, 3, 9, 9]))
    rows = read_rows(journal.path)
    assert rows[0] == row(0) | {
        "ranks": [0, None, 1, 1],
        "annotator": "ada",
        "seconds": 1.2,
        "order": ORDER,
    }
    assert (rows[1]["ranks"], rows[1]["all_bad"]) == ([3, 3, 3, 3], True)
    assert (rows[2]["ranks"], rows[2]["skipped"]) == ([None] * 4, True)
    assert rows[3]["ranks"] == [0, 2, 1, 2]
    found, skipped = load_preferences(journal.path, tokenizer=tiny_tokenizer())
    assert [one.ranks for one in found] == [(0, 1, 1), (0, 1, 2, 2)]
    assert found[0].responses == tuple(row(0)["responses"][n] for n in (0, 2, 3))
    assert found[0].finished == (True, True, False)
    assert skipped.reasons == {"no two responses with different ranks": 2}


def test_what_is_there_is_gone_on_with(tmp_path):
    journal, [one, two] = Journal(tmp_path / "r.jsonl"), candidates(2)
    decisions = [made(one), made(two, mark="skipped"), made(one, [3, 2, 1, 0], "bob")]
    for decision in decisions:
        journal.put(decision)
    again = Journal(journal.path)
    assert [(d.key, d.ranks, d.order, d.mark) for d in again.all()] == [
        (d.key, d.ranks, d.order, d.mark) for d in decisions
    ]
    again.put(made(two, annotator="bob"))
    assert len(read_rows(journal.path)) == 4


def test_a_later_decision_takes_the_place_of_an_earlier_one(tmp_path):
    journal, [one, two] = Journal(tmp_path / "r.jsonl"), candidates(2)
    for decision in (made(one), made(two), made(one, annotator="bob"), made(one, [3, 2, 1, 0])):
        journal.put(decision)
    rows = read_rows(journal.path)
    assert [(one["prompt"][0]["content"], one["annotator"]) for one in rows] == [
        ("Question 0?", "ada"),
        ("Question 1?", "ada"),
        ("Question 0?", "bob"),
    ]
    assert rows[0]["ranks"] == [2, 0, 3, 1] and rows[2]["ranks"] == [1, 3, 0, 2]
    journal.remove(made(two))
    assert [one["annotator"] for one in read_rows(journal.path)] == ["ada", "bob"]
    journal.put(made(two))
    assert Journal(journal.path).get("ada", two.key) is not None


def test_columns_of_another_ranking_do_not_stay(tmp_path):
    [one] = candidates(1)
    one.row.update(ranks=[0, 0, 0, 0], annotator="eve", skipped=True, all_bad=True, score=3)
    found = made(one).row()
    assert found["annotator"] == "ada" and found["score"] == 3
    assert not {"skipped", "all_bad"} & found.keys()


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_line_is_cut_off(tmp_path, cut):
    journal, [one, two] = Journal(tmp_path / "r.jsonl"), candidates(2)
    journal.put(made(one))
    journal.put(made(two))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    again = Journal(journal.path)
    kept = 2 if cut == 1 else 1  # the last lacks nothing but its end
    assert len(list(again.all())) == len(read_rows(journal.path)) == kept
    again.put(made(two))
    assert journal.path.read_bytes() == whole


def test_rows_of_others_are_refused(tmp_path):
    for wrong, problem in (
        (row(0, ranks=[0, 1, 2, 3]), "no 'annotator'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no column 'responses'"),
        (row(0, ranks=[0, 1, 2], annotator="a", order=ORDER), "no 'ranks'"),
        (
            row(0, ranks=[0, 1, 2, "3"], annotator="a", order=ORDER),
            "'ranks' must be numbers or null",
        ),
        (row(0, ranks=[0, 1, 2, 3], annotator="a", order=[0, 1, 2, 2]), "'order' does not name"),
    ):
        file = write_rows(tmp_path / "r.jsonl", [wrong])
        with pytest.raises(UserError, match=f"r.jsonl:1: {problem}.*choose another --out"):
            Journal(file)


@pytest.mark.parametrize(
    "content",
    [
        b"# Notes\n- a last line without an end",
        b"notes in one line",
        b"PAR1\x00\xff",
        b'{"a": 1}\n{"b": 2}',
        b'{"a": 1}\n{"b": ',
        b'{"a": 1}',
    ],
)
def test_a_file_of_something_else_stays_as_it_was(tmp_path, content):
    file = tmp_path / "r.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"r\.jsonl"):
        Journal(file)
    assert file.read_bytes() == content


def test_what_is_no_number_is_null_and_can_be_read_again(tmp_path):
    journal, [one] = Journal(tmp_path / "r.jsonl"), candidates(1)
    one.row.update(score=float("nan"), more=[{"deep": float("-inf")}, 1.5])
    journal.put(made(one))
    [found] = read_rows(journal.path)
    assert (found["score"], found["more"]) == (None, [{"deep": None}, 1.5])
    assert len([*Journal(journal.path).all()]) == 1


def test_another_programs_change_is_not_written_over(tmp_path):
    journal, [one, two] = Journal(tmp_path / "r.jsonl"), candidates(2)
    journal.put(made(one))
    journal.path.write_text("something else\n")
    for change in (lambda: journal.put(made(two)), lambda: journal.remove(made(one))):
        with pytest.raises(UserError, match="Not kept: another program has changed"):
            change()
    assert journal.path.read_text() == "something else\n"


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    journal, [one, two] = Journal(tmp_path / "r.jsonl"), candidates(2)
    journal.put(made(one))
    before = journal.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for change in (lambda: journal.put(made(two)), lambda: journal.remove(made(one))):
            with pytest.raises(MachineError, match=r"r\.jsonl cannot be written: No space left"):
                change()
            assert journal.path.read_bytes() == before
    assert journal.get("ada", two.key) is None
    journal.put(made(two))
    assert len(read_rows(journal.path)) == 2


def test_it_is_on_the_disk_before_it_is_answered(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    journal, [one] = Journal(tmp_path / "r.jsonl"), candidates(1)
    journal.put(made(one))
    assert journal.path.stat().st_size in synced


@pytest.mark.parametrize("seed", range(8))
def test_a_kill_at_any_moment_loses_nothing_that_was_answered(tmp_path, seed):
    """A process decides, changes and takes back, and tells of each; it is killed at some call to
    the system."""
    path, told = tmp_path / "r.jsonl", tmp_path / "told"
    found = candidates(6)
    draw = random.Random(seed)
    child = os.fork()
    if not child:
        try:
            _decide_until_killed(path, told, found, draw)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    states = [eval(line) for line in told.read_text().splitlines()]
    journal = Journal(path)
    keys = [candidate.key for candidate in found]
    now = {keys.index(d.candidate.key): d.ranks for d in journal.all()}
    # As it was last told, or with the one decision that nobody was told of.
    assert now in (states[-2], states[-1]), (now, states[-2:])
    assert len(read_rows(path)) == len(now)


def _decide_until_killed(path, told, found, draw) -> None:
    """Writes, before and after each change, what the file should hold."""
    left = [draw.randrange(20, 200)]

    def counted(call):
        def wrapped(*given, **named):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return wrapped

    for name in ("fsync", "replace", "open"):
        setattr(os, name, counted(getattr(os, name)))
    journal, state = Journal(path), {}
    with open(told, "a", buffering=1) as told_file:
        told_file.write(f"{state}\n")
        for _ in range(10_000):
            number = draw.randrange(len(found))
            decision = made(found[number], draw.sample(range(4), 4))
            if number in state and draw.random() < 0.4:
                after = {key: ranks for key, ranks in state.items() if key != number}
                told_file.write(f"{after}\n")
                journal.remove(decision)
            else:
                after = state | {number: decision.ranks}
                told_file.write(f"{after}\n")
                journal.put(decision)
            state = after

"""What is next, what was decided, and what is taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ranking import candidates, read_rows

from ppo_engine.errors import UserError
from ppo_engine.pages.ranking import view
from ppo_engine.pages.ranking.candidates import candidate_of
from ppo_engine.pages.ranking.decision import person
from ppo_engine.pages.ranking.plan import plan
from ppo_engine.pages.ranking.work import Work


@pytest.fixture
def opened(tmp_path):
    """Opens the work on `r.jsonl`, after closing what was open."""
    there = []

    def reopen(count=20, seed=0, responses=4):
        while there:
            there.pop().close()
        there.append(Work(candidates(count, responses), tmp_path / "r.jsonl", seed))
        return there[0]

    yield reopen
    for work in there:
        work.close()


def best_is(work, annotator, place, wanted):
    """The ranks by which the response with `wanted` in it is best, and all others tied."""
    candidate, order = work.shown(annotator, place)
    return [int(wanted not in candidate.responses[number]) for number in order]


def test_a_walk_through_everything(opened, tmp_path):
    work = opened()
    places = work.places("ada")
    assert len(places) == 21 and work.following("ada") == 0
    for done, place in enumerate(places):
        assert len(work.done("ada")) == done and work.following("ada") == place
        work.decide("ada", place, best_is(work, "ada", place, "Answer B"), 4.0)
    assert work.following("ada") is None
    rows = read_rows(tmp_path / "r.jsonl")
    assert len(rows) == 20  # what came again is not learned twice
    assert all(row["ranks"] == [1, 0, 1, 1] for row in rows)
    assert len({tuple(row["order"]) for row in rows}) > 5  # shuffled, one by one
    [again] = read_rows(tmp_path / "r.jsonl.repeats")
    [first] = [row for row in rows if row["prompt"] == again["prompt"]]
    assert again["order"] != first["order"]
    found = work.self_agreement("ada")
    assert (found.prompts, found.tau, found.accuracy) == (1, 1.0, 1.0)


def test_each_person_agrees_with_themselves(opened):
    work = opened()
    for name in ("ada", "bob"):
        for place, task in enumerate(plan(20, 0, name)):
            best = "Answer C" if name == "bob" and task.again else "Answer B"
            work.decide(name, place, best_is(work, name, place, best), 1.0)
    found = {name: work.self_agreement(name) for name in ("ada", "bob")}
    assert [found[name].prompts for name in found] == [1, 1]
    assert found["ada"].tau == 1.0 and found["bob"].tau == pytest.approx(-1 / 3)


def test_each_person_has_their_own_work(opened, tmp_path):
    work = opened()
    work.decide("ada", 0, [0, 1, 2, 3], 1.0)
    assert (work.following("ada"), work.following("bob")) == (1, 0)
    work.decide("bob", 0, [0, 1, 2, 3], 1.0)
    work.decide("bob", 1, [], 1.0, "skipped")
    assert [row["annotator"] for row in read_rows(tmp_path / "r.jsonl")] == ["ada", "bob", "bob"]
    assert work.people() == ["ada", "bob"]
    assert work.summary() == (
        f"Of 20 prompts 1 ranked by ada, 1 ranked and 1 skipped by bob: {work.out}. "
        "The same command goes on."
    )


def test_what_was_decided_is_shown_as_it_stood(opened):
    work = opened()
    candidate, order = work.shown("ada", 3)
    work.decide("ada", 3, [3, 1, 2, 0], 1.0)
    work = opened(seed=7)  # with which the others come in other orders
    there, cards = work.shown("ada", 3)
    assert (there.answers, cards) == (candidate.answers, order)
    assert work.decided("ada", 3).by_card == [3, 1, 2, 0]
    assert work.following("ada") == 0 and work.following("ada", 2) == 4


def test_undo_takes_back_decisions_and_changes_one_by_one(opened, tmp_path):
    work = opened()
    for place in range(3):
        work.decide("ada", place, [0, 1, 2, 3], 1.0)
    work.decide("bob", 0, [0, 1, 2, 3], 1.0)
    work.decide("ada", 0, [3, 2, 1, 0], 1.0)
    assert work.undo("ada") == 0 and work.decided("ada", 0).by_card == [0, 1, 2, 3]
    assert work.undo("ada") == 2 and work.decided("ada", 2) is None
    assert work.undo("ada") == 1
    work = opened()  # after a start too
    assert work.undo("ada") == 0 and work.undo("ada") is None
    assert [row["annotator"] for row in read_rows(tmp_path / "r.jsonl")] == ["bob"]


def test_what_was_skipped_does_not_come_again(opened):
    work = opened(seed=3)
    tasks = plan(20, 3, "ada")
    [again] = [place for place, task in enumerate(tasks) if task.again]
    first = next(p for p, t in enumerate(tasks) if t.candidate == tasks[again].candidate)
    work.decide("ada", first, [], 1.0, "skipped")
    assert again not in work.places("ada")
    assert view.task(work, "ada", again - 1)["following"] == (
        again + 1 if again + 1 < len(tasks) else None
    )


def test_equal_responses_get_equal_ranks(tmp_path):
    texts = ["a", "b", "a", "c"]
    work = Work([candidate_of({"prompt": "p", "responses": texts}, "")], tmp_path / "r.jsonl", 0)
    _, order = work.shown("ada", 0)
    assert sorted(order) == [0, 1, 3]
    work.decide("ada", 0, ["acb".index(texts[number]) for number in order], 1.0)
    assert read_rows(tmp_path / "r.jsonl")[0]["ranks"] == [0, 2, 0, 1]
    work.close()


@pytest.mark.parametrize(
    ("ranks", "seconds", "mark", "problem"),
    [
        ([0, 1, 2], 1, "", "4 whole numbers"),
        ([0, 1, 2, -1], 1, "", "4 whole numbers"),
        ([0, 1, 2, 1.5], 1, "", "4 whole numbers"),
        ([0, 1, 2, True], 1, "", "4 whole numbers"),
        ("0123", 1, "", "4 whole numbers"),
        ([0, None, None, None], 1, "", "Rank two responses at least"),
        ([0, 1, 2, 3], -1, "", "seconds must be a number"),
        ([0, 1, 2, 3], float("nan"), "", "seconds must be a number"),
        ([0, 1, 2, 3], "1", "", "seconds must be a number"),
        ([0, 1, 2, 3], 1, "good", "mark must be one of all_bad, skipped"),
    ],
)
def test_what_is_no_decision_is_refused(opened, tmp_path, ranks, seconds, mark, problem):
    with pytest.raises(UserError, match=problem):
        opened().decide("ada", 0, ranks, seconds, mark)
    assert not (tmp_path / "r.jsonl").exists()


def test_places_that_are_not_there(opened):
    for place in (-1, 21):
        with pytest.raises(UserError, match="they go from 0 to 20"):
            opened().decide("ada", place, [0, 1, 2, 3], 1.0)


@pytest.mark.parametrize("name", ["", "  ", None, 3, "a" * 61, "a\x00b", "a\u202eb"])
def test_what_is_no_name(name):
    with pytest.raises(UserError, match="A name must have 1 to 60 characters"):
        person(name)


def test_a_name_is_one_however_it_is_spaced():
    assert person(" Ada  King\n") == "Ada King"


def test_time_left_is_by_the_median(opened):
    work = opened()
    assert work.seconds_left("ada") is None
    for place, seconds in enumerate([2.0, 600.0, 4.0]):
        work.decide("ada", place, [0, 1, 2, 3], seconds)
    assert work.seconds_left("ada") == 4.0 * (len(work.places("ada")) - 3)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "r.jsonl", tmp_path / "r.jsonl"
    link.symlink_to(file)
    work = Work(candidates(3), link, 0)
    for place in (0, 1):
        work.decide("ada", place, [0, 1, 2, 3], 1.0)
    work.undo("ada")
    with pytest.raises(UserError, match="in use by"):
        Work(candidates(3), file, 0)
    work.close()
    assert link.is_symlink() and len(read_rows(file)) == 1


def test_a_second_process_is_refused(opened, tmp_path):
    opened()
    code = (
        "import sys; from pathlib import Path; from ppo_engine.pages.ranking.work import Work\n"
        "Work([], Path(sys.argv[1]), 0)"
    )
    file = tmp_path / "r.jsonl"
    second = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert "r.jsonl is in use by process" in second.stderr
    assert "choose another --out" in second.stderr


def test_the_page_is_not_told_what_would_bias(opened, tmp_path):
    work = Work(
        [candidate_of({"prompt": "p", "responses": ["a", "b"], "scores": [1.5, 2.5],
                       "model": "secret"}, "c:1")],
        tmp_path / "blind.jsonl", 0,
    )  # fmt: skip
    told = str(view.task(work, "ada", 0))
    assert not any(word in told for word in ("scores", "1.5", "secret", "again", "c:1"))
    work.close()

"""The work of all people on one file of candidates: what is next, what was decided, what is taken
back."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ppo_engine.errors import UserError
from ppo_engine.messages import counted, unwritten
from ppo_engine.pages.ranking import plan
from ppo_engine.pages.ranking.agreement import Agreement, agreement
from ppo_engine.pages.ranking.candidates import Candidate
from ppo_engine.pages.ranking.decision import Decision, Mark, decide
from ppo_engine.pages.ranking.journal import Journal
from ppo_engine.run.lock import Lock

REPEATS = ".repeats"  # beside the output: what was ranked a second time, which no model learns from


class Work:
    """Rankings go to `out`, those of prompts that come again to `out` + ".repeats"; what is there
    is gone on with. Until `close`, another process that wants the same output is refused.

    A place is the number of a task in a person's plan.
    """

    def __init__(self, candidates: Sequence[Candidate], out: Path, seed: int) -> None:
        if out.is_symlink():  # a file that is renamed to its name would leave the other as it was
            out = Path(os.path.realpath(out))
        self.candidates, self.out, self._seed = list(candidates), out, seed
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(out.with_name(f".{out.name}.lock"), str(out), "--out")
        except OSError as error:
            raise unwritten(str(out), error) from error
        self.rankings = Journal(out)
        self.repeats = Journal(out.with_name(out.name + REPEATS))
        self._history: dict[str, list[tuple[int, Decision | None]]] = {}
        self._plan = lru_cache(lambda annotator: plan.plan(len(self.candidates), seed, annotator))

    def close(self) -> None:
        self._lock.release()

    def people(self) -> list[str]:
        """Those who have decided something, in the order in which they began."""
        return list(dict.fromkeys(decision.annotator for decision in self.rankings.all()))

    def places(self, annotator: str) -> list[int]:
        """The tasks of a person: what they skipped does not come again."""
        found = []
        for place, task in enumerate(self._plan(annotator)):
            first = self._first(annotator, task)
            if not (task.again and first is not None and first.mark == "skipped"):
                found.append(place)
        return found

    def done(self, annotator: str) -> list[int]:
        return [place for place in self.places(annotator) if self.decided(annotator, place)]

    def following(self, annotator: str, place: int = -1) -> int | None:
        """The first place after `place` that is not decided, or else the first of all."""
        left = [p for p in self.places(annotator) if not self.decided(annotator, p)]
        return next((p for p in left if p > place), left[0] if left else None)

    def decided(self, annotator: str, place: int) -> Decision | None:
        task = self._task(annotator, place)
        return self._journal(task).get(annotator, self.candidates[task.candidate].key)

    def shown(self, annotator: str, place: int) -> tuple[Candidate, list[int]]:
        """The candidate of a task, and its responses in the order of their cards: as they stood
        when it was decided."""
        decision = self.decided(annotator, place)
        if decision is not None:
            return decision.candidate, list(decision.order)
        task = self._task(annotator, place)
        candidate, before = self.candidates[task.candidate], None
        first = self._first(annotator, task)
        if first is not None:
            # By what they say: the file may have them in another order by now.
            told = [first.candidate.answers[number] for number in first.order]
            before = [candidate.answers.index(answer) for answer in told]
        order = plan.shuffled(candidate.distinct, self._seed, annotator, candidate.key, before)
        return candidate, order

    def decide(
        self,
        annotator: str,
        place: int,
        by_card: Sequence[int | None],
        seconds: float,
        mark: Mark = "",
    ) -> None:
        """Keep the ranks of a task's cards; they are on the disk when this returns."""
        candidate, order = self.shown(annotator, place)
        before, history = self.decided(annotator, place), self._undone(annotator)
        decision = decide(candidate, annotator, order, by_card, seconds, mark)
        self._journal(self._task(annotator, place)).put(decision)
        history.append((place, before))

    def undo(self, annotator: str) -> int | None:
        """Take back the last decision, or the last change of one; returns its place, None where
        there is none."""
        history = self._undone(annotator)
        if not history:
            return None
        place, before = history[-1]
        now = self.decided(annotator, place)
        journal = self._journal(self._task(annotator, place))
        if before is not None:
            journal.put(before)
        elif now is not None:
            journal.remove(now)
        history.pop()
        return place

    def seconds_left(self, annotator: str) -> float | None:
        """By the median of what was decided so far; None before anything is."""
        places = self.places(annotator)
        found = [self.decided(annotator, place) for place in places]
        taken = [decision.seconds for decision in found if decision is not None]
        return statistics.median(taken) * (len(places) - len(taken)) if taken else None

    def self_agreement(self, annotator: str) -> Agreement:
        """How far a person ranked alike what came again."""
        return self_agreement(self.rankings, self.repeats, annotator)

    def summary(self) -> str:
        """A line that says how much is ranked, and where it is."""
        people = [
            (name, [d.mark for d in self.rankings.all() if d.annotator == name])
            for name in self.people()
        ]
        if not people:
            return f"Nothing was ranked: there is no {self.out} yet."
        told = []
        for name, marks in people:
            skipped = marks.count("skipped")
            passed = f" and {skipped} skipped" * bool(skipped)
            told.append(f"{len(marks) - skipped} ranked{passed} by {name}")
        prompts = counted(len(self.candidates), "prompt")
        return f"Of {prompts} {', '.join(told)}: {self.out}. The same command goes on."

    def _undone(self, annotator: str) -> list[tuple[int, Decision | None]]:
        """What `undo` takes back, the last first: after a start, in the order of the plan."""
        if annotator not in self._history:
            self._history[annotator] = [(place, None) for place in self.done(annotator)]
        return self._history[annotator]

    def _task(self, annotator: str, place: int) -> plan.Task:
        tasks: list[plan.Task] = self._plan(annotator)
        if not 0 <= place < len(tasks):
            raise UserError(f"There is no place {place}: they go from 0 to {len(tasks) - 1}.")
        return tasks[place]

    def _journal(self, task: plan.Task) -> Journal:
        return self.repeats if task.again else self.rankings

    def _first(self, annotator: str, task: plan.Task) -> Decision | None:
        """What was decided of a task that comes again, when it came first."""
        if not task.again:
            return None
        return self.rankings.get(annotator, self.candidates[task.candidate].key)


def self_agreement(rankings: Journal, repeats: Journal, annotator: str) -> Agreement:
    """How far a person ranked alike what came again."""
    pairs = []
    for second in repeats.all():
        first = rankings.get(*second.key)
        if second.annotator == annotator and first is not None:
            like = second.candidate
            pairs.append((first.ranks_as(like), second.ranks_as(like)))
    return agreement(pairs)

"""What the page is told, as JSON. Nothing of it says who wrote a response or what it scored, or
that a prompt comes again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ppo_engine.messages import counted
from ppo_engine.pages.ranking.candidates import Candidate
from ppo_engine.pages.ranking.work import Work
from ppo_engine.text.prompt import Message, Prompt, show_prompt
from ppo_engine.text.template import THOUGHTS, thought_of

_CHARACTERS = 100  # of a prompt in the list of those that are done


def task(work: Work, annotator: str, place: int | None) -> dict[str, Any]:
    """The task at a person's `place`; None: there is nothing left."""
    places, done = work.places(annotator), work.done(annotator)
    found: dict[str, Any] = {
        "done": len(done),
        "total": len(places),
        "secondsLeft": work.seconds_left(annotator),
        "previous": max((p for p in places if place is None or p < place), default=None),
        "following": min((p for p in places if place is not None and p > place), default=None),
    }
    if place is None:
        return found | {"agreement": self_agreement(work, annotator)}
    candidate, order = work.shown(annotator, place)
    decision = work.decided(annotator, place)
    return found | {
        "place": place,
        "prompt": [_message(message) for message in _messages(candidate.prompt)],
        "tools": candidate.options.get("tools", []),
        "cards": [
            _response(candidate.responses[number]) | {"finished": candidate.finished[number]}
            for number in order
        ],
        "shown": shown(candidate, order),
        "decision": decision and {"ranks": decision.by_card, "mark": decision.mark},
    }


def shown(candidate: Candidate, order: list[int]) -> str:
    """What the cards of a candidate are, without saying it: ranks come back with it, and are of
    these cards."""
    return hashlib.sha256(f"{candidate.key} {order}".encode()).hexdigest()[:16]


def earlier(work: Work, annotator: str) -> list[dict[str, Any]]:
    """What a person has decided, to go back to."""
    found = []
    for place in work.done(annotator):
        decision = work.decided(annotator, place)
        assert decision is not None
        text = " ".join(show_prompt(decision.candidate.prompt).split())[:_CHARACTERS]
        found.append({"place": place, "text": text, "mark": decision.mark})
    return found


def self_agreement(work: Work, annotator: str) -> str:
    """In words, how far a person agrees with themselves."""
    found = work.self_agreement(annotator)
    if not found.prompts:
        return "Nothing was ranked a second time yet: about one prompt in twenty comes again."
    return f"You and yourself, on {counted(found.prompts, 'prompt')} that came again: {found}."


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt


def _message(message: Message) -> dict[str, Any]:
    return {"role": message.get("role", "")} | _response(message)


def _response(response: str | Message) -> dict[str, Any]:
    """Its text; with what else a message says."""
    if isinstance(response, str):
        return {"text": response}
    found: dict[str, Any] = {"text": response["content"]}
    if any(response.get(name) for name in THOUGHTS):
        found["thought"] = thought_of(response)
    if response.get("tool_calls"):
        calls = [call.get("function", call) for call in response["tool_calls"]]
        found["calls"] = [json.dumps(call, ensure_ascii=False, indent=2) for call in calls]
    return found

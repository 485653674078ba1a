"""The ranking page's server: its files, and what the page asks for. See `guard` for who may ask."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ppo_engine.errors import MachineError, UserError
from ppo_engine.pages.ranking import view
from ppo_engine.pages.ranking.decision import person
from ppo_engine.pages.ranking.work import Work

_FILES = Path(__file__).parent / "static"


@dataclass(frozen=True)
class RankingPage:
    """Answers the page. What changes something runs to its end before the next request is looked
    at, and is on the disk before it is answered."""

    work: Work
    annotator: str = ""  # the only one; empty: each says who they are
    guidelines: str = ""

    def app(self, token: str) -> Starlette:
        """With everything below the path /`token`/."""
        routes = [
            Route("/session", _answered(self.session)),
            Route("/task", _answered(self.task)),
            Route("/earlier", _answered(self.earlier)),
            Route("/agreement", _answered(self.agreement)),
            Route("/decision", _answered(self.decision), methods=["POST"]),
            Route("/undo", _answered(self.undo), methods=["POST"]),
            Route("/", lambda request: FileResponse(_FILES / "ranking.html")),
            Mount("/", StaticFiles(directory=_FILES)),
        ]
        return Starlette(routes=[Mount(f"/{token}", routes=routes)])

    def session(self, asked: dict[str, Any]) -> Any:
        people = [] if self.annotator else self.work.people()
        return {"annotator": self.annotator, "people": people, "guidelines": self.guidelines}

    def task(self, asked: dict[str, Any]) -> Any:
        """The one at `place`; without it the next that is not decided."""
        who = self._person(asked)
        place = _whole(asked["place"]) if "place" in asked else self.work.following(who)
        return view.task(self.work, who, place)

    def earlier(self, asked: dict[str, Any]) -> Any:
        return view.earlier(self.work, self._person(asked))

    def agreement(self, asked: dict[str, Any]) -> Any:
        return view.self_agreement(self.work, self._person(asked))

    def decision(self, asked: dict[str, Any]) -> Any:
        """Keeps it, where the cards are still as they were shown; the next task is the answer."""
        who, place = self._person(asked), _whole(asked.get("place"))
        if asked.get("shown") != view.shown(*self.work.shown(who, place)):
            raise UserError(
                "Not kept: the cards have another order by now, as something was decided in "
                "another tab, or under the same name elsewhere. Load this page again."
            )
        self.work.decide(
            who, place, asked.get("ranks", []), asked.get("seconds", 0), asked.get("mark", "")
        )
        return view.task(self.work, who, self.work.following(who, place))

    def undo(self, asked: dict[str, Any]) -> Any:
        who = self._person(asked)
        place = self.work.undo(who)
        if place is None:
            raise UserError("There is nothing to take back.")
        return view.task(self.work, who, place)

    def _person(self, asked: dict[str, Any]) -> str:
        return self.annotator or person(asked.get("annotator"))


def _answered(
    answer: Callable[[dict[str, Any]], Any],
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers what is asked (of a POST its JSON, else its query) in JSON; a
    mistake with what was wrong."""

    async def endpoint(request: Request) -> Response:
        try:
            asked = dict(request.query_params)
            if request.method == "POST":
                asked = _object(await request.body())
            return JSONResponse(answer(asked))
        except UserError as error:
            status = 500 if isinstance(error, MachineError) else 400
            return JSONResponse({"error": str(error)}, status)

    return endpoint


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError("What was sent is no JSON object.")
    return found


def _whole(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UserError(f"A place is a whole number, not {str(value)[:20]!r}.") from None

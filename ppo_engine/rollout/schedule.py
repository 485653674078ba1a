"""Which row is written where and when: any number of rows through the slots that there are.

Rows are seated, longest first, as slots become free; those that are done leave, and the last ones
are moved together, so that a step is never of many more rows than it has to be. On a GPU the host
looks at what was written while the next steps run already, so that neither waits for the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ppo_engine.models.flop import Span
from ppo_engine.rollout.decoder import Decoder, Draw, Seat, Written

# One in so many rows is to be free before others are seated or moved together.
_FREE_SHARE = 8
# On a GPU, rows of a step: there is a graph for each number that occurs.
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Request(NamedTuple):
    """A row that is to be continued."""

    tokens: list[int]  # at least one
    number: int  # of its response within the rollout
    counter: int  # of its first random number


@dataclass(eq=False)
class Response:
    """What is written behind a request."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # by one of the ends, or a stop string
    done: bool = False  # or cut at the limit


# How many of the tokens to keep where a stop string is among them; the second argument is how many
# were looked at before.
FindStop = Callable[[list[int], int], int | None]


class Schedule:
    """The rows of a decoder, and the responses that are written in them."""

    def __init__(self, decoder: Decoder, *, keep: bool) -> None:
        """With `keep`, slots of responses that are done stay as they are as long as there is room,
        for a later turn of the same conversation."""
        self._decoder = decoder
        self._keep = keep
        self._kept: dict[int, tuple[int, list[int]]] = {}  # by number: the row, and what it has
        self._seated: dict[int, Response] = {}  # by row
        self._read = 0  # tokens of the steps, those of rows that are done included
        self._ahead = decoder.steps > 1  # the next steps run while the host looks at the last

    def write(
        self,
        requests: Sequence[Request],
        limit: int,
        draw: Draw,
        find_stop: FindStop | None = None,
    ) -> list[Response]:
        """Continue each of the `requests` by at most `limit` tokens."""
        responses = [Response(request) for request in requests]
        waiting = deque(sorted(responses, key=self._urgency, reverse=True))
        running: tuple[Written, dict[int, Response]] | None = None
        self._read = 0
        while waiting or self._seated:
            free = self._decoder.rows - len(self._seated)
            if waiting and (not self._seated or free * _FREE_SHARE >= self._decoder.rows):
                self._seat([waiting.popleft() for _ in range(min(free, len(waiting)))], limit)
            before, running = running, self._launch(running, limit, draw, gather=not waiting)
            if not self._ahead:
                before, running = running, None
            if before is not None:
                self._take(*before, draw.ends, find_stop)
        # Each token that is written was read off the one before it.
        spans = [Span(len(r.request.tokens) - 1, len(r.tokens)) for r in responses]
        self._decoder.count(spans, sum(span.new for span in spans), read=self._read)
        return responses

    def make_room(self, requests: Sequence[Request], rows: int, length: int) -> None:
        """See to it that there are so many slots, of so many tokens, for these `requests`. Where
        longer ones have to be fewer, what the requests continue is kept first."""
        decoder = self._decoder
        if rows <= decoder.rows and length <= decoder.length:
            return
        if self._kept and length >= decoder.length:
            asked = {request.number for request in requests}
            kept = sorted(self._kept.items(), key=lambda item: item[0] not in asked)[:rows]
            decoder.resize([row for _, (row, _) in kept], rows, length)
            self._kept = {number: (row, has) for row, (number, (_, has)) in enumerate(kept)}
        else:
            self._kept.clear()
            decoder.reserve(rows, length)

    def _urgency(self, response: Response) -> tuple[bool, int, list[int]]:
        """What is kept first, as its slot may be lost; then the longest, those with the same
        beginning together."""
        number, tokens = response.request.number, response.request.tokens
        return number in self._kept, len(tokens), tokens[:-1]

    def _launch(
        self,
        running: tuple[Written, dict[int, Response]] | None,
        limit: int,
        draw: Draw,
        *,
        gather: bool,
    ) -> tuple[Written, dict[int, Response]] | None:
        """The next steps, where a row may be left to write in them."""
        steps, there = (len(running[0].tokens), running[1]) if running else (0, {})
        left = max(
            limit - len(response.tokens) - (steps if there.get(row) is response else 0)
            for row, response in self._seated.items()
        )
        if left <= 0:
            return None
        if gather:
            self._gather()
        steps = min(self._decoder.steps, left)
        self._read += self._span * steps
        return self._decoder.write(self._span, steps, draw), dict(self._seated)

    def _take(
        self,
        written: Written,
        responses: dict[int, Response],
        ends: tuple[int, ...],
        find_stop: FindStop | None,
    ) -> None:
        """Hand out what was `written`; those that are done leave."""
        tokens, logprobs, done = written.on_host()
        stopped = []
        for row, response in responses.items():
            if response.done:  # it had a stop string, and the steps ran already
                continue
            looked_at = len(response.tokens)
            new = [token for token in tokens[row] if token >= 0]
            response.tokens += new
            response.logprobs += logprobs[row][: len(new)]
            response.done = done[row]
            response.finished = done[row] and response.tokens[-1] in ends
            count = find_stop(response.tokens, looked_at) if find_stop else None
            if count is not None:
                del response.tokens[count:], response.logprobs[count:]
                response.done = response.finished = True
            if response.done:
                [place] = [p for p, other in self._seated.items() if other is response]
                del self._seated[place]
                stopped += [place] if not done[row] else []
                if self._keep:
                    request = response.request
                    has = [*request.tokens, *response.tokens][:-1]  # the last one was not read
                    self._kept[request.number] = place, has
        self._decoder.unseat(stopped)

    def _seat(self, responses: Sequence[Response], limit: int) -> None:
        """Let the model read what these continue, each beginning once, and let them write."""
        starts: dict[tuple[int, ...], list[int]] = {}
        more: list[tuple[list[int], int, int]] = []
        seats = []
        places = self._places(responses)
        for response, (row, has) in zip(responses, places, strict=True):
            request = response.request
            *before, last = request.tokens
            if has:
                if has < len(before):
                    more.append((before[has:], row, has))
            elif before:
                starts.setdefault(tuple(before), []).append(row)
            self._seated[row] = response
            seats.append(Seat(row, last, len(before), request.counter, limit))
        self._decoder.read(list(starts.items()))
        self._decoder.read_more(more)
        self._decoder.seat(seats)

    def _places(self, responses: Sequence[Response]) -> list[tuple[int, int]]:
        """A row for each, and how many of its tokens are in the slot already."""
        found: list[tuple[int, int] | None] = []
        for response in responses:
            row, has = self._kept.pop(response.request.number, (-1, []))
            same = has and response.request.tokens[: len(has)] == has
            found.append((row, len(has)) if same else None)
        taken = {place[0] for place in found if place} | set(self._seated)
        kept = {row: number for number, (row, _) in self._kept.items()}
        rows = (row for row in range(self._decoder.rows) if row not in taken)
        for index, place in enumerate(found):
            if place is None:
                row = next(rows)
                self._kept.pop(kept.get(row, -1), None)
                found[index] = row, 0
        return [place for place in found if place]

    def _gather(self) -> None:
        """Bring the rows together where that makes a step smaller."""
        count = self._bucket(len(self._seated))
        far = [row for row in self._seated if row >= count]
        span = max(self._seated) + 1
        if self._bucket(span) == count or (span - count) * _FREE_SHARE < span:
            return
        free = [row for row in range(count) if row not in self._seated][: len(far)]
        self._decoder.swap(far, free)
        other = dict(zip([*far, *free], [*free, *far], strict=True))
        self._seated = {other.get(row, row): x for row, x in self._seated.items()}
        self._kept = {n: (other.get(row, row), has) for n, (row, has) in self._kept.items()}

    @property
    def _span(self) -> int:
        """Rows of a step: up to the last that is seated."""
        return self._bucket(max(self._seated) + 1)

    def _bucket(self, rows: int) -> int:
        return row_bucket(rows, self._decoder.rows, self._decoder.steps)


def row_bucket(rows: int, most: int, steps: int) -> int:
    """How many rows there is room for, or are written together, for `rows` rows: at most `most`,
    and where several `steps` are launched at a time, one of the numbers that have a graph."""
    if steps == 1:
        return min(rows, most)
    fitting = [n for n in _BUCKETS if n <= most]
    return next((n for n in fitting if n >= rows), fitting[-1])

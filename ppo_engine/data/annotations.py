"""Preferences from annotation tools: their exports as rows that `load_preferences` takes.

Each submitted annotation becomes a row of its own, so annotators who disagree both count.
Discarded, cancelled and draft annotations, and votes for a tie, are skipped and counted; a record
whose meaning would have to be guessed is a bad line that says what was expected. Supported are:

**Argilla 2** (checked with 2.8): `records.to_json` and `to_list`, and the flattened rows of
`to_list(flatten=True)` and `to_datasets`. **Argilla 1** (`FeedbackDataset`): the rows of
`format_as("datasets")` and `push_to_huggingface`. The one question that compares is a
RankingQuestion whose values are names of fields (all of them, best first, or with a `rank` each,
equal for a tie), or a LabelQuestion whose label names the best one of `response_1`, `response_2`, …
or a tie. A list that names only some responses, as a MultiLabelQuestion's, has no order, and a
question that asks for the worst response cannot be used: both are bad lines.
Argilla 2 itself does not export two things: the ties of a ranking and, in `to_json`, the status of
an answer, so filter for submitted records before exporting.

**Label Studio** (JSON as of 1.x, JSON-MIN of its SDK 2.1): `Pairwise` over two columns such as
`answer1` and `answer2`, as in the templates Pairwise Classification and Human Preference Collection
(the export does not name the columns; the first is taken for the left one), and `Ranker` without
buckets over a `List` of items with `id` and `body`. Buckets, as in the template LLM Ranker, have
names, and which is better is not in the export.

The prompt comes from the fields that `forms` names; Pairwise Classification has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ppo_engine.data.forms import ASKING, CHATS, PROMPTS, RESPONSES
from ppo_engine.data.rows import BadLineError, BadLines, Row

_TIES = ("tie", "equal", "same", "both", "neither", "none")
# What JSON-MIN adds to the task's own columns.
_JSON_MIN = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")
_FOR_THE_WORST = re.compile(r"worst|least|lowest|reject|dislike", re.IGNORECASE)
_NUMBERED = re.compile(r"(?P<stem>.*?)[-_ ]?(?P<number>\d+|(?<=[-_ ])[A-Za-z]|[A-Z])")

Fields = Mapping[str, Any]
Annotation = Callable[[], Row]


class _UnusedError(Exception):
    """A valid annotation that prefers no response: its message is counted."""


def ordinary_rows(
    rows: Iterable[tuple[str, Any]], bad_lines: BadLines
) -> Iterator[tuple[str, Any]]:
    """`(place, row)` again, each exported record as one row for each of its annotations.

    Other rows pass through unchanged.
    """
    for place, row in rows:
        read = _reader(row)
        if read is None:
            yield place, row
            continue
        try:
            annotations = read(row)
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        if not annotations:
            bad_lines.skipped.add(place, "record without an annotation")
        for number, annotation in enumerate(annotations, start=1):
            where = place if len(annotations) == 1 else f"{place}, annotation {number}"
            try:
                found = annotation()
            except BadLineError as error:
                bad_lines.add(where, error.reason, error.detail)
            except _UnusedError as error:
                bad_lines.skipped.add(where, str(error))
            else:
                yield where, found


def _reader(row: Any) -> Callable[[Row], list[Annotation]] | None:
    """What turns this record into annotations; None where its format is not a known export."""
    if not isinstance(row, Mapping) or {"chosen", "rejected"} <= row.keys():
        return None
    if isinstance(row.get("data"), Mapping) and {"annotations", "completions"} & row.keys():
        return _label_studio
    if {"annotation_id", "lead_time"} <= row.keys():
        return _label_studio_min
    if isinstance(row.get("fields"), Mapping) and isinstance(
        row.get("responses", 0), Mapping | None
    ):
        return _argilla
    if any(str(name).endswith(".responses") for name in row):
        return _argilla_flat
    if "external_id" in row and "metadata" in row and any(map(_is_argilla_1, row.values())):
        return _argilla_1
    return None


# Argilla


def _argilla(row: Row) -> list[Annotation]:
    questions = {
        name: [(answer["value"], answer.get("status")) for answer in _dictionaries(answers, name)]
        for name, answers in (row["responses"] or {}).items()
    }
    return _argilla_answers(row["fields"], questions)


def _argilla_flat(row: Row) -> list[Annotation]:
    fields = {name: value for name, value in row.items() if "." not in name}
    questions = {}
    for column, values in row.items():
        if column.endswith(".responses"):
            statuses = row.get(f"{column}.status") or [None] * len(values or [])
            questions[column.removesuffix(".responses")] = list(
                zip(values or [], statuses, strict=False)
            )
    return _argilla_answers(fields, questions)


def _is_argilla_1(value: Any) -> bool:
    """Whether a column holds the answers to a question; a record without any has empty lists."""
    return isinstance(value, list) and all(
        isinstance(answer, Mapping) and {"user_id", "value", "status"} <= answer.keys()
        for answer in value
    )


def _argilla_1(row: Row) -> list[Annotation]:
    questions = {
        name: [(answer["value"], answer["status"]) for answer in answers]
        for name, answers in row.items()
        if _is_argilla_1(answers)
    }
    fields = {name: value for name, value in row.items() if name not in questions}
    return _argilla_answers(fields, questions)


def _argilla_answers(
    fields: Fields, questions: Mapping[str, Sequence[tuple[Any, str | None]]]
) -> list[Annotation]:
    """`questions` holds each one's answers with their status."""
    if not any(questions.values()):
        return []
    texts = _texts(fields)
    answers = questions[_comparing_question(texts, questions)]

    def annotation(value: Any, status: str | None) -> Row:
        if status not in (None, "submitted"):
            raise _UnusedError(f"{status} annotation")
        ranks = _label_ranks(value, texts) if isinstance(value, str) else _ranking(value, texts)
        return {
            **_asking(fields),
            "responses": [texts[name] for name in ranks],
            "ranks": list(ranks.values()),
        }

    return [partial(annotation, value, status) for value, status in answers]


def _comparing_question(
    texts: Fields, questions: Mapping[str, Sequence[tuple[Any, str | None]]]
) -> str:
    """The one question whose answers name fields, or else whose answers are all ties."""

    def asked(says: Callable[[Any], bool]) -> list[str]:
        return [q for q, answers in questions.items() if any(says(value) for value, _ in answers)]

    found = asked(lambda value: any(_field(name, texts) for name, _ in _named(value)))
    found = found or asked(_is_tie)
    if len(found) > 1:
        raise BadLineError("several questions compare the responses", f" ({', '.join(found)})")
    if not found:
        raise BadLineError(
            "no question compares the responses",
            ": expected a ranking or a label whose values are names of text fields (questions: "
            f"{', '.join(questions)}; text fields: {', '.join(texts)})",
        )
    if _FOR_THE_WORST.search(found[0]):
        raise BadLineError(
            "a question seems to ask for the worst response",
            f": expected one for the best (question: {found[0]}); invert it, or rename it",
        )
    return found[0]


def _named(value: Any) -> list[tuple[str, Any]]:
    """The names in an answer, each with its rank: of a ranking, or of one label, which is best."""
    if isinstance(value, str):
        return [(value, 0)]
    if isinstance(value, Mapping):  # as older versions of `datasets` give a list of dictionaries
        names, ranks = value.get("value"), value.get("rank")
        if isinstance(names, list) and isinstance(ranks, list):
            return [(str(name), rank) for name, rank in zip(names, ranks, strict=False)]
        return []
    if not isinstance(value, list):
        return []
    if all(isinstance(item, str) for item in value):
        return [(item, place) for place, item in enumerate(value)]
    if all(isinstance(item, Mapping) and "value" in item for item in value):
        return [(str(item["value"]), item.get("rank", place)) for place, item in enumerate(value)]
    return []


def _ranking(value: Any, texts: Fields) -> dict[str, Any]:
    named = _named(value)
    fields = [_field(name, texts) for name, _ in named]
    if not named or None in fields or len(set(fields)) != len(fields):
        raise BadLineError(
            "a ranking does not name text fields, each once",
            f": {', '.join(name for name, _ in named) or value} (text fields: {', '.join(texts)})",
        )
    whole = _family(str(fields[0]), texts) or [name for name in texts if name not in ASKING]
    plain = isinstance(value, list) and isinstance(value[0], str)
    if plain and not {*whole} <= {*fields}:
        raise BadLineError(
            "a list names only some responses: is it a ranking, or several labels without order",
            f"? It names {', '.join(map(str, fields))} of {', '.join(whole)}",
        )
    ranks = (-1 if rank is None else rank for _, rank in named)
    return dict(zip(map(str, fields), ranks, strict=True))


def _label_ranks(label: str, texts: Fields) -> dict[str, int]:
    """The labelled field has rank 0, those named like it rank 1."""
    best = _field(label, texts)
    if best is None:
        if _is_tie(label):
            raise _UnusedError("vote for a tie")
        raise BadLineError(
            "a label names no text field", f": {label!r} (text fields: {', '.join(texts)})"
        )
    family = _family(best, texts)
    if len(family) < 2:
        raise BadLineError(
            "it is not clear what a label was preferred to",
            f": expected fields such as response_1 and response_2, not {', '.join(texts)}",
        )
    return {name: int(name != best) for name in family}


def _family(field: str, texts: Fields) -> list[str]:
    return next((names for names in _families(texts).values() if field in names), [])


def _field(name: str, texts: Fields) -> str | None:
    """The field of that name, written "Response 1" or "response_1"."""
    if name in texts:
        return name
    alike = [field for field in texts if _plain(field) == _plain(name)]
    return alike[0] if len(alike) == 1 else None


def _is_tie(value: Any) -> bool:
    return isinstance(value, str) and _plain(value) in _TIES


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


# Label Studio


def _label_studio(row: Row) -> list[Annotation]:
    data = row["data"]
    annotations = _dictionaries(row.get("annotations", row.get("completions")), "annotations")

    def annotation(found: Mapping[str, Any]) -> Row:
        if found.get("was_cancelled") or found.get("skipped"):
            raise _UnusedError("cancelled annotation")
        results = _dictionaries(found.get("result"), "result")
        if not results:
            raise _UnusedError("empty annotation")
        return _compared(
            data,
            [(r.get("type"), r.get("from_name"), r.get("value")) for r in results],
        )

    def draft() -> Row:
        raise _UnusedError("draft annotation")

    drafts = [draft for _ in row.get("drafts") or []]
    return [*(partial(annotation, found) for found in annotations), *drafts]


def _label_studio_min(row: Row) -> list[Annotation]:
    """One annotation per row; a control's result is in the column of the control's name."""
    if row["annotation_id"] is None:
        return []
    results = [
        ("pairwise" if "selected" in value else "ranker", name, value)
        for name, values in row.items()
        for value in (values if isinstance(values, list) else [])
        if isinstance(value, Mapping) and {"selected", "ranker"} & value.keys()
    ]
    data = {name: value for name, value in row.items() if name not in _JSON_MIN}
    return [lambda: _compared(data, results)]


def _compared(data: Fields, results: Sequence[tuple[Any, Any, Any]]) -> Row:
    """The row that an annotation's results (type, name of the control, value) describe."""
    comparing = [result for result in results if result[0] in ("pairwise", "ranker")]
    if len(comparing) != 1:
        types = ", ".join(str(kind) for kind, _, _ in results) or "none"
        raise BadLineError(
            "not exactly one comparison", f": expected one pairwise or ranker (found: {types})"
        )
    kind, control, value = comparing[0]
    if not isinstance(value, Mapping):
        raise BadLineError(f"a {kind} result without its value")
    return _pair(data, value) if kind == "pairwise" else _ranked(data, control, value)


def _pair(data: Fields, value: Mapping[str, Any]) -> Row:
    selected = value.get("selected")
    if selected not in ("left", "right"):
        raise BadLineError("'selected' is neither left nor right", f" but {selected!r}")
    texts = _texts(data)
    pairs = {stem: names for stem, names in _families(texts).items() if len(names) == 2}
    usual = [names for stem, names in pairs.items() if _plain(stem) in (*RESPONSES, "text")]
    found = usual if len(usual) == 1 else list(pairs.values())
    if len(found) != 1:
        raise BadLineError(
            "it is not clear which two columns were compared",
            f": expected two such as answer1 and answer2 (text columns: {', '.join(texts)})",
        )
    left, right = found[0]
    chosen, rejected = (left, right) if selected == "left" else (right, left)
    alone = len(texts) == 2  # whole texts, as in Pairwise Classification
    prompt = {} if alone and not {*ASKING} & data.keys() else _asking(data)
    return {**prompt, "chosen": texts[chosen], "rejected": texts[rejected]}


def _ranked(data: Fields, control: Any, value: Mapping[str, Any]) -> Row:
    ranker = value.get("ranker")
    if not isinstance(ranker, Mapping) or list(ranker) != [control]:
        raise BadLineError(
            "items were ranked into buckets, whose order is not in the export",
            f": expected a Ranker without buckets, {{{control!r}: […]}} (found: {ranker!r:.80})",
        )
    ids = [str(one) for one in ranker[control] or []]
    lists = [
        {str(item["id"]): item for item in items}
        for items in data.values()
        if isinstance(items, list)
        and all(isinstance(item, Mapping) and "id" in item for item in items)
    ]
    found = [items for items in lists if ids and set(ids) <= items.keys()]
    if len(found) != 1:
        raise BadLineError(
            "it is not clear which list was ranked",
            f": expected one column of items with the ids {', '.join(ids)}",
        )
    ranked = [found[0][one] for one in ids]
    return {
        **_asking(data),
        "responses": [item.get("body") or item.get("title") for item in ranked],
        "ranks": list(range(len(ranked))),
    }


# Both


def _dictionaries(items: Any, name: str) -> list[Mapping[str, Any]]:
    if not all(isinstance(item, Mapping) for item in items or []):
        raise BadLineError(f"{name!r} must be a list of dictionaries")
    return list(items or [])


def _texts(fields: Fields) -> dict[str, str]:
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _asking(fields: Fields) -> Row:
    """The fields that say what is asked; the loader makes a prompt of them."""
    found = {name: fields[name] for name in ASKING if fields.get(name) is not None}
    if not found.keys() & {*PROMPTS, *CHATS}:
        raise BadLineError(
            "it is not clear which field is the prompt",
            f": expected one named {' or '.join(PROMPTS)} (found: {', '.join(fields)})",
        )
    return found


def _families(texts: Fields) -> dict[str, list[str]]:
    """Fields whose names differ in their last number or letter alone (`answer1`, `answer2`)."""
    families: dict[str, list[tuple[int, str, str]]] = {}
    for name in texts:
        match = _NUMBERED.fullmatch(name)
        if match:
            number = match["number"]
            families.setdefault(match["stem"], []).append((len(number), number, name))
    return {stem: [name for *_, name in sorted(found)] for stem, found in families.items()}

"""Whether a response is JSON of a form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line, shown
from ppo_engine.rewards.ready.time_limit import time_limit


def json_schema(responses: Sequence[str], *, schema: dict[str, Any]) -> list[float]:
    """1.0 where the whole response is JSON (RFC 8259, so no NaN) that meets the JSON Schema
    `schema`, of the draft that its `$schema` names, by default the newest.

    0.0 where that takes more than a second, as in `format_match`. What a `$ref` names must stand in
    the schema itself, or be the schema of a draft: nothing is fetched. Optional group `json`.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import extend, validator_for
        from referencing import Registry
    except ImportError as error:
        raise UserError(
            "json_schema needs the package jsonschema: pip install 'ppo-engine[json]'"
        ) from error
    if not isinstance(schema, dict):
        raise UserError(
            f"json_schema: schema must be a mapping, such as {{type: object}}, but is "
            f"{shown(schema)}."
        )
    draft = schema.get("$schema", "")
    kind = validator_for(schema, default=None) if isinstance(draft, str) else None
    if kind is None and "$schema" in schema:
        raise UserError(
            f"json_schema: the $schema {shown(draft)} names no draft. Write it as the draft does, "
            "such as http://json-schema.org/draft-07/schema#, or leave it out: the newest is taken."
        )
    kind = extend(kind or validator_for({}), {"multipleOf": _multiple_of})
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"json_schema: schema is not a valid JSON Schema: {first_line(error)}, at "
            f"{error.json_path}."
        ) from error
    for reference in _nowhere(kind, schema):
        raise UserError(
            f"json_schema: the $ref {reference!r} of the schema leads nowhere. Correct it; what "
            "stands in another file or on the network is not fetched: write it into the schema's "
            "$defs."
        )
    validator = kind(schema, registry=Registry())  # the default one fetches
    try:
        for _ in validator.iter_errors(None):  # all: the circle may stand behind the first
            pass
    except RecursionError:
        raise UserError(
            "json_schema: a $ref of the schema leads back to itself, so that no response is ever "
            "told: let it lead to what describes a part of a value, such as an item."
        ) from None
    return [float(_meets(response, validator)) for response in responses]


def _meets(response: str, validator: Any) -> bool:
    try:
        # RecursionError: a thousand brackets are JSON, but nothing that one wants to be paid for.
        # OverflowError: so is 1e400, of which multipleOf cannot be told.
        with time_limit():
            return bool(validator.is_valid(json.loads(response, parse_constant=_refuse)))
    except (ValueError, RecursionError, OverflowError, TimeoutError):
        return False


def _multiple_of(validator: Any, factor: Any, value: Any, schema: Any) -> Iterator[Any]:
    """Of decimals as they are written: 19.99 is a multiple of 0.01, though not their floats."""
    from jsonschema import ValidationError

    if not validator.is_type(value, "number"):
        return
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or Fraction(str(value)) % Fraction(str(factor)):
        yield ValidationError(f"{value!r} is not a multiple of {factor!r}")


def _nowhere(kind: Any, schema: dict[str, Any]) -> Iterator[str]:
    """The references of a schema of the draft of `kind`, and of what they lead to, that lead
    nowhere."""
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    draft = specification_with(kind.ID_OF(kind.META_SCHEMA))
    root = draft.create_resource(schema)
    todo, seen = [(root, REGISTRY.resolver_with_root(root))], set()
    while todo:
        resource, resolver = todo.pop()
        if not isinstance(resource.contents, Mapping) or id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        for keyword in ("$ref", "$dynamicRef"):
            reference = resource.contents.get(keyword)
            if not isinstance(reference, str):
                continue
            try:
                found = resolver.lookup(reference)
            except (Unresolvable, ValueError):  # ValueError: a name where a list has numbers
                yield reference
                continue
            todo.append((draft.create_resource(found.contents), found.resolver))
        todo += [(part, resolver.in_subresource(part)) for part in resource.subresources()]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

"""Whether a response is JSON of a form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line, shown


def json_schema(responses: Sequence[str], *, schema: dict[str, Any]) -> list[float]:
    """1.0 where the whole response is JSON (RFC 8259, so no NaN) that meets the JSON Schema
    `schema`, of the draft that its `$schema` names, by default the newest.

    Optional group `json`.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise UserError(
            "json_schema needs the package jsonschema: pip install 'ppo-engine[json]'"
        ) from error
    if not isinstance(schema, dict):
        raise UserError(
            f"json_schema: schema must be a mapping, such as {{type: object}}, but is "
            f"{shown(schema)}."
        )
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"json_schema: schema is not a valid JSON Schema: {first_line(error)}, at "
            f"{error.json_path}."
        ) from error
    validator = kind(schema)
    return [float(_meets(response, validator)) for response in responses]


def _meets(response: str, validator: Any) -> bool:
    try:
        # RecursionError: a thousand brackets are JSON, but nothing that one wants to be paid for.
        # OverflowError: so is 1e400, of which multipleOf cannot be told.
        return bool(validator.is_valid(json.loads(response, parse_constant=_refuse)))
    except (ValueError, RecursionError, OverflowError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

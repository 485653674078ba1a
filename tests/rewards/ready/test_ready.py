"""Ready reward functions that read text: what earns a point, and what does not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
import time

import pytest

import ppo_engine.rewards
from ppo_engine.errors import UserError
from ppo_engine.rewards import (
    boxed,
    exact_match,
    format_match,
    json_schema,
    last_number,
    math_equal,
)
from ppo_engine.rewards.ready import READY


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}")


def test_all_are_exported_without_torch():
    assert sorted(ppo_engine.rewards.__all__) == sorted(READY)
    code = f"import sys\nfrom ppo_engine.rewards import {', '.join(READY)}\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(ImportError, match="exct_match"):
        from ppo_engine.rewards import exct_match  # noqa: F401


@pytest.mark.parametrize("reward", [exact_match, last_number, boxed])
def test_a_row_without_an_answer_scores_nothing(reward):
    assert reward(["None", "5", r"\boxed{None}"], [None] * 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("Paris", "Paris", 1),
        ("  New\n York ", "New  York", 1),
        ("Paris.", "Paris", 0),
        ("paris", "Paris", 0),
        ("NewYork", "New York", 0),
        ("42", 42, 1),
        ("true", True, 1),
        ("", "Paris", 0),
    ],
)
def test_exact_match(response, answer, score):
    assert exact_match([response], [answer]) == [score]


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It weighs 1,234.50 kg.", "1234.5"),
        ("3 boxes of 4, so 12.", 12),
        ("\N{MINUS SIGN}3", "-3"),
        ("x=-5", -5),
        ("7-3", "3"),
        ("(2)-3", "3"),
        ("1e3", 1000),
        ("2.5E-1", "1/4"),
        ("3/4", 0.75),
        ("-2 1/2 cups", "-2.5"),
        ("7, 1/2", "1/2"),
        ("0.3333333", "1/3"),
        ("50%", "50"),
        ("50 %", 0.5),
        (r"50\%", "50%"),
        ("-$5", "-5"),
        (".5", "0.5"),
        ("No.5", "5"),
        ("**42**", "First 6 * 7.\n#### 42"),
        ("9" * 999, "9" * 999),
        ("The area is 36 cm^2.", "36"),
        (r"36 \text{ cm}^{2}", "36"),
        ("5 m/s^{-2}", 5),
        (r"\frac{7}{2}", "3.5"),
        (r"2\frac{1}{2}", "2.5"),
        (r"-\dfrac{1}{2}", "-1/2"),
        ("1{,}234", 1234),
        (r"3.2 \times 10^{4}", 32000),
        (r"1.5 \cdot 10^{-2}", "0.015"),
        ("2 \N{MULTIPLICATION SIGN} 10^3", "2000"),
        ("10^4", "10000"),
        ("2^{10}", 1024),
        ("10^-2", "0.01"),
    ],
)
def test_the_last_number_is_the_answer(response, answer):
    assert last_number([response], [answer]) == [1]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("12, not 13", "12"),
        ("no number", "3"),
        ("", "3"),
        ("1/0", "0"),
        ("1/0", "1"),
        ("0.5%", "50%"),
        ("50%", "0.5%"),
        ("0.5%", "0.5%0"),
        ("x2", "2"),
        ("3 1/2", "2 1/2"),
        ("2 1/2", "1/2"),
        ("version 1.2.3", "3"),
        ("123456789", "123456790"),
        ("0.33333", "1/3"),
        ("1e999999999", "5"),
        ("1e-999999999", "0"),
        ("1e" + "9" * 100_000, "5"),
        ("9" * 100_000, "5"),
        ("1/" * 100_000, "5"),
        ("7 cm^2", "36 cm^2"),
        (r"\frac{7}{2}", r"\frac{3}{2}"),
        ("5{,}234", "1{,}234"),
        (r"3.2 \times 10^{4}", r"9.9 \times 10^{4}"),
        ("10^4", "10^5"),
        ("9^" + "9" * 100_000, "5"),
        ("99^999", "5"),
        ("0^-1", "0"),
    ],
    ids=lambda x: x[:12],
)
def test_the_last_number_is_not_the_answer(response, answer):
    started = time.perf_counter()
    assert last_number([response], [answer]) == [0]
    assert time.perf_counter() - started < 5


def test_the_tolerance_of_numbers():
    assert last_number(["3.14"], ["3.1416"], tolerance=0.01) == [1]
    assert last_number(["0.3"], ["0.30000001"], tolerance=0) == [0]
    with pytest.raises(UserError, match=r"tolerance must be .* but is 'x' \(str\)"):
        last_number([], [], tolerance="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", ["none", "1/0", "1e999999999", "99^999"])
def test_an_answer_without_a_number_is_the_datas_mistake(answer):
    with pytest.raises(UserError, match=f"the answer '{re.escape(answer)}' .* has no number"):
        last_number(["5"], [answer])


# Boxes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
        (r"\boxed{-\frac{1}{2}}", "-0.5"),
        (r"\boxed{\frac{-1}{2}}", "-0.5"),
        (r"\boxed{-\frac{-1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{-2}}", r"-\frac12"),
        (r"\boxed{1} or \boxed {2}", 2),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{\left( 3,\, 4 \right)}", "(3,4)"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{1{,}234{,}567}", 1234567),
        (r"\boxed{\{,\}}", r"\{ , \}"),
        (r"\boxed{1 1/2}", "1.5"),
        (r"\boxed{2\frac{1}{2}}", "5/2"),
        (r"\boxed{1 000}", "1000"),
        (r"\boxed{1\,234}", 1234),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{x = 5}", "x=5"),
        ("\\boxed{\N{MINUS SIGN}5}", "-5"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{90^{\circ}}", "90"),
        (r"\boxed{$5.}", "5"),
        (r"\boxed{3}", r"Thus $\boxed{3}$, as was to be shown."),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_the_last_box_is_the_answer(response, answer):
    assert boxed([response], [answer]) == [1]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("5", "5"),
        (r"\boxed{5} or \boxed{6}", "5"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{5\}", "5"),
        ("boxed{5}", "5"),
        (r"\boxed{2\frac{1}{2}}", "21/2"),
        (r"\boxed{2\frac{1}{2}}", "1/2"),
        (r"\boxed{\frac{1}{0}}", "0"),
        (r"\boxed{\frac{-1}{-2}}", "-1/2"),
        (r"\boxed{1{,}23}", "123"),
        (r"\boxed{1 1/2}", "11/2"),
        (r"\boxed{11/2}", "1 1/2"),
        (r"\boxed{1234}", "1, 234"),
        (r"\boxed{12}", "1 2"),
        (r"\boxed{" * 100_000, "5"),
    ],
    ids=lambda x: x[:24],
)
def test_the_last_box_is_not_the_answer(response, answer):
    assert boxed([response], [answer]) == [0]


@needs("math_verify")
@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"It is $\frac{1}{2}$.", "0.5", 1),
        ("Thus $x^2 + 2x + 1$", "(x+1)^2", 1),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
        ("the answer is 3", 3, 1),
        ("$x^2$", "x^3", 0),
        ("1/0", "1", 0),
        ("", "1", 0),
        ("5", None, 0),
    ],
)
def test_math_equal(response, answer, score):
    assert math_equal([response], [answer]) == [score]


@pytest.mark.parametrize(
    ("module", "call", "group"),
    [
        ("math_verify", lambda: math_equal([], []), "math"),
        ("jsonschema", lambda: json_schema([], schema={}), "json"),
    ],
)
def test_a_missing_package_is_named(module, call, group, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'ppo-engine\[{group}\]'"):
        call()


# Forms --------------------------------------------------------------------------------------------


def test_a_format_is_that_of_the_whole_response():
    pattern = "<think>.*</think>.*"
    responses = ["<think>a\nb</think>5", "so <think>a</think>5", "<think>a", ""]
    assert format_match(responses, pattern=pattern) == [1, 0, 0, 0]
    assert format_match(["7", "7 "], pattern="[0-9]") == [1, 0]


def test_a_pattern_without_end_is_stopped():
    started = time.perf_counter()
    assert format_match(["a" * 60 + "b", "aaa"], pattern="(a+)+") == [0, 1]
    assert time.perf_counter() - started < 10


def test_in_another_thread_a_pattern_has_no_alarm():
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(format_match(["a"], pattern="a")))
    thread.start()
    thread.join()
    assert found == [1]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", r"not a valid regular expression: .* '\('"), ([[0]], r"text, but is \[\[0\]\]")],
)
def test_a_pattern_that_is_none(pattern, message):
    with pytest.raises(UserError, match=message):
        format_match([], pattern=pattern)


@needs("jsonschema")
def test_json_of_a_schema():
    schema = {"required": ["a"], "properties": {"a": {"type": "integer"}}}
    good = ['{"a": 1}', ' {"a": 2, "b": []}\n']
    bad = [
        '{"a": "x"}',
        "{}",
        '{"a": 1, "b": NaN}',
        '{"a": 1',
        '{"a": 1} yes',
        "",
        '```json\n{"a": 1}\n```',
    ]
    bad += ["[" * 100_000, '{"a": ' + "1" * 5000 + "}"]
    assert json_schema(good, schema=schema) == [1] * len(good)
    assert json_schema(bad, schema=schema) == [0] * len(bad)
    assert json_schema(["1e400", "1.5"], schema={"multipleOf": 0.5}) == [0, 1]
    cents = {"multipleOf": 0.01}
    assert json_schema(["19.99", "19.98", "19.995", "3", '"a"'], schema=cents) == [1, 1, 0, 1, 1]
    assert json_schema(["0.3", "0.35", "1e-400"], schema={"multipleOf": 0.1}) == [1, 0, 1]


@needs("jsonschema")
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "int"}}}, r"not a valid JSON Schema: 'int' .* \$\.prop"),
        ("{}", r"schema must be a mapping, .* '\{\}' \(str\)"),
        (
            {"$schema": "https://json-schema.org/draft-07/schema#"},
            r"names no draft.*such as http://",
        ),
        ({"$schema": 7}, r"the \$schema 7 \(int\) names no draft"),
        ({"$schema": ["a"]}, "names no draft"),
    ],
)
def test_a_schema_that_is_none(schema, message):
    with pytest.raises(UserError, match=message):
        json_schema([], schema=schema)


@needs("jsonschema")
def test_a_pattern_in_a_schema_is_stopped_too():
    responses = [f'"{"a" * 60}b"', '"aaa"']
    started = time.perf_counter()
    assert json_schema(responses, schema={"pattern": "^(a+)+$"}) == [0, 1]
    assert time.perf_counter() - started < 10


PERSON = {"$ref": "#/$defs/person"}


@needs("jsonschema")
@pytest.mark.parametrize(
    "schema",
    [
        {**PERSON, "$defs": {"person": {"type": "integer"}}},
        {"items": PERSON, "$defs": {"person": {"items": PERSON}}, "type": "integer"},
        {"$id": "http://a/b", "$ref": "c", "$defs": {"person": {"$id": "c", "type": "integer"}}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "integer",
         "properties": {"a": {"$ref": "#/definitions/b"}}, "definitions": {"b": {}}},
        {"type": "integer", "not": {"$ref": "https://json-schema.org/draft/2020-12/schema"}},
        {"properties": {"$ref": {}}, "type": "integer"},
        {"enum": [1, PERSON]},
    ],
)  # fmt: skip
def test_a_reference_within_a_schema(schema):
    assert json_schema(["1", '"x"'], schema=schema) == [1, 0]


@needs("jsonschema")
@pytest.mark.parametrize(
    ("schema", "reference"),
    [
        (PERSON, "#/$defs/person"),
        ({"properties": {"a": {"items": PERSON}}}, "#/$defs/person"),
        ({"$ref": "#/x", "x": {"items": PERSON}}, "#/$defs/person"),  # of what is no subschema
        ({"$ref": "#/prefixItems/a", "prefixItems": [{}]}, "#/prefixItems/a"),
        ({"$ref": "#person"}, "#person"),
        ({"items": {"$ref": "other.json"}}, "other.json"),
    ],
)
def test_a_reference_that_leads_nowhere(schema, reference):
    with pytest.raises(
        UserError, match=rf"the \$ref {re.escape(repr(reference))} .* leads nowhere"
    ):
        json_schema([], schema=schema)


@needs("jsonschema")
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "allOf": [{"$ref": "#"}]},
        {"$ref": "#"}, {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#"}}},
    ],
)  # fmt: skip
def test_a_reference_in_a_circle(schema):
    with pytest.raises(UserError, match="leads back to itself"):
        json_schema(["1"], schema=schema)
    tree = {"type": ["array", "integer"], "items": {"$ref": "#"}}  # each round has a smaller value
    assert json_schema(["[1, [2, []]]", '["a"]'], schema=tree) == [1, 0]


@needs("jsonschema")
def test_a_reference_to_the_network_is_not_followed(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("it was fetched"))
    with pytest.raises(UserError, match=r"'http://localhost/a.json' .* is not fetched"):
        json_schema([], schema={"$ref": "http://localhost/a.json"})

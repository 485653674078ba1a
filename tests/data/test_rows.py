"""Files of rows: every accepted form, and every mistake named by file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from data_files import USER, write
from tiny import tiny_tokenizer

from ppo_engine.data.demonstrations import load_demonstrations
from ppo_engine.data.preferences import load_preferences
from ppo_engine.data.prompts import load_prompts, prompts_from_sequence
from ppo_engine.data.rows import read_jsonl
from ppo_engine.errors import UserError

GOOD = '{"prompt": "Say hello."}'
TEXT = tiny_tokenizer(chat_template=False)


def test_lines_are_numbered_and_blank_ones_passed_over(tmp_path: Path) -> None:
    for name in ("data.jsonl", "data.jsonl.gz"):
        file = write(tmp_path, '{"a": 1}', "", "  \r", '{"a": 2}\r', name=name)
        assert list(read_jsonl(file)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_unicode_line_separators_do_not_split_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive"
    file = write(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False).replace("\\u000b", " "))
    [(number, row)] = read_jsonl(file)
    assert number == 1 and row["prompt"].startswith("one\u2028two\u2029three\x85four")


def test_byte_order_mark_and_escaped_emoji_are_fine(tmp_path: Path) -> None:
    file = write(tmp_path, b'\xef\xbb\xbf{"prompt": "\\ud83d\\ude00"}')
    assert list(read_jsonl(file)) == [(1, {"prompt": "\U0001f600"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"  \r', "not valid JSON .* at column 15"),  # not column 1 of the next line
        ('{"prompt": "ä" "x"}', "not valid JSON .* at column 16"),
        ("{'prompt': 'x'}", "not valid JSON"),
        ('{"prompt": "x"} {"prompt": "y"}', "not valid JSON"),
        ('["x"]', "not a JSON object but list"),
        ("null", "not a JSON object"),
        ('{"prompt": "x", "margin": NaN}', r"not finite \(NaN\)"),
        ('{"prompt": "x", "margin": -Infinity}', r"not finite \(-Infinity\)"),
        ('{"prompt": "x", "margin": 1e999}', r"not finite \(1e999\)"),
        ('{"prompt": "x", "prompt": "y"}', "duplicate key 'prompt'"),
        ('{"prompt": "x", "meta": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        ('{"prompt": "\\ud800 x"}', "lone surrogate"),
        ('{"prompt": "x", "meta": [{"\\udfff": 1}]}', "lone surrogate"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"prompt": "x", "n": ' + "1" * 5000 + "}", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid UTF-8"),
    ],
)
def test_bad_line_is_named_by_file_and_line_or_skipped(
    tmp_path: Path, line: str | bytes, message: str
) -> None:
    file = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{message}"):
        list(read_jsonl(file))
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{message}.*on_bad_line=skip"):
        load_prompts(file, tokenizer=TEXT)
    examples, skipped = load_prompts(file, on_bad_line="skip", tokenizer=TEXT)
    assert len(examples) == 2 and skipped.total == 1
    assert "data.jsonl:2" in str(skipped) and str(skipped).startswith("1 skipped (1 ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"", b"\n\n  \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
            load_prompts(tmp_path / "empty.jsonl", tokenizer=TEXT)
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(tmp_path / "absent.jsonl", tokenizer=TEXT)
    with pytest.raises(UserError, match="folder"):
        list(read_jsonl(tmp_path))
    with pytest.raises(UserError, match=r"data\.path"):
        load_prompts("", tokenizer=TEXT)
    whole = write(tmp_path, *[GOOD] * 200, name="data.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    for name in ("cut", "plain"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz: broken gzip file"):
            load_prompts(tmp_path / f"{name}.jsonl.gz", tokenizer=TEXT)


def test_other_formats_are_named_and_capitals_are_no_other_format(tmp_path: Path) -> None:
    for name, ending in (("a.csv", ".csv"), ("a.JSONL.zst", ".zst"), ("b.tar.gz", ".tar.gz")):
        (tmp_path / name).write_text(GOOD)
        with pytest.raises(UserError, match=rf": {ending} files are not read: give JSONL, .*quet"):
            load_prompts(tmp_path / name, tokenizer=TEXT, on_bad_line="skip")
    for name in ("a.JSONL.GZ", "b.JSON"):
        text = write(tmp_path, GOOD, name="data.jsonl.gz").read_bytes()
        (tmp_path / name).write_bytes(text if name.endswith("GZ") else f"[{GOOD}]".encode())
        assert len(load_prompts(tmp_path / name, tokenizer=TEXT)[0]) == 1


def test_a_row_nested_too_deeply_is_skipped(tmp_path: Path) -> None:
    nested = f'{{"prompt": "Hi", "k": {"[" * 900}{"]" * 900}}}'
    examples, skipped = load_prompts(
        write(tmp_path, GOOD, nested), tokenizer=TEXT, on_bad_line="skip"
    )
    assert len(examples) == 1 and "nested too deeply" in str(skipped)


def test_values_of_numpy_and_missing_ones(tmp_path: Path) -> None:
    """As a DataFrame's `to_dict("records")` has them, of a parquet file too."""
    chat = np.array([USER, {"role": "assistant", "content": "Yes."}], dtype=object)
    rows = [
        {"messages": chat, "prompt": math.nan, "response": math.nan, "tools": np.array([])},
        {"messages": np.float64("nan"), "prompt": "Hi", "response": "Yes.", "system": math.nan},
    ]
    examples, skipped = load_demonstrations(rows, tokenizer=tiny_tokenizer())
    assert [e.response for e in examples] == [[{"role": "assistant", "content": "Yes."}], "Yes."]
    assert not skipped.notes("Examples")
    ranked = {"prompt": "Hi", "responses": np.array(["a", "b"]), "ranks": np.array([2, 1])}
    plain = {"prompt": "Hi", "responses": ["a", "b"], "ranks": [2, 1]}
    [ranking], _ = load_preferences([ranked], tokenizer=TEXT)
    assert ranking == load_preferences([plain], tokenizer=TEXT)[0][0]
    # What a reward function is to read reaches it as it is.
    [example], _ = prompts_from_sequence(
        [{"prompt": "Hi", "k": np.float64("nan"), "v": np.zeros(2)}], tokenizer=TEXT
    )
    assert math.isnan(example.columns["k"]) and isinstance(example.columns["v"], np.ndarray)


# Files that are one array


def test_elements_of_an_array_are_numbered(tmp_path: Path) -> None:
    for name in ("data.json", "data.json.gz"):
        file = write(tmp_path, ' [ {"prompt": "a"} ,', "", '{"prompt": "[b, ]"}]', "", name=name)
        examples, _ = load_prompts(file, tokenizer=TEXT)
        assert [(e.prompt, e.place) for e in examples] == [
            ("a", f"{file}[0]"),
            ("[b, ]", f"{file}[1]"),
        ]


def test_a_file_of_lines_may_be_called_json(tmp_path: Path) -> None:
    examples, _ = load_prompts(write(tmp_path, GOOD, GOOD, name="data.json"), tokenizer=TEXT)
    assert [example.place[-2:] for example in examples] == [":1", ":2"]


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ('["x"]', "not a JSON object but list"),
        ('{"prompt": "x", "margin": NaN}', r"not finite \(NaN\)"),
        ('{"prompt": "x", "margin": 1e999}', r"not finite \(1e999\)"),
        ('{"prompt": "x", "meta": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        ('{"prompt": "\\ud800 x"}', "lone surrogate"),
        ('{"prompt": "x", "n": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"prompt": ""}', "empty prompt"),
    ],
)
def test_bad_element_is_named_or_skipped(tmp_path: Path, element: str, message: str) -> None:
    file = write(tmp_path, f"[{GOOD}, {element}, {GOOD}]", name="data.json")
    with pytest.raises(UserError, match=rf"data\.json\[1\]: .*{message}"):
        load_prompts(file, tokenizer=TEXT)
    examples, skipped = load_prompts(file, on_bad_line="skip", tokenizer=TEXT)
    assert [e.place[-3:] for e in examples] == ["[0]", "[2]"] and skipped.total == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is empty"),
        (f"[{GOOD},\n{GOOD}", r"data\.json:\d: not valid JSON"),
        (f"[{GOOD},\n]", r"data\.json:2: not valid JSON"),
        (f"[{GOOD}\n{GOOD}]", r"data\.json:2: not valid JSON \(expecting ',' or '\]'\)"),
        (f"[{GOOD}]\n{GOOD}", r"data\.json:2: not valid JSON \(extra data"),
        (f"[{GOOD}, {{'a': 1}}]", r"data\.json:1: not valid JSON"),
        (f"[{GOOD}, " + "[" * 100_000 + "]" * 100_000 + "]", r"data\.json\[1\]: nested too deeply"),
        (b'[{"prompt": "\xff"}]', "not valid UTF-8"),
    ],
)
def test_array_that_cannot_be_gone_on_with(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, content, name="data.json"), on_bad_line="skip", tokenizer=TEXT)


def test_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional group `data` is not installed")
    rows = datasets.Dataset.from_list([{"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}])
    rows.to_parquet(str(tmp_path / "data.parquet"))
    rows.to_parquet(str(tmp_path / "DATA.PARQUET"))
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "splits"))
    for source in ("data.parquet", "DATA.PARQUET", "saved", "splits"):
        examples, _ = load_prompts(tmp_path / source, tokenizer=TEXT)
        assert [example.prompt for example in examples] == ["a", "b"]
        assert examples[1].columns == {"k": 2} and examples[1].place.endswith("row 1")
    assert prompts_from_sequence(rows, tokenizer=TEXT)[0][0].prompt == "a"
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        load_prompts(tmp_path / "broken.parquet", tokenizer=TEXT)
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "test-only"))
    with pytest.raises(UserError, match="no 'train'"):
        load_prompts(tmp_path / "test-only", tokenizer=TEXT)


def test_data_sets_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ppo-engine\[data\]'"):
        load_prompts(tmp_path, tokenizer=TEXT)


def test_what_arrow_fills_in_is_not_part_of_a_message(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional group `data` is not installed")
    call = {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
    other = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    rows = [
        {"prompt": [USER, {"role": "assistant", "content": None, "tool_calls": [made]},
                    {"role": "tool", "content": "12", "tool_call_id": "1"}]}
        for made in (call, other)
    ] + [{"prompt": [USER]}]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "data.parquet"))
    examples, _ = load_prompts(tmp_path / "data.parquet", tokenizer=tiny_tokenizer())
    first, second, third = (example.prompt for example in examples)
    assert first[1] == {"role": "assistant", "content": "",
                        "tool_calls": [{"type": "function", **call}]}  # fmt: skip
    assert second[1]["tool_calls"] == [{"type": "function", **other}]
    assert second[2] == {"role": "tool", "content": "12", "tool_call_id": "1"}
    assert third == [USER]

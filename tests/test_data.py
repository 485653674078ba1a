"""Data files: every accepted form, and every mistake named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from ppo_engine.data.preferences import Ranking, load_preferences, sample_rankings
from ppo_engine.data.prompts import (
    PromptExample,
    limit_prompts,
    load_prompts,
    prompts_from_sequence,
)
from ppo_engine.data.rows import read_jsonl
from ppo_engine.data.split import split_by_prompt
from ppo_engine.errors import UserError

HH_FILE = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf" / "preferences.jsonl.gz"
CHAT = tiny_tokenizer()
TEXT = tiny_tokenizer(chat_template=False)
GOOD = '{"prompt": "Say hello."}'
USER = {"role": "user", "content": "Name a color."}
BLUE = {"role": "assistant", "content": "Blue."}
RED = {"role": "assistant", "content": "Red."}


def write(tmp_path: Path, *lines: str | bytes | dict[str, Any], name: str = "data.jsonl") -> Path:
    file = tmp_path / name
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line))
        for line in lines
    ]
    content = b"\n".join(line.encode() if isinstance(line, str) else line for line in raw) + b"\n"
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


# Reading lines


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
        ('{"prompt": "x"', "not valid JSON"),
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
        load_prompts(file)
    examples, skipped = load_prompts(file, on_bad_line="skip")
    assert len(examples) == 2 and skipped.total == 1
    assert "data.jsonl:2" in str(skipped) and str(skipped).startswith("1 skipped (1 ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (b"", b"\n\n  \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
            load_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="folder"):
        list(read_jsonl(tmp_path))
    with pytest.raises(UserError, match=r"data\.path"):
        load_prompts("")
    whole = write(tmp_path, *[GOOD] * 200, name="data.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    for name in ("cut", "plain"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz: broken gzip file"):
            load_prompts(tmp_path / f"{name}.jsonl.gz")


# Files that are one array


def test_elements_of_an_array_are_numbered(tmp_path: Path) -> None:
    for name in ("data.json", "data.json.gz"):
        file = write(tmp_path, ' [ {"prompt": "a"} ,', "", '{"prompt": "[b, ]"}]', "", name=name)
        examples, _ = load_prompts(file)
        assert [(e.prompt, e.place) for e in examples] == [
            ("a", f"{file}[0]"),
            ("[b, ]", f"{file}[1]"),
        ]


def test_a_file_of_lines_may_be_called_json(tmp_path: Path) -> None:
    examples, _ = load_prompts(write(tmp_path, GOOD, GOOD, name="data.json"))
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
        load_prompts(file)
    examples, skipped = load_prompts(file, on_bad_line="skip")
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
        load_prompts(write(tmp_path, content, name="data.json"), on_bad_line="skip")


# Prompts


def test_prompts_as_text_and_messages_keep_their_columns(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "Hi", "answer": 42}, {"prompt": [USER]})
    examples, skipped = load_prompts(file)
    assert examples == [
        PromptExample("Hi", {"answer": 42}, f"{file}:1"),
        PromptExample([USER], {}, f"{file}:2"),
    ]
    assert skipped.total == 0 and str(skipped) == "no lines skipped"


BAD_PROMPTS = [
    ({"text": "x"}, "no column 'prompt' (columns: 'text')"),
    ({"prompt": ""}, "empty prompt"),
    ({"prompt": " \n"}, "empty prompt"),
    ({"prompt": None}, "must be text or chat messages, not null"),
    ({"prompt": 3}, "must be text or chat messages, not int"),
    ({"prompt": []}, "empty list"),
    ({"prompt": ["hello"]}, "without 'role' and 'content' (message 0)"),
    ({"prompt": [{"role": "user"}]}, "without 'role' and 'content'"),
    ({"prompt": [{"role": "user", "content": None}]}, "must be text, not null"),
    ({"prompt": [{"role": 1, "content": "x"}]}, "must be text, not int"),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "must be text, not list"),
    ({"prompt": [USER, BLUE]}, "last message is the assistant's"),
    ({"prompt": [{"role": "user", "content": " "}]}, "empty prompt"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PROMPTS)
def test_bad_prompts(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write(tmp_path, GOOD, row)
    with pytest.raises(UserError) as caught:
        load_prompts(file)
    assert "data.jsonl:2" in str(caught.value) and message in str(caught.value)
    with pytest.raises(UserError) as caught:
        prompts_from_sequence(["fine", row])
    assert "prompts[1]" in str(caught.value) and message in str(caught.value)
    examples, skipped = load_prompts(file, on_bad_line="skip")
    assert len(examples) == 1 and skipped.total == 1
    with pytest.raises(UserError, match=r"No usable prompt in .*1 skipped"):
        load_prompts(write(tmp_path, row), on_bad_line="skip")


def test_prompts_from_python() -> None:
    examples, _ = prompts_from_sequence(["a", [USER], {"prompt": "b", "k": 1}])
    assert [example.prompt for example in examples] == ["a", [USER], "b"]
    assert examples[2].columns == {"k": 1}
    with pytest.raises(UserError, match=r"prompts\[0\]: lone surrogate"):
        prompts_from_sequence(["\ud800"])
    with pytest.raises(UserError, match="No usable prompt"):
        prompts_from_sequence([])


def test_over_long_prompt_says_where_how_long_and_what_to_do() -> None:
    examples, _ = prompts_from_sequence(["short", "x" * 50])
    with pytest.raises(UserError) as caught:
        limit_prompts(examples, TEXT, 49)
    for part in ("prompts[1]", "50 tokens", "data.max_prompt_tokens = 49", "on_bad_line=skip"):
        assert part in str(caught.value)
    assert limit_prompts(examples, TEXT, 50)[0] == examples
    kept, skipped = limit_prompts(examples, TEXT, 49, on_bad_line="skip")
    assert kept == examples[:1] and skipped.reasons == {"prompt too long": 1}
    with pytest.raises(UserError, match="No usable prompt is left: 2 skipped"):
        limit_prompts(examples, TEXT, 1, on_bad_line="skip")


def test_the_template_counts_towards_the_length() -> None:
    examples, _ = prompts_from_sequence([[{"role": "user", "content": "hi"}]])
    rendered = len("<user\nhi<\n<assistant\n")  # one token per byte, one per special token
    assert limit_prompts(examples, CHAT, rendered)[0] == examples
    with pytest.raises(UserError, match=f"{rendered} tokens"):
        limit_prompts(examples, CHAT, rendered - 1)


def test_messages_without_a_chat_template() -> None:
    examples, _ = prompts_from_sequence(["text", [USER]])
    with pytest.raises(UserError, match="no chat template"):
        limit_prompts(examples, TEXT, 100, on_bad_line="skip")


def test_prompt_that_the_template_refuses() -> None:
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    examples, _ = prompts_from_sequence([[USER, USER]])
    with pytest.raises(UserError, match=r"prompts\[0\]: refused .*roles must alternate"):
        limit_prompts(examples, strict, 100)


# Preferences

DIALOGUE = "\n\nHuman: Name a color.\n\nAssistant: Any?\n\nHuman: Yes.\n\nAssistant:"
DIALOGUE_MESSAGES = [
    USER,
    {"role": "assistant", "content": "Any?"},
    {"role": "user", "content": "Yes."},
]
PAIR = {"chosen": "Blue.", "rejected": "Red."}


def pair(prompt: Any, chosen: str, rejected: str, margin: float | None = None) -> Ranking:
    return Ranking(prompt, (chosen, rejected), (0, 1), margin)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q: ", **PAIR}, pair("Q: ", "Blue.", "Red.")),
        ({"prompt": [USER], **PAIR, "margin": 2}, pair([USER], "Blue.", "Red.", 2.0)),
        ({"prompt": None, **PAIR}, pair("", "Blue.", "Red.")),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            pair("The sky is", " blue.", " black."),
        ),
        (
            {"chosen": "The sky is", "rejected": "The sky is black."},
            pair("The sky", " is", " is black."),
        ),
        ({"chosen": [USER, BLUE], "rejected": [USER, RED]}, pair([USER], "Blue.", "Red.")),
        (
            {"prompt": [USER], "chosen": [BLUE], "rejected": [RED]},
            pair([USER], "Blue.", "Red."),
        ),
        (
            {"prompt": "Name a color.", "chosen": [BLUE], "rejected": [RED]},
            pair([USER], "Blue.", "Red."),
        ),
        (
            {"prompt": "Name a color.", "chosen": [USER, BLUE], "rejected": [USER, RED]},
            pair([USER], "Blue.", "Red."),
        ),
        (
            {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, RED]},
            pair([USER], "Blue.", "Red."),
        ),
        (
            {"chosen": f"{DIALOGUE} Blue.", "rejected": f"{DIALOGUE} Red."},
            pair(DIALOGUE_MESSAGES, "Blue.", "Red."),
        ),
        (
            {"prompt": DIALOGUE, "chosen": " Blue.", "rejected": " Red."},
            pair(DIALOGUE_MESSAGES, " Blue.", " Red."),
        ),
        (  # as in a few real dialogues: paragraphs of one speaker, each with its name
            {"chosen": f"{DIALOGUE} Blue.\n\nAssistant: Sky.", "rejected": f"{DIALOGUE}"},
            pair(DIALOGUE_MESSAGES, "Blue.\n\nSky.", ""),
        ),
    ],
)
def test_forms_of_preferences(row: dict[str, Any], expected: Ranking) -> None:
    assert load_preferences([row], tokenizer=CHAT)[0] == [expected]


def test_dialogues_stay_text_without_a_chat_template() -> None:
    row = {"chosen": f"{DIALOGUE} Blue.", "rejected": f"{DIALOGUE} Red."}
    assert load_preferences([row], tokenizer=TEXT)[0] == [pair(DIALOGUE, " Blue.", " Red.")]


def test_neighboring_turns_of_one_speaker_are_joined() -> None:
    start = "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant:"
    [ranking], _ = load_preferences(
        [{"chosen": f"{start} A", "rejected": f"{start} B"}], tokenizer=CHAT
    )
    assert ranking.prompt == [{"role": "user", "content": "One.\n\nTwo."}]


@pytest.mark.parametrize(
    ("responses", "ranks", "expected", "pairs"),
    [
        ("dabcx", [3, 1, 2, 2, -1], Ranking("Q", tuple("abcd"), (0, 1, 1, 2)), 5),
        ("ab", [7.5, 2], Ranking("Q", ("b", "a"), (0, 1)), 1),
        ("abc", [1, None, 0], Ranking("Q", ("c", "a"), (0, 1)), 1),
        ("aab", [0, 0, 1], Ranking("Q", tuple("aab"), (0, 0, 1)), 2),  # sampled twice
    ],
)
def test_rankings_stay_whole(responses: str, ranks: list, expected: Ranking, pairs: int) -> None:
    row = {"prompt": "Q", "responses": list(responses), "ranks": ranks}
    [found], _ = load_preferences([row], tokenizer=TEXT)
    assert found == expected and found.pairs == pairs


def test_a_response_that_was_not_ranked_may_be_missing() -> None:
    row = {"prompt": "Q", "responses": ["a", None, "b"], "ranks": [0, None, 1], "margin": 2}
    assert load_preferences([row], tokenizer=TEXT)[0] == [pair("Q", "a", "b", 2.0)]


def test_all_ranks_equal_is_counted_and_no_mistake() -> None:
    rows = [
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, None]},
        {"prompt": "Q", **PAIR},
    ]
    rankings, skipped = load_preferences(rows, tokenizer=TEXT)
    assert len(rankings) == 1
    assert skipped.reasons == {"no two responses with different ranks": 2}


def test_a_sample_holds_whole_rankings_of_at_most_so_many_pairs() -> None:
    rankings = [Ranking(f"Q{n}", tuple("abcd"), (0, 1, 2, 3)) for n in range(20)]
    rankings += [pair(f"P{n}", "a", "b") for n in range(20)]
    for limit in (1, 25, 100):
        found = sample_rankings(rankings, limit, seed=0)
        assert limit - 6 < sum(ranking.pairs for ranking in found) <= limit
        assert sorted(found, key=rankings.index) == found
        assert sample_rankings(rankings, limit, seed=0) == found
    assert sample_rankings(rankings, 25, seed=1) != sample_rankings(rankings, 25, seed=0)
    assert sample_rankings(rankings, 140, seed=0) == rankings
    with pytest.raises(UserError, match=r"max_pairs=5 is less .*\(6 at least\)"):
        sample_rankings(rankings[:20], 5, seed=0)
    rare = [*rankings[:20] * 5, *rankings[20:25]]  # the few that fit are found
    assert all(sample_rankings(rare, 5, seed=n) == rankings[20:25] for n in range(9))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "a"}, "no column 'rejected' (columns: 'prompt', 'chosen')"),
        ({"question": "Q"}, "no column 'chosen'"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are the same"),
        ({"chosen": [USER, RED], "rejected": [USER, RED]}, "chosen and rejected are the same"),
        ({"chosen": DIALOGUE + " A", "rejected": DIALOGUE + " A"}, "are the same"),
        ({"prompt": "", **PAIR}, "empty prompt"),
        ({"prompt": "Q", "chosen": None, "rejected": "a"}, "'chosen' must be text or chat"),
        ({"prompt": "Q", "chosen": "a", "rejected": 3}, "must be text or chat messages"),
        ({"prompt": "Q", "chosen": "a", "rejected": [RED]}, "must be text or chat messages"),
        ({"prompt": "Q", **PAIR, "margin": "1"}, "'margin' must be a finite number, not '1'"),
        ({"prompt": "Q", **PAIR, "margin": True}, "'margin' must be a finite number"),
        ({"chosen": [USER, BLUE], "rejected": [USER]}, "'rejected' is not the assistant's"),
        ({"chosen": [BLUE], "rejected": [RED]}, "no prompt"),
        (
            {"chosen": [USER, BLUE], "rejected": [{**USER, "content": "?"}, RED]},
            "every message but the last",
        ),
        (
            {"chosen": DIALOGUE + " A", "rejected": "\n\nHuman: Else.\n\nAssistant: B"},
            "every turn but the last",
        ),
        (
            {"chosen": DIALOGUE + " A\n\nHuman: More?", "rejected": DIALOGUE + " B"},
            "the last turn of 'chosen' is not the assistant's",
        ),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1]}, "(2 and 1)"),
        ({"prompt": "Q", "responses": ["a", "b"]}, "no column 'ranks'"),
        ({"prompt": "Q", "responses": "ab", "ranks": [1, 2]}, "'responses' must be a list"),
        (
            {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, "2"]},
            "must be numbers or null, not '2'",
        ),
        ({"prompt": "Q", "responses": ["a", 5], "ranks": [1, 2]}, "must be text, not int"),
        ({"prompt": "Q", "responses": ["a", "a"], "ranks": [1, 2]}, "are the same"),
        ({"responses": ["a", "b"], "ranks": [1, 2]}, "no column 'prompt'"),
        (
            {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [1, 2, 2], "margin": 1},
            "'margin' belongs to a pair; 3 responses are ranked",
        ),
    ],
)
def test_bad_preferences(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write(tmp_path, {"prompt": "Q", **PAIR}, row)
    with pytest.raises(UserError) as caught:
        load_preferences(file, tokenizer=CHAT)
    assert "data.jsonl:2: " in str(caught.value) and message in str(caught.value)
    pairs, skipped = load_preferences(file, tokenizer=CHAT, on_bad_line="skip")
    assert len(pairs) == 1 and skipped.total == 1
    with pytest.raises(UserError, match="No usable preference pair"):
        load_preferences([row], tokenizer=CHAT, on_bad_line="skip")


def test_bad_preference_rows_from_python() -> None:
    with pytest.raises(UserError, match=r"preferences\[0\]: .*dictionary, not str"):
        load_preferences(["text"], tokenizer=CHAT)
    with pytest.raises(UserError, match="finite number, not nan"):
        load_preferences([{"prompt": "Q", **PAIR, "margin": float("nan")}], tokenizer=CHAT)


def test_preference_messages_without_a_chat_template() -> None:
    row = {"chosen": [USER, BLUE], "rejected": [USER, RED]}
    with pytest.raises(UserError, match="no chat template"):
        load_preferences([row], tokenizer=TEXT, on_bad_line="skip")


@pytest.mark.skipif(not HH_FILE.exists(), reason="the HH-RLHF pairs are not beside the checkout")
@pytest.mark.parametrize("tokenizer", [CHAT, TEXT], ids=["chat", "text"])
def test_every_real_hh_pair_loads(tokenizer: Any) -> None:
    pairs, skipped = load_preferences(HH_FILE, tokenizer=tokenizer)
    assert len(pairs) == 2000 and skipped.total == 0
    for pair in pairs:
        if isinstance(pair.prompt, str):
            assert pair.prompt.endswith("\n\nAssistant:")
        else:
            roles = [message["role"] for message in pair.prompt]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


# Splitting


def test_split_keeps_prompts_apart_and_repeats() -> None:
    pairs = [pair(f"prompt {n % 20}", f"good {n}", f"bad {n}") for n in range(100)]
    training, held_out = split_by_prompt(pairs, 0.2, seed=1)
    assert len(held_out) == 20 and len(training) == 80
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    assert sorted(training + held_out, key=pairs.index) == pairs
    assert split_by_prompt(pairs, 0.2, seed=1) == (training, held_out)
    assert split_by_prompt(pairs, 0.2, seed=2)[1] != held_out


def test_split_by_messages_and_without_prompts() -> None:
    chats = [pair([{**USER, "content": str(n % 2)}], f"a{n}", f"b{n}") for n in range(10)]
    training, held_out = split_by_prompt(chats, 0.1, seed=0)
    assert len(training) == len(held_out) == 5
    bare = [pair("", f"a{n}", f"b{n}") for n in range(10)]
    training, held_out = split_by_prompt(bare, 0.3, seed=0)
    assert len(training) == 7 and len(held_out) == 3


def test_one_large_prompt_does_not_swallow_the_training_set() -> None:
    pairs = [pair("large" if n < 90 else str(n), f"a{n}", f"b{n}") for n in range(100)]
    for seed in range(5):
        assert len(split_by_prompt(pairs, 0.1, seed)[1]) == 10


def test_too_few_to_split() -> None:
    pairs = [pair("one", "a", "b"), pair("one", "c", "d")]
    with pytest.raises(UserError, match=r"2 examples over 1 prompts are too few"):
        split_by_prompt(pairs, 0.5, seed=0)
    assert split_by_prompt(pairs, 0.0, seed=0) == (pairs, [])


# Data sets


def test_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional group `data` is not installed")
    rows = datasets.Dataset.from_list([{"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}])
    rows.to_parquet(str(tmp_path / "data.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "splits"))
    for source in ("data.parquet", "saved", "splits"):
        examples, _ = load_prompts(tmp_path / source)
        assert [example.prompt for example in examples] == ["a", "b"]
        assert examples[1].columns == {"k": 2} and examples[1].place.endswith("row 1")
    assert prompts_from_sequence(rows)[0][0].prompt == "a"
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        load_prompts(tmp_path / "broken.parquet")
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "test-only"))
    with pytest.raises(UserError, match="no 'train'"):
        load_prompts(tmp_path / "test-only")


def test_data_sets_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ppo-engine\[data\]'"):
        load_prompts(tmp_path)

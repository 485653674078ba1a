"""Preferences: pairs and rankings in every accepted form, and what is held out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import BLUE, RED, USER, write
from tiny import tiny_tokenizer

from ppo_engine.data.preferences import Ranking, load_preferences, sample_rankings
from ppo_engine.data.split import split_by_prompt
from ppo_engine.errors import UserError

HH_FILE = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "preferences.jsonl.gz"
CHAT = tiny_tokenizer()
TEXT = tiny_tokenizer(chat_template=False)


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
            pair(DIALOGUE_MESSAGES, "Blue.", "Red."),
        ),
        (  # whole dialogues beside their prompt
            {
                "prompt": DIALOGUE,
                "chosen": f"{DIALOGUE} Blue.",
                "rejected": f"{DIALOGUE} Red.",
            },
            pair(DIALOGUE_MESSAGES, "Blue.", "Red."),
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
        ("aab", [0, 0, 1], Ranking("Q", tuple("ab"), (0, 1)), 1),  # sampled twice
    ],
)
def test_rankings_stay_whole(responses: str, ranks: list, expected: Ranking, pairs: int) -> None:
    row = {"prompt": "Q", "responses": list(responses), "ranks": ranks}
    [found], _ = load_preferences([row], tokenizer=TEXT)
    assert found == expected and found.pairs == pairs


def test_a_response_that_was_not_ranked_may_be_missing() -> None:
    row = {"prompt": "Q", "responses": ["a", None, "b"], "ranks": [0, None, 1], "margin": 2}
    assert load_preferences([row], tokenizer=TEXT)[0] == [pair("Q", "a", "b", 2.0)]


def test_candidates_say_which_of_them_were_cut_short() -> None:
    row = {"prompt": "Q", "responses": [*"abc"], "ranks": [2, None, 1]}
    [found], _ = load_preferences([row | {"finished": [False, None, True]}], tokenizer=TEXT)
    assert found.responses == ("c", "a") and found.finished == (True, False)
    assert load_preferences([row], tokenizer=TEXT)[0][0].finished is None


def test_all_ranks_equal_is_counted_and_no_mistake() -> None:
    rows = [
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, None]},
        {"prompt": "Q", **PAIR},
    ]
    rankings, skipped = load_preferences(rows, tokenizer=TEXT)
    assert len(rankings) == 1
    assert skipped.reasons == {"no two responses with different ranks": 2}


def test_of_equal_responses_the_best_rank_counts() -> None:
    row = {"prompt": "Q", "responses": [*"babca"], "ranks": [3, 2, 1, 4, 5]}
    rows = [row, row | {"finished": [True, True, False, False, True]}, {"prompt": "Q", **PAIR}]
    rows.append({"prompt": "Q", "responses": ["a", "a"], "ranks": [1, 2]})
    [plain, cut, _], report = load_preferences(rows, tokenizer=TEXT)
    assert (plain.responses, plain.ranks) == (("b", "a", "c"), (0, 1, 2))
    # One that was cut short is another one: it is scored without its end.
    assert (cut.responses, cut.ranks) == (("b", "a", "b", "c"), (0, 1, 2, 3))
    assert cut.finished == (False, True, True, False)
    assert report.notes("Preferences") == [
        "Preferences: 1 skipped (1 all of the ranked responses are equal), for instance "
        "preferences[3]: all of the ranked responses are equal.",
        "Preferences: of equal responses the one with the best rank counts (2 rows).",
    ]


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
    with pytest.raises(UserError, match=r"max_pairs=5 is less .*\(at least 6\)"):
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
        ({"prompt": "Q", "chosen": "a", "rejected": [RED]}, "must both be text, or both messages"),
        ({"prompt": "Q", **PAIR, "margin": "1"}, "'margin' must be a finite number, not '1'"),
        ({"prompt": "Q", **PAIR, "margin": True}, "'margin' must be a finite number"),
        ({"chosen": [USER, BLUE], "rejected": [USER]}, "'rejected' is not the assistant's"),
        ({"chosen": [BLUE], "rejected": [RED]}, "no prompt"),
        ({"title": "A color?", "chosen": "Blue.", "rejected": "Red."}, "but a column 'title'"),
        ({"title": "A color?", "chosen": "I say blue.", "rejected": "I say red."}, "'title'"),
        ({"Question ": "Color?", "chosen": "Blue.", "rejected": "Red."}, "a column 'Question '"),
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
        (
            {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2], "finished": [True]},
            "'responses' and 'finished' differ in length (2 and 1)",
        ),
        (
            {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2], "finished": [True, 0]},
            "'finished' must be true or false, not 0",
        ),
        (
            {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2], "finished": True},
            "'finished' must be a list, not bool",
        ),
        ({"prompt": "Q", "responses": "ab", "ranks": [1, 2]}, "'responses' must be a list"),
        (
            {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, "2"]},
            "must be numbers or null, not '2'",
        ),
        ({"prompt": "Q", "responses": ["a", 5], "ranks": [1, 2]}, "text or messages, not int"),
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


def test_whole_texts_may_have_columns_beside_them() -> None:
    rows = [{"chosen": "A color? Blue.", "rejected": "A color? Red."}]
    for more in ({"text": "A color?"}, {"source": "humans"}, {"Question": " "}, {"n": 3}):
        [ranking], _ = load_preferences([rows[0] | more], tokenizer=tiny_tokenizer())
        assert ranking.prompt == "A color?"


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


@pytest.mark.parametrize(("number", "better"), [(0, "x"), (1.0, "y"), (True, "y")])
def test_which_of_two_responses_is_better_by_its_number(
    tmp_path: Path, number: object, better: str
) -> None:
    row = {"prompt": "a", "response_0": "x", "response_1": "y", "better_response_id": number}
    [found], _ = load_preferences(write(tmp_path, row), tokenizer=tiny_tokenizer())
    assert found.responses[0] == better


def test_a_dialogue_is_one_whether_its_prompt_stands_apart_or_not(tmp_path: Path) -> None:
    whole = {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"}
    apart = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " c", "rejected": " r"}
    ranked = {"prompt": apart["prompt"], "responses": [" c", " r"], "ranks": [0, 1]}
    for row in (whole, apart, ranked):
        [found], _ = load_preferences(write(tmp_path, row), tokenizer=tiny_tokenizer())
        assert found.prompt == [{"role": "user", "content": "q"}]
        assert found.responses == ("c", "r")
    with pytest.raises(UserError, match="chosen and rejected are the same"):
        load_preferences(write(tmp_path, apart | {"rejected": "c"}), tokenizer=tiny_tokenizer())
    plain = {"prompt": "q", "chosen": " c", "rejected": " r"}  # whose spaces are its own
    [found], _ = load_preferences(write(tmp_path, plain), tokenizer=tiny_tokenizer())
    assert found.responses == (" c", " r")

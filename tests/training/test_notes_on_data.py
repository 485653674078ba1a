"""What a run says of its data: text that a chat model reads raw, columns that nobody reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_files import BLUE, RED, USER, write
from templates import qwen3, r1
from tiny import tiny_model_folder, tiny_tokenizer
from trainers import PROMPTS, config, length_reward

from ppo_engine import PPOTrainer, RewardModelTrainer, SFTTrainer
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.rewards.weighted import Rewards
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    EvaluationConfig,
    PreferenceDataConfig,
    PromptDataConfig,
    RewardEndpointConfig,
    RewardModelConfig,
    SFTConfig,
)

RAW = "are plain text, which the model reads as it is"
UNREAD = "nothing reads these columns"
QUESTION = {"question": "Name a color.", "source": "x"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def sft(model: str, rows: Any, tokenizer: Any, **data: Any) -> Any:
    settings = SFTConfig(data=DemonstrationDataConfig(eval_fraction=0, **data))
    return SFTTrainer(model, rows, settings, tokenizer)


def reward(model: str, rows: Any, tokenizer: Any, **data: Any) -> Any:
    settings = RewardModelConfig(data=PreferenceDataConfig(eval_fraction=0, **data))
    return RewardModelTrainer(model, rows, settings, tokenizer)


def ppo(model: str, rows: Any, tokenizer: Any, function: Any = length_reward, **data: Any) -> Any:
    settings = replace(config(Path("absent")), data=PromptDataConfig(**data))
    return PPOTrainer(model, function, rows, config=settings, tokenizer=tokenizer)


def noted(made: Any, text: str) -> list[str]:
    return [note for note in made.notes if text in note]


@pytest.mark.parametrize(
    ("make", "text", "chat"),
    [
        (sft, {"response": "Blue."}, {"messages": [USER, BLUE]}),
        (reward, {"chosen": "Blue.", "rejected": "Red."},
         {"chosen": [USER, BLUE], "rejected": [USER, RED]}),
        (ppo, {}, {"prompt": [USER]}),
    ],
)  # fmt: skip
def test_text_for_a_chat_model(
    model: str, make: Any, text: dict[str, Any], chat: dict[str, Any]
) -> None:
    rows = [QUESTION | text, QUESTION | text, chat]
    [note] = noted(make(model, rows, tiny_tokenizer()), RAW)
    assert note.startswith("2 of 3 ") and "data.as_chat=true" in note
    assert noted(make(model, rows[:2], tiny_tokenizer(chat_template=False)), RAW) == []
    wrapped = make(model, rows, tiny_tokenizer(), as_chat=True)
    assert noted(wrapped, RAW) == []
    examples = wrapped.examples if make is ppo else wrapped.training
    shown = (e.prompt if make is ppo else getattr(e, "ids", None) or e.rows for e in examples)
    assert len({str(x) for x in shown}) == 1  # the text became the chat
    [note] = noted(wrapped, UNREAD)
    assert note.endswith("'source' (2 rows).")


@pytest.mark.parametrize("make", [qwen3, r1])
@pytest.mark.parametrize(
    "pair",
    [
        [{**answer, "reasoning_content": "I see."} for answer in (BLUE, RED)],
        [f"<think>\nI see.\n</think>\n\n{answer['content']}" for answer in (BLUE, RED)],
    ],
)
def test_thoughts_that_a_reward_model_does_not_read(tmp_path: Path, make: Any, pair: Any) -> None:
    folder = tiny_model_folder(tmp_path, tokenizer=make())
    rows = [{"prompt": [USER], "chosen": pair[0], "rejected": pair[1]}]
    rows += [{"prompt": [USER], "chosen": "Blue", "rejected": "</think>"}]
    found = noted(reward(folder, rows, make()), "leaves out the thoughts")
    assert len(found) == (make is r1)
    assert all(note.startswith("Of 2 training preferences ") for note in found)


def test_columns_that_no_reward_and_no_environment_asks_for(model: str) -> None:
    def by_source(prompts, responses, source):
        return [0.0] * len(responses)

    def anything(prompts, responses, **columns):
        return [0.0] * len(responses)

    rows = [QUESTION | {"tools": [], "id": 1}] * 4
    for function, unread in (
        (length_reward, "'source' (4 rows), 'id' (4 rows)"),
        (by_source, "'id' (4 rows)"),
        (anything, None),
    ):
        found = noted(ppo(model, rows, tiny_tokenizer(), function), UNREAD)
        assert found == [f"Prompts: {UNREAD}: {unread}."] * bool(unread)
    settings = config(Path("absent"))
    answered = PPOTrainer(
        model, length_reward, rows, config=settings, tokenizer=tiny_tokenizer(),
        environment=lambda prompts, turns, id, source: [None for _ in turns],
    )  # fmt: skip
    assert noted(answered, UNREAD) == []
    endpoint = HTTPReward("http://localhost:1/", RewardEndpointConfig())
    assert Rewards({"endpoint": endpoint}, None, tiny_tokenizer()).reads("id")


def test_notes_count_the_evaluation_file_too(model: str, tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "Held out", "k": 1, "a": 2}, {"prompt": ""})
    settings = replace(config(Path("absent")), evaluation=EvaluationConfig(path=str(file)))
    settings = replace(settings, data=PromptDataConfig(on_bad_line="skip"))
    rows = [{"prompt": prompt, "k": 1} for prompt in PROMPTS]
    made = PPOTrainer(model, length_reward, rows, config=settings, tokenizer=tiny_tokenizer())
    assert noted(made, RAW)[0].startswith("7 of 7 prompts")
    assert noted(made, UNREAD) == [f"Prompts: {UNREAD}: 'k' (7 rows), 'a' (1 row)."]
    [skipped] = noted(made, "skipped")
    assert skipped.startswith("Prompts: 1 skipped (1 empty prompt)") and f"{file}:2" in skipped


def test_notes_name_a_column_once_for_both_files(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "response": "Yes?", "k": 1}] * 2
    held_out = write(tmp_path, *rows, {"prompt": "Hi"})
    made = sft(model, rows, tiny_tokenizer(), eval_path=str(held_out), on_bad_line="skip")
    assert noted(made, UNREAD) == [f"Examples: {UNREAD}: 'k' (4 rows)."]
    [shared] = noted(made, "in the training data")
    assert shared.startswith("1 of the 1 prompts of data.eval_path are also in the training data")
    assert noted(made, "Examples: 1 skipped")

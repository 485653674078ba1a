"""Chat templates of real families' shapes from end to end: an answer has one score, whoever asks
for it; rewards see what was said; a run keeps its date and its template's arguments."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from rollouts import script
from templates import chatml, gemma, llama3, phi3, qwen3, r1
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from ppo_engine import (
    DemonstrationDataConfig,
    GenerationConfig,
    PPOConfig,
    PPOEngine,
    PPOSettings,
    PPOTrainer,
    PreferenceDataConfig,
    PromptDataConfig,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
    SFTConfig,
    SFTTrainer,
    UserError,
)
from ppo_engine.generate import generate
from ppo_engine.models.value_model import value_model_from_policy
from ppo_engine.pretrained.loading import save_model
from ppo_engine.settings.schema import GenerateConfig, ScoringConfig

CHAT = [{"role": "user", "content": "abc"}]
ANSWER = [{"role": "assistant", "content": "xyz"}]
RUN = RunConfig(dtype="float32", device="cpu")
SMALL = PPOSettings(rollout_batch_size=1, mini_batch_size=1, micro_batch_size=1)


def engine_for(tokenizer: PreTrainedTokenizerFast, reward: Any, **settings: Any) -> PPOEngine:
    config = PPOConfig(ppo=SMALL, run=RUN, **settings)
    return PPOEngine(tiny_model(0, tokenizer), reward, config=config, tokenizer=tokenizer)


def says(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Lets every policy say `text`, its end included."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    script(monkeypatch, lambda policy, rows: [(ids, True)] * len(rows))


@pytest.fixture
def reward_folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A reward model of the tokenizer that a test names."""
    tokenizer = request.getfixturevalue("make")()
    policy = tiny_model(3, tokenizer)
    save_model(value_model_from_policy(policy, tokenizer, seed=5), tokenizer, tmp_path / "reward")
    return str(tmp_path / "reward")


@pytest.mark.parametrize(
    ("make", "said", "end"),
    [
        (chatml, "xyz", "<|im_end|>"),
        (gemma, "xyz", "<end_of_turn>"),  # the template's end, which is not the tokenizer's EOS
        (gemma, "xyz", "<eos>"),
        (phi3, "xyz", "<|end|>"),
        (phi3, "xyz", "<|endoftext|>"),
        (qwen3, "<think>\n\n</think>\n\nxyz", "<|im_end|>"),
        (r1, "hm</think>xyz", "<|end_of_sentence|>"),
    ],
)
def test_an_answer_has_one_score(make, said, end, reward_folder, tmp_path, monkeypatch) -> None:
    """In PPO by tokens, by text in `generate --reward`, in the reward model's own training, and in
    plain transformers, which reads the rendered chat."""
    tokenizer = make()
    says(monkeypatch, tokenizer, said + end)
    engine = engine_for(tokenizer, reward_folder)
    in_ppo = engine.score(engine.generate([CHAT])).item()

    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    ids = tokenizer.apply_chat_template([*CHAT, *ANSWER], return_tensors="pt")["input_ids"]
    assert in_ppo == pytest.approx(model(ids).logits.item(), abs=1e-5)

    rows = [{"chosen": [*CHAT, *ANSWER], "rejected": [*CHAT, {**ANSWER[0], "content": "no"}]}]
    config = RewardModelConfig(data=PreferenceDataConfig(eval_fraction=0.0), run=RUN)
    trainer = RewardModelTrainer(model, rows, config, tokenizer)
    assert trainer.training[0].rows[0] == ids[0].tolist()

    tiny_model(0, tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": CHAT}))
    generate(
        GenerateConfig(
            model=str(tmp_path / "policy"),
            data=PromptDataConfig(path=str(tmp_path / "prompts.jsonl")),
            reward=ScoringConfig(path=reward_folder),
            output=str(tmp_path / "out.jsonl"),
            dtype="float32",
        )
    )
    [score] = json.loads((tmp_path / "out.jsonl").read_text())["scores"]
    assert score == pytest.approx(in_ppo, abs=1e-5)


@pytest.mark.parametrize("make", [gemma])
def test_what_a_reward_model_cannot_read_is_found_first(make, reward_folder) -> None:
    """Its template has no place for a system message; the policy's has."""
    prompts = [CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]]
    message = r"\[1\]: the reward model 'reward' cannot read this prompt: refused .*System role"
    config = PPOConfig(ppo=SMALL, run=RUN)
    with pytest.raises(UserError, match=message):
        PPOTrainer(tiny_model(), reward_folder, prompts, config=config, tokenizer=chatml())
    PPOTrainer(tiny_model(), reward_folder, prompts[:1], config=config, tokenizer=chatml())


@pytest.mark.parametrize(
    ("make", "said", "seen"),
    [
        (qwen3, "<think>\nhm\n</think>\n\nx<|im_end|>", "<think>\nhm\n</think>\n\nx"),
        (qwen3, "<tool_call>\n{}\n</tool_call><|im_end|>", "<tool_call>\n{}\n</tool_call>"),
        (r1, "hm\n</think>\n\nx<|end_of_sentence|>", "<think>\nhm\n</think>\n\nx"),
    ],
)
def test_a_format_reward_sees_the_format(make, said, seen, monkeypatch) -> None:
    tokenizer = make()
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"], special_tokens=True)
    says(monkeypatch, tokenizer, said)
    found = []

    def reward(prompts: Any, responses: Any) -> list[float]:
        found.extend(responses)
        return [0.0] * len(responses)

    engine = engine_for(tokenizer, reward)
    engine.score(engine.generate([CHAT]))
    assert found == [seen]


def test_a_run_keeps_the_date_of_its_first_day(tmp_path) -> None:
    """Llama-3's template shows it; a template that shows another renders other prompts."""
    tokenizer = llama3()

    def made(**run: Any) -> SFTTrainer:
        config = SFTConfig(
            data=DemonstrationDataConfig(eval_fraction=0.0),
            run=RunConfig(output_dir=str(tmp_path / "run"), dtype="float32", **run),
        )
        rows = [{"messages": [*CHAT, *ANSWER]}] * 2
        return SFTTrainer(tiny_model(0, tokenizer), rows, config, tokenizer)

    def dated(trainer: SFTTrainer) -> str:
        return str(tokenizer.decode(trainer.training[0].ids))

    began = datetime.date(2020, 2, 9)
    first = made(date=began)
    assert "Today Date: 09 Feb 2020" in dated(first)
    first.train()
    resumed = made(resume=True)
    assert dated(resumed) == dated(first) and resumed.config.run.date == began
    resumed.train()
    today = datetime.date.today()
    fresh = SFTTrainer(tiny_model(0, tokenizer), [{"messages": [*CHAT, *ANSWER]}] * 2,
        SFTConfig(data=DemonstrationDataConfig(eval_fraction=0.0)), tokenizer)  # fmt: skip
    assert f"{today:%d %b %Y}" in dated(fresh) and fresh.config.run.date == today


def test_a_ppo_run_keeps_it_too(tmp_path) -> None:
    tokenizer = llama3()

    def made(**run: Any) -> PPOTrainer:
        config = PPOConfig(
            ppo=SMALL,
            generation=GenerationConfig(max_new_tokens=2),
            run=RunConfig(output_dir=str(tmp_path / "run"), dtype="float32", **run),
            steps=1,
        )
        return PPOTrainer(
            tiny_model(0, tokenizer),
            lambda prompts, responses: [0.0] * len(responses),
            [CHAT],
            config=config,
            tokenizer=tokenizer,
        )

    made(date=datetime.date(2020, 2, 9)).train()
    resumed = made(resume=True)
    prompt = resumed.engine.generate([CHAT]).prompt_ids[0]
    assert "Today Date: 09 Feb 2020" in tokenizer.decode(prompt)


def test_the_templates_arguments_reach_every_rendering(tmp_path) -> None:
    """Without `enable_thinking=false` a short answer of Qwen3's never leaves its thought."""
    tokenizer, empty = qwen3(), "<think>\n\n</think>\n\n"
    arguments = {"enable_thinking": False}
    row = {"messages": [*CHAT, *ANSWER]}

    sft = SFTTrainer(tiny_model(0, tokenizer), [row], SFTConfig(
        data=DemonstrationDataConfig(eval_fraction=0.0, chat_template_kwargs=arguments), run=RUN),
        tokenizer)  # fmt: skip
    example = sft.training[0]
    asked = example.ids[: example.trained.index(True)]
    assert tokenizer.decode(asked).endswith(empty)

    data = PromptDataConfig(chat_template_kwargs=arguments)
    engine = engine_for(tokenizer, lambda p, r: [0.0], data=data,
        generation=GenerationConfig(max_new_tokens=2))  # fmt: skip
    assert tokenizer.decode(engine.generate([CHAT]).prompt_ids[0]).endswith(empty)
    # A row's own go before those of the run.
    columns = {"chat_template_kwargs": [{"enable_thinking": True}]}
    assert not tokenizer.decode(engine.generate([CHAT], columns).prompt_ids[0]).endswith(empty)

"""Multi-turn responses: the environment's tokens are read, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engines import make_engine, response_logprobs
from families import of_family
from rollouts import script
from tiny import tiny_model, tiny_tokenizer

from ppo_engine.errors import UserError
from ppo_engine.models.value_model import value_model_from_policy
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.rewards.model import RewardModel
from ppo_engine.rollout.environment import Environment
from ppo_engine.rollout.schedule import Schedule
from ppo_engine.settings.schema import EnvironmentConfig, GenerationConfig, PPOConfig, RunConfig
from ppo_kernels import gae

CHAT = [{"role": "user", "content": "2+2?"}]
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def say(text: str, finished: bool = True) -> tuple[list[int], bool]:
    ids = TOKENIZER(text)["input_ids"]
    return [*ids, EOS] if finished else ids, finished


def messages(*texts: str) -> list[dict[str, str]]:
    """The turns of a conversation, the policy's and the environment's."""
    roles = ["assistant", "user"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


@pytest.fixture
def scripted(monkeypatch):
    """Lets the policy say what a test wants: turn by turn, a text for each row that continues."""

    def turn_by_turn(*turns: list[tuple[list[int], bool]]) -> None:
        left = list(turns)
        script(monkeypatch, lambda policy, rows: left.pop(0))

    return turn_by_turn


def engine_with(environment, max_turns: int = 3, **settings) -> PPOEngine:
    return make_engine(
        environment_function=environment,
        environment=EnvironmentConfig(max_turns=max_turns),
        **settings,
    )


def text_of(rollout, row: int, mask: torch.Tensor) -> str:
    return TOKENIZER.decode(rollout.response_ids[row][mask[row]])


def test_the_environments_turns_stand_between_the_policys(scripted):
    seen = []

    def environment(prompts, turns, hint):
        seen.append((prompts, turns, hint))
        first = [t[0]["content"] for t in turns]
        return [None if t == "four" else f"no, {h}" for t, h in zip(first, hint, strict=True)]

    engine = engine_with(environment)
    scripted([say("five"), say("four"), say("six", finished=False)], [say("ok, 4")], [say("4!")])
    rollout = engine.generate([CHAT] * 3, {"hint": ["a", "b", "c"]})
    assert rollout.finished.tolist() == [True, True, False]
    assert text_of(rollout, 0, rollout.mask) == "five<|im_end|>ok, 4<|im_end|>4!<|im_end|>"
    between = "\n<|im_start|>user\nno, a<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(rollout, 0, rollout.environment_mask) == between * 2
    # What the chat template writes of the whole conversation, but for the newline at its end.
    said = messages("five", "no, a", "ok, 4", "no, a", "4!")
    chat = [*CHAT, *said]
    ids, real = rollout.sequences()
    whole = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert TOKENIZER.decode(ids[0][real[0]]) == whole.rstrip("\n")
    assert text_of(rollout, 1, rollout.response_mask) == "four<|im_end|>"
    assert text_of(rollout, 2, rollout.response_mask) == "six"
    assert rollout.columns["turns"] == [said, messages("four"), messages("six")]
    assert rollout.responses[0] == "five\n\nno, a\n\nok, 4\n\nno, a\n\n4!"
    assert rollout.lengths.tolist() == [5 + 6 + 3, 5, 3]
    assert [turns for _, turns, _ in seen] == [[said[:1], messages("four")], [said[:3]]]
    assert [hint for *_, hint in seen] == [["a", "b"], ["a"]]


def test_text_prompts_and_the_turn_limit(scripted):
    engine = engine_with(lambda prompts, turns: ["\nQ: more?\nA:"] * len(turns), max_turns=2)
    scripted([say("yes")], [say("no")])
    rollout = engine.generate(["Q: really?\nA:"])
    assert text_of(rollout, 0, rollout.response_mask) == "yes<|im_end|>\nQ: more?\nA:no<|im_end|>"
    assert rollout.responses == ["yes\nQ: more?\nA:no"]


def test_an_answer_that_leaves_no_room_cuts_the_conversation_off(scripted):
    engine = engine_with(lambda prompts, turns: ["x" * 3000] * len(turns))
    scripted([say("yes")])
    rollout = engine.generate(["Q"])
    assert text_of(rollout, 0, rollout.response_mask) == "yes<|im_end|>"
    assert not rollout.environment_mask.any() and rollout.columns["turns"] == [messages("yes")]
    assert not rollout.finished.any()


@pytest.mark.parametrize(("tokens", "goes_on"), [(2031, True), (2032, False)])
def test_an_answer_leaves_room_for_a_whole_turn(scripted, tokens, goes_on):
    """Of 2,048 positions five are taken, and twelve are for the next turn."""
    engine = engine_with(lambda prompts, turns: ["x" * tokens] * len(turns), max_turns=2)
    scripted([say("yes")], [say("no")])
    rollout = engine.generate(["Q"])
    assert rollout.lengths.tolist() == [7 if goes_on else 4]
    assert rollout.finished.tolist() == [goes_on]


def test_each_turn_is_written_behind_all_that_was_said(monkeypatch):
    asked = []

    def answer(policy, rows):
        asked.append([TOKENIZER.decode(row) for row in rows])
        return [say("yes") for _ in rows]

    script(monkeypatch, answer)
    engine = engine_with(lambda prompts, turns: [f" {len(turns[0])}"] * len(turns))
    engine.generate(["Q"])
    assert asked == [["Q"], ["Qyes<|im_end|> 1"], ["Qyes<|im_end|> 1yes<|im_end|> 3"]]


def test_a_tool_answers_with_a_message_of_its_own(scripted):
    engine = engine_with(lambda p, t: [{"role": "tool", "content": "4"}], max_turns=2)
    scripted([say("calc")], [say("it is 4")])
    rollout = engine.generate([CHAT])
    between = "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(rollout, 0, rollout.environment_mask) == between


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (lambda prompts, turns: ["a"], "The environment '<lambda>' returned .* a list of 2"),
        (lambda prompts, turns: [1, None], r"returned 1 \(int\) for conversation 0"),
        (lambda prompts, turns: [None, {"role": "tool"}], "for conversation 1"),
        (lambda prompts, turns: [None, {"role": "tool", "content": 4}], "for conversation 1"),
        (lambda prompts, turns: 1 / 0, "failed at .*test_generation.py, line"),
        (lambda prompts, turns, hint: [None] * 2, "asks for 'hint'"),
        (lambda prompts, turns: [None, "caf\udce9"], "conversation 1 .* is no Unicode text"),
    ],
)
def test_a_wrong_environment_is_named(scripted, environment, message):
    engine = engine_with(environment)
    scripted([say("a"), say("b")])
    with pytest.raises(UserError, match=message):
        engine.generate([CHAT] * 2)


def test_an_answer_that_the_template_refuses_is_named(scripted):
    engine = engine_with(lambda prompts, turns: [{"role": "system", "content": "x"}])
    template = "{% if messages[-1].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    engine.policy.tokenizer.chat_template = template + engine.policy.tokenizer.chat_template
    scripted([say("a")])
    with pytest.raises(UserError, match=r"refused by .* chat template \(no system\)"):
        engine.generate([CHAT])


def test_a_message_that_is_written_anew_each_time_stays_what_was_read(scripted):
    message = {"role": "user", "content": ""}

    def environment(prompts, turns):
        message["content"] += "x"
        return [message] * len(prompts)

    engine = engine_with(environment)
    scripted([say("a")], [say("b")], [say("c")])
    turns = engine.generate([CHAT]).columns["turns"][0]
    assert turns == messages("a", "x", "b", "xx", "c")


def test_an_environment_may_ask_the_policy():
    """Between two turns its model is what it is outside of a rollout."""
    found = []

    def quiet(prompts, turns):
        return ["go on" if len(said) == 1 else None for said in turns]

    def environment(prompts, turns):
        with torch.no_grad():
            found.append(engine.policy.model(torch.tensor([[5, 6, 7]])).logits)
        engine.policy.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
        return quiet(prompts, turns)

    settings = {"generation": GenerationConfig(max_new_tokens=4, stop=list(range(200)))}
    alone = engine_with(quiet, **settings)
    engine = engine_with(environment, **settings)
    torch.manual_seed(0)
    rollout = engine.generate([CHAT] * 3)
    torch.manual_seed(0)
    expected = alone.generate([CHAT] * 3)
    assert len(found) > 1 and torch.equal(rollout.response_ids, expected.response_ids)
    with torch.no_grad():
        logits = engine.policy.model(torch.tensor([[5, 6, 7]])).logits
    assert all(torch.equal(x, logits) for x in found)


def test_an_environment_cannot_let_the_engine_write_another_rollout():
    settings = {"generation": GenerationConfig(max_new_tokens=4, stop=list(range(200)))}
    engine = engine_with(lambda prompts, turns: [engine.generate([CHAT]).responses[0]], **settings)
    with pytest.raises(UserError, match="is writing a rollout"):
        engine.generate([CHAT])


def test_columns_are_as_long_as_the_prompts():
    engine = make_engine()
    with pytest.raises(UserError, match="column 'answer' has 4 values for 2 prompts"):
        engine.generate(["a", "b"], {"answer": [1, 1, 2, 2]}, group_size=2)


def test_a_prompt_is_named_by_its_place_among_those_that_were_given():
    with pytest.raises(UserError, match="Prompt 2 has 4000 tokens"):
        make_engine().generate(["a", "b", "c" * 4000], group_size=4)
    with pytest.raises(UserError, match="Prompt 1 is no Unicode text"):
        make_engine().generate(["a", "\ud800"])


def test_the_column_of_turns_is_not_overwritten():
    engine = engine_with(lambda prompts, turns: [None])
    with pytest.raises(UserError, match="have a column 'turns'"):
        engine.generate([CHAT], {"turns": [1]})


def test_a_reward_model_of_its_own_tokenizer_reads_the_turns(scripted):
    """As `from_pretrained` would: the whole conversation, rendered by its own template."""
    engine = engine_with(lambda prompts, turns: ["no"], max_turns=2)
    tokenizer = tiny_tokenizer()
    model = value_model_from_policy(tiny_model(seed=3), tokenizer, seed=5)
    reward = RewardModel(model, tokenizer, device=torch.device("cpu"), dtype=torch.float32)
    scripted([say("five")], [say("4")])
    rollout = engine.generate([CHAT])
    by_text = reward(rollout.prompts, rollout.responses, [True], rollout.columns)
    by_tokens = reward(rollout.prompts, rollout.responses, [True], rollout.columns, rollout.written)
    torch.testing.assert_close(by_text, by_tokens)
    chat = [*CHAT, *messages("five", "no", "4")]
    plain = torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])
    torch.testing.assert_close(by_text, model(plain).logits[0])


def test_messages_are_no_answer_to_a_text(scripted):
    engine = engine_with(lambda prompts, turns: [{"role": "tool", "content": "x"}])
    scripted([say("a")])
    with pytest.raises(UserError, match="must answer a text prompt with text"):
        engine.generate(["text"])


def test_an_environment_by_name(scripted, tmp_path):
    file = tmp_path / "world.py"
    file.write_text("async def reply(prompts, turns):\n    return ['go on'] * len(turns)\n")
    config = EnvironmentConfig(function=f"{file}:reply", max_turns=2)
    engine = make_engine(environment=config)
    scripted([say("a")], [say("b")])
    assert engine.generate([CHAT]).columns["turns"] == [messages("a", "go on", "b")]


@pytest.fixture
def conversed(scripted):
    """An engine, and a rollout of which one response has three turns and one has one."""
    engine = engine_with(
        lambda prompts, turns: [None if t[0]["content"] == "four" else "no" for t in turns],
        max_turns=2,
        ppo={"rollout_batch_size": 2, "mini_batch_size": 2, "micro_batch_size": 1},
    )  # fmt: skip
    scripted([say("five"), say("four")], [say("ok, 4")])
    return engine, engine.generate([CHAT] * 2)


def test_logprobs_are_those_of_the_whole_text(conversed):
    """The policy has read the environment's tokens; its own alone have log-probs."""
    engine, rollout = conversed
    logprobs, entropy = response_logprobs(engine.policy, rollout, 1.0)
    ids, real = rollout.sequences()
    for row in range(2):
        text = ids[row][real[row]][None]
        own = torch.cat((rollout.prompt_mask[row] & False, rollout.mask[row]))[real[row]]
        log_p = engine.policy.model(text).logits[0, :-1].log_softmax(-1)
        expected = log_p.gather(1, text[0, 1:, None])[:, 0][own[1:]]
        torch.testing.assert_close(logprobs[row][rollout.mask[row]], expected, rtol=1e-4, atol=1e-5)
    assert not logprobs[~rollout.mask].any() and not entropy[~rollout.mask].any()


def test_advantages_skip_the_environments_tokens(conversed):
    engine, rollout = conversed
    scores = torch.tensor([1.0, -2.0])
    experience = engine.estimate_advantages(rollout, scores)
    for row in range(2):
        own = rollout.mask[row]
        rewards = torch.zeros(int(own.sum()))  # the policy is its own reference: no penalty
        rewards[-1] = scores[row]
        advantages, returns = gae(rewards[None], experience.values[row][own][None], lam=0.95)
        found = experience.advantages[row]
        torch.testing.assert_close(found[own], advantages[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(experience.returns[row][own], returns[0], rtol=1e-5, atol=1e-6)
        assert not found[~own].any()


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_the_loss_is_of_the_policys_tokens_alone(scripted, estimator):
    """Whatever its numbers say of the others: NaN at every one of the environment's tokens."""
    weights = []
    for poison in (False, True):
        engine = engine_with(
            lambda prompts, turns: ["no" if t[0]["content"] == "five" else None for t in turns],
            max_turns=2,
            ppo={"rollout_batch_size": 2, "mini_batch_size": 2, "estimator": estimator,
                 "group_size": 2, "kl_in": "loss"},
        )  # fmt: skip
        scripted([say("five"), say("four")], [say("ok, 4")])
        rollout = engine.generate([CHAT])
        experience = engine.estimate_advantages(rollout, torch.tensor([1.0, -2.0]))
        if poison:
            experience = dataclasses.replace(
                experience,
                **{
                    name: getattr(experience, name).where(rollout.mask, float("nan"))
                    for name in ("logprobs", "ref_logprobs", "advantages", "values", "returns")
                    if getattr(experience, name) is not None
                },
            )
        metrics = engine.update(experience)
        assert all(torch.isfinite(torch.tensor(list(metrics.values()))))
        weights.append([p.detach().clone() for p in engine.policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_sampled_turns_end_to_end():
    """Without a script: a real policy, whose turns end often, in conversation."""
    config = PPOConfig(
        generation=GenerationConfig(max_new_tokens=6),
        environment=EnvironmentConfig(max_turns=3),
        run=RunConfig(dtype="float32"),
    )
    engine = PPOEngine(
        tiny_model(), lambda prompts, responses, turns: [float(len(t)) for t in turns],
        config=config, tokenizer=tiny_tokenizer(),
        environment=lambda prompts, turns: ["go on"] * len(turns),
    )  # fmt: skip
    engine.policy.renderer.end_ids = list(range(100, 259))
    rollout = engine.generate([CHAT, "text"] * 4)
    assert rollout.environment_mask.any() and not (rollout.environment_mask & rollout.mask).any()
    scores = engine.score(rollout)
    assert scores.tolist() == [len(t) for t in rollout.columns["turns"]] and scores.max() > 1
    metrics = engine.update(engine.estimate_advantages(rollout, scores))
    assert metrics["policy/ratio_max"] == 1.0 and metrics["objective/kl"] == 0.0
    assert isinstance(engine.environment, Environment)


def test_every_token_has_a_random_number_of_its_own(monkeypatch):
    """Of each turn of each response."""
    seen = []
    write = Schedule.write

    def spy(self, requests, limit, *args):
        seen.extend(request.counter for request in requests)
        return write(self, requests, limit, *args)

    monkeypatch.setattr(Schedule, "write", spy)
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(200))
    config = PPOConfig(run=RunConfig(device="cpu"), generation=GenerationConfig(max_new_tokens=8))
    engine = PPOEngine(
        model,
        lambda prompts, responses: [0.0] * len(prompts),
        config=config,
        tokenizer=TOKENIZER,
        environment=Environment(lambda prompts, turns: [" more"] * len(turns), 3),
    )
    rollout = engine.generate(["a", "b"], group_size=2)
    assert len(seen) > 8
    expected = []
    for row, own in enumerate(rollout.mask):
        begins = own & ~torch.cat((own.new_zeros(1), own[:-1]))
        # After the numbers of all tokens that any response before it could have.
        expected += [row * 3 * 8 + int(own[:place].sum()) for place in begins.nonzero()]
    assert sorted(seen) == sorted(expected)


def test_a_prompt_that_leaves_no_room_is_refused():
    engine = make_engine(generation=GenerationConfig(max_new_tokens=8))
    room = engine.policy.model.config.max_position_embeddings - 8
    with pytest.raises(UserError, match=rf"Prompt 1 has {room + 1} tokens, .* has room for {room}"):
        engine.generate(["x" * room, "x" * (room + 1)])


def test_a_context_ends_where_longrope_changes():
    """Beyond, one long text changes what the others in its pass give."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    model = of_family(
        "phi3",
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 64, **factors,
        },
        original_max_position_embeddings=64,
        max_position_embeddings=256,
        sliding_window=None,
    )  # fmt: skip
    config = PPOConfig(
        generation=GenerationConfig(max_new_tokens=8), run=RunConfig(dtype="float32")
    )
    engine = PPOEngine(model, lambda responses: [0.0], tokenizer=TOKENIZER, config=config)
    rollout = engine.generate(["x" * 56, "y" * 10])
    for row, (prompt, response) in enumerate(rollout.written):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        alone = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        found = rollout.logprobs[row, : len(response)]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="has room for 56 before a response"):
        engine.generate(["x" * 57])

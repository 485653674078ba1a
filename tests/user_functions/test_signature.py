"""What a user's function is given: by the names of its parameters, by position where these say
nothing, and what is refused because it would get something else than it asks for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from engines import make_engine

from ppo_engine import EnvironmentConfig, GenerationConfig
from ppo_engine.errors import UserError
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.rollout.environment import Environment

CHAT = [{"role": "user", "content": "2+2?"}]
ASKED = ["1+1?", CHAT]
SAID = ["2", "4"]
COLUMNS = {"answer": ["2", "5"], "solution": ["2", "5"]}
COMPLETIONS = ["2", [{"role": "assistant", "content": "4"}]]


def score(function: Any, columns: Any = None, prompts: Any = ASKED) -> list[float]:
    columns = COLUMNS if columns is None else columns
    reward = RewardFunction(function)
    return reward(prompts, SAID, [True, False], columns, token_ids=[[7], [7, 8]]).tolist()


def right(said: list[str], expected: list[str]) -> list[float]:
    return [float(a == b) for a, b in zip(said, expected, strict=True)]


# Functions as TRL has them ------------------------------------------------------------------------


def accuracy(completions, solution, log_extra=None, **kwargs):
    assert log_extra is None
    return right([completion[0]["content"] for completion in completions], solution)


def plain_accuracy(completions, answer, **kwargs):
    return right(completions, answer)


def in_keywords(completions, **kwargs):
    assert kwargs["prompts"] == [CHAT, CHAT] and kwargs["completion_ids"] == [[7], [7, 8]]
    return right([completion[0]["content"] for completion in completions], kwargs["solution"])


def all_in_keywords(**kwargs):
    return right([completion[0]["content"] for completion in kwargs["completions"]], ["2", "5"])


class Overlong:
    """Of token ids alone, as an object."""

    def __call__(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [float(len(ids) < 2) for ids in completion_ids]


class Scaled(Overlong):
    def __call__(self, completions, solution, completion_ids, **kwargs):
        return [a * 2 / len(ids) / 2 for a, ids in zip(accuracy(completions, solution),
                                                       completion_ids, strict=True)]  # fmt: skip


async def later(completions, solution, **kwargs):
    return accuracy(completions, solution)


@pytest.mark.parametrize(
    "function", [accuracy, in_keywords, all_in_keywords, Overlong(), Scaled(), later]
)
def test_functions_for_trl_score_chats_as_there(function):
    assert score(function, prompts=[CHAT, CHAT]) == [1, 0]


def test_functions_for_trl_get_text_of_text_prompts():
    assert score(plain_accuracy, prompts=["1+1?", "2+2?"]) == [1, 0]


def test_completions_of_several_turns_are_all_messages_after_the_prompt():
    def talk(completions, completion_ids):
        assert "no" in engine.policy.tokenizer.decode(completion_ids[0])  # its tokens are read
        [messages] = completions
        return [len(messages) + float(messages[1]["content"] == "no")]

    engine = make_engine(
        talk,
        environment_function=lambda prompts, turns: ["no"],
        environment=EnvironmentConfig(max_turns=2),
        generation=GenerationConfig(max_new_tokens=3),
    )
    every = range(engine.policy.tokenizer.vocab_size + 3)
    engine.policy.renderer.end_ids = list(every)  # every turn ends
    assert engine.score(engine.generate([CHAT])).tolist() == [4]


# Names, then position -----------------------------------------------------------------------------


def test_names_decide_wherever_they_stand():
    def backwards(responses, answer, *, finished, prompts):
        assert prompts == ASKED and finished == [True, False]
        return right(responses, answer)

    assert score(backwards) == [1, 0]
    assert score(lambda responses, threshold=1: [len(r) - threshold for r in responses]) == [0, 0]


@pytest.mark.parametrize(
    "function",
    [
        lambda p, r: right(r, ["2", "5"]),
        lambda _, responses: right(responses, ["2", "5"]),
        lambda prompts, texts: right(texts, ["2", "5"]),
        lambda questions, outputs: right(outputs, ["2", "5"]),
        lambda inputs, generated_texts: right(generated_texts, ["2", "5"]),
        lambda a, b, answer: right(b, answer),
        lambda *args: right(args[1], ["2", "5"]),
        lambda p, r, /, answer: right(r, answer),
        lambda answer, responses, /: right(responses, answer),
    ],
)
def test_position_decides_where_names_say_nothing(function):
    assert score(function) == [1, 0]


def test_a_function_that_shows_no_parameters_gets_the_two_lists():
    with pytest.raises(UserError, match=r"'max' returned '2' \(str\) for response 0"):
        score(max, prompts=["1", "3"])


def timed(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def of_each(function):
    @functools.wraps(function)
    def wrapper(prompts, responses, answer):
        return [function(r, a) for r, a in zip(responses, answer, strict=True)]

    return wrapper


class Judge:
    def one(self, completions, solution, **kwargs):
        return accuracy(completions, solution)

    @timed
    def two(self, completions, solution):
        return accuracy(completions, solution)


@pytest.mark.parametrize(
    "function",
    [
        timed(accuracy),
        timed(timed(accuracy)),
        timed(of_each(lambda response, answer: float(response == answer))),
        Judge().one,
        Judge().two,
        functools.partial(accuracy, log_extra=None),
        functools.partial(lambda expected, p, r: right(r, expected), ["2", "5"]),
    ],
)
def test_decorated_bound_and_partial_functions(function):
    assert score(function, prompts=[CHAT, CHAT]) == [1, 0]


def test_a_column_does_not_undo_a_partial():
    for function in (
        lambda responses, answer: [answer] * 2,
        lambda responses, answer, **columns: [answer] * 2,
        lambda responses, **columns: [columns["answer"]] * 2,
    ):
        assert score(functools.partial(function, answer=3)) == [3, 3]


def test_what_stands_behind_a_gap_is_not_moved_into_it():
    def judge(hint=None, responses=None, /):
        return [0.0, 0.0]

    with pytest.raises(UserError, match=r"failed.*positional-only"):
        score(judge)


def test_what_a_function_changes_stays_its_own():
    def judge(prompts, completions, hint):
        for prompt, completion, h in zip(prompts, completions, hint, strict=True):
            prompt.append(completion[0])
            h["seen"] = True
        return [len(prompt) for prompt in prompts]

    columns = {"hint": [{}] * 2}  # a group's rows are the same objects
    assert score(judge, columns, [CHAT, CHAT]) == score(judge, columns, [CHAT, CHAT]) == [2, 2]
    assert len(CHAT) == 1 and columns == {"hint": [{}] * 2}


# What is refused ----------------------------------------------------------------------------------


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)


def openrlhf(queries, prompts, labels):
    return {"rewards": [0.0] * len(queries)}


def anything(*args, **kwargs):
    return [0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, answer: [0, 0], "takes the column 'answer' in place of the responses"),
        (lambda prompts, answer, **_: [0, 0], "takes the column 'answer' in place of the resp"),
        (lambda answer, x: [0, 0], "does not take the responses"),
        (lambda prompts, ground_truth: [0, 0], "does not take the responses"),
        (lambda outputs, inputs: [0, 0], "does not take the responses"),
        (lambda generated_texts, x: [0, 0], "does not take the responses"),
        (lambda preds, golds: [0, 0], "does not take the responses"),
        (lambda prompts, gt: [0, 0], "does not take the responses"),
        (lambda responses_a, answer: [0, 0], "takes the column 'answer' in place of the resp"),
        (lambda prompts: [0, 0], "does not take the responses"),
        (lambda x: [0, 0], "does not take the responses"),
        (lambda prompts, finished: [0, 0], "does not take the responses"),
        (lambda prompts, answers: [0, 0], "takes 'answers', almost the name of a column"),
        (lambda responses, answers=None: [0, 0], "'answers', and the prompts have a column 'ans"),
        (lambda completions, Solution=None, **_: [0, 0], "'Solution', .* it would get its default"),
        (lambda prompt, response: [0, 0], "takes 'prompt', and is called for one response at a"),
        (lambda completion, answer: 0, "takes 'completion', and is called for one response at a"),
        (lambda completions, trainer_state: [0, 0], "'trainer_state', and needs a default: only"),
        (lambda responses, turns: [0, 0], "asks for 'turns'"),
        (lambda completions, ground_truth: [0, 0], "asks for 'ground_truth', but the prompts have"),
        (verl, "takes 'data_source', and as one for verl, is called for one response at a time"),
        (openrlhf, "takes 'queries', and as one for OpenRLHF, gets prompts and responses joined"),
        (anything, r"does not say what it takes \(a decorator needs functools.wraps\)"),
        (Judge, "is a class: give an object of it"),
    ],
)
def test_what_would_get_something_else_than_it_asks_for(function, message):
    with pytest.raises(UserError, match=message):
        score(function)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("prompts", lambda prompts, responses: [1, 0]),
        ("responses", lambda p, responses: [1, 0]),
        ("completions", lambda completions: [1, 0]),
        ("finished", lambda responses, finished: [1, 0]),
        ("finished", lambda completions, **kwargs: [1, 0]),
        ("completion_ids", lambda **kwargs: [1, 0]),
    ],
)
def test_no_list_hides_a_column_nor_a_column_a_list(name, function):
    with pytest.raises(UserError, match=f"takes '{name}', and the prompts have a column of that"):
        score(function, {name: ["x", "y"]})
    assert score(function, {}) == [1, 0]


def test_a_column_that_nobody_takes_is_no_mistake():
    assert score(lambda prompts, responses: [1, 0], {"completions": ["x", "y"]}) == [1, 0]


def test_an_environment_gets_what_it_names():
    def reply(turns, hint):
        return [f"{h}, {messages[-1]['content']}" for h, messages in zip(hint, turns, strict=True)]

    turns = [[{"role": "assistant", "content": "5"}]]
    assert Environment(reply, 2)(["2+2?"], turns, {"hint": ["no"]}) == ["no, 5"]
    assert Environment(lambda p, t: [t[0][0]["content"]], 2)(["2+2?"], turns, {}) == ["5"]
    for function, message in (
        (lambda prompts, hint: [None], "takes the column 'hint' in place of the turns"),
        (lambda prompts, responses: [None], "does not take the turns"),
    ):
        with pytest.raises(UserError, match=message):
            Environment(function, 2)(["2+2?"], turns, {"hint": ["no"]})

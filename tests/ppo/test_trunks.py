"""Frozen lower layers that several models share: run once for each text of a step, wherever that
gives the same."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import of_family
from rollouts import length, move, moved_engine, record, rollout_of
from tiny import tiny_tokenizer

from ppo_engine.models import value_model
from ppo_engine.models.freezing import freeze_lower_layers
from ppo_engine.models.reader import Reader
from ppo_engine.models.trunk import Trunk
from ppo_engine.ppo.trunks import Trunks
from ppo_engine.pretrained.loading import save_model
from ppo_engine.training.meter import Meter

CPU = torch.device("cpu")
ROLES = "policy", "reference", "critic", "reward"


def saved_reward(folder: Path, moved: int, by: float = 0.1) -> str:
    """A reward model of which one layer alone has left the policy's model."""
    of_family("llama", num_hidden_layers=4).save_pretrained(folder / "policy")
    tokenizer = tiny_tokenizer()
    model = value_model.load_value_model(str(folder / "policy"), tokenizer, device=CPU)
    move(model.model.layers[moved], by=by)
    save_model(model, tokenizer, folder / "reward")
    return str(folder / "reward")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_reward(tmp_path_factory.mktemp("reward"), moved=3)


def engine_of(reward: Any = length, *, critic: int | None = 2, **settings: Any) -> Any:
    """Of four layers, the policy's last one trained, and those many of the critic's."""
    settings.setdefault("policy", {"trainable_layers": 1})
    model = settings.pop("model", None) or of_family("llama", num_hidden_layers=4)
    settings["ppo"] = {"epochs": 2, "mini_batch_size": 4, **settings.pop("ppo", {})}
    return moved_engine(reward, model=model, critic={"trainable_layers": critic}, **settings)


def counted(engine: Any) -> Counter[tuple[str, int]]:
    """How many tokens go through each layer of whom from now on."""
    found: Counter[tuple[str, int]] = Counter()

    def count(name: str, number: int) -> Any:
        def add(_: Any, __: Any, states: torch.Tensor) -> None:
            found[name, number] += states.shape[:-1].numel()

        return add

    [*scorers] = engine.rewards.by_tokens.values()
    roles = engine.policy, engine.reference, engine.critic, *scorers
    for name, role in zip(ROLES, roles, strict=False):
        for number, layer in enumerate(role.model.model.layers if role else ()):
            layer.mlp.register_forward_hook(count(name, number))
    return found


def step_of(engine: Any, rollout: Any) -> dict[str, float]:
    metrics: dict[str, float] = engine.update(
        engine.estimate_advantages(rollout, engine.score(rollout))
    )
    return metrics


def layers_run(ran: Counter[tuple[str, int]]) -> list[dict[str, int]]:
    """Of each layer, who ran it for how many tokens."""
    return [{name: ran[name, n] for name in ROLES if ran[name, n]} for n in range(4)]


def test_frozen_layers_run_once_a_step(reward_folder):
    engine = engine_of(reward_folder)
    step_of(engine, rollout_of())  # which has found out who shares what
    ran = counted(engine)
    for _ in range(2):
        ran.clear()
        rollout = rollout_of()
        step_of(engine, rollout)
        tokens = sum(len(row.ids) for row in rollout.rows)
        read = sum(len(a) + len(b) for a, b in rollout.written)  # by the reward model: ends too
        by_layer = layers_run(ran)
        assert by_layer[0] == by_layer[1] == {"reward": read}
        # The reward model reads for the policy and its reference, whose third layer it has.
        assert by_layer[2] == {"reward": read, "critic": 3 * tokens}
        assert by_layer[3] == {
            "reward": read, "policy": 3 * tokens, "reference": tokens, "critic": 3 * tokens
        }  # fmt: skip


def test_greedy_responses_are_of_the_same_step(reward_folder):
    engine = engine_of(reward_folder, ppo={"estimator": "remax"})
    step_of(engine, rollout_of(greedy=rollout_of()))
    ran, rollout = counted(engine), rollout_of(greedy=rollout_of())
    step_of(engine, rollout)
    read = sum(len(a) + len(b) for a, b in rollout.written)
    assert layers_run(ran)[0] == {"reward": read}  # the greedy ones are the sampled ones


def test_a_critic_shares_with_a_reward_model_of_another_checkpoint(tmp_path):
    """One whose lower layers are almost the policy's."""
    engine = engine_of(saved_reward(tmp_path, moved=0, by=1e-6))
    step_of(engine, rollout_of())
    ran, rollout = counted(engine), rollout_of()
    step_of(engine, rollout)
    tokens = sum(len(row.ids) for row in rollout.rows)
    read = sum(len(a) + len(b) for a, b in rollout.written)
    assert layers_run(ran)[0] == {"policy": tokens, "reward": read}


WAYS: dict[str, dict[str, Any]] = {
    "each alone": {"ppo": {"micro_batch_tokens": 1}},
    "padded": {"packed": False},
    "as deep": {"critic": 1},
    "a whole critic": {"critic": None},
    "a whole policy": {"policy": {}},
    "no layer trained": {"policy": {"trainable_layers": 0}},
    "checkpointed": {"policy": {"trainable_layers": 1, "gradient_checkpointing": True}},
    "the sampler's": {"ppo": {"old_logprobs": "sampler", "kl_coef": 0}},
    "greedy": {"ppo": {"estimator": "remax"}},
    "layers of two kinds": {"model": "gemma3_text"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_the_same(monkeypatch, reward_folder, way):
    settings, found = dict(WAYS[way]), []
    packed = settings.pop("packed", True)
    family = settings.pop("model", None)
    for kept in (False, True):
        if family:
            settings["model"] = of_family(family, num_hidden_layers=4)
        engine = engine_of(length if family else reward_folder, **settings)
        for role in (engine.policy, engine.reference, engine.critic):
            if role is not None:
                role.reader.packs = packed
        if not kept:
            monkeypatch.setattr(engine.trunks, "of", lambda _: nullcontext())
        rollout = rollout_of(greedy=rollout_of())
        rollout = rollout_of(greedy=rollout_of(), logprobs=engine.passes.of_policy(rollout)[0])
        ran = counted(engine)
        with monkeypatch.context() as patch:
            steps = record(engine, patch)
            metrics = [step_of(engine, rollout) for _ in range(2)]
        gradients = [x for step in (*steps.policy, *steps.critic) for x in step.gradients]
        found.append((metrics, gradients, ran[("policy", 0)] + ran[("critic", 0)]))
    (expected, theirs, all_read), (metrics, ours, read) = found
    assert read < all_read / 2 or way.startswith("a whole")
    for a, b in zip(metrics, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for g, h in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4 * h.abs().max().item() + 1e-7)


def test_a_critic_of_the_policy_shares_its_frozen_layers():
    engine = engine_of(critic=1)
    ours, theirs = (role.model.model.layers for role in (engine.policy, engine.critic))
    shared = [
        {a.data_ptr() == b.data_ptr() for a, b in zip(x.parameters(), y.parameters(), strict=True)}
        for x, y in zip(ours, theirs, strict=True)
    ]
    assert shared == [{True}, {True}, {True}, {False}]


@pytest.mark.parametrize(
    ("policy", "critic"), [({}, None), ({"lora": {"rank": 2}}, None)], ids=["full", "lora"]
)
def test_nothing_is_kept_where_nothing_is_frozen(monkeypatch, policy, critic):
    uses = []
    active = Trunk.active
    monkeypatch.setattr(Trunk, "active", lambda *given: uses.append(given) or active(*given))
    step_of(engine_of(policy=policy, critic=critic), rollout_of())
    assert not uses
    step_of(engine_of(critic=1), rollout_of())
    assert uses


def test_states_are_kept_for_one_rollout_and_its_weights():
    engine = engine_of(critic=1)
    ran = counted(engine)

    def runs(rollout: Any) -> int:
        ran.clear()
        engine.values(rollout)
        return ran["critic", 0]

    one, other = rollout_of(), rollout_of()
    engine.values(other)
    tokens = runs(one)
    assert tokens and runs(one) == 0
    assert runs(other) == tokens and runs(one) == tokens
    with torch.no_grad():  # of both, as they share it
        engine.policy.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert runs(one) > tokens  # what may be shared is looked at again
    expected = value_model.read_values(
        engine.critic.model, Reader(engine.critic.model), engine.critic.reader.stack(one.rows)
    )
    torch.testing.assert_close(engine.values(one)[one.mask], expected)
    engine.generate(["Hi"])
    assert runs(one) == tokens
    engine.critic.values(engine.critic.reader.stack(one.rows))  # outside of a step
    assert ran["critic", 0] == 2 * tokens


class Role:
    def __init__(self, model: Any) -> None:
        self.model, self.reader = model, Reader(model)


FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "qwen3": (True, {}),
    "gpt2": (True, {}),
    "mamba": (True, {}),  # padded
    "mixtral": (True, {}),
    "mixtral, balanced": (False, {"output_router_logits": True}),
    "bloom": (False, {}),  # a norm of the embeddings that is trained, and layers that give tuples
    "gemma4_text": (False, {}),  # embeddings for each layer, of a matrix that is trained
    "gemma4_text, frozen": (False, {  # keys that upper layers have of lower ones
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 259,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_read_from_the_middle_where_that_gives_the_same(name):
    expected, settings = FAMILIES[name]
    model = of_family(name.partition(",")[0], **settings)
    freeze_lower_layers(model, model.config.num_hidden_layers // 2)
    if "frozen" in name:
        for parameter_name, parameter in model.named_parameters():
            if "per_layer_model" in parameter_name or "per_layer_projection_n" in parameter_name:
                parameter.requires_grad_(False)
    role = Role(model)
    with Trunks([role], []).of(None):
        assert (role.reader.trunk is not None) == expected
    assert role.reader.trunk is None


def test_what_layers_leave_in_the_model_is_seen():
    """A second path around the layers, of which the pass before has left something."""
    model = of_family("llama")
    freeze_lower_layers(model, 1)
    lower, upper = model.model.layers
    lower.mlp.register_forward_hook(lambda _, __, x: setattr(upper, "seen", x.detach()))
    upper.register_forward_hook(lambda module, _, x: x + module.seen)
    role = Role(model)
    with Trunks([role], []).of(None):
        assert role.reader.trunk is None


@pytest.mark.parametrize("policy", [{"trainable_layers": 1}, {"lora": {"rank": 2}}], ids=str)
def test_who_shares_what_is_asked_once_and_is_no_work_of_a_phase(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the reference is the policy without its adapters, all of which is frozen."""
    asked: list[int] = []
    find = Trunks._find
    monkeypatch.setattr(Trunks, "_find", lambda trunks: asked.append(1) or find(trunks))
    engine = engine_of(policy=policy, ppo={"old_logprobs": "sampler"})
    meter = Meter(CPU, torch.float32)
    for _ in range(2):
        rollout = engine.generate(["Hello there", "One two"] * 4)
        with meter.phase("score"):  # by a function
            scores = engine.score(rollout)
        assert {*meter.metrics(1, 1.0)} <= {"tokens_per_second/score", "memory/score"}
        engine.update(engine.estimate_advantages(rollout, scores))
        assert not any(kept._states for kept in engine.trunks._kept)
    assert asked == [1]


def test_an_engine_that_is_gone_leaves_no_weights() -> None:
    engine = engine_of()
    rollout = rollout_of()
    engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    weights = weakref.ref(next(x for x in engine.policy.model.parameters() if x.requires_grad))
    del engine
    gc.collect()
    assert weights() is None

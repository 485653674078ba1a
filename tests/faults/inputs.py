"""Settings and data as no program would write them: each is read, or refused with a message."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny import tiny_model_folder, tiny_tokenizer

from faults import REFUSED, SURVIVED, Try
from ppo_engine.cli import main
from ppo_engine.data.demonstrations import load_demonstrations
from ppo_engine.data.preferences import load_preferences
from ppo_engine.data.prompts import load_prompts
from ppo_engine.errors import UserError
from ppo_engine.settings.describe import dump_config
from ppo_engine.settings.schema import (
    GenerateConfig,
    GRPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)

LIMIT = 2.0  # seconds
CONFIGURATIONS, DATA_FILES = 2_000, 10_000
_COMMANDS: dict[str, Any] = {
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "generate": GenerateConfig,
}
_VALUES = (
    "&a [*a]", "&a {x: *a}", "{[a]: 1}", "? [a, b]\n: 1", "!!python/name:os.system", "<<: [1]",
    "1e-300", "1e300", "1e999", "-0.0", ".nan", ".inf", "9" * 5000, str(2**64), str(-(2**70)),
    "0x" + "f" * 40, "1:1:1", "2026-13-01", "true", "null", "~", "''", "[]", "{}", "[[[]]]",
    "{a: {b: {c: 1}}}", "n" * 300, "/" + "n/" * 3000, '"\\0"', '"\\ud800"', '"\\x1b[31m"',
    "meta", "privateuseone", "cuda:99", "cpu:7", "[" * 400, "|\n  a\n  b", "file.py:", ":name",
    "http://[", "http://u:p@h:99999/", "\u202e\u0000", "ﬀ", "%s%n{0}", "../../etc", "-", "- - -",
)  # fmt: skip
_PARTS = (
    "null", "true", "0", "-1", "1e999", "NaN", "1e300", "9" * 5000, '""', '" "', "[]", "{}", "[[]]",
    '{"a": 1}', '"\\ud83d"', '"\\u0000"', "[" * 2000, "[" * 200_000, '{"a":' * 2000, '"x', "\\",
    '{"role": "user"}', '[{"role": "user", "content": null}]', '[{"role": 1, "content": "a"}]',
    '"' + "x" * 100_000 + '"', "\x00", "\ufeff", "\u2028",
)  # fmt: skip
_PAIR = {"prompt": "Q", "chosen": "yes", "rejected": "no", "margin": 0.5}
_CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
_ROWS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "preferences": (
        load_preferences,
        [_PAIR, {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [0, 2, 1]}],
    ),
    "demonstrations": (
        load_demonstrations,
        [{"prompt": "Q", "response": "A"}, {"messages": _CHAT}],
    ),
    "prompts": (load_prompts, [{"prompt": "Q", "answer": 4}, {"prompt": _CHAT[:1], "tools": []}]),
}


def _spoiled(text: str, random: random.Random, values: tuple[str, ...], place: str) -> str:
    """`text` after one to three changes, half of them a value at a `place` (a pattern)."""
    for _ in range(random.randint(1, 3)):
        places = [found.span() for found in re.finditer(place, text)]
        if places and random.random() < 0.5:
            begin, end = random.choice(places)
            text = text[:begin] + random.choice(values) + text[end:]
            continue
        begin = random.randrange(len(text) + 1)
        end = min(len(text), begin + random.choice((0, 1, 1, 5, 50)))
        new = random.choice(("", text[begin:end] * 2, chr(random.randrange(0x250)), "\n", "  "))
        text = text[:begin] + new + text[end:]
    return text


def _whole(config: Any, folder: Path) -> Any:
    """With a model, data and a reward, so that a dry run without changes ends well."""
    model, data = folder / "tiny-chat", folder / "rows.jsonl"
    if not data.exists():
        tiny_model_folder(folder)
        rows = [_PAIR | {"prompt": f"Q{n}", "response": "A", "answer": "A"} for n in range(8)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, data=replace(config.data, path=str(data)))
    if isinstance(config, GenerateConfig):
        return replace(config, model=str(model))
    if isinstance(config, PPOConfig):
        reward = replace(config.reward, function="exact_match")
        return replace(config, policy=replace(config.policy, path=str(model)), reward=reward)
    return replace(config, model=replace(config.model, path=str(model)))


def configuration(number: int, folder: Path) -> Try:
    """A dry run with a file of settings that is spoiled in the `number`-th way."""
    draw = random.Random(number)
    command, kind = draw.choice(list(_COMMANDS.items()))
    text = _spoiled(dump_config(_whole(kind(), folder)), draw, _VALUES, r"(?<=: )\S+|(?<=\n)\S.*")
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    said, began = io.StringIO(), time.monotonic()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main([command, "--config", str(file), "--dry-run"])
    except BaseException as error:
        return Try("mutated settings", f"{number}: {type(error).__name__}: {error}")
    ending = {0: SURVIVED, 2: REFUSED}.get(status, f"{number}: exit {status}, {said.getvalue()}")
    return Try("mutated settings", _in_time(ending, number, began))


def data_file(number: int, folder: Path) -> Try:
    """A file of rows that is spoiled in the `number`-th way, read as the commands read it."""
    draw = random.Random(number)
    load, rows = draw.choice(list(_ROWS.values()))
    lines = [json.dumps(row) for row in rows * 2]
    as_array = draw.random() < 0.2
    text = f"[{', '.join(lines)}]" if as_array else "\n".join(lines) + "\n"
    text = _spoiled(text, draw, _PARTS, r'(?<=: )("[^"]*"|[\d.]+|\[.*?\])|(?<=\n)\{.*')
    file = folder / ("data.json" if as_array else "data.jsonl")
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    began = time.monotonic()
    try:
        load(str(file), tokenizer=_TOKENIZER, on_bad_line=draw.choice(("error", "skip")))
        ending = SURVIVED
    except UserError:
        ending = REFUSED
    except BaseException as error:
        ending = f"{number}: {type(error).__name__}: {str(error)[:300]}"
    return Try("mutated data", _in_time(ending, number, began))


def _in_time(ending: str, number: int, began: float) -> str:
    took = time.monotonic() - began
    return ending if took <= LIMIT else f"{number}: {took:.1f} s, {ending}"


_TOKENIZER = tiny_tokenizer()


def whole_configurations(folder: Path) -> list[int]:
    """The exit statuses of dry runs before anything is spoiled. They import what the commands need,
    which takes longer than a mistake may."""
    file, found = folder / "settings.yaml", []
    for command, kind in _COMMANDS.items():
        file.write_text(dump_config(_whole(kind(), folder)), encoding="utf-8")
        with redirect_stdout(io.StringIO()):
            found.append(main([command, "--config", str(file), "--dry-run"]))
    return found


def tries() -> Iterator[Try]:
    with tempfile.TemporaryDirectory() as folder:
        whole_configurations(Path(folder))
        for number in range(CONFIGURATIONS):
            yield configuration(number, Path(folder))
        for number in range(DATA_FILES):
            yield data_file(number, Path(folder))

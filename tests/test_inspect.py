"""`ppo-engine inspect`: what it shows is what the commands do, and a person can see it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_files import BLUE, RED, USER, write
from templates import TEMPLATES, sentencepiece_tokenizer
from tiny import tiny_model_folder

from ppo_engine import cli
from ppo_engine.inspection.rows import inspect_examples, inspect_preferences, open_model
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    ModelConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    SFTConfig,
)
from ppo_engine.text.tokenizer import spellings
from ppo_engine.training.reward import RewardModelTrainer
from ppo_engine.training.sft import SFTTrainer

END = "<|im_end|>"
ASKED = f"<|im_start|>user⏎\n{USER['content']}{END}⏎\n<|im_start|>assistant⏎\n"
CHAT = {"messages": [USER, BLUE]}
PAIR = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder without weights for each template, one without a template, and Llama-2's kind."""
    found = {}
    tokenizers = {name: make() for name, make in TEMPLATES.items()}
    for name, tokenizer in {**tokenizers, "llama2": sentencepiece_tokenizer()}.items():
        found[name] = tiny_model_folder(tmp_path_factory.mktemp(name), tokenizer=tokenizer)
    found["text"] = tiny_model_folder(tmp_path_factory.mktemp("text"), chat_template=False)
    for folder in found.values():
        Path(folder, "model.safetensors").unlink()
    return found


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: dict[str, str]) -> Any:
    """Calls the command on rows; returns what it prints."""

    def call(*rows: Any, model: str = "chatml", options: str = "") -> str:
        file = str(write(tmp_path, *rows))
        status = cli.main(["inspect", "--data", file, "--model", folders[model], *options.split()])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        text = printed.out if status == 0 else printed.err
        return text.replace(f"{file}:", "line ").replace(file, "FILE")

    return call


def tokens(text: str) -> list[str]:
    """The tokens of each part, without the marks between them."""
    parts = re.findall(r"(?:^  │ .*\n)+", text, flags=re.MULTILINE)
    return [re.sub(r"^  │ ", "", p, flags=re.MULTILINE).replace("·", "")[:-1] for p in parts]


def line(text: str, start: str) -> str:
    """The line of the summary that starts so."""
    return next(x.strip() for x in text.splitlines() if x.strip().startswith(start))


def test_learned_tokens_of_a_chat(shown) -> None:
    text = shown(CHAT)
    assert tokens(text) == [f"{ASKED}⟦Blue.{END}⟧"]
    assert "FILE, as examples (a guess" in text and f"answers end with {END}" in text
    assert f"6 of them learned, the last is {END}" in text and "⟦learned⟧" in text
    assert line(text, "learned") == "learned   min 6, median 6, 95 % 6, max 6, of each example"


def test_a_conversation_of_several_answers(shown) -> None:
    """In one sequence; in one for each answer where the template drops former thoughts."""
    row = {"messages": [USER, BLUE, USER, RED]}
    assert tokens(shown(row)) == [f"{ASKED}⟦Blue.{END}⟧⏎\n{ASKED}⟦Red.{END}⟧"]
    text = shown(row, model="qwen3")
    thought = "<think>⏎\n⏎\n</think>⏎\n⏎\n"
    assert tokens(text) == [
        f"{ASKED}⟦{thought}Blue.{END}⟧",
        f"{ASKED}Blue.{END}⏎\n{ASKED}⟦{thought}Red.{END}⟧",
    ]
    assert "1 inspected conversations become one example per answer" in line(text, "note")


def test_each_token_is_set_apart(shown) -> None:
    """What only looks like a special token, too; a character that several tokens spell is one."""
    row = {"prompt": "é\t<|im_end>\x1b", "response": f"a{END}"}
    assert r"│ é·\t·<·|·i·m·_·e·n·d·>·\x1b⟦a·<|im_end|>·<|im_end|>⟧" in shown(row)


def test_a_space_that_the_tokenizer_prepends(shown, tmp_path) -> None:
    """Also where it is the first token, which decoders strip."""
    assert "│ <s>· ·a· ·b\n" in shown({"prompt": "a b"}, model="llama2")
    folder = tiny_model_folder(tmp_path, tokenizer=sentencepiece_tokenizer())
    model = open_model(folder)
    model.tokenizer.backend_tokenizer.post_processor = None
    found = spellings(model.tokenizer, model.tokenizer("a b")["input_ids"], [False] * 4, range(4))
    assert [text for _, text in found] == [" ", "a", " ", "b"]


TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("kind", ["sft", "preferences", "prompts"])
def test_what_the_chat_template_is_handed(shown, kind) -> None:
    """Tools and arguments of the row, arguments and the date of the settings."""
    row = {"prompt": [USER], "response": "a", "chosen": "a", "rejected": "b", "tools": [TOOL]}
    options = f"--as {kind} data.chat_template_kwargs.enable_thinking=false"
    [text, *_] = tokens(shown(row, model="qwen3", options=options))
    assert f"<tools>⏎\n{json.dumps(TOOL)}⏎\n</tools>" in text
    assert "<|im_start|>assistant⏎\n<think>⏎\n⏎\n</think>⏎\n⏎" in text.replace("⟦", "")
    text = shown(row, model="llama3", options=f"--as {kind} run.date=2025-02-09")
    assert "Today Date: 09 Feb 2025" in tokens(text)[0]
    row |= {"tools": None, "chat_template_kwargs": {"date_string": "today"}}
    assert "Today Date: today" in tokens(shown(row, model="llama3", options=f"--as {kind}"))[0]


def test_tool_calls_and_thoughts_are_learned(shown) -> None:
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "t"}
    result = {"role": "tool", "content": "3"}
    text = shown({"messages": [USER, asks, result, BLUE], "tools": [TOOL]}, model="qwen3")
    call = '<tool_call>⏎\n{"name": "add", "arguments": {"a": 1}}⏎\n</tool_call>'
    assert f"⟦<think>⏎\nt⏎\n</think>⏎\n⏎\n{call}{END}⟧" in tokens(text)[0]
    assert f"⏎\nBlue.{END}⟧" in tokens(text)[-1]


DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Name a color.\n\nAssistant:"


def test_dialogues_of_hh_rlhf(shown) -> None:
    row = {"chosen": f"{DIALOGUE} Blue.", "rejected": f"{DIALOGUE} Red?"}
    text = shown(row)
    start = f"<|im_start|>user⏎\nHi{END}⏎\n<|im_start|>assistant⏎\nYes?{END}⏎\n{ASKED}"
    assert tokens(text) == [start.rstrip("\n"), f"Blue.{END}⟦⏎⟧", f"Red?{END}⟦⏎⟧"]
    assert "FILE, as preferences (a guess" in text and "⟦where the score is read⟧" in text
    assert re.search(r"chosen, 7 tokens; the score is read at the last of all \d+\n", text)
    assert line(text, "form") == "form      1 chat, rendered by the chat template"


def test_rankings_and_responses_that_did_not_end(shown) -> None:
    row = {
        "prompt": "Q",
        "responses": ["a", "b", "c"],
        "ranks": [1, 0, 1],
        "finished": [True, False, True],
    }
    text = shown(row, model="text")
    assert tokens(text) == ["Q", "⟦b⟧", f"a⟦{END}⟧", f"c⟦{END}⟧"]
    assert re.findall(r"rank \d", text) == ["rank 0", "rank 1", "rank 1"]


def test_pairs_of_whole_texts(shown) -> None:
    text = shown({"chosen": "It is good", "rejected": "It is bad", "margin": 0.5}, model="text")
    assert tokens(text) == ["It is", f" good⟦{END}⟧", f" bad⟦{END}⟧"]
    assert "no prompt is given: the texts' common start is taken" in text and "margin 0.5" in text


def test_prompts(shown) -> None:
    text = shown({"prompt": [USER], "answer": "x" * 300}, {"prompt": "Q"}, options="--as prompts")
    assert tokens(text) == [ASKED.rstrip("\n"), "Q"]
    assert text.count("▶ the policy writes from here") == 2 and "guess" not in text
    assert re.search(r"column 'answer' for the reward: 'x+… \(\d+ characters more\)", text)


def test_text_on_a_chat_model(shown) -> None:
    """It goes past the template, which is said; nothing is to be said of a model without one."""
    rows = {"prompt": "Q", "response": "a"}, CHAT
    text = shown(*rows)
    assert tokens(text)[0] == f"Q⟦a{END}⟧"
    assert "1 raw text, past the chat template" in line(text, "form")
    assert text.count("the model's chat template is not used") == 1
    assert "1 of 2 examples are plain text" in line(text, "note")
    asked = ASKED.replace(USER["content"], "Q")
    assert tokens(shown(rows[0], options="data.as_chat=true")) == [f"{asked}⟦a{END}⟧"]
    text = shown(rows[0], model="text")
    assert line(text, "form") == "form      1 raw text" and "no chat template" in text


def test_columns_are_read_or_named(shown) -> None:
    row = {"instruction": "Q", "system": "S", "output": "a", "source": "b"}
    text = shown(row)
    assert tokens(text)[0].startswith(f"<|im_start|>system⏎\nS{END}⏎\n<|im_start|>user⏎\nQ{END}")
    assert "nothing reads these columns: 'source' (1 row)" in line(text, "note")


@pytest.mark.parametrize("option", ["", "data.on_bad_line=skip"])
def test_broken_lines_are_counted(shown, option) -> None:
    """Those that cannot be read, and those that the template refuses; training stops at them."""
    refused = {"messages": [{"role": "system", "content": "s"}, USER, BLUE]}
    text = shown(CHAT, "not json", {"messages": 1}, refused, model="gemma", options=option)
    assert line(text, "rows") == "rows      1 usable, 3 not"
    assert "line 2: not valid JSON" in text and "line 4: refused by the model's chat tem" in text
    assert ("ppo-engine sft stops at a bad row" in text) == (not option)


def test_truncation(shown) -> None:
    row = {"prompt": "0123456789", "response": "abcdefghij"}
    text = shown(row, model="text", options="data.max_tokens=8")
    assert tokens(text) == ["[6 tokens truncated]\n6789⟦abcd⟧\n[7 tokens truncated]"]
    assert "the end is truncated" in text
    assert "1 of 1 inspected examples were truncated to 8 tokens" in line(text, "note")
    text = shown(PAIR, model="text", options="data.max_tokens=4")
    assert tokens(text) == ["goo⟦d⟧", f"bad⟦{END}⟧"]
    assert "all 4 (3 more are truncated" in text and "all 4 (2 more are truncated" in text
    text = shown({"prompt": "12"}, {"prompt": "123"}, options="data.max_prompt_tokens=2")
    assert tokens(text) == ["12"] and "prompt too long: 3 tokens" in text


def test_long_texts_are_cut_in_the_display(shown) -> None:
    row = {"prompt": "a" * 300, "response": "b" * 300}
    [text] = tokens(shown(row, {**row, "prompt": "c"}, model="text", options="--rows 1"))
    assert text == f"{'a' * 200}\n[201 tokens not shown, 101 of them marked]\n⟦{'b' * 199}{END}⟧"


def test_as_many_rows_as_are_asked_for(shown) -> None:
    rows = [{"prompt": str(n)} for n in range(5)]
    assert tokens(shown(*rows)) == ["0", "1", "2"]
    text = shown(*rows, options="--rows 4")
    assert tokens(text) == ["0", "1", "2", "3"] and text.endswith("1 further row not shown\n")
    assert shown(*rows, options="--rows 0").endswith("5 further rows not shown\n")
    assert "further" not in shown(*rows, options="--rows 5")


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([PAIR], "preferences"),
        ([{"prompt": "Q", "responses": ["a", "b"], "ranks": [0, 1]}], "preferences"),
        ([CHAT], "examples"),
        ([{"prompt": "Q", "completion": "a"}], "examples"),
        ([CHAT, CHAT, {"prompt": "Q"}], "examples"),  # of which prompts could be made, too
        ([{"prompt": "Q", "kind": "a"}], "prompts"),
        ([{"prompt": "Q", "responses": ["a", "b"]}], "prompts"),
        (["broken", {"prompt": "Q"}, {"prompt": "Q", "chosen": "a", "rejected": "b"}], "prompts"),
    ],
)
def test_the_kind_of_rows_is_guessed(shown, rows, kind) -> None:
    assert f"FILE, as {kind} (a guess" in shown(*rows)


def test_settings_tell_the_kind_too(shown, tmp_path) -> None:
    """Those of a file as well: what only one command has."""
    assert "as prompts" in shown(PAIR, options="data.max_prompt_tokens=9")
    settings = tmp_path / "sft.yaml"
    settings.write_text("sft: {epochs: 2}\ndata: {max_tokens: 9}\n")
    row = {**PAIR, "response": "a" * 9}
    text = shown(row, model="text", options=f"--config {settings}")
    assert "as examples" in text and "truncated to 9 tokens" in text


def test_columns_and_a_system_prompt_of_the_settings(shown) -> None:
    row = {"q": USER["content"], "a": "Blue.", "b": "Red."}
    names = "data.columns.prompt=q data.columns.%s=a data.system_prompt=Brief."
    system = f"<|im_start|>system⏎\nBrief.{END}⏎\n"
    text = shown(row, options=names % "response")
    assert "FILE, as examples (a guess" in text
    assert tokens(text) == [f"{system}{ASKED}⟦Blue.{END}⟧"]
    text = shown(row, options=names % "chosen" + " data.columns.rejected=b")
    assert "FILE, as preferences (a guess" in text and tokens(text)[0] == system + ASKED[:-1]
    text = shown(row, options=names % "gold")
    assert "FILE, as prompts (a guess" in text and "column 'gold' for the reward: 'Blue.'" in text
    assert tokens(text) == [system + ASKED[:-1]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"x": 1}], "", "No command takes the rows of"),
        (["broken"], "", "No usable row in"),
        ([PAIR], "--as sft", "no column 'response'"),
        ([PAIR], "--rows -1", "--rows must be 0 or more"),
        ([PAIR], "data.nope=1", "data.nope: unknown key"),
        ([PAIR], "data.path=gone.jsonl", "gone.jsonl does not exist"),
        ([PAIR], "model.path=/gone", "'/gone' does not exist"),
    ],
)
def test_mistakes_are_told(shown, rows, options, message) -> None:
    text = shown(*rows, options=options)
    assert text.startswith("error: ") and message in text


def test_no_data_were_given(capsys, folders) -> None:
    assert cli.main(["inspect", "--model", folders["text"]]) == 2
    assert "--data FILE" in capsys.readouterr().err


def test_ends_that_the_checkpoint_declares(shown, tmp_path, folders) -> None:
    """Of its generation config, or of its configuration where it has none."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folders["gemma"], name)
        before = file.read_text()
        file.write_text(json.dumps({**json.loads(before), "eos_token_id": [261]}))
        text, scored = shown(CHAT, model="gemma"), shown(PAIR, model="gemma")
        file.write_text(before)
        assert "answers end with <eos>, <start_of_turn>, <end_of_turn>" in text
        assert "answers end with <eos>, <end_of_turn>" in scored  # the trainer does not ask
        Path(folders["gemma"], "generation_config.json").unlink(missing_ok=True)


def test_marked_tokens_have_a_colour_where_there_are_colours(shown, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown({"prompt": "Q", "response": "a"}, model="text")
    assert "\x1b[1;32ma\x1b[0m" in text and f"\x1b[35m{END}\x1b[0m" in text
    assert "\x1b[1;32mQ" not in text


def test_examples_are_those_that_are_trained_on(tmp_path) -> None:
    folder = tiny_model_folder(tmp_path)
    file = str(write(tmp_path, CHAT, {"prompt": "Q" * 20, "response": "a"}, {"messages": [USER]}))
    data = DemonstrationDataConfig(file, eval_fraction=0, max_tokens=16, on_bad_line="skip")
    config = SFTConfig(model=ModelConfig(path=folder), data=data)
    found = inspect_examples(config, open_model(folder), 9)
    trained = SFTTrainer(config=config).training
    parts = [part for row in found.rows for part in row.parts]
    assert [(part.ids, part.marked) for part in parts] == [(t.ids, t.trained) for t in trained]
    assert found.usable == 2 and found.tokens["tokens"] == [len(t) for t in trained]


def test_preferences_are_those_that_are_trained_on(tmp_path) -> None:
    """Truncated, and a sample of them, as it is drawn for the run's seed."""
    folder = tiny_model_folder(tmp_path)
    rows = [{**PAIR, "prompt": "Q" * n, "chosen": f"good {n}"} for n in range(1, 30, 3)]
    file = str(write(tmp_path, *rows))
    data = PreferenceDataConfig(file, eval_fraction=0, max_tokens=16, max_pairs=4)
    config = RewardModelConfig(model=ModelConfig(path=folder), data=data)
    found = inspect_preferences(config, open_model(folder), 9)
    trained = RewardModelTrainer(config=config).training
    shown = [
        [start.ids + part.ids for part in responses]
        for start, *responses in (row.parts for row in found.rows)
    ]
    assert shown == [ranking.rows for ranking in trained] and len(shown) == 4
    assert "4 of 10 preferences were drawn (data.max_pairs)." in found.notes


def test_a_preference_without_a_pair_is_one_that_is_not_usable(tmp_path) -> None:
    """Its responses are the same as far as they are read."""
    folder = tiny_model_folder(tmp_path)
    same = {"prompt": "Q", "chosen": "y" * 30 + "a", "rejected": "y" * 30 + "b"}
    data = PreferenceDataConfig(str(write(tmp_path, PAIR, same)), eval_fraction=0, max_tokens=20)
    config = RewardModelConfig(model=ModelConfig(path=folder), data=data)
    found = inspect_preferences(config, open_model(folder), 9)
    assert (found.usable, found.skipped) == (1, 1)
    assert "leaves 1 without a pair" in " ".join(found.notes)

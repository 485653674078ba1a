"""Data: rows of files, prompts, preferences, demonstrations, the split, packing."""

from __future__ import annotations

from faults.bug import Bug, InFile

_ROWS = [
    Bug("duplicate keys are taken", "if len(row) != len(pairs):", "if False:"),
    Bug("NaN is a number", "    raise BadLineError(\"number that is not finite\", f\" ({name})\")", "    return float(name)"),
    Bug("1e999 is a number", "if not math.isfinite(number):", "if False:"),
    Bug("lone surrogates pass", 'if "\\\\u" in text:', "if False:"),
    Bug("deep nesting is a crash", "    except RecursionError:\n        raise BadLineError(\"nested too deeply\") from None\n    except json.JSONDecodeError:\n        raise",
        "    except json.JSONDecodeError:\n        raise"),
    Bug("lines are split at U+2028", "yield line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line",
        'yield from (part.encode() for part in line.removeprefix(BYTE_ORDER_MARK).decode(errors="surrogateescape").splitlines(True))'),
    Bug("a byte-order mark is part of the first line", "line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line", "line"),
    Bug("lines are counted from 0", "enumerate(_lines(path), start=1)", "enumerate(_lines(path))"),
    Bug("skipped lines are not counted", "        self.skipped.add(place, reason, detail)\n", ""),
    Bug("bad lines are skipped unasked", 'self.skip = on_bad_line == "skip"', "self.skip = True"),
    Bug("an empty file is no data, and no mistake", "    if not found:\n        raise", "    if False:\n        raise"),
]  # fmt: skip

_PROMPTS = [
    Bug("the longest prompt that fits is too long", "if tokens > min(max_prompt_tokens, room):", "if tokens >= min(max_prompt_tokens, room):",
        "test_prompts"),
    Bug("the model's room is not looked at", "if tokens > min(max_prompt_tokens, room):", "if tokens > max_prompt_tokens:"),
    Bug("max_prompt_tokens is not looked at", "if tokens > min(max_prompt_tokens, room):", "if tokens > room:"),
    Bug("columns that some rows lack are shifted", "[example.columns.get(name) for example in examples]",
        "[example.columns[name] for example in examples if name in example.columns]"),
    Bug("the prompt is a column too", 'if name != "prompt"}', "}"),
]  # fmt: skip

_PREFERENCES = [
    Bug("higher ranks are better", "there.sort(key=lambda item: item[0])", "there.sort(key=lambda item: -item[0])"),
    Bug("tied ranks are different", "tuple(places.index(rank) for rank, _, _ in there)", "tuple(range(len(there)))"),
    Bug("responses without a rank are the best", "if rank is not None and rank >= 0", "if rank is not None"),
    Bug("chosen and rejected change places", "Ranking(prompt, (chosen, rejected), (0, 1), margin", "Ranking(prompt, (rejected, chosen), (0, 1), margin"),
    Bug("margins are dropped", "(0, 1), margin, prompt_given=given)", "(0, 1), None, prompt_given=given)"),
    Bug("which responses ended is dropped", 'tuple(ended for _, _, ended in there) if "finished" in lists else None', "None"),
    Bug("tied pairs count", "sum(a != b for index", "sum(True for index"),
    Bug("equal responses are a pair", "    if chosen == rejected:", "    if False:"),
    Bug("whole texts are cut within a word", 'shared = shared[: max((space.start() for space in re.finditer(r"\\s", shared)), default=0)]', "pass"),
    Bug("dialogues end at the first turn", 'start = text.find(_ASSISTANT, text.rfind("\\n\\nHuman:"))', "start = text.find(_ASSISTANT)"),
    Bug("turns of one speaker are not joined", 'if messages and messages[-1]["role"] == role:', "if False:"),
    Bug("dialogues whose turns differ are taken", "    if prompt != rejected[: ends[1]]:", "    if False:"),
    Bug("the sample is the file's start", "random.Random(seed).sample(range(len(rankings)), len(rankings))", "range(len(rankings))",
        "test_preferences test_reward_trainer"),
    Bug("the sample is of rankings, not of pairs", "room -= rankings[index].pairs", "room -= 1"),
]  # fmt: skip

_DEMONSTRATIONS = [
    Bug("prompts are learned", "[False] * len(asked) + [True] * len(answer)", "[True] * len(asked) + [True] * len(answer)"),
    Bug("the first token is learned", "EncodedExample(ids, [False, *trained[1:]]) for", "EncodedExample(ids, trained) for",
        "test_demonstrations test_sft"),
    Bug("long examples lose their question", "start = min(excess, max(0, example.trained.index(True) - limit // 2))", "start = excess"),
    Bug("long examples lose their answer", "start = min(excess, max(0, example.trained.index(True) - limit // 2))", "start = 0"),
    Bug("answers have no end", "encode_response(tokenizer, example.response, finished=True)", "encode_response(tokenizer, example.response, finished=False)"),
    Bug("empty answers are learned", "if not all(answer.strip() for answer in answers):", "if False:"),
    Bug("an example that begins with an answer is taken", "        if first == 0:", "        if False:"),
]  # fmt: skip

_SPLIT = [
    Bug("a prompt is on both sides", 'key = json.dumps(example.prompt) if example.prompt else f"no prompt {index}"', 'key = f"{index}"'),
    Bug("examples without a prompt are one group", 'f"no prompt {index}"', '"no prompt"'),
    Bug("all seeds split alike", "random.Random(seed).shuffle(groups)", "random.Random(0).shuffle(groups)"),
    Bug("the first prompts are held out", "    random.Random(seed).shuffle(groups)\n", ""),
    Bug("too many are held out", "if len(held_out) + len(group) <= target:", "if len(held_out) < target:"),
]  # fmt: skip

_PACKING = [
    Bug("positions go on over a row", "for n in (*(len(examples[i]) for i in row), left) for t in range(n)]",
        "for n in (width,) for t in range(n)]", "test_sft"),
    Bug("padding belongs to the last example", "[i for i in row for _ in examples[i].ids] + [-1] * left",
        "[i for i in row for _ in examples[i].ids] + [row[-1]] * left", "test_sft test_demonstrations"),
    Bug("rows are too long", "if length <= left), None)", "if length <= left + 1), None)"),
    Bug("passes are too large", "(len(passes[-1]) + 1) * width > rows * room:", "len(passes[-1]) * width > rows * room:"),
    Bug("every model can pack", "return all(seen(apart, rows) <= limit for rows in (1, 2))", "return True", "test_sft"),
    Bug("packing is probed in one row only", "for rows in (1, 2))", "for rows in (1,))", "test_sft"),
    Bug("models without positions can pack", "    if not models.takes_positions(model.base_model):\n        return False\n", "", "test_sft"),
]  # fmt: skip

_ANNOTATIONS = [
    Bug("the labelled response is the worst", "{name: int(name != best) for name in family}", "{name: int(name == best) for name in family}"),
    Bug("left and right change places", '(left, right) if selected == "left" else (right, left)', '(right, left) if selected == "left" else (left, right)'),
    Bug("drafts and discarded answers count", 'if status not in (None, "submitted"):', "if False:"),
    Bug("cancelled annotations count", 'if found.get("was_cancelled") or found.get("skipped"):', "if False:"),
    Bug("a question for the worst is one for the best", "if _FOR_THE_WORST.search(found[0]):", "if False:"),
    Bug("several labels are a ranking", "if plain and not {*whole} <= {*fields}:", "if False:"),
    Bug("ranks of a ranking are its places", 'item.get("rank", place)) for place', "place) for place"),
]  # fmt: skip

FILES = [
    InFile("ppo_engine/data/rows.py", "test_rows", _ROWS),
    InFile("ppo_engine/data/prompts.py", "test_prompts test_ppo_trainer", _PROMPTS),
    InFile("ppo_engine/data/preferences.py", "test_preferences", _PREFERENCES),
    InFile("ppo_engine/data/demonstrations.py", "test_demonstrations", _DEMONSTRATIONS),
    InFile("ppo_engine/data/split.py", "test_preferences", _SPLIT),
    InFile("ppo_engine/data/packing.py", "test_demonstrations", _PACKING),
    InFile("ppo_engine/data/annotations.py", "test_annotations", _ANNOTATIONS),
]

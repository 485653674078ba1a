"""`ppo-engine agreement`: two people, several in a file, one with themselves."""

from __future__ import annotations

import pytest
from ranking import row, write_rows

from ppo_engine import cli
from ppo_engine.errors import UserError
from ppo_engine.pages.ranking.compare import compare

RIGHT, TURNED = [0, 1, 2, 3], [3, 2, 1, 0]


def ranked(number, ranks, **more):
    return row(number, ranks=ranks, **more)


def test_two_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ada = [ranked(n, RIGHT, annotator="ada") for n in range(4)]
    bob = [ranked(n, TURNED if n == 2 else RIGHT, annotator="bob") for n in range(1, 5)]
    bob[0]["ranks"] = [0, 0, 1, None]
    write_rows(tmp_path / "a.jsonl", ada)
    write_rows(tmp_path / "b.jsonl", bob)
    assert cli.main(["agreement", "a.jsonl", "b.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ada and bob",
        "  Kendall's τ 0.27 ± 0.64, 56.7% ± 35.6% of 15 pairs alike (± standard error), 3 prompts",
        "  they differ most on",
        "    a.jsonl:3: Question 2? (τ -1.00)",
        "      ada  1 > 2 > 3 > 4",
        "      bob  4 > 3 > 2 > 1",
        "    a.jsonl:2: Question 1? (τ 0.82)",
        "      ada  1 > 2 > 3 > 4",
        "      bob  1 = 2 > 3; 4 not ranked",
    ]


def test_responses_in_another_order_are_the_same(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", [ranked(0, RIGHT)])
    turned = {name: row(0)[name][::-1] for name in ("responses", "finished")}
    two = write_rows(tmp_path / "b.jsonl", [ranked(0, TURNED) | turned])
    lines = list(compare([str(one), str(two)]))
    assert lines[0] == "a.jsonl and b.jsonl"  # who are not named
    assert "τ 1.00, 100.0% of 6 pairs" in lines[1] and len(lines) == 2


def test_equal_responses_count_once(tmp_path):
    twins = {"prompt": "p", "responses": ["a", "a", "b"]}
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [twins | {"ranks": ranks}])
        for name, ranks in (("a", [0, 0, 1]), ("b", [1, 1, 0]))
    ]
    assert "of 1 pair alike" in list(compare([*map(str, files)]))[1]


def test_several_in_a_file_and_one_with_themselves(tmp_path):
    names = ("ada", "bob", "eve")
    file = write_rows(
        tmp_path / "a.jsonl", [ranked(n, RIGHT, annotator=name) for name in names for n in (0, 1)]
    )
    write_rows(
        tmp_path / "a.jsonl.repeats",
        [ranked(1, TURNED, annotator="bob"), ranked(7, RIGHT, annotator="bob")],
    )
    lines = [line for line in compare([str(file)]) if not line.startswith(" ")]
    assert lines == [
        "bob, the same again in another order", "ada and bob", "ada and eve", "bob and eve",
    ]  # fmt: skip
    whole = "\n".join(compare([str(file)]))
    assert "τ -1.00, 0.0% of 6 pairs alike (± standard error), 1 prompt" in whole


def test_one_name_in_two_files_is_two(tmp_path):
    files = [
        str(write_rows(tmp_path / name, [ranked(0, RIGHT, annotator="ada")]))
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert next(compare(files)) == f"ada ({files[0]}) and ada ({files[1]})"


def test_only_the_five_worst_are_shown(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", [ranked(n, RIGHT) for n in range(9)])
    two = write_rows(tmp_path / "b.jsonl", [ranked(n, TURNED) for n in range(9)])
    assert sum("(τ " in line for line in compare([str(one), str(two)])) == 5


def test_nothing_to_compare(tmp_path):
    skipped = ranked(0, [None] * 4, annotator="bob", skipped=True)
    one = write_rows(tmp_path / "a.jsonl", [ranked(0, RIGHT, annotator="ada")])
    two = write_rows(tmp_path / "b.jsonl", [skipped, ranked(1, RIGHT, annotator="bob")])
    with pytest.raises(UserError, match=r"Nothing to compare: .* \(ada, bob\)"):
        list(compare([str(one), str(two)]))
    with pytest.raises(UserError, match=r"c\.jsonl:1: no 'ranks'.*A ranking has 'prompt'"):
        list(compare([str(write_rows(tmp_path / "c.jsonl", [row(0)]))]))


def test_a_terminal_is_not_written_to_by_a_prompt(tmp_path):
    evil = {"prompt": "a\x1b[2Jb\nc", "responses": ["x", "y"], "annotator": "e\x1bve"}
    one = write_rows(tmp_path / "a.jsonl", [evil | {"ranks": [0, 1]}])
    two = write_rows(tmp_path / "b.jsonl", [evil | {"ranks": [1, 0], "annotator": "bob"}])
    whole = "\n".join(compare([str(one), str(two)]))
    assert "\x1b" not in whole and "a [2Jb c" in whole and "e ve and bob" in whole

"""Functions by name: found as `python file.py` and `python -m` find theirs, or a clear error."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppo_engine.errors import UserError
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.rollout.environment import load_environment
from ppo_engine.settings.schema import EnvironmentConfig
from ppo_engine.user_functions import importing
from ppo_engine.user_functions.importing import import_function


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The path as the console script has it: without the working folder, and nothing of what other
    tests have imported."""
    for name, module in list(sys.modules.items()):
        if importing._home(module) in importing._folders:
            monkeypatch.delitem(sys.modules, name)
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    monkeypatch.setattr(importing, "_folders", set())
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(name: str, text: str) -> str:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return name


def scores(spec: str) -> list[float]:
    return RewardFunction(import_function(spec))(["p"] * 2, ["a", "bb"], [True] * 2, {}).tolist()


LENGTHS = "def lengths(texts):\n    return [len(text) for text in texts]\n"
ZEROS = LENGTHS.replace("len(text)", "0")
JUDGE = """
from helpers import lengths

def judge(prompts, responses):
    return lengths(responses)

def judge_late(prompts, responses):
    import late
    return late.lengths(responses)

def reply(prompts, turns):
    return [str(lengths(messages[-1]["content"])) for messages in turns]

if __name__ == "__main__":
    raise SystemExit("it was imported")
"""
POOL = """
import multiprocessing
from helpers import lengths

def work(text):
    return lengths([text])[0]

def judge(prompts, responses):
    with multiprocessing.get_context("{method}").Pool(1) as pool:
        return pool.map(work, responses)
"""


def test_a_file_imports_its_neighbours():
    write("rl/helpers.py", LENGTHS)
    write("rl/late.py", LENGTHS)
    write("rl/my_rewards.py", JUDGE)
    assert scores("rl/my_rewards.py:judge") == [1, 2]
    assert scores("rl/my_rewards.py:judge_late") == [1, 2]
    environment = load_environment(EnvironmentConfig(function="rl/my_rewards.py:reply"))
    assert environment(["p"], [[{"role": "assistant", "content": "ab"}]], {}) == ["[1, 1]"]


def test_a_module_is_found_in_the_working_folder():
    write("pkg/helpers.py", LENGTHS)
    write("pkg/rewards.py", JUDGE.replace("from helpers", "from .helpers"))
    write("plain.py", JUDGE.replace("from helpers", "from pkg.helpers"))
    assert scores("pkg.rewards:judge") == [1, 2]
    assert scores("plain:judge") == [1, 2]
    with pytest.raises(
        UserError, match=r"relative import.* module of its package: pkg\.rewards:FUN"
    ):
        import_function("pkg/rewards.py:judge")
    write("pkg/__init__.py", "")
    write("pkg/maths/rewards.py", JUDGE.replace("from helpers", "from ..helpers"))
    with pytest.raises(UserError, match=r"its package: pkg\.maths\.rewards:FUN"):
        import_function("pkg/maths/rewards.py:judge")
    assert scores("pkg.maths.rewards:judge") == [1, 2]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("spec", ["rl/pool_rewards.py:judge", "rl.pool_rewards:judge"])
def test_a_process_pool_finds_the_functions(method, spec):
    text = POOL.format(method=method)
    if ".py" not in spec:
        text = text.replace("from helpers", "from rl.helpers")
    write("rl/helpers.py", LENGTHS)
    write("rl/pool_rewards.py", text)
    assert scores(spec) == [1, 2]


def test_files_of_one_name_in_two_folders_stay_apart():
    for folder, text in (("a", LENGTHS), ("b", ZEROS)):
        write(f"{folder}/helpers.py", text)
        write(f"{folder}/rewards.py", JUDGE)
    first, second = (import_function(f"{folder}/rewards.py:judge") for folder in "ab")
    assert (first([], ["xx"]), second([], ["xx"])) == ([2], [0])
    assert first.__globals__ is not second.__globals__
    assert pickle.loads(pickle.dumps(second)) is second
    with pytest.raises(pickle.PicklingError):  # never the other's
        pickle.dumps(first)
    assert scores("a/rewards.py:judge") == [1, 2]


def test_a_module_of_the_working_folder_is_not_another_folders_file():
    write("a/rewards.py", JUDGE.replace("from helpers import lengths", LENGTHS))
    write("rewards.py", JUDGE.replace("from helpers import lengths", ZEROS))
    assert scores("a/rewards.py:judge") == [1, 2]
    assert scores("rewards:judge") == [0, 0]


@pytest.mark.parametrize("name", ["math", "wave", "torch", "judging_kit"])
def test_a_file_does_not_hide_a_module(name, monkeypatch):
    """Nor is it hidden: imported already, or not yet; Python's, or installed."""
    write("site/judging_kit/__init__.py", "")
    monkeypatch.setattr(importing.site, "getsitepackages", lambda: ["site"])
    before = sys.modules.get(name)
    write(f"{name}.py", "def judge(prompts, responses):\n    return [0.0] * len(responses)\n")
    with pytest.raises(UserError, match=f"has the name of the module '{name}' .* Rename the file"):
        import_function(f"{name}.py:judge")
    assert sys.modules.get(name) is before and os.getcwd() not in sys.path


def test_a_file_that_exits_is_named():
    write("script.py", "import argparse\nargparse.ArgumentParser().parse_args(['x'])\n")
    with pytest.raises(UserError, match=r"script.py' could not be imported: SystemExit: 2"):
        import_function("script.py:judge")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/absent.py:judge", "absent.py' does not exist"),
        ("{folder}/reward.py:judge", "reward.py' does not exist. Did you mean '"),
        ("{folder}/rewards.py:jugde", "no function 'jugde'. Did you mean 'judge'"),
        ("{folder}/rewards.py:LIMIT", r"'LIMIT' in .* is not a function, but 3 \(int\)"),
        ("{folder}/rewards.py:", "names no function"),
        ("{folder}/syntax.py:judge", "could not be imported: SyntaxError"),
        ("no_such_package.rewards:judge", "could not be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path, spec, message):
    (tmp_path / "rewards.py").write_text("def judge(prompts, responses): return []\nLIMIT = 3\n")
    (tmp_path / "syntax.py").write_text("def judge(:\n")
    with pytest.raises(UserError, match=message):
        import_function(spec.format(folder=tmp_path))


def test_a_file_runs_once_for_all_its_functions_until_it_changes(tmp_path):
    file = tmp_path / "judges.py"
    file.write_text("judge = object\ndef one(p, r): return judge\ndef two(p, r): return one\n")
    one, two = (import_function(f"{file}:{name}") for name in ("one", "two"))
    assert two(0, 0) is one
    os.utime(file, ns=(0, 0))
    assert import_function(f"{file}:one") is not one

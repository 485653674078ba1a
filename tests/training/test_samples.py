"""Which responses are written, which trackers get, which the console shows."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, call

from ppo_engine.training.samples import show_samples


def rows(name: str, count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name}?", "response": f"{name} {i}", "score": i} | more for i in range(count)
    ]


def test_trackers_get_four_of_each_kind_and_the_console_one() -> None:
    trained, held_out = rows("a", 6), rows("b", 5, held_out=True)
    run, trackers, progress = Mock(), Mock(), Mock()
    show_samples(3, trained + held_out, run, trackers, progress)
    run.log_samples.assert_called_once_with(3, trained + held_out)
    trackers.log_samples.assert_called_once_with(3, trained[:4] + held_out[:4])
    assert progress.sample.call_args_list == [
        call("a?", "a 0", 0, "sample of step 3"),
        call("b?", "b 0", 0, "held-out sample of step 3"),
    ]


def test_samples_before_training_are_called_so() -> None:
    progress = Mock()
    show_samples(0, rows("b", 1, held_out=True), Mock(), Mock(), progress)
    progress.sample.assert_called_once_with("b?", "b 0", 0, "held-out sample before training")


def test_without_samples_nothing_is_written() -> None:
    run, trackers, progress = Mock(), Mock(), Mock()
    show_samples(3, [], run, trackers, progress)
    assert run.mock_calls == trackers.mock_calls == progress.mock_calls == []

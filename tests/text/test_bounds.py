"""A chat template that runs on, or writes without an end, is refused within its bounds."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest
from tiny import tiny_tokenizer

from ppo_engine.errors import UserError
from ppo_engine.text import bounds
from ppo_engine.text.template import ChatTemplate, TemplateError

WORDS = "{{ messages[0].content }}"
ASKED = [{"role": "user", "content": "hi"}]
LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}"
DOUBLED = (
    "{% set ns = namespace(s='x') %}"
    "{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)


def memory() -> tuple[int, int] | None:
    """The limits that the process has: soft and hard."""
    return bounds.resource and bounds.resource.getrlimit(bounds.resource.RLIMIT_DATA)


LIMIT = memory()  # before any test


def template(source: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP + WORDS, "takes more than 0.3 s"),
        (TWICE + WORDS, "takes more than 0.3 s"),
        ("{{ 'x' * 1000000000 }}" + WORDS, "takes more than 256 MiB"),
        (DOUBLED + WORDS, "takes more than 256 MiB"),
        ("{{ messages[0].content * 10000000 }}", "writes 20,000,000 characters"),
        ("{{ 10 ** 10 ** 10 }}" + WORDS, "computes powers"),
        (WORDS + " " * 2_000_000, "has 2,000,025 characters"),
    ],
)
def test_a_template_without_an_end_is_refused(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "256" in message and not bounds.resource:
        pytest.skip("nothing bounds memory here")
    slow = 0.3 if " s" in message else 60
    monkeypatch.setattr(bounds, "SECONDS", slow)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^The chat template of '' {message}"):
        template(source).render(ASKED, ask=True)
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_limits_are_as_they_were() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    for source in (WORDS, "{{ 'x' * 1000000000 }}" + WORDS):
        with contextlib.suppress(UserError):
            template(source).render(ASKED, ask=True)
        assert memory() == LIMIT
        assert signal.getsignal(signal.SIGALRM) is handler


def test_an_alarm_of_somebody_else_is_left_alone() -> None:
    signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        template(WORDS).render(ASKED, ask=True)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_another_thread_renders_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(template(WORDS).render(ASKED, ask=True)))
    thread.start()
    thread.join()
    assert found == ["hi"]


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_template_nested_too_deep_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match=r"refused by .* chat template .*recursion"):
        template(source).render(ASKED, ask=True)

"""What stands in messages and is not shown by the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_engine.data.rows import BadLines
from ppo_engine.text.prompt import Prompt
from ppo_engine.text.template import ChatTemplate, TemplateError


def remark_unseen(
    bad_lines: BadLines, template: ChatTemplate, prompt: Prompt, options: Mapping[str, Any]
) -> None:
    """Count a row whose messages hold keys that the template does not show; a `TemplateError` for
    the name of who speaks, without which a conversation is another one."""
    unseen = template.unseen(prompt, options) if not isinstance(prompt, str) else set()
    if "name" in unseen:
        raise TemplateError(
            "the model's chat template does not show the 'name' of messages: write it into "
            "'content', or leave it out"
        )
    for key in sorted(unseen):
        bad_lines.skipped.remarks[f"the chat template does not show {key!r} of messages"] += 1

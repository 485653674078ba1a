"""How other libraries behave under the commands."""

from __future__ import annotations

import os
import warnings


def set_up_libraries() -> None:
    """Their progress bars and advice would break the live display; errors still come through. And
    torch keeps the memory that it frees."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from ppo_engine.memory import keep_freed_memory
    from ppo_engine.pretrained.quiet import hide_loading_bars

    keep_freed_memory()
    hide_loading_bars()
    logging.set_verbosity_error()
    # Meant for developers of other libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")

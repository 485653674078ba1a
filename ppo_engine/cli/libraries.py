"""How other libraries behave under the commands."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Their progress bars and advice would break the live display; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from ppo_engine.pretrained.quiet import hide_loading_bars

    hide_loading_bars()
    logging.set_verbosity_error()
    # Meant for developers of other libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")

"""transformers without its progress bars and reports, which are for its own developers' users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging


def hide_loading_bars() -> None:
    """Hide progress bars of loading weights (seconds), but not those of downloads (minutes)."""
    hidden = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # hides both
    if not hidden:
        enable_progress_bars()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars, and its report of weights that are new or not used,
    which `weights` judges; both are as they were afterwards."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    hidden = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hide_loading_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()  # shows the hub's, too
        if hidden:
            disable_progress_bars()

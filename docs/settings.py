"""Writes docs/settings.md anew; run it after a change in `ppo_engine/settings/schema/`."""

from pathlib import Path

from ppo_engine.settings.describe import markdown

if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(markdown(), encoding="utf-8")

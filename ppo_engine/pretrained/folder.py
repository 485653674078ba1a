"""Whether a path is a model's folder; without torch, so that a wrong one is told at once."""

from __future__ import annotations

from pathlib import Path

from ppo_engine.errors import UserError
from ppo_engine.messages import nearest_path


def check_folder(path: str) -> None:
    """A UserError where `path` can only be a folder, by how it begins or because something stands
    there, and is none, or is that of a run, whose model lies further in. Names pass."""
    folder = Path(path).expanduser()
    if (path.startswith((".", "/", "~")) or folder.exists()) and not folder.is_dir():
        raise UserError(
            f"Model folder {path!r} does not exist or is not a folder.{nearest_path(path)}"
        )
    inside = [name for name in ("policy", "reward_model") if (folder / name).is_dir()]
    if inside and not (folder / "config.json").exists():
        raise UserError(
            f"{path!r} is a run's folder; its model is in {path.rstrip('/')}/{inside[0]}."
        )

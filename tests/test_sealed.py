"""A sealed folder shows each change, in whichever file."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from ppo_engine import sealed
from ppo_engine.run.directory import atomic_folder
from ppo_engine.sealed import SUMS, Damaged, check, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(random.Random(0).randbytes(5000))
    (folder / "inner/a  b.json").write_text("{}")
    (folder / "empty").touch()
    seal(folder)
    return folder


def test_a_whole_folder_passes_here_and_with_sha256sum(folder: Path) -> None:
    check(folder)
    found = subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, capture_output=True)
    assert found.returncode == 0, found.stderr
    (folder / "README.md").write_text("somebody's own")
    check(folder)


def test_a_folder_without_sums_passes(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path / "nothing")


def damaged(folder: Path) -> bool:
    try:
        check(folder)
    except Damaged:
        return True
    return False


def test_every_flip_and_every_cut_is_noticed(folder: Path) -> None:
    draw = random.Random(1)
    files = [folder / name for name in ("weights", "inner/a  b.json", SUMS)]
    for n in range(300):
        file = files[n % 3]
        content = file.read_bytes()
        at = draw.randrange(len(content))
        changed = bytearray(content)
        changed[at] ^= 1 << draw.randrange(8)
        for other in (bytes(changed), content[:at]):
            file.write_bytes(other)
            assert damaged(folder), (file, at, other)
        file.write_bytes(content)
        assert not damaged(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "weights").unlink()
    with pytest.raises(Damaged, match=f"weights is missing. If .* on purpose, remove {SUMS} there"):
        check(folder)
    (folder / SUMS).unlink()
    check(folder)


def test_it_is_read_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    of = sealed._sum
    monkeypatch.setattr(sealed, "_sum", lambda file: read.append(file) or of(file))
    check(folder)
    check(folder)
    assert len(read) == 3
    os.utime(folder / "weights", (1, 1))
    check(folder)
    assert len(read) == 6


def test_what_a_library_wrote_for_its_owner_alone_others_may_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "weights").touch(mode=0o600)
            (folder / "program").touch(mode=0o755)
    finally:
        os.umask(before)
    modes = {x.name: stat.S_IMODE(x.stat().st_mode) for x in (tmp_path / "model").iterdir()}
    assert modes == {"weights": 0o644, "program": 0o755, SUMS: 0o644}
    shutil.rmtree(tmp_path / "model")

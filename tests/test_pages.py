"""The pages of docs/ name files, code and metrics that exist, and their arithmetic is right."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("choosing", "failures", "method", "metrics")]

GB = 1e9
# Weights, those of embeddings and head, layers, hidden and inner width: as config.json has them.
MODELS = {
    "135M": (0.1345e9, 49152 * 576, 30, 576, 1536),  # SmolLM2
    "0.5B": (0.494e9, 151936 * 896, 24, 896, 4864),  # Qwen2.5, and the following
    "1.5B": (1.544e9, 151936 * 1536, 28, 1536, 8960),
    "3B": (3.086e9, 151936 * 2048, 36, 2048, 11008),
    "7B": (7.616e9, 2 * 152064 * 3584, 28, 3584, 18944),
}
DEVICES = {
    "CPU, 16 GB, float32": (16, True),
    "GPU, 24 GB": (24, False),
    "GPU, 80 GB": (80, False),
    "GPU, 141 GB": (141, False),
}


def links(page: Path) -> Iterator[tuple[str, Path]]:
    """(text, file) of each link to a file."""
    for text, target in re.findall(
        r"\[([^\]]*)\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")
    ):
        if "://" not in target:
            yield text, (page.parent / target).resolve()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_what_they_name(page: Path) -> None:
    """To files that exist; code that links to a Python file is defined there."""
    found = list(links(page))
    assert found
    assert [target for _, target in found if not target.exists()] == []
    code = [(text[1:-1], target) for text, target in found if text.startswith("`")]
    for name, target in code:
        defined = rf"^(class |def |    def )?{re.escape(name)}\b"
        assert re.search(defined, target.read_text(encoding="utf-8"), re.MULTILINE), (
            f"{name} is not in {target}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_a_page_lead_to_its_headings(page: Path) -> None:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    there = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", page.read_text(encoding="utf-8"))) - there == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_metrics_are_those_of_the_page_of_metrics(page: Path) -> None:
    kinds = (
        "objective|policy|value|eval|rollout|rewards|sft|reward|time|mfu|padding|overhead|memory"
    )
    named = set(re.findall(rf"`((?:{kinds})/[\w<>/]+)`", page.read_text(encoding="utf-8")))
    there = set(
        re.findall(rf"`((?:{kinds})/[\w<>/]+)`", (DOCS / "metrics.md").read_text(encoding="utf-8"))
    )
    assert named
    assert named - there == set()


def ways(model: str, critic: bool, fp32: bool) -> Iterator[tuple[str, float]]:
    """The ways to train, from the most to the least that it takes, with GB: of the states of the
    weights as docs/choosing.md has them, a pass, and what else there is."""
    weights, embeddings, layers, hidden, inner = MODELS[model]
    size = 4 if fp32 else 2
    tokens = 512 if fp32 else 2048
    rest = layers * (10 * hidden + 2 * inner) * size * tokens + 1.5 * GB
    roles = 2 if critic else 1  # that are trained, each with a frozen one beside it
    master = 4  # weight, and in bf16 the rest of its master
    full = roles * (master + 8 + size) + size
    eight = roles * (master + 2 + size) + size
    yield "full", full * weights + rest
    yield "8-bit moments", eight * weights + rest
    yield "a quarter of the layers", (size + (full - size) / 4) * weights + rest
    if fp32:
        yield "LoRA", (3 if critic else 1) * size * weights + rest
        return
    # A model comes in float32: the last that is loaded is there so beside the others.
    yield "LoRA", max((6 if critic else 2) * weights + rest, (8 if critic else 4) * weights)
    base = 0.52 * (weights - embeddings) + 2 * embeddings
    reward = 2 * weights if critic else 0.0
    yield "LoRA on 4 bits", max(roles * base + reward + rest, base + 2 * reward)


def what_fits(model: str, device: str, critic: bool) -> str:
    memory, fp32 = DEVICES[device]
    room = memory * GB * (0.75 if fp32 else 0.9)
    return next((way for way, taken in ways(model, critic, fp32) if taken <= room), "too small")


def tables() -> list[list[list[str]]]:
    """The tables of docs/choosing.md as rows of cells."""
    blocks = re.findall(
        r"(?:^\|.*\n)+", (DOCS / "choosing.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in blocks
    ]


@pytest.mark.parametrize(("title", "critic"), [("GRPO", False), ("PPO", True)])
def test_what_fits_on_which_device(title: str, critic: bool) -> None:
    [table] = [table for table in tables() if table[0][0] == title]
    head, _, *body = table
    assert head[1:] == list(MODELS)
    assert body == [
        [device, *(what_fits(model, device, critic) for model in MODELS)] for device in DEVICES
    ]


def test_pictures_are_drawn_from_the_runs_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    drawn = importlib.import_module("pictures").pictures()
    assert {f"{name}.png" for name in drawn} == {p.name for p in DOCS.glob("*.png")} - {"demo.png"}
    curves = [line for name in ("estimators", "failures") for line in lines(drawn[name])]
    assert len(curves) == 2 * 3 + 3 * 4
    assert all(len(curve.get_xdata()) in (16, 30) for curve in curves)


def lines(figure: Figure) -> list[Line2D]:
    return [line for axes in figure.axes for line in axes.get_lines()]

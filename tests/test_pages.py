"""The pages of docs/ name files, code and metrics that exist; their tables are those of today."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ppo_kernels import can_pack

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("choosing", "failures", "method", "metrics")]


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


@pytest.mark.slow
@pytest.mark.skipif(not can_pack(torch.float32), reason="weights are not packed on this CPU")
def test_what_fits_is_what_the_estimate_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    choosing = importlib.import_module("choosing")
    written = choosing.PAGE.read_text(encoding="utf-8")
    assert choosing.page() == written, "run `python docs/choosing.py`"


def test_pictures_are_drawn_from_the_runs_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    drawn = importlib.import_module("pictures").pictures()
    others = {"demo.png", "ranking.png", "report.png"}  # demo.png: the demo; docs/screenshots.py
    assert {f"{name}.png" for name in drawn} == {p.name for p in DOCS.glob("*.png")} - others
    curves = [line for name in ("estimators", "failures") for line in lines(drawn[name])]
    assert len(curves) == 2 * 3 + 3 * 4
    assert all(len(curve.get_xdata()) in (16, 30) for curve in curves)


def lines(figure: Figure) -> list[Line2D]:
    return [line for axes in figure.axes for line in axes.get_lines()]

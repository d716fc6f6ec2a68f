"""The pages of the site name all that is registered: no plug-in without a row."""

import re
from pathlib import Path

import pytest

from vlprune.recipes import NAMES, load
from vlprune.registry import ALLOCATIONS, METRICS, STRATEGIES, TASKS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "metrics": METRICS,
    "strategies": STRATEGIES,
    "allocations": ALLOCATIONS,
    "tasks": TASKS,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_plugin_has_a_row_on_its_page(page: str) -> None:
    ours = {
        name
        for name, entry in PAGES[page].items()
        if getattr(entry, "__module__", "vlprune").startswith("vlprune.")
    }
    rows = set(re.findall(r"^\| `(\w+)`", (DOCS / f"{page}.md").read_text(), re.MULTILINE))
    assert len(ours) > 4
    assert ours <= rows, f"docs/{page}.md lacks {sorted(ours - rows)}"


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_of_the_papers_is_named(name: str) -> None:
    text = (DOCS / "recipes.md").read_text()
    papers = [preset for preset in load(name).PRESETS if not preset.startswith("scenes-")]
    assert papers
    assert [preset for preset in papers if f"`{preset}`" not in text] == []

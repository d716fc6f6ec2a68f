"""Every Python block of the README, of CONTRIBUTING and of the pages in docs runs."""

import re
from pathlib import Path

import pytest
import torch

from vlprune.registry import METRICS

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name in ("README.md", "CONTRIBUTING.md", *PAGES)
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize("code", BLOCKS)
def test_the_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = dict(METRICS)
    try:
        exec(compile(code, "README", "exec"), {"__name__": "readme"})
        for name in set(METRICS) - set(known):  # a metric that the block added scores a model
            from conftest import dissected

            import vlprune

            model, anatomy = dissected("deit")
            scores = vlprune.score(model, name, anatomy=anatomy)
            values = torch.tensor(scores.values["blocks.0.attn:head"])
            assert len(values.unique()) > 1
    finally:
        for name in set(METRICS) - set(known):
            del METRICS._entries[name]

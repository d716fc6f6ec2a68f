"""Python blocks of the README and the pages in docs run, and their commands can be pasted."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import typer

from vlprune import cli
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


LINES = [
    pytest.param(line, id=f"{name}: {line.partition('  ')[0]}")
    for name in ("README.md", "CONTRIBUTING.md", *PAGES)
    for block in re.findall(
        r"^```sh\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE
    )
    for line in block.splitlines()
    if line.startswith("vlprune ")
]


@pytest.mark.parametrize("line", LINES)
def test_the_command_line_can_be_pasted(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(cli.app).commands[name]
    command.make_context(name, arguments)  # as a shell would hand them over: options, kinds, count


def test_a_line_that_cannot_be_pasted_is_seen() -> None:
    for line, said in (
        ("vlprune verify clip-half  files and weights again", "extra argument"),
        ("vlprune verify clip-half --orignal scenes-clip", "No such option"),
    ):
        with pytest.raises(Exception, match=said):
            test_the_command_line_can_be_pasted(line)


@pytest.mark.slow
def test_the_command_lines_of_the_readme_run_in_order(tmp_path: Path) -> None:
    lines = [line for param in LINES if param.id.startswith("README") for line in param.values]
    assert len(lines) > 9
    for line in lines:
        done = subprocess.run(
            shlex.split(line, comments=True), cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

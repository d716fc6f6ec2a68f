"""A page with parts that a program writes: what stands between two markers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from vlprune.clocks import device_name


def write(page: Path | None, name: str, text: str) -> None:
    """Print a part, and put it between its markers where there is a page."""
    print(text, flush=True)
    if page is None:
        return
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} must have the markers {begin} and {end}; it lacks one.")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def machine(timer: str, take: str = "") -> str:
    """Return a line on where and how it was measured: the command without its page.

    Args:
        timer: "cpu" or "wall".
        take: which of the rounds, where there are several.
    """
    words = sys.argv
    if "--page" in words:
        words = words[: words.index("--page")] + words[words.index("--page") + 2 :]
    command = "python " + " ".join(words)
    clock = "processor time" if timer == "cpu" else "wall time"
    return (
        f"`{command}`, {device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, {clock}, {f'{take} of the rounds, ' if take else ''}"
        f"load {os.getloadavg()[0]:.1f}."
    )

"""One HTML page of a comparison: self-contained, light and dark, from `file://`, without scripts.

Figures are SVG inside the page. They are drawn in colours that nobody uses, each of which is then
replaced by a variable of the page's style, so that one figure serves both schemes.
"""

from __future__ import annotations

import html
import io
import os
import re
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from vlprune.compare.charts import LIGHT, Palette, cost_share, draw_all, towers_of
from vlprune.compare.results import Comparison, Point, write_csv
from vlprune.store import write_json

_INK, _GRID, _PAPER = "#010102", "#010103", "#010104"
_LINES = tuple(f"#0102{number:02x}" for number in range(8))
_SHARES = tuple(f"#0103{number:02x}" for number in range(7))
_VARIABLES = Palette(ink=_INK, grid=_GRID, paper=_PAPER, lines=_LINES, shares=_SHARES)
_NAMES = {
    _INK: "var(--ink)",
    _GRID: "var(--grid)",
    _PAPER: "var(--paper)",
    **{colour: f"var(--line-{n})" for n, colour in enumerate(_LINES)},
    **{colour: f"var(--share-{n})" for n, colour in enumerate(_SHARES)},
}
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "vlprune"}


def write_page(comparison: Comparison, folder: str | os.PathLike[str]) -> Path:
    """Write index.html, points.csv, a PNG of every figure and every plan; return the page's path.

    Args:
        comparison: what `compare` returned.
        folder: made if it is not there; files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(comparison, folder / "points.csv")
    for digest, plan in comparison.plans.items():
        write_json(plan, folder / "plans" / f"{digest}.json")
    draw_all(comparison, LIGHT, lambda name, figure: _png(figure, folder, name))
    page = folder / "index.html"
    page.write_text(render(comparison))
    return page


def render(comparison: Comparison) -> str:
    """Return the page as HTML."""
    figures: dict[str, str] = {}

    def keep(name: str, figure: Figure) -> None:
        figures[name] = _svg(figure, name, comparison)

    draw_all(comparison, _VARIABLES, keep)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = {(a.first, a.second): a for a in comparison.agreements}
    found |= {(a.second, a.first): a for a in comparison.agreements}
    return environment.get_template("page.html").render(
        c=comparison,
        figures=figures,
        towers=towers_of(comparison),
        share=cost_share,
        light=LIGHT,
        verdicts=[_verdict(comparison, keep) for keep in comparison.keeps],
        agreement=lambda a, b: found.get((a, b)),
        signs=lambda keep: _signs(comparison, keep),
        is_number=lambda value: value == value,
        min=min,
    )


def _png(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{_file_name(name)}.png", dpi=160, facecolor="white")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _svg(figure: Figure, name: str, comparison: Comparison) -> str:
    """A figure as an SVG element whose colours are the page's and whose ids are its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _NAMES.items():
        text = text.replace(colour, variable)
    for place, point in enumerate(comparison.points):
        mark = f'<g id="point-{place}">'
        text = text.replace(mark, f"{mark}<title>{html.escape(_tip(comparison, point))}</title>")
    prefix = re.sub(r"\W", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    return re.sub(
        r"^<svg[^>]*viewBox=(\"[^\"]*\")[^>]*>",
        rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox=\1 role="img" '
        rf'aria-label="{html.escape(name)}">',
        text,
        count=1,
    )


def _tip(comparison: Comparison, point: Point) -> str:
    return (
        f"{point.label}, keep {point.keep:g}: {point.value:.2f} "
        f"({comparison.of_dense(point):.1%} of dense), {point.params:,} parameters, "
        f"{point.latency:.2f} x the time"
    )


def _verdict(comparison: Comparison, keep: float) -> str:
    """One sentence on a budget: the best, and what is not told apart from it."""
    points = comparison.at(keep)
    if not points:
        return f"At {keep:.0%} kept nothing could be made."
    best = points[0]
    said = (
        f"At {keep:.0%} kept, {best.label} is first with {best.value:.1f} "
        f"({comparison.of_dense(best):.1%} of dense)"
    )
    if not comparison.differences:
        return (
            f"{said}; how sure that is, is not known: the task gives one number for all examples."
        )
    near = comparison.not_told_apart(best)
    if not near:
        return f"{said}; its lead over every other is beyond noise."
    return f"{said}; not told apart from it: {'; '.join(point.label for point in near)}."


def _signs(comparison: Comparison, keep: float) -> list[tuple[Point, list[str]]]:
    """Points of a budget, the best first, each with a sign against each: +, - or none."""
    points = comparison.at(keep)
    places = [comparison.points.index(point) for point in points]
    known = {(d.first, d.second): d for d in comparison.differences}
    rows = []
    for one, place in zip(points, places, strict=True):
        row = []
        for other in places:
            found = known.get((min(place, other), max(place, other)))
            if found is None or not found.is_beyond_noise:
                row.append("")
            else:
                first_is_better = found.difference > 0
                row.append("+" if first_is_better == (place < other) else "-")
        rows.append((one, row))
    return rows

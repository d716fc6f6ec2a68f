"""Pictures and tables: they show what the plan and the anatomy say."""

import io
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import dissected, random_keep
from rich.console import Console
from rich.table import Table

import vlprune
from vlprune.report import anatomy_table, draw_plan, plan_table

KEPT, GONE = (0x25, 0x63, 0xA8), (0xE3, 0xE6, 0xEA)


def drawn(plan: vlprune.Plan, path: Path, title: str = "") -> np.ndarray:
    """The pixels [height, width, 3] of the picture, 0..255."""
    draw_plan(plan, path, title)
    assert path.read_bytes().startswith(b"\x89PNG")
    return np.rint(matplotlib.image.imread(path)[..., :3] * 255).astype(int)


def pixels_of(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == color).all(-1).sum())


def plan_of(kind: tuple[str, ...], keep: str, name: str = "open_clip") -> vlprune.Plan:
    _, anatomy = dissected(name)
    axes = [axis for axis in anatomy.axes if axis.kind in kind]
    count = {"all": 1.0, "half": 0.5, "none": 0.0}[keep]
    return vlprune.make_plan(anatomy, {a.name: tuple(range(int(count * a.units))) for a in axes})


def rows_of(table: Table) -> list[list[str]]:
    file = io.StringIO()
    Console(width=200, file=file).print(table)
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in file.getvalue().splitlines()]
    return [cells for cells in lines if cells]


# -- pictures --------------------------------------------------------------------------------------


def test_a_picture_shows_kept_and_gone_in_the_shares_of_the_plan(tmp_path: Path) -> None:
    all_, half, none = (
        drawn(plan_of(("head", "ffn"), keep), tmp_path / f"{keep}.png")
        for keep in ("all", "half", "none")
    )
    assert all_.shape == half.shape == none.shape
    assert pixels_of(all_, GONE) < 0.05 * pixels_of(all_, KEPT)  # at the edges of bars
    assert pixels_of(none, KEPT) == 0
    ratio = pixels_of(half, KEPT) / pixels_of(half, GONE)
    assert 0.85 < ratio < 1.1  # the counts are written on the bars
    assert len(np.unique(half.reshape(-1, 3), axis=0)) > 10


def test_a_picture_has_a_panel_for_every_tower(tmp_path: Path) -> None:
    one = drawn(plan_of(("head", "ffn"), "half", "deit"), tmp_path / "one.png")
    two = drawn(plan_of(("head", "ffn"), "half"), tmp_path / "two.png")
    many = drawn(plan_of(("head", "ffn"), "half", "BlipForQuestionAnswering"), tmp_path / "m.png")
    assert one.shape[0] < two.shape[0] < many.shape[0]


def test_a_title_is_drawn_above(tmp_path: Path) -> None:
    plan = plan_of(("head", "ffn"), "half")
    plain, titled = drawn(plan, tmp_path / "a.png"), drawn(plan, tmp_path / "b.png", "A title")
    assert plain.shape == titled.shape
    assert (plain[:25] == 255).all() < (titled[:25] != 255).any()


@pytest.mark.parametrize("kind", ["head", "ffn"])
def test_a_plan_of_one_kind_is_drawn(kind: str, tmp_path: Path) -> None:
    picture = drawn(plan_of((kind,), "half"), tmp_path / "kept.png")
    assert pixels_of(picture, KEPT) > 1000


def test_every_model_and_uneven_plan_is_drawn(tiny, tmp_path: Path) -> None:
    _, anatomy = tiny
    plan = vlprune.make_plan(anatomy, random_keep(anatomy, seed=2))
    assert pixels_of(drawn(plan, tmp_path / "kept.png"), GONE) > 1000


def test_a_plan_without_heads_and_neurons_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plan must decide on heads or neurons to be drawn; it"):
        draw_plan(plan_of(("layer",), "half"), tmp_path / "kept.png")
    assert list(tmp_path.iterdir()) == []


# -- tables ----------------------------------------------------------------------------------------


def test_an_anatomy_table_names_every_tower_and_kind_with_its_counts(tiny) -> None:
    _, anatomy = tiny
    header, *rows = rows_of(anatomy_table(anatomy))
    assert header == ["tower", "kind", "axes", "units", "params a unit", "params in all"]
    groups: dict[tuple[str, str], list[int]] = {}
    for axis in anatomy.axes:
        groups.setdefault((axis.tower, axis.kind), []).append(axis.units)
    assert {(tower, kind): [int(axes), int(units)] for tower, kind, axes, units, *_ in rows} == {
        group: [len(units), sum(units)] for group, units in groups.items()
    }


def test_an_anatomy_table_says_what_can_go() -> None:
    _, anatomy = dissected("deit")
    table = anatomy_table(anatomy)
    assert table.title.startswith("VisionTransformer: 122,602 parameters, 569,856 MACs a call; ")
    rows = {row[1]: row[2:] for row in rows_of(table)[1:]}
    # a head: 3 x 16 rows of 48 weights and a bias, 16 columns of 48; a neuron: 48 + 1 + 48
    assert rows["head"] == ["3", "9", f"{48 * 49 + 16 * 48:,}", f"{9 * (48 * 49 + 16 * 48):,}"]
    assert rows["ffn"] == ["3", "576", "97", f"{576 * 97:,}"]


def test_a_plan_table_counts_what_stays_per_layer() -> None:
    _, anatomy = dissected("deit")
    keep = {f"blocks.{i}.attn:head": tuple(range(i)) for i in range(3)}
    plan = vlprune.make_plan(anatomy, keep)
    table = plan_table(plan)
    assert table.title == f"plan {plan.digest}"
    assert rows_of(table)[1:] == [["vision", "head", "3 of 9", "33%", "0 1 2"]]

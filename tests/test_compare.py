"""Comparisons: scores once, cuts everywhere, says what is noise; a page that stands by itself."""

import csv
import dataclasses
import html
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import dissected
from test_ablation import pairs
from test_second_package import site as site  # the fixture
from torch import nn
from typer.testing import CliRunner

import vlprune
from vlprune import cli
from vlprune.compare import Comparison, compare, write_page
from vlprune.compare.charts import LIGHT, quality_chart
from vlprune.compare.run import _spearman
from vlprune.metrics.magnitude import Magnitude
from vlprune.pruner import record_of
from vlprune.tasks import CallableTask, Retrieval

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


@pytest.fixture(scope="module")
def found() -> Comparison:
    model, _ = dissected("open_clip")
    return compare(
        model,
        Retrieval(pairs()),
        Retrieval(pairs(size=12)),
        metrics=("taylor", "magnitude"),
        allocations=("global", "uniform"),
        keeps=(0.01, 0.7, 0.9),  # so little cannot be reached
        resource="params",
        name="<tiny & small>",
    )


@pytest.fixture(scope="module")
def folder(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "here"
    write_page(found, folder)
    return folder


def test_every_point_is_the_model_that_its_plan_makes(found: Comparison) -> None:
    model, _ = dissected("open_clip")
    assert found.keeps == (0.9, 0.7, 0.01)
    assert len(found.points) == 2 * 2 * 2 * 2  # metrics, allocations, budgets, repair
    test = Retrieval(pairs(size=12))
    assert found.dense.value == pytest.approx(test.measure(model))
    for point in found.points:
        plan = found.plans[point.plan]
        assert plan.asked == {"params": point.keep}
        assert point.params == plan.planned.params
        assert point.macs == plan.planned.macs
        assert point.low <= point.value <= point.high
        if not point.repaired:
            small = vlprune.prune(model, plan, verify=False)
            assert point.value == pytest.approx(test.measure(small))


def test_what_cannot_be_made_is_named_with_the_reason(found: Comparison) -> None:
    assert len(found.failures) == 4
    assert {f.keep for f in found.failures} == {0.01}
    assert all(f.reason.startswith("budget") for f in found.failures), found.failures[0].reason


def test_each_metric_scores_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compute = Magnitude.compute
    monkeypatch.setattr(Magnitude, "compute", lambda self: calls.append(1) or compute(self))
    model, _ = dissected("deit")
    task = CallableTask(
        [torch.randn(4, 3, 32, 32)], lambda model, batch: model(batch).square().mean()
    )
    result = compare(model, task, metrics=("magnitude",), keeps=(0.8, 0.6), repaired=False)
    assert len(calls) == 1
    assert len(result.points) == 2
    assert result.differences == ()  # one number for all examples: nothing to resample
    assert "how sure that is, is not known" in vlprune.compare.page.render(result)
    assert result.made_by["same_examples"]


def test_differences_pair_points_of_one_budget(found: Comparison) -> None:
    assert len(found.differences) == 2 * 8 * 7 / 2
    for one in found.differences:
        first, second = found.points[one.first], found.points[one.second]
        assert first.keep == second.keep
        assert one.difference == pytest.approx(first.value - second.value)
        assert one.low <= one.difference <= one.high


def test_ready_scores_are_compared_under_their_own_name() -> None:
    model, anatomy = dissected("open_clip")
    anatomy = anatomy.select(("head", "ffn"))
    taylor = vlprune.score(model, "taylor", Retrieval(pairs()), anatomy=anatomy)
    result = compare(
        model,
        Retrieval(pairs()),
        metrics=("taylor",),
        scores={"mine": taylor},
        keeps=(0.6,),
        repaired=False,
    )
    first, second = result.points
    assert (first.metric, second.metric) == ("taylor", "mine")
    assert first.plan == second.plan
    (agreement,) = result.agreements
    assert agreement.within == pytest.approx(1)
    assert agreement.across == pytest.approx(1)
    assert result.differences[0].difference == 0


def test_rank_correlation_is_spearmans() -> None:
    assert _spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert _spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # by hand: 1 - 6 * (1 + 1) / (4 * 15)
    assert _spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)


@pytest.mark.parametrize("keeps", [(), (0.5, 1.0), (0,)])
def test_a_comparison_of_nothing_or_of_all_is_refused(keeps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="keep"):
        compare(nn.Identity(), None, keeps=keeps)  # type: ignore[arg-type]


# -- the page -------------------------------------------------------------------------------------


class Outside(HTMLParser):
    """Collects what a page would load or run, ids, and tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        if tag == "script" or any(name.startswith("on") for name in values):
            self.found.append(tag)
        for name in ("src", "href", "xlink:href"):
            value = values.get(name) or ""
            self.found += [value] if value and not value.startswith(("#", "data:")) else []
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(found: Comparison, folder: Path) -> None:
    text = (folder / "index.html").read_text()
    parser = Outside()
    parser.feed(text)
    assert parser.found == []
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert set(re.findall(r"#0[123]0[0-9a-f]{3}\b", text)) == set()  # every colour is the page's
    for name in re.findall(r"(?:url\(|href=\")#([^)\"]+)", text):
        assert name in parser.ids
    assert "&lt;tiny &amp; small&gt;" in text
    assert "<tiny" not in text
    for point in found.points:
        assert html.escape(point.command, quote=False) in html.unescape(text).replace("&", "&amp;")


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "points.csv").open() as file:
        return list(csv.DictReader(file))


def test_points_of_one_budget_stand_at_one_place(found: Comparison) -> None:
    one = [point for point in found.points if point.keep == found.points[0].keep]
    (axes,) = quality_chart(dataclasses.replace(found, points=one), "params", LIGHT).axes
    left, right = axes.get_xlim()
    assert right - left >= 5
    axes.figure.canvas.draw()
    assert axes.xaxis.get_major_formatter().get_offset() == ""


def test_files_beside_the_page_hold_every_point_and_plan(found: Comparison, folder: Path) -> None:
    rows = read_rows(folder)
    assert len(rows) == 1 + len(found.points)
    for row, point in zip(rows[1:], found.points, strict=True):
        assert float(row["value"]) == point.value
        assert float(row["of_dense"]) == pytest.approx(point.value / found.dense.value)
        plan = vlprune.store.read_plan(folder / "plans" / f"{row['plan']}.json")
        assert plan.keep == found.plans[point.plan].keep
    drawn = {path.stem for path in folder.glob("*.png")}
    kept = {f"kept-{m}-{t}" for m in ("taylor", "magnitude") for t in ("vision", "text")}
    assert drawn == {"quality-params", "quality-macs", "quality-latency", "quality-near"} | kept


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_finds_no_fault_in_the_page(folder: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"  # with a script that says how wide it is: for this test alone
    says = "<script>document.title = document.documentElement.scrollWidth + ' px'</script></body>"
    page.write_text((folder / "index.html").read_text().replace("</body>", says))
    done = chromium(tmp_path, width, "--dump-dom", "--enable-logging=stderr", page.as_uri())
    assert "CONSOLE" not in done.stderr
    (wide,) = re.findall(r"<title>(\d+) px</title>", done.stdout)
    # headless windows are at least 500 wide; what does not fit scrolls inside of its own box
    assert int(wide) <= max(width, 500)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_follows_the_scheme_of_the_reader(folder: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    means = []
    for scheme in (1, 0):  # light, dark
        picture = tmp_path / f"{scheme}.png"
        chromium(
            tmp_path,
            900,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={picture}",
            (folder / "index.html").as_uri(),
        )
        means.append(float(imread(picture)[..., :3].mean()))
    light, dark = means
    assert light > 0.85
    assert dark < 0.25


def chromium(folder: Path, width: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'user'}"]
    return subprocess.run(
        [*command, f"--window-size={width},900", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


# -- the command ----------------------------------------------------------------------------------


def test_the_command_beside_a_point_makes_its_model_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "compare --model scenes-clip --metrics random --keep 0.6 --examples 16 --seed 3"
    result = CliRunner().invoke(
        cli.app, [*words.split(), "--test-examples", "50", "--set", "random.seed=5", "--no-repair"]
    )
    assert result.exit_code == 0, result.output
    _, row = read_rows(Path("vlprune-compare"))
    again = CliRunner().invoke(cli.app, shlex.split(row["command"])[1:])
    assert again.exit_code == 0, again.output
    small = vlprune.from_pretrained("random-global-0.6")
    assert record_of(small).plans[-1].digest == row["plan"]


def test_a_setting_of_a_metric_that_is_not_compared_is_refused() -> None:
    result = CliRunner().invoke(
        cli.app, ["compare", "--model", "scenes-clip", "--set", "mope.measure=kl"]
    )
    assert isinstance(result.exception, LookupError)
    assert "got 'mope.measure'" in str(result.exception)


def test_a_metric_of_another_package_is_on_the_page(site: Path, tmp_path: Path) -> None:
    words = "-m vlprune.cli compare --model scenes-deit --metrics loudness --keep 0.7 --no-repair"
    done = subprocess.run(
        [sys.executable, *words.split(), "--examples", "16", "--test-examples", "20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{site}:{Path(__file__).parent.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "vlprune-compare" / "index.html").read_text()
    assert "loudness, global" in text
    assert 'aria-label="kept-loudness-vision"' in text

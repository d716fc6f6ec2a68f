"""The zoo: one model a mechanism in the default run, every entry with `pytest -m slow`."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlprune import cli
from vlprune.zoo import table
from vlprune.zoo.check import STRATEGIES, Outcome, Row, check
from vlprune.zoo.entries import Entry

MECHANISMS = {  # entry -> what it stands for
    "timm/vit_tiny_patch16_224": "fused qkv",
    "timm/vit_giant_patch14_dinov2": "packed SwiGLU, LayerScale",
    "timm/vit_small_patch16_18x2_224": "parallel branches",
    "timm/vit_base_patch16_xp_224": "attention and FFN in one matrix",
    "timm/vit_base_patch16_siglip_256": "a learned query that pools",
    "timm/vit_small_patch16_rope_mixed_224": "rotary angles of every head",
    "timm/vit_srelpos_small_patch16_224": "a bias made once for all layers",
    "timm/eva02_base_patch14_224": "sub-LN, SwiGLU, separate projections",
    "timm/eva02_tiny_patch14_224": "a weight used without its layer",
    "timm/swin_tiny_patch4_window7_224": "position tables, shifted windows",
    "timm/xcit_nano_12_p8_224": "attention over channels",
    "timm/hiera_tiny_224": "pooled queries",
    "open_clip/ViT-B-32": "packed in_proj",
    "open_clip/coca_ViT-B-32": "cross attention, masks of every head",
    "open_clip/RN50": "a convolutional tower, an attention pool",
    "open_clip/roberta-ViT-B-32": "a text tower of transformers",
    "transformers/LlavaForConditionalGeneration": "grouped keys and values, rotary pairs",
    "transformers/Kosmos2ForConditionalGeneration": "norms over heads and over neurons",
    "transformers/BridgeTowerModel": "cross-modal layers, attentions among the outputs",
    "transformers/Blip2ForConditionalGeneration": "a Q-Former",
    "transformers/ViltForQuestionAnswering": "one stream for both modalities",
    "transformers/Mask2FormerForUniversalSegmentation": "a segmenter",
    "transformers/AriaForConditionalGeneration": "a mixture of experts",
}


def entry(name: str) -> Entry:
    return next(e for e in table.all_entries([name]) if e.name == name)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_every_mechanism_is_exact(name: str) -> None:
    row = check(entry(name))
    assert row.fault == ""
    kinds = [*STRATEGIES, *(["expert"] if "experts" in MECHANISMS[name] else [])]
    assert {kind: o.refused for kind, o in row.outcomes.items()} == dict.fromkeys(kinds, ())
    assert all(outcome.is_exact for outcome in row.outcomes.values())
    assert row.reloads


def test_what_cannot_be_cut_is_a_row_with_a_reason() -> None:
    row = check(entry("timm/cait_xxs24_224"))
    assert row.outcomes["head"].is_exact
    assert not row.outcomes["head_dim"].is_exact
    (reason, *_) = row.outcomes["head_dim"].refused
    assert reason.startswith("blocks.0.attn: ")
    assert "its qk rows lie in no matrix of their own" in reason


def test_an_entry_that_cannot_be_built_is_a_row() -> None:
    broken = Entry(name="timm/none", family="timm", arguments={"name": "none"}, group="none")
    row = check(broken)
    assert row.fault.startswith("KeyError")
    assert row.outcomes == {}


def test_there_are_over_seven_hundred_entries_of_three_libraries() -> None:
    names = [entry.name for entry in table.all_entries()]
    assert len(set(names)) == len(names) >= 700
    counts = {
        library: sum(n.startswith(f"{library}/") for n in names) for library in table.LIBRARIES
    }
    assert counts["timm"] >= 400
    assert counts["open_clip"] >= 140
    assert counts["transformers"] >= 140
    left_out = dict(table.all_left_out())
    assert not set(left_out) & set(names)
    assert all(reason for reason in left_out.values())


@pytest.mark.slow
def test_the_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    log = tmp_path / "zoo.jsonl"
    arguments = ["zoo", "--only", "timm/vit_tiny_patch16_224,timm/deit_tiny_patch16_224"]
    arguments += ["--jobs", "1", "--log", str(log)]
    pages = ["--csv", str(tmp_path / "zoo.csv"), "--markdown", str(tmp_path / "docs" / "zoo.md")]
    first = CliRunner().invoke(cli.app, [*arguments, *pages])
    assert first.exit_code == 0, first.output
    lines = log.read_text().splitlines()
    assert len(lines) == 2
    log.write_text(lines[0] + "\n" + lines[1][:40])  # as after a kill
    second = CliRunner().invoke(cli.app, [*arguments, *pages])
    assert second.exit_code == 0, second.output
    done = json.loads(lines[0])["name"]
    assert f"{done}  " not in second.output  # not checked again
    page = (tmp_path / "docs" / "zoo.md").read_text()
    assert "| timm | 2 | 2 (100.0%)" in page
    with (tmp_path / "zoo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["exact"] for row in rows] == ["True"] * 2 * len(STRATEGIES)
    assert all(float(row["error"]) <= 1e-9 < float(row["moved"]) for row in rows)


def test_only_what_moves_the_outputs_and_is_whole_counts_as_exact() -> None:
    exact = Outcome(axes=1, units=4, error=1e-15, moved=0.5)
    assert exact.is_exact
    assert not dataclasses.replace(exact, moved=0.0).is_exact
    assert not dataclasses.replace(exact, error=1e-6).is_exact
    assert not dataclasses.replace(exact, error=None).is_exact
    assert not dataclasses.replace(exact, refused=("x: stays",)).is_exact


def test_the_page_names_every_reason_once() -> None:
    refused = Outcome(axes=0, refused=("blocks.0: one | two",))
    rows = [
        Row(
            name=f"timm/{i}",
            group="g",
            transformer=True,
            outcomes=dict.fromkeys(STRATEGIES, refused),
        )
        for i in range(6)
    ]
    page = table.markdown(rows)
    assert "- one \\| two — timm/0, timm/1, timm/2, timm/3 and 2 more" in page
    assert "left: blocks.0: one \\| two" in page


@pytest.mark.slow
def test_the_whole_zoo(tmp_path: Path) -> None:
    entries = list(table.all_entries())
    log = Path(os.environ.get("VLPRUNE_ZOO_LOG", tmp_path / "zoo.jsonl"))
    rows = table.check_all(entries, log, jobs=2)
    assert [row.name for row in rows if row.fault] == []
    transformers = [row for row in rows if row.transformer]
    for kind in ("head", "ffn", "layer"):
        exact = [row for row in transformers if row.outcomes[kind].is_exact]
        assert len(exact) >= 0.95 * len(transformers), kind
    for row in rows:
        for kind in STRATEGIES:
            outcome = row.outcomes[kind]
            assert outcome.is_exact or outcome.refused or outcome.moved <= 1e-6, (row.name, kind)

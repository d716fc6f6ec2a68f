"""The command line: the whole chain on a tiny model, and messages without tracebacks."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import dissected
from typer.testing import CliRunner, Result

import vlprune
from vlprune import cli
from vlprune.cost import count_params
from vlprune.pruner import record_of
from vlprune.registry import ALLOCATIONS, FAMILIES, METRICS, STRATEGIES, TASKS
from vlprune.store import read_latency, read_plan, read_scores, write_json


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny deit, whole, in a folder."""
    folder = tmp_path_factory.mktemp("cli") / "dense"
    return vlprune.save_pretrained(dissected("deit")[0], folder, verify=False)


@pytest.fixture(scope="module")
def scores_file(dense: Path) -> Path:
    model, anatomy = dissected("deit")
    write_json(vlprune.score(model, "magnitude", anatomy=anatomy), dense.parent / "scores.json")
    return dense.parent / "scores.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    """What a command that succeeds prints, lines joined."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `vlprune ARGUMENTS`, which has to end in a message and exit code 2; return it."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["vlprune", *map(str, arguments)])
        monkeypatch.delenv("VLPRUNE_DEBUG", raising=False)
        monkeypatch.setenv("COLUMNS", "2000")  # no line breaks inside of paths
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = " ".join(capsys.readouterr().err.split())
        assert ended.value.code == 2, text
        assert "Traceback" not in text
        assert "error" in text.lower()
        return text

    return call


# -- what works ------------------------------------------------------------------------------------


def test_a_plain_plan_is_pruned_certified_verified_and_exported(
    dense: Path, tmp_path: Path, fail
) -> None:
    scores, plan, half = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "half"
    ok("score", dense, "--metric", "random", "--strategies", "ffn", "--out", scores)
    text = ok("plan", scores, "--budget", "params=0.8", "--plain", dense, "--out", plan)
    assert re.search(r"plain keeps [\d.]+% of the scores \(free [\d.]+%\) with", text)
    assert len({len(row.keep) for row in read_plan(plan).rows}) == 1
    text = ok("prune", dense, "--plan", plan, "--out", half, "--certify", "export")
    assert "cut = exported proven to " in text
    assert "cut = ONNX not tested; ask with --certify onnx" in text
    assert (half / "certificate.json").is_file()
    text = ok("verify", half, "--original", dense)
    assert "planned = achieved proven to 0.0e+00" in text
    text = ok("export", half, "--torch-export", tmp_path / "m.pt2", "--plain", tmp_path / "plain")
    assert "any number of examples" in text
    assert f'timm.create_model("local-dir:{tmp_path / "plain"}", pretrained=True)' in text
    assert "add --onnx, --torch-export or --plain" in fail("export", half)
    assert "claims must be of compile, export, onnx" in fail("verify", half, "--certify", "all")


def test_list_shows_every_registered_name_and_what_it_is() -> None:
    shown = [re.split(r"\s*[│┃|]\s*", line) for line in run("list").stdout.splitlines()]
    rows = {tuple(cells[1:3]): cells[3] for cells in shown if len(cells) > 3}
    for registry in (METRICS, STRATEGIES, ALLOCATIONS, FAMILIES, TASKS):
        for name in registry:
            assert (registry.noun, name) in rows
            assert rows[registry.noun, name] or registry is FAMILIES


def test_profile_writes_a_table_that_plans_are_made_by_and_compares(
    dense: Path, scores_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlprune.clocks._TURN_SECONDS", 0.001)
    table, plan = tmp_path / "table.json", tmp_path / "plan.json"
    options = ("--strategies", "head,ffn", "--rounds", 1, "--threads", 1)
    text = ok("profile", dense, "--batch-size", 2, "--out", table, *options)
    assert "blocks.0.mlp:ffn" in text
    found = read_latency(table)
    assert (found.batch, found.threads, found.backend) == (2, 1, "eager")
    limit = 1e-6 + sum(r.ms[-1] * len(r.axes) for r in found.rows)
    budget = f"latency_ms={found.dense_ms - 0.3 * limit}"
    ok("plan", scores_file, "--budget", budget, "--latency", table, "--out", plan)
    assert read_plan(plan).planned.latency_ms <= found.dense_ms - 0.3 * limit
    small = tmp_path / "small"
    ok("prune", dense, "--plan", plan, "--no-repair", "--out", small)
    for cut in (plan, small):
        text = ok("profile", dense, "--table", table, "--plan", cut, *options)
        assert re.search(r"predicted .* ms \(.*%\), measured .* ms \(.*%\): off by", text)


def test_inspect_asks_the_dependency_graph(dense: Path) -> None:
    text = ok("inspect", dense, "--axes", "--graph")
    assert "blocks.0.attn:head vision 3 units the graph agrees" in text
    assert "torch-pruning's dependency graph agrees: 6 axes" in text


def test_inspect_shows_the_anatomy_of_a_folder_and_of_a_name(dense: Path) -> None:
    for spec in (dense, "timm:vit_tiny_patch16_224"):
        text = ok("inspect", spec)
        assert "VisionTransformer" in text
        for kind in ("head", "ffn", "layer", "sublayer"):
            assert re.search(rf"vision │ {kind} ", text)
    text = ok("inspect", dense, "--axes")
    assert "122,602 parameters, 569,856 MACs a call" in text
    for axis in dissected("deit")[1].axes:
        assert f"{axis.name} {axis.tower} {axis.units} units" in text


def test_score_plan_prune_and_verify_make_one_chain(dense: Path, tmp_path: Path) -> None:
    scores, plan, half = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "half"
    text = ok("score", dense, "--metric", "random", "--seed", 5, "--out", scores)
    assert "585 units scored" in text  # 3 x (3 heads + 192 neurons)
    assert read_scores(scores).settings == {"seed": 5}

    text = ok(
        *("plan", scores, "--budget", "params=0.6", "--allocation", "uniform", "--min-units", 1),
        *("--out", plan, "--picture", tmp_path / "kept.png"),
    )
    chosen = read_plan(plan)
    assert chosen.asked == {"params": 0.6}
    assert chosen.planned.params <= 0.6 * 122602
    assert f"plan {chosen.digest}" in text
    assert "asked params 0.6" in text
    assert f"planned params {chosen.planned.params:,} " in text
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert chosen.made_by["min_units"] == 1

    text = ok("prune", dense, "--plan", plan, "--out", half)
    assert f"achieved {chosen.planned.params:,} params of 122,602" in text
    assert "proven masked = cut to " in text
    small = vlprune.from_pretrained(half)
    assert count_params(small) == chosen.planned.params
    assert record_of(small).plans == (chosen,)

    text = ok("verify", half, "--original", dense)
    assert f"files intact; {chosen.planned.params:,} params load strictly" in text
    error = re.search(r"proven the masked original computes .*, to (\S+)", text)
    assert float(error[1]) <= 1e-9
    assert "give --original MODEL" in ok("verify", half)


def test_mope_resumes_from_a_store_and_says_what_it_would_keep_now(tmp_path: Path) -> None:
    command = ["score", "scenes-clip", "--metric", "mope", "--examples", "16", "--set"]
    command += ["measure=cosine", "--set", "num_groups=2", "--store", tmp_path / "store"]
    command += ["--units-per-batch", "auto", "--strategies", "head"]
    cli._TELL_SECONDS, before = 0.0, cli._TELL_SECONDS
    try:
        said = ok(*command, "--plan-so-far", "prunable_params=0.5", "--out", tmp_path / "a.json")
    finally:
        cli._TELL_SECONDS = before
    assert "s left; stopped now: plan" in said
    assert re.search(r"\d+ of 60 are told apart from zero", said)
    scores = read_scores(tmp_path / "a.json")
    assert scores.settings["evaluations"] == 60
    assert len(scores.intervals) == len(scores.values) == 10
    ok(*command, "--out", tmp_path / "b.json")
    again = read_scores(tmp_path / "b.json")
    assert again.values == scores.values
    assert again.settings["evaluations"] == 0


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--shard", "2/2"], "index < count"),
        (["--shard", "half"], "shard must be i/n"),
        (["--units-per-batch", "many"], "must be a number or auto"),
        (["--adaptive", "params=7e9"], "budget params"),
    ],
)
def test_wrong_options_of_mope_are_told(fail, tmp_path, option: list[str], text: str) -> None:
    said = fail(
        *("score", "scenes-clip", "--metric", "mope", "--examples", "8", *option),
        *("--out", tmp_path / "scores.json"),
    )
    assert text in said


def test_prune_scores_and_plans_by_itself(dense: Path, tmp_path: Path) -> None:
    ok(
        *("prune", dense, "--metric", "magnitude", "--set", "p=1", "--budget", "macs=0.7"),
        *("--strategies", "ffn", "--out", tmp_path / "small"),
    )
    (plan,) = record_of(vlprune.from_pretrained(tmp_path / "small")).plans
    assert plan.made_by["metric"] == "magnitude"
    assert plan.made_by["settings"] == {"p": 1}
    assert plan.made_by["strategies"] == ["ffn"]
    assert plan.planned.macs <= 0.7 * plan.dense.macs


def test_a_plan_made_by_hand_is_pruned(dense: Path, tmp_path: Path) -> None:
    _, anatomy = dissected("deit")
    write_json(vlprune.make_plan(anatomy, {"blocks.0.attn:head": (0, 2)}), tmp_path / "hand.json")
    text = ok("prune", dense, "--plan", tmp_path / "hand.json", "--out", tmp_path / "small")
    assert "achieved" in text


def test_a_path_with_brackets_is_shown_as_it_is(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "run[bold]" / "s.json"
    text = ok("score", dense, "--metric", "magnitude", "--out", path)
    assert "run[bold]" in text.replace(" ", "")


def test_a_task_of_ones_own_is_imported(dense: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mytask.py").write_text(
        "import torch\nfrom vlprune.tasks import CallableTask\n"
        "def make(model):\n"
        "    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        "    return CallableTask([x], lambda m, x: m(x).square().mean(), example_inputs=(x,))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ok("score", dense, "--metric", "taylor", "--task", "mytask:make", "--out", tmp_path / "s.json")
    assert read_scores(tmp_path / "s.json").metric == "taylor"


# -- what a user gets wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("deit", "model 'deit' must be open_clip:NAME, timm:NAME, hf:FOLDER"),
        ("torchvision:vit", "model 'torchvision:vit' must be"),
        ("timm:", "model 'timm:' must be"),
        ("timm:no_such_vit", "no_such_vit"),
        ("open_clip:No-Such-CLIP", "No-Such-CLIP"),
    ],
)
def test_a_wrong_model_is_told(fail, spec: str, text: str) -> None:
    assert text in fail("inspect", spec)


def test_a_wrong_metric_is_told_with_the_nearest(fail, dense, tmp_path) -> None:
    text = fail("score", dense, "--metric", "magnitud", "--out", tmp_path / "s.json")
    assert f"metric 'magnitud' is not known; known are {', '.join(METRICS)}." in text
    assert text.endswith("Did you mean 'magnitude'?")
    assert not (tmp_path / "s.json").exists()


def test_a_metric_without_its_task_is_told(fail, dense, tmp_path) -> None:
    text = fail("score", dense, "--metric", "taylor", "--out", tmp_path / "s.json")
    assert "metric 'taylor' must be given a task; got none." in text


@pytest.mark.parametrize("strategies", ["heads", "head,fnn", "head,layer,x"])
def test_a_wrong_strategy_is_told(fail, dense, tmp_path, strategies: str) -> None:
    arguments = ("score", dense, "--metric", "magnitude", "--strategies", strategies)
    assert "known are expert, ffn, head, head_dim, head_dim_per_head, layer, sublayer" in fail(
        *arguments, "--out", tmp_path / "s.json"
    )


@pytest.mark.parametrize("task", ["no_such_module:make", "json:no_such_function", "scene"])
def test_a_wrong_task_is_told(fail, dense, tmp_path, task: str) -> None:
    arguments = ("score", dense, "--metric", "taylor", "--task", task)
    text = fail(*arguments, "--out", tmp_path / "s.json")
    assert f"task '{task}' must be scenes-clip" in text


def test_a_wrong_setting_is_told(fail, dense, tmp_path) -> None:
    arguments = ("score", dense, "--metric", "magnitude", "--out", tmp_path / "s.json")
    assert "p must be 1 or 2; got 3" in fail(*arguments, "--set", "p=3")
    assert "--set must be key=value; got 'p'." in fail(*arguments, "--set", "p")
    assert "'q'" in fail(*arguments, "--set", "q=1")


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("half", "--budget must be key=value; got 'half'."),
        ("params=half", "--budget must be key=value; got 'params=half'."),
        ("params=", "--budget must be key=value; got 'params='."),
        ("flops=0.5", "prunable_params, latency, latency_ms; got 'flops'."),
        ("params=-1", "budget 'params' must be a share in (0, 1] or a count; got -1.0."),
        ("params=nan", "budget 'params' must be a share in (0, 1] or a count; got nan."),
        ("params=inf", "budget 'params' must be a share in (0, 1] or a count; got inf."),
        ("params=0.001", "can reach 38,650 (31.5%) at least and 122,602 at most"),
    ],
)
def test_a_wrong_budget_is_told(fail, scores_file, tmp_path, budget: str, text: str) -> None:
    assert text in fail("plan", scores_file, "--budget", budget, "--out", tmp_path / "p.json")
    assert not (tmp_path / "p.json").exists()


def test_a_budget_of_latency_without_its_table_is_told(fail, scores_file, tmp_path) -> None:
    arguments = ("plan", scores_file, "--budget", "latency=0.5", "--out", tmp_path / "p.json")
    assert "`vlprune profile MODEL --out table.json`, then `--latency table.json`" in fail(
        *arguments
    )
    assert "backend must be eager, compile, onnx; got 'abacus'" in fail(
        "profile", scores_file.parent / "dense", "--backend", "abacus"
    )


def test_a_wrong_allocation_is_told(fail, scores_file, tmp_path) -> None:
    arguments = ("plan", scores_file, "--allocation", "unifrom", "--out", tmp_path / "p.json")
    assert "Did you mean 'uniform'?" in fail(*arguments)


def test_a_damaged_folder_is_told(fail, dense, tmp_path) -> None:
    small = vlprune.save_pretrained(dissected("deit")[0], tmp_path / "model", verify=False)
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for command in (("inspect", small), ("verify", small), ("verify", dense, "--original", small)):
        assert f"{weights} must be as it was saved; it was truncated or edited." in fail(*command)


def test_a_file_that_is_not_there_or_something_else_is_told(fail, scores_file, tmp_path) -> None:
    out = ("--out", tmp_path / "p.json")
    assert "none.json must be there; it is not." in fail("plan", tmp_path / "none.json", *out)
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    assert "other.json must hold Score" in fail("plan", tmp_path / "other.json", *out)


def test_a_plan_for_another_model_is_told(fail, dense, tmp_path) -> None:
    _, anatomy = dissected("open_clip")
    keep = {anatomy.axes[0].name: (0,)}
    cost = vlprune.price(anatomy, {})
    write_json(vlprune.make_plan(anatomy, keep, dense=cost, planned=cost), tmp_path / "p.json")
    text = fail("prune", dense, "--plan", tmp_path / "p.json", "--out", tmp_path / "small")
    assert "plan must fit the model VisionTransformer" in text
    assert not (tmp_path / "small").exists()


def test_a_folder_with_other_files_is_told_and_left_alone(fail, dense, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ("prune", dense, "--metric", "magnitude", "--budget", "params=0.9")
    text = fail(*arguments, "--out", tmp_path)
    assert "must be new, empty or a vlprune checkpoint; it holds other files." in text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_wrong_device_is_told(fail, dense) -> None:
    assert "nonsense" in fail("inspect", dense, "--device", "nonsense")
    if not torch.cuda.is_available():
        fail("inspect", dense, "--device", "cuda")


@pytest.mark.parametrize("arguments", [("inspect",), ("score", "timm:x"), ("no-such-command",)])
def test_a_wrong_call_is_told(fail, arguments) -> None:
    fail(*arguments)


def test_a_broken_law_ends_in_exit_code_1(monkeypatch, capsys) -> None:
    def broken() -> None:
        raise vlprune.errors.LawError("masked and [cut] model must agree")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.delenv("VLPRUNE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: masked and [cut] model must agree\n"


def test_debugging_shows_the_traceback(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlprune", "inspect", "deit"])
    monkeypatch.setenv("VLPRUNE_DEBUG", "1")
    with pytest.raises(vlprune.errors.UnknownNameError, match="model 'deit' must be"):
        cli.main()

"""The command line: one function a command, from inspect to demo.

MODEL is open_clip:NAME, timm:NAME, hf:FOLDER, scenes-..., or a folder saved by vlprune. What a
user can get wrong ends in a message and exit code 2; a model that breaks the law in exit code 1.
Set VLPRUNE_DEBUG=1 for tracebacks.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vlprune import registry
from vlprune.console import (
    default_task,
    err,
    literal,
    make_model,
    make_task,
    out,
    pairs,
    progress,
    read_cut,
    say,
)
from vlprune.errors import LawError, TraceError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Structured pruning for vision-language transformers: weights, not tokens.",
)
_TELL_SECONDS = 20.0

Model = Annotated[
    str, typer.Argument(help="open_clip:NAME, timm:NAME, hf:FOLDER, scenes-... or a saved folder")
]
Pretrained = Annotated[
    str, typer.Option(help="Weights: an open_clip tag, or 'yes' for timm and hf.")
]
Device = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
TaskName = Annotated[
    str,
    typer.Option(
        "--task", help="A model that ships, for its task, or module:function(model) -> task."
    ),
]
Examples = Annotated[int, typer.Option(help="Scenes to score on.")]
MetricName = Annotated[str, typer.Option("--metric", help="See `vlprune list`.")]
Strategies = Annotated[str, typer.Option(help="Structures to score, with commas.")]
Settings = Annotated[list[str], typer.Option("--set", help="Setting of the metric, key=value.")]
Budget = Annotated[
    list[str],
    typer.Option(help="What may stay: params=0.5, macs=0.5, prunable_params=0.5, latency=0.5."),
]
AllocationName = Annotated[str, typer.Option("--allocation", help="See `vlprune list`.")]
AllocationOptions = Annotated[
    list[str], typer.Option("--with", help="Option of the allocation, key=value; repeatable.")
]
Certify = Annotated[
    str, typer.Option(help="Prove more, with commas: compile, export, onnx (slow).")
]
MinUnits = Annotated[int, typer.Option(help="Units that stay on every axis at least.")]
Latency = Annotated[
    Path | None, typer.Option(help="What `vlprune profile` wrote, for a budget of latency.")
]


@app.command()
def inspect(
    model: Model,
    pretrained: Pretrained = "",
    device: Device = "cpu",
    axes: Annotated[bool, typer.Option(help="List every axis.")] = False,
    graph: Annotated[bool, typer.Option(help="Ask torch-pruning's dependency graph, too.")] = False,
) -> None:
    """Show what can be removed from a model, and what is left whole and why."""
    import vlprune
    from vlprune.report import anatomy_table

    made = make_model(model, pretrained, device)
    anatomy = vlprune.dissect(made)
    verdicts = _verdicts(made, anatomy) if graph else {}
    out.print(anatomy_table(anatomy))
    if axes:
        for axis in anatomy.axes:
            pads = any(swap.to.endswith(":PaddedLinear") for swap in axis.swaps)
            note = "  (its linear layers alone shrink)" if pads else ""
            seen = f"  the graph {verdicts[axis.name]}" if axis.name in verdicts else ""
            say(f"{axis.name}  {axis.tower}  {axis.units} units{note}{seen}")
    for verdict, count in collections.Counter(verdicts.values()).most_common():
        say(f"torch-pruning's dependency graph {verdict}: {count} axes")
    reasons = collections.defaultdict(list)
    for refusal in anatomy.refusals:
        reasons[refusal.kind, re.sub(r"\d+", "N", refusal.reason)].append(refusal)
    for (kind, _), refused in reasons.items():  # a line a reason: layers are many and alike
        more = "" if axes or len(refused) == 1 else f" (and {len(refused) - 1} more like it)"
        for refusal in refused if axes else refused[:1]:
            what = f", for {kind}" if kind else ""
            say(f"left whole{what}: {refusal.module or 'the model'}{more}: {refusal.reason}")


def _verdicts(model: Any, anatomy: Any) -> dict[str, str]:
    from vlprune.calls import calls_of
    from vlprune.dissect import default_inputs
    from vlprune.graph import verdicts

    return verdicts(model, calls_of(default_inputs(model)), anatomy.axes)


@app.command()
def zoo(
    only: Annotated[str, typer.Option(help="Parts of entry names, with commas.")] = "",
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    log: Annotated[Path, typer.Option(help="Rows done so far, JSON lines.")] = Path("zoo.jsonl"),
    table: Annotated[Path | None, typer.Option("--csv", help="Write a CSV table.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown page.")] = None,
) -> None:
    """Put every architecture that we can build through the law; run again to go on."""
    from vlprune.zoo import table as page

    entries = list(page.all_entries([part for part in only.split(",") if part]))

    def tell(done: int, total: int, row: Any) -> None:
        kinds = [kind for kind, outcome in row.outcomes.items() if outcome.is_exact]
        said = row.fault or f"exact for {', '.join(kinds) or 'nothing'}"
        say(f"{done}/{total}  {row.name}  {row.seconds:.1f} s  {said}")

    rows = page.check_all(entries, log, jobs=jobs, progress=tell)
    if table is not None:
        page.write_csv(rows, table)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(page.markdown(rows))
    for line in page.summary(rows):
        say(line)


@app.command()
def score(
    model: Model,
    to: Annotated[Path, typer.Option("--out", help="Where the scores go, JSON.")],
    metric: MetricName = "fisher",
    task: TaskName = "",
    examples: Examples = 512,
    strategies: Strategies = "head,ffn",
    settings: Settings = [],  # noqa: B006  # typer reads the default and never changes it
    pretrained: Pretrained = "",
    device: Device = "cpu",
    seed: Seed = 0,
    store: Annotated[str, typer.Option(help="mope: folder to resume from.")] = "",
    shard: Annotated[str, typer.Option(help="mope: measure share i of n only, i/n.")] = "",
    units_per_batch: Annotated[str, typer.Option(help="mope: side by side, number or auto.")] = "",
    adaptive: Annotated[str, typer.Option(help="mope: stop early for a budget, params=0.5.")] = "",
    plan_so_far: Annotated[
        str, typer.Option(help="mope: say every 20 s what a plan of params=0.5 would keep now.")
    ] = "",
) -> None:
    """Score every unit of a model by a metric; under torchrun the ranks share the work of mope."""
    from vlprune.store import write_json

    dense = make_model(model, pretrained, device)
    task = task or default_task(model)
    options = _ablation_options(store, shard, units_per_batch, adaptive, plan_so_far)
    with _ranks(device) as rank:
        scores = _score(dense, metric, task, examples, strategies, settings, seed, options)
        if rank:
            return
    write_json(scores, to)
    say(f"{sum(a.units for a in scores.anatomy.axes):,} units scored: {to}")
    if scores.intervals:
        apart, units = scores.apart_from_zero()
        say(f"{apart:,} of {units:,} are told apart from zero (95 %)")
    if "unsure" in scores.settings:
        done, possible = scores.settings["evaluations"], scores.settings["of"]
        unsure = scores.settings["unsure"]
        say(f"{done:,} of {possible:,} evaluations were run; unsure of {len(unsure)}:")
        say("  " + "  ".join(unsure[:8]) + ("  ..." if len(unsure) > 8 else ""))


def _ablation_options(
    store: str, shard: str, units_per_batch: str, adaptive: str, plan_so_far: str
) -> dict[str, Any]:
    """Settings of mope from the options that were given."""
    options: dict[str, Any] = {}
    if store:
        options["store"] = store
    if shard:
        index, slash, count = shard.partition("/")
        if not (slash and index.isdigit() and count.isdigit()):
            raise ValueError(f"shard must be i/n, such as 0/4; got {shard!r}.")
        options["shard"] = (int(index), int(count))
    if units_per_batch:
        if units_per_batch != "auto" and not units_per_batch.isdigit():
            raise ValueError(f"units-per-batch must be a number or auto; got {units_per_batch!r}.")
        number = units_per_batch
        options["copies"] = "auto" if number == "auto" else int(number)
    if adaptive:
        options["adaptive"] = pairs([adaptive], "adaptive", float)
    if plan_so_far:
        options["watch"] = _teller(pairs([plan_so_far], "plan-so-far", float))
    return options


def _teller(budget: dict[str, float]) -> Any:
    """A watcher that says from time to time how long it takes still, and what would stay now."""
    import vlprune

    last = [time.monotonic()]

    def watch(state: Any, scores: Any) -> None:
        if time.monotonic() - last[0] < _TELL_SECONDS:
            return
        last[0] = time.monotonic()
        say(f"{state.done}/{state.total}, {state.seconds_left:.0f} s left; stopped now:")
        say(str(vlprune.plan(scores(), budget)))

    return watch


def _is_other_rank() -> bool:
    """Whether this is a process of torchrun besides the first, which alone writes and speaks."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0


@contextlib.contextmanager
def _ranks(device: str) -> Iterator[int]:
    """Join the other processes of torchrun, if there are any; the rank of this one."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@app.command()
def plan(
    scores: Annotated[Path, typer.Argument(help="What `vlprune score` wrote.")],
    to: Annotated[Path, typer.Option("--out", help="Where the plan goes, JSON.")],
    budget: Budget = ["params=0.5"],  # noqa: B006  # as above
    allocation: AllocationName = "global",
    min_units: MinUnits = 0,
    options: AllocationOptions = [],  # noqa: B006  # as above
    latency: Latency = None,
    within: Annotated[
        Path | None, typer.Option(help="Other scores that choose within an axis, JSON.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw what stays, PNG.")] = None,
    plain: Annotated[
        str, typer.Option(help="The MODEL: a plan that its library's own class can hold.")
    ] = "",
    task: TaskName = "",
) -> None:
    """Choose what stays within a budget."""
    import vlprune
    from vlprune.report import draw_plan
    from vlprune.store import read_latency, read_scores, write_json

    if plain:
        asked = pairs(budget, "budget", float)
        write_json(_plain_plan(read_scores(scores), asked, plain, task, min_units), to)
        return
    chosen = vlprune.plan(
        read_scores(scores),
        pairs(budget, "budget", float),
        allocation,
        min_units=min_units,
        within=read_scores(within) if within else None,
        latency=read_latency(latency) if latency else None,
        **pairs(options, "with", literal),
    )
    write_json(chosen, to)
    if picture:
        draw_plan(chosen, picture)
    _show_plan(chosen)


def _plain_plan(scores: Any, budget: Any, spec: str, task: str, min_units: int) -> Any:
    """A plan that a stock class holds, shown with what that restriction costs."""
    from vlprune.plain import plain_plan, restriction

    model = make_model(spec, "", "cpu")
    chosen = plain_plan(scores, budget, model, min_units=min_units)
    _show_plan(chosen)
    say(f"plain    {restriction(scores, chosen, model, make_task(task, model, 256, 0))}")
    return chosen


@app.command()
def prune(
    model: Model,
    to: Annotated[Path, typer.Option("--out", help="Folder for the cut model.")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="What `vlprune plan` wrote; else one is made.")
    ] = None,
    budget: Budget = ["params=0.5"],  # noqa: B006  # as above
    metric: MetricName = "reconstruction",
    allocation: AllocationName = "global",
    task: TaskName = "",
    examples: Examples = 512,
    strategies: Strategies = "head,ffn",
    settings: Settings = [],  # noqa: B006  # as above
    options: AllocationOptions = [],  # noqa: B006  # as above
    min_units: MinUnits = 0,
    latency: Latency = None,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Solve what is left again to stand in for what went; default: with a task.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Cut, repair and score again so often.")] = 1,
    certify: Certify = "",
    pretrained: Pretrained = "",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Cut a model, repair it, prove that masked = cut, and save it."""
    import vlprune
    from vlprune.certify import certify as prove
    from vlprune.certify import claims_of
    from vlprune.cost import count_params
    from vlprune.pruner import record_of
    from vlprune.store import check_target, read_latency, read_plan

    check_target(to)
    asked = claims_of(certify)
    dense = make_model(model, pretrained, device)
    task = task or default_task(model)
    data = make_task(task, dense, examples, seed)
    repaired = data is not None if repair is None else repair
    if repaired and data is None:
        raise ValueError("repair must be given a task; got none. Add --task, or --no-repair.")
    if plan_file:
        chosen = read_plan(plan_file)
        with progress() as stage:
            small = (
                vlprune.repair(dense, chosen, data, progress=stage("repair"))
                if repaired
                else vlprune.prune(dense, chosen)
            )
    else:
        small = _compress(
            dense,
            data,
            metric,
            pairs(budget, "budget", float),
            allocation=allocation,
            strategies=tuple(strategies.split(",")),
            steps=steps,
            repaired=repaired,
            min_units=min_units,
            settings=_settings_of(metric, settings, seed),
            options=pairs(options, "with", literal),
            latency=read_latency(latency) if latency else None,
        )
    for made in record_of(small).plans:
        _show_plan(made)
    _show_repairs(record_of(small).repairs)
    proof = prove(small, dense, claims=asked, task=data)
    vlprune.save_pretrained(small, to, certificate=proof)
    error = record_of(small).relative_error
    say(str(proof))
    out.print(f"achieved {count_params(small):,} params of {count_params(dense):,}")
    say(f"proven   masked = cut to {error:.1e}; saved and reloaded bit-equal: {to}")


@app.command()
def profile(
    model: Model,
    to: Annotated[Path | None, typer.Option("--out", help="Where the table goes, JSON.")] = None,
    table: Annotated[Path | None, typer.Option(help="One that was measured here before.")] = None,
    cut: Annotated[
        Path | None, typer.Option("--plan", help="Plan or saved folder: predicted and measured.")
    ] = None,
    backend: Annotated[str, typer.Option(help="eager, compile or onnx.")] = "eager",
    batch_size: Annotated[int, typer.Option(help="Examples in a call.")] = 1,
    threads: Annotated[int, typer.Option(help="Of torch; default: as it is set.")] = 0,
    strategies: Strategies = "head,ffn,layer",
    rounds: Annotated[int, typer.Option(help="Turns that every model takes.")] = 7,
    pretrained: Pretrained = "",
    device: Device = "cpu",
) -> None:
    """Measure what heads, neurons and layers of a model take on this device."""
    from vlprune.report import latency_table
    from vlprune.store import read_latency, write_json

    if threads:
        importlib.import_module("torch").set_num_threads(threads)
    made = make_model(model, pretrained, device)
    found = (
        read_latency(table) if table else _profile(made, batch_size, backend, strategies, rounds)
    )
    if to:
        write_json(found, to)
    out.print(latency_table(found))
    for remark in found.remarks:
        say(remark)
    if cut:
        say(_predicted(found, made, cut, device, rounds))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="What `vlprune prune` saved.")],
    original: Annotated[
        str, typer.Option(help="The dense MODEL; default: the one the checkpoint names.")
    ] = "",
    certify: Certify = "",
    pretrained: Pretrained = "",
) -> None:
    """Check a saved model: files, weights, plan, and masked = cut against the original."""
    from vlprune.certify import claims_of, verify_folder

    dense = make_model(original, pretrained, "cpu") if original else None
    found = verify_folder(folder, dense, claims=claims_of(certify))
    say(f"files    intact; {found.now.params[2]:,} params load strictly")
    say(str(found.now))
    if found.faults:
        raise LawError("the saved model must be what was proven; " + "; ".join(found.faults))
    law = found.now.claim("masked = cut")
    if law.verdict == "not tested":
        say("original its weights are unknown; give --original MODEL to check masked = cut")
        return
    say(f"proven   the masked original computes what this model computes, to {law.error:.1e}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="What `vlprune prune` saved.")],
    onnx: Annotated[Path | None, typer.Option(help="An ONNX file to write.")] = None,
    torch_export: Annotated[
        Path | None, typer.Option(help="A file for torch.export.load to write.")
    ] = None,
    plain: Annotated[
        Path | None, typer.Option(help="A folder that the library loads without vlprune.")
    ] = None,
) -> None:
    """Write a saved model as ONNX, torch.export program or plain folder; each is compared."""
    import vlprune
    from vlprune.export import files_of, to_onnx, to_torch_export
    from vlprune.plain import to_plain

    if not (onnx or torch_export or plain):
        raise ValueError("export must be told what; add --onnx, --torch-export or --plain.")
    small = vlprune.from_pretrained(folder)
    for path, inputs in files_of(small, onnx) if onnx else ():
        say(f"onnx     {to_onnx(small, path, example_inputs=inputs)}")
    for path, inputs in files_of(small, torch_export) if torch_export else ():
        say(f"export   {to_torch_export(small, path, example_inputs=inputs)}")
    if plain:
        say(f"plain    {to_plain(small, plain)}")


@app.command()
def recipe(
    name: Annotated[str, typer.Argument(help="upop or efficientvlm.")],
    preset: Annotated[str, typer.Option(help="Of the recipe; a wrong one lists them.")] = "",
    to: Annotated[
        Path, typer.Option("--out", help="Folder: states to go on from, and the model.")
    ] = Path("vlprune-recipe"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what will happen and cost, and stop.")
    ] = False,
    model: Annotated[str, typer.Option(help="Another MODEL than the preset's.")] = "",
    task: TaskName = "",
    settings: Annotated[
        list[str], typer.Option("--set", help="Change a value of the preset, key=value.")
    ] = [],  # noqa: B006  # as above
    pretrained: Pretrained = "",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Run a paper from end to end on a model and a task; run again to go on; torchrun shares it."""
    import vlprune
    from vlprune import recipes
    from vlprune.certify import certify as prove
    from vlprune.cost import count_params
    from vlprune.recipes import _stages

    program = recipes.load(name)
    chosen = recipes.change(recipes.preset_of(name, preset), pairs(settings, "set", literal))
    spec = model or chosen.model
    if not spec:
        raise ValueError(f"model must be given: no library has that of {preset!r}. Add --model.")
    dense = make_model(spec, pretrained or ("" if model else chosen.pretrained), device)
    data = make_task(task, dense, chosen.examples, seed) or chosen.task(seed)
    title = f"{name} {preset}: {spec}, {data.name}"
    out.print(_stages.table(program.stages(dense, data, chosen), title, f"from {chosen.source}"))
    if dry_run:
        return
    recipes.claim(
        to, {"recipe": name, "preset": preset, "set": settings, "model": spec, "seed": seed}
    )
    with progress() as stage:
        done = program.run(dense, data, chosen, folder=to / "states", seed=seed, progress=stage)
    if _is_other_rank():
        return
    for plan in done.plans:
        _show_plan(plan)
    proof = prove(done.model, dense)
    vlprune.save_pretrained(done.model, to / "model", certificate=proof)
    say(str(proof))
    out.print(f"achieved {count_params(done.model):,} params of {count_params(dense):,}")
    if chosen.data:
        from vlprune.shipped import SHIPPED

        test = SHIPPED[chosen.data].task("test", 1000, 0, 250)
        say(
            f"measure  {test.measure(done.model):.1f} of {test.measure(dense):.1f} on 1,000 test "
            f"scenes ({test.name})"
        )
    say(f"saved    {to / 'model'}")


@app.command()
def compare(
    model: Annotated[str, typer.Option("--model", help="A MODEL, as of the other commands.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the page and its files.")] = Path(
        "vlprune-compare"
    ),
    metrics: Annotated[
        str, typer.Option(help="See `vlprune list`; with commas.")
    ] = "reconstruction,fisher,taylor,magnitude,random",
    allocations: Annotated[str, typer.Option(help="See `vlprune list`; with commas.")] = "global",
    keep: Annotated[str, typer.Option(help="Shares to keep, with commas.")] = "0.75,0.5,0.35",
    resource: Annotated[
        str, typer.Option("--of", help="What they are shares of: prunable_params, params, macs.")
    ] = "prunable_params",
    repair: Annotated[bool, typer.Option(help="Measure also what repair makes of each.")] = True,
    task: TaskName = "",
    test: Annotated[
        str, typer.Option(help="Task to measure on; default: test scenes, else the same task.")
    ] = "",
    examples: Examples = 512,
    test_examples: Annotated[int, typer.Option(help="Scenes to measure on.")] = 1000,
    strategies: Strategies = "head,ffn",
    settings: Annotated[
        list[str], typer.Option("--set", help="Setting of a metric, metric.key=value; repeatable.")
    ] = [],  # noqa: B006  # as above
    scores: Annotated[
        list[str], typer.Option(help="Ready scores, name=scores.json; repeatable.")
    ] = [],  # noqa: B006  # as above
    pretrained: Pretrained = "",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Compare metrics and allocations at equal cost, on one page: accuracy, time, agreement."""
    import vlprune.compare as comparing
    from vlprune.compare.commands import prune_commands, settings_of, test_task
    from vlprune.store import read_scores

    made = make_model(model, pretrained, device)
    task = task or default_task(model)
    data = make_task(task, made, examples, seed)
    if data is None:
        raise ValueError("task must be given: this model has none of its own. Add --task.")
    names = [name for name in metrics.split(",") if name]
    options = settings_of(names, pairs(settings, "set", literal), seed)
    with progress() as stage:
        found = comparing.compare(
            made,
            data,
            test_task(test, task, made, test_examples, seed),
            metrics=names,
            allocations=allocations.split(","),
            keeps=[float(share) for share in keep.split(",")],
            resource=resource,
            strategies=tuple(strategies.split(",")),
            repaired=repair,
            settings=options,
            scores={n: read_scores(p) for n, p in pairs(scores, "scores", Path).items()},
            name=model,
            command=prune_commands(
                model,
                options,
                resource=resource,
                task=task,
                examples=examples,
                strategies=strategies,
                pretrained=pretrained,
                device=device,
                seed=seed,
            ),
            progress=stage,
        )
    page = comparing.write_page(found, to)
    say(str(found))
    say(f"page     {page}")


@app.command(name="list")
def list_() -> None:
    """List metrics, strategies, allocations, families and tasks."""
    table = Table("kind", "name", "what")
    for names in (
        registry.METRICS,
        registry.STRATEGIES,
        registry.ALLOCATIONS,
        registry.FAMILIES,
        registry.TASKS,
    ):
        for name, entry in names.items():
            path = f"{names.group}.{name}" if names is registry.FAMILIES else entry.__module__
            doc = (importlib.import_module(path).__doc__ or "").strip().partition("\n")[0]
            table.add_row(names.noun, name, doc)
    out.print(table)


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for model and picture.")] = Path(
        "vlprune-demo"
    ),
    examples: Examples = 256,
    seed: Seed = 0,
) -> None:
    """Cut a trained CLIP in half by three criteria, on real images, and prove the result."""
    import torch

    from vlprune.demo import demo_table, run_demo
    from vlprune.tasks import Retrieval
    from vlprune.tasks.scenes import loader

    torch.manual_seed(seed)
    test = Retrieval(loader("test", 1000, seed, 250))
    calibration = Retrieval(loader("train", examples, seed + 1, 128))
    with progress() as stage:
        result = run_demo(to, test, calibration, stage)
    out.print(demo_table(result))
    say(
        f"proven   masked = cut to {result.relative_error:.1e}; reloaded recall mean "
        f"{result.reloaded_recall:.1f}\nmodel    {result.folder}\npicture  {result.picture}"
    )


def main() -> None:
    """Run the command line; messages instead of tracebacks for what a user can get wrong."""
    try:
        app()
    except (LawError, TraceError) as error:
        _fail(error, 1)
    except (ValueError, LookupError, TypeError, OSError, ImportError) as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("VLPRUNE_DEBUG"):
        raise error
    err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _score(
    model: Any,
    metric: str,
    task: str,
    examples: int,
    strategies: str,
    settings: list[str],
    seed: int,
    given: Mapping[str, Any] | None = None,
) -> Any:
    import torch

    import vlprune

    torch.manual_seed(seed)
    options = {**_settings_of(metric, settings, seed), **(given or {})}
    _check_task(metric, task)
    with progress() as stage:
        return vlprune.score(
            model,
            metric,
            make_task(task, model, examples, seed),
            strategies=tuple(strategies.split(",")),
            progress=stage(metric),
            **options,
        )


def _settings_of(metric: str, settings: list[str], seed: int) -> dict[str, Any]:
    """Settings of a metric as given; a random one takes the seed."""
    return {**({"seed": seed} if metric == "random" else {}), **pairs(settings, "set", literal)}


def _check_task(metric: str, task: Any) -> None:
    if not task and registry.METRICS[metric].needs != "nothing":
        raise ValueError(
            f"metric {metric!r} must be given a task; got none. Add --task with the name of a "
            "shipped model, such as scenes-clip, or --task module:function for your own data."
        )


def _compress(
    dense: Any, data: Any, metric: str, budget: Mapping[str, float], **options: Any
) -> Any:
    """The whole chain, with a bar for every part."""
    import vlprune

    _check_task(metric, data)
    with progress() as stage:
        return vlprune.compress(dense, data, budget, metric=metric, progress=stage, **options)


def _profile(model: Any, batch_size: int, backend: Any, strategies: str, rounds: int) -> Any:
    import vlprune

    kinds = tuple(strategies.split(","))
    with progress() as stage:
        return vlprune.profile(
            model,
            batch_size=batch_size,
            backend=backend,
            strategies=kinds,
            rounds=rounds,
            progress=stage("profile"),
        )


def _predicted(table: Any, model: Any, cut: Path, device: str, rounds: int) -> str:
    """What a table says of a cut model beside what is measured now."""
    from vlprune.profile import predicted_beside_measured

    chosen, small = read_cut(cut, device)
    return str(predicted_beside_measured(table, model, chosen, small=small, rounds=rounds))


def _show_repairs(repairs: Sequence[Any]) -> None:
    """One line on what repair did."""
    if repairs:
        done = [repair for repair in repairs if repair.ridge is not None]
        before, after = (
            sum(getattr(r, side) for r in repairs) / len(repairs) for side in ("before", "after")
        )
        out.print(
            f"repaired {len(done)} of {len(repairs)} layers; their error on held-out examples went "
            f"from {before:.1%} to {after:.1%} of the variance"
        )


def _show_plan(chosen: Any) -> None:
    from vlprune.plan import show_limit
    from vlprune.report import plan_table

    out.print(plan_table(chosen))
    if chosen.asked:
        asked = ", ".join(f"{key} {show_limit(value)}" for key, value in chosen.asked.items())
        out.print(f"asked    {asked}")
    if chosen.dense and chosen.planned:
        shares = chosen.planned.shares_of(chosen.dense)
        out.print("planned  " + ", ".join(f"{name} {share}" for name, share in shares.items()))


if __name__ == "__main__":
    main()

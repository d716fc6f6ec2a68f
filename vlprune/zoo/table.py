"""All entries of the zoo checked in parallel processes, resumable, as a table."""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import dataclasses
import importlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from vlprune.plan import versions
from vlprune.zoo.check import STRATEGIES, WHERE_FOUND, Outcome, Row, check
from vlprune.zoo.entries import Entry

_ABOUT = """\
Written by `vlprune zoo --markdown docs/zoo.md`. Every entry is built without weights, shrunken
where its library lets one, with all parameters drawn at random; then, per strategy, two uneven
random plans are masked and cut, in float64. *exact*: all that the strategy could remove was found,
masked = cut within 1e-9 relative (the largest error is shown), and the mask does move the outputs.
Else what is left whole is named, with the reason. *reloads*: the model cut by all strategies at
once was saved, built again from its config and loaded with equal weights and answers."""

LIBRARIES = ("timm", "open_clip", "transformers")


def all_entries(only: Sequence[str] = ()) -> Iterator[Entry]:
    """Yield the entries of all libraries whose name contains one of `only` (all, if empty)."""
    for library in LIBRARIES:
        for entry in importlib.import_module(f"vlprune.zoo.{library}").entries():
            if not only or any(part in entry.name for part in only):
                yield entry


def all_left_out() -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of what the libraries have, and the table has not."""
    for library in LIBRARIES:
        module = importlib.import_module(f"vlprune.zoo.{library}")
        for name, reason in module.left_out().items():
            yield f"{library}/{name}", reason


def check_all(
    entries: Sequence[Entry],
    log: Path,
    *,
    jobs: int = 2,
    progress: Callable[[int, int, Row], None] | None = None,
) -> list[Row]:
    """Return a row per entry, checked in `jobs` processes.

    Args:
        entries: what to check.
        log: a file of JSON lines that rows are appended to; rows that it already holds are not
            checked again.
        jobs: processes, each with one thread.
        progress: called with (done, total, row) as rows come in.
    """
    done = {row.name: row for row in _read(log)}
    waiting = [entry for entry in entries if entry.name not in done]
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        log.open("a") as file,
        concurrent.futures.ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_use_one_thread
        ) as pool,
    ):
        futures = {pool.submit(check, entry): entry for entry in waiting}
        for future in concurrent.futures.as_completed(futures):
            row = _row_of(future, futures[future])
            done[row.name] = row
            file.write(json.dumps(_to_json(row)) + "\n")
            file.flush()
            if progress:
                progress(len(done), len(entries), row)
    return [done[entry.name] for entry in entries]


def _row_of(future: concurrent.futures.Future[Row], entry: Entry) -> Row:
    try:
        return future.result()
    except BrokenProcessPool:
        return Row(
            name=entry.name,
            group=entry.group,
            transformer=entry.transformer,
            fault="the process that checked it ended; run again to go on",
        )


def _use_one_thread() -> None:
    import torch  # after the process has been spawned

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # what libraries say about small configs


def _to_json(row: Row) -> dict[str, object]:
    return dataclasses.asdict(row)


def _read(log: Path) -> Iterator[Row]:
    if not log.is_file():
        return
    for line in log.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # cut off while it was written
            continue
        outcomes = {
            kind: Outcome(**{**outcome, "refused": tuple(outcome["refused"])})
            for kind, outcome in values["outcomes"].items()
        }
        yield Row(**{**values, "outcomes": outcomes})


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line per entry and strategy."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "name",
                "group",
                "params",
                "strategy",
                "axes",
                "units",
                "error",
                "moved",
                "exact",
                "refused",
                "reloads",
                "seconds",
                "fault",
            ]
        )
        for row in rows:
            for kind in (*STRATEGIES, *(k for k in WHERE_FOUND if k in row.outcomes)):
                o = row.outcomes.get(kind, Outcome())
                writer.writerow(
                    [
                        *(row.name, row.group, row.params, kind, o.axes, o.units, o.error, o.moved),
                        *(o.is_exact, " | ".join(o.refused), row.reloads, row.seconds, row.fault),
                    ]
                )


def markdown(rows: Sequence[Row]) -> str:
    """Return the page: what holds in all, per library, then every entry."""
    lines = [
        "# The zoo",
        "",
        *_ABOUT.splitlines(),
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.",
        "",
        *summary(rows),
        "",
        "## What is left whole, and why",
        "",
        *_reasons(rows),
    ]
    lines += ["", "## What is not in the table", ""]
    lines += [f"- {name}: {_plain(reason)}" for name, reason in all_left_out()]
    for library in LIBRARIES:
        chosen = [row for row in rows if row.name.startswith(f"{library}/")]
        if chosen:
            lines += ["", f"## {library}", "", *_table(chosen)]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table: entries and how many are exact, per library."""
    kinds = (*STRATEGIES, *_kinds_found(rows))
    header = ["entries", *(f"{kind} exact" for kind in kinds), "reload", "faults"]
    lines = ["| library | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    groups = [
        (library, [r for r in rows if r.name.startswith(library + "/")]) for library in LIBRARIES
    ]
    for name, chosen in [*groups, ("all", list(rows))]:
        if chosen:
            cells = [str(len(chosen)), *(_exact_of(chosen, kind) for kind in kinds)]
            cells += [str(sum(r.reloads for r in chosen)), str(sum(bool(r.fault) for r in chosen))]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _kinds_found(rows: Sequence[Row]) -> list[str]:
    """The strategies for what few models have, of those that any of `rows` has."""
    return [kind for kind in WHERE_FOUND if any(kind in row.outcomes for row in rows)]


def _exact_of(rows: Sequence[Row], kind: str) -> str:
    """How many are exact, of all or of those that have such units."""
    exact = sum(_is_exact(row, kind) for row in rows)
    if kind in WHERE_FOUND:
        having = sum(kind in row.outcomes for row in rows)
        return f"{exact} of {having}" if having else ""
    return f"{exact} ({exact / len(rows):.1%})"


def _is_exact(row: Row, kind: str) -> bool:
    return kind in row.outcomes and row.outcomes[kind].is_exact


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Every reason once, with the entries that it concerns, the most frequent first."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        if row.fault:
            found[row.fault].add(row.name)
        for outcome in row.outcomes.values():
            for refused in outcome.refused:
                found[refused.partition(": ")[2] or refused].add(row.name)
    ordered = sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [f"- {_plain(reason)} — {_names(names)}" for reason, names in ordered] or ["Nothing."]


def _names(names: set[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(rows: Sequence[Row]) -> list[str]:
    kinds = (*STRATEGIES, *_kinds_found(rows))
    header = ["entry", "of", "params", *kinds, "reloads"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [row.name.partition("/")[2], row.group, f"{row.params:,}"]
        cells += [_cell(row, kind) for kind in kinds] + ["yes" if row.reloads else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(row: Row, kind: str) -> str:
    if row.fault:
        return _plain(row.fault)
    if kind in WHERE_FOUND and kind not in row.outcomes:
        return ""
    outcome = row.outcomes.get(kind, Outcome())
    if outcome.is_exact:
        return f"exact {outcome.error:.0e}, {outcome.units} units"
    found = "" if outcome.error is None else f"{outcome.units} units {outcome.error:.0e}; "
    first = outcome.refused[0] if outcome.refused else "the mask moves no output"
    more = f" (+{len(outcome.refused) - 1})" if len(outcome.refused) > 1 else ""
    return _plain(f"{found}left: {first}{more}")

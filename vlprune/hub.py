"""Cut models on the Hugging Face hub: the folder of `store.py` with a card and a picture.

A cut model is of any class, so no mixin can be among its bases: `HubModel` holds it, and takes its
verbs (`save_pretrained`, `push_to_hub`, `from_pretrained`) from huggingface_hub.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import nn

from vlprune.certificate import Certificate
from vlprune.cost import count_params
from vlprune.plan import Plan, show_limit
from vlprune.pruner import record_of
from vlprune.report import draw_plan
from vlprune.store import from_pretrained, read_certificate, save_pretrained

PICTURE = "kept.png"


class HubModel(ModelHubMixin):
    """A cut model with the hub's verbs.

    Args:
        model: as `prune`, `repair` or `from_pretrained` returned it.
        certificate: of this model, see `certify`; the card tells its claims.
    """

    def __init__(self, model: nn.Module, certificate: Certificate | None = None):
        self.model = model
        self.certificate = certificate

    def _save_pretrained(self, save_directory: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            made = save_pretrained(
                self.model, Path(scratch) / "model", certificate=self.certificate
            )
            plans = record_of(self.model).plans
            drawn = [row for plan in plans[-1:] for row in plan.rows]
            if any(row.axis.kind in ("head", "ffn") for row in drawn):
                draw_plan(plans[-1], made / PICTURE)
            shutil.copytree(made, save_directory, dirs_exist_ok=True)
            for stale in {PICTURE, "certificate.json"} - {path.name for path in made.iterdir()}:
                (save_directory / stale).unlink(missing_ok=True)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> HubModel:
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return cls(from_pretrained(folder, **options), read_certificate(folder))

    def generate_model_card(self, *args: Any, repo_id: str = "", **kwargs: Any) -> ModelCard:
        """Return the card: what was cut, how to load it, and what was proven."""
        return model_card(self.model, self.certificate, repo_id)


def push_to_hub(
    model: nn.Module, repo_id: str, *, certificate: Certificate | None = None, **options: Any
) -> str:
    """Upload a cut model with its card, and return the address of the commit.

    Args:
        model: as `prune`, `repair` or `from_pretrained` returned it.
        repo_id: "user/name"; `vlprune.from_pretrained` takes the same.
        certificate: of this model, see `certify`.
        options: of huggingface_hub's `push_to_hub`: token, private, branch, ...
    """
    card = {"repo_id": repo_id}
    return str(HubModel(model, certificate).push_to_hub(repo_id, model_card_kwargs=card, **options))


def model_card(
    model: nn.Module, certificate: Certificate | None = None, repo_id: str = ""
) -> ModelCard:
    """Return the card of a cut model.

    Args:
        model: with its plans.
        certificate: whose claims it tells; without one it says that there is none.
        repo_id: to load it by.
    """
    data = ModelCardData(library_name="vlprune", tags=["pruning", "structured-pruning"])
    plans = record_of(model).plans
    drawn = any(row.axis.kind in ("head", "ffn") for plan in plans[-1:] for row in plan.rows)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {type(model).__name__}, pruned",
        f"{count_params(model):,} parameters. Weights were removed, not tokens: it is an ordinary "
        "PyTorch module.",
        "```python\nimport vlprune\n\n"
        f'model = vlprune.from_pretrained("{repo_id or "FOLDER"}")\n```',
        *(_plan_lines(plans[-1]) if plans else ["It is whole: nothing was removed."]),
        *([f"![What every layer keeps]({PICTURE})"] if drawn else []),
        "## What was proven",
        _claims(certificate),
    ]
    return ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def _plan_lines(plan: Plan) -> list[str]:
    """The budget, and a table of what every layer keeps."""
    asked = ", ".join(f"{key} {show_limit(value)}" for key, value in plan.asked.items())
    lines = [f"Asked: keep {asked or 'what the plan says'}."]
    if plan.dense and plan.planned:
        lines.append(
            f"Planned: {plan.planned.params:,} of {plan.dense.params:,} parameters, "
            f"{plan.planned.macs:,} of {plan.dense.macs:,} MACs a call."
        )
    rows = ["| tower | kind | kept | of | by layer |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in plan.rows:
        groups.setdefault((row.axis.tower, row.axis.kind), []).append(row)
    for (tower, kind), members in groups.items():
        kept = [len(row.keep) for row in members]
        units = sum(row.axis.units for row in members)
        rows.append(f"| {tower} | {kind} | {sum(kept)} | {units} | {' '.join(map(str, kept))} |")
    return [*lines, "\n".join(rows)]


def _claims(certificate: Certificate | None) -> str:
    if certificate is None:
        return "No certificate was made. `vlprune verify` checks the files and the plan."
    rows = ["| claim | verdict | largest error | tolerance | |", "|---|---|---|---|---|"]
    for claim in certificate.claims:
        error, tolerance = ("" if n is None else f"{n:.1e}" for n in (claim.error, claim.tolerance))
        note = claim.note.replace("|", "\\|")
        rows.append(f"| {claim.name} | {claim.verdict} | {error} | {tolerance} | {note} |")
    counted = [
        f"{tower} {kind}: {sum(a.planned for a in axes)} units planned, "
        f"{sum(a.achieved or 0 for a in axes)} counted"
        for (tower, kind), axes in certificate.groups().items()
        if all(axis.achieved is not None for axis in axes)
    ]
    return "\n".join([*rows, "", "; ".join(counted) + ".", "", "`vlprune verify` checks it again."])

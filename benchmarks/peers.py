"""torch-pruning's own importances on the same trained CLIP and DeiT, at equal parameters.

`python benchmarks/peers.py --page docs/quality.md` cuts heads and neurons by its magnitude and
Taylor importance, each layer the same share (its global ranking empties layers and then fails), of
scenes-deit, and of scenes-clip with its weights rewritten into transformers' CLIPModel, whose heads
torch-pruning can prune (of open_clip's it prunes none); features are checked to agree. Beside it:
metrics of this package on the same model, at the same number of parameters, cut, and cut and
repaired.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import _page
import torch
import torch_pruning as tp
import transformers
from _torch_pruning import cut_
from torch import nn

import vlprune
from vlprune.cost import count_params
from vlprune.samples import samples_of
from vlprune.shipped import SHIPPED
from vlprune.tasks import Retrieval

SHARES = (0.5, 1 / 3)  # of heads and neurons, in every layer
IMPORTANCES = {
    "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
    "Taylor": tp.importance.GroupTaylorImportance(),
}
OURS = (
    ("magnitude", "uniform"),
    ("taylor", "global"),
    ("fisher", "global"),
    ("reconstruction", "global"),
)
NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="scenes-clip,scenes-deit")
    parser.add_argument("--page", type=Path, help="Markdown with markers to write the tables into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = []
    for name in arguments.models.split(","):
        source = vlprune.create_model(name).eval()
        make = SHIPPED[name].task
        test, calibration = make("test", arguments.scenes, 7, 500), make("train", 500, 1, 100)
        model = source
        if name == "scenes-clip":
            model = as_transformers(source)
            check_equal(source, model, calibration)
        parts.append(table(name, model, test, calibration))
    text = "\n\n".join([*parts, _page.machine("wall")])
    _page.write(arguments.page, "peers", text)


def table(title: str, model: nn.Module, test: Any, calibration: Any) -> str:
    """Return as Markdown what torch-pruning and this package leave of a model."""
    dense = samples_of(test, model)
    low, high = dense.interval()
    anatomy = vlprune.dissect(model, calibration.example_inputs(model)).select(("head", "ffn"))
    cuts = {
        (name, share): cut_by_torch_pruning(model, importance, share, calibration)
        for name, importance in IMPORTANCES.items()
        for share in SHARES
    }
    params = {share: count_params(cuts["magnitude", share]) for share in SHARES}
    lines = [
        f"`{title}` as {type(model).__name__}: dense {dense.value:.1f} ({low:.1f} to {high:.1f}), "
        f"{count_params(model):,} parameters.",
        "",
        "| criterion | " + " | ".join(f"{params[share]:,} left" for share in SHARES) + " |",
        "|---" * (1 + len(SHARES)) + "|",
    ]

    def share_of(small: nn.Module) -> str:
        return f"{100 * test.measure(small) / dense.value:.1f}"

    for importance in IMPORTANCES:
        cells = [share_of(cuts[importance, share]) for share in SHARES]
        lines.append(f"| torch-pruning, {importance}, uniform | " + " | ".join(cells) + " |")
    for metric, allocation in OURS:
        task = None if metric == "magnitude" else calibration
        scores = vlprune.score(model, metric, task, anatomy=anatomy)
        cells = []
        for share in SHARES:
            plan = vlprune.plan(scores, {"params": params[share]}, allocation)
            small = vlprune.prune(model, plan, verify=False)
            repaired = vlprune.repair(model, plan, calibration, anatomy=anatomy, verify=False)
            cells.append(f"{share_of(small)} -> {share_of(repaired)}")
        lines.append(f"| {metric}, {allocation} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def as_transformers(source: Any) -> nn.Module:
    """Return transformers' CLIPModel with the weights of open_clip's scenes-clip."""
    shared = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 6}
    shared |= {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    vision = {**shared, "num_hidden_layers": 6, "image_size": 96, "patch_size": 16}
    text = {**shared, "num_hidden_layers": 4, "vocab_size": 22, "max_position_embeddings": 32}
    text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}  # 2: pooled at the largest id
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)
    ).eval()
    state = {"logit_scale": source.logit_scale}
    state["visual_projection.weight"] = source.visual.proj.T
    state["text_projection.weight"] = source.text_projection.T
    visual = "vision_model.embeddings."
    state[visual + "class_embedding"] = source.visual.class_embedding
    state[visual + "position_embedding.weight"] = source.visual.positional_embedding
    state[visual + "patch_embedding.weight"] = source.visual.conv1.weight
    state["text_model.embeddings.token_embedding.weight"] = source.token_embedding.weight
    state["text_model.embeddings.position_embedding.weight"] = source.positional_embedding
    norms = {
        "vision_model.pre_layrnorm": source.visual.ln_pre,
        "vision_model.post_layernorm": source.visual.ln_post,
        "text_model.final_layer_norm": source.ln_final,
    }
    for name, norm in norms.items():
        state |= {f"{name}.{key}": value for key, value in norm.state_dict().items()}
    for tower, stack in (
        ("vision_model", source.visual.transformer),
        ("text_model", source.transformer),
    ):
        for number, block in enumerate(stack.resblocks):
            path = f"{tower}.encoder.layers.{number}"
            for part in ("weight", "bias"):
                rows = getattr(block.attn, f"in_proj_{part}").chunk(3)
                for letter, row in zip("qkv", rows, strict=True):
                    state[f"{path}.self_attn.{letter}_proj.{part}"] = row
                for ours, theirs in NAMES.items():
                    state[f"{path}.{theirs}.{part}"] = getattr(block.get_submodule(ours), part)
    missing, unexpected = model.load_state_dict(
        {name: t.detach().clone() for name, t in state.items()}, strict=False
    )
    assert not unexpected, unexpected
    assert all(name.endswith("position_ids") for name in missing), missing
    return model


@torch.no_grad()
def check_equal(source: nn.Module, model: nn.Module, task: Retrieval) -> None:
    """Raise unless both models give the same features."""
    batch = next(iter(task.batches()))
    for one, other in zip(task.outputs(source, batch), task.outputs(model, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def cut_by_torch_pruning(model: nn.Module, importance: Any, share: float, task: Any) -> nn.Module:
    """Return a copy of which torch-pruning keeps a share of every layer's heads and neurons."""
    small = copy.deepcopy(model)
    inputs = task.example_inputs(small)
    for batch in task.batches():  # gradients for Taylor
        task.loss(small, batch).backward()
    return cut_(small, inputs, importance, share)


if __name__ == "__main__":
    main()

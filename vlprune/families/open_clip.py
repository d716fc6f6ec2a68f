"""open_clip's CLIP: two towers of `ResidualAttentionBlock` around `nn.MultiheadAttention`.

The attention itself is declared in `pytorch.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vlprune.errors import PlanError
from vlprune.families._sizes import exact_ratio, first_rows
from vlprune.history import Fate
from vlprune.layout import AttentionLayout, BlockLayout, Family, HalfLayout
from vlprune.registry import FAMILIES


def example_inputs(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Return noise images [batch, 3, height, width] and random token ids [batch, context]."""
    generator = torch.Generator().manual_seed(0)
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    image = torch.randn(batch, 3, height, width, generator=generator)
    tower = getattr(model, "text", model)
    vocabulary = getattr(model, "vocab_size", None) or tower.vocab_size
    context = getattr(model, "context_length", 0) or tower.context_length or 16
    if hasattr(tower, "config"):  # of transformers: some of its positions are for padding
        context = min(context, 16)
    text = torch.randint(3, vocabulary, (batch, context), generator=generator)
    eos = getattr(tower, "eos_id", None)
    if isinstance(eos, int) and eos < vocabulary:
        text[:, -1] = eos  # where a text ends, some towers pool
    return image, text


def describe(model: Any) -> dict[str, Any] | None:
    """Return the arguments of `open_clip.CLIP` for a plain ViT tower and text transformer."""
    if type(model).__name__ != "CLIP":
        return None
    visual, text = model.visual, model.transformer
    plain = type(visual).__name__ == "VisionTransformer" and type(text).__name__ == "Transformer"
    if not plain or not len(text.resblocks) or not len(visual.transformer.resblocks):
        return None
    return {
        "embed_dim": visual.output_dim,
        "quick_gelu": type(text.resblocks[0].mlp.gelu).__name__ == "QuickGELU",
        "vision_cfg": _vision_config(visual),
        "text_cfg": _text_config(model),
    }


def _vision_config(visual: Any) -> dict[str, Any]:
    block = visual.transformer.resblocks[0]
    width = visual.transformer.width
    size, patch = visual.image_size, visual.patch_size
    return {
        "image_size": list(size) if isinstance(size, (tuple, list)) else size,
        "patch_size": patch[0] if isinstance(patch, (tuple, list)) else patch,
        "layers": len(visual.transformer.resblocks),
        "width": width,
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": exact_ratio(block.mlp.c_fc.out_features, width),
        "ls_init_value": _layer_scale(block),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "output_tokens": visual.output_tokens,
    }


def _text_config(model: Any) -> dict[str, Any]:
    block = model.transformer.resblocks[0]
    width = model.transformer.width
    return {
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(model.transformer.resblocks),
        "mlp_ratio": exact_ratio(block.mlp.c_fc.out_features, width),
        "ls_init_value": _layer_scale(block),
        "pool_type": model.text_pool_type,
        "eos_id": model.text_eos_id,
        "no_causal_mask": model.attn_mask is None,
        "proj_bias": isinstance(model.text_projection, nn.Linear)
        and model.text_projection.bias is not None,
    }


def _layer_scale(block: Any) -> float | None:
    return None if isinstance(block.ls_1, nn.Identity) else 1e-5


def build(arguments: dict[str, Any]) -> nn.Module:
    """Return an open_clip model with random weights, in eval mode.

    Args:
        arguments: of `open_clip.CLIP`, or of the class that "class" names (CustomTextCLIP, CoCa).
            "timm_arguments" are passed to `timm.create_model` of a timm tower, "hf_config" is the
            config of a transformers text tower, so that it needs no download.
    """
    import open_clip.coca_model  # lazy: spares open_clip where no such model is used

    rest = {k: v for k, v in arguments.items() if k not in ("class", "timm_arguments", "hf_config")}
    name = arguments.get("class", "CLIP")
    cls = open_clip.coca_model.CoCa if name == "CoCa" else getattr(open_clip.model, name)
    with (
        _timm_arguments(arguments.get("timm_arguments", {})),
        _local_config(arguments.get("hf_config")) as folder,
    ):
        if folder is not None:
            rest["text_cfg"] = {**rest["text_cfg"], "hf_model_name": folder}
        model: nn.Module = cls(**rest)
    return model.eval()


@contextlib.contextmanager
def _timm_arguments(arguments: dict[str, Any]) -> Iterator[None]:
    """Pass more arguments to timm's `create_model` than open_clip's adapter does."""
    import open_clip.timm_model  # lazy: spares open_clip where no such model is used

    timm = open_clip.timm_model.timm
    plain = timm.create_model
    if arguments:
        timm.create_model = functools.partial(plain, **arguments)
    try:
        yield
    finally:
        timm.create_model = plain


@contextlib.contextmanager
def _local_config(config: dict[str, Any] | None) -> Iterator[str | None]:
    """A folder with this transformers config, for a text tower that is named by a folder."""
    if config is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


def create(name: str, pretrained: str | bool = False, **arguments: Any) -> nn.Module:
    """Return `open_clip.create_model(name, pretrained)` in eval mode; `pretrained` is a tag."""
    import open_clip  # lazy: spares open_clip where no such model is used

    tag = pretrained if isinstance(pretrained, str) else None
    # a model that is built without weights stays there: data cannot be copied out of it
    empty = nn.Linear(1, 1).weight.is_meta
    options = {"device": "meta"} if empty else {}
    model: nn.Module = open_clip.create_model(name, pretrained=tag, **options, **arguments)
    return model.eval()


def stock(model: Any, fates: Mapping[str, Fate], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `open_clip.CLIP` with the depth and neurons of a cut one."""
    towers = {
        "vision_cfg": getattr(model.visual, "transformer", None),
        "text_cfg": getattr(getattr(model, "text", model), "transformer", None),
    }
    changed = dict(arguments)
    for name, tower in towers.items():
        blocks = getattr(tower, "resblocks", None)
        if blocks is None:
            continue
        neurons = first_rows(blocks, "mlp.c_fc")
        changed[name] = {**arguments[name], "layers": len(blocks)}
        if neurons is not None:
            changed[name]["mlp_ratio"] = exact_ratio(neurons, arguments[name]["width"])
    return changed


def write(model: Any, arguments: dict[str, Any], folder: Path) -> str:
    """Write config and weights as `open_clip.create_model("local-dir:...")` reads them.

    Raises:
        PlanError: if a tower is of another library: open_clip knows those by name only.
    """
    from open_clip.model import get_model_preprocess_cfg  # lazy: spares open_clip

    foreign = [name for name in ("timm_arguments", "hf_config") if name in arguments]
    if foreign:
        raise PlanError(
            f"towers must be open_clip's own to be saved plain; {', '.join(foreign)} stand for one "
            "that open_clip knows by its name only. Save it with vlprune.save_pretrained."
        )
    config = {key: value for key, value in arguments.items() if key != "class"}
    if arguments.get("class", "CLIP") != "CLIP":
        config["custom_text"] = True
    whole = {"model_cfg": config, "preprocess_cfg": get_model_preprocess_cfg(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(whole, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    return 'open_clip.create_model("local-dir:FOLDER")'


FAMILIES.register("open_clip")(
    Family(
        models=(
            "open_clip.model.CLIP",
            "open_clip.model.CustomTextCLIP",
            "open_clip.coca_model.CoCa",
        ),
        towers=(("visual*", "vision"), ("text_decoder*", "decoder"), ("*", "text")),
        example_inputs=example_inputs,
        describe=describe,
        build=build,
        create=create,
        stock=stock,
        write=write,
        attentions=(
            AttentionLayout(
                cls="open_clip.modified_resnet.AttentionPool2d",
                gate="vlprune.families._open_clip_classes:ExplicitAttentionPool2d",
                cut="vlprune.families._open_clip_classes:ExplicitAttentionPool2d",
                dims="vlprune.families._open_clip_classes:ExplicitAttentionPool2d",
            ),
        ),
        blocks=(
            BlockLayout(
                cls="open_clip.transformer.ResidualAttentionBlock",
                halves=(
                    HalfLayout(
                        name="attention",
                        gate="output",
                        module="attn",
                        scopes=("attn", "ln_1", "ls_1", "ln_1_kv"),
                    ),
                    HalfLayout(
                        name="ffn", gate="output", module="mlp", scopes=("mlp", "ln_2", "ls_2")
                    ),
                ),
                bypass="vlprune.families._open_clip_classes:PartialResidualAttentionBlock",
                owner_empty="vlprune.families._open_clip_classes:EmptyTransformer",
            ),
        ),
    )
)

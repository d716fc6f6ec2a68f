"""timm's transformers: every entry point of these modules, with small sizes and its own flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from vlprune.zoo.entries import Entry

Sizes = dict[str, Any]

LEFT_OUT = {  # sizes are fixed by the library; smaller ones of the same make are there
    **dict.fromkeys(
        ("mvitv2_large", "mvitv2_large_cls", "mvitv2_huge_cls"), "over 200 M parameters"
    ),
    **dict.fromkeys(("mvitv2_base", "mvitv2_base_cls", "mvitv2_base_v"), "over 50 M parameters"),
    **{
        f"volo_d{size}_{image}": "over 80 M parameters"
        for size, images in {3: (224, 448), 4: (224, 448), 5: (224, 448, 512)}.items()
        for image in images
    },
}


def _patch(name: str, default: int = 16) -> int:
    found = re.search(r"patch_?(\d+)", name)
    return int(found.group(1)) if found else default


def _plain(name: str) -> Sizes:
    """Four heads of 16, two blocks, 16 tokens."""
    return {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 4 * _patch(name)}


def _vit(name: str) -> Sizes:
    packed = {"mlp_ratio": 4.0} if "giant" in name else {}  # a packed gate halves its width
    return {**_plain(name), **packed}


def _eva(name: str) -> Sizes:
    grouped = {"num_kv_heads": [4, 2]} if "sapiens2" in name else {}
    return {**_plain(name), **grouped}


def _hybrid(name: str) -> Sizes:
    if "mci" in name:  # its stem ends in the width of the blocks
        return {"depth": 2, "img_size": 64}
    return {**_plain(name), "img_size": 64}


def _naflex(name: str) -> Sizes:
    return {"embed_dim": 64, "depth": 2, "num_heads": 4}


def _sam(name: str) -> Sizes:
    return {**_plain(name), "global_attn_indexes": [1], "window_size": 2, "img_size": 64}


def _cait(name: str) -> Sizes:
    return {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64}


def _swin(name: str) -> Sizes:
    heads = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    return {**heads, "window_size": 4, "img_size": 64}


def _swin_cr(name: str) -> Sizes:
    heads = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    return {**heads, "window_size": 4, "img_size": 64}


def _hiera(name: str) -> Sizes:
    return {"embed_dim": 32, "num_heads": 2, "stages": [1, 2, 2, 1], "img_size": [64, 64]}


def _sam2(name: str) -> Sizes:
    return {"embed_dim": 32, "num_heads": 2}


def _xcit(name: str) -> Sizes:
    return {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64}


def _img64(name: str) -> Sizes:
    return {"img_size": 64}


def _pit(name: str) -> Sizes:
    return {"base_dims": [16, 16, 16], "depth": [2, 2, 1], "heads": [2, 4, 8]}


def _twins(name: str) -> Sizes:
    return {
        "embed_dims": [32, 64, 64, 64],
        "num_heads": [2, 4, 4, 4],
        "depths": [1, 2, 1, 1],
        "img_size": 64,
    }


def _convit(name: str) -> Sizes:
    return {"embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2, "img_size": 64}


def _davit(name: str) -> Sizes:
    return {
        "embed_dims": [32, 64],
        "num_heads": [2, 4],
        "depths": [1, 2],
        "window_size": 4,
    }


def _pvt(name: str) -> Sizes:
    return {"embed_dims": [16, 32, 64, 64], "num_heads": [1, 2, 4, 4], "depths": [2, 2, 2, 2]}


def _tiny_vit(name: str) -> Sizes:
    return {"embed_dims": [16, 32, 64, 64], "num_heads": [1, 2, 4, 4], "depths": [1, 1, 2, 1]}


RULES: dict[str, Callable[[str], Sizes]] = {
    "vision_transformer": _vit,
    "deit": _plain,
    "eva": _eva,
    "beit": _plain,
    "vision_transformer_relpos": _plain,
    "vision_transformer_hybrid": _hybrid,
    "naflexvit": _naflex,
    "vision_transformer_sam": _sam,
    "cait": _cait,
    "swin_transformer": _swin,
    "swin_transformer_v2": _swin,
    "swin_transformer_v2_cr": _swin_cr,
    "hiera": _hiera,
    "hieradet_sam2": _sam2,
    "mvitv2": _img64,
    "volo": _img64,
    "xcit": _xcit,
    "vitamin": lambda name: {"depth": 2, "img_size": 64},
    "pit": _pit,
    "twins": _twins,
    "convit": _convit,
    "davit": _davit,
    "pvt_v2": _pvt,
    "tiny_vit": _tiny_vit,
}


def left_out() -> dict[str, str]:
    """Return the entry points of these modules that have no entry, and why."""
    return dict(LEFT_OUT)


def entries() -> Iterator[Entry]:
    """Yield an entry for every entry point of the modules in `RULES`."""
    import timm  # lazy: spares timm where no timm model is used

    for module, rule in RULES.items():
        for name in timm.list_models(module=module):
            if name in LEFT_OUT:
                continue
            sizes = {"num_classes": 10, **rule(name)}
            arguments = {"name": name, "arguments": sizes}
            yield Entry(name=f"timm/{name}", family="timm", arguments=arguments, group=module)

"""timm: any of its models; pre-norm `Block` and what it takes on when a half is removed."""

from __future__ import annotations

from vlprune.families import _timm
from vlprune.layout import AttentionLayout, BlockLayout, Family, HalfLayout
from vlprune.registry import FAMILIES

FAMILIES.register("timm")(
    Family(
        models=("timm.models.*",),
        towers=(("*", "vision"),),
        example_inputs=_timm.example_inputs,
        describe=_timm.describe,
        build=_timm.build,
        create=_timm.create,
        stock=_timm.stock,
        write=_timm.write,
        attentions=(
            AttentionLayout(
                cls="timm.layers.attention.Attention",
                dims="vlprune.families._timm_classes:SplitAttention",
                empty="vlprune.families._timm_classes:HeadlessAttention",
            ),
            AttentionLayout(
                cls="timm.models.cait.TalkingHeadAttn",
                cut="vlprune.families._timm_classes:CutTalkingHeadAttn",
            ),
        ),
        blocks=(
            BlockLayout(
                cls="timm.models.vision_transformer.Block",
                halves=(
                    HalfLayout(
                        name="attention",
                        gate="output",
                        module="attn",
                        scopes=("attn", "norm1", "ls1", "drop_path1"),
                    ),
                    HalfLayout(
                        name="ffn",
                        gate="output",
                        module="mlp",
                        scopes=("mlp", "norm2", "ls2", "drop_path2"),
                    ),
                ),
                bypass="vlprune.families._timm_classes:PartialBlock",
            ),
        ),
    )
)

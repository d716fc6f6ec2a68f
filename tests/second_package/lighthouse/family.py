"""What vlprune has to be told of this library; an entry point leads here."""

import torch

from vlprune.layout import AttentionLayout, Family


def _build(arguments):
    from lighthouse.model import Lighthouse  # lazy: spares it where no such model is used

    return Lighthouse(**arguments).eval()


LIGHTHOUSE = Family(
    models=("lighthouse.model.Lighthouse",),
    towers=(("*", "vision"),),
    example_inputs=lambda model, batch: (torch.ones(batch, 7, 24).cumsum(1).sin(),),
    describe=lambda model: {"storeys": len(model.storeys)},
    build=_build,
    attentions=(AttentionLayout(cls="lighthouse.model.Beam", cut="lighthouse.cut:CutBeam"),),
)

"""The Segmenter: its masks against the paper's formula, its sizes, what timm sees of it."""

import timm
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected

import vlprune
from vlprune.models.segmenter import Segmenter
from vlprune.pruner import source_of
from vlprune.registry import FAMILIES


def test_masks_are_cosines_of_patches_and_class_tokens_normalised_over_classes() -> None:
    model = zoo.make("segmenter").double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    decoder = model.decoder
    with torch.no_grad():
        tokens = model.backbone.forward_features(image)[:, 1:]  # without the class token of timm
        x = torch.cat([decoder.projection(tokens), decoder.class_tokens.expand(2, -1, -1)], 1)
        for block in decoder.blocks:
            x = block(x)
        x = decoder.norm(x)
        expected = torch.empty(2, 5, 2, 2, dtype=torch.float64)
        for b in range(2):
            for t in range(4):
                patch = decoder.patch_projection.weight @ x[b, t]
                cosines = []
                for c in range(5):
                    name = decoder.class_projection.weight @ x[b, 4 + c]
                    cosines.append(patch @ name / (patch.norm() * name.norm()))
                scores = decoder.mask_norm(torch.stack(cosines))
                expected[b, :, t // 2, t % 2] = scores
        upsampled = F.interpolate(expected, (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(image), upsampled, rtol=1e-9, atol=1e-9)


def test_scores_are_as_large_as_the_image() -> None:
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), depth=1, num_classes=0, reg_tokens=2
    )
    model = Segmenter(backbone, 7, decoder_heads=3)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7, 32, 48)
    assert model.decoder.class_tokens.shape == (1, 7, 192)


def test_every_strategy_finds_both_towers() -> None:
    _, anatomy = dissected("segmenter")
    assert not anatomy.refusals
    for kind in ("head", "ffn", "layer", "sublayer", "head_dim", "head_dim_per_head"):
        found = {axis.tower for axis in anatomy.select((kind,)).axes}
        assert found == {"vision", "decoder"}, kind


def test_it_is_described_and_built_again_at_its_first_size_even_when_cut() -> None:
    model, anatomy = dissected("segmenter")
    source = source_of(model)
    assert source["family"] == "segmenter"
    built = FAMILIES["segmenter"].build(source["arguments"])
    assert {n: t.shape for n, t in built.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    layers = {a.name: (0,) for a in anatomy.select(("layer",)).axes}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, layers))
    assert len(small.decoder.blocks) == len(small.backbone.blocks) == 1
    assert small.arguments["decoder_depth"] == 2


def test_a_backbone_that_timm_does_not_name_is_not_described() -> None:
    model = zoo.segmenter()
    model.backbone.pretrained_cfg = {}
    assert FAMILIES["segmenter"].describe(model) is None


def test_sizes_of_the_decoder_are_kept() -> None:
    model = Segmenter(zoo.deit(num_classes=0), 3, decoder_heads=4, decoder_mlp_ratio=2.0)
    assert model.decoder.blocks[0].mlp.fc1.out_features == 96
    assert model.arguments == {
        "num_classes": 3,
        "decoder_width": 48,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "decoder_mlp_ratio": 2.0,
    }

"""Reasoning over two pictures: the model by hand, the task, the model that ships."""

import pytest
import torch
from conftest import dissected
from torch import Tensor, nn

import vlprune
from vlprune.calls import calls_of, run
from vlprune.tasks import VisualReasoning

PAD = 0


def batch(seed: int = 0, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 50, (size, 7), generator=generator)
    text[0, 5:] = PAD
    return {
        "image": torch.randn(size, 2, 3, 32, 32, generator=generator),
        "text": text,
        "label": torch.randint(2, (size,), generator=generator),
    }


def blip() -> nn.Module:
    return dissected("BlipForVisualReasoning")[0]


def by_hand(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits of one example after the other; both pictures' tokens side by side."""
    rows = []
    for image, text in zip(given["image"], given["text"], strict=True):
        tokens = [
            model.vision_model(picture[None]).last_hidden_state + model.picture_embedding.weight[i]
            for i, picture in enumerate(image)
        ]
        read = model.text_encoder(
            text[text != PAD][None], encoder_hidden_states=torch.cat(tokens, dim=1)
        ).last_hidden_state[0, 0]
        first, _, last = model.reasoning_head
        hidden = (first.weight @ read + first.bias).clamp(min=0)
        rows.append(last.weight @ hidden + last.bias)
    return torch.stack(rows)


@torch.no_grad()
def test_logits_by_hand() -> None:
    one = VisualReasoning([batch()])
    (found,) = one.outputs(blip(), next(iter(one.batches())))
    torch.testing.assert_close(found, by_hand(blip(), batch()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pictures_in_the_other_order_are_another_question() -> None:
    given = batch()
    turned = {**given, "image": given["image"].flip(1)}
    assert not torch.allclose(by_hand(blip(), given), by_hand(blip(), turned), rtol=1e-2)


def test_measure_and_loss_by_hand() -> None:
    batches = [batch(seed) for seed in range(3)]
    with torch.no_grad():
        logits = torch.cat([by_hand(blip(), given) for given in batches])
    labels = torch.cat([given["label"] for given in batches])
    right = [float(row[y] > row[1 - y]) for row, y in zip(logits, labels.tolist(), strict=True)]
    one = VisualReasoning(batches)
    assert one.measure(blip()) == pytest.approx(100 * sum(right) / len(right))
    first = next(iter(one.batches()))
    loss = one.loss(blip(), first)
    expected = -logits[:4].log_softmax(-1)[torch.arange(4), labels[:4]].mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert loss.requires_grad
    inputs = {"pixel_values": first[0], "input_ids": first[1], "labels": first[2]}
    mask = (first[1] != PAD).long()
    with torch.no_grad():
        own = blip()(**inputs, attention_mask=mask).loss
    torch.testing.assert_close(loss.detach(), own)


def test_a_model_that_is_undecided_is_wrong() -> None:
    one = VisualReasoning([batch()])
    assert one.values((torch.zeros(4, 2),), batch()["label"]).tolist() == [0.0] * 4


def test_example_inputs_are_one_example() -> None:
    (call,) = calls_of(VisualReasoning([batch()]).example_inputs(blip()))
    assert call.kwargs["pixel_values"].shape == (1, 2, 3, 32, 32)
    assert call.kwargs["attention_mask"].tolist() == [[1] * 5 + [0] * 2]
    with torch.no_grad():
        assert run(blip(), call).logits.shape == (1, 2)


def test_faults_are_told() -> None:
    with pytest.raises(ValueError, match="at least one batch; got none in VisualReasoning"):
        VisualReasoning([]).measure(blip())
    with pytest.raises(TypeError, match="gone through many times"):
        VisualReasoning(iter([batch()]))
    with pytest.raises(TypeError, match=r"must hold 'image', 'text', 'label'.*; got tuple"):
        VisualReasoning([(1, 2)]).measure(blip())


def test_removals_are_measured_by_the_engine() -> None:
    _, anatomy = dissected("BlipForVisualReasoning")
    heads = anatomy.select(("head",))
    one = VisualReasoning([batch(seed) for seed in range(3)])
    scores = vlprune.score(blip(), "mope", one, anatomy=heads)
    name = "text_encoder.encoder.layer.0.crossattention.self:head"
    keep = {axis.name: tuple(range(axis.units)) for axis in heads.axes}
    for unit in range(4):
        kept = tuple(i for i in range(4) if i != unit)
        with vlprune.mask(blip(), vlprune.make_plan(heads, {**keep, name: kept})) as masked:
            left = one.measure(masked)
        assert float(scores.values[name][unit]) == pytest.approx(one.measure(blip()) - left)

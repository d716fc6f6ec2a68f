"""Captioning: what one teacher-forced pass says, against `generate` and transformers' own loss."""

import pytest
import torch
from conftest import dissected
from torch import Tensor, nn

import vlprune
from vlprune.calls import calls_of, run
from vlprune.shipped import SHIPPED
from vlprune.tasks import Captioning

PAD, BOS, END = 0, 57, 58  # of the tiny model
LENGTH = 9


def blip() -> nn.Module:
    return dissected("BlipForConditionalGeneration")[0]


def greedy(model: nn.Module, image: Tensor, length: int = LENGTH) -> Tensor:
    """Token ids [B, length] of greedy captions."""
    ids = model.generate(image, max_new_tokens=length - 1, do_sample=False, num_beams=1)
    return nn.functional.pad(ids[:, :length], (0, max(length - ids.shape[1], 0)), value=PAD)


def batch(seed: int = 0, size: int = 6) -> dict[str, Tensor]:
    """Pictures whose captions are greedy ones, every second with a token changed."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, 32, 32, generator=generator)
    text = greedy(blip(), image)
    text[::2, 3] = 3 + (text[::2, 3] + 1) % 50
    return {"image": image, "text": text}


def test_exact_are_those_that_generate_says() -> None:
    batches = [batch(seed) for seed in range(3)]
    said = [
        bool((greedy(blip(), one["image"][i : i + 1]) == one["text"][i]).all())
        for one in batches
        for i in range(6)
    ]
    assert 0.3 < sum(said) / len(said) < 0.7
    assert Captioning(batches).measure(blip()) == pytest.approx(100 * sum(said) / len(said))


def test_tokens_are_counted_one_by_one() -> None:
    one = Captioning([batch()], measure_name="tokens")
    logits = torch.zeros(2, 4, 60)
    text = torch.tensor([[BOS, 5, 6, END, PAD], [BOS, 7, END, PAD, PAD]])
    for place, token in enumerate((5, 6, 9)):
        logits[0, place, token] = 1  # its end is wrong
    logits[1, 0, 7] = 1  # and here the end is undecided
    assert one.values((logits,), text).tolist() == pytest.approx([200 / 3, 50])
    exact = Captioning([batch()])
    assert exact.values((logits,), text).tolist() == [0, 0]
    logits[1, 1, END] = 1
    assert exact.values((logits,), text).tolist() == [0, 100]


def test_loss_is_that_of_transformers_with_pads_ignored() -> None:
    given = batch()
    given["text"][1, 5:] = PAD
    given["text"][2, 7:] = PAD
    one = Captioning([given])
    (first,) = one.batches()
    loss = one.loss(blip(), first)
    text = given["text"]
    with torch.no_grad():
        own = blip()(
            pixel_values=given["image"],
            input_ids=text,
            attention_mask=(text != PAD).long(),
            labels=text.masked_fill(text == PAD, -100),
        ).loss
        each = one.losses(blip(), one.outputs(blip(), first), text)
    torch.testing.assert_close(loss.detach(), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(each.mean(), own, rtol=1e-5, atol=1e-6)
    assert loss.requires_grad


def test_measure_is_the_mean_of_values_and_predictions_end_with_the_caption() -> None:
    given = batch()
    given["text"][1, 5:] = PAD
    for name in ("exact", "tokens"):
        one = Captioning([given], measure_name=name)
        (first,) = one.batches()
        with torch.no_grad():
            outputs = one.outputs(blip(), first)
        assert one.measure(blip()) == float(one.values(outputs, one.targets(first)).mean())
    logits = one.logits(blip(), outputs)
    assert len(logits) == LENGTH - 1
    assert logits[3][1].abs().sum() > 0
    assert all(float(after[1].abs().sum()) == 0 for after in logits[4:])


def test_the_first_token_is_the_decoders_own_start() -> None:
    given = batch()
    other = {**given, "text": given["text"].clone()}
    other["text"][:, 0] = 11
    assert Captioning([other]).measure(blip()) == Captioning([given]).measure(blip())


def test_example_inputs_are_one_example() -> None:
    (call,) = calls_of(Captioning([batch()]).example_inputs(blip()))
    with torch.no_grad():
        assert run(blip(), call).logits.shape == (1, LENGTH, 60)


def test_faults_are_told() -> None:
    with pytest.raises(ValueError, match="measure_name must be 'exact' or 'tokens'; got 'cider'"):
        Captioning([batch()], measure_name="cider")
    with pytest.raises(ValueError, match="at least one batch; got none in Captioning"):
        Captioning([]).measure(blip())
    with pytest.raises(TypeError, match="gone through many times"):
        Captioning(iter([batch()]))


def test_a_cut_captioner_generates_what_its_teacher_forced_pass_says() -> None:
    model = vlprune.create_model("scenes-blip-captioning")
    task = SHIPPED["scenes-blip-captioning"].task("test", 60, 1, 60)
    plan = vlprune.plan(
        vlprune.score(model, "taylor", task, strategies=("head", "ffn")), {"params": 0.75}, "global"
    )
    layers = vlprune.dissect(model, task.example_inputs(model)).select(("layer",))
    for small in (
        vlprune.prune(model, plan),
        vlprune.prune(
            model, vlprune.make_plan(layers, {"text_decoder.bert.encoder.layer:layer": (0, 1, 3)})
        ),
    ):
        ((image, text),) = task.batches()
        said = (greedy(small, image, text.shape[1]) == text).all(1)
        assert task.measure(small) == pytest.approx(100 * float(said.double().mean()))
        tokens = Captioning([{"image": image, "text": text}], measure_name="tokens")
        assert 10 < tokens.measure(small) < 100

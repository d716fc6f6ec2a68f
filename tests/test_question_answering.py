"""Question answering: candidates ranked by their likelihood, against a loop over tokens."""

import pytest
import torch
from conftest import dissected
from torch import Tensor

import vlprune
from vlprune.calls import calls_of, run
from vlprune.tasks import QuestionAnswering
from vlprune.tasks._examples import is_best

PAD, BOS, END = 0, 57, 58  # of the tiny model
ANSWERS = torch.tensor(
    [[1, 7, 58, 0], [1, 7, 9, 58], [1, 12, 58, 0], [1, 30, 31, 58], [1, 5, 58, 0]]
)
BATCH = 3


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    question = torch.randint(3, 50, (BATCH, 6), generator=generator)
    question[0, 4:] = PAD
    return {
        "image": torch.randn(BATCH, 3, 32, 32, generator=generator),
        "question": question,
        "answer": torch.tensor([1, 0, 3]),
    }


def blip() -> torch.nn.Module:
    return dissected("BlipForQuestionAnswering")[0]


def task(*batches: dict[str, Tensor]) -> QuestionAnswering:
    return QuestionAnswering(list(batches) or [batch()], ANSWERS)


def likelihood(model: torch.nn.Module, image: Tensor, question: Tensor, answer: Tensor) -> float:
    """Of one answer to one question: a forward per token, answers not padded, nothing batched.

    Questions stay padded: transformers' cross attention looks at the states of pads, too.
    """
    question = question[None]
    ids = [BOS, *answer[answer != PAD][1:].tolist()]
    total = 0.0
    for end in range(1, len(ids)):
        states = model.text_encoder(
            question,
            attention_mask=(question != PAD).long(),
            encoder_hidden_states=model.vision_model(image[None]).last_hidden_state,
        ).last_hidden_state
        logits = model.text_decoder(
            torch.tensor([ids[:end]]), encoder_hidden_states=states, use_cache=False
        ).logits
        total += float(logits[0, -1].double().log_softmax(-1)[ids[end]])
    return total


def by_hand(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.tensor(
            [
                [likelihood(model, image, question, answer) for answer in ANSWERS]
                for image, question in zip(given["image"], given["question"], strict=True)
            ]
        )


def test_likelihoods_are_those_of_a_loop_over_tokens() -> None:
    with torch.no_grad():
        (found,) = task().outputs(blip(), next(iter(task().batches())))
    assert found.shape == (BATCH, len(ANSWERS))
    torch.testing.assert_close(found, by_hand(blip(), batch()), rtol=1e-4, atol=1e-4)


def test_the_ranking_does_not_depend_on_how_many_are_decoded_at_a_time(monkeypatch) -> None:
    with torch.no_grad():
        (whole,) = task().outputs(blip(), next(iter(task().batches())))
        monkeypatch.setattr("vlprune.tasks.question_answering._ANSWERS", 2)
        (parts,) = task().outputs(blip(), next(iter(task().batches())))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_measure_is_the_share_whose_right_answer_is_the_likeliest() -> None:
    batches = [batch(seed) for seed in range(4)]
    likelihoods = torch.cat([by_hand(blip(), given) for given in batches])
    best = likelihoods.argmax(1)
    for given, answers in zip(batches, best.split(BATCH), strict=True):
        given["answer"] = answers
    assert task(*batches).measure(blip()) == 100
    batches[0]["answer"] = (batches[0]["answer"] + 1) % len(ANSWERS)
    assert task(*batches).measure(blip()) == 75
    values = [
        t.values(t.outputs(blip(), one), t.targets(one))
        for t in [task(*batches)]
        for one in t.batches()
    ]
    assert float(torch.cat(values).mean()) == 75


def test_a_ranking_that_forgets_the_end_of_answers_is_caught(monkeypatch) -> None:
    """A planted fault: "7" is a beginning of "7 9", and only its end tells them apart."""
    from vlprune.tasks import question_answering

    whole = question_answering.token_losses

    def without_end(logits: Tensor, ids: Tensor, pad: int) -> Tensor:
        return whole(logits, ids.masked_fill(ids == END, pad), pad)

    monkeypatch.setattr(question_answering, "token_losses", without_end)
    with torch.no_grad():
        (found,) = task().outputs(blip(), next(iter(task().batches())))
    assert not torch.allclose(found, by_hand(blip(), batch()), rtol=1e-2)


def test_loss_is_that_of_the_decoder_of_transformers() -> None:
    model, given = blip(), batch()
    labels = ANSWERS[given["answer"]].clone()
    labels[:, 0] = BOS
    losses = []
    with torch.no_grad():
        for i in range(BATCH):
            ids = labels[i][labels[i] != PAD][None]
            out = model(
                input_ids=given["question"][i][None],
                attention_mask=(given["question"][i][None] != PAD).long(),
                pixel_values=given["image"][i][None],
                labels=ids,
            )
            losses.append(float(out.loss) * (ids.shape[1] - 1))  # it divides by tokens
    one = task()
    (first,) = one.batches()
    loss = one.loss(model, first)
    assert float(loss.detach()) == pytest.approx(sum(losses) / BATCH, rel=1e-5)
    assert loss.requires_grad
    with torch.no_grad():
        each = one.losses(model, one.outputs(model, first), one.targets(first))
    assert each.tolist() == pytest.approx(losses, rel=1e-4)


def test_the_best_is_above_all_others() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [float("nan"), 0.0, 0.0]])
    assert is_best(scores, torch.tensor([1, 0, 0])).tolist() == [True, False, False]
    assert is_best(scores, torch.tensor([0, 1, 1])).tolist() == [False, False, False]


def test_example_inputs_run_all_towers() -> None:
    model = blip()
    (call,) = calls_of(task().example_inputs(model))
    reached = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: reached.add(name))
        for name, module in model.named_modules()
        if name.endswith(("self", "self_attn"))
    ]
    with torch.no_grad():
        out = run(model, call)
    for handle in handles:
        handle.remove()
    assert len(reached) == len(handles)
    assert out.loss.isfinite()


def test_tuples_are_batches_and_others_are_refused() -> None:
    pairs = [tuple(batch().values())]
    assert QuestionAnswering(pairs, ANSWERS).measure(blip()) == task().measure(blip())
    text = (
        "a batch must hold 'image', 'question', 'answer', as a dict or in this order; "
        "got ['image', 'text']."
    )
    with pytest.raises(TypeError) as caught:
        QuestionAnswering([{"image": 0, "text": 0}], ANSWERS).measure(blip())
    assert str(caught.value) == text


def test_faults_are_told() -> None:
    with pytest.raises(ValueError, match=r"answers must be token ids \[A, T\] of two candidates"):
        QuestionAnswering([batch()], ANSWERS[:1])
    with pytest.raises(ValueError, match=r"or more; got torch.float32 \[5, 4\]\."):
        QuestionAnswering([batch()], ANSWERS.float())
    with pytest.raises(TypeError, match="loader must be a list or loader that can be gone through"):
        QuestionAnswering(iter([batch()]), ANSWERS)
    with pytest.raises(ValueError, match="at least one batch; got none in QuestionAnswering"):
        QuestionAnswering([], ANSWERS).measure(blip())


def test_the_engine_measures_what_the_task_measures() -> None:
    """Heads gone one by one, with all that the engine spares, against a gate and the measure."""
    model, anatomy = dissected("BlipForQuestionAnswering")
    heads = anatomy.select(("head",))
    given = [batch(seed) for seed in range(2)]
    scores = vlprune.score(model, "mope", task(*given), anatomy=heads, measure="loss")
    name = "text_encoder.encoder.layer.1.crossattention.self:head"
    keep = {axis.name: tuple(range(axis.units)) for axis in heads.axes}
    plan = vlprune.make_plan(heads, {**keep, name: (1, 2, 3)})
    with torch.no_grad():
        losses = [task().loss(model, one) for one in task(*given).batches()]
    with vlprune.mask(model, plan) as masked, torch.no_grad():
        without = [task().loss(masked, one) for one in task(*given).batches()]
    fall = float(torch.stack(without).mean() - torch.stack(losses).mean())
    assert float(scores.values[name][0]) == pytest.approx(fall, rel=1e-3, abs=1e-5)

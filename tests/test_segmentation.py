"""Segmentation: IoU and loss by hand and against torchmetrics, ignored pixels, sizes, borders."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import dissected
from torch import Tensor, nn
from torchmetrics.functional import jaccard_index

import vlprune
from vlprune.calls import calls_of, run
from vlprune.measures import MEASURES, is_example_task
from vlprune.tasks import Segmentation
from vlprune.tasks.segmentation import Confusion


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_labels(*shape: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


class Scores(nn.Module):
    """A segmenter whose scores are its inputs; `wrapped` as transformers answers."""

    def __init__(self, wrapped: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.wrapped = wrapped

    def forward(self, image: Tensor) -> Tensor | SimpleNamespace:
        scores = image * self.weight
        return SimpleNamespace(logits=scores) if self.wrapped else scores


def scores_of(answers: Tensor, classes: int) -> Tensor:
    """Scores [B, C, H, W] whose best class is the answer [B, H, W]."""
    return F.one_hot(answers, classes).permute(0, 3, 1, 2).float()


# two images of 1 x 4 pixels, classes 0, 1, 2 (3 is in no label and no answer)
LABELS = torch.tensor([[[0, 0, 1, 1]], [[2, 2, 0, 0]]])
ANSWERS = torch.tensor([[[0, 1, 1, 1]], [[2, 0, 0, 0]]])
# class 0: 3 right of 4 labels and 4 answers -> 3/5; 1: 2 of 2, 3 -> 2/3; 2: 1 of 2, 1 -> 1/2
MEAN_IOU = 100 * (3 / 5 + 2 / 3 + 1 / 2) / 3


# -- the measure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["one batch", "two batches", "dicts"])
def test_mean_iou_by_hand_from_one_matrix_over_all_batches(form: str, wrapped: bool) -> None:
    scores = scores_of(ANSWERS, 4)
    batches = [(scores, LABELS)]
    if form != "one batch":
        batches = [(scores[:1], LABELS[:1]), (scores[1:], LABELS[1:])]
    if form == "dicts":
        batches = [{"image": image, "label": label} for image, label in batches]
    task = Segmentation(batches)
    assert task.measure(Scores(wrapped)) == pytest.approx(MEAN_IOU)
    found = task.confusion(Scores(wrapped))
    assert found.counts.tolist() == [
        [3, 1, 0, 0, 0],
        [0, 2, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert found.iou[:3].tolist() == pytest.approx([60, 200 / 3, 50])
    assert found.iou[3].isnan()
    assert found.pixel_accuracy == 75


@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_is_the_jaccard_index_of_torchmetrics(seed: int) -> None:
    scores, labels = draw(5, 4, 6, 7, seed=seed), some_labels(5, 6, 7, classes=4, seed=seed)
    task = Segmentation([(scores[:2], labels[:2]), (scores[2:], labels[2:])])
    expected = jaccard_index(scores.argmax(1), labels, task="multiclass", num_classes=4)
    assert task.measure(Scores()) == pytest.approx(100 * float(expected), rel=1e-6)


def test_a_class_that_only_answers_show_counts_as_missed() -> None:
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    answers = torch.tensor([[[0, 0, 0, 1]]])
    assert Segmentation([(scores_of(answers, 3), labels)]).measure(Scores()) == 100 * 0.75 / 2


def test_ties_and_nan_have_no_answer() -> None:
    for scores in (torch.zeros(2, 3, 1, 4), torch.full((2, 3, 1, 4), float("nan"))):
        found = Segmentation([(scores, LABELS)]).confusion(Scores())
        assert found.mean_iou == found.pixel_accuracy == 0
        assert found.counts[:, -1].tolist() == [4, 2, 2]


def test_ignored_pixels_do_not_count() -> None:
    labels = LABELS.clone()
    labels[0, 0, 1] = labels[1, 0, 1] = 255  # the two that were wrong
    task = Segmentation([(scores_of(ANSWERS, 4), labels)], ignore=255)
    assert task.measure(Scores()) == 100
    assert int(task.confusion(Scores()).counts.sum()) == 6


def test_smaller_scores_are_resized_to_the_labels() -> None:
    scores, labels = draw(2, 3, 3, 4), some_labels(2, 6, 8, classes=3)
    larger = F.interpolate(scores, (6, 8), mode="bilinear", align_corners=False)
    small, large = Segmentation([(scores, labels)]), Segmentation([(larger, labels)])
    assert small.measure(Scores()) == large.measure(Scores())
    one, other = (t.loss(Scores(), next(iter(t.batches()))).detach() for t in (small, large))
    assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_confusions_of_no_pixels_are_no_number() -> None:
    assert Confusion(counts=torch.zeros(2, 3)).iou.isnan().all()


# -- examples --------------------------------------------------------------------------------------


def test_values_are_the_mean_iou_of_every_image_alone() -> None:
    task, scores = Segmentation([]), scores_of(ANSWERS, 4)
    values = task.values((scores,), LABELS)
    # image 0: class 0 1/2, class 1 2/3; image 1: class 2 1/2, class 0 2/3
    assert values.tolist() == pytest.approx([100 * 7 / 12, 100 * 7 / 12])
    each = [Segmentation([(scores[i : i + 1], LABELS[i : i + 1])]) for i in range(2)]
    assert values.tolist() == pytest.approx([task.measure(Scores()) for task in each])
    many = task.values((scores.repeat(70, 1, 1, 1),), LABELS.repeat(70, 1, 1))
    torch.testing.assert_close(many, values.repeat(70))
    assert is_example_task(task)


def test_an_image_without_a_pixel_that_counts_is_worth_nothing() -> None:
    task = Segmentation([], ignore=9)
    labels = torch.full_like(LABELS, 9)
    labels[1] = LABELS[1]
    assert task.values((scores_of(ANSWERS, 4),), labels)[0] == 0
    losses = task.losses(Scores(), (scores_of(ANSWERS, 4),), labels)
    assert losses[0] == 0
    assert losses[1] > 0


def test_loss_is_the_mean_over_pixels_of_minus_the_log_of_the_softmax() -> None:
    scores, labels = draw(2, 3, 2, 2), some_labels(2, 2, 2, classes=3)
    labels[0, 0, 0] = 7
    task = Segmentation([], ignore=7)
    expected = []
    for b in range(2):
        terms = []
        for y in range(2):
            for x in range(2):
                e = scores[b, :, y, x].double().exp()
                if labels[b, y, x] != 7:
                    terms.append(-float((e[labels[b, y, x]] / e.sum()).log()))
        expected.append(sum(terms) / len(terms))
    losses = task.losses(Scores(), (scores,), labels)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    loss = task.loss(Scores(), (scores, labels))
    assert float(loss.detach()) == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert loss.requires_grad


@pytest.mark.parametrize("measure", list(MEASURES))
def test_every_measure_gives_a_number_per_image(measure: str) -> None:
    task = Segmentation([])
    scores, labels = draw(3, 4, 2, 2), some_labels(3, 4, 4, classes=4)
    made = MEASURES[measure](task, Scores())
    other = scores + 0.5 * draw(3, 4, 2, 2, seed=1)
    dense = made.keep((scores,), (scores,), labels)
    kept = made.keep((other,), (scores,), labels)
    if measure == "task":
        dense = (scores,)
    values = made.values([kept], [dense], [labels])
    assert values.shape == (3,)
    assert values.isfinite().all()
    if measure == "kl":
        pixel = scores[1, :, 0, 0].double(), other[1, :, 0, 0].double()
        p, q = (x.softmax(0) for x in pixel)
        one = task.logits(Scores(), (scores[1:2, :, :1, :1],))[0]
        assert one.shape == (1, 1, 4)
        single = made.keep((other[1:2, :, :1, :1],), (scores[1:2, :, :1, :1],), labels[1:2])
        assert float(single[0]) == pytest.approx(-float((p * (p / q).log()).sum()), rel=1e-6)


def test_example_inputs_are_one_image() -> None:
    model, anatomy = dissected("segmenter")
    task = Segmentation([(draw(3, 3, 32, 32), some_labels(3, 32, 32, classes=5))])
    inputs = task.example_inputs(model)
    (call,) = calls_of(inputs)
    with torch.no_grad():
        assert run(model, call).shape == (1, 5, 32, 32)
    assert vlprune.dissect(model, inputs).axes == anatomy.axes


def small_task() -> Segmentation:
    return Segmentation(
        [(draw(6, 3, 32, 32, seed=s), some_labels(6, 32, 32, classes=5, seed=s)) for s in range(2)]
    )


@pytest.mark.parametrize("copies", [1, 2])
def test_mope_prices_heads_as_one_mask_after_the_other_does(copies: int) -> None:
    model, anatomy = dissected("segmenter")
    anatomy, task = anatomy.select(("head",)), small_task()
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=("head",), copies=copies
    )

    def value() -> float:
        with torch.no_grad():
            parts = [task.values(task.outputs(model, b), b[1]) for b in task.batches()]
        return float(torch.cat(parts).mean())

    dense = value()
    for axis in anatomy.axes:
        for unit in range(axis.units):
            keep = {axis.name: tuple(u for u in range(axis.units) if u != unit)}
            with vlprune.mask(model, vlprune.make_plan(anatomy, keep)):
                expected = dense - value()
            assert scores.values[axis.name][unit] == pytest.approx(expected, abs=0.02), axis.name


@pytest.mark.parametrize("metric", ["taylor", "fisher", "activation", "reconstruction"])
def test_metrics_see_both_towers(metric: str) -> None:
    model, anatomy = dissected("segmenter")
    scores = vlprune.score(model, metric, small_task(), anatomy=anatomy)
    assert {axis.tower for axis in anatomy.axes} == {"vision", "decoder"}
    for axis in anatomy.select(("head", "ffn")).axes:
        assert len(set(scores.values[axis.name])) > 1, axis.name


# -- borders ---------------------------------------------------------------------------------------


def test_an_empty_loader_is_refused() -> None:
    text = r"loader must yield at least one batch; got none in Segmentation\."
    with pytest.raises(ValueError, match=text):
        Segmentation([]).measure(Scores())
    with pytest.raises(ValueError, match=text):
        Segmentation([]).example_inputs(Scores())


def test_a_loader_that_can_be_gone_through_once_is_refused() -> None:
    with pytest.raises(TypeError, match="loader must be a list or loader that can be gone through"):
        Segmentation(iter([(draw(1, 2, 2, 2), LABELS)]))


def test_labels_that_are_no_class_are_refused() -> None:
    batch = (scores_of(ANSWERS, 4), LABELS.masked_fill(LABELS == 2, 255))
    text = (
        "labels must lie in [0, 4), the classes that the model scores; got 255. "
        "Number them so, or tell Segmentation to ignore it."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        Segmentation([batch]).measure(Scores())
    other = (batch[0], LABELS.masked_fill(LABELS == 2, -100))  # torch would ignore it silently
    with pytest.raises(ValueError, match=r"got -100\."):
        Segmentation([]).loss(Scores(), other)


def test_a_model_that_answers_something_else_is_refused() -> None:
    class Nothing(Scores):
        def forward(self, image: Tensor) -> None:
            return None

    with pytest.raises(TypeError, match=r"Nothing gave NoneType to Segmentation\."):
        Segmentation([(scores_of(ANSWERS, 4), LABELS)]).measure(Nothing())

"""Classification: accuracy and loss by hand, zero-shot weights against the formula, borders."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import dissected
from torch import Tensor, nn

import vlprune
from vlprune.calls import calls_of, run
from vlprune.measures import is_example_task
from vlprune.tasks import Classification


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Scores(nn.Module):
    """A classifier whose scores are its inputs; `wrapped` as transformers answers."""

    def __init__(self, wrapped: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.wrapped = wrapped

    def forward(self, image: Tensor) -> Tensor | SimpleNamespace:
        scores = image * self.weight
        return SimpleNamespace(logits=scores) if self.wrapped else scores


class Towers(nn.Module):
    """A dual encoder: images are their own features, texts are looked up."""

    def __init__(self, table: Tensor, scale: float | None = None):
        super().__init__()
        self.table = nn.Parameter(table)
        if scale is not None:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def encode_image(self, image: Tensor) -> Tensor:
        return image

    def encode_text(self, text: Tensor) -> Tensor:
        return self.table[text].sum(1)


SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 3.0], [0.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 0])  # right, a tie, right, wrong


# -- supervised ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_accuracy_by_hand(form: str, wrapped: bool) -> None:
    batches = [(SCORES[:3], LABELS[:3]), (SCORES[3:], LABELS[3:])]
    if form == "dict":
        batches = [{"image": image, "label": label} for image, label in batches]
    assert Classification(batches).measure(Scores(wrapped)) == 50


def test_values_are_the_hits_and_their_mean_is_the_measure() -> None:
    task, model = Classification([(SCORES, LABELS)]), Scores()
    outputs = task.outputs(model, (SCORES, LABELS))
    values = task.values(outputs, task.targets((SCORES, LABELS)))
    assert values.tolist() == [100, 0, 100, 0]
    assert float(values.mean()) == task.measure(model)
    assert is_example_task(task)


def test_ties_count_against_and_nan_finds_nothing() -> None:
    same, nan = torch.zeros(4, 3), torch.full((4, 3), float("nan"))
    assert Classification([(same, LABELS)]).measure(Scores()) == 0
    assert Classification([(nan, LABELS)]).measure(Scores()) == 0
    one = SCORES.clone()
    one[0, 2] = float("nan")  # a score that is none beside the best one
    assert Classification([(one, LABELS)]).measure(Scores()) == 25


def test_loss_is_minus_the_log_of_the_softmax_at_the_label() -> None:
    task, model, batch = Classification([(SCORES, LABELS)]), Scores(), (SCORES, LABELS)
    shares = SCORES.double().exp() / SCORES.double().exp().sum(1, keepdim=True)
    expected = -shares[range(4), LABELS].log()
    losses = task.losses(model, task.outputs(model, batch), LABELS)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    loss = task.loss(model, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-6)
    assert loss.requires_grad


def test_logits_are_the_scores() -> None:
    task = Classification([(SCORES, LABELS)])
    assert task.logits(Scores(), (SCORES,)) == (SCORES,)


def test_measuring_keeps_the_mode_of_the_model_and_makes_no_gradient() -> None:
    model = Scores().train()
    Classification([(SCORES, LABELS)]).measure(model)
    assert model.training
    assert model.weight.grad is None


# -- zero-shot -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "scale"), [(5.0, 5.0), (None, 1 / 0.07)])
def test_zero_shot_scores_are_cosines_to_means_of_texts_of_length_one(given, scale) -> None:
    table, image = draw(12, 4), draw(6, 4, seed=1)
    prompts = torch.arange(12).reshape(3, 2, 2)  # 3 classes, 2 prompts, 2 tokens
    model = Towers(table, given)
    task = Classification([(image, torch.zeros(6, dtype=torch.int64))], prompts)
    with torch.no_grad():
        (scores,) = task.outputs(model, (image, torch.zeros(6, dtype=torch.int64)))
    for b in range(6):
        for c in range(3):
            texts = [(table[4 * c + 2 * p] + table[4 * c + 2 * p + 1]).double() for p in range(2)]
            mean = sum(text / text.norm() for text in texts) / 2
            query = image[b].double()
            expected = scale * float(query @ mean / (query.norm() * mean.norm()))
            assert float(scores[b, c]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_every_text_of_a_class_counts_alike_however_long_its_features_are() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 100.0], [-1.0, 0.0]])
    task = Classification([], torch.tensor([[[0], [1]], [[2], [2]]]))
    classes = task.class_features(Towers(table))
    torch.testing.assert_close(classes, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))


def test_zero_shot_accuracy_by_hand() -> None:
    image = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
    batch = (image, torch.tensor([0, 1, 1]))
    prompts = torch.tensor([[[0]], [[1]]])
    assert Classification([batch], prompts).measure(Towers(torch.eye(2))) == pytest.approx(200 / 3)


def test_zero_shot_of_open_clip_is_what_its_own_similarities_say() -> None:
    model, _ = dissected("open_clip")
    image, prompts = draw(5, 3, 32, 32), torch.randint(1, 50, (4, 1, 12))
    task = Classification([(image, torch.arange(4).repeat(2)[:5])], prompts)
    with torch.no_grad():
        (scores,) = task.outputs(model, (image, torch.zeros(5)))
        images, texts, scale = model(image, prompts[:, 0])
    torch.testing.assert_close(scores, scale * images @ texts.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["open_clip", "hf_clip"])
def test_example_inputs_feed_both_towers(name: str) -> None:
    model, anatomy = dissected(name)
    ids = torch.randint(1, 50, (4, 2, 12))
    ids[..., -1] = 59 if name == "hf_clip" else 49
    task = Classification([(draw(3, 3, 32, 32), torch.zeros(3))], ids)
    inputs = task.example_inputs(model)
    (call,) = calls_of(inputs)
    with torch.no_grad():
        run(model, call)
    found = vlprune.dissect(model, inputs)
    assert {axis.tower for axis in found.axes} == {"vision", "text"}
    assert found.axes == anatomy.axes


def test_example_inputs_of_a_classifier_are_one_image() -> None:
    task = Classification([(SCORES, LABELS)])
    (call,) = calls_of(task.example_inputs(Scores()))
    torch.testing.assert_close(call.args, (SCORES[:1],))


# -- with what prunes ------------------------------------------------------------------------------


def falls_by_hand(
    model: nn.Module, task: Classification, anatomy: vlprune.Anatomy, measure: str
) -> dict[str, list[float]]:
    """What the mean value loses without each unit, one mask after the other."""

    def value() -> float:
        if measure == "task":
            return task.measure(model)
        with torch.no_grad():
            losses = [task.losses(model, task.outputs(model, b), b[1]) for b in task.batches()]
        return -float(torch.cat(losses).double().mean())

    dense, found = value(), {}
    for axis in anatomy.axes:
        found[axis.name] = []
        for unit in range(axis.units):
            keep = {axis.name: tuple(u for u in range(axis.units) if u != unit)}
            with vlprune.mask(model, vlprune.make_plan(anatomy, keep)):
                found[axis.name].append(dense - value())
    return found


def zero_shot_task() -> Classification:
    ids = torch.randint(1, 49, (4, 3, 12), generator=torch.Generator().manual_seed(1))
    ids[..., -1] = 49
    labels = torch.arange(14) % 4
    batches = [(draw(7, 3, 32, 32, seed=s), labels[7 * s : 7 * s + 7]) for s in range(2)]
    return Classification(batches, ids)


def supervised_task() -> Classification:
    labels = torch.arange(16) % 10
    return Classification(
        [(draw(8, 3, 32, 32, seed=s), labels[8 * s : 8 * s + 8]) for s in range(2)]
    )


@pytest.mark.parametrize("measure", ["task", "loss"])
@pytest.mark.parametrize(
    ("name", "make"), [("deit", supervised_task), ("open_clip", zero_shot_task)]
)
@pytest.mark.parametrize("copies", [1, 2])
def test_mope_prices_heads_as_one_mask_after_the_other_does(name, make, measure, copies) -> None:
    model, anatomy = dissected(name)
    anatomy, task = anatomy.select(("head",)), make()
    scores = vlprune.score(
        model, "mope", task, anatomy=anatomy, strategies=("head",), measure=measure, copies=copies
    )
    expected = falls_by_hand(model, task, anatomy, measure)
    for axis, row in expected.items():
        assert scores.values[axis] == pytest.approx(row, rel=1e-3, abs=1e-5), axis


@pytest.mark.parametrize("metric", ["taylor", "fisher", "activation", "reconstruction"])
@pytest.mark.parametrize(
    ("name", "make"), [("deit", supervised_task), ("open_clip", zero_shot_task)]
)
def test_metrics_see_every_tower(name: str, make, metric: str) -> None:
    model, anatomy = dissected(name)
    scores = vlprune.score(model, metric, make(), anatomy=anatomy)
    for axis in anatomy.select(("head", "ffn")).axes:
        assert len(set(scores.values[axis.name])) > 1, axis.name


@pytest.mark.parametrize(
    ("name", "make"), [("deit", supervised_task), ("open_clip", zero_shot_task)]
)
def test_repair_brings_scores_closer(name: str, make) -> None:
    model, anatomy = dissected(name)
    task = make()
    plan = vlprune.plan(
        vlprune.score(model, "magnitude", anatomy=anatomy), {"prunable_params": 0.7}, "uniform"
    )
    batch = next(iter(task.batches()))
    errors = []
    for small in (vlprune.prune(model, plan), vlprune.repair(model, plan, task, anatomy=anatomy)):
        with torch.no_grad():
            pair = [task.outputs(m, batch)[0] for m in (small, model)]
        errors.append(float(F.mse_loss(*pair)))
    assert errors[1] < errors[0]


# -- borders ---------------------------------------------------------------------------------------


def test_an_empty_loader_is_refused() -> None:
    text = r"loader must yield at least one batch; got none in Classification\."
    with pytest.raises(ValueError, match=text):
        Classification([]).measure(Scores())
    with pytest.raises(ValueError, match=text):
        Classification([]).example_inputs(Scores())


def test_a_loader_that_can_be_gone_through_once_is_refused() -> None:
    with pytest.raises(TypeError, match="loader must be a list or loader that can be gone through"):
        Classification(iter([(SCORES, LABELS)]))


def test_labels_that_are_no_class_are_refused() -> None:
    text = r"labels must lie in \[0, 3\), the classes that the model scores; got 7\."
    batch = (SCORES, torch.tensor([0, 7, 1, 1]))
    with pytest.raises(ValueError, match=text):
        Classification([batch]).measure(Scores())
    with pytest.raises(ValueError, match=text):
        Classification([batch]).loss(Scores(), batch)


def test_prompts_of_another_shape_are_refused() -> None:
    text = (
        "prompts must be token ids [classes, prompts, T]; got shape (3, 12). "
        "For one prompt a class give prompts[:, None]."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        Classification([], torch.zeros(3, 12, dtype=torch.int64))


def test_a_model_that_encodes_no_texts_is_refused() -> None:
    task = Classification([(SCORES, LABELS)], torch.zeros(3, 1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="must have encode_image and encode_text; Scores has not"):
        task.measure(Scores())


def test_a_model_that_answers_something_else_is_refused() -> None:
    class Pair(Scores):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return image, image

    with pytest.raises(TypeError) as caught:
        Classification([(SCORES, LABELS)]).measure(Pair())
    assert str(caught.value) == (
        "model must answer an image with scores or with .logits; Pair gave tuple to "
        "Classification. Wrap it in a module that does."
    )

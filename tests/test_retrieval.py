"""Retrieval and tasks from callables: recall and loss against independent references."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import dissected
from torch import Tensor, nn
from torchmetrics.retrieval import RetrievalHitRate

import vlprune
from vlprune.calls import calls_of, run
from vlprune.metrics.mope import Mope
from vlprune.pruner import record_of
from vlprune.tasks import CallableTask, Retrieval
from vlprune.tasks.retrieval import encode_pair, recall


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def different(count: int) -> Tensor:
    """Token ids of captions that all differ."""
    return torch.arange(count)[:, None].expand(-1, 3)


def hit_rate(similarity: Tensor, k: int) -> float:
    count = len(similarity)
    metric = RetrievalHitRate(top_k=k)
    queries = torch.arange(count)[:, None].expand(count, count)
    metric.update(similarity.flatten(), torch.eye(count).bool().flatten(), queries.flatten())
    return 100 * float(metric.compute())


class Embeddings(nn.Module):
    """A dual encoder whose features are its inputs."""

    def __init__(self, temperature: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        if temperature is not None:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def encode_image(self, image: Tensor) -> Tensor:
        return image * self.weight

    def encode_text(self, text: Tensor) -> Tensor:
        return text * self.weight


# -- recall ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_the_hit_rate_of_torchmetrics(seed: int) -> None:
    similarity = draw(30, 30, seed=seed) + 1.5 * torch.eye(30)
    found = recall(similarity, different(30), ks=(1, 3, 10))
    for k in (1, 3, 10):
        assert found.text[k] == pytest.approx(hit_rate(similarity, k))
        assert found.image[k] == pytest.approx(hit_rate(similarity.T, k))
    assert found.text != found.image
    six = [*found.text.values(), *found.image.values()]
    assert found.mean == pytest.approx(sum(six) / 6)
    assert 10 < found.text[1] < found.text[10] < 100


def test_recall_of_a_hand_made_case() -> None:
    # image 0 finds its text first; image 1 second, after text 0; image 2 last
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.3], [0.7, 0.6, 0.4]])
    found = recall(similarity, different(3), ks=(1, 2, 3))
    assert found.text == pytest.approx({1: 100 / 3, 2: 200 / 3, 3: 100})
    # every text by column: 0 first, 1 second, 2 first
    assert found.image == pytest.approx({1: 200 / 3, 2: 100, 3: 100})


def test_ties_count_against() -> None:
    found = recall(torch.ones(12, 12), different(12))
    assert found.text == found.image == {1: 0, 5: 0, 10: 0}
    few = recall(torch.ones(5, 5), different(5))
    assert few.text == {1: 0, 5: 100, 10: 100}  # among five, the fifth is surely found


def test_images_of_equal_captions_are_all_correct() -> None:
    captions = torch.tensor([[1, 2], [1, 2], [3, 4]])
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.0, 0.0, 1.0]])
    assert recall(similarity, captions, ks=(1,)).mean == 100
    assert recall(similarity, different(3), ks=(1,)).text[1] == pytest.approx(100 / 3)


def test_nan_features_find_nothing() -> None:
    assert recall(torch.full((4, 4), float("nan")), different(4)).mean == 0
    one = torch.eye(4)
    one[2] = float("nan")  # one image: its text is not found either, the others are
    found = recall(one, different(4), ks=(1,))
    assert found.text[1] == found.image[1] == 75


# -- the task --------------------------------------------------------------------------------------


def test_measure_is_the_recall_of_normalised_features_over_all_batches() -> None:
    image, text = draw(24, 8), draw(24, 8, seed=1) + 0.7 * draw(24, 8)
    pairs = [(image[i : i + 5], text[i : i + 5]) for i in range(0, 24, 5)]
    similarity = F.normalize(image) @ F.normalize(text).T
    expected = [hit_rate(s, k) for s in (similarity, similarity.T) for k in (1, 2)]
    assert Retrieval(pairs, ks=(1, 2)).measure(Embeddings()) == pytest.approx(sum(expected) / 4)
    named = [{"image": i, "text": t} for i, t in pairs]
    assert Retrieval(named, ks=(1, 2)).measure(Embeddings()) == pytest.approx(sum(expected) / 4)


@pytest.mark.parametrize(("given", "temperature"), [(0.5, 0.5), (None, 0.07)])
def test_loss_is_the_symmetric_info_nce_at_the_temperature_of_the_model(given, temperature) -> None:
    image, text = draw(6, 4), draw(6, 4, seed=1)
    cosine = torch.tensor(
        [[float(i @ t / (i.norm() * t.norm())) for t in text.double()] for i in image.double()]
    )
    e = (cosine.double() / temperature).exp()
    rows = -(e.diagonal() / e.sum(1)).log().mean()
    columns = -(e.diagonal() / e.sum(0)).log().mean()
    loss = Retrieval([(image, text)]).loss(Embeddings(given), (image, text))
    assert float(loss.detach()) == pytest.approx(float(rows + columns) / 2, rel=1e-5)
    assert loss.requires_grad


def test_a_perfect_match_scores_all_and_losses_little() -> None:
    image = torch.eye(12)
    task = Retrieval([(image, image)])
    assert task.measure(Embeddings()) == 100
    assert float(task.loss(Embeddings(0.01), (image, image)).detach()) < 1e-6


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loader must yield at least one batch; got none"):
        Retrieval([]).measure(Embeddings())
    with pytest.raises(ValueError, match=r"loader must yield at least one batch; got none"):
        Retrieval([]).example_inputs(nn.Identity())


def test_a_loader_that_can_be_gone_through_once_is_refused() -> None:
    pairs = [(draw(2, 4), draw(2, 4))] * 2
    with pytest.raises(TypeError, match=r"gone through many times; got an\s+iterator generator"):
        Retrieval(pair for pair in pairs)


def test_measuring_keeps_the_mode_of_the_model_and_makes_no_gradient() -> None:
    model = Embeddings().train()
    Retrieval([(draw(4, 3), draw(4, 3))]).measure(model)
    assert model.training
    assert model.weight.grad is None


# -- real models -----------------------------------------------------------------------------------


def test_encode_pair_gives_the_features_of_open_clip() -> None:
    model, _ = dissected("open_clip")
    image, text = draw(2, 3, 32, 32), torch.randint(1, 50, (2, 12))
    with torch.no_grad():
        features = encode_pair(model, image, text)
        expected = model(image, text)[:2]
    for got, want in zip(features, expected, strict=True):
        assert got.shape == (2, 32)
        torch.testing.assert_close(F.normalize(got), want)


def hf_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 59, (3, 16), generator=generator)
    ids[:, -1] = 59  # CLIP pools at the end token
    return draw(3, 3, 32, 32), ids


def test_encode_pair_gives_the_features_of_transformers_clip() -> None:
    model, _ = dissected("hf_clip")
    image, text = hf_batch()
    with torch.no_grad():
        features = encode_pair(model, image, text)
        out = model(input_ids=text, pixel_values=image)
    for got, want in zip(features, (out.image_embeds, out.text_embeds), strict=True):
        assert got.shape == (3, 24)
        torch.testing.assert_close(F.normalize(got), want)


def test_encode_pair_refuses_other_models() -> None:
    with pytest.raises(TypeError, match=r"must have encode_image and encode_text; Linear has not"):
        encode_pair(nn.Linear(2, 2), draw(1, 2), draw(1, 2))


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_example_inputs_are_one_example_of_the_first_batch(form: str) -> None:
    model, _ = dissected("open_clip")
    image, text = draw(4, 3, 32, 32), torch.randint(1, 50, (4, 12))
    batch = (image, text) if form == "tuple" else {"image": image, "text": text}
    inputs = Retrieval([batch]).example_inputs(nn.Identity())
    (call,) = calls_of(inputs)
    torch.testing.assert_close(call.args, (image[:1], text[:1]))
    with torch.no_grad():
        assert run(model, call)[0].shape == (1, 32)


def test_retrieval_scores_transformers_clip() -> None:
    model, _ = dissected("hf_clip")
    scores = vlprune.score(model, "taylor", Retrieval([hf_batch()]))
    assert sum(sum(row) for row in scores.values.values()) > 0


# -- BLIP, which also looks at picture and text together -------------------------------------------


def blip_batch(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (size, 8), generator=generator)
    ids[0, 5:] = 0  # padding
    return draw(size, 3, 32, 32, seed=seed), ids


@torch.no_grad()
def matching_logits(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    mask = (text != 0).long()
    return model(input_ids=text, pixel_values=image, attention_mask=mask).itm_score


@torch.no_grad()
def test_similarities_of_blip_are_those_of_its_forward() -> None:
    model, _ = dissected("BlipForImageTextRetrieval")
    image, text = blip_batch()
    images, texts = Retrieval([(image, text)]).outputs(model, (image, text))
    mask = (text != 0).long()
    own = model(
        input_ids=text, pixel_values=image, attention_mask=mask, use_itm_head=False
    ).itm_score
    torch.testing.assert_close(images @ texts.T, own, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_matching_adds_the_loss_of_the_pair_and_its_hardest_negatives() -> None:
    model, _ = dissected("BlipForImageTextRetrieval")
    image, text = blip_batch()
    text[1] = text[2]  # equal captions are no negatives
    one, both = Retrieval([(image, text)]), Retrieval([(image, text)], matching=True)
    images, texts = one.outputs(model, (image, text))
    similarity = images @ texts.T
    losses = []
    for i in range(6):
        wrong = [j for j in range(6) if not torch.equal(text[i], text[j])]
        worst = max(wrong, key=lambda j: float(similarity[i, j]))
        pairs = [(i, i, 1), (i, worst, 0)]
        pairs.append((max(wrong, key=lambda j: float(similarity[j, i])), i, 0))
        losses += [
            -matching_logits(model, image[a][None], text[b][None]).log_softmax(-1)[0, label]
            for a, b, label in pairs
        ]
    expected = one.loss(model, (image, text)) + torch.stack(losses).mean()
    torch.testing.assert_close(both.loss(model, (image, text)), expected, rtol=1e-4, atol=1e-5)
    outputs = both.outputs(model, (image, text))
    assert [tuple(t.shape) for t in outputs] == [(6, 24), (6, 24), (6, 3, 2)]
    assert [tuple(t.shape) for t in both.logits(model, outputs)] == [(6, 6), (6, 6)] + [(6, 2)] * 3


@torch.no_grad()
@pytest.mark.parametrize("top", [2, 6])
def test_the_first_few_are_ranked_again_by_the_matching_head(top: int) -> None:
    model, _ = dissected("BlipForImageTextRetrieval")
    image, text = blip_batch()
    batches = [(image[:4], text[:4]), (image[4:], text[4:])]
    images, texts = Retrieval(batches).outputs(model, (image, text))
    similarity = images @ texts.T
    odds = torch.empty(6, 6)
    for i in range(6):
        for j in range(6):
            no, yes = matching_logits(model, image[i][None], text[j][None])[0]
            odds[i, j] = yes - no + similarity[i, j]
    hits = []
    for first, again in ((similarity, odds), (similarity.T, odds.T)):
        for query in range(6):
            taken = first[query].argsort(descending=True)[:top].tolist()
            ranked = sorted(taken, key=lambda j: -float(again[query, j]))
            hits += [query in ranked[:k] for k in (1, 2)]
    task = Retrieval(batches, ks=(1, 2), matching=True, top=top)
    assert task.measure(model) == pytest.approx(100 * sum(hits) / len(hits))


def test_matching_is_measured_unit_by_unit_and_repaired_through_both_heads() -> None:
    model, anatomy = dissected("BlipForImageTextRetrieval")
    batches = [blip_batch(seed=seed) for seed in range(2)]
    task = Retrieval(batches, ks=(1, 2), matching=True)
    heads = anatomy.select(("head",))
    cross = [a for a in heads.axes if a.tower == "fusion"]
    assert len(cross) == 2
    some = dataclasses.replace(anatomy, axes=(cross[0],))
    scores = vlprune.score(model, "mope", task, anatomy=some)
    keep = {cross[0].name: (1, 2, 3)}
    before = task.measure(model)
    with vlprune.mask(model, vlprune.make_plan(some, keep)) as masked:
        after = task.measure(masked)
    assert float(scores.values[cross[0].name][0]) == pytest.approx(before - after)
    assert before != after
    small = vlprune.repair(model, vlprune.make_plan(some, keep), task)
    assert any("crossattention" in name for name in record_of(small).repaired)
    assert len(calls_of(task.example_inputs(model))) == 2


@pytest.mark.parametrize("measure", ["loss", "kl"])
def test_matching_batches_are_ablated_exactly_though_examples_mix(measure: str) -> None:
    model, anatomy = dissected("BlipForImageTextRetrieval")
    # batches whose hard negatives are the same under noise on a block, and others without a head
    task = Retrieval([blip_batch(3, seed) for seed in (6, 9, 11)], ks=(1, 2), matching=True)
    some = anatomy.select(("head", "layer"))

    def loss() -> float:
        losses = [task.losses(model, task.outputs(model, b), b[1]) for b in task.batches()]
        return -float(torch.cat(losses).double().mean())

    def divergence() -> float:
        parts = []
        for batch, before in zip(task.batches(), dense, strict=True):
            for one, two in zip(
                before, task.logits(model, task.outputs(model, batch)), strict=True
            ):
                p, q = one.double().softmax(-1), two.double().softmax(-1)
                parts.append(float((p * (p / q).log()).sum(-1).mean()))
        return -sum(parts) / len(parts)

    kinds = ("head", "layer")
    with torch.no_grad():
        dense = [task.logits(model, task.outputs(model, batch)) for batch in task.batches()]
        meter = Mope(model, some, strategies=kinds)
        meter.update(loss if measure == "loss" else divergence)
    expected = meter.compute()
    found = vlprune.score(
        model, "mope", task, anatomy=some, strategies=kinds, measure=measure, copies=4
    )
    for name, row in expected.values.items():
        assert found.values[name] == pytest.approx(row, rel=1e-4, abs=2e-6), name


def test_a_measure_that_a_task_cannot_give_is_refused() -> None:
    model, anatomy = dissected("open_clip")
    meter = Mope(model, anatomy.select(("layer",)), strategies=("layer",), measure="kl")
    with pytest.raises(TypeError, match=r"measure must be 'task' .* got 'kl' with function"):
        meter.update(lambda: 0.0)


def test_too_few_to_rank_again_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top must be at least the largest k .* got 5 with ks"):
        Retrieval([blip_batch()], matching=True, top=5)


# -- tasks from callables --------------------------------------------------------------------------


def mean_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (batch * model.weight).mean()


def test_the_default_measure_is_minus_the_mean_loss() -> None:
    task = CallableTask([torch.tensor([1.0, 3.0]), torch.tensor([6.0])], mean_of)
    model = Embeddings().train()
    assert task.measure(model) == -4  # (2 + 6) / 2
    assert model.training
    assert task.loss(model, torch.tensor([5.0])).requires_grad
    assert [len(batch) for batch in task.batches()] == [2, 1]
    assert task.example_inputs(nn.Identity()) is None


def test_a_measure_of_ones_own_takes_its_place() -> None:
    seen = []
    task = CallableTask([draw(2)], mean_of, measure=lambda m: seen.append(m.training) or 7)
    assert task.measure(Embeddings().train()) == 7.0
    assert seen == [False]


def test_an_iterator_of_batches_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        CallableTask(iter([draw(2)]), mean_of)
    assert str(caught.value) == (
        "batches must be a list or loader that can be gone through many times; got an iterator "
        "list_iterator. Wrap it in list()."
    )


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches must hold at least one batch; got none"):
        CallableTask([], mean_of).measure(Embeddings())

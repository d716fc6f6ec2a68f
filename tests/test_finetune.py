"""Losses are their formulas; one loop trains, resumes bit-equal, and shares batches over ranks."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from conftest import dissected, on_two_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vlprune.copies import clone
from vlprune.recover.distil import distil, layer_pairs, teacher_of
from vlprune.recover.finetune import Training, fit
from vlprune.recover.losses import (
    AffinityMimicking,
    AttentionMSE,
    FeatureMSE,
    InfoNCE,
    LogitKL,
    SoftCrossEntropy,
)
from vlprune.recover.teacher import Teacher
from vlprune.tasks import Retrieval

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=DRAW)
Y = torch.randn(48, 3, generator=DRAW)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 48, 8)]


def small(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 3))


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_losses_are_their_formulas() -> None:
    images, texts, other = (F.normalize(torch.randn(5, 4, generator=DRAW), dim=-1) for _ in "abc")
    scores = 7.0 * images @ texts.T
    expected = 0.0
    for i in range(5):
        expected -= float(scores[i, i] - scores[i].exp().sum().log()) / 10
        expected -= float(scores[i, i] - scores[:, i].exp().sum().log()) / 10
    assert float(InfoNCE()(images, texts, 7.0)) == pytest.approx(expected, rel=1e-5)

    student, teacher = torch.randn(5, 3, generator=DRAW), torch.randn(5, 3, generator=DRAW)
    wanted = teacher.exp() / teacher.exp().sum(1, keepdim=True)
    found = (student.exp() / student.exp().sum(1, keepdim=True)).log()
    cross = float(-(wanted * found).sum(1).mean())
    assert float(SoftCrossEntropy()([student], [teacher])) == pytest.approx(cross, rel=1e-5)
    twice = SoftCrossEntropy()([student, student.T], [teacher, teacher.T])
    assert float(twice) != pytest.approx(cross)

    divergence = float((wanted * (wanted.log() - found)).sum(1).mean())
    assert float(LogitKL()(student, teacher)) == pytest.approx(divergence, rel=1e-5)
    assert float(LogitKL(2.0)(2 * student, 2 * teacher)) == pytest.approx(4 * divergence, rel=1e-4)
    deep = (student.reshape(5, 1, 3), teacher.reshape(5, 1, 3))
    assert float(LogitKL()(*deep)) == pytest.approx(divergence, rel=1e-5)

    s, t = 50 * images @ texts.T, 50 * images @ other.T
    rows = [-(b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in ((s, t), (s.T, t.T))]
    found = AffinityMimicking()((images, texts), (images, other))
    assert float(found) == pytest.approx(float(sum(rows)) / 2, rel=1e-5)

    assert float(FeatureMSE()([images], [texts])) == pytest.approx(
        float(((images - texts) ** 2).mean()), rel=1e-6
    )
    assert float(FeatureMSE()([], [])) == 0

    whole, part = torch.randn(2, 4, 3, 3, generator=DRAW), torch.randn(2, 2, 3, 3, generator=DRAW)
    expected = float(((part - whole[:, [1, 3]]) ** 2).mean())
    assert float(AttentionMSE()([part], [whole], [(1, 3)])) == pytest.approx(expected, rel=1e-6)
    causal = torch.full((3, 3), float("-inf")).triu(1)
    masked = float(AttentionMSE()([part + causal], [whole + causal], [(1, 3)]))
    seen = (causal == 0).expand(2, 2, 3, 3)
    difference = ((part - whole[:, [1, 3]]) ** 2)[seen].sum() / part.numel()
    assert masked == pytest.approx(float(difference), rel=1e-6)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        LogitKL(0)


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)
    training = Training(steps=14, lr=1e-2, accumulate=2)
    straight = weights(fit(small(0.2), mse, loader, training))
    losses: dict[int, float] = {}

    def stop(step: int, loss: float) -> None:
        losses[step] = loss
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(0.2), mse, loader, training, folder=tmp_path, save_every=4, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]
    again: dict[int, float] = {}
    resumed = small(0.2)
    fit(resumed, mse, loader, training, folder=tmp_path, progress=again.__setitem__)
    assert list(again) == [9, 10, 11, 12, 13, 14]
    assert again[9] == losses[9]
    assert torch.equal(weights(resumed), straight)
    fresh = Training(steps=14, lr=1e-2, accumulate=2, seed=1)
    assert not torch.equal(weights(fit(small(0.2), mse, loader, fresh)), straight)
    done: list[int] = []
    fit(small(), mse, loader, training, folder=tmp_path, progress=lambda n, _: done.append(n))
    assert done == []


def test_accumulated_batches_are_one_large_batch() -> None:
    large = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]
    one = fit(small(), mse, large, Training(steps=9, lr=1e-2))
    two = fit(small(), mse, BATCHES, Training(steps=9, lr=1e-2, accumulate=2))
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights(one), weights(small()))


def test_rates_rise_and_fall() -> None:
    cosine, linear = (Training(steps=20, schedule=name) for name in ("cosine", "linear"))
    assert [cosine.rate(s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine.rate(11) == pytest.approx(0.5)
    assert linear.rate(11) == pytest.approx(0.5)
    assert cosine.rate(19) < linear.rate(19) < 0.06
    assert Training(steps=20, schedule="constant").rate(19) == 1
    with pytest.raises(ValueError, match="at least 1"):
        Training(steps=0)


def test_bfloat16_and_checkpointed_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        answer = model(batch[0])
        seen.append(answer.dtype)
        return F.mse_loss(answer.float(), batch[1])

    fit(small(), loss, BATCHES, Training(steps=2, precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    images, texts = torch.randn(8, 3, 32, 32, generator=DRAW), torch.randint(1, 49, (8, 12))
    task = Retrieval([(images, texts)])
    plain, spared = zoo.make("open_clip"), zoo.make("open_clip")
    fit(plain, task.loss, [(images, texts)], Training(steps=3, lr=1e-3))
    fit(spared, task.loss, [(images, texts)], Training(steps=3, lr=1e-3, checkpointing=True))
    torch.testing.assert_close(weights(plain), weights(spared), rtol=1e-4, atol=1e-5)
    assert not spared.visual.transformer.grad_checkpointing
    with pytest.raises(ValueError, match="checkpointing must be offered"):
        fit(small(), mse, BATCHES, Training(steps=1, checkpointing=True))
    with pytest.raises(ValueError, match="batches must not be empty"):
        fit(small(), mse, [], Training(steps=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"vlprune\[tensorboard\]"):
        fit(small(), mse, BATCHES, Training(steps=1), log="runs")


RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_finetune import BATCHES, Training, fit, mse, small, weights
import torch.distributed as dist
model = fit(small(), mse, BATCHES, Training(steps=9, lr=1e-2))
torch.save(weights(model), f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_train_as_one_that_accumulates(tmp_path: Path) -> None:
    on_two_ranks(RANKS, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, two)
    alone = fit(small(), mse, BATCHES, Training(steps=9, lr=1e-2, accumulate=2))
    torch.testing.assert_close(one, weights(alone), rtol=1e-4, atol=1e-5)


def test_a_teacher_is_asked_once_a_batch(tmp_path: Path) -> None:
    calls: list[int] = []

    def answer(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        return {"out": model(batch)}

    model = small()
    expected = [model(X[:8]), model(X[8:16])]
    for folder in (None, tmp_path):
        calls.clear()
        teacher = Teacher(model, answer, folder=folder)
        for _ in range(2):
            assert torch.equal(teacher(X[:8])["out"], expected[0])
            assert torch.equal(teacher(X[8:16])["out"], expected[1])
        assert len(calls) == 2
    again = Teacher(small(), answer, folder=tmp_path)  # another process, the same weights
    again(X[:8])
    assert len(calls) == 2
    other = small()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    Teacher(other, answer, folder=tmp_path)(X[:8])
    assert len(calls) == 3
    small_one = Teacher(model, answer, limit=8 * 3 * 4)
    for _ in range(2):
        small_one(X[:8])
        small_one(X[8:16])
    assert len(calls) == 3 + 3
    assert small_one.bytes == 8 * 3 * 4


def test_distilling_with_a_cache_resumes_and_gives_the_same(tmp_path: Path) -> None:
    model, _ = dissected("open_clip")
    images, texts = torch.randn(16, 3, 32, 32, generator=DRAW), torch.randint(1, 49, (16, 12))
    task = Retrieval([(images[:8], texts[:8]), (images[8:], texts[8:])])
    student = clone(model)
    with torch.no_grad():
        student.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(0.5)
    one, two = clone(student), clone(student)
    distil(one, model, task, epochs=3, lr=1e-3, cache_limit=0)
    distil(two, model, task, epochs=3, lr=1e-3, cache=tmp_path / "cache", folder=tmp_path / "run")
    assert torch.equal(weights(one), weights(two))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    answers = teacher_of(model, task, layer_pairs(one, model))(next(iter(task.batches())))
    assert {"output.0", "output.1", "logits.0", "logits.1"} < set(answers)

"""The hub's verbs against a local folder and a played hub: card, picture, bit-equal model."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.hub_mixin
import pytest
import torch
from conftest import dissected, random_keep
from torch import nn

import vlprune
from vlprune.certify import certify
from vlprune.hub import HubModel, model_card, push_to_hub
from vlprune.pruner import record_of

FILES = ["README.md", "certificate.json", "config.json", "kept.png", "model.safetensors"]


def cut(seed: int = 1) -> nn.Module:
    model, anatomy = dissected("deit")
    return vlprune.prune(model, vlprune.make_plan(anatomy, random_keep(anatomy, seed, ("ffn",))))


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_mixin_saves_and_loads_a_folder(tmp_path: Path) -> None:
    small = cut()
    proof = certify(small, dissected("deit")[0])
    HubModel(small, proof).save_pretrained(tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted([*FILES, "plan.json"])
    back = HubModel.from_pretrained(tmp_path / "m")
    assert_equal(back.model, small)
    assert back.certificate == proof
    assert_equal(vlprune.from_pretrained(tmp_path / "m"), small)
    other = cut(seed=2)
    HubModel(other).save_pretrained(tmp_path / "m")  # over an old one
    assert_equal(vlprune.from_pretrained(tmp_path / "m"), other)
    assert not (tmp_path / "m" / "certificate.json").exists()


def test_the_card_tells_the_plan_and_the_claims() -> None:
    model, anatomy = dissected("deit")
    scores = vlprune.score(model, "magnitude", anatomy=anatomy)
    plan = vlprune.plan(scores, {"params": 0.6})
    small = vlprune.prune(model, plan)
    card = model_card(small, certify(small, model), "me/half")
    text = str(card)
    assert card.data.library_name == "vlprune"
    assert 'vlprune.from_pretrained("me/half")' in text
    assert f"{plan.planned.params:,} of {plan.dense.params:,} parameters" in text
    for kind in ("head", "ffn"):
        kept = [len(row.keep) for row in plan.rows if row.axis.kind == kind]
        units = sum(row.axis.units for row in plan.rows if row.axis.kind == kind)
        counts = " ".join(map(str, kept))
        assert f"| vision | {kind} | {sum(kept)} | {units} | {counts} |" in text
        assert f"vision {kind}: {sum(kept)} units planned, {sum(kept)} counted" in text
    assert "| masked = cut | proven | " in text
    assert "| cut = ONNX | not tested | " in text
    assert "(kept.png)" in text
    assert "No certificate was made" in str(model_card(small))
    assert "It is whole: nothing was removed." in str(model_card(model))


def test_what_is_pushed_is_what_is_loaded(tmp_path: Path, monkeypatch) -> None:
    hub = tmp_path / "hub"

    class FakeApi:
        def __init__(self, token: str | None = None):
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
            assert options["private"] is True
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: object) -> str:
            shutil.copytree(folder_path, hub / repo_id)
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", FakeApi)
    small = cut()
    proof = certify(small, dissected("deit")[0])
    address = push_to_hub(small, "me/half", certificate=proof, token="secret", private=True)
    assert address == "https://huggingface.co/me/half/commit/1"
    assert 'from_pretrained("me/half")' in (hub / "me" / "half" / "README.md").read_text()

    def download(repo_id: str, allow_patterns: list[str] | None = None, **_: object) -> str:
        target = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        for path in (hub / repo_id).iterdir():
            if allow_patterns is None or path.name in allow_patterns:
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("vlprune.hub.snapshot_download", download)
    loaded = vlprune.from_pretrained("me/half")
    assert_equal(loaded, small)
    assert record_of(loaded).plans == record_of(small).plans
    monkeypatch.setattr(
        huggingface_hub.hub_mixin,
        "hf_hub_download",
        lambda repo_id, filename, **_: str(hub / repo_id / filename),
    )
    assert HubModel.from_pretrained("me/half").certificate == proof


def test_a_certificate_of_another_model_is_not_pushed(tmp_path: Path) -> None:
    proof = certify(cut())
    with pytest.raises(ValueError, match="certificate must be of this model"):
        HubModel(cut(seed=2), proof).save_pretrained(tmp_path / "m")

"""Certificates: what holds is proven with its error, and every planted fault is seen."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import dissected, random_keep
from torch import nn

import vlprune
from vlprune import store
from vlprune.certificate import Certificate, hash_of_weights
from vlprune.certify import certify, verify_folder
from vlprune.copies import clone
from vlprune.errors import CheckpointError
from vlprune.pruner import attach_record, record_of

FREE = ["masked = cut", "weights = original's", "planned = achieved", "cut = reloaded"]
COSTLY = ["cut = compiled", "cut = exported", "cut = ONNX"]


def cut(name: str, kinds: tuple[str, ...] = ("head", "ffn"), seed: int = 1) -> nn.Module:
    model, anatomy = dissected(name)
    keep = random_keep(anatomy.select(kinds), seed)
    keep = {axis: units or (0,) for axis, units in keep.items()}
    return vlprune.prune(model, vlprune.make_plan(anatomy, keep))


def verdicts(certificate: Certificate) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in certificate.claims}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = cut("deit")
    proof = certify(small, dissected("deit")[0])
    return vlprune.save_pretrained(small, tmp_path_factory.mktemp("c") / "m", certificate=proof)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A certified checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def resign(folder: Path) -> None:
    """What a careful forger does: all hashes of files are made to agree again."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    config = content["vlprune"]
    config["sha256"] = {name: store._sha256(folder / name) for name in config["sha256"]}
    config["checksum"] = store._checksum(config)
    path.write_text(json.dumps(content))


# -- what holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["deit", "open_clip", pytest.param("BlipForQuestionAnswering", marks=pytest.mark.slow)]
)
def test_what_holds_is_proven_and_what_was_not_tested_is_said_so(name: str) -> None:
    certificate = certify(cut(name, ("head", "ffn", "layer")), dissected(name)[0])
    assert verdicts(certificate) == {
        **dict.fromkeys(FREE, "proven"),
        **dict.fromkeys(COSTLY, "not tested"),
    }
    assert certificate.claim("masked = cut").error <= 1e-9
    assert certificate.claim("cut = reloaded").error == 0
    assert all(axis.achieved == axis.planned for axis in certificate.axes)
    assert certificate.weights.changed == certificate.weights.repaired == 0


@pytest.mark.parametrize("name", ["deit", "open_clip"])
def test_bypassed_halves_and_macs_are_counted(name: str) -> None:
    model, anatomy = dissected(name)
    kinds = ("ffn", "layer", "sublayer")
    some = anatomy.select(kinds)
    scores = vlprune.score(model, "random", anatomy=some, strategies=kinds, seed=5)
    small = vlprune.prune(model, vlprune.plan(scores, {"params": 0.6}))
    certificate = certify(small, model)
    halves = [axis for axis in certificate.axes if axis.kind == "sublayer"]
    assert halves
    assert any(axis.achieved < axis.units for axis in halves)
    assert all(axis.achieved == axis.planned for axis in certificate.axes)
    dense, planned, achieved = certificate.macs
    assert dense == record_of(small).plans[0].dense.macs
    assert planned == achieved < dense
    block = next(path for path, m in small.named_modules() if _has_lost_a_half(m))
    half = next(n for n, m in small.get_submodule(block)._modules.items() if m is None)
    setattr(small.get_submodule(block), half, nn.Linear(2, 2))  # what was to go came back
    certificate = certify(small, model)
    assert "planned = achieved" in [claim.name for claim in certificate.failed]


def test_dimensions_of_a_fused_layer_are_told_apart() -> None:
    small = cut("deit", ("head_dim", "ffn"))
    certificate = certify(small, dissected("deit")[0])
    assert not certificate.failed
    assert {axis.name.rpartition(".")[2] for axis in certificate.axes} >= {"qk", "v"}
    assert all(axis.achieved == axis.planned for axis in certificate.axes)
    name = "blocks.1.attn.qkv"
    layer = small.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight[:-3])  # a value dimension of every head less
    again = certify(small, dissected("deit")[0])
    assert again.claim("planned = achieved").verdict == "failed"


def test_macs_that_were_not_planned_are_seen() -> None:
    model, anatomy = dissected("deit")
    scores = vlprune.score(model, "random", anatomy=anatomy, seed=2)
    small = vlprune.prune(model, vlprune.plan(scores, {"params": 0.6}))
    record = record_of(small)
    plan = record.plans[0]
    wrong = dataclasses.replace(plan.planned, macs=plan.planned.macs - 1)
    plans = (dataclasses.replace(plan, planned=wrong),)
    attach_record(small, dataclasses.replace(record, plans=plans))
    claim = certify(small, model).claim("planned = achieved")
    assert (claim.verdict, claim.error) == ("failed", 1)
    assert "multiply-accumulates were planned" in claim.note


def _has_lost_a_half(module: nn.Module) -> bool:
    return any(child is None for child in module._modules.values())


def test_without_the_original_nothing_is_claimed_of_it() -> None:
    certificate = certify(cut("deit"))
    assert verdicts(certificate)["masked = cut"] == "not tested"
    assert verdicts(certificate)["weights = original's"] == "not tested"
    assert "the original's weights are not known here" in str(certificate)
    assert certificate.dead is None
    assert "original" not in certificate.hashes


def test_it_comes_back_from_its_folder_as_it_was(folder: Path) -> None:
    found = verify_folder(folder, dissected("deit")[0])
    assert found.faults == ()
    assert found.written == found.now
    assert found.written == store.read_certificate(folder)


@pytest.mark.parametrize("limit", [0.6, 90_000])
def test_a_planned_model_comes_back_as_certified(limit: float, tmp_path: Path) -> None:
    model, anatomy = dissected("deit")
    scores = vlprune.score(model, "random", anatomy=anatomy, seed=2)
    small = vlprune.prune(model, vlprune.plan(scores, {"params": limit}, "knapsack"))
    vlprune.save_pretrained(small, tmp_path / "m", certificate=certify(small, model))
    assert verify_folder(tmp_path / "m", model).faults == ()


def test_a_model_cut_twice_is_counted_by_its_first_units() -> None:
    once = cut("deit", ("layer", "ffn"), seed=3)
    anatomy = vlprune.dissect(once)
    axis = next(axis for axis in anatomy.axes if axis.kind == "ffn")
    twice = vlprune.prune(once, vlprune.make_plan(anatomy, {axis.name: (0, 1)}))
    certificate = certify(twice, dissected("deit")[0])
    assert not certificate.failed
    row = next(row for row in certificate.axes if row.name == axis.name)
    assert (row.units, row.planned, row.achieved) == (192, 2, 2)


def test_units_without_effect_are_found_and_no_others() -> None:
    model = clone(dissected("deit")[0])
    anatomy = vlprune.dissect(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, [3, 7]] = 0  # one removed, one kept
    plan = vlprune.make_plan(anatomy, {"blocks.1.mlp:ffn": tuple(range(5, 192))})
    certificate = certify(vlprune.prune(model, plan), model)
    (dead,) = certificate.dead
    assert (dead.name, dead.removed, dead.kept) == ("blocks.1.mlp:ffn", (3,), (7,))


def test_repaired_and_trained_weights_are_told_apart_from_damaged_ones() -> None:
    dense, small = dissected("deit")[0], cut("deit")
    with torch.no_grad():
        small.head.bias.add_(1)
    assert {claim.name for claim in certify(small, dense).failed} == {FREE[0], FREE[1]}
    trained = certify(small, dense, trained=True)
    assert not trained.failed
    assert verdicts(trained)["weights = original's"] == "not tested"
    assert "of the cut, before weights were trained" in str(trained)
    record = dataclasses.replace(record_of(small), repaired=("head.bias",))
    attach_record(small, record)
    repaired = certify(small, dense)
    assert not repaired.failed
    assert (repaired.weights.repaired, repaired.weights.changed) == (1, 0)
    assert "before weights were repaired" in repaired.claim("masked = cut").note


def test_training_is_noted_and_survives_a_save(tmp_path: Path) -> None:
    from vlprune.recover.finetune import Training, fit

    small = cut("deit")
    batch = torch.randn(2, 3, 32, 32)
    fit(small, lambda model, x: model(x).square().mean(), [batch], Training(steps=1))
    back = vlprune.from_pretrained(vlprune.save_pretrained(small, tmp_path / "m"))
    assert record_of(back).trained
    certificate = certify(back, dissected("deit")[0])
    assert not certificate.failed
    assert certificate.weights.changed > 0


# -- planted faults --------------------------------------------------------------------------------


def test_a_stale_knob_is_caught() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, {"blocks.0.attn:head": (0, 2)}))
    small.blocks[0].attn.num_heads, small.blocks[0].attn.head_dim = 1, 32
    failed = {claim.name for claim in certify(small, model).failed}
    assert {"masked = cut", "cut = reloaded"} <= failed
    repaired = dataclasses.replace(record_of(small), repaired=("head.bias",))
    with torch.no_grad():
        small.head.bias.add_(1)
    attach_record(small, repaired)
    assert "masked = cut" in {claim.name for claim in certify(small, model).failed}


def test_a_wrong_order_of_heads_is_caught() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, {"blocks.0.attn:head": (0, 2)}))
    with torch.no_grad():
        weight = small.blocks[0].attn.proj.weight
        weight.copy_(torch.cat([weight[:, 16:], weight[:, :16]], dim=1))
    failed = {claim.name: claim.note for claim in certify(small, model).failed}
    assert set(failed) == {"masked = cut", "weights = original's"}
    assert "'blocks.0.attn.proj.weight' differs" in failed["weights = original's"]


def test_a_swapped_plan_in_memory_is_caught() -> None:
    model, anatomy = dissected("deit")
    small = vlprune.prune(model, vlprune.make_plan(anatomy, {"blocks.0.mlp:ffn": (0, 1)}))
    other = vlprune.make_plan(anatomy, {"blocks.0.mlp:ffn": (0, 1, 2)})
    attach_record(small, dataclasses.replace(record_of(small), plans=(other,)))
    certificate = certify(small, model)
    assert {"planned = achieved", "masked = cut"} <= {claim.name for claim in certificate.failed}
    assert "2 units, 3 planned" in certificate.claim("planned = achieved").note
    assert "3!=2" in str(certificate)


def test_one_changed_weight_in_a_folder_is_caught_though_its_hash_agrees(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["blocks.1.mlp.fc1.weight"][0, 0] += 1e-6
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match="truncated or edited"):
        verify_folder(folder)
    resign(folder)
    blind = verify_folder(folder)
    assert [fault[:7] for fault in blind.faults] == ["weights"]  # the certificate's hash
    found = verify_folder(folder, dissected("deit")[0])
    assert {claim.name for claim in found.now.failed} == {FREE[0], FREE[1]}


def test_a_swapped_plan_in_a_folder_is_caught_though_its_hash_agrees(folder: Path) -> None:
    path = folder / "plan.json"
    content = json.loads(path.read_text())
    row = next(row for row in content["plans"][0]["rows"] if row["axis"]["kind"] == "ffn")
    gone = sorted(set(range(row["axis"]["units"])) - set(row["keep"]))
    row["keep"] = sorted([*row["keep"][1:], gone[0]])  # as many, and others
    path.write_text(json.dumps(content))
    resign(folder)
    assert any("plans must be those" in fault for fault in verify_folder(folder).faults)
    found = verify_folder(folder, dissected("deit")[0])
    assert {claim.name for claim in found.now.failed} == {FREE[0], FREE[1]}


def test_a_knob_that_a_saved_plan_lost_is_caught(folder: Path) -> None:
    path = folder / "plan.json"
    content = json.loads(path.read_text())
    for row in content["plans"][0]["rows"]:
        row["axis"]["knobs"] = []
    path.write_text(json.dumps(content))
    resign(folder)
    found = verify_folder(folder, dissected("deit")[0])
    assert "masked = cut" in {claim.name for claim in found.now.failed}


def test_another_original_is_caught(folder: Path) -> None:
    other = clone(dissected("deit")[0])
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-3
    faults = " ".join(verify_folder(folder, other).faults)
    assert "original must be those that were certified" in faults


def test_a_certificate_of_another_model_is_not_saved(tmp_path: Path) -> None:
    proof = certify(cut("deit"))
    with pytest.raises(CheckpointError, match="certificate must be of this model"):
        vlprune.save_pretrained(cut("deit", seed=4), tmp_path / "m", certificate=proof)


def test_a_replaced_checkpoint_does_not_inherit_the_certificate(folder: Path) -> None:
    vlprune.save_pretrained(cut("deit", seed=4), folder, verify=False)
    assert not (folder / "certificate.json").exists()
    assert store.read_certificate(folder) is None


def test_unknown_claims_and_uncut_models_are_refused() -> None:
    with pytest.raises(ValueError, match="claims must be of compile, export, onnx; got 'speed'"):
        certify(cut("deit"), claims=["speed"])
    with pytest.raises(ValueError, match="small must carry a plan"):
        certify(dissected("deit")[0])


def test_the_hash_of_weights_sees_names_types_shapes_and_values() -> None:
    model = nn.Linear(2, 3)
    digest = hash_of_weights(model)
    assert digest == hash_of_weights(model)
    assert digest != hash_of_weights(model.double())
    assert digest != hash_of_weights(nn.Sequential(model.float()))
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert digest != hash_of_weights(model)


# -- costly claims ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "open_clip", "BlipForImageTextRetrieval"])
def test_compiled_exported_and_onnx_compute_the_same(name: str) -> None:
    claims = ["compile", "export", "onnx"]
    certificate = certify(cut(name), dissected(name)[0], claims=claims)
    assert {verdicts(certificate)[claim] for claim in COSTLY} == {"proven"}, str(certificate)


def test_what_cannot_be_compiled_is_not_tested_and_says_why(monkeypatch) -> None:
    def no_compiler(*_: object) -> float:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(sys.modules["vlprune.certify"], "compile_error", no_compiler)
    claim = certify(cut("deit"), claims=["compile"]).claim("cut = compiled")
    assert claim.verdict == "not tested"
    assert "No working C++ compiler" in claim.note


def test_a_program_that_answers_differently_fails(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["vlprune.certify"], "export_error", lambda *_: 1e-5)
    claim = certify(cut("deit"), claims=["export"]).claim("cut = exported")
    assert (claim.verdict, claim.error, claim.tolerance) == ("failed", 1e-5, 1e-6)

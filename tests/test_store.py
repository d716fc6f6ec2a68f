"""Checkpoints: bit-equal after a reload, refused when anything is wrong, never half written."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zoo
from conftest import dissected, inputs_of, random_keep
from torch import Tensor, nn

import vlprune
from vlprune import store
from vlprune.calls import calls_of, cast, run, tensors_of
from vlprune.cost import count_params
from vlprune.errors import CheckpointError
from vlprune.pruner import record_of

FILES = ["config.json", "model.safetensors", "plan.json"]


def cut(name: str, seed: int = 1) -> nn.Module:
    """The tiny model called `name`, cut unevenly in heads, neurons, layers and sub-layers."""
    model, anatomy = dissected(name)
    return vlprune.prune(model, vlprune.make_plan(anatomy, random_keep(anatomy, seed)))


def outputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    calls = [cast(call, dtype) for call in calls_of(inputs_of(model))]
    with torch.no_grad():
        return [t for call in calls for t in tensors_of(run(model, call))]


def assert_bit_equal(got: nn.Module, expected: nn.Module) -> None:
    """Equal parameters and buffers, also those that are not saved, and equal outputs."""
    for kind in ("named_parameters", "named_buffers"):
        want = dict(getattr(expected, kind)(remove_duplicate=False))
        have = dict(getattr(got, kind)(remove_duplicate=False))
        assert list(have) == list(want)
        for name, tensor in want.items():
            assert have[name].dtype == tensor.dtype, name
            assert torch.equal(have[name], tensor), name
    dtype = next(expected.parameters()).dtype
    pairs = list(zip(outputs(got, dtype), outputs(expected, dtype), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a cut deit."""
    return vlprune.save_pretrained(cut("deit"), tmp_path / "model", verify=False)


# -- what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(zoo.MAKERS))
def test_a_cut_model_comes_back_bit_equal(name: str, tmp_path: Path) -> None:
    small = cut(name)
    assert count_params(small) < count_params(dissected(name)[0])
    folder = vlprune.save_pretrained(small, tmp_path / "deep" / "model")
    assert folder == tmp_path / "deep" / "model"
    back = vlprune.from_pretrained(folder)
    assert_bit_equal(back, small)
    assert type(back) is type(small)
    assert not any(module.training for module in back.modules())
    assert record_of(back).plans == record_of(small).plans
    assert record_of(back).relative_error == record_of(small).relative_error
    assert names_in(folder) == FILES
    assert names_in(tmp_path / "deep") == ["model"]


@pytest.mark.parametrize("kind", ["head", "ffn", "layer", "sublayer"])
def test_a_model_with_nothing_left_of_a_kind_comes_back(tiny, kind: str, tmp_path: Path) -> None:
    model, anatomy = tiny
    keep = {axis.name: () for axis in anatomy.axes if axis.kind == kind}
    small = vlprune.prune(model, vlprune.make_plan(anatomy, keep), verify=False)
    folder = vlprune.save_pretrained(small, tmp_path / "model", verify=False)
    assert_bit_equal(vlprune.from_pretrained(folder), small)


@pytest.mark.parametrize("name", list(zoo.MAKERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_the_dtype_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = cut(name).to(dtype)
    vlprune.save_pretrained(small, tmp_path / "model")
    assert_bit_equal(vlprune.from_pretrained(tmp_path / "model"), small)


def test_mixed_dtypes_come_back(tmp_path: Path) -> None:
    small = cut("hf_clip")
    small.text_model.half()
    vlprune.save_pretrained(small, tmp_path / "model", verify=False)
    back = vlprune.from_pretrained(tmp_path / "model")
    dtypes = {name: tensor.dtype for name, tensor in small.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in back.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.float16, torch.float32}


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path: Path) -> None:
    small = cut("BlipForQuestionAnswering")
    vlprune.save_pretrained(small, tmp_path / "model")
    back = vlprune.from_pretrained(tmp_path / "model")

    def groups(model: nn.Module) -> set[frozenset[str]]:
        names: dict[int, set[str]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), set()).add(name)
        return {frozenset(group) for group in names.values() if len(group) > 1}

    assert groups(back) == groups(small) != set()
    assert count_params(back) == count_params(small)
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert all(len(group & set(stored)) == 1 for group in groups(small))


def test_a_model_cut_twice_comes_back_and_verifies(tmp_path: Path) -> None:
    dense, _ = dissected("hf_clip")
    once = cut("hf_clip", seed=2)
    anatomy = vlprune.dissect(once)
    twice = vlprune.prune(once, vlprune.make_plan(anatomy, random_keep(anatomy, seed=3)))
    vlprune.save_pretrained(twice, tmp_path / "model")
    back = vlprune.from_pretrained(tmp_path / "model")
    assert_bit_equal(back, twice)
    assert [plan.digest for plan in record_of(back).plans] == [
        plan.digest for plan in record_of(twice).plans
    ]
    assert len(record_of(back).plans) == 2
    assert vlprune.verify(dense, back) <= 1e-9


def test_a_model_cut_twice_verifies_against_the_one_in_between(tmp_path: Path) -> None:
    once = cut("hf_clip", seed=2)
    anatomy = vlprune.dissect(once)
    twice = vlprune.prune(once, vlprune.make_plan(anatomy, random_keep(anatomy, seed=3)))
    assert vlprune.verify(once, twice) <= 1e-9


def test_a_reloaded_model_can_be_cut_saved_and_reloaded_again(saved: Path) -> None:
    back = vlprune.from_pretrained(saved)
    anatomy = vlprune.dissect(back)
    axis = max(anatomy.axes, key=lambda axis: axis.units)
    again = vlprune.prune(back, vlprune.make_plan(anatomy, {axis.name: ()}))
    vlprune.save_pretrained(again, saved)
    assert_bit_equal(vlprune.from_pretrained(saved), again)


def test_a_whole_model_comes_back(tmp_path: Path) -> None:
    model, _ = dissected("open_clip")
    vlprune.save_pretrained(model, tmp_path / "model")
    assert_bit_equal(vlprune.from_pretrained(tmp_path / "model"), model)


def test_trained_weights_are_the_ones_that_come_back(tmp_path: Path) -> None:
    small = cut("deit")
    with torch.no_grad():
        small.head.bias.add_(1)
    vlprune.save_pretrained(small.train(), tmp_path / "model")
    assert all(module.training for module in small.modules())
    assert_bit_equal(vlprune.from_pretrained(tmp_path / "model"), small.eval())


def test_loading_twice_gives_the_same_and_draws_no_random_number(saved: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = vlprune.from_pretrained(saved), vlprune.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert_bit_equal(one, two)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


@pytest.mark.parametrize("name", ["deit", "hf_clip", "open_clip"])
def test_loading_never_unpickles(name: str, tmp_path: Path, monkeypatch) -> None:
    folder = vlprune.save_pretrained(cut(name), tmp_path / "model", verify=False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, attribute in [(torch, "load"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, attribute, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert count_params(vlprune.from_pretrained(folder)) > 0


# -- what is refused -------------------------------------------------------------------------------


def refused(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading raises with `text`, before a model is built or weights are read."""

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(store, "_build", loads)
    monkeypatch.setattr(safetensors.torch, "load_file", loads)
    with pytest.raises(CheckpointError) as caught:
        vlprune.from_pretrained(folder)
    assert text in str(caught.value)


CHANGED = "must be as it was saved; it was truncated or edited. Copy the folder again."


@pytest.mark.parametrize("length", [0, 7, 5000, -1])
def test_truncated_weights_are_refused_and_nothing_is_loaded(saved, length, monkeypatch) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(saved, f"{path} {CHANGED}", monkeypatch)


@pytest.mark.parametrize("place", [12, 0.5, -1])
def test_one_flipped_byte_in_the_weights_is_refused(saved, place, monkeypatch) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    refused(saved, f"{path} {CHANGED}", monkeypatch)


def test_an_edited_plan_is_refused(saved, monkeypatch) -> None:
    path = saved / "plan.json"
    content = json.loads(path.read_text())
    content["plans"][0]["rows"][0]["keep"] = []
    path.write_text(json.dumps(content))
    refused(saved, f"{path} {CHANGED}", monkeypatch)


def rewrite(saved: Path, change, checksum: bool = False) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    change(content["vlprune"])
    if checksum:
        content["vlprune"]["checksum"] = store._checksum(content["vlprune"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["source"]["arguments"].update(name="vit_tiny_patch16_224"),
        lambda config: config.update(ties={"a": "b"}),
        lambda config: config["sha256"].clear(),
        lambda config: config.update(checksum="0" * 64),
    ],
    ids=["source", "ties", "sha256", "checksum"],
)
def test_an_edited_config_is_refused(saved, change, monkeypatch) -> None:
    rewrite(saved, change)
    refused(saved, "must be as it was saved; its checksum does not agree.", monkeypatch)


def test_a_newer_format_is_refused_by_its_number(saved, monkeypatch) -> None:
    rewrite(saved, lambda config: config.update(format=2), checksum=True)
    refused(saved, "format 2", monkeypatch)


@pytest.mark.parametrize(
    "text", ["", '{"vlprune": {"form', "[1, 2]", '{"vlprune": {}}', "\x00\xff"]
)
def test_a_config_that_is_no_config_is_refused(saved, text: str, monkeypatch) -> None:
    (saved / "config.json").write_text(text, encoding="latin-1")
    text = "config.json must be a vlprune checkpoint's; it is something else, or truncated."
    refused(saved, text, monkeypatch)


def test_a_foreign_folder_is_refused(tmp_path, monkeypatch) -> None:
    dissected("hf_clip")[0].save_pretrained(tmp_path / "hf")
    refused(tmp_path / "hf", "must be a vlprune checkpoint's; it is something else", monkeypatch)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(saved, name: str, monkeypatch) -> None:
    (saved / name).unlink()
    refused(saved, f"{saved / name} must be there; it is not.", monkeypatch)


def test_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch) -> None:
    refused(tmp_path / "none", "none/config.json must be there; it is not.", monkeypatch)
    with pytest.raises(CheckpointError, match="no-such must be a folder; there is none"):
        vlprune.from_pretrained("no-such")


def test_a_file_in_place_of_a_folder_is_refused(saved, monkeypatch) -> None:
    refused(saved / "model.safetensors", "must be", monkeypatch)


def test_weights_of_another_cut_are_refused_by_name(saved, tmp_path) -> None:
    other = vlprune.save_pretrained(cut("deit", seed=4), tmp_path / "other", verify=False)
    shutil.copy(other / "model.safetensors", saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="must be as it was saved"):
        vlprune.from_pretrained(saved)
    digest = store._sha256(saved / "model.safetensors")
    rewrite(saved, lambda c: c["sha256"].update({"model.safetensors": digest}), checksum=True)
    with pytest.raises(CheckpointError, match=r"must fit the cut model; 'blocks\."):
        vlprune.from_pretrained(saved)


def test_a_model_of_no_family_is_not_saved(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="source must say how to build the original Linear"):
        vlprune.save_pretrained(nn.Linear(2, 2), tmp_path / "model")
    assert names_in(tmp_path) == []


def test_a_source_that_describes_another_model_is_not_saved(tmp_path) -> None:
    small = cut("deit")
    source = json.loads(json.dumps(record_of(small).source))
    source["arguments"]["arguments"]["num_classes"] = 7
    with pytest.raises(CheckpointError, match="must fit the model"):
        vlprune.save_pretrained(small, tmp_path / "model", source=source)
    assert names_in(tmp_path) == []


# -- writing ---------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"must be new, empty or a vlprune checkpoint; it"):
        vlprune.save_pretrained(cut("deit"), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert names_in(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file must be a folder; it is a file"):
        vlprune.save_pretrained(cut("deit"), tmp_path / "file")


def test_an_empty_folder_is_filled(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    assert names_in(vlprune.save_pretrained(cut("deit"), tmp_path / "model")) == FILES


def test_replacing_a_checkpoint_keeps_the_other_files_beside(saved) -> None:
    (saved / "README.md").write_text("a card")
    (saved / "plots").mkdir()
    (saved / "plots" / "kept.txt").write_text("x")
    other = cut("deit", seed=4)
    vlprune.save_pretrained(other, saved)
    assert_bit_equal(vlprune.from_pretrained(saved), other)
    assert names_in(saved) == ["README.md", *FILES, "plots"]
    assert (saved / "README.md").read_text() == "a card"
    assert (saved / "plots" / "kept.txt").read_text() == "x"
    assert names_in(saved.parent) == ["model"]


def write_half(state: object, path: Path) -> None:
    Path(path).write_bytes(b"half")
    raise OSError("disk full")


def fail_to_load(*_: object, **__: object) -> None:
    raise OSError("disk full")


CRASHES = {
    "weights": (safetensors.torch, "save_file", write_half),
    "check": (safetensors.torch, "load_file", fail_to_load),
    "copying": (shutil, "copy2", fail_to_load),
}


@pytest.mark.parametrize("moment", CRASHES)
def test_a_crash_while_saving_leaves_the_old_checkpoint(saved, moment, monkeypatch) -> None:
    (saved / "README.md").write_text("a card")
    other = cut("deit", seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(*CRASHES[moment])
        with pytest.raises(OSError, match="disk full"):
            vlprune.save_pretrained(other, saved)
    assert_bit_equal(vlprune.from_pretrained(saved), cut("deit"))
    assert names_in(saved.parent) == ["model"]
    assert names_in(saved) == ["README.md", *FILES]


@pytest.mark.parametrize("nth", [0, 1])
def test_a_rename_that_fails_leaves_the_old_checkpoint(saved, nth: int, monkeypatch) -> None:
    done = []
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        done.append(source)
        if len(done) == nth + 1:
            raise OSError("disk full")
        rename(source, target)

    other = cut("deit", seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="disk full"):
            vlprune.save_pretrained(other, saved)
    assert_bit_equal(vlprune.from_pretrained(saved), cut("deit"))
    assert names_in(saved.parent) == ["model"]


BAD_DISK = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_ablation import measured
from test_store import cut, scores_of
import vlprune
from vlprune import store
folder, other, scores = Path({folder!r}), cut("deit", seed=4), scores_of(seed=4)
if {disk!r} == "full":  # a write beyond so many bytes of a file fails
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
elif os.getuid() == 0:  # who may write anywhere
    os.setuid(65534)
for act in (
    lambda: vlprune.save_pretrained(other, folder / "model", verify=False),
    lambda: store.write_json(scores, folder / "scores.json"),
    lambda: measured(str(folder / "runs"), shard=(1, 2)),
):
    try:
        act()
    except Exception as error:  # safetensors raises its own
        print("refused", type(error).__name__, str(error).partition("\\n")[0])
    else:
        print("written")
"""


def scores_of(seed: int) -> vlprune.Scores:
    """Scores of the tiny deit by random numbers."""
    model, anatomy = dissected("deit")
    return vlprune.score(model, "random", anatomy=anatomy, seed=seed)


def bytes_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("disk", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
def test_a_full_or_read_only_disk_keeps_what_was_there(saved: Path, disk: str) -> None:
    from test_ablation import measured

    folder = saved.parent
    store.write_json(scores_of(seed=1), folder / "scores.json")
    half = measured(str(folder / "runs"), shard=(0, 2))
    before = bytes_in(folder)
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {place: place.stat().st_mode for place in [*folder.parents[:3], *places]}
    try:
        for place in modes:  # whoever looks may read, and not write
            place.chmod(0o555 if disk == "read-only" and place in places else 0o755)
        tests = str(Path(__file__).parent)
        code = BAD_DISK.format(tests=tests, folder=str(folder), disk=disk)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        for place, mode in modes.items():
            place.chmod(mode)
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["refused"] * 3, f"{said} {done.stderr}"
    after = bytes_in(folder)
    assert {path: after[path] for path in before} == before
    assert {path.parent.parent.name for path in after.keys() - before.keys()} <= {"runs"}
    assert_bit_equal(vlprune.from_pretrained(saved), cut("deit"))
    whole = measured(str(folder / "runs"))
    assert half.evaluations + whole.evaluations == whole.possible  # nothing of the half was lost


@pytest.mark.slow
def test_two_processes_write_one_store_at_once(tmp_path: Path) -> None:
    from test_ablation import measured, started

    expected = measured(str(tmp_path / "one"))
    both = [started(tmp_path / "two", shard=(i, 2), slow=0.002) for i in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    found = measured(str(tmp_path / "two"))
    assert found.evaluations == 0
    assert all(torch.equal(found.falls[r], falls) for r, falls in expected.falls.items())

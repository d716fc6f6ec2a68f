"""Cut models on disk: config.json (how to build the original), plan.json, model.safetensors.

Beside them certificate.json, if there is one: what was proven.

Loading builds the original, cuts it by the plans, and loads the weights strictly: outputs are
bit-equal to the saved model's. Never pickle. Every file is bound by its SHA-256, so a truncated,
edited or foreign folder is refused before anything is loaded; writing is atomic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vlprune.bounded import Bounded
from vlprune.calls import calls_of, cast, quiet_eval, run, tensors_of
from vlprune.certificate import Certificate, hash_of_weights
from vlprune.copies import clone
from vlprune.cutting import cut_
from vlprune.dissect import default_inputs
from vlprune.errors import CheckpointError, PlanError, UnsupportedModelError
from vlprune.plan import Plan, Scores, versions
from vlprune.pruner import Record, Repair, attach_record, check_fits, record_of, source_of
from vlprune.registry import FAMILIES
from vlprune.timetable import LatencyTable

FORMAT = 1
_ROOM = 2**30  # bytes that building an original may take in any case
_PRUNED_AT_MOST = 64  # and as so many times the weights that are left of it
_CONFIG, _PLAN, _WEIGHTS = "config.json", "plan.json", "model.safetensors"
_CERTIFICATE = "certificate.json"
_FILES = [_CONFIG, _PLAN, _WEIGHTS, _CERTIFICATE]


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    source: dict[str, Any] | None = None,
    verify: bool = True,
    certificate: Certificate | None = None,
) -> Path:
    """Save a cut (or whole) model so that `from_pretrained` gives it back bit-equal.

    Args:
        model: as `prune` returned it, trained since or not.
        folder: is created, or replaced where it holds a vlprune checkpoint.
        source: {"family": name, "arguments": ...} for `Family.build` of the original; default: what
            the model carries from `prune` or `create_model`.
        verify: load the files once before they take their place, and compare.
        certificate: of this model, to lie beside it (`certify`).

    Raises:
        CheckpointError: if the original cannot be built, the folder holds something else, or the
            files do not give the model back.
    """
    folder = Path(folder)
    record = record_of(model)
    source = source or record.source or source_of(model)
    if source is None:
        raise CheckpointError(
            f"source must say how to build the original {type(model).__name__}; no family can "
            'tell. Make the model with vlprune.create_model, or give source={"family": ..., '
            '"arguments": ...}.'
        )
    if certificate is not None and certificate.hashes["weights"] != hash_of_weights(model):
        raise CheckpointError(
            "certificate must be of this model; its weights are others. Certify it again."
        )
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        staged = Path(scratch) / "checkpoint"
        staged.mkdir()
        _write(model, dataclasses.replace(record, source=source), staged, certificate)
        if verify:
            _check_reload(model, from_pretrained(staged))
        _put_in_place(staged, folder, Path(scratch))
    return folder


def from_pretrained(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> nn.Module:
    """Load a model that `save_pretrained` wrote, in eval mode.

    Args:
        folder: a local folder, or the name of a repository on the Hugging Face hub.
        device: where to put the model; default: CPU.

    Raises:
        CheckpointError: if a file is missing, truncated, edited or foreign, or does not fit.
    """
    folder = _local(folder)
    config = _read_config(folder)
    plans = _read_plans(folder)
    room = max(_ROOM, _PRUNED_AT_MOST * (folder / _WEIGHTS).stat().st_size)
    with _named(folder / _CONFIG, "name a model that can be built"), Bounded(room):
        model = _build(config["source"])
    with _named(folder / _PLAN, "fit the model it names"):
        for plan in plans:
            check_fits(plan, model)
            cut_(model, plan.rows)
    with _named(folder / _WEIGHTS, "fit the cut model"):
        _load_weights(model, folder / _WEIGHTS, config["ties"])
    with _named(folder / _CONFIG, "say what was done"):
        record = Record(
            source=config["source"],
            plans=plans,
            relative_error=config["relative_error"],
            repaired=tuple(config.get("repaired", ())),
            repairs=tuple(Repair(**repair) for repair in config.get("repairs", ())),
            trained=config.get("trained", False),
        )
    attach_record(model, record)
    return model.to(device) if device is not None else model


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read one plan from a JSON file that `write_json` wrote.

    Raises:
        CheckpointError: if it is not one.
    """
    found: Plan = _read_json(Path(path), Plan)
    return found


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read scores from a JSON file that `write_json` wrote.

    Raises:
        CheckpointError: if it holds none.
    """
    found: Scores = _read_json(Path(path), Scores)
    return found


def read_certificate(folder: str | os.PathLike[str]) -> Certificate | None:
    """Read what was proven of a saved model; None where it has no certificate.

    Raises:
        CheckpointError: if the folder's files are not as they were saved.
    """
    folder = _local(folder)
    if _CERTIFICATE not in _read_config(folder)["sha256"]:
        return None
    found: Certificate = _read_json(folder / _CERTIFICATE, Certificate)
    return found


def read_latency(path: str | os.PathLike[str]) -> LatencyTable:
    """Read a latency table from a JSON file that `write_json` wrote.

    Raises:
        CheckpointError: if it holds none.
    """
    found: LatencyTable = _read_json(Path(path), LatencyTable)
    return found


def write_json(value: Plan | Scores | LatencyTable, path: str | os.PathLike[str]) -> None:
    """Write a plan, scores or a latency table to a JSON file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(_dump(value))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # lazy: spares `import vlprune` its start-up time

    return TypeAdapter(kind)


def _dump(value: Any) -> bytes:
    dumped: bytes = _adapter(type(value)).dump_json(value)
    return dumped


def _read_json(path: Path, kind: Any) -> Any:
    from pydantic import ValidationError  # lazy: spares `import vlprune` its start-up time

    try:
        return _adapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} must be there; it is not.") from None
    except (ValidationError, PlanError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
        where = ".".join(str(step) for step in first.get("loc", ())) or "the file"
        raise CheckpointError(
            f"{path} must hold {getattr(kind, '__name__', kind)}s of vlprune; {where}: "
            f"{first['msg']}."
        ) from error


# -- writing ---------------------------------------------------------------------------------------


def _write(model: nn.Module, record: Record, folder: Path, certificate: Certificate | None) -> None:
    state, ties = _unique_state(model)
    safetensors.torch.save_file(state, folder / _WEIGHTS)
    plans = b",".join(_dump(plan) for plan in record.plans)
    (folder / _PLAN).write_bytes(b'{"plans":[' + plans + b"]}")
    files = [_PLAN, _WEIGHTS]
    if certificate is not None:
        (folder / _CERTIFICATE).write_bytes(_dump(certificate))
        files.append(_CERTIFICATE)
    config: dict[str, Any] = {
        "format": FORMAT,
        "source": record.source,
        "ties": ties,
        "relative_error": record.relative_error,
        "repaired": record.repaired,
        "repairs": [dataclasses.asdict(repair) for repair in record.repairs],
        "trained": record.trained,
        "versions": versions(),
        "sha256": {name: _sha256(folder / name) for name in files},
    }
    config["checksum"] = _checksum(config)
    (folder / _CONFIG).write_text(json.dumps({"vlprune": config}, indent=2) + "\n")


def _unique_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict without tied copies, and the tied names -> the name that holds them."""
    first: dict[tuple[int, int, tuple[int, ...]], str] = {}
    state, ties = {}, {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        holder = first.setdefault(key, name) if tensor.numel() else name
        if holder == name:
            state[name] = tensor.detach().contiguous()
        else:
            ties[name] = holder
    return state, ties


def check_target(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless a checkpoint may be written to `folder`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} must be a folder; it is a file.")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            _read_config(folder, check_files=False)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder} must be new, empty or a vlprune checkpoint; it holds other files. "
                "Choose another folder."
            ) from error


def _put_in_place(staged: Path, folder: Path, scratch: Path) -> None:
    """Move `staged` to `folder` in one rename; other files of an old checkpoint come along."""
    if folder.is_dir():
        for other in folder.iterdir():
            if other.name not in _FILES:
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, staged / other.name)
        os.rename(folder, scratch / "replaced")
    try:
        os.rename(staged, folder)
    except OSError:
        if (scratch / "replaced").is_dir():
            os.rename(scratch / "replaced", folder)
        raise


def _check_reload(model: nn.Module, reloaded: nn.Module) -> None:
    """Raise unless `reloaded` has the weights of `model` and answers bit-equal."""
    expected, got = model.state_dict(), reloaded.state_dict()
    different = [name for name in expected if not torch.equal(expected[name].cpu(), got[name])]
    if different:
        raise CheckpointError(f"reloaded weights must be equal; {different[0]!r} differs.")
    try:
        inputs = default_inputs(reloaded, batch=2)
    except UnsupportedModelError:
        return
    if any(p.device.type != "cpu" for p in model.parameters()):
        return  # weights are equal; another device computes in another order
    model = clone(model)  # weights mapped from a file lie unaligned: kernels add in another order
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad(), quiet_eval(model), quiet_eval(reloaded):
        for call in (cast(call, dtype) for call in calls_of(inputs)):
            pairs = zip(tensors_of(run(model, call)), tensors_of(run(reloaded, call)), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                raise CheckpointError(
                    f"the reloaded {type(model).__name__} must answer bit-equal; it does not. Its "
                    "source does not describe the original fully; give source=."
                )


# -- reading ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _named(path: Path, rule: str) -> Iterator[None]:
    """Let what goes wrong name the file: files may come from anyone, and hold anything."""
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} must {rule}; {type(error).__name__}: {said}") from error


def _local(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if path.exists() or path.is_absolute() or str(folder).startswith("."):
        return path
    if str(folder).count("/") != 1:
        raise CheckpointError(f"{folder} must be a folder; there is none of that name.")
    from huggingface_hub import snapshot_download  # lazy: only for names on the hub

    try:
        return Path(snapshot_download(str(folder), allow_patterns=_FILES))
    except Exception as error:  # the hub's own and its HTTP client's have no common base
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder} must be a folder here or a repository on the hub; it is no folder, and the "
            f"hub says: {reason}"
        ) from error


def _read_config(folder: Path, check_files: bool = True) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        content = json.loads(path.read_text())
        config = content["vlprune"]
        version, complete = config["format"], config["checksum"] == _checksum(config)
    except OSError:
        raise CheckpointError(f"{path} must be there; it is not.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{path} must be a vlprune checkpoint's; it is something else, or truncated."
        ) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} must be of format {FORMAT}; got format {version}. Use another version of "
            "vlprune."
        )
    if not complete:
        raise CheckpointError(f"{path} must be as it was saved; its checksum does not agree.")
    missing = {"sha256", "source", "ties", "relative_error"} - set(config)
    if missing or not all(isinstance(config[key], dict) for key in ("sha256", "source", "ties")):
        raise CheckpointError(f"{path} must hold all that vlprune writes; it lacks some.")
    for name, digest in config["sha256"].items() if check_files else ():
        if Path(name).name != name:
            raise CheckpointError(f"{path} must name files beside it; got {name!r}.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} must be there; it is not.")
        if _sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} must be as it was saved; it was truncated or edited. "
                "Copy the folder again."
            )
    result: dict[str, Any] = config
    return result


def _read_plans(folder: Path) -> tuple[Plan, ...]:
    plans: dict[str, tuple[Plan, ...]] = _read_json(folder / _PLAN, dict[str, tuple[Plan, ...]])
    if set(plans) != {"plans"}:
        raise CheckpointError(f'{folder / _PLAN} must hold "plans"; it holds {sorted(plans)}.')
    return plans["plans"]


def _build(source: dict[str, Any]) -> nn.Module:
    family = FAMILIES[source["family"]]
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = family.build(source["arguments"])
    return model


def _load_weights(model: nn.Module, path: Path, ties: dict[str, str]) -> None:
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file; {error}.") from error
    state.update({name: state[holder] for name, holder in ties.items()})
    expected = model.state_dict()
    faults = [f"{name!r} is missing" for name in expected if name not in state]
    faults += [f"{name!r} is not in the model" for name in state if name not in expected]
    faults += [
        f"{name!r} has shape {tuple(state[name].shape)} where the cut model has {tuple(t.shape)}"
        for name, t in expected.items()
        if name in state and state[name].shape != t.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{path} must fit the cut model; {'; '.join(faults[:5])}{more}.")
    _take_dtypes(model, state)
    model.load_state_dict(state, strict=True)


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # buffers that are not saved follow
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(config: dict[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""Plain models of the shipped CLIP, DeiT and BLIP, loaded where vlprune is not installed.

`python tests/plain_elsewhere.py save FOLDER` cuts, saves and writes down answers; after
`pip uninstall vlprune`, `python tests/plain_elsewhere.py load FOLDER` loads and compares them.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import torch

MODELS = ("scenes-clip", "scenes-deit", "scenes-blip-vqa")


def save(folder: Path) -> None:
    """Write a plain folder, inputs and answers of every model."""
    import vlprune
    from vlprune.calls import calls_of, run, tensors_of
    from vlprune.dissect import default_inputs

    for name in MODELS:
        model = vlprune.create_model(name).eval()
        scores = vlprune.score(model, "magnitude", strategies=("ffn", "layer"))
        small = vlprune.prune(model, vlprune.plain_plan(scores, {"params": 0.75}, model))
        plain = vlprune.to_plain(small, folder / name)
        calls = calls_of(default_inputs(small, batch=2))
        with torch.no_grad():
            answers = [list(tensors_of(run(small, call))) for call in calls]
        torch.save([(call.args, dict(call.kwargs)) for call in calls], folder / f"{name}.in.pt")
        torch.save(answers, folder / f"{name}.out.pt")
        (folder / f"{name}.json").write_text(json.dumps(plain.load))
        print(plain)


def load(folder: Path) -> None:
    """Load every model by its library alone and compare."""
    assert importlib.util.find_spec("vlprune") is None, "vlprune must not be installed"
    for name in MODELS:
        line = json.loads((folder / f"{name}.json").read_text())
        library = line.partition(".")[0]
        model = eval(line, {library: importlib.import_module(library)}).eval()
        calls = torch.load(folder / f"{name}.in.pt")
        with torch.no_grad():
            found = [list(_tensors(model(*args, **kwargs))) for args, kwargs in calls]
        expected = torch.load(folder / f"{name}.out.pt")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        print(f"{line} answers as {name} does, cut")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))

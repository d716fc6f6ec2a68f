"""A family in another package joins by its entry point: installed by pip, used in a new process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "second_package"
PRUNE = """
import torch, vlprune
from lighthouse.model import Lighthouse
from vlprune.registry import FAMILIES

torch.manual_seed(0)
model = Lighthouse().eval()
anatomy = vlprune.dissect(model)
print(sorted(FAMILIES), anatomy.kinds, {r.kind for r in anatomy.refusals})
keep = {a.name: tuple(range(i % a.units, a.units)) for i, a in enumerate(anatomy.axes)}
small = vlprune.prune(model, vlprune.make_plan(anatomy, keep))
vlprune.save_pretrained(small, "small")
again = vlprune.from_pretrained("small")
ships = torch.randn(2, 7, 24)
assert torch.equal(again(ships), small(ships))
print([block.beam.lens.in_features // 6 for block in again.storeys])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed, as another distribution would be."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", folder]
    copy = tmp_path_factory.mktemp("source") / "package"
    subprocess.run(["cp", "-r", SOURCE, copy], check=True)  # building writes beside the sources
    subprocess.run([sys.executable, "-m", "pip", "install", *options, copy], check=True)
    return folder


def run(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_a_family_of_another_package_prunes_its_models(site: Path, tmp_path: Path) -> None:
    result = run(PRUNE, tmp_path, site)
    assert result.returncode == 0, result.stderr
    names, heads = result.stdout.splitlines()
    assert "'lighthouse'" in names
    assert names.endswith("('ffn', 'head', 'layer') {'head_dim'}")
    assert heads == "[3, 1, 3]"


def test_without_its_entry_point_the_heads_are_refused_by_name(tmp_path: Path) -> None:
    code = (
        "import torch, vlprune; from lighthouse.model import Lighthouse\n"
        "anatomy = vlprune.dissect(Lighthouse().eval(), torch.randn(2, 7, 24))\n"
        "print(anatomy.kinds, [r for r in anatomy.refusals if r.kind == 'head'][0])"
    )
    result = run(code, tmp_path, SOURCE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("('ffn', 'layer')")
    assert "storeys.0.beam" in result.stdout

"""Makes the items that the scenes data set ships: a small, class-balanced part of Fashion-MNIST.

Reads the four idx files of the Debian package `dataset-fashion-mnist` (or of the upstream
repository) and writes `items.npz`: 320 train items a class from the 60,000, 80 test items a class
from the 10,000. Running it again gives the same arrays.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 0
NUM_CLASSES = 10
NUM_PER_CLASS = {"train": 320, "test": 80}
FILE_PREFIX = {"train": "train", "test": "t10k"}
OUT = Path(__file__).parent.parent / "vlprune" / "tasks" / "scenes" / "items.npz"


def read_idx(path: Path, header_bytes: int) -> NDArray[np.uint8]:
    """The bytes that follow the header of a gzipped idx file."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=header_bytes)


def draw_items(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures `[items, 28, 28]` and labels `[items]`, as many of each class, in file order."""
    prefix = folder / FILE_PREFIX[split]
    images = read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"), 16).reshape(-1, 28, 28)
    labels = read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), 8)
    rng = np.random.default_rng(SEED)
    of_class = [np.flatnonzero(labels == label) for label in range(NUM_CLASSES)]
    drawn = [rng.choice(members, NUM_PER_CLASS[split], replace=False) for members in of_class]
    kept = np.sort(np.concatenate(drawn))
    return images[kept], labels[kept]


def main() -> None:
    """Draws both splits and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    arrays = {}
    for split in NUM_PER_CLASS:
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = draw_items(args.folder, split)
    np.savez_compressed(args.out, allow_pickle=False, **arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, {shapes}")


if __name__ == "__main__":
    main()

"""Coverage-guided fuzzing of every reader of files, with atheris (libFuzzer).

`pip install atheris && python benchmarks/fuzz.py --runs 20000 --reader plan` mutates a good file so
that new branches of the package are reached. Whatever is read must be a value or one of our errors,
under the guard of `tests/fuzzing.py`; anything else ends the program with the input. The mutations
by value of `tests/test_hardening.py` go deeper into JSON; these go deeper into the code.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
with atheris.instrument_imports(include=["vlprune"]):
    import fuzzing


def main() -> None:
    """Fuzz one reader, then say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reader", required=True)
    parser.add_argument("--runs", type=int, default=10_000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    good = fuzzing.seeds(folder)[arguments.reader]
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "good").write_bytes(good)
    counts: collections.Counter[str] = collections.Counter()

    def one(data: bytes) -> None:
        counts[fuzzing.feed(arguments.reader, data, folder)] += 1
        if sum(counts.values()) == arguments.runs:
            print(arguments.reader, dict(counts), flush=True)

    def changed(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(fuzzing.mutate(data or good, random.Random(seed)))[:most]
        return bytes(atheris.Mutate(data, most))

    options = [f"-runs={arguments.runs}", f"-max_len={4 * len(good)}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

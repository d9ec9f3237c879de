"""Bits a byte of the shipped testbed on the held-out split of the standard library, against ``xz -9e`` on the same text.

    python benchmarks/testbed.py

Prints and writes benchmarks/results/testbed.json.  The compressor gets all documents as one file; the model predicts each document alone.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from etude.measures.perplexity import Perplexity
from etude.study import compare
from etude.study.environment import environment
from etude.worlds.stdlib import Stdlib
from etude.worlds.testbed import FOLDER, Testbed


def main() -> None:
    heldout = Stdlib(split="heldout")()
    text = "".join(heldout.texts).encode()
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    model = Testbed()()
    perplexity, bits = Perplexity()(model, heldout)
    estimate = compare.mean([bits])
    found = {
        "bits_per_byte": {"model": bits.value, "low": estimate.low, "high": estimate.high, "xz -9e": 8 * len(packed) / len(text)},
        "perplexity": perplexity.value,
        "heldout": {"documents": len(heldout), "bytes": len(text), "digest": heldout.digest},
        "model": {"parameters": model.parameters, "bytes in the package": sum(path.stat().st_size for path in FOLDER.iterdir()), "digest": model.digest},
        "environment": environment(),
    }
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / "testbed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`make bench`: measure what docs/benchmarks.md publishes, and write it there.

Name parts to measure only them: `python -m tests.bench transfer quickstart handover`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.page import replace, section

PARTS = {
    "handover": (
        "Operator",
        "tests/bench/handover.py",
        "real API server, Jobs ended by a fake kubelet, operator as a process",
    ),
    "transfer": (
        "Checkpoints against a raw copy",
        "tests/bench/transfer.py",
        "a real S3 server on this machine, both clients warm, who goes first alternates; medians of the rounds",
    ),
    "generation": (
        "Rollouts against transformers' generate",
        "tests/bench/generation.py",
        "SmolLM2-135M with a LoRA adapter of rank 16, the quickstart's questions, temperature 1, float32",
    ),
    "threads": (
        "Threads that wait",
        "tests/bench/threads.py",
        "how long a thread looks before it sleeps, for a trainer that is alone and for two on the same processors",
    ),
    "products": (
        "Products over few tokens",
        "tests/bench/products.py",
        "how many times as fast as `F.linear` the decoding loop's linear layers are, medians of alternating rounds",
    ),
    "widening": (
        "Products with widened weights",
        "tests/bench/widening.py",
        "linear layers that hold bfloat16 weights and widen them for each product, how many times as fast as layers that "
        "hold float32; medians of alternating rounds",
    ),
    "quickstart": (
        "Quickstart",
        "tests/bench/quickstart.py",
        "examples/01-quickstart from empty storage and cache, then again; proportional memory, sampled every 2 s",
    ),
}
LIBRARIES = ("torch", "transformers", "kopf", "boto3")


def main(names: list[str]) -> int:
    """Measure the named parts (all by default) and put their tables into the page; other tables stay."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(unknown)}; known: {', '.join(PARTS)}\n")
        return 2
    for name in names or list(PARTS):
        module = importlib.import_module(f"bench.{name}")
        rows = module.measure()
        notes = module.notes() if hasattr(module, "notes") else []
        title, source, how = PARTS[name]
        text = section(title, f"`make bench` ({source}): {how}.", rows, LIBRARIES, *notes)
        sys.stdout.write(text + "\n")
        replace(name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

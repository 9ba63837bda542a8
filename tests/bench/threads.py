"""Threads that wait: how long they look before they sleep, for a trainer that is alone and for two on the same processors.

python -m tests.bench threads
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from plumbline_trainer.threads import SPINS, thread_settings

SECONDS = 10.0
"""Length of one measurement, after the first step."""
ROUNDS = 3
SETTINGS: dict[str, dict[str, str]] = {
    "sleep at once (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    f"ours (GOMP_SPINCOUNT={SPINS})": {},
    "as libgomp comes (GOMP_SPINCOUNT=300000)": {"GOMP_SPINCOUNT": "300000"},
}
FOREIGN = ("OMP_", "GOMP_", "KMP_", "MKL_")
TESTS = Path(__file__).resolve().parents[1]


def measure(seconds: float = SECONDS, rounds: int = ROUNDS) -> list[dict[str, str]]:
    """A row per setting: steps per second of one trainer alone, and of each of two; medians of alternating rounds."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, setting in SETTINGS.items():
            for count in (1, 2):
                found.setdefault((name, count), []).append(_speed(setting, count, seconds))
    middle = {key: statistics.median(values) for key, values in found.items()}
    bare = list(SETTINGS)[-1]
    return [
        {
            "threads that wait": name,
            "alone (steps/s)": f"{middle[name, 1]:.2f}",
            "each of two (steps/s)": f"{middle[name, 2]:.2f}",
            "alone ÷ libgomp's own": f"{middle[name, 1] / middle[bare, 1]:.2f}",
            "each of two ÷ libgomp's own": f"{middle[name, 2] / middle[bare, 2]:.2f}",
        }
        for name in SETTINGS
    ]


def _speed(setting: dict[str, str], count: int, seconds: float) -> float:
    """Steps per second of each of some trainers that run beside each other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | setting
    environment = {**kept, **thread_settings(kept, 1), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "bench.threads", str(seconds)]
    sides = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for side in sides:
        assert side.stdout is not None
        side.stdout.readline()  # it is ready
    for side in sides:
        assert side.stdin is not None
        side.stdin.write("go\n")
        side.stdin.flush()
    speeds = [float(side.communicate()[0]) for side in sides]
    if any(side.returncode for side in sides):
        raise SystemExit("a side of the benchmark failed")
    return statistics.mean(speeds)


def train(seconds: float) -> None:
    """Steps of a random model with SmolLM2-135M's layers (six of them), 256 tokens each, for some seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=6, **shape))
    tokens = torch.arange(256)[None]
    model(tokens, labels=tokens).loss.backward()
    print("ready", flush=True)
    sys.stdin.readline()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        model(tokens, labels=tokens).loss.backward()
        steps += 1
    print(steps / (time.perf_counter() - started), flush=True)


def notes() -> list[str]:
    """What the table needs beside it."""
    threads = thread_settings({}, 1)["OMP_NUM_THREADS"]
    return [
        f"{threads} threads a trainer, medians of {ROUNDS} rounds of {SECONDS:.0f} s: forward and backward pass of six of "
        "SmolLM2-135M's layers over 256 tokens. Steps that end after the others' last one count too."
    ]


if __name__ == "__main__":
    train(float(sys.argv[1]))

"""What the benchmark against trl needs on a CUDA device: its memory and its clock, and a model worth its while."""

from __future__ import annotations

import atexit
import gc
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from bench.measured import Gauge, Resident, Task


class OnDevice:
    """The memory that PyTorch holds on the device."""

    def settle(self) -> None:
        """Wait for its kernels."""
        torch.cuda.synchronize()

    def start(self) -> int:
        """Bytes of tensors; what the allocator kept of former ones goes back."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Bytes of tensors at most."""
        return torch.cuda.max_memory_allocated()


def give_back() -> None:
    """Leave the device's memory to the other sides, whose processes are kept as this one is."""
    gc.collect()  # trainers refer to themselves
    torch.cuda.empty_cache()


class Kept:
    """A process for each side that measures one task after another: to start one takes longer than to measure."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._errors = tempfile.TemporaryDirectory()
        atexit.register(self.end)

    def measure(self, side: str, task: str, environment: Mapping[str, str]) -> str:
        """What a side's process found for a task, as JSON.

        Raises:
            SystemExit: if it ended; with the end of what it said.
        """
        errors = Path(self._errors.name) / side
        if side not in self._processes:
            with errors.open("w") as stream:
                self._processes[side] = subprocess.Popen(
                    [sys.executable, "-m", "bench.trainer_side", "-"],
                    env=dict(environment),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stream,
                    text=True,
                )
        process = self._processes[side]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(task + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(FOUND):
                return line.removeprefix(FOUND)
        raise SystemExit(f"{task} failed:\n{errors.read_text()[-4000:]}")

    def end(self) -> None:
        """Stop them all."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()


FOUND = "found: "
"""Before a result: trl prints lines of its own."""


def gauge_of(task: Task) -> Gauge:
    """What measures a side."""
    return OnDevice() if task.device == "cuda" else Resident()


def make_random(folder: Path) -> Path:
    """A Llama of 1.1 billion random weights in bfloat16, with the tokenizer of the bundled model, as a folder."""
    from plumbline_trainer.data.sources import bundled_model
    from plumbline_trainer.models.loading import load_tokenizer
    from plumbline_trainer.models.saving import save_full
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(bundled_model("bundled://smollm2-135m-instruct"))
    config = LlamaConfig(
        vocab_size=len(tokenizer.hf),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.hf.eos_token_id,
    )
    torch.manual_seed(1)
    with torch.device("cuda"):  # a billion numbers take a CPU long
        model = LlamaForCausalLM(config)
    save_full(model.cpu(), tokenizer, folder, "bfloat16")
    return folder

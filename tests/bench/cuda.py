"""What the benchmark against trl needs on a CUDA device: its memory and its clock, and a model worth its while."""

from __future__ import annotations

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


def gauge_of(task: Task) -> Gauge:
    """What measures a side."""
    return OnDevice() if task.device == "cuda" else Resident()


def make_random(folder: Path) -> Path:
    """A Llama of 1.1 billion random weights in bfloat16, with the tokenizer of the bundled model, as a folder."""
    from plumbline_trainer.data.sources import bundled_model
    from plumbline_trainer.models.loading import load_base
    from plumbline_trainer.models.saving import save_full
    from transformers import LlamaConfig, LlamaForCausalLM

    small, tokenizer = load_base(bundled_model("bundled://smollm2-135m-instruct"), "bfloat16")
    config = LlamaConfig(
        vocab_size=small.config.vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=small.config.bos_token_id,
        eos_token_id=small.config.eos_token_id,
    )
    torch.manual_seed(1)
    save_full(LlamaForCausalLM(config).to(torch.bfloat16), tokenizer, folder, "bfloat16")
    return folder

"""Tiny random models with a small real tokenizer, as Hugging Face folders: 2 layers, 64 wide, made in a second.

Weights and vocabulary are functions of the arguments only, so that tests may compare bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Style = Literal["llama", "qwen2", "gemma2", "gpt2"]
STYLES: tuple[Style, ...] = ("llama", "qwen2", "gemma2", "gpt2")

TEXTS = (
    "A plumb line is a cord with a weight at its end. It hangs straight down and shows whether a wall stands true.",
    "Masons, carpenters and surveyors have used it for four thousand years; the weight was stone, then lead.",
    "Who asks a question wants an answer that is short, correct and kind. Say what you know and what you do not.",
    "Name three fruits: apples, pears and plums. Name three tools: a hammer, a saw and a level.",
    "The sea is deep and the sky is wide. Water runs downhill, smoke rises, and a dropped stone falls.",
    "USER: How do I check that a shelf is level? ASSISTANT: Put a ball on it; if it rolls, it is not.",
)

START, END, BOS, PAD = "<|im_start|>", "<|im_end|>", "<|bos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(*, bos: bool = False, pad_is_end: bool = False, template: bool = True, vocabulary: int = 384) -> Any:
    """A byte-level BPE tokenizer trained on a few sentences: every text has ids, and ids give the text back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [START, END] + ([BOS] if bos else []) + ([] if pad_is_end else [PAD])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if bos else None,
        eos_token=END,
        pad_token=END if pad_is_end else PAD,
        clean_up_tokenization_spaces=False,
    )
    if template:
        tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + CHAT_TEMPLATE
    return tokenizer


def make_config(style: Style, tokenizer: Any, *, tie: bool = True, width: int = 64, layers: int = 2) -> Any:
    """The configuration of a tiny model of an architecture."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tie,
        "initializer_range": 0.1,
    }
    if style == "gpt2":
        return transformers.GPT2Config(
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    shared |= {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if style == "qwen2":
        return transformers.Qwen2Config(**shared)
    if style == "gemma2":
        return transformers.Gemma2Config(
            head_dim=width // 4, query_pre_attn_scalar=width // 4, sliding_window=32, **shared
        )
    return transformers.LlamaConfig(**shared)


def make_model(
    style: Style = "llama",
    *,
    seed: int = 0,
    tie: bool = True,
    width: int = 64,
    layers: int = 2,
    tokenizer: Any = None,
) -> Any:
    """A tiny random model in evaluation mode, float32; a function of its arguments."""
    import torch
    import transformers

    config = make_config(style, tokenizer or make_tokenizer(), tie=tie, width=width, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def save_model(
    folder: Path,
    style: Style = "llama",
    *,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tie: bool = True,
    width: int = 64,
    layers: int = 2,
    bos: bool = False,
    pad_is_end: bool = False,
    template: bool = True,
) -> Path:
    """Write a tiny model with its tokenizer as a Hugging Face folder and return the folder."""
    import torch

    tokenizer = make_tokenizer(bos=bos, pad_is_end=pad_is_end, template=template)
    model = make_model(style, seed=seed, tie=tie, width=width, layers=layers, tokenizer=tokenizer)
    model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    # `python -m support.tiny FOLDER`: the model of examples/03-tiny.
    import sys

    save_model(Path(sys.argv[1]))

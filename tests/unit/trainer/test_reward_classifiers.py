"""Sequence classifiers from outside as rewards: the same numbers as transformers', without its trap of pad = eos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plumbline_api.stagerun import StageInput
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.classifier import Classifier, padded_batches, padding_for
from plumbline_trainer.models.loading import check_classifier, load_classifier
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.learned import ClassifierReward
from plumbline_trainer.rewards.opening import open_classifier
from support.tiny import CHAT_TEMPLATE, END, make_config, make_tokenizer
from support.trainer import stage_context
from tokenizers.processors import TemplateProcessing

DIALOGUES = [
    [Message("user", "Is the wall true?"), Message("assistant", "Yes.")],
    [Message("system", "Be short."), Message("user", "Why?"), Message("assistant", "Because the line hangs straight.")],
    [Message("user", "Name three tools"), Message("assistant", "a hammer, a saw and a level " * 6)],
    [Message("user", "So?"), Message("assistant", "")],
]


def save_classifier(folder: Path, style: str = "llama", *, labels: int = 1, pad_is_end: bool = False) -> Path:
    """A tiny random classifier with a tokenizer; `bert` is an encoder without a chat template."""
    tokenizer = make_tokenizer(pad_is_end=pad_is_end, template=style != "bert")
    if pad_is_end:  # So that the end token is the last one of a dialogue.
        tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
        assert tokenizer.chat_template != CHAT_TEMPLATE
    if style == "bert":
        ends = [(END, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {END}", pair=f"$A {END} $B:1 {END}:1", special_tokens=ends
        )
        config: Any = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=labels,
        )
    else:
        config = make_config(style, tokenizer)  # type: ignore[arg-type]
        config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("score.weight", "classifier.weight")):
            parameter.data = parameter.data * 20
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def opened(folder: Path, **options: Any) -> Classifier:
    model, tokenizer = load_classifier(folder, "float32")
    return Classifier(model, tokenizer, "rm", **options)


def by_transformers(folder: Path, batch: bool) -> torch.Tensor:
    """Its own classifier on what its own tokenizer makes of the dialogues, padded on the right."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer.padding_side = "right"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    if tokenizer.chat_template is not None:
        chats = [[message.to_chat() for message in messages] for messages in DIALOGUES]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        given = [(text,) for text in texts]
        options = {"add_special_tokens": False}
    else:
        given = [("\n".join(m.content for m in ms[:-1]), ms[-1].content) for ms in DIALOGUES]  # type: ignore[misc]
        options = {}
    with torch.no_grad():
        if batch:
            encoded = tokenizer(*map(list, zip(*given, strict=True)), padding=True, return_tensors="pt", **options)
            encoded = {name: encoded[name] for name in encoded if name != "token_type_ids" or len(given[0]) == 2}
            return torch.as_tensor(model(**encoded).logits[:, 0])
        model.config.pad_token_id = None  # One by one it is read at the last token, whatever that is.
        rows = []
        for one in given:
            encoded = tokenizer(*one, return_tensors="pt", **options)
            rows.append(model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[0, 0])
        return torch.stack(rows)


@pytest.mark.parametrize("style", ["llama", "qwen2", "gpt2", "bert"])
def test_padded_batches_score_as_transformers_does(tmp_path: Path, style: str) -> None:
    folder = save_classifier(tmp_path / "rm", style)
    found = opened(folder).score(DIALOGUES)
    assert found.dtype == torch.float32
    assert torch.allclose(found, by_transformers(folder, batch=True), atol=1e-5)
    assert float(found.std()) > 0.01


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_an_end_token_that_pads_as_well_is_read_all_the_same(tmp_path: Path, style: str) -> None:
    folder = save_classifier(tmp_path / "rm", style, pad_is_end=True)
    found = opened(folder).score(DIALOGUES)
    assert torch.allclose(found, by_transformers(folder, batch=False), atol=1e-5)
    # The trap is there: transformers' own padded batch reads another token.
    assert not torch.allclose(found, by_transformers(folder, batch=True), atol=1e-3)


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_batches_do_not_change_scores(tmp_path: Path, budget: int) -> None:
    classifier = opened(save_classifier(tmp_path / "rm"), tokens_per_batch=budget)
    alone = torch.cat([classifier.score([dialogue]) for dialogue in DIALOGUES])
    assert torch.allclose(classifier.score(DIALOGUES), alone, atol=1e-5)
    assert classifier.score([]).shape == (0,)


def test_batches_hold_at_most_the_budget() -> None:
    lengths = [3, 9, 1, 4, 4, 20, 2]
    batches = padded_batches(lengths, 12)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches[0] == [5]
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 12 for batch in batches)


def test_padding_does_not_occur_in_the_batch() -> None:
    assert padding_for([[1, 2], [3]], 7) == 7
    assert padding_for([[0, 2], [1]], 2) == 3
    assert padding_for([[5, 2]], 2) == 0


def test_long_answers_are_cut_and_said_and_long_prompts_refused(tmp_path: Path, capfd: Any) -> None:
    folder = save_classifier(tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    context = stage_context(tmp_path)
    classifier = opened(folder, log=context.log)
    long = [Message("user", "Why?"), Message("assistant", "so " * 200)]
    longer = [Message("user", "Why?"), Message("assistant", "so " * 300)]
    first, second = classifier.score([long, longer])
    assert first == second
    assert "the ends of 2 answers were cut off" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"leaves no room for an answer within the 40 tokens that rm reads"):
        classifier.score([[Message("user", "why " * 100), Message("assistant", "so")]])


def test_what_is_no_classifier_with_one_label_is_refused(tmp_path: Path) -> None:
    three = save_classifier(tmp_path / "three", labels=3)
    for check in (lambda path: check_classifier(path, {}, "rm"), lambda path: load_classifier(path, "float32")):
        with pytest.raises(InputError, match=r"three/config.json: the classifier has 3 labels; a reward is one number"):
            check(three)
    headless = save_classifier(tmp_path / "headless")
    causal = transformers.AutoModelForCausalLM.from_config(make_config("llama", make_tokenizer()))
    causal.save_pretrained(str(headless))
    config = json.loads((headless / "config.json").read_text()) | {"num_labels": 1, "id2label": {"0": "LABEL_0"}}
    (headless / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"weights that its config.json asks for are not there \(score.weight\)"):
        load_classifier(headless, "float32")


def test_a_declared_classifier_is_opened_and_scores_candidates(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "rm")
    item = StageInput(role="rewards.0.model", name="reward/ppo/0", kind="classifier", uri=f"file://{folder}")
    reward = ClassifierReward(open_classifier(stage_context(tmp_path), item, "float32", torch.device("cpu")))
    candidates = [Candidate(tuple(ms[:-1]), ms[-1].content, 1, None, "row") for ms in DIALOGUES]
    assert torch.equal(reward.score(candidates, Ranks()), opened(folder).score(DIALOGUES))

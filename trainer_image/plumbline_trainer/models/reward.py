"""Reward models in storage: a backbone (an adapter on a policy, or full weights), heads, and what scores mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from plumbline_api.base import Contract
from plumbline_api.errors import InputError
from plumbline_api.stagerun import StageInput
from plumbline_api.training import Freeze, Lora
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbline_trainer.data.encode import Encoded, encode_rows
from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.values import ValueHeads, ValueScorer, score_values
from plumbline_trainer.models.adapters import ADAPTER_WEIGHTS, attach_lora, load_adapter_state, save_adapter
from plumbline_trainer.models.dtypes import place_weights
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.policy import Policy, load_policy, policy_meta
from plumbline_trainer.models.quantization import quantize
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.sharing import is_frozen, shared_backbone
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.storage.manifests import Manifest, fetch_output

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

CONFIG, HEADS = "reward_model.json", "heads.safetensors"
KIND = "rewardModel"


class RewardConfig(Contract):
    """reward_model.json: how the scores of a reward model are read, and how they lie."""

    version: Literal[1] = 1
    """Version of this document."""
    heads: int
    """Heads of the ensemble."""
    pooling: Literal["last"] = "last"
    """Where a score is read: at the last token of the answer, which is its end token unless the answer was cut."""
    max_length: int
    """Longest sequence in tokens; longer ones are cut at their end, as in training."""
    mean: list[float]
    """Mean reward of each head over answers of the training rows."""
    std: list[float]
    """Standard deviation of each head's reward over them."""
    lora: Lora | None = None
    """The adapter, if the backbone is one on the policy that the manifest names as parent `model`."""
    freeze: Freeze | None = None
    """What was not trained: no adapter is on it."""


@dataclass
class RewardModel:
    """Scores answers. Higher is better; only differences between answers to one prompt mean something."""

    scorer: ValueScorer
    tokenizer: Tokenizer
    config: RewardConfig
    tokens_per_batch: int = 4096
    shared_with: Policy | None = None
    """The policy whose weights lie under its adapter, if it was given one."""

    def score(self, dialogues: Sequence[Sequence[Message]], *, ranks: Ranks | None = None) -> Tensor:
        """Rewards of the last turn of each dialogue, [dialogues, heads] float32 on the CPU.

        Equal prompts are computed once for all their answers.

        Raises:
            InputError: if a dialogue does not end with a turn of the assistant, or its prompt is too long.
        """
        places: dict[tuple[Message, ...], list[int]] = {}
        for index, dialogue in enumerate(dialogues):
            if len(dialogue) < 2 or dialogue[-1].role != "assistant":
                raise InputError(f"dialogue {index} of {len(dialogues)} must end with an answer of the assistant")
            places.setdefault(tuple(dialogue[:-1]), []).append(index)
        rows = [
            Row(str(n), "", prompt, tuple(Response(str(i), (dialogues[i][-1],)) for i in members))
            for n, (prompt, members) in enumerate(places.items())
        ]
        if not rows:
            return torch.zeros(0, self.config.heads)
        encoded = encode_rows(rows, self.tokenizer, method="score", max_length=self.config.max_length)
        if encoded.dropped:
            raise InputError(
                f"{encoded.dropped} of {len(rows)} prompts leave no room for an answer within the "
                f"{self.config.max_length:,} tokens of the reward model ({'; '.join(encoded.examples[:1])}). "
                "Train it with a longer training.maxLength"
            )
        found = torch.zeros(len(dialogues), self.config.heads)
        values = score_values(self.scorer, encoded.rows, tokens_per_batch=self.tokens_per_batch, ranks=ranks)
        for members, rewards in zip(places.values(), values, strict=True):
            found[torch.tensor(members)] = rewards
        return found


def save_reward_model(folder: Path, scorer: ValueScorer, policy: Policy, config: RewardConfig) -> dict[str, Any]:
    """Write a reward model; what its manifest says about it."""
    if config.lora is None:
        save_full(policy.model, policy.tokenizer, folder, policy.storage_dtype)
    else:
        save_adapter(policy.model, config.lora, folder)
    weight = scorer.heads.weight.detach().to("cpu", torch.float32).contiguous()
    save_file({"weight": weight}, str(folder / HEADS), metadata={"format": "pt"})
    document = config.to_wire()
    (folder / CONFIG).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    meta = policy_meta(policy, form="full" if config.lora is None else "adapter")
    return meta | {key: document[key] for key in ("heads", "pooling", "maxLength", "mean", "std")}


def load_reward_model(
    context: StageContext,
    item: StageInput,
    *,
    precision: str,
    device: torch.device | str,
    tokens_per_batch: int = 4096,
    beside: Policy | None = None,
    ranks: Ranks | None = None,
) -> RewardModel:
    """Load the output of a `rewardModel` stage, ready to score.

    An adapter stays beside its policy and is not merged, so that scores are those that were measured, bit for bit at
    equal precision and batches.

    Args:
        context: of the stage that scores.
        item: the input that names the reward model.
        precision: type of the frozen weights in memory, and of activations.
        device: where the weights go.
        tokens_per_batch: token budget of one forward pass.
        beside: a policy in memory with an adapter on it. If its frozen weights are those under the reward model's
            adapter, they serve both, and nothing is loaded twice.
        ranks: processes that load it together; they go the same way through it.

    Raises:
        InputError: if it is no reward model, or a part is missing or damaged.
    """
    fetched = fetch_output(context, context.root_of(item))
    if fetched.manifest.kind != KIND:
        raise InputError(f'"{item.name}" ({item.stage_type}) yields a {fetched.manifest.kind}, a {KIND} is needed')
    config, weight = _read(fetched.folder, item.name)
    if config.lora is None:
        model, tokenizer = load_base(fetched.folder, str(fetched.manifest.meta["storageDtype"]))
        place_weights(model, precision, device)
    else:
        parent = fetched.manifest.parent("model")
        if parent is None:
            raise InputError(f'the manifest of "{item.name}" names no model; retry that stage', reason="InputMissing")
        if beside is not None and _is_under(fetched.manifest, config, beside, precision, device):
            policy = replace(beside, model=shared_backbone(beside))
        else:
            beside = None
            quantized = config.lora.quantization is not None
            policy = load_policy(context, parent.to_input(), precision=precision, device="cpu" if quantized else device)
        if policy.lineage.merged_digest != fetched.manifest.meta.get("startDigest"):
            raise InputError(
                f'the policy under the reward model "{item.name}" has changed since it was trained. Retry that stage',
                reason="InputMissing",
            )
        tokenizer = policy.tokenizer
        quantize(policy, config.lora, config.freeze)  # It has learned to score what such weights compute.
        model = attach_lora(policy.model, config.lora, seed=0, freeze=config.freeze)
        load_adapter_state(model, load_file(str(fetched.folder / ADAPTER_WEIGHTS)))
    model.requires_grad_(False)
    scorer = ValueScorer(model, ValueHeads(weight).to(device), precision=precision)
    scorer.requires_grad_(False)
    scorer.eval()
    sample = _probe(tokenizer, config.max_length)
    scorer.path = choose_path(scorer, sample, {}, tokens=tokens_per_batch, ranks=ranks or Ranks()).path
    return RewardModel(scorer, tokenizer, config, tokens_per_batch, beside if config.lora is not None else None)


def _is_under(
    manifest: Manifest, config: RewardConfig, policy: Policy, precision: str, device: torch.device | str
) -> bool:
    """Whether the weights that a policy was loaded with are those under a reward model's adapter."""
    meta, lineage = manifest.meta, policy.lineage
    if config.lora is None or config.lora.quantization is not None or not is_frozen(policy):
        return False
    return (
        policy.precision == precision
        and policy.model.device == torch.empty(0, device=device).device
        and meta.get("storageDtype") == policy.storage_dtype
        and meta.get("tokenizerDigest") == policy.tokenizer.digest
        and meta.get("startDigest") == lineage.merged_digest
        and _content(meta.get("base") or {}) == _content(lineage.base)
        and _content(lineage.base) is not None
    )


def _content(base: dict[str, Any]) -> str | None:
    """What a base is, whatever it is called: the digest of an external model, or of the manifest of full weights."""
    return base.get("digest") or base.get("manifestDigest")


def _read(folder: Path, name: str) -> tuple[RewardConfig, Tensor]:
    try:
        config = RewardConfig.model_validate_json((folder / CONFIG).read_bytes())
        # A tensor in a file's buffer lies at any byte, and a product with it may add up in another order.
        weight = load_file(str(folder / HEADS))["weight"].clone()
        if weight.shape[0] != config.heads or not len(config.mean) == len(config.std) == config.heads:
            raise ValueError(f"{len(weight)} heads where {config.heads} are declared")
    except (OSError, ValueError, KeyError, ValidationError, SafetensorError) as error:
        raise InputError(f'the reward model of "{name}" cannot be read: {error}', reason="InputMissing") from error
    return config, weight


def _probe(tokenizer: Tokenizer, max_length: int) -> list[Encoded]:
    """Rows to compare the fast path with the plain one on."""
    answers = ("Yes.", "No, it is not so: look at it again, from the other side, and say what you see.")
    rows = [
        Row(
            str(number),
            "",
            (Message("user", prompt),),
            tuple(Response(str(i), (Message("assistant", text),)) for i, text in enumerate(answers)),
        )
        for number, prompt in enumerate(("Is it so?", "A wall leans to one side. What does the plumb line show?"))
    ]
    return encode_rows(rows, tokenizer, method="score", max_length=max(max_length, 256)).rows

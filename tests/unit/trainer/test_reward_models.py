"""Reward models of a pipeline as rewards: ensembles, centring, and the policy's frozen weights used twice."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.online import Reward
from plumbline_api.stagerun import StageRun
from plumbline_api.training import Lora
from plumbline_trainer.context import StageContext
from plumbline_trainer.data.rows import Message
from plumbline_trainer.data.sources import model_digest
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.models.adapters import adapter_state, adapters_disabled, attach_lora
from plumbline_trainer.models.policy import Policy, load_policy
from plumbline_trainer.models.reward import load_reward_model
from plumbline_trainer.models.sharing import is_frozen, shared_backbone
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.learned import StageReward, combine_heads
from plumbline_trainer.rewards.opening import open_rewards
from support.trainer import output_of, run_in_process, stage_context, stage_run
from support.training_data import training_run
from torch import Tensor

LORA = {"rank": 4}
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"globalBatch": 6, "learningRate": 3e-2, "tokensPerBatch": 512, "maxSteps": 4}


def pinned(run: StageRun) -> StageRun:
    """With the digest of the base model, as preflight pins it."""
    folder = Path(str(run.inputs[0].uri).removeprefix("file://"))
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")]
    digest = model_digest([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    model = run.inputs[0].model_copy(update={"digest": digest})
    return run.model_copy(update={"inputs": [model, *run.inputs[1:]]})


def trained(folder: Path, *, lora: dict[str, Any] | None = LORA, heads: int = 1, style: str = "llama") -> StageRun:
    run = pinned(training_run(folder, "rewardModel", lora=lora, style=style, stage={"heads": heads}, **SETTINGS))
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    return run


def reading(folder: Path, run: StageRun) -> StageContext:
    item = output_of(run, "rewards.0.stage")
    return stage_context(folder / "reader", stage_run(folder, inputs=[run.inputs[0], item]))


def policy_of(context: StageContext, lora: dict[str, Any] | None = LORA, precision: str = "float32") -> Policy:
    policy = load_policy(context, context.input("model"), precision=precision, device="cpu")
    if lora is not None:
        attach_lora(policy.model, Lora.model_validate(lora), seed=9)
    return policy


def answers(count: int = 6) -> list[Candidate]:
    prompts = [(Message("user", f"Is wall {n // 2} true?"),) for n in range(count)]
    return [Candidate(prompt, f"yes {'it is ' * n}", n, None, f"row-{n}") for n, prompt in enumerate(prompts)]


def dialogues() -> list[list[Message]]:
    return [[*item.prompt, Message("assistant", item.answer)] for item in answers()]


def storage(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()


def weights_at(model: Any) -> set[int]:
    return {storage(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_a_reward_model_on_the_policys_weights_uses_them_and_scores_the_same(tmp_path: Path, style: str) -> None:
    run = trained(tmp_path, style=style)
    context = reading(tmp_path, run)
    item = context.input("rewards.0.stage")
    alone = load_reward_model(context, item, precision="float32", device=CPU)
    policy = policy_of(context)
    shared = load_reward_model(context, item, precision="float32", device=CPU, beside=policy)
    assert shared.shared_with is policy
    assert torch.equal(shared.score(dialogues()), alone.score(dialogues()))
    frozen = {storage(weight) for name, weight in policy.model.named_parameters() if "lora_" not in name}
    own = {storage(weight) for name, weight in shared.scorer.model.named_parameters() if "lora_" not in name}
    assert own == frozen
    adapters = {storage(weight) for name, weight in shared.scorer.model.named_parameters() if "lora_" in name}
    assert not adapters & weights_at(policy.model)


def test_training_the_policy_moves_no_score_and_scoring_moves_no_policy(tmp_path: Path) -> None:
    run = trained(tmp_path)
    context = reading(tmp_path, run)
    policy = policy_of(context)
    model = load_reward_model(context, context.input("rewards.0.stage"), precision="float32", device=CPU, beside=policy)
    adapter = adapter_state(policy.model)
    before = model.score(dialogues())
    assert all(torch.equal(weight, adapter[name]) for name, weight in adapter_state(policy.model).items())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name
                parameter.add_(0.3)
        moved = policy.model(ids).logits
    assert torch.equal(model.score(dialogues()), before)
    with torch.no_grad():
        assert torch.equal(policy.model(ids).logits, moved)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize(
    "change",
    ["no adapter yet", "full training", "another base", "another precision", "reward model of full weights"],
)
def test_where_the_weights_are_others_the_reward_model_has_its_own(tmp_path: Path, change: str) -> None:
    run = trained(tmp_path, lora=None if change == "reward model of full weights" else LORA)
    context = reading(tmp_path, run)
    policy = policy_of(context, lora=None if change in ("no adapter yet", "full training") else LORA)
    if change == "another base":
        policy.lineage.base["digest"] = "0" * 64
    precision = "bfloat16" if change == "another precision" else "float32"
    item = context.input("rewards.0.stage")
    model = load_reward_model(context, item, precision=precision, device=CPU, beside=policy)
    assert model.shared_with is None
    assert not weights_at(model.scorer.model) & weights_at(policy.model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_shared_tree_is_what_the_policy_was_loaded_with(tmp_path: Path, precision: str) -> None:
    """Also where parts of the policy are trained whole beside its adapter, and another adapter goes onto the tree."""
    context = reading(tmp_path, pinned(training_run(tmp_path, "rewardModel", **SETTINGS)))
    fresh = policy_of(context, None, precision)
    lora = {"rank": 4, "modulesToSave": ["embed_tokens", "lm_head"]}
    policy = policy_of(context, lora, precision)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    twin = shared_backbone(policy)
    wanted = fresh.model.state_dict()
    assert {name: tensor.dtype for name, tensor in twin.state_dict().items()} == {
        name: tensor.dtype for name, tensor in wanted.items()
    }

    def logits(model: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            found: Tensor = model(ids).logits
        return found

    assert torch.equal(logits(twin), logits(fresh.model))
    theirs = logits(policy.model)
    with adapters_disabled(policy.model):
        start = logits(policy.model)
    attach_lora(twin, Lora.model_validate(lora), seed=1)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert torch.equal(logits(policy.model), theirs)
    with adapters_disabled(policy.model):
        assert torch.equal(logits(policy.model), start)


def test_only_weights_that_stay_are_frozen(tmp_path: Path) -> None:
    context = reading(tmp_path, pinned(training_run(tmp_path, "rewardModel", **SETTINGS)))
    assert not is_frozen(policy_of(context, None))
    policy = policy_of(context)
    assert is_frozen(policy)
    policy.quantization = "nf4"
    assert not is_frozen(policy)


def test_heads_become_one_value() -> None:
    heads = torch.tensor([[1.0, 3.0, 5.0], [-2.0, -2.0, 4.0]], dtype=torch.float64)
    assert combine_heads(heads, "mean", 1.0).tolist() == [3.0, 0.0]
    assert combine_heads(heads, "min", 1.0).tolist() == [1.0, -2.0]
    stds = [(8 / 3) ** 0.5, 8**0.5]
    assert combine_heads(heads, "meanMinusStd", 2.0).tolist() == pytest.approx([3 - 2 * stds[0], -2 * stds[1]])


@pytest.mark.parametrize("how", [None, "mean", "min", "meanMinusStd"])
def test_every_head_is_read_relative_to_its_own_mean(tmp_path: Path, how: str | None) -> None:
    run = trained(tmp_path, heads=3)
    context = reading(tmp_path, run)
    reward = Reward.model_validate({"stage": "reward", "ensemble": how})
    model = load_reward_model(context, context.input("rewards.0.stage"), precision="float32", device=CPU)
    raw = model.score(dialogues()).double()
    assert raw.shape == (6, 3)
    centred = raw - torch.tensor(model.config.mean).double()
    wanted = {"min": centred.min(1).values, "meanMinusStd": centred.mean(1) - centred.std(1, correction=0)}
    found = StageReward(model, reward).score(answers(), Ranks())
    assert torch.allclose(found.double(), wanted.get(how or "", centred.mean(1)), atol=1e-6)
    assert found.dtype == torch.float32


def test_declared_rewards_are_opened_and_scored(tmp_path: Path) -> None:
    context = reading(tmp_path, trained(tmp_path))
    policy = policy_of(context)
    rewards = [
        Reward.model_validate({"stage": "reward", "weight": 2.0}),
        Reward.model_validate({"rule": "length", "weight": -0.5}),
    ]
    opened = open_rewards(context, rewards, policy, ranks=Ranks(), device=CPU, precision="float32")
    found = opened.score(answers())
    assert opened.names == ["reward", "length"]
    assert found.components["length"].tolist() == [0, 1, 2, 3, 4, 5]
    assert float(found.components["reward"].std()) > 0
    total = 2 * found.components["reward"].double() - 0.5 * found.components["length"].double()
    assert torch.equal(found.total, total.float())

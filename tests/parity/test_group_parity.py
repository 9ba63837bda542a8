"""GRPO and RLOO against trl: two updates on one rollout, by our losses token by token and by the stages' own objective."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.policy_gradient import PolicyObjective
from plumbline_trainer.losses.advantages import AdvantageScale, group_advantages, leave_one_out
from plumbline_trainer.losses.kl import kl_estimate
from plumbline_trainer.losses.policy_gradient import clipped_policy_loss
from support import group_peer, learning, peer
from support.group_peer import Step
from support.ppo_peer import token_logs
from support.tiny import Style, make_model, make_tokenizer
from torch import Tensor

TOLERANCE = 1e-4
"""Float32, padded against packed forward passes; of gradients relative to their norm."""
LENGTHS = [[5, 1, 3, 7], [2, 6, 4, 4], [7, 7, 1, 2]]


@dataclass(frozen=True)
class Answers:
    """A rollout of three prompts with four answers each."""

    prompts: list[list[int]]
    groups: list[list[list[int]]]
    scores: list[list[float]]

    @property
    def flat(self) -> list[list[int]]:
        return [ids for group in self.groups for ids in group]


def make_answers() -> Answers:
    rng, tokenizer = random.Random(4), make_tokenizer()
    ids = range(2 + max(tokenizer.eos_token_id, tokenizer.pad_token_id), len(tokenizer))
    return Answers(
        [rng.choices(ids, k=rng.randint(3, 9)) for _ in LENGTHS],
        [
            [[*rng.choices(ids, k=length - 1), tokenizer.eos_token_id] for length in group]
            for group in distinct(LENGTHS)
        ],
        [[round(rng.gauss(0, 1), 3) for _ in group] for group in LENGTHS],
    )


def distinct(lengths: list[list[int]]) -> list[list[int]]:
    """An answer of one token is the end token alone; the second such one gets another."""
    seen = 0
    result = []
    for group in lengths:
        result.append([])
        for length in group:
            seen += length == 1
            result[-1].append(2 if length == 1 and seen > 1 else length)
    return result


def make_models(style: Style) -> tuple[Any, Any]:
    """A policy that has moved away from its reference."""
    policy, reference = make_model(style, seed=5), make_model(style, seed=5)
    rng = torch.Generator().manual_seed(9)
    for parameter in policy.parameters():
        parameter.data += torch.randn(parameter.shape, generator=rng) * 0.03
    return policy, reference


def gathered(step: Step, name: str, answers: Answers) -> Tensor:
    return torch.cat([value.reshape(-1) for value in step.by_answer(name, answers.flat)])


def gap_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name] - wanted[name]).double().square().sum()) for name in found) ** 0.5
    return float(gap / sum(float(value.double().square().sum()) for value in wanted.values()) ** 0.5)


def check_update(scorer: Any, experience: Experience, objective: PolicyObjective, step: Step) -> dict[str, float]:
    """Loss and gradients of the stage's objective, in micro-batches, against trl's."""
    means = learning.policy_update(scorer, experience, objective)
    assert means["loss"] == pytest.approx(step.held["loss"].item(), rel=TOLERANCE, abs=1e-6)
    ours = peer.gradients_by_name(scorer.model)
    assert gap_of(ours, step.gradients) <= TOLERANCE
    return means


@dataclass(frozen=True)
class Grpo:
    style: Style
    scale: AdvantageScale
    loss_over: Literal["tokens", "answers"]
    beta: float
    temperature: float
    clip_high: float
    rate: float


GRPO = {
    "defaults of DAPO": Grpo("llama", "group", "tokens", 0.0, 0.7, 0.28, 1.0),
    "paper, with KL": Grpo("qwen2", "batch", "answers", 0.1, 1.0, 0.2, 1.0),
    "without scaling": Grpo("llama", "none", "tokens", 0.05, 1.3, 0.2, 1.0),
}


@pytest.mark.parametrize("name", GRPO)
def test_two_updates_of_grpo(tmp_path: Path, name: str) -> None:
    settings, answers = GRPO[name], make_answers()
    policy, reference = make_models(settings.style)
    steps = group_peer.two_updates(
        "grpo",
        tmp_path,
        policy,
        reference,
        answers.prompts,
        answers.groups,
        answers.scores,
        rate=settings.rate,
        beta=settings.beta,
        temperature=settings.temperature,
        epsilon=0.2,
        epsilon_high=settings.clip_high,
        scale_rewards=settings.scale,
        loss_type={"tokens": "dapo", "answers": "grpo"}[settings.loss_over],
        use_bias_correction_kl=False,
    )
    scores = torch.tensor(answers.scores)
    std = scores.std() if settings.scale == "batch" else None
    advantages = torch.cat([group_advantages(group, scale=settings.scale, std=std) for group in scores])
    assert gathered(steps[0], "inputs.advantages", answers).tolist() == pytest.approx(advantages.tolist(), abs=1e-5)

    experience = learning.experience_of(answers.prompts, answers.groups)
    scorer = learning.scorer_of(policy, settings.temperature)
    experience.old = learning.log_probabilities(scorer, experience)
    experience.reference = learning.log_probabilities(learning.scorer_of(reference, settings.temperature), experience)
    objective = PolicyObjective(
        experience,
        experience.spread(advantages),
        clip_low=0.2,
        clip_high=settings.clip_high,
        loss_over=settings.loss_over,
        kl_coefficient=settings.beta,
    )
    for number, step in enumerate(steps):
        new = learning.log_probabilities(scorer, experience)
        terms = clipped_policy_loss(
            new, experience.old, experience.spread(advantages), clip_low=0.2, clip_high=settings.clip_high
        )
        losses = terms.loss + settings.beta * kl_estimate(new, experience.reference, "k3")
        assert torch.allclose(new, gathered(step, "per_token_logps", answers), atol=TOLERANCE)
        assert torch.allclose(losses, gathered(step, "per_token_loss", answers), rtol=TOLERANCE, atol=TOLERANCE)
        assert terms.clipped.any() == bool(number), "a ratio of 1 clips nothing; after a step some are clipped"
        assert not terms.clipped.all()
        means = check_update(scorer, experience, objective, step)
        assert means["ratioGap"] == pytest.approx(0, abs=1e-5) if not number else means["ratioGap"] > 0.05
        learning.descend(scorer, settings.rate)


RLOO_RATE = 0.1


@pytest.mark.parametrize("style", ["llama", "qwen2"])
def test_two_updates_of_rloo(tmp_path: Path, style: Style) -> None:
    """KL is in the reward, the ratio is that of whole answers."""
    answers, beta, temperature = make_answers(), 0.3, 0.7
    policy, reference = make_models(style)
    steps = group_peer.two_updates(
        "rloo",
        tmp_path,
        policy,
        reference,
        answers.prompts,
        answers.groups,
        answers.scores,
        rate=RLOO_RATE,
        beta=beta,
        temperature=temperature,
        epsilon=0.2,
    )
    experience = learning.experience_of(answers.prompts, answers.groups)
    scorer = learning.scorer_of(policy, temperature)
    experience.old = learning.log_probabilities(scorer, experience)
    experience.reference = learning.log_probabilities(learning.scorer_of(reference, temperature), experience)
    divergences = experience.sums(kl_estimate(experience.old, experience.reference, "k1"))
    rewards = torch.tensor(answers.scores).flatten() - beta * divergences
    advantages = torch.cat([leave_one_out(group) for group in torch.split(rewards, 4)])
    theirs = gathered(steps[0], "inputs.advantages", answers)
    assert theirs.tolist() == pytest.approx(advantages.tolist(), abs=1e-4)
    assert divergences.abs().min() > 1e-3, "KL must count, or its place in the reward is not checked"

    objective = PolicyObjective(experience, advantages, clip_low=0.2, clip_high=0.2, whole_answers=True)
    for number, step in enumerate(steps):
        new = learning.log_probabilities(scorer, experience)
        terms = clipped_policy_loss(
            experience.sums(new), experience.sums(experience.old), advantages, clip_low=0.2, clip_high=0.2
        )
        losses = gathered(step, "per_sequence_loss", answers)
        assert torch.allclose(terms.loss, losses, rtol=TOLERANCE, atol=TOLERANCE)
        assert terms.clipped.any() == bool(number)
        assert not terms.clipped.all()
        check_update(scorer, experience, objective, step)
        learning.descend(scorer, RLOO_RATE)


def test_trl_weighs_the_divergence_by_the_ratio_and_we_take_the_papers_term(tmp_path: Path) -> None:
    """GRPO's loss (Shao et al. 2024, eq. 3 and 4) has k3 as it is, which is ours; trl 1.16 multiplies it by π/π_old.

    On the rollout's own policy that changes no value, only the gradient, which becomes that of KL(π ‖ π_ref). With us k2
    has that gradient (tests/unit/trainer/test_kl.py).
    """
    answers, beta = make_answers(), 0.3
    policy, reference = make_models("llama")
    (first, _) = group_peer.two_updates(
        "grpo", tmp_path, policy, reference, answers.prompts, answers.groups, answers.scores, rate=0.0, beta=beta
    )
    experience = learning.experience_of(answers.prompts, answers.groups)
    pairs = list(zip([prompt for prompt in answers.prompts for _ in range(4)], answers.flat, strict=True))
    with torch.no_grad():
        refs = torch.cat([token_logs(reference, *pair, 1.0) for pair in pairs])
    advantages = torch.cat([group_advantages(group, scale="group") for group in torch.tensor(answers.scores)])
    gaps = {}
    for weighted in (True, False):
        policy.zero_grad()
        new = torch.cat([token_logs(policy.requires_grad_(True), *pair, 1.0) for pair in pairs])
        terms = clipped_policy_loss(new, new.detach(), experience.spread(advantages), clip_low=0.2, clip_high=0.2)
        divergence = kl_estimate(new, refs, "k3") * (torch.exp(new - new.detach()) if weighted else 1.0)
        loss = (terms.loss + beta * divergence).mean()
        assert loss.item() == pytest.approx(first.held["loss"].item(), rel=TOLERANCE, abs=1e-6)
        loss.backward()
        gaps[weighted] = gap_of(peer.gradients_by_name(policy), first.gradients)
    assert gaps[True] <= TOLERANCE
    assert gaps[False] > 1e-2


def test_trl_counts_padding_as_places_and_we_do_not(tmp_path: Path) -> None:
    """Trap 18: prompts are padded left without positions of their own, which a model with absolute ones (gpt2) feels."""
    answers = make_answers()
    policy, reference = make_models("gpt2")
    (first, _) = group_peer.two_updates(
        "grpo", tmp_path, policy, reference, answers.prompts, answers.groups, answers.scores, rate=0.0, beta=0.0
    )
    longest = max(len(prompt) for prompt in answers.prompts)
    for prompt, group in zip(answers.prompts, answers.groups, strict=True):
        with torch.no_grad():
            alone = torch.cat([token_logs(policy, prompt, answer, 1.0) for answer in group])
        gap = (torch.cat(first.by_answer("per_token_logps", group)) - alone).abs().max()
        assert gap > 0.1 if len(prompt) < longest else gap <= TOLERANCE
    experience = learning.experience_of(answers.prompts, answers.groups)
    with torch.no_grad():
        pairs = zip([prompt for prompt in answers.prompts for _ in range(4)], answers.flat, strict=True)
        plain = torch.cat([token_logs(policy, *pair, 1.0) for pair in pairs])
    packed = learning.log_probabilities(learning.scorer_of(policy, 1.0), experience)
    assert torch.allclose(packed, plain, atol=TOLERANCE)


def test_trl_leaves_dropout_on_and_ours_is_off(tmp_path: Path) -> None:
    """Trap 12: with a model that has dropout, trl's ratio before the first step is not 1; ours scores twice alike."""
    answers = make_answers()
    config = make_model("gpt2", seed=5).config
    config.resid_pdrop = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        policy = type(make_model("gpt2", seed=5))(config).eval()
    (first, _) = group_peer.two_updates(
        "grpo", tmp_path, policy, policy, answers.prompts, answers.groups, answers.scores, rate=0.0, beta=0.0
    )
    assert (gathered(first, "coef_1", answers) - 1).abs().mean() > 0.01
    experience = learning.experience_of(answers.prompts, answers.groups)
    scorer = learning.scorer_of(policy, 1.0)
    experience.old = learning.log_probabilities(scorer, experience)
    advantages = experience.spread(torch.tensor(answers.scores).flatten())
    objective = PolicyObjective(experience, advantages, clip_low=0.2, clip_high=0.2)
    assert learning.policy_update(scorer, experience, objective)["ratioGap"] <= 1e-5

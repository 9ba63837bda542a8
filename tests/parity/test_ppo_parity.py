"""PPO against trl 1.12: a rollout and two updates on it, and what trl does otherwise.

trl pads every answer to the longest, and treats one that ends before that in a way of its own (the second half of this
page). Where all answers have the full length, that makes no difference, and everything must agree: rewards, advantages,
returns, the losses of every token, and the gradients of policy and critic, at a ratio of 1 and after a step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_trainer.engine.policy_gradient import PolicyObjective, ValueObjective
from plumbline_trainer.losses.advantages import gae, penalise_unfinished, token_rewards, whiten
from plumbline_trainer.losses.kl import KlEstimator, kl_estimate
from plumbline_trainer.losses.policy_gradient import clipped_policy_loss, clipped_value_loss
from support import learning, ppo_peer
from support.ppo_peer import Case, Models, Observed, Rollout
from support.tiny import Style, make_model
from torch import Tensor

pytestmark = pytest.mark.timeout(1800)  # trl's side of all cases runs in the first test's fixture
TOLERANCE = 1e-5
"""Float32, padded against unpadded forward passes."""


@dataclass(frozen=True)
class Settings:
    """Fields of trl's PPOConfig that we state too."""

    kl_estimator: KlEstimator = "k1"
    kl_coef: float = 0.3
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    temperature: float = 0.7
    whiten_rewards: bool = False


@dataclass(frozen=True)
class Estimated:
    """By answer."""

    rewards: list[Tensor]
    advantages: list[Tensor]
    """Whitened."""
    returns: list[Tensor]


def estimate(theirs: Observed, lengths: list[int], settings: Settings) -> Estimated:
    """Our advantages, from trl's log-probabilities, values and scores."""
    rows = range(len(lengths))
    rewards = [
        token_rewards(
            kl_estimate(
                theirs.row("logprobs", i, lengths[i]), theirs.row("ref_logprobs", i, lengths[i]), settings.kl_estimator
            ),
            theirs.held["scores"][i].item(),
            settings.kl_coef,
        )
        for i in rows
    ]
    if settings.whiten_rewards:
        rewards = list(torch.split(whiten(torch.cat(rewards), shift_mean=False), lengths))
    pairs = [gae(rewards[i], theirs.row("values", i, lengths[i]), gamma=settings.gamma, lam=settings.lam) for i in rows]
    advantages = torch.split(whiten(torch.cat([advantages for advantages, _ in pairs])), lengths)
    return Estimated(rewards, list(advantages), [returns for _, returns in pairs])


@dataclass(frozen=True)
class Update:
    """One step of ours."""

    policy_loss: Tensor
    """[N]"""
    value_loss: Tensor
    """[N]"""
    policy_clipped: Tensor
    value_clipped: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def update(models: Models, rollout: Rollout, theirs: Observed, found: Estimated, settings: Settings) -> Update:
    """Losses and gradients at the models as they are, then plain gradient descent."""
    pairs = list(zip(rollout.prompts, rollout.answers, strict=True))
    new = torch.cat([ppo_peer.token_logs(models.policy, *pair, settings.temperature) for pair in pairs])
    values = torch.cat([ppo_peer.token_values(models.critic, *pair)[:-1] for pair in pairs])
    old, old_values = (
        torch.cat([theirs.row(name, i, length) for i, length in enumerate(rollout.lengths)])
        for name in ("logprobs", "values")
    )
    terms = clipped_policy_loss(
        new, old, torch.cat(found.advantages), clip_low=settings.cliprange, clip_high=settings.cliprange
    )
    value_loss, value_clipped = clipped_value_loss(
        values, old_values, torch.cat(found.returns), clip=settings.cliprange_value
    )
    loss = terms.loss.mean() + settings.vf_coef * value_loss.mean()
    named = {
        f"{kind}.{name}": parameter
        for kind in ("policy", "critic")
        for name, parameter in getattr(models, kind).named_parameters()
    }
    for parameter in named.values():
        parameter.grad = None
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    with torch.no_grad():
        for name, gradient in gradients.items():
            named[name] -= RATE * gradient
    return Update(terms.loss.detach(), value_loss.detach(), terms.clipped, value_clipped, loss.detach(), gradients)


def gap_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name] - wanted[name]).double().square().sum()) for name in found) ** 0.5
    return float(gap / sum(float(wanted[name].double().square().sum()) for name in found) ** 0.5)


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


RATE = 0.5
"""Of the step between two updates: large enough that ratios and values leave their clips."""
FULL = {
    "llama, k1": ("llama", Settings()),
    "gpt2, k3, rewards whitened": (
        "gpt2",
        Settings(kl_estimator="k3", gamma=0.9, lam=0.5, temperature=1.0, whiten_rewards=True),
    ),
}
"""Cases in which every answer has the full length."""
ALL_SIX = ppo_peer.make_rollout([6] * 8, 6)
SIX_END = ppo_peer.make_rollout([6, 2, 4, 6, 3, 5, 1, 4], 6)
"""Six of eight answers end before the longest."""
PENALTY = 1.5


def case(style: Style, rollout: Rollout, settings: Settings, *, ranks: int = 1, **more: Any) -> Case:
    return Case(ppo_peer.make_models(style), rollout, RATE, {"num_ppo_epochs": 1, **asdict(settings), **more}, ranks)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    """trl's side of everything below, in one process."""
    cases = {name: case(style, ALL_SIX, settings, num_ppo_epochs=2) for name, (style, settings) in FULL.items()}
    cases["ended"] = case("llama", SIX_END, Settings(), missing_eos_penalty=PENALTY)
    cases["ended, micro-batches"] = case(
        "llama",
        SIX_END,
        Settings(),
        missing_eos_penalty=PENALTY,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    cases["two ranks"] = case("llama", ALL_SIX, Settings(), ranks=2)
    return ppo_peer.observe(tmp_path_factory.mktemp("trl"), cases)


@pytest.mark.parametrize("name", FULL)
def test_one_rollout_and_two_updates(theirs: dict[str, Observed], name: str) -> None:
    style, settings = FULL[name]
    rollout, models, peer = ALL_SIX, ppo_peer.make_models(style), theirs[name]

    pairs = list(zip(rollout.prompts, rollout.answers, strict=True))
    for index, pair in enumerate(pairs):
        with torch.no_grad():
            for held, model in {"logprobs": models.policy, "ref_logprobs": models.reference}.items():
                assert close(ppo_peer.token_logs(model, *pair, settings.temperature), peer.held[held][index]), held
            assert close(ppo_peer.token_values(models.critic, *pair)[:-1], peer.held["values"][index])
            assert close(ppo_peer.token_values(models.reward, *pair)[-1], peer.held["scores"][index])

    found = estimate(peer, rollout.lengths, settings)
    for part in ("rewards", "advantages", "returns"):
        assert close(torch.stack(getattr(found, part)), peer.held[part], 1e-4), part

    assert len(peer.steps) == 2
    for number, step in enumerate(peer.steps):
        ours = update(models, rollout, peer, found, settings)
        assert close(ours.policy_loss, step.policy_loss.flatten(), 1e-4), number
        assert close(ours.value_loss, 0.5 * step.value_loss.flatten(), 1e-4), number
        assert ours.loss.item() == pytest.approx(step.loss, rel=1e-4, abs=1e-6)
        assert gap_of(ours.gradients, step.gradients) <= 1e-4, number
        # A ratio of 1 clips nothing; after a step both clips work, and both leave something.
        assert ours.policy_clipped.any() == ours.value_clipped.any() == bool(number)
        assert not ours.policy_clipped.all()
        assert not ours.value_clipped.all()


@pytest.mark.parametrize("name", FULL)
def test_two_updates_by_the_stages_own_objective(theirs: dict[str, Observed], name: str) -> None:
    """Packed, in micro-batches, the critic as a scalar head on a causal model: the same losses and gradients."""
    style, settings = FULL[name]
    models, peer = ppo_peer.make_models(style), theirs[name]
    experience = learning.experience_of(ALL_SIX.prompts, [[answer] for answer in ALL_SIX.answers])
    scorer = learning.scorer_of(models.policy, settings.temperature)
    critic = learning.critic_of(models.critic, make_model(style))
    experience.old = learning.log_probabilities(scorer, experience)
    experience.values = learning.values_of(critic, experience)
    assert close(experience.old, peer.held["logprobs"].flatten(), 1e-4)
    assert close(experience.values, peer.held["values"].flatten(), 1e-4)
    found = estimate(peer, ALL_SIX.lengths, settings)
    policy_objective = PolicyObjective(
        experience, torch.cat(found.advantages), clip_low=settings.cliprange, clip_high=settings.cliprange
    )
    value_objective = ValueObjective(experience, torch.cat(found.returns), settings.cliprange_value, settings.vf_coef)
    for step in peer.steps:
        means = learning.policy_update(scorer, experience, policy_objective)
        loss = (
            means["loss"] + settings.vf_coef * learning.value_update(critic, experience, value_objective)["valueLoss"]
        )
        assert loss == pytest.approx(step.loss, rel=1e-4, abs=1e-6)
        gradients = {f"policy.{key}": p.grad for key, p in models.policy.named_parameters() if p.grad is not None}
        gradients |= {f"critic.{key}": p.grad for key, p in critic.model.named_parameters() if p.grad is not None}
        gradients["critic.score.weight"] = critic.heads.weight.grad
        assert gap_of(gradients, step.gradients) <= 1e-4
        for trained in (scorer, critic):
            learning.descend(trained, RATE)


@pytest.mark.parametrize("name", FULL)
def test_what_the_stage_makes_of_a_rollout(tmp_path: Path, theirs: dict[str, Observed], name: str) -> None:
    """The stage itself, with the answers and scores given: trl's log-probabilities, values, advantages and returns."""
    style, settings = FULL[name]
    models, peer = ppo_peer.make_models(style), theirs[name]
    scores = [[score] for score in peer.held["scores"].tolist()]
    order, experience, policy, value = learning.stage_objectives(
        tmp_path,
        "ppo",
        {
            "kl": {"coefficient": settings.kl_coef, "estimator": settings.kl_estimator},
            "rollout": {"temperature": settings.temperature, "maxNewTokens": 6},
            "gamma": settings.gamma,
            "gaeLambda": settings.lam,
            "whitenRewards": settings.whiten_rewards,
        },
        (ALL_SIX.prompts, [[answer] for answer in ALL_SIX.answers], scores),
        policy=models.policy,
        reference=models.reference,
        critic=models.critic,
    )
    assert value is not None
    assert experience.values is not None
    found = {
        "logprobs": experience.old,
        "ref_logprobs": experience.reference,
        "values": experience.values,
        "advantages": policy.advantages,
        "returns": value.returns,
    }
    for part, ours in found.items():
        assert close(ours, peer.held[part][order].flatten(), 1e-3 if part == "advantages" else 1e-4), part
    assert policy.clip_low == policy.clip_high == value.clip == settings.cliprange
    assert value.coefficient == settings.vf_coef


def as_trl_has_it(peer: Observed) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rewards, advantages and returns by our functions, with trl's step after the end of an answer that ended early."""
    settings, result = Settings(), []
    for index, length in enumerate(SIX_END.lengths):
        own = kl_estimate(peer.row("logprobs", index, length), peer.row("ref_logprobs", index, length), "k1")
        late = torch.zeros(int(length < SIX_END.longest))
        rewards = token_rewards(torch.cat([own, late]), peer.held["scores"][index].item(), settings.kl_coef)
        values = peer.row("values", index, len(rewards))
        result.append((rewards, *gae(rewards, values, gamma=settings.gamma, lam=settings.lam)))
    return result


def test_the_penalty_of_answers_without_an_end(theirs: dict[str, Observed]) -> None:
    with torch.no_grad():
        reward, pairs = ppo_peer.make_models("llama").reward, zip(SIX_END.prompts, SIX_END.answers, strict=True)
        scores = torch.stack([ppo_peer.token_values(reward, *pair)[-1] for pair in pairs])
    finished = torch.tensor([length < SIX_END.longest for length in SIX_END.lengths])
    assert 0 < finished.sum() < len(finished)
    assert close(penalise_unfinished(scores, finished, penalty=PENALTY), theirs["ended"].held["scores"])


def test_trl_puts_the_score_one_step_after_the_end_and_we_at_the_last_action(theirs: dict[str, Observed]) -> None:
    """Trap 15. At the last action, as OpenRLHF and verl have it, its return is its own reward, whatever λ and V."""
    peer, settings = theirs["ended"], Settings()
    ours = estimate(peer, SIX_END.lengths, settings)
    for index, (length, (rewards, _, returns)) in enumerate(zip(SIX_END.lengths, as_trl_has_it(peer), strict=True)):
        assert close(rewards, peer.row("rewards", index, len(rewards))), "trl's form, by our functions"
        assert close(returns, peer.row("returns", index, len(rewards)), 1e-4)
        score = peer.held["scores"][index].item()
        kl = (peer.held["logprobs"] - peer.held["ref_logprobs"])[index, length - 1].item()
        assert ours.rewards[index][-1].item() == pytest.approx(score - settings.kl_coef * kl, abs=1e-5)
        assert ours.returns[index][-1].item() == pytest.approx(score - settings.kl_coef * kl, abs=1e-5)
        if length < SIX_END.longest:
            assert peer.held["rewards"][index, length - 1].item() == pytest.approx(-settings.kl_coef * kl, abs=1e-5)
            assert peer.held["rewards"][index, length].item() == pytest.approx(score, abs=1e-6)
            assert abs(returns[length - 1] - ours.returns[index][-1]) > 1e-3


def test_trl_trains_the_critic_after_the_end_and_we_on_actions_only(theirs: dict[str, Observed]) -> None:
    """The value of a state in which nothing is done any more: one more term for each answer that ended early."""
    peer, settings = theirs["ended"], Settings()
    (step,) = peer.steps
    their_form = []
    for index, (length, (_, _, returns)) in enumerate(zip(SIX_END.lengths, as_trl_has_it(peer), strict=True)):
        assert len(returns) == length + (length < SIX_END.longest)
        values = peer.row("values", index, len(returns))
        loss, _ = clipped_value_loss(values, values, returns, clip=settings.cliprange_value)
        assert close(loss, 0.5 * step.value_loss[index, : len(returns)], 1e-4)
        their_form.append(loss)
    value = torch.cat(their_form).mean().item()
    policy = (step.policy_loss * ~peer.held["padding_mask"]).sum().item() / sum(SIX_END.lengths)
    assert step.loss == pytest.approx(policy + settings.vf_coef * value, rel=1e-4, abs=1e-6)

    ours = update(
        ppo_peer.make_models("llama"), SIX_END, peer, estimate(peer, SIX_END.lengths, settings), settings
    ).value_loss
    assert len(ours) == sum(SIX_END.lengths) == len(torch.cat(their_form)) - 6
    assert ours.mean().item() != pytest.approx(value, rel=1e-2)


def test_trl_whitens_the_same_tokens_but_other_advantages(theirs: dict[str, Observed]) -> None:
    """Its step after the end is left out of the mean and the deviation, and yet moves every advantage before it."""
    peer = theirs["ended"]
    raw = [advantages[:length] for length, (_, advantages, _) in zip(SIX_END.lengths, as_trl_has_it(peer), strict=True)]
    whitened = torch.cat([peer.row("advantages", index, length) for index, length in enumerate(SIX_END.lengths)])
    assert close(whiten(torch.cat(raw)), whitened, 1e-4)
    ours = torch.cat(estimate(peer, SIX_END.lengths, Settings()).advantages)
    assert (ours - whitened).abs().max() > 1e-2


def test_trl_fills_padding_with_a_sentinel_and_we_have_no_padding(theirs: dict[str, Observed]) -> None:
    """Trap 16: log-probability 1, of policy and reference alike, in every mean over the whole rectangle."""
    peer = theirs["ended"]
    pads = peer.held["padding_mask"]
    assert pads.sum().item() == pads.numel() - sum(SIX_END.lengths) > 0
    for name in ("logprobs", "ref_logprobs"):
        assert (peer.held[name][pads] == 1.0).all()
        assert (peer.held[name][~pads] < 0).all()


def test_trl_averages_over_the_tokens_of_a_micro_batch_and_we_over_those_of_the_step(
    theirs: dict[str, Observed],
) -> None:
    """Traps 5 and 6: a token of a short micro-batch counts for more. Four micro-batches of two answers each.

    (The last batch of trl's loader is not accumulated either: accelerate lets every micro-batch of it take a step.)
    """
    peer = theirs["ended, micro-batches"]
    assert close(peer.held["advantages"], theirs["ended"].held["advantages"], 1e-4), "until the update all is equal"
    step = peer.steps[0]
    assert len(step.rows) == 2
    count, everyone = sum(SIX_END.lengths[row] for row in step.rows), sum(SIX_END.lengths)
    assert count * 4 != everyone
    for divisor, equal in ((4 * count, True), (everyone, False)):
        policy = ppo_peer.make_models("llama").policy
        for row in step.rows:
            new = ppo_peer.token_logs(policy, SIX_END.prompts[row], SIX_END.answers[row], Settings().temperature)
            old, advantages = (peer.row(name, row, SIX_END.lengths[row]) for name in ("logprobs", "advantages"))
            terms = clipped_policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2)
            (terms.loss.sum() / divisor).backward()
        found = {f"policy.{name}": p.grad for name, p in policy.named_parameters() if p.grad is not None}
        wanted = {name: value for name, value in step.gradients.items() if name.startswith("policy.")}
        gap = gap_of(found, wanted)
        assert gap <= 1e-4 if equal else gap > 1e-2


def test_trl_whitens_each_ranks_share_and_we_the_whole_rollout(theirs: dict[str, Observed]) -> None:
    """Trap 19. Rank 0 has four of the eight answers: trl's advantages there are whitened among themselves."""
    peer, whole = theirs["two ranks"], theirs["llama, k1"]
    assert peer.held["advantages"].shape == (4, 6)
    assert close(torch.stack(estimate(peer, [6] * 4, Settings()).advantages), peer.held["advantages"], 1e-4)
    rows = [ALL_SIX.answers.index(answer) for answer in peer.held["responses"].tolist()]
    ours = torch.stack(estimate(whole, [6] * 8, Settings()).advantages)[rows]
    assert (ours - peer.held["advantages"]).abs().max() > 1e-2

"""What stages that learn from their own answers load, build and save alike."""

from __future__ import annotations

import copy

from plumbline_api.online import KlPenalty, OnlineStage

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.critic import Critic, save_critic
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.online import OnlineRun
from plumbline_trainer.engine.prompts import Prompts
from plumbline_trainer.engine.recomputation import computes_again
from plumbline_trainer.engine.scorer import Scorer, prepare_modes
from plumbline_trainer.engine.trained import make_trainable, save_policy
from plumbline_trainer.engine.values import ValueScorer
from plumbline_trainer.errors import InputError
from plumbline_trainer.losses.kl import KlController
from plumbline_trainer.models.policy import Policy, load_policy
from plumbline_trainer.rewards.opening import open_rewards
from plumbline_trainer.rollout.opening import open_engine
from plumbline_trainer.watch.ending import watched
from plumbline_trainer.watch.sycophancy import open_probe


def make_learner(
    context: StageContext, policy: Policy, parameters: OnlineStage, seed: int
) -> tuple[Scorer, Scorer | None]:
    """The policy made trainable, and what KL is measured to: None where that is the policy without its adapter.

    Raises:
        InputError: if a named reference has another tokenizer.
    """
    precision = parameters.training.precision
    reference: Scorer | None = None
    if any(item.role == "reference" for item in context.run.inputs):
        named = load_policy(context, context.input("reference"), precision=precision, device=context.device)
        if named.tokenizer.digest != policy.tokenizer.digest:
            raise InputError(
                f'stage {context.run.stage}: the policy and the reference "{context.input("reference").name}" have '
                "different tokenizers or chat templates; choose a reference that was trained from the same base model"
            )
        reference = Scorer(named.model, precision=precision)
    elif parameters.lora is None:
        reference = Scorer(copy.deepcopy(policy.model), precision=precision)
    if reference is not None:
        reference.requires_grad_(False)
        reference.eval()
    model = make_trainable(policy, parameters.lora, seed, freeze=parameters.freeze)
    return Scorer(model, precision=precision), reference


def open_run(
    context: StageContext,
    ranks: Ranks,
    policy: Policy,
    scorer: Scorer,
    reference: Scorer | None,
    critic: ValueScorer | None,
    prompts: Prompts,
    parameters: OnlineStage,
    seed: int,
) -> OnlineRun:
    """The run, with rewards and the engine that samples; nothing is resumed yet."""
    training = parameters.training
    again = computes_again(
        context,
        ranks,
        scorer,
        training,
        tokens=training.token_budget,
        beside=[one for one in (reference, critic) if one is not None],
    )
    prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=again)
    rewards = open_rewards(
        context,
        parameters.rewards,
        policy,
        ranks=ranks,
        device=context.device,
        precision=parameters.training.precision,
        tokens_per_batch=parameters.training.token_budget,
    )
    engine = open_engine(
        context,
        policy,
        parameters.rollout,
        lora=parameters.lora,
        ranks=ranks,
        precision=parameters.training.precision,
    )
    probe = None
    if parameters.sycophancy is not None:
        longest = parameters.training.max_length
        probe = open_probe(context, parameters.sycophancy, policy.tokenizer, max_length=longest)
    return OnlineRun(context, ranks, scorer, reference, critic, engine, rewards, prompts, parameters, seed, probe)


def kl_controller(penalty: KlPenalty) -> KlController:
    """The weight of the KL penalty, fixed or steered to its target."""
    return KlController(penalty.coefficient, target=penalty.target, horizon=penalty.horizon)


def save_learner(
    context: StageContext,
    run: OnlineRun,
    policy: Policy,
    parameters: OnlineStage,
    prompts: Prompts,
    critic: Critic | None = None,
) -> StageOutput | None:
    """Write what was learnt and what the monitors saw, on rank 0; an aborted stage says why."""
    output = save_policy(context, run, policy, parameters.lora, prompts.encoded)
    if output is None:
        return None
    if critic is not None:
        save_critic(output.folder, critic, policy)
    return watched(output, run.course, aborted=run.state.ended or None, kept=f"after iteration {run.state.good_step}")

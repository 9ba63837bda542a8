"""What sampling and learning from it take, beyond what training takes. Estimates, and named so."""

from __future__ import annotations

from plumbline_api.online import OnlineStage, Ppo

from plumbline_trainer.planning.facts import ModelFacts


def tokens_per_prompt(parameters: OnlineStage, prompt: float) -> float:
    """Tokens that go through models for one prompt, in tokens of a forward and backward pass.

    Answers count as long as they may be; an end token makes them shorter. They go through the policy once to be
    sampled and once to be scored, through the reference, through the critic, and forward and backward, three times as
    much, in every update of policy and critic.

    Args:
        parameters: of the stage.
        prompt: tokens of a prompt, in the mean.
    """
    critics = 1 if isinstance(parameters, Ppo) else 0
    answers, epochs = getattr(parameters, "answers", 1), getattr(parameters, "update_epochs", 1)
    passes = epochs * (1 + critics) + (3 + critics) / 3
    return float((prompt + answers * parameters.rollout.max_new_tokens) * passes)


def beside_policy(parameters: OnlineStage, facts: ModelFacts) -> int:
    """Bytes of the keys and values of sampled tokens, and of the reference where it is no adapter switched off."""
    width = 2 if parameters.training.precision == "bfloat16" else 4
    per_token = 2 * facts.layers * facts.key_value_heads * facts.head_size * width
    reference = facts.parameters * width if parameters.lora is None or parameters.reference is not None else 0
    return parameters.rollout.tokens_per_batch * per_token + reference

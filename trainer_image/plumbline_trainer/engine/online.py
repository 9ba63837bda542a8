"""The loop of the stages that learn from answers which the policy gives while it trains.

An iteration is a step of such a stage: sample, score, look at the answers once without gradients, then update on them.
A checkpoint lies at an iteration's beginning, or within it with the rollout and the number of updates done, so that a
resumed run goes on with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plumbline_api.online import OnlineStage
from plumbline_api.training import Training
from torch import Tensor

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.heap import release_freed
from plumbline_trainer.engine.loop import RECENT
from plumbline_trainer.engine.online_paths import CRITIC, POLICY, choose_paths, take_paths
from plumbline_trainer.engine.online_state import Kept, OnlineState, Trained, read_online, write_online
from plumbline_trainer.engine.policy_gradient import PolicyObjective, ValueObjective
from plumbline_trainer.engine.prompts import Prompts
from plumbline_trainer.engine.schedule import epoch_order, plan_steps, random_key
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.updates import look_at, update
from plumbline_trainer.engine.values import ValueScorer
from plumbline_trainer.errors import Interrupted, TransientError
from plumbline_trainer.rewards.combining import RewardSet, Scored
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rollout.interface import RolloutEngine
from plumbline_trainer.storage.checkpoints import (
    Checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
    wait_for_uploads,
)
from plumbline_trainer.watch.abort import AbortWatch
from plumbline_trainer.watch.course import Course
from plumbline_trainer.watch.figures import held_out_figures, rollout_figures, time_shares
from plumbline_trainer.watch.stopwatch import Stopwatch
from plumbline_trainer.watch.sycophancy import Probe, measure


class OnlineRun:
    """One attempt at a stage that samples and learns."""

    def __init__(
        self,
        context: StageContext,
        ranks: Ranks,
        policy: Scorer,
        reference: Scorer | None,
        critic: ValueScorer | None,
        engine: RolloutEngine,
        rewards: RewardSet,
        prompts: Prompts,
        parameters: OnlineStage,
        seed: int,
        probe: Probe | None = None,
    ) -> None:
        """Prepare; nothing is resumed yet.

        Args:
            context: Of the stage.
            ranks: Processes that share the work.
            policy: The model that answers and learns.
            reference: What KL is measured to; None for the policy with its adapter switched off.
            critic: The value function, if there is one.
            engine: Samples answers.
            rewards: Score them.
            prompts: To answer.
            parameters: Of the stage.
            seed: Of every random choice.
            probe: For sycophancy, at evaluations.
        """
        self.probe = probe
        self.context, self.ranks, self.scorer, self.reference = context, ranks, policy, reference
        self.engine, self.rewards, self.prompts, self.parameters, self.seed = engine, rewards, prompts, parameters, seed
        self.training: Training = parameters.training
        training = self.training
        self.plan = plan_steps(
            [row.row_id for row in prompts.train],
            seed=seed,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
        )
        answers: Any = parameters
        self.answers, self.update_epochs = int(answers.answers), int(answers.update_epochs)
        steps = self.plan.steps * self.update_epochs * parameters.mini_batches
        for scorer in (policy, reference):
            if scorer is not None:
                scorer.temperature = parameters.rollout.temperature
        self.policy = Trained(policy, training, steps)
        self.critic: Trained | None = None
        if critic is not None:
            rate = answers.critic.learning_rate or training.learning_rate
            self.critic = Trained(critic, training.model_copy(update={"learning_rate": rate}), steps)
        self.watch, self.course = AbortWatch(prompts.abort_rules), Course()
        self.kept: dict[str, Kept] = {"rewards": rewards, "watch": self.watch, "course": self.course}
        self.state = OnlineState()
        self.tokens_here = 0
        self.good: dict[str, Tensor] = {}
        """Weights that the stage would yield if it were aborted; kept where there are stop rules."""
        self._experience: Experience | None = None
        self._stopwatch = Stopwatch()
        self._committed: tuple[int, int, bool] = (0, 0, False)
        self._checkpoint: Checkpoint | None = load_latest_checkpoint(context)
        if not ranks.same(self._checkpoint.step if self._checkpoint is not None else -1):
            raise RuntimeError("ranks found different checkpoints; the next attempt reads them again")
        self.first_step = 0

    # Where the stage stands

    def resume(self, **kept: Kept) -> None:
        """Take up the checkpoint, if there is one.

        Args:
            kept: What the stage itself keeps, by name.
        """
        self.kept |= kept
        if self.watch.rules:
            self.good = self.policy.copies()
        if self._checkpoint is None:
            return
        self.state, self.good, rollout = read_online(self._checkpoint.folder, self._models, self.kept)
        take_paths(self._models, self.reference, self.state)
        if rollout is not None:
            prompts = self._prompts_of(self.state.step)
            self._experience = Experience.restored(prompts, self.training.token_budget, rollout)
        self.first_step = self.state.step
        self._committed = (self.state.step, self.state.updates, self._experience is not None)

    def rollouts(self) -> Iterator[Experience]:
        """The rollouts of the iterations that are left, each to learn from and to `close`.

        Between them held-out prompts are answered. The first may be the one of a checkpoint. Where a stop rule's window
        is full the stage ends with the last good weights.
        """
        while not self.state.ended:
            step = self.state.step
            if self._experience is None and self._evaluation_due(step):
                self._evaluate()
                if self.state.ended:
                    break
            if step == self.plan.steps:
                break
            self.leave_if_stopped()
            experience = self._experience or self._roll_out()
            if not self.state.ended:
                yield experience
        if self.state.ended:
            self._put_good_back()
        wait_for_uploads(self.context)
        self.ranks.wait()

    def leave_if_stopped(self) -> None:
        """End the attempt if SIGTERM came to any rank.

        Raises:
            Interrupted: after everything done so far is committed.
        """
        if not self.ranks.any(self.context.stop.requested):
            return
        self._leave()

    def _score(self, candidates: Sequence[Candidate], *, held_out: bool = False) -> Scored:
        """What the rewards say.

        Raises:
            Interrupted: on SIGTERM, after everything done so far is committed.
            TransientError: where an endpoint does not answer, after everything done so far is committed.
        """
        try:
            return self.rewards.score(candidates, ranks=self.ranks, held_out=held_out)
        except TransientError:
            self.leave_if_stopped()
            self._commit()
            raise

    def _leave(self) -> None:
        self._commit()
        raise Interrupted(self.state.step)

    def _commit(self) -> None:
        here = (self.state.step, self.state.updates, self._experience is not None)
        if here != self._committed and here > (0, 0, False):
            self._save()
        wait_for_uploads(self.context)
        self.ranks.wait()

    # An iteration

    def _roll_out(self) -> Experience:
        """Answers to the iteration's prompts with everything that is known of them."""
        self._stopwatch = Stopwatch()
        step, parameters = self.state.step, self.parameters
        prompts = self._prompts_of(step)
        seed = random_key(self.seed, "rollout", step)
        with self._stopwatch.timing("generating"):
            samples = self.engine.sample(
                [self.prompts.to_answer(row) for row in prompts],
                answers=self.answers,
                seed=seed,
                at_step=self._at_sampling,
            )
        self.leave_if_stopped()
        release_freed()  # by sampling
        found = Experience(prompts, samples, self.training.token_budget)
        with self._stopwatch.timing("scoring"):
            self._tell("scoring answers")
            scored = self._score(self.prompts.candidates(prompts, samples))
            found.scores, found.components = scored.total, scored.components
            found.shape(clip=parameters.score_clip, missing_end_penalty=parameters.missing_end_penalty)
            if self.state.path is None:
                self._tell("comparing the fast path with the plain one")
                tokens = self.training.token_budget
                choose_paths(self.context, self.ranks, self._models, self.state, found.all_rows, tokens=tokens)
                take_paths(self._models, self.reference, self.state)
            look_at(
                found,
                self.scorer,
                self.reference,
                None if self.critic is None else self.critic.scorer,
                tokens_per_batch=self.training.token_budget,
                ranks=self.ranks,
            )
        self.state.figures = self.course.observe(rollout_figures(found.watched))
        # They speak of the weights that sampled, and these are there now.
        self._observe(self.state.figures)
        self._experience = found
        if (step + 1) % self.training.checkpoint_every_steps == 0:
            self._save()
        self.leave_if_stopped()
        return found

    def learn(
        self, experience: Experience, objective: PolicyObjective, value_objective: ValueObjective | None = None
    ) -> dict[str, float]:
        """All updates on a rollout that are left, in an order that the seed and the iteration give.

        Returns:
            Means over all updates on the rollout; `ratioAtStart` is from before the first.

        Raises:
            InputError: if a loss or a gradient is no longer finite.
            RuntimeError: if the policy before its first update is not the one that sampled.
        """
        per_epoch, state = self.parameters.mini_batches, self.state
        names = tuple(str(index) for index in range(len(experience.prompts)))
        seed = random_key(self.seed, "updates", state.step)
        with self._stopwatch.timing("training"):
            while state.updates < self.update_epochs * per_epoch:
                self.leave_if_stopped()
                self._tell(f"update {state.updates + 1} of {self.update_epochs * per_epoch}")
                epoch, number = divmod(state.updates, per_epoch)
                order = epoch_order(names, seed, epoch)
                members = order[number * len(order) // per_epoch : (number + 1) * len(order) // per_epoch]
                rows = [row for index in members for row in experience.rows[index]]
                if rows:
                    found = update(
                        rows,
                        self.policy,
                        objective,
                        self.critic,
                        value_objective,
                        tokens_per_batch=self.training.token_budget,
                        ranks=self.ranks,
                        iteration=state.step + 1,
                        is_first=not state.seen,
                    )
                    state.seen.append(found)
                state.updates += 1
        means = {name: sum(item[name] for item in state.seen) / len(state.seen) for name in state.seen[0]}
        means.pop("ratioGap")
        return {**means, "ratioAtStart": state.seen[0]["ratioGap"]}

    def close(self, figures: Mapping[str, float]) -> None:
        """End the iteration: report its figures, look at the stop rules, perhaps write a checkpoint."""
        assert self._experience is not None
        tokens = self._experience.tokens
        later = self.course.observe({**figures, **time_shares(**self._stopwatch.spent)})
        record = {**self.state.figures, **later, "tokensPerSecond": tokens / self._stopwatch.seconds}
        self.state.tokens += tokens
        self.tokens_here += tokens
        self.state.step += 1
        self.state.updates, self.state.seen = 0, []
        self._experience = None
        self.state.recent = [*self.state.recent, record][-RECENT:]
        self._report(record)
        self._observe(later, speak_of_weights=False)

    def _observe(self, figures: Mapping[str, float], *, speak_of_weights: bool = True) -> None:
        """Show figures to the stop rules; the weights are kept where the rules know them to be good."""
        if not self.watch.rules:
            return
        self.watch.observe(figures)
        if self.watch.reason is not None:
            self.state.ended = self.watch.reason
        elif speak_of_weights and self.watch.good:
            self.good, self.state.good_step = self.policy.copies(), self.state.step

    def _put_good_back(self) -> None:
        """Yield the last good weights."""
        message = f"aborted after iteration {self.state.step} of {self.plan.steps}: {self.state.ended}"
        if self.ranks.is_main:
            self.context.log.warning("%s; the output is the weights after iteration %d", message, self.state.good_step)
        self.policy.put(self.good)

    # Held-out prompts

    def _evaluation_due(self, step: int) -> bool:
        if not (self.prompts.held_out or self.probe is not None) or self.state.evaluated == step:
            return False
        every = self.training.evaluate_every_steps
        return step in (0, self.plan.steps) or (every is not None and step % every == 0)

    def _evaluate(self) -> None:
        """Rewards of the answers to held-out prompts, always with the same random numbers, and the probe."""
        figures = self._held_out() if self.prompts.held_out else {}
        if self.probe is not None:
            self._tell("probing for sycophancy")
            with self.scorer.at_temperature(1.0):  # the policy as it is, not as it samples
                figures |= measure(
                    self.probe, self.scorer, tokens_per_batch=self.training.token_budget, ranks=self.ranks
                )
        figures = self.course.observe(figures)
        self.state.latest, self.state.evaluated = figures, self.state.step
        if self.state.step == 0:
            self.state.start = figures
        self._report(figures)
        self._observe(figures)

    def _held_out(self) -> dict[str, float]:
        rows = self.prompts.held_out
        self._tell("answering held-out prompts")
        samples = self.engine.sample(
            [self.prompts.to_answer(row) for row in rows],
            answers=1,
            seed=random_key(self.seed, "evaluation"),
            at_step=self._at_sampling,
        )
        self.leave_if_stopped()
        scored = self._score(self.prompts.candidates(rows, samples), held_out=True)
        return held_out_figures(
            total=scored.total,
            gold=scored.gold,
            lengths=[len(group[0].ids) for group in samples],
            finished=[group[0].finished for group in samples],
            prompts=[row.group for row in rows],
        )

    # What is told

    @property
    def last_step(self) -> int:
        """Iterations that are done."""
        return self.state.step

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Figures at the end, with counts of what became of prompts and weights."""
        return self.state.figures_at_end(counts, may_be_aborted=bool(self.watch.rules))

    def _report(self, figures: Mapping[str, float]) -> None:
        if self.ranks.is_main:
            step, steps = self.state.step, self.plan.steps
            self.context.progress.update(step, steps, metrics=dict(figures))
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self.context.log.info("iteration %d/%d  %s", step, steps, shown)

    def _tell(self, message: str) -> None:
        if self.ranks.is_main:
            self.context.progress.update(self.state.step, self.plan.steps, message)

    def _at_sampling(self, share: float) -> None:
        self._tell(f"sampling answers, {share:.0%}")
        # Ranks sample unlike numbers of tokens, so that they can only leave together at the end of it.
        if self.ranks.size == 1 and self.context.stop.requested:
            self._leave()

    # Parts

    @property
    def _models(self) -> dict[str, Trained]:
        return {POLICY: self.policy} | ({} if self.critic is None else {CRITIC: self.critic})

    def _prompts_of(self, step: int) -> list[Encoded]:
        return [self.prompts.train[index] for index in self.plan.rows(step)]

    def _save(self) -> None:
        """Commit a checkpoint of where the stage stands; the upload goes on beside it."""
        state = self.state
        if self.ranks.is_main:
            wait_for_uploads(self.context)
            folder = self.context.scratch / "saving" / f"{state.step}-{state.updates}"
            write_online(folder, state, self._models, self.kept, self.good, self._experience)
            part = 1 + state.updates if self._experience is not None else 0
            save_checkpoint(self.context, state.step, folder, {"step": state.step}, part=part)
        self._committed = (state.step, state.updates, self._experience is not None)

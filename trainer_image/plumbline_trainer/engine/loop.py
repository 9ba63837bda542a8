"""The loop that every gradient-based stage runs: steps, evaluations, checkpoints, stops."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import torch
from plumbline_api.training import Training

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.accumulation import Measured, accumulate
from plumbline_trainer.engine.ahead import FirstBatches
from plumbline_trainer.engine.closing import closing_figures
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.heap import release_freed
from plumbline_trainer.engine.layers import layer_depths
from plumbline_trainer.engine.objective import (
    LooksAhead,
    Objective,
    TokenLikelihood,
    row_tokens,
    scored_tokens,
    token_weights,
)
from plumbline_trainer.engine.optimizer import Optimizer
from plumbline_trainer.engine.packing import PackedBatch, dummy_of, keeping, pack, packed_length
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.penalties import L2Sp, Penalty, displacements
from plumbline_trainer.engine.range_test import diverges
from plumbline_trainer.engine.schedule import StepPlan, cut_step, fill_batches, random_key
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.selection import Selection
from plumbline_trainer.engine.sharding import gather_model, shard
from plumbline_trainer.engine.state import TrainingState, read_progress, read_state, write_state
from plumbline_trainer.errors import InputError, Interrupted
from plumbline_trainer.storage.checkpoints import (
    Checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
    wait_for_uploads,
)

RECENT = 10
"""Steps over which the figures at the end are averaged."""


class TrainingRun:
    """One attempt at training: opened, resumed, trained."""

    def __init__(
        self,
        context: StageContext,
        ranks: Ranks,
        scorer: Scorer,
        plan: StepPlan,
        rows: Sequence[Encoded],
        training: Training,
    ) -> None:
        """Find the latest checkpoint, decide the path and prepare the optimizer. Weights stay as they are for now.

        Args:
            context: Of the stage.
            ranks: Processes that share the work.
            scorer: Around the model, whose trainable parameters are float32.
            plan: The optimizer steps.
            rows: Training rows in the plan's order.
            training: Optimisation parameters.
        """
        self.context, self.ranks, self.scorer = context, ranks, scorer
        if training.range_test is not None:
            plan = dataclasses.replace(plan, steps=training.range_test.steps)
        self.plan, self.rows, self.training = plan, rows, training
        if training.sharding == "full":
            shard(scorer, ranks)
            if ranks.size == 1:
                context.log.info("training.sharding: one rank keeps everything")
        self.trainables = scorer.trainables()
        depths = None if training.layer_decay is None else layer_depths(scorer.model)
        self.optimizer = Optimizer(self.trainables, training, plan.steps, depths)
        self.penalties: list[Penalty] = []
        """What is added to the loss of the rows; a stage may add its own before it trains."""
        if training.l2sp is not None:
            # New heads have no start that could be forgotten: only what the model brought along is held.
            old = scorer.model_trainables()
            self.penalties.append(L2Sp(training.l2sp, displacements(scorer.model, old).values()))
        self._checkpoint: Checkpoint | None = load_latest_checkpoint(context)
        found = self._checkpoint
        if not ranks.same(found.step if found is not None else -1):
            raise RuntimeError("ranks found different checkpoints; the next attempt reads them again")
        self.state = TrainingState() if found is None else read_progress(found.folder)
        self.selection = Selection(training, self.state, context.scratch / "selected")
        self.first_step = self.state.step
        self.tokens_here = 0
        """Tokens of this attempt."""
        self._committed_step = self.state.step
        self._label_smoothing = self._kl = 0.0
        self._rehearsal: float | None = None
        self._kl_reference: Scorer | None = None
        self._decide_path()

    def _decide_path(self) -> None:
        if self.state.path is None:
            first = [self.rows[index] for index in self.plan.rows(0)]
            self._tell("comparing the fast path with the plain one")
            choice = choose_path(
                self.scorer, first, self.trainables, tokens=self.training.token_budget, ranks=self.ranks
            )
            self.state.path = choice.path
            level = self.context.log.info if choice.path == "fast" else self.context.log.warning
            level("%s path: %s", choice.path, choice.reason)
        self.scorer.path = self.state.path

    def go_plain(self, reason: str) -> None:
        """Leave the fast path, before the first step."""
        assert self.state.step == 0
        self.context.log.warning("plain path: %s", reason)
        self.scorer.path = self.state.path = "plain"

    def resume(self) -> None:
        """Take up weights, moments and schedule of the checkpoint, if there is one."""
        if self._checkpoint is not None:
            read_state(self._checkpoint.folder, self.trainables, self.optimizer)
            if self.ranks.is_main:
                self.selection.take_from(self._checkpoint.folder)

    def train(
        self,
        objective: Objective,
        held_out: Sequence[Encoded],
        *,
        label_smoothing: float = 0.0,
        kl: float = 0.0,
        kl_reference: Scorer | None = None,
        rehearsal: float | None = None,
    ) -> None:
        """Take all steps that are left, evaluate, write checkpoints.

        Args:
            objective: What is minimised.
            held_out: Rows to evaluate on.
            label_smoothing: Of the labels of every step; evaluations are never smoothed.
            kl: Coefficient of the mean KL(π_ref ‖ π) over the scored tokens of a step's answers.
            kl_reference: The reference. Absent: the policy with its adapter switched off.
            rehearsal: Weight of the mean −log p over the tokens of a step's rehearsed rows, beside the objective, which
                is of the stage's own rows then. Absent: the objective is of all rows alike.

        Raises:
            Interrupted: on SIGTERM, once a checkpoint is committed.
            InputError: if the loss or the gradient is no longer finite; if something is to be selected and nothing is
                held out.
        """
        self._label_smoothing, self._kl, self._kl_reference = label_smoothing, kl, kl_reference
        self._rehearsal = rehearsal
        if kl and kl_reference is None and (odd := [name for name in self.trainables if ".lora_" not in name]):
            raise InputError(
                f"kl: {odd[0]} is trained beside the adapter, so that switching the adapter off does not give the "
                "start back; train the adapter alone, or leave kl out"
            )
        needs = self.training.needs_evaluation
        if needs is not None and not held_out:
            raise InputError(
                f"training.{needs}: no held-out row to compare on. Set split.evaluation of the stage's dataset (such "
                "as 0.1), or leave the field out"
            )
        release_freed()  # by reference passes
        while not self.state.ended:
            step = self.state.step
            if held_out and self._evaluation_due(step):
                means = self._evaluate(objective, held_out)
                if self.selection.observe(means, self.trainables, writes=self.ranks.is_main):
                    break
            if step == self.plan.steps:
                break
            self.leave_if_stopped()
            self._take_step(objective)
            if self.state.step % self.training.checkpoint_every_steps == 0 and self.state.step < self.plan.steps:
                self._save()
        if self.state.ended:
            self._announce(f"stopped after step {self.state.step} of {self.plan.steps}: {self.state.ended}")
        if self.state.selected:
            self._announce(f"the output is the weights after step {self.state.selected['step']:.0f}")
            # A stage may measure what it yields with all ranks.
            self.selection.put_back(self.trainables, self.ranks)
        wait_for_uploads(self.context)
        self.ranks.wait()

    def _evaluation_due(self, step: int) -> bool:
        every = self.training.evaluate_every_steps
        due = step in (0, self.plan.steps) or (every is not None and step % every == 0)
        if self.training.range_test is not None:
            return False
        return due and self.state.evaluated != step

    def leave_if_stopped(self) -> None:
        """End the attempt if SIGTERM came to any rank.

        Raises:
            Interrupted: after everything done so far is committed.
        """
        if not self.ranks.any(self.context.stop.requested):
            return
        if self.state.step > self._committed_step:
            self._save()
        wait_for_uploads(self.context)
        self.ranks.wait()
        raise Interrupted(self.state.step)

    def gather(self) -> None:
        """Put a sharded model together on rank 0, to be written: the last thing that is done with it, by every rank."""
        gather_model(self.scorer.model, keeps=self.ranks.is_main)

    @property
    def last_step(self) -> int:
        """Optimizer steps that are done."""
        return self.state.step

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Figures at the end; `counts` is what became of rows and weights."""
        return closing_figures(self.state, self.plan, self.training, [item.name for item in self.penalties], counts)

    def _take_step(self, objective: Objective) -> None:
        started, step = time.monotonic(), self.state.step
        places = self.plan.rows(step)
        rows, apart = [self.rows[index] for index in places], self._rehearsal is not None
        own = [self.rows[index] for index in self.plan.own_rows(step)] if apart else rows
        means = self._accumulate(objective, own)
        if len(own) < len(rows):
            means |= self._rehearse([self.rows[index] for index in places if index >= len(self.plan.row_ids)])
        rate = self.optimizer.learning_rate
        norm = self.optimizer.step(self.ranks, self.penalties)
        finite = math.isfinite(means["loss"]) and math.isfinite(norm)
        if self.training.range_test is not None:
            self._sweep(rate, means["loss"], finite=finite)
        elif not finite:
            raise InputError(
                f"step {step + 1}: the loss is {means['loss']}, the gradient norm {norm}; training diverged. "
                "Lower training.learningRate or set training.precision: float32",
                reason="Diverged",
            )
        tokens = sum(row_tokens(row) for row in rows)
        self.state.step += 1
        self.state.tokens += tokens
        self.tokens_here += tokens
        seconds = time.monotonic() - started
        means |= self.optimizer.penalties
        record = {**means, "learningRate": rate, "gradientNorm": norm, "tokensPerSecond": tokens / max(seconds, 1e-9)}
        self.state.recent = [*self.state.recent, record][-RECENT:]
        self._report(record)

    def _sweep(self, rate: float, loss: float, *, finite: bool) -> None:
        """Note a step of a range test; where the loss runs away the stage has seen enough."""
        if finite:
            self.state.sweep.append([rate, loss])
        if not finite or diverges([loss for _, loss in self.state.sweep]):
            self.state.ended = f"the loss diverged at a learning rate of {rate:.2g}"

    @property
    def _is_sharded(self) -> bool:
        return self.training.sharding == "full" and self.ranks.size > 1

    def _accumulate(self, objective: Objective, rows: Sequence[Encoded]) -> dict[str, float]:
        """Gradients of a step's mean loss on this rank's share, and the step's means over all ranks."""
        tokens = self.training.token_budget

        def measure(number: int, batch: PackedBatch) -> Measured:
            # Only an adapter's dropout draws from it.
            torch.manual_seed(random_key(self.plan.seed, "dropout", self.state.step, self.ranks.rank, number))
            looks_ahead = number == 0 and isinstance(objective, LooksAhead)
            if looks_ahead and isinstance(objective, LooksAhead) and self._is_sharded:
                # Ranks would make unlike numbers of calls between the first one and its backward pass.
                objective.look_ahead(rows)
                looks_ahead = False
            if looks_ahead:
                batch = keeping(batch)
            scored = self._score(batch)
            if looks_ahead and isinstance(objective, LooksAhead):
                shares = cut_step([packed_length(row) for row in rows], budget=tokens, ranks=self.ranks.size)
                first = [share[0] for share in shares]
                objective.look_ahead(rows, FirstBatches(self.scorer, self.ranks, batch, first, tokens))
            found = self._sums(objective, batch, scored)
            if "kl" not in found or not self._kl:
                return found["loss"], found
            # Its mean is over tokens, whatever the objective counts.
            found["kl"] = found["kl"] * (size / answer_tokens)
            return found["loss"] + self._kl * found["kl"], found

        size = sum(objective.size(row) for row in rows) or 1.0
        answer_tokens = sum(row.weight * scored_tokens(row) for row in rows) or 1.0
        return accumulate(rows, measure, size=size, tokens_per_batch=tokens, ranks=self.ranks)

    def _rehearse(self, rows: Sequence[Encoded]) -> dict[str, float]:
        """Gradients of the weighted mean −log p over the tokens of a step's rehearsed rows, and that mean."""
        likelihood, weight = TokenLikelihood(), self._rehearsal or 0.0

        def measure(_number: int, batch: PackedBatch) -> Measured:
            loss = likelihood.sums(batch, self.scorer(batch))["loss"]
            return weight * loss, {"rehearsalLoss": loss}

        size = sum(likelihood.size(row) for row in rows) or 1.0
        return accumulate(rows, measure, size=size, tokens_per_batch=self.training.token_budget, ranks=self.ranks)

    def _score(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores of a micro-batch, with divergences beside them where `kl` asks for them."""
        if self._kl:
            return self.scorer.with_divergence(batch, self._label_smoothing, self._kl_reference)
        smoothed = (self._label_smoothing,) if self._label_smoothing else ()
        return self.scorer(batch, *smoothed), None

    def _sums(
        self, objective: Objective, batch: PackedBatch, scored: tuple[torch.Tensor, torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """Loss and figures of a scored micro-batch, with `kl` beside them where there are divergences."""
        scores, divergences = scored
        sums = objective.sums(batch, scores)
        if divergences is None:
            return sums
        weights = token_weights(batch)  # of the answers' tokens; those of contexts come behind them
        return {**sums, "kl": (weights * divergences[: len(weights)]).sum()}

    def _evaluate(self, objective: Objective, rows: Sequence[Encoded]) -> dict[str, float]:
        """Means over held-out rows, under names that begin with `eval`; they become the latest, perhaps the best."""
        if isinstance(objective, LooksAhead):
            objective.look_ahead(rows)
        sums: dict[str, float] = {}
        batches = fill_batches([packed_length(row) for row in rows], budget=self.training.token_budget)
        for done in range(0, len(batches), self.ranks.size):
            self.leave_if_stopped()
            self._tell(f"evaluation, batch {done + 1} of {len(batches)}")
            mine = done + self.ranks.rank
            members = [rows[index] for index in batches[mine]] if mine < len(batches) else [dummy_of(rows[0])]
            batch = pack(members, self.ranks.device)
            with torch.no_grad():
                found = objective.sums(batch, self._score_evaluation(batch))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        size = sum(objective.size(row) for row in rows) or 1.0
        means = {_evaluation_name(name): value / size for name, value in self.ranks.sum_floats(sums).items()}
        self.state.latest, self.state.evaluated = means, self.state.step
        if self.state.step == 0:
            self.state.start = means
        if not self.state.best or means["evalLoss"] < self.state.best["evalLoss"]:
            self.state.best = {**means, "step": float(self.state.step)}
        self._report(means)
        return means

    def _score_evaluation(self, batch: PackedBatch) -> torch.Tensor:
        """Scores without the adapter's dropout."""
        dropouts = [
            module for module in self.scorer.modules() if isinstance(module, torch.nn.Dropout) and module.training
        ]
        for module in dropouts:
            module.eval()
        scores: torch.Tensor = self.scorer(batch)
        for module in dropouts:
            module.train()
        return scores

    def _report(self, figures: dict[str, float]) -> None:
        step, steps = self.state.step, self.plan.steps
        if self.ranks.is_main:
            self.context.progress.update(step, steps, metrics=figures)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self.context.log.info("step %d/%d  %s", step, steps, shown)

    def _announce(self, message: str) -> None:
        if self.ranks.is_main:
            self.context.log.info("%s", message)

    def _tell(self, message: str) -> None:
        if self.ranks.is_main:
            self.context.progress.update(self.state.step, self.plan.steps, message)

    def _save(self) -> None:
        """Commit a checkpoint of the current step; the upload goes on beside training."""
        step, writes = self.state.step, self.ranks.is_main
        folder = self.context.scratch / "saving" / str(step)
        if writes:
            # One upload at a time, and a checkpoint's folder must not be there twice.
            wait_for_uploads(self.context)
        write_state(folder, self.state, self.trainables, self.optimizer, writes=writes)
        if writes:
            self.selection.keep_in(folder)
            save_checkpoint(self.context, step, folder, {"step": step})
        self._committed_step = step


def _evaluation_name(name: str) -> str:
    return f"eval{name[:1].upper()}{name[1:]}"

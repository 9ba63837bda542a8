"""One measured run of `make bench-trainer`, in a process of its own: our engine or trl on the same rows.

`python -m bench.trainer_side '{…}'` prints one line of JSON; with `-` it
takes task after task from its input. Both sides load the same folder, train the same adapter on
the same ids in the same order, and are timed alike: the reference pass whole, then every step from the end of the one
before it to its own end, without the first ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.cuda import FOUND, gauge_of, give_back
from bench.measured import Clock, Measured, Task
from bench.parts import StepParts
from bench.trainer_rows import NO_REFERENCE, make_rows, our_operations, shape_of, their_operations
from plumbline_api.methods import TRAINING_STAGES, Dpo, Kto
from plumbline_api.training import Lora, Training
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.objective import row_tokens
from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.models.selection import module_names

LORA = Lora(rank=16, alpha=32)
SEED = 1


def training_of(task: Task) -> Training:
    """The same optimisation on both sides; everything else is the stage's default."""
    return Training(
        learning_rate=1e-4,
        global_batch=task.global_batch,
        tokens_per_batch=task.tokens_per_batch,
        precision=task.precision,  # type: ignore[arg-type]
    )


def in_order(task: Task, vocabulary: int) -> tuple[list[Encoded], Any]:
    """The rows as our steps take them, and the plan."""
    rows = make_rows(task.method, task.profile, task.rows, vocabulary)
    plan = plan_steps([row.row_id for row in rows], seed=SEED, global_batch=task.global_batch, epochs=1, max_steps=None)
    if task.rows % task.global_batch:
        raise SystemExit(f"{task.rows} rows are no whole number of steps of {task.global_batch}")
    return [rows[index] for step in range(plan.steps) for index in plan.rows(step)], plan


def result(clock: Clock, task: Task, rows: list[Encoded], operations: float, losses: list[float]) -> Measured:
    """What the run took, with tokens counted once per prompt."""
    return clock.result(task, sum(row_tokens(row) for row in rows), operations, losses)


def measure_ours(task: Task) -> Measured:
    """The stage's own lines, with ready rows in place of a dataset."""
    from plumbline_trainer.engine.distributed import Ranks
    from plumbline_trainer.engine.loop import TrainingRun
    from plumbline_trainer.engine.objective import TokenLikelihood
    from plumbline_trainer.engine.preference import dpo_objective
    from plumbline_trainer.engine.ranking import RewardRanking
    from plumbline_trainer.engine.reference_pass import find_references
    from plumbline_trainer.engine.scorer import Scorer, prepare_modes
    from plumbline_trainer.engine.scoring import score_rows
    from plumbline_trainer.engine.trained import make_trainable
    from plumbline_trainer.engine.unpaired import DesirableAnswers, mismatched_rows
    from plumbline_trainer.engine.values import ValueScorer, fresh_heads
    from plumbline_trainer.models.dtypes import holds_stored
    from plumbline_trainer.models.policy import load_policy
    from support.trainer import base_model, stage_context, stage_run

    with tempfile.TemporaryDirectory() as place:
        folder, training = Path(place), training_of(task)
        context = stage_context(folder, stage_run(folder, task.stage, inputs=[base_model(Path(task.model).as_uri())]))
        losses: list[float] = []
        context.progress.update = lambda *_, metrics=None, **__: (  # type: ignore[method-assign]
            losses.append(metrics["loss"]) if metrics and "loss" in metrics else None
        )
        parameters = TRAINING_STAGES[task.stage].model_validate(
            {"dataset": "rows", "lora": LORA, "training": training.to_wire()}
        )
        stored = holds_stored(parameters, device=task.device)
        start = _pinned(context, context.input("model"))
        policy = load_policy(context, start, precision=task.precision, device=task.device, stored=stored)
        ordered, plan = in_order(task, policy.model.config.get_text_config().vocab_size)
        clock = Clock(policy.model.parameters(), task, StepParts(), gauge_of(task))
        trainable = make_trainable(policy, LORA, SEED, freeze=None)
        scorer = Scorer(trainable, precision=task.precision)
        if task.method == "rewardModel":
            scorer = ValueScorer(trainable, fresh_heads(trainable, 1, SEED), precision=task.precision)
        by_id = {row.row_id: row for row in ordered}
        run = TrainingRun(
            context, Ranks(device=task.device), scorer, plan, [by_id[name] for name in plan.row_ids], training
        )
        started = time.perf_counter()
        objective: Any = RewardRanking() if task.method == "rewardModel" else TokenLikelihood()
        steps = [ordered[at : at + task.global_batch] for at in range(0, len(ordered), task.global_batch)]
        if task.method == "dpo":
            objective = dpo_objective(Dpo(dataset="rows", beta=0.1), find_references(run, policy, []))
        elif task.stage == "kto":
            further = [row for step in steps for row in mismatched_rows(step, training.max_length)]
            score = partial(
                score_rows,
                scorer,
                tokens_per_batch=task.tokens_per_batch,
                device=torch.device(task.device),
                precision=task.precision,
            )
            settings = Kto.model_validate({"dataset": "rows", "training": training.to_wire()})
            objective = DesirableAnswers(find_references(run, policy, [], further), score, settings)
        clock.reference = 0.0 if task.method in NO_REFERENCE else time.perf_counter() - started
        prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=False)
        real = run._take_step

        def taken(objective: Any) -> None:
            real(objective)
            clock.mark()

        run._take_step = taken  # type: ignore[method-assign]
        clock.mark()
        run.train(objective, [])
        if run.state.path != "fast":
            raise RuntimeError("the fast path was not taken; nothing to publish")
        adapter = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
        operations = our_operations(shape_of(policy.model, adapter), steps, task.method, training)
        return result(clock, task, ordered, operations, losses)


PINS: dict[str, str] = {}


def _pinned(context: Any, start: Any) -> Any:
    """The model with its digest, which a run finds once for all its stages, at preflight."""
    from plumbline_api.record import ExternalInput
    from plumbline_trainer.planning.pins import pin

    if start.uri not in PINS:
        PINS[start.uri] = pin(context, ExternalInput(name="model", kind="policy", uri=start.uri)).digest
    return start.model_copy(update={"digest": PINS[start.uri]})


def measure_trl(task: Task) -> Measured:
    """trl's trainer on the same ids in the same order; only its tokenisation is left out."""
    import datasets
    import peft
    import transformers
    import trl
    from torch.utils.data import SequentialSampler

    assert trl.__version__ == "1.16.0", f"the peer is pinned to trl 1.16.0, this is {trl.__version__}"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[task.precision]
    scalar = task.method == "rewardModel"
    if scalar:  # its head starts at random, as ours does
        model = transformers.AutoModelForSequenceClassification.from_pretrained(task.model, dtype=dtype, num_labels=1)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    model.to(task.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    ordered, _ = in_order(task, model.config.get_text_config().vocab_size)
    targets = sorted(name for name in module_names(model).linear if name != "score")
    shape_model = model
    clock = Clock(model.parameters(), task, StepParts(), gauge_of(task))

    class Ends(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    best = task.side == "trl"
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": task.device == "cpu",
        "bf16": task.precision == "bfloat16",
        "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.answers_per_step // task.batch,
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    if best:
        arguments["gradient_checkpointing"] = False
        # It makes a plan for every new shape, of which padded batches have many; a plan takes longer than a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    adapter = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=targets,
        modules_to_save=["score"] if scalar else None,
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as place:
        kinds = {
            "sft": (trl.SFTTrainer, trl.SFTConfig),
            "dpo": (trl.DPOTrainer, trl.DPOConfig),
            "kto": (trl.KTOTrainer, trl.KTOConfig),
            "rewardModel": (trl.RewardTrainer, trl.RewardConfig),
        }
        parent, config = kinds[task.stage]
        if task.method == "sft":
            arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        elif best and not scalar:
            arguments["precompute_ref_log_probs"] = True

        class Ready(parent):  # type: ignore[misc, valid-type]
            def _prepare_dataset(self, dataset: Any, *others: Any, **named: Any) -> Any:
                return super()._prepare_dataset(dataset, *others, **named) if task.method == "sft" else dataset

            def _precompute_ref_logps(self, *others: Any, **named: Any) -> Any:
                started = time.perf_counter()
                found = super()._precompute_ref_logps(*others, **named)
                clock.reference += time.perf_counter() - started
                return found

            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(dataset or self.train_dataset)

        data = datasets.Dataset.from_list(_peer_rows(task, ordered))
        # An empty cache: trl keeps reference values beside the dataset's file.
        data.save_to_disk(place)
        trainer = Ready(
            model,
            args=config(**arguments),
            train_dataset=datasets.load_from_disk(place),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Ends()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        operations = their_operations(shape_of(shape_model, count), ordered, task.method, task.batch)
        return result(clock, task, ordered, operations, losses)


def _peer_rows(task: Task, rows: list[Encoded]) -> list[dict[str, Any]]:
    if task.method == "sft":
        answers = [(row, row.responses[0]) for row in rows]
        return [
            {"input_ids": [*row.prompt, *own.ids], "labels": [-100] * len(row.prompt) + list(own.ids)}
            for row, own in answers
        ]
    if task.method == "rewardModel":
        pairs = [(row.prompt, *(response.ids for response in row.responses)) for row in rows]
        return [{"chosen_ids": [*first, *good], "rejected_ids": [*first, *bad]} for first, good, bad in pairs]
    if task.method == "dpo":
        return [
            {
                "prompt_ids": row.prompt,
                "chosen_ids": row.responses[0].ids,
                "rejected_ids": row.responses[1].ids,
                "prompt": "",
                "chosen": "",
                "rejected": "",
            }
            for row in rows
        ]
    found = [
        {"prompt_ids": row.prompt, "completion_ids": item.ids, "label": item.role == "desirable"}
        for row in rows
        for item in row.responses
    ]
    for start in range(0, len(found), task.batch):  # trl's own rotation within each device batch
        part = found[start : start + task.batch]
        ids = [row["completion_ids"] for row in part]
        for index, row in enumerate(part):
            row["KL_completion_ids"] = ids[index - 1]
    return found


def measure(task: Task) -> Measured:
    """One side's figures."""
    torch.set_num_threads(task.threads)
    found = measure_ours if task.side == "ours" else measure_trl
    if task.device == "cuda":
        # Kernels are loaded when they are first called for: seconds, which a longer run would not show.
        found(replace(task, rows=2 * task.global_batch))
    return found(task)


def main(text: str) -> None:
    """Measure and print."""
    if text != "-":
        sys.stdout.write("\n" + json.dumps(asdict(measure(Task(**json.loads(text))))) + "\n")
        return
    for line in sys.stdin:
        sys.stdout.write("\n" + FOUND + json.dumps(asdict(measure(Task(**json.loads(line))))) + "\n")
        sys.stdout.flush()
        give_back()


if __name__ == "__main__":
    main(sys.argv[1])

"""One measured run of a stage that samples, in a process of its own: our ppo or grpo, or trl's grpo.

`python -m bench.online_side '{…}'` prints one line of JSON. All sides answer the same prompts in the same order, each
answer as long as the others (the end token is never drawn), score answers by a rule that costs nothing, and train the same
adapter; trl's ppo is `ppo_side.py`. A step is a whole iteration: sampling, scoring, updates.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench.measured import PPO_EPOCHS, TEMPERATURE, Clock, Measured, Task
from bench.parts import StepParts
from bench.trainer_side import LORA, SEED, in_order
from plumbline_trainer.data.encode import EncodedRows
from plumbline_trainer.data.rows import Message, Row
from plumbline_trainer.engine.online import OnlineRun
from plumbline_trainer.engine.prompts import Prompts
from plumbline_trainer.models.selection import module_names

PATTERN = r"^\W*[a-m]"
"""The rule by which answers are scored."""


def measure_ours(task: Task) -> Measured:
    """The stage itself, with ready prompts in place of a dataset, up to where it would save."""
    from plumbline_api.online import ONLINE_STAGES
    from support.trainer import base_model, parameters_of, stage_context, stage_run

    stage = importlib.import_module(f"plumbline_trainer.stages.{task.method}")
    fields: dict[str, Any] = {
        "prompts": "rows",
        "rewards": [{"rule": "matches", "pattern": PATTERN}],
        "lora": LORA.to_wire(),
        "answers": task.answers,
        "rollout": {"temperature": TEMPERATURE, "maxNewTokens": task.new_tokens},
        "training": {
            "learningRate": 1e-4,
            "globalBatch": task.global_batch,
            "tokensPerBatch": task.tokens_per_batch,
            "precision": task.precision,
            "maxLength": 2048,
            "checkpointEverySteps": 10**6,
        },
    }
    if task.method == "ppo":
        fields["updateEpochs"] = PPO_EPOCHS
    parameters = parameters_of(ONLINE_STAGES[task.method].model_validate(fields), seed=SEED)
    held: dict[str, Any] = {"losses": []}
    with tempfile.TemporaryDirectory() as place:
        folder, model = Path(place), base_model(Path(task.model).as_uri())
        context = stage_context(folder, stage_run(folder, task.method, parameters=parameters, inputs=[model]))
        originals = {name: getattr(stage, name) for name in ("load_start", "load_prompts", "open_run", "save_learner")}

        def load_start(*arguments: Any, **named: Any) -> Any:
            policy = originals["load_start"](*arguments, **named)
            held["vocabulary"] = policy.model.config.get_text_config().vocab_size
            held["clock"] = Clock(policy.model.parameters(), task, StepParts())
            # No token ends an answer: every one has its full length, as on the other side.
            return replace(policy, tokenizer=replace(policy.tokenizer, end_tokens=(-1,)))

        def load_prompts(_context: Any, policy: Any, _parameters: Any) -> Prompts:
            ordered, plan = in_order(task, held["vocabulary"])
            by_id = {row.row_id: row for row in ordered}
            rows = {row.row_id: Row(row.row_id, row.group, (Message("user", ""),), ()) for row in ordered}
            return Prompts(EncodedRows([by_id[name] for name in plan.row_ids]), [], rows, policy.tokenizer)

        def open_run(*arguments: Any, **named: Any) -> OnlineRun:
            run: OnlineRun = originals["open_run"](*arguments, **named)
            close, resume = run.close, run.resume

            def closed(figures: Any) -> None:
                assert run.state.figures["length.mean"] == task.new_tokens
                close(figures)
                held["clock"].mark()
                held["losses"].append(figures["loss"])

            def resumed(**kept: Any) -> None:
                resume(**kept)
                held["clock"].mark()

            run.close, run.resume = closed, resumed  # type: ignore[method-assign]
            held["run"] = run
            return run

        replacements = {
            "load_start": load_start,
            "load_prompts": load_prompts,
            "open_run": open_run,
            "save_learner": lambda *_: None,
        }
        try:
            for name, function in replacements.items():
                setattr(stage, name, function)
            stage.run(context)
        finally:
            for name, function in originals.items():
                setattr(stage, name, function)
        if held["run"].state.path != "fast":
            raise RuntimeError("the fast path was not taken; nothing to publish")
        return held["clock"].result(task, tokens_of(task, held["vocabulary"]), 0.0, held["losses"])


def tokens_of(task: Task, vocabulary: int) -> int:
    """Tokens of all prompts, each once, and of their answers."""
    ordered, _ = in_order(task, vocabulary)
    return sum(len(row.prompt) + task.answers * task.new_tokens for row in ordered)


def measure_grpo(task: Task) -> Measured:
    """trl's GRPO; only its tokenisation is left out."""
    import datasets
    import peft
    import transformers
    import trl

    assert trl.__version__ == "1.16.0", f"the peer is pinned to trl 1.16.0, this is {trl.__version__}"
    assert task.method == "grpo"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[task.precision]
    model = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    vocabulary = model.config.get_text_config().vocab_size
    ordered, _ = in_order(task, vocabulary)
    targets = sorted(module_names(model).linear)
    clock = Clock(model.parameters(), task, StepParts())

    class Ends(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    class Ready(trl.GRPOTrainer):  # type: ignore[misc]
        def _tokenize_prompts(self, names: list[str]) -> Any:
            return [ordered[int(name)].prompt for name in names], None, {}

    arguments: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": task.precision == "bfloat16",
        "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.answers_per_step // task.batch,
        "num_generations": task.answers,
        "max_completion_length": task.new_tokens,
        "generation_kwargs": {"min_new_tokens": task.new_tokens},
        "temperature": TEMPERATURE,
        "beta": 0.0,
        "shuffle_dataset": False,
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    if task.side == "trl":
        arguments["gradient_checkpointing"] = False
    with tempfile.TemporaryDirectory() as place:
        trainer = Ready(
            model=model,
            reward_funcs=lambda completions, **_: [float(bool(re.search(PATTERN, text))) for text in completions],
            args=trl.GRPOConfig(output_dir=place, **arguments),
            train_dataset=datasets.Dataset.from_dict({"prompt": [str(number) for number in range(len(ordered))]}),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=LORA.rank, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
            ),
            callbacks=[Ends()],
        )
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["completions/mean_length"] == task.new_tokens for entry in entries)
    losses = [entry["loss"] for entry in entries]
    return clock.result(task, tokens_of(task, vocabulary), 0.0, losses)


def main(text: str) -> None:
    """Measure and print."""
    task = Task(**json.loads(text))
    torch.set_num_threads(task.threads)
    found = measure_ours(task) if task.side == "ours" else measure_grpo(task)
    sys.stdout.write("\n" + json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

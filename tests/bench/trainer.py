"""`make bench-trainer`: our training engine and trl side by side, in alternating runs of processes of their own.

    python -m tests.bench.trainer --methods dpo --profiles even --rows 48 --runs 3

What a case measured goes into tests/bench/trainer.json as soon as it has ended, and the table in docs/benchmarks.md is
written from that file: a run may be cut off, and a later one may measure one method anew. `--dry` prints only, `--parts`
shows where a step's time goes. What is the same on both sides: model, rows of every
optimizer step, precision, LoRA targets and rank, threads, optimizer, logging. trl runs at its defaults (gradient
checkpointing, device batches of 8, the reference computed in every step) and at its best settings (no checkpointing, a
precomputed reference, the device batch that a short trial finds fastest).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for name in ("tests", "trainer_image", "operator"):
    sys.path.insert(0, str(ROOT / name))

from bench import aims_table, page, parts_table, trainer_table  # noqa: E402  (the folders above are on the path only now)
from bench.cuda import Kept  # noqa: E402
from bench.measured import Measured, Task  # noqa: E402
from bench.online_rows import online_operations, online_shape  # noqa: E402
from bench.trainer_rows import METHODS, ONLINE_METHODS, PROFILES  # noqa: E402
from bench.trainer_side import LORA, in_order  # noqa: E402
from bench.trainer_table import Case  # noqa: E402
from plumbline_api.training import TOKENS_ON_ACCELERATOR, TOKENS_ON_CPU  # noqa: E402
from plumbline_trainer.threads import thread_settings  # noqa: E402

PPO_PEER = ROOT / ".venv-ppo" / "bin" / "python"
SIDES = ("ours", "trl", "trl-default")
TRL_DEFAULT_BATCH = 8
MIB = 2**20
BUNDLED = "bundled://smollm2-135m-instruct"
KEPT = Kept()
OWN_MODELS = {"cpu": f"{BUNDLED} as bfloat16", "cuda": "a Llama of 1.1B random weights"}


def main(arguments: Sequence[str]) -> int:
    """Measure what was asked for and publish it."""
    options = _options().parse_args(arguments)
    if options.table:
        _publish(trainer_table.read())
        if known := parts_table.read():
            page.replace("parts", parts_table.section(known))
        return 0
    with tempfile.TemporaryDirectory() as place:
        model = options.model or _own_model(Path(place) / "model", options.device)
        # A profile of sampling would be mostly the profiler's own cost.
        only_given = options.parts or options.device == "cuda"
        methods = [name for name in options.methods if not only_given or name in METHODS]
        for method, profile in ((method, profile) for method in methods for profile in options.profiles):
            if options.parts:
                _take_apart(method, profile, str(model), options)
                continue
            case = _compare(method, profile, str(model), options)
            beside = "" if options.device == "cpu" else f", {options.device}"
            cases = {**trainer_table.read(), f"{method}, {profile}{beside}": case}
            text = trainer_table.section(cases)
            sys.stdout.write(text + "\n")
            if not options.dry:
                trainer_table.write(cases)
                _publish(cases)
    return 0


def _publish(cases: dict[str, Case]) -> None:
    page.replace("trainer", trainer_table.section(cases))
    page.replace("aims", aims_table.section(cases))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer", description=__doc__)
    parser.add_argument(
        "--methods", nargs="+", default=[*METHODS, *ONLINE_METHODS], choices=[*METHODS, *ONLINE_METHODS]
    )
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=list(PROFILES))
    parser.add_argument("--rows", type=int, default=64, help="rows of each run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side")
    parser.add_argument("--batch", type=int, default=16, help="rows of an optimizer step")
    parser.add_argument("--answers", type=int, default=8, help="answers per prompt (grpo; ppo samples one)")
    parser.add_argument("--new-tokens", type=int, default=53, help="tokens of every sampled answer (ppo, grpo)")
    parser.add_argument("--left-out", type=int, default=1, help="first steps that are not counted")
    parser.add_argument("--tokens-per-batch", type=int, help="absent: a stage's default on the device")
    parser.add_argument(
        "--sweep", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="device batches tried with trl"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cuda: a random model of 1.1B where none is given"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--model", help="a model folder; absent: bundled://smollm2-135m-instruct")
    parser.add_argument(
        "--parts", action="store_true", help="profile one step of each side in place of timing them; not ppo, grpo"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table from what was found")
    parser.add_argument("--dry", action="store_true", help="print the table, leave the page alone")
    return parser


def _own_model(folder: Path, device: str) -> Path:
    """The bundled model in bfloat16, as its authors publish it, or on a device one worth its while, as a folder that
    both sides load in the precision that is measured."""
    if device == "cuda":
        from bench.cuda import make_random

        return make_random(folder)
    from plumbline_trainer.data.sources import bundled_model
    from plumbline_trainer.models.loading import load_base
    from plumbline_trainer.models.saving import save_full

    model, tokenizer = load_base(bundled_model(BUNDLED), "bfloat16")
    save_full(model, tokenizer, folder, "bfloat16")
    return folder


def _take_apart(method: str, profile: str, model: str, options: argparse.Namespace) -> None:
    task = _task(method, profile, model, options)
    # What was found fastest when the sides were timed, where they were.
    known = trainer_table.read().get(f"{method}, {profile}")
    batch = known.task.batch if known is not None else task.batch
    sides = [side for side in options.sides if side != "trl-default"]
    found = {}
    for side in sides:
        measured = run_side(replace(task, side=side, batch=batch if side == "trl" else task.batch, parts=True))
        found[side] = {**measured.parts, "rows": float(task.global_batch)}
    cases = {**parts_table.read(), f"{method}, {profile}": found}
    text = parts_table.section(cases)
    sys.stdout.write(text + "\n")
    if not options.dry:
        parts_table.write(cases)
        page.replace("parts", text)


def _task(method: str, profile: str, model: str, options: argparse.Namespace) -> Task:
    return Task(
        side="ours",
        method=method,
        profile=profile,
        model=model,
        rows=options.rows,
        global_batch=options.batch,
        tokens_per_batch=options.tokens_per_batch
        or (TOKENS_ON_CPU if options.device == "cpu" else TOKENS_ON_ACCELERATOR),
        batch=min(TRL_DEFAULT_BATCH, options.batch),
        precision=options.precision,
        threads=options.threads,
        left_out=options.left_out,
        answers=options.answers if method == "grpo" else 1,
        new_tokens=options.new_tokens if method in ONLINE_METHODS else 0,
        device=options.device,
    )


def _compare(method: str, profile: str, model: str, options: argparse.Namespace) -> Case:
    task = _task(method, profile, model, options)
    best = _best_batch(task, options) if "trl" in options.sides else task.batch
    found: dict[str, list[Measured]] = {side: [] for side in options.sides}
    for _ in range(options.runs):
        for side in options.sides:
            wanted = replace(task, side=side, batch=best if side == "trl" else task.batch)
            found[side].append(counted(wanted, run_side(wanted)))
    return Case(
        task=replace(task, side="", model=options.model or OWN_MODELS[options.device], batch=best),
        runs=found,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        load=round(os.getloadavg()[2], 1),
        machine=_machine(options.device),
    )


def _machine(device: str) -> str:
    if device == "cpu":
        return f"{os.cpu_count()} cores of {_processor()}"
    import torch

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def counted(task: Task, measured: Measured) -> Measured:
    """With the arithmetic of a stage that samples, which its side does not count: trl's ppo knows none of our modules."""
    if task.method not in ONLINE_METHODS:
        return measured
    rows, _ = in_order(task, 1000)  # lengths depend on no vocabulary
    shape = online_shape(task.model, LORA.rank)
    return replace(measured, operations=online_operations(shape, task, [len(row.prompt) for row in rows]))


def _best_batch(task: Task, options: argparse.Namespace) -> int:
    """The device batch with which trl takes a step fastest: one short run each, larger ones until they stop helping."""
    speeds: dict[int, float] = {}
    least = 2 if task.stage == "kto" else 1  # trl refuses to take KTO's reference point from one answer
    sizes = sorted(size for size in options.sweep if size >= least and task.answers_per_step % size == 0)
    if len(sizes) == 1:
        return int(sizes[0])
    for batch in sizes:
        trial = replace(task, side="trl", batch=batch, rows=min(task.rows, 2 * task.global_batch))
        speeds[batch] = run_side(trial).rows_per_second
        if speeds[batch] < max(speeds.values()):
            break
    return max(speeds, key=lambda size: speeds[size])


def run_side(task: Task) -> Measured:
    """Measure a side in a process of its own; on a device in one that is kept for the side."""
    paths = [str(ROOT / name) for name in ("operator", "trainer_image", "tests")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        **thread_settings({"OMP_NUM_THREADS": str(task.threads)}, 1),  # both sides as our stages run
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    if task.device == "cuda":
        output = KEPT.measure(task.side, json.dumps(asdict(task)), environment)
    else:
        output = _run(task, environment)
    measured = Measured(**json.loads(output.strip().splitlines()[-1]))
    sys.stderr.write(
        f"{task.side:12} {task.method} {task.profile} batch {task.batch}: {measured.rows_per_second:.3f} rows/s, "
        f"peak {measured.peak_bytes / MIB:.0f} MiB, losses {[round(loss, 4) for loss in measured.losses]}\n"
    )
    return measured


def _run(task: Task, environment: Mapping[str, str]) -> str:
    with tempfile.TemporaryDirectory() as place:
        command = _command(task, Path(place))
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"{task} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    return ended.stdout


def _command(task: Task, place: Path) -> list[str]:
    """The process that measures a side; `place` is a folder for what it reads."""
    text = json.dumps(asdict(task))
    if task.method != "ppo" or task.side == "ours":
        module = "bench.online_side" if task.method in ONLINE_METHODS else "bench.trainer_side"
        return [sys.executable, "-m", module, text]
    if not PPO_PEER.exists():
        raise SystemExit(f"{PPO_PEER} is missing: ppo is measured against trl 1.12 there. Run: make .venv-ppo/.made")
    vocabulary = json.loads((Path(task.model) / "config.json").read_text())["vocab_size"]
    prompts = place / "prompts.json"
    prompts.write_text(json.dumps([row.prompt for row in in_order(task, vocabulary)[0]]))
    return [str(PPO_PEER), "-W", "ignore", str(ROOT / "tests" / "bench" / "ppo_side.py"), text, str(prompts)]


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

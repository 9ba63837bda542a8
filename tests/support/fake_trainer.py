"""A trainer that trains nothing: it keeps the stage contract, so that the local runner can be tested in milliseconds.

Run as a script. What each stage does is read from `behaviour.json` in the storage root: `{"sft": {"steps": 50}}`.
Steps take a hundredth of a second; a checkpoint is the number of the step. Every start is noted in `starts.jsonl`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEP_SECONDS = 0.01
Run = dict[str, Any]
"""A StageRun as JSON: the models of the contract take longer to import than everything else here, so only preflight does."""


def main() -> int:
    run: Run = json.loads(os.environ["PLUMBLINE_STAGE"])
    root = Path(run["storage"]["uri"].removeprefix("file://"))
    root.mkdir(parents=True, exist_ok=True)
    behaviour: dict[str, Any] = {}
    if (root / "behaviour.json").exists():
        behaviour = json.loads((root / "behaviour.json").read_text()).get(run["stage"], {})
    with (root / "starts.jsonl").open("a") as file:
        line = {"stage": run["stage"], "role": run["role"], "attempt": run["attempt"], "pid": os.getpid()}
        file.write(json.dumps({**line, "environment": sorted(os.environ)}) + "\n")
    print(f"{run['stage']} attempt {run['attempt']} begins", flush=True)
    if run["attempt"] <= behaviour.get("dieOnAttempts", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if "fail" in behaviour:
        reason, message, code = behaviour["fail"]
        return finish(code, outcome="Failed", reason=reason, message=message)
    if run["role"] == "preflight":
        return preflight(run, root)
    if run["role"] == "finalize":
        pipeline = run["pipeline"]
        folder = root / pipeline["namespace"] / "pipelines" / pipeline["name"] / pipeline["uid"]
        (folder / "report.html").write_text("<p>report</p>")
        return finish(0, outcome="Succeeded", reason="Completed")
    return train(run, root, behaviour)


def preflight(run: Run, root: Path) -> int:
    import base64
    import hashlib

    from plumbline_api.record import RunRecord, fingerprints

    record = RunRecord.model_validate(run["record"])
    digests = [hashlib.sha256(external.uri.encode()).digest() for external in record.external_inputs]
    found = fingerprints(record, [digest.hex() for digest in digests])
    cached = "".join(
        "1" if (output_of(run, root, stage.type, found[stage.name]) / "manifest.json").exists() else "0"
        for stage in record.stages
    )
    encoded = [base64.urlsafe_b64encode(digest).decode().rstrip("=") for digest in digests]
    findings = {"digests": encoded, "cached": cached, "notes": [f"{len(digests)} inputs"]}
    return finish(0, outcome="Succeeded", reason="Completed", preflight=findings)


def train(run: Run, root: Path, behaviour: dict[str, Any]) -> int:
    stopped: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    output = output_of(run, root, run["type"], run["fingerprint"])
    checkpoint = output / "runs" / run["pipeline"]["uid"] / "checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    steps = behaviour.get("steps", 3)
    for step in range(first, steps):
        if stopped and not behaviour.get("deaf"):
            checkpoint.write_text(str(step))
            return finish(143, outcome="Stopped", reason="Interrupted", firstStep=first, lastStep=step)
        report(step, steps)
        time.sleep(STEP_SECONDS)
    (output / "out-1").mkdir(exist_ok=True)
    (output / "manifest.json").write_text(json.dumps({"folder": "out-1", "meta": {"form": "full"}}))
    figures = {"metrics": {"loss": 1.5}, "firstStep": first, "lastStep": steps}
    return finish(0, outcome="Succeeded", reason="Completed", manifestDigest="ab" * 32, **figures)


def output_of(run: Run, root: Path, stage_type: str, fingerprint: str) -> Path:
    return root / run["pipeline"]["namespace"] / stage_type / fingerprint


def report(step: int, steps: int) -> None:
    path = Path(os.environ["PLUMBLINE_PROGRESS_FILE"])
    status = {
        "progressPercentage": 100 * step // steps,
        "estimatedRemainingSeconds": (steps - step) * STEP_SECONDS,
        "metrics": [{"name": "loss", "value": "1.8"}],
        "message": f"step {step}/{steps}",
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"trainerStatus": status}))
    partial.replace(path)


def finish(code: int, **result: Any) -> int:
    Path(os.environ["PLUMBLINE_TERMINATION_LOG"]).write_text(json.dumps({"contractVersion": 1, **result}))
    return code


if __name__ == "__main__":
    sys.exit(main())

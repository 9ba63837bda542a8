"""`make rlhf`: draw what docs/rlhf.md shows from a finished run of examples/09-rlhf, found below a storage folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from plumbline_trainer.report.curves import standalone
from plumbline_trainer.report.facts import Point
from plumbline_trainer.report.rollouts import draw_rollouts

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SHOWN = {"Gold reward on held-out prompts": "gold", "Reward over KL": "frontier", "Reward": "reward"}


def main(storage: str) -> int:
    """Write the images; the newest run counts."""
    found = sorted(Path(storage).glob("default/ppo/*/runs/*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.stderr.write(f"no figures of a ppo stage below {storage}; run examples/09-rlhf/pipeline.yaml first\n")
        return 2
    lines = [json.loads(line) for line in found[-1].read_text(encoding="utf-8").splitlines()]
    points = [Point(line["step"], line["metrics"]) for line in lines]
    IMAGES.mkdir(exist_ok=True)
    for figure in draw_rollouts("rlhf", points):
        if figure.title in SHOWN:
            path = IMAGES / f"rlhf-{SHOWN[figure.title]}.svg"
            path.write_text(standalone(figure.svg) + "\n", encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(IMAGES.parents[1])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "runs"))

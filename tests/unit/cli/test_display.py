import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import StageRecord
from plumbline_api.stagerun import TrainerStatus
from plumbline_api.stages import Resources
from plumbline_api.status import PipelineStatus
from plumbline_cli.display.ending import print_figures
from plumbline_cli.display.figures import figure_notes, figures_table
from plumbline_cli.display.forecast import describe
from plumbline_cli.display.live import LiveTable, PlainLines
from plumbline_cli.display.overview import print_overview
from plumbline_cli.display.stages import stage_lines
from plumbline_cli.display.table import StageTable
from plumbline_cli.display.words import ASCII, UNICODE, clock, duration, number, plural, symbols
from plumbline_cli.local.forecast import StageForecast
from plumbline_cli.local.runner import RunView
from plumbline_cli.output import out
from plumbline_operator.snapshot import PlannedEvent
from rich.console import Console
from support.local_runs import pipeline_body

NOW = datetime(2025, 1, 1, 10, 1, 0, tzinfo=UTC)


def status(**sft) -> PipelineStatus:
    entry = {"name": "sft", "type": "sft", "phase": "Running", "startTime": "2025-01-01T10:00:00Z", **sft}
    done = {"startTime": "2025-01-01T09:59:50Z", "completionTime": "2025-01-01T09:59:56Z"}
    preflight = {"name": "preflight", "type": "preflight", "phase": "Succeeded", **done}
    return PipelineStatus.model_validate({"phase": "Running", "stages": [preflight, entry]})


def live(**fields) -> TrainerStatus:
    metrics = [{"name": "loss", "value": "1.84031"}, {"name": "tokensPerSecond", "value": "131.2"}]
    told = (NOW - timedelta(seconds=2)).isoformat()
    given = {"progressPercentage": 62, "estimatedRemainingSeconds": 36, "metrics": metrics, "message": "step 25/40"}
    return TrainerStatus.model_validate({**given, "lastUpdatedTime": told, **fields})


def view(**fields) -> RunView:
    pipeline = AlignmentPipeline.parse(pipeline_body())
    given = {"pipeline": pipeline, "status": status(), "now": NOW, "live": {"sft": live()}, "results": {}}
    return RunView(**{**given, **fields})


def rendered(item, width: int = 80) -> list[str]:
    console = Console(file=(output := io.StringIO()), width=width, color_system=None, highlight=False)
    console.print(item)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def table(width: int = 80, **fields) -> list[str]:
    shown = view(**fields)
    return rendered(StageTable(stage_lines(shown.pipeline, shown.status, shown.now, live=shown.live), UNICODE), width)


def test_a_running_stage_shows_bar_step_figures_and_time_left():
    lines = table(width=100)
    assert lines[0] == "  preflight  ✔ 6 s"
    assert lines[1] == "  sft        " + "━" * 24 + "  62 %  step 25/40   loss 1.84   131 tok/s   0:34 left"
    assert (
        table(width=80)[1]
        == "  sft        " + "━" * 7 + "╸" + "━" * 4 + "  62 %  step 25/40   loss 1.84   131 tok/s   0:34 left"
    )
    assert lines[2] == "  dpo        · waits for sft"
    assert lines[3] == "  final      · waits for dpo"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_lines_fit_the_window(width):
    long = "OutOfMemory: 78.9 GiB needed, 79.2 there. Try training.tokensPerBatch: 8192"
    lines = table(width, status=status(phase="Failed", reason="OutOfMemory", message=long), live={})
    assert max(map(len, lines)) <= width
    assert "tokensPerBatch" in "".join("".join(lines).split())
    assert max(map(len, table(width))) <= width


def test_figures_of_an_evaluation_have_their_interval():
    metrics = {"winRate": 0.71, "winRate.lower": 0.62, "winRate.upper": 0.79, "perplexity": 12.3}
    exam = {
        "name": "exam",
        "type": "evaluate",
        "phase": "Succeeded",
        "startTime": "2025-01-01T10:00:00Z",
        "completionTime": "2025-01-01T10:01:05Z",
        "metrics": [{"name": name, "value": str(value)} for name, value in metrics.items()],
    }
    [line] = stage_lines(None, PipelineStatus.model_validate({"stages": [exam]}), NOW)[1:]
    assert line.outcome_text == "1 min 5 s   win rate 0.71 [0.62, 0.79]   perplexity 12.3"


def test_plain_lines_say_each_change_once_and_progress_now_and_then(monkeypatch):
    console = Console(file=(output := io.StringIO()), width=200, highlight=False, markup=False)
    lines = PlainLines(console)
    seconds = [0.0]
    monkeypatch.setattr("plumbline_cli.display.live.time.monotonic", lambda: seconds[0])
    for step in range(30):
        seconds[0] = float(step)
        lines.show(view(live={"sft": live(message=f"step {step}/40")}))
    lines.show(view(status=status(phase="Succeeded", completionTime="2025-01-01T10:00:42Z"), stopping=True))
    assert output.getvalue().splitlines() == [
        "✔ preflight: 6 s",
        "▶ sft: runs",
        "▶ sft: step 10/40, 62 %, loss 1.84   131 tok/s, 0:34 left",
        "▶ sft: step 20/40, 62 %, loss 1.84   131 tok/s, 0:34 left",
        "stopping after a checkpoint; press Ctrl-C again to stop at once",
        "✔ sft: 42 s",
    ]


def test_a_failure_is_told_once():
    console = Console(file=(output := io.StringIO()), width=200, highlight=False, markup=False)
    lines = PlainLines(console)
    lines.show(view())
    lines.tell(PlannedEvent("Warning", "StageFailed", "sft: BadInput: no such file"))
    lines.show(view(status=status(phase="Failed", reason="BadInput", message="no such file")))
    lines.tell(PlannedEvent("Warning", "Failed", "sft: BadInput: no such file"))
    lines.tell(PlannedEvent("Warning", "StageRetried", "dpo: StorageUnavailable: no answer"))
    text = output.getvalue()
    assert text.count("no such file") == 1
    assert "StageRetried: dpo: StorageUnavailable: no answer" in text


def test_the_live_table_leaves_the_last_state_standing():
    console = Console(file=(output := io.StringIO()), width=80, force_terminal=True, color_system=None, highlight=False)
    with LiveTable(console, "Plumbline · demo") as display:
        display.show(view())
        display.show(view(status=status(phase="Succeeded", completionTime="2025-01-01T10:00:42Z")))
    text = output.getvalue()
    assert "Plumbline · demo" in text
    assert "sft        ✔ 42 s" in text.split("step 25/40")[-1]


def test_figures_are_a_table_with_what_they_rest_on():
    value = {"value": 0.71, "lower": 0.62, "upper": 0.79, "direction": "better"}
    row = {
        "metric": "winRate",
        "label": "win rate against base",
        "dataset": "questions",
        "prompts": 61,
        "confidence": 0.95,
        "judge": "rule “answers in at most 1 sentence”",
        "values": {"final": value},
    }
    summary = {"columns": ["base", "final"], "rows": [row]}
    lines = rendered(figures_table(summary))
    assert lines[0].split() == ["base", "final"]
    assert lines[1] == "  win rate against base  –     0.71 [0.62, 0.79]"
    assert figure_notes(summary) == [
        "win rate against base: 61 held-out prompts of questions, 95% intervals, judge: rule “answers in at most 1 sentence”"
    ]
    assert figures_table({"columns": [], "rows": []}) is None
    assert figures_table({}) is None


def test_nothing_is_cut_off_where_output_goes_to_a_file(tmp_path, monkeypatch):
    words = " ".join(f"word{number}" for number in range(60))
    summary = {
        "sentence": words,
        "columns": ["final"],
        "rows": [{"label": "perplexity", "values": {}, "dataset": words}],
    }
    failed = status(phase="Failed", reason="BadInput", message=words)
    with (tmp_path / "out").open("w+") as file:
        monkeypatch.setattr("sys.stdout", file)
        print_figures(out(), summary)
        print_overview(out(), pipeline_body(), failed, NOW)
        file.seek(0)
        shown = " ".join(file.read().split())
    assert shown.count("word59") == 3


def test_words():
    assert [duration(s) for s in (0, 5.6, 60, 281, 4320, 3600, 190000)] == [
        "0 s",
        "6 s",
        "1 min",
        "4 min 41 s",
        "1 h 12 min",
        "1 h",
        "2 d 4 h",
    ]
    assert [clock(s) for s in (-3, 34, 725, 3720)] == ["0:00", "0:34", "12:05", "1:02:00"]
    assert [number(v) for v in (0.0, 1.84031, 131.2, 12345.6, 0.05, 0.0012, 2e-5, -3.14159, float("inf"))] == [
        "0",
        "1.84",
        "131",
        "12,346",
        "0.05",
        "0.0012",
        "2e-05",
        "-3.14",
        "inf",
    ]
    assert (plural(1, "stage"), plural(1200, "stage")) == ("1 stage", "1,200 stages")
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert symbols(latin) is ASCII


def recorded(name: str, type_: str, parameters: dict[str, Any]) -> StageRecord:
    return StageRecord(
        name=name,
        type=type_,
        numerics_version=1,
        runtime_class="cpu",
        parameters=parameters,
        inputs=[],
        depends_on=[],
        resources=Resources(),
    )


def test_a_range_test_is_shown_as_one():
    entry = {"name": "probe", "type": "sft", "phase": "Succeeded"}
    entry["metrics"] = [{"name": "steps", "value": "60"}, {"name": "suggestedLearningRate", "value": "0.0021"}]
    [line] = stage_lines(None, PipelineStatus.model_validate({"stages": [entry]}), NOW)[1:]
    assert line.figures_text == "suggested learning rate 0.0021"
    training = {"learningRate": 2e-4, "epochs": 1, "globalBatch": 16, "rangeTest": {"from": 1e-6, "to": 0.1}}
    record = recorded("probe", "sft", {"training": training})
    assert describe(StageForecast(record, False, None)) == "sft, learning rates from 1e-06 to 0.1, no policy, batch 16"


def test_a_forecast_names_what_is_merged():
    parameters = {"method": "ties", "models": [{"stage": "kind"}, {"weight": 2}]}
    record = recorded("blend", "merge", parameters)
    assert describe(StageForecast(record, False, None)) == "merge, ties of kind, spec.model"


def rl_line(**entry):
    given = {"name": "rl", "type": "ppo", "startTime": "2025-01-01T10:00:00Z", **entry}
    shown = PipelineStatus.model_validate({"phase": "Running", "stages": [given]})
    return next(line for line in stage_lines(None, shown, NOW) if line.name == "rl")


def figures(**values: float):
    return [{"name": name.replace("_", "."), "value": str(value)} for name, value in values.items()]


def test_a_stage_that_samples_shows_reward_kl_and_length():
    line = rl_line(
        phase="Running", metrics=figures(kl=4.12, rewardStart=0.9, reward=1.6, length_growth=1.031, loss=0.1)
    )
    assert line.figures_text == "reward 0.90 → 1.60   KL 4.12   length +3 %"
    shorter = rl_line(phase="Running", metrics=figures(length_growth=0.8))
    assert shorter.figures_text == "length −20 %"


def test_an_aborted_stage_says_why_whether_it_failed_or_not():
    said = {"reason": "Aborted", "message": "kl above 15 for 5 steps (now 17.2)", "metrics": figures(reward=1.6)}
    done = {"completionTime": "2025-01-01T10:00:30Z"}
    assert rl_line(phase="Failed", **said).outcome_text == "Aborted: kl above 15 for 5 steps (now 17.2)"
    assert (
        rl_line(phase="Succeeded", **said, **done).outcome_text == "30 s   Aborted: kl above 15 for 5 steps (now 17.2)"
    )

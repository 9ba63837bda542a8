"""Preflight in this process, on a tiny model and small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from plumbline_api.record import fingerprints
from plumbline_api.stagerun import StageResult
from plumbline_api.training import Lora
from plumbline_trainer.context import StageOutput
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.models.quantization import layers_to_quantize, quantize
from plumbline_trainer.planning import selections
from plumbline_trainer.planning.problems import Problems
from plumbline_trainer.storage.manifests import commit_output
from support import tiny
from support.preflighting import pairs, pipeline, plan_of, preflight, rows
from support.trainer import LocalPipeline, output_folder, run_in_process, stage_context, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "base")


def commit(made: LocalPipeline, name: str) -> Path:
    """Stand in for a stage: commit some output for it."""
    run = made.stage(name)
    folder = made.folder / f"made-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(name)
    commit_output(stage_context(made.folder / f"scratch-{name}", run), StageOutput(folder, "policy"))
    return output_folder(run) / "weights"


def test_findings_are_pinned_counted_and_estimated(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    result, code = preflight(made)
    assert code == 0, result
    assert result.preflight is not None
    assert result.preflight.cached == "0000"
    assert [len(pin) for pin in made.pins] == [64] * 3
    assert any("q: instruction, 40 rows" in note for note in result.preflight.notes)
    plan = plan_of(made)
    by_name = {item["name"]: item for item in plan["datasets"]}
    splits = by_name["q"]["splits"]
    assert splits["train"]["rows"] + splits["test"]["rows"] == 40
    assert 5 < splits["train"]["tokens"]["p50"] < 64
    facts = plan["models"]["model"]
    assert (facts["architecture"], facts["layers"], facts["hidden"]) == ("llama", 2, 64)
    assert {"keyValueHeads", "contextLength"} < set(facts), "JSON is in camelCase here as everywhere"
    assert {"badExamples", "equalPairs"} < set(by_name["q"])
    assert "fromCache" in plan["inputs"][0]
    sft = plan["stages"][0]
    assert sft["fingerprint"] == fingerprints(made.record, made.pins)["sft"]
    assert sft["estimate"]["steps"] == 2 * -(-splits["train"]["rows"] // 8)
    assert sft["estimate"]["gpuHours"] == "unknown"
    assert plan["stages"][2]["why"] == "not computed yet"
    assert not list((tmp_path / "storage").rglob("probes/*"))


def test_a_second_look_reads_nothing_again(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = preflight(pipeline(tmp_path, model))

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("plumbline_trainer.planning.datasets.load_dataset", forbidden)
    monkeypatch.setattr("plumbline_trainer.stages.preflight.local_tokenizer", forbidden)
    monkeypatch.setattr("plumbline_trainer.planning.facts._read", forbidden)
    monkeypatch.setattr("plumbline_trainer.models.loading.load_skeleton", forbidden)
    monkeypatch.setattr("plumbline_trainer.storage.files.FileBackend.hash", forbidden)
    second, code = preflight(pipeline(tmp_path, model), 2)
    assert (second, code) == (first, 0)


def test_a_changed_source_is_pinned_anew(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    preflight(made)
    before = list(made.pins)
    write_jsonl(tmp_path / "q.jsonl", rows(30))
    preflight(made, 2)
    assert [a == b for a, b in zip(before, made.pins, strict=True)] == [True, False, True]
    result, code = run_in_process(tmp_path / "stale", _with_pins(made, before).stage("sft"))
    assert (code, result.reason) == (2, "InputChanged"), result
    assert "q.jsonl" in result.message


def _with_pins(made: LocalPipeline, pins: list[str]) -> LocalPipeline:
    other = LocalPipeline(made.body, made.folder)
    other.pins = pins
    return other


def test_a_stage_is_a_hit_only_on_hits_and_one_flipped_byte_makes_it_a_miss(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    preflight(made)
    files = {name: commit(made, name) for name in ("sft", "dpo", "final", "exam")}

    def cached(number: int) -> str:
        result, _ = preflight(made, number)
        assert result.preflight is not None
        return result.preflight.cached

    assert cached(2) == "1111"
    stat = files["final"].stat()
    files["final"].write_text("finaL")
    import os

    os.utime(files["final"], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rotting disks do
    assert cached(3) == "1100"
    assert [stage["why"] for stage in plan_of(made)["stages"]][2:] == [
        "weights is damaged",
        "an input is computed again",
    ]
    files["sft"].unlink()
    assert cached(4) == "0000"
    commit(made, "sft")
    assert cached(5) == "1000"
    assert plan_of(made)["stages"][1]["why"] == "it was made from other outputs of its inputs"


def test_formats_are_checked_once_they_are_known(tmp_path: Path, model: Path) -> None:
    made = pipeline(
        tmp_path, model, [{"name": "dpo", "dpo": {"dataset": "q"}}, {"name": "sft", "sft": {"dataset": "p"}}]
    )
    result, code = preflight(made)
    assert (code, result.reason) == (2, "BadInput")
    first, second = result.message.split("\n")
    assert first == (
        'spec.stages[0].dpo.dataset: "q" holds instruction rows (instruction, input, output); dpo needs preference rows '
        "(prompt, chosen, rejected) or ranked rows (prompt, completions). Datasets that fit: p"
    )
    assert second.startswith(
        'spec.stages[1].sft.dataset: "p" holds preference rows (prompt, chosen, rejected); sft needs'
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"lora": {"targets": ["q_proj", "v_porj"]}},
            'lora.targets: "v_porj" matches no layer of the model. There are: down_proj, gate_proj, k_proj, o_proj, q_proj, '
            "up_proj, v_proj",
        ),
        (
            {"lora": {"modulesToSave": ["lm_head"]}},
            "lora.modulesToSave: the embeddings and the output head of this model are one weight (tie_word_embeddings), "
            "so one cannot be trained without the other. Name both: [lm_head, embed_tokens]",
        ),
        ({"freeze": {"layers": 3}}, "freeze.layers: 3, but the model has 2 blocks"),
        (
            {"lora": {}, "freeze": {"layers": 2}},
            "freeze: every layer that lora would adapt is frozen. Name fewer layers or modules, or other lora.targets",
        ),
    ],
)
def test_parts_that_the_model_does_not_have_are_refused(
    tmp_path: Path, model: Path, fields: dict[str, Any], said: str
) -> None:
    made = pipeline(tmp_path, model, [{"name": "sft", "sft": {"dataset": "q"} | fields}])
    result, code = preflight(made)
    assert (code, result.reason, result.message) == (2, "BadInput", f"spec.stages[0].sft.{said}")


def test_a_head_that_no_reward_model_reads_is_not_trained(tmp_path: Path) -> None:
    untied = tmp_path / "untied"
    tiny.save_model(untied, tie=False)
    stage = {"name": "reward", "rewardModel": {"dataset": "p", "lora": {"modulesToSave": ["lm_head"]}}}
    result, code = preflight(pipeline(tmp_path, untied, [stage]))
    assert (code, result.reason) == (2, "BadInput")
    assert result.message == (
        'spec.stages[0].rewardModel.lora.modulesToSave: "lm_head" is the head over the vocabulary, which a reward model '
        "does not read. Leave it out"
    )


class TestVllm:
    """vLLM is refused where it cannot run: never another engine instead."""

    stages: ClassVar = [
        {"name": "rl", "grpo": {"prompts": "q", "rewards": [{"rule": "length"}], "rollout": {"engine": "vllm"}}}
    ]

    def test_without_a_device(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        result, code = preflight(pipeline(tmp_path, model, self.stages))
        assert (code, result.reason) == (2, "BadInput")
        assert result.message == (
            "spec.stages[0].grpo.rollout.engine: vllm needs a CUDA device, and this stage has none. Set "
            "resources.gpusPerNode to 1 or more, on a runtime with NVIDIA GPUs; or set it to huggingface"
        )

    def test_without_the_executable(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setenv("PLUMBLINE_VLLM", "/opt/none/vllm")
        result, code = preflight(pipeline(tmp_path, model, self.stages))
        assert (code, result.reason) == (2, "BadInput")
        assert 'this trainer image has no executable "/opt/none/vllm"' in result.message


class TestFourBits:
    """QLoRA is refused where it cannot be: never another precision instead."""

    stages: ClassVar = [{"name": "sft", "sft": {"dataset": "q", "lora": {"quantization": "nf4"}}}]

    def test_without_a_device(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        result, code = preflight(pipeline(tmp_path, model, self.stages))
        assert (code, result.reason) == (2, "BadInput")
        assert result.message == (
            "spec.stages[0].sft.lora.quantization: nf4 needs a CUDA device, and this stage has none. "
            "Set resources.gpusPerNode to 1 or more, on a runtime with NVIDIA GPUs; or leave quantization out"
        )

    def test_without_the_package(self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("plumbline_trainer.models.quantization.PACKAGE", "a_package_that_is_not_there")
        result, code = preflight(pipeline(tmp_path, model, self.stages))
        assert (code, result.reason) == (2, "BadInput")
        assert "needs the Python package" in result.message
        assert "The platform team adds it to the image" in result.message

    def test_a_judge_that_was_trained_on_them(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        suite = {"winRate": {"dataset": "p", "judge": {"stage": "reward"}}}
        stages = [
            {"name": "reward", "rewardModel": {"dataset": "p", "lora": {"quantization": "nf4"}}},
            {"name": "exam", "evaluate": {"suites": [suite]}},
        ]
        monkeypatch.setattr(selections, "_has_cuda", lambda _, stage: stage.type != "evaluate")
        monkeypatch.setattr(selections, "refuse_without_package", lambda _: None)
        result, code = preflight(pipeline(tmp_path, model, stages))
        assert (code, result.reason) == (2, "BadInput")
        assert result.message.startswith(
            "spec.stages[1].evaluate.suites[0].winRate.judge.stage: the lora.quantization of reward: nf4 needs a CUDA "
            "device, and this stage has none. Set resources.gpusPerNode to 1 or more"
        )

    def test_the_stage_refuses_as_well(self, tmp_path: Path, model: Path) -> None:
        from support.trainer import base_model, stage_run

        context = stage_context(tmp_path, stage_run(tmp_path))
        policy = load_policy(context, base_model(f"file://{model}"), precision="float32", device="cpu")
        with pytest.raises(InputError, match=r"lora.quantization: nf4 needs "):
            quantize(policy, Lora(quantization="nf4"), None)

    def test_what_is_trained_whole_is_held_whole(self) -> None:
        made = tiny.make_model(tie=False)
        lora = Lora(quantization="nf4", modules_to_save=["up_proj", "lm_head"])
        kinds = {name.rpartition(".")[2] for name in layers_to_quantize(made, lora, None)}
        assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}


def test_an_empty_split_is_named_with_the_remedy(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", rows(3))
    write_jsonl(tmp_path / "p.jsonl", pairs())
    result, code = preflight(pipeline(tmp_path, model, split={"test": 0.0001}))
    assert code == 2
    assert result.message.startswith(
        'spec.stages[3].evaluate.suites[0].perplexity.dataset: "q" has no rows in its test split'
    )
    assert "(3 rows: 3 in train)" in result.message
    assert "datasets[].split.test" in result.message


def test_rehearsal_and_ewc_are_read_and_counted(tmp_path: Path, model: Path) -> None:
    """A quarter of rehearsed rows makes an epoch a third longer; their prompts count as trained on."""
    training = {"globalBatch": 8, "maxLength": 64}
    old = {"name": "old", "source": f"file://{tmp_path}/old.jsonl", "format": "instruction"}
    write_jsonl(tmp_path / "old.jsonl", rows(30, start=5))
    stages: list[dict[str, Any]] = [
        {
            "name": "sft",
            "sft": {
                "dataset": "q",
                "rehearsal": [{"dataset": "old", "share": 0.25}],
                "ewc": {"dataset": "old"},
                "training": training,
            },
        },
        {"name": "exam", "evaluate": {"suites": [{"perplexity": {"dataset": "q"}}]}},
    ]
    made = pipeline(tmp_path, model, stages, others=(old,))
    result, code = preflight(made)
    assert code == 0, result
    assert [item.role for item in made.stage("sft").inputs] == [
        "model",
        "dataset",
        "rehearsal.0.dataset",
        "ewc.dataset",
    ]
    plan = plan_of(made)
    own = next(item for item in plan["datasets"] if item["name"] == "q")["splits"]["train"]["rows"]
    assert plan["stages"][0]["estimate"]["steps"] == -(-(own + round(own / 3)) // 8)
    assert [leak["trained"] for leak in plan["leaks"]] == ["old"]


def test_pairs_cannot_be_rehearsed(tmp_path: Path, model: Path) -> None:
    """Nor where only reading them shows that they are pairs."""
    sft = {"dataset": "q", "rehearsal": [{"dataset": "p", "share": 0.25}]}
    result, code = preflight(pipeline(tmp_path, model, [{"name": "sft", "sft": sft}]))
    assert code == 2
    assert result.message.startswith('spec.stages[0].sft.rehearsal[0].dataset: "p" holds preference rows')


def test_early_stopping_without_an_evaluation_row_is_named(tmp_path: Path, model: Path) -> None:
    sft = {"dataset": "q", "training": {"earlyStopping": {}, "evaluateEverySteps": 2}}
    made = pipeline(tmp_path, model, [{"name": "sft", "sft": sft}], split={"evaluation": 0.0001})
    result, code = preflight(made)
    assert code == 2
    assert result.message.startswith(
        'spec.stages[0].sft.training.earlyStopping: "q" has no rows in its evaluation split'
    )
    assert "datasets[].split.evaluation" in result.message


def test_bad_rows_are_named_or_counted(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", [*rows(), {"instruction": 7, "output": "x"}])
    write_jsonl(tmp_path / "p.jsonl", pairs())
    result, code = preflight(pipeline(tmp_path, model))
    assert code == 2
    assert result.message == (
        f'file://{tmp_path}/q.jsonl line 41: "instruction" is a number, text expected '
        "(1 bad row of 41; allow some with datasets[].maxBadRows)"
    )
    result, code = preflight(pipeline(tmp_path, model, maxBadRows=1), 2)
    assert code == 0
    assert result.preflight is not None
    assert any("1 bad row skipped" in note for note in result.preflight.notes)


def test_prompts_trained_on_and_tested_on_are_found(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", rows())
    write_jsonl(tmp_path / "p.jsonl", [*pairs(4), {"prompt": "SAY  39", "chosen": "It is 39.", "rejected": "No."}])
    stages = [
        {"name": "sft", "sft": {"dataset": "q"}},
        {"name": "exam", "evaluate": {"suites": [{"preferenceAccuracy": {"dataset": "p"}}]}},
    ]
    made = pipeline(tmp_path, model, stages, split={"test": 0.0})
    made.body["spec"]["datasets"][1] = {"name": "p", "source": f"file://{tmp_path}/p.jsonl", "role": "test"}
    made = LocalPipeline(made.body, tmp_path)
    result, code = preflight(made)
    assert code == 0, result
    assert plan_of(made)["leaks"] == [{"trained": "q", "tested": "p", "count": 5, "of": 5}]
    assert result.preflight is not None
    assert result.preflight.notes[0] == "5 of 5 held-out prompts of p stand in the training rows of q"


def test_another_numerics_version_is_refused(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    stages = [stage.model_copy(update={"numerics_version": 2}) for stage in made.record.stages]
    made.record = made.record.model_copy(update={"stages": stages})
    result, code = preflight(made)
    assert (code, result.reason) == (2, "RuntimeTooOld")


def test_the_findings_of_48_inputs_fit_a_termination_message(tmp_path: Path, model: Path) -> None:
    datasets, stages = [], []
    for number in range(47):
        write_jsonl(tmp_path / f"d{number}.jsonl", rows(3, start=100 * number))
        datasets.append({"name": f"data-{number}", "source": f"file://{tmp_path}/d{number}.jsonl"})
        stages.append({"name": f"s{number}", "sft": {"dataset": f"data-{number}"}})
    made = pipeline(tmp_path, model)
    made.body["spec"]["datasets"], made.body["spec"]["stages"] = datasets, stages
    made = LocalPipeline(made.body, tmp_path)
    result, code = preflight(made)
    assert code == 0, result
    message = StageResult.from_message(result.to_message())
    assert message is not None
    assert message.preflight is not None
    assert len(message.preflight.digests) == 48


class TestProblems:
    """Everything that can be found wrong by itself is told at once, each in the words that it has alone."""

    def test_of_stages_and_datasets(self, tmp_path: Path, model: Path) -> None:
        write_jsonl(tmp_path / "q.jsonl", [*rows(), {"instruction": 7, "output": "x"}])
        write_jsonl(tmp_path / "p.jsonl", pairs())
        lora: dict[str, Any] = {"lora": {"targets": ["q_porj"]}}
        stages = [
            {"name": "one", "sft": {"dataset": "q"} | lora},
            {"name": "two", "sft": {"dataset": "p"} | lora},
            {"name": "three", "sft": {"dataset": "gone"}},
        ]
        gone = {"name": "gone", "source": f"file://{tmp_path}/gone.jsonl", "format": "instruction"}
        made = pipeline(tmp_path, model, stages, others=(gone,))
        result, code = preflight(made)
        assert (code, result.reason) == (2, "BadInput")
        told = result.message.split("\n")
        starts = [
            f'"file://{tmp_path}/gone.jsonl" is not there',
            'spec.stages[0].sft.lora.targets: "q_porj" matches no layer of the model',
            'spec.stages[1].sft.lora.targets: "q_porj" matches no layer of the model',
            f'file://{tmp_path}/q.jsonl line 41: "instruction" is a number, text expected (1 bad row of 41;',
            'spec.stages[1].sft.dataset: "p" holds preference rows',
        ]
        assert [line[: len(start)] for line, start in zip(told, starts, strict=True)] == starts
        assert [item["message"] for item in plan_of(made)["problems"]] == told

    def test_of_data_beside_a_model_that_is_not_there(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "q.jsonl", [*rows(), {"instruction": 7, "output": "x"}])
        write_jsonl(tmp_path / "p.jsonl", pairs())
        result, code = preflight(pipeline(tmp_path, tmp_path / "nowhere"))
        assert code == 2
        first, second = result.message.split("\n")
        assert first.startswith(f'there is no model at "file://{tmp_path}/nowhere"')
        assert second.startswith(f'file://{tmp_path}/q.jsonl line 41: "instruction" is a number')

    def test_more_than_a_termination_message_holds(self, tmp_path: Path, model: Path) -> None:
        others = tuple({"name": f"d{n}", "source": f"file://{tmp_path}/nowhere/{n}.jsonl"} for n in range(40))
        stages = [{"name": f"s{n}", "sft": {"dataset": f"d{n}"}} for n in range(40)]
        made = pipeline(tmp_path, model, stages, others=others)
        result, code = preflight(made)
        assert code == 2
        *told, last = result.message.split("\n")
        assert len(told) > 10
        assert last == f"and {40 - len(told)} more, in plan.json"
        carried = StageResult.from_message(result.to_message())
        assert carried is not None
        assert carried.message == result.message, "nothing is cut off"
        assert len(plan_of(made)["problems"]) == 40

    def test_reasons_that_differ_are_bad_input(self) -> None:
        problems = Problems()
        for reason in ("StorageDenied", "BadInput"):
            with problems.collecting():
                raise InputError(f"{reason}: x", reason=reason)
        with problems.collecting():
            raise InputError("BadInput: x")
        found = problems.as_error("plan.json")
        assert (found.reason, str(found)) == ("BadInput", "StorageDenied: x\nBadInput: x"), "no fault twice"

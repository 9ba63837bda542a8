"""The record, the fingerprints and what travels between operator and trainer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plumbline_api.errors import InputError
from plumbline_api.methods import Sft
from plumbline_api.names import JOB_NAME_MAX, job_name
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord, fingerprints
from plumbline_api.resolve import resolve
from plumbline_api.runtime import AlignmentRuntime
from plumbline_api.stagerun import STAGE_RESULT_MAX_BYTES, PreflightFindings, StageResult, StageRun
from plumbline_api.stages import Merge
from support.pipelines import STAGES, pipeline_body, runtime_body

DIGESTS = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]


def record_of(body: dict[str, Any]) -> RunRecord:
    return resolve(
        AlignmentPipeline.parse(body), AlignmentRuntime.parse(runtime_body()), operator_version="test", place="cluster"
    )


def prints(**changes: Any) -> dict[str, str]:
    return fingerprints(record_of(pipeline_body(**changes)), DIGESTS)


def replaced(index: int, stage: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage if i == index else s for i, s in enumerate(STAGES)]


# Golden: these change only when a numerics version is raised, a default is changed or the fingerprint's definition, and
# then every stage in every user's storage is computed anew. Never edit them for convenience.
GOLDEN = {
    "domain": "a6287c3de851e2e438fc477a2c51a17f237bc372a1607cb9ec4c4b0849bf9850",
    "sft": "416f1c085bda77bd62f3cbb2a9b34466fddbad903ff1e9a5aee90e90f7319464",
    "dpo": "19e38a7f7f9d11322d2aaa4dd9a59fb10509e890030e37bc8e7e47b130b9126c",
    "final": "1d30a5084c1fb5c471019319fb6c845b15cdb3d8acea7ce4227debdbe92a6401",
    "exam": "ac0c85ce41d455c98185a8856901d65cceab10ef87d136a607dc64fa1edf92c7",
}


def test_golden_fingerprints() -> None:
    assert prints() == GOLDEN


def test_a_name_is_not_new_work() -> None:
    renamed = [{**s, "name": s["name"] + "-x"} for s in STAGES]
    assert list(prints(stages=renamed, name="other").values()) == list(prints().values())


def test_an_edit_changes_the_stage_and_what_depends_on_it() -> None:
    edited = replaced(1, {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 8}}})
    before, after = prints(), prints(stages=edited)
    assert [name for name in before if before[name] != after[name]] == ["sft", "dpo", "final", "exam"]


def test_resources_retries_and_what_steers_a_run_do_not_change_fingerprints() -> None:
    stage = {
        "name": "sft",
        "retries": 5,
        "timeout": "1h",
        "resources": {"nodes": 2, "memory": "8Gi"},
        "sft": {
            "dataset": "tickets",
            "lora": {"rank": 4},
            "training": {"checkpointEverySteps": 3, "gradientCheckpointing": True},
        },
    }
    assert prints(stages=replaced(1, stage)) == prints()


def test_seed_and_data_change_fingerprints() -> None:
    assert set(prints().values()).isdisjoint(prints(seed=1).values())
    record = record_of(pipeline_body())
    changed = fingerprints(record, ["a" * 64, "b" * 64, "e" * 64, "d" * 64])
    assert [n for n, f in changed.items() if f != GOLDEN[n]] == ["sft", "dpo", "final", "exam"]


class TestMergeOfModels:
    """A stage with several policies: roles in order, weights and names in the fingerprint as they should."""

    def blend(self, *models: dict[str, Any], **fields: Any) -> RunRecord:
        stage = {"name": "blend", "merge": {"method": "ties", "models": list(models)} | fields}
        return record_of(pipeline_body(stages=[*STAGES[:3], stage, STAGES[3]]))

    def print_of(self, *models: dict[str, Any], **fields: Any) -> str:
        return fingerprints(self.blend(*models, **fields), DIGESTS)["blend"]

    def test_inputs_and_parameters(self) -> None:
        record = self.blend({"stage": "sft"}, {"stage": "dpo", "weight": 2})
        stage = record.stage("blend")
        assert [(ref.role, ref.stage, ref.external) for ref in stage.inputs] == [
            ("models.0", "sft", None),
            ("models.1", "dpo", None),
            ("base", None, 0),
        ]
        assert stage.depends_on == ["sft", "dpo"]
        parameters = dict(stage.parameters)
        assert parameters.pop("seed") == 0
        assert (parameters["density"], parameters["scale"]) == (0.2, 1.0)
        assert Merge.model_validate(parameters).models is not None
        assert record.stage("final").inputs[0].stage == "blend"

    def test_a_model_without_a_stage_is_the_pipelines(self) -> None:
        record = self.blend({"stage": "sft"}, {}, method="linear")
        assert [(ref.role, ref.stage, ref.external) for ref in record.stage("blend").inputs] == [
            ("models.0", "sft", None),
            ("models.1", None, 0),
        ]

    def test_order_weights_method_density_and_base_are_work(self) -> None:
        one, two = {"stage": "sft"}, {"stage": "dpo"}
        found = [
            self.print_of(one, two),
            self.print_of(two, one),
            self.print_of(one, two | {"weight": 2}),
            self.print_of(one | {"weight": 2}, two),
            self.print_of(one, two, density=0.5),
            self.print_of(one, two, method="dareTies"),
            self.print_of(one, two, base="domain"),
            self.print_of(one, two, method="linear"),
        ]
        assert len(set(found)) == len(found)

    def test_a_default_that_is_written_out_is_the_same_work(self) -> None:
        one, two = {"stage": "sft"}, {"stage": "dpo"}
        assert self.print_of(one, two) == self.print_of(one, two, density=0.2, scale=1.0)

    def test_names_are_not_work(self) -> None:
        stages = [
            {**STAGES[0], "name": "other"},
            {**STAGES[1], "name": "sft-2"},
            {**STAGES[2], "name": "dpo-2"},
            {
                "name": "mix",
                "merge": {"method": "ties", "models": [{"stage": "sft-2"}, {"stage": "dpo-2"}], "base": "other"},
            },
        ]
        found = fingerprints(record_of(pipeline_body(stages=stages)), DIGESTS)
        assert found["mix"] == self.print_of({"stage": "sft"}, {"stage": "dpo"}, base="domain")


def test_an_uncached_stage_is_its_pipelines_own() -> None:
    stages = replaced(0, {**STAGES[0], "cache": False})
    assert prints(stages=stages)["domain"] != prints(stages=stages, uid="another")["domain"]


def test_effective_parameters_parse_again_and_say_everything() -> None:
    parameters = dict(record_of(pipeline_body()).stage("sft").parameters)
    assert parameters.pop("seed") == 0
    sft = Sft.model_validate(parameters)
    assert sft.training.learning_rate == 2e-4
    assert sft.training.precision == "float32"
    assert sft.lora is not None
    assert sft.lora.alpha == 8.0


def test_record_survives_the_wire() -> None:
    record = record_of(pipeline_body())
    again = RunRecord.model_validate(record.to_wire())
    assert again == record
    assert again.digest() == record.digest()


@given(
    pipeline=st.from_regex(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True),
    stage=st.from_regex(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?", fullmatch=True),
    attempt=st.integers(1, 500),
)
def test_job_names_fit_and_tell_attempts_apart(pipeline: str, stage: str, attempt: int) -> None:
    name = job_name(pipeline=pipeline, stage=stage, uid="u", fingerprint="f", attempt=attempt)
    assert len(name) <= JOB_NAME_MAX
    assert name[0].isalpha()
    assert name != job_name(pipeline=pipeline, stage=stage, uid="u", fingerprint="f", attempt=attempt + 1)


@given(message=st.text(max_size=20000), notes=st.lists(st.text(max_size=160), max_size=16))
def test_a_result_always_fits_a_termination_message(message: str, notes: list[str]) -> None:
    findings = PreflightFindings(digests=["x" * 43] * 48, cached="1" * 64, notes=notes)
    result = StageResult(outcome="Failed", reason="BadInput", message=message, preflight=findings)
    text = result.to_message()
    assert len(text.encode()) < STAGE_RESULT_MAX_BYTES
    again = StageResult.from_message(text)
    assert again is not None
    assert again.preflight is not None
    assert again.preflight.digests == findings.digests


def test_a_message_that_is_no_result_is_none() -> None:
    assert StageResult.from_message("") is None
    assert StageResult.from_message("Traceback (most recent call last)") is None


def test_a_trainer_of_another_contract_says_so() -> None:
    with pytest.raises(InputError, match="contract version") as caught:
        StageRun.from_json('{"contractVersion": 99}')
    assert caught.value.reason == "RuntimeTooOld"

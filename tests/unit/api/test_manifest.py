"""What a typo, a wrong type or a wrong reference gets."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_api.check import check
from plumbline_api.errors import ManifestError
from plumbline_api.graph import BASE_MODEL, dependencies, start_of
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.runtime import AlignmentRuntime
from support.pipelines import DATASETS, STAGES, pipeline_body, runtime_body


def problems_with(body: dict[str, Any], runtime: dict[str, Any] | None = None, place: str = "anywhere") -> list[str]:
    try:
        pipeline = AlignmentPipeline.parse(body)
    except ManifestError as error:
        return [str(p) for p in error.problems]
    offered = None if runtime is None else AlignmentRuntime.parse(runtime)
    return [str(p) for p in check(pipeline, offered, place=place)]  # type: ignore[arg-type]


def stages_with(index: int, **changes: Any) -> list[dict[str, Any]]:
    stages = [dict(stage) for stage in STAGES]
    stages[index] = {**stages[index], **changes}
    return stages


def retyped(index: int, **type_: Any) -> list[dict[str, Any]]:
    """The stages with one of another type."""
    stages = [dict(stage) for stage in STAGES]
    stages[index] = {"name": stages[index]["name"], **type_}
    return stages


def test_a_range_test_is_no_start_for_what_follows() -> None:
    probe = {"name": "probe", "sft": {"dataset": "tickets", "training": {"rangeTest": {}}}}
    pipeline = AlignmentPipeline.parse(pipeline_body(stages=[STAGES[0], probe, *STAGES[1:]]))
    assert check(pipeline) == []
    assert start_of(pipeline.spec, 2) == "domain"


REWARD = {"name": "reward", "rewardModel": {"dataset": "prefs", "lora": {"rank": 4}}}


def exam_of(name: str, *, judge: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    return {"name": name, "evaluate": {"suites": [{"winRate": {"dataset": "prefs", "judge": judge}}], **evaluate}}


def test_the_nearest_earlier_policy_is_no_reward_model() -> None:
    spec = AlignmentPipeline.parse(pipeline_body(stages=[STAGES[1], REWARD, STAGES[2], STAGES[3]])).spec
    assert [start_of(spec, index) for index in range(4)] == [BASE_MODEL, "sft", "sft", "dpo"]


def test_a_judge_is_waited_for() -> None:
    body = pipeline_body(stages=[STAGES[1], REWARD, exam_of("exam", judge={"stage": "reward"}, baseline="sft")])
    assert problems_with(body) == []
    assert dependencies(AlignmentPipeline.parse(body).spec, 2) == ["sft", "reward"]


def test_a_full_pipeline_fits() -> None:
    assert problems_with(pipeline_body(), runtime_body(), "cluster") == []


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown field": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "bta": 0.1})},
        ["spec.stages[2].dpo.bta: unknown field. Did you mean beta?"],
    ),
    "unknown nested field": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "training": {"learningRte": 1e-4}})},
        ["spec.stages[1].sft.training.learningRte: unknown field. Did you mean learningRate?"],
    ),
    "unknown stage type": (
        {"stages": [{"name": "s", "dop": {"dataset": "prefs"}}]},
        [
            "spec.stages[0].dop: unknown field. Did you mean dpo?",
        ],
    ),
    "two stage types": (
        {"stages": stages_with(0, sft={"dataset": "tickets"})},
        [
            "spec.stages[0]: exactly one stage type must be set, pretrain and sft are; choose one of: pretrain, sft, rewardModel, dpo, kto, orpo, simpo, cpo, rrhf, ppo, grpo, rloo, reinforce, merge, evaluate"
        ],
    ),
    "wrong dataset format": (
        {"stages": stages_with(2, dpo={"dataset": "tickets"})},
        [
            'spec.stages[2].dpo.dataset: "tickets" holds instruction rows (instruction, input, output); dpo needs preference rows '
            "(prompt, chosen, rejected) or ranked rows (prompt, completions). Datasets that fit: prefs"
        ],
    ),
    "missing dataset": (
        {"stages": stages_with(2, dpo={"dataset": "pref"})},
        ['spec.stages[2].dpo.dataset: there is no dataset "pref". Did you mean prefs?'],
    ),
    "a stage as a dataset": (
        {"stages": stages_with(2, dpo={"dataset": "sft"})},
        ['spec.stages[2].dpo.dataset: "sft" is a stage; a dataset is needed here. Datasets: manuals, tickets, prefs'],
    ),
    "a report as a policy": (
        {"stages": [*STAGES, {"name": "again", "model": "exam", "merge": {}}]},
        [
            'spec.stages[5].model: "exam" (evaluate) yields a report; a policy is needed here. Stages that fit: domain, sft, dpo, final'
        ],
    ),
    "a range test as a policy": (
        {
            "stages": [
                STAGES[0],
                {"name": "sft", "sft": {"dataset": "tickets", "training": {"rangeTest": {"from": 1e-6, "to": 0.1}}}},
                {"name": "dpo", "model": "sft", "dpo": {"dataset": "prefs"}},
            ]
        },
        ['spec.stages[2].model: "sft" (sft) yields a report; a policy is needed here. Stages that fit: domain'],
    ),
    "early stopping without an evaluation split": (
        {
            "stages": stages_with(
                1, sft={"dataset": "tickets", "training": {"earlyStopping": {}, "evaluateEverySteps": 5}}
            )
        },
        [
            'spec.stages[1].sft.training.earlyStopping: "tickets" has no evaluation split to compare on. '
            "Set spec.datasets[1].split.evaluation (such as 0.1)"
        ],
    ),
    "early stopping without evaluations on the way": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "training": {"earlyStopping": {}}})},
        ["spec.stages[2].dpo.training: earlyStopping compares evaluations on the way; set evaluateEverySteps as well"],
    ),
    "a field of another schedule": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "training": {"schedule": {"cycles": 3}}})},
        [
            "spec.stages[2].dpo.training.schedule: cycles belongs to type cosineRestarts, not to linear; leave it out "
            "or change type"
        ],
    ),
    "rehearsal of pairs": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "rehearsal": [{"dataset": "prefs", "share": 0.1}]})},
        [
            'spec.stages[1].sft.rehearsal[0].dataset: "prefs" holds preference rows (prompt, chosen, rejected); sft '
            "needs instruction rows (context, response) or dialogues (USER: … ASSISTANT: …) or instruction rows "
            "(instruction, input, output) or chats (messages with role and content) or instruction rows (prompt, "
            "completion) or raw text. Datasets that fit: manuals, tickets"
        ],
    ),
    "ewc on a dataset that is not there": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "ewc": {"dataset": "manual"}})},
        ['spec.stages[1].sft.ewc.dataset: there is no dataset "manual". Did you mean manuals?'],
    ),
    "a reward model as a policy": (
        {"stages": [*STAGES, REWARD, {"name": "again", "model": "reward", "merge": {}}]},
        [
            'spec.stages[6].model: "reward" (rewardModel) yields a rewardModel; a policy is needed here. '
            "Stages that fit: domain, sft, dpo, final"
        ],
    ),
    "a reward model as a reference": (
        {"stages": [*STAGES, REWARD, {"name": "again", "dpo": {"dataset": "prefs", "reference": "reward"}}]},
        [
            'spec.stages[6].dpo.reference: "reward" (rewardModel) yields a rewardModel; a policy is needed here. '
            "Stages that fit: domain, sft, dpo, final"
        ],
    ),
    "a reward model as a baseline": (
        {"stages": [*STAGES, REWARD, exam_of("again", judge={"stage": "reward"}, baseline="reward")]},
        [
            'spec.stages[6].evaluate.baseline: "reward" (rewardModel) yields a rewardModel; a policy is needed here. '
            "Stages that fit: domain, sft, dpo, final"
        ],
    ),
    "a policy as a judge": (
        {"stages": [*STAGES, REWARD, exam_of("again", judge={"stage": "sft"})]},
        [
            'spec.stages[6].evaluate.suites[0].winRate.judge.stage: "sft" (sft) yields a policy; a rewardModel is needed '
            "here. Stages that fit: reward"
        ],
    ),
    "a reward model on instructions": (
        {"stages": [*STAGES, {"name": "reward", "rewardModel": {"dataset": "tickets"}}]},
        [
            'spec.stages[5].rewardModel.dataset: "tickets" holds instruction rows (instruction, input, output); rewardModel '
            "needs preference rows (prompt, chosen, rejected) or ranked rows (prompt, completions). Datasets that fit: prefs"
        ],
    ),
    "no heads": (
        {"stages": [{"name": "reward", "rewardModel": {"dataset": "prefs", "heads": 0}}]},
        ["spec.stages[0].rewardModel.heads: 0 is too small; it must be at least 1"],
    ),
    "merge fields without a method": (
        {"stages": stages_with(3, merge={"models": [{"stage": "sft"}, {"stage": "dpo"}], "density": 0.5})},
        [
            "spec.stages[3].merge.method: is needed beside models, density. "
            "Methods: linear, slerp, ties, dareLinear, dareTies"
        ],
    ),
    "fields that a merge method does not read": (
        {
            "stages": stages_with(
                3,
                model="dpo",
                merge={"method": "linear", "models": [{"stage": "sft"}, {"stage": "dpo"}], "t": 0.1, "base": "domain"},
            )
        },
        [
            "spec.stages[3].merge.base: linear does not read it; leave it out, or choose dareLinear or dareTies or ties",
            "spec.stages[3].merge.t: linear does not read it; leave it out, or choose slerp",
            "spec.stages[3].model: linear merges what merge.models names; leave it out",
        ],
    ),
    "slerp of three": (
        {
            "stages": stages_with(
                3, merge={"method": "slerp", "models": [{"stage": "sft"}, {"stage": "dpo"}, {"stage": "domain"}]}
            )
        },
        ["spec.stages[3].merge.models: slerp takes two models, 3 are named. For more use linear"],
    ),
    "slerp with weights": (
        {
            "stages": stages_with(
                3, merge={"method": "slerp", "models": [{"stage": "sft", "weight": 2}, {"stage": "dpo"}]}
            )
        },
        [
            "spec.stages[3].merge.models: slerp does not read weight; set t, from 0 (the first) to 1 (the second)",
        ],
    ),
    "a merge without models": (
        {"stages": stages_with(3, merge={"method": "ties"})},
        ["spec.stages[3].merge.models: ties needs two or more models, such as {stage: sft}"],
    ),
    "a model merged twice, and with its base": (
        {
            "stages": stages_with(
                3,
                merge={
                    "method": "ties",
                    "models": [{"stage": "sft"}, {"stage": "sft"}, {"stage": "domain"}],
                    "base": "domain",
                },
            )
        },
        [
            'spec.stages[3].merge.models[1].stage: "sft" is named twice; give it one larger weight',
            "spec.stages[3].merge.models[2].stage: is the base itself: it holds no changes. Leave it out, or use linear",
        ],
    ),
    "what cannot be merged": (
        {
            "stages": [
                *STAGES,
                {
                    "name": "blend",
                    "merge": {"method": "ties", "models": [{"stage": "exam"}, {"stage": "spt"}], "base": "prefs"},
                },
            ]
        },
        [
            'spec.stages[5].merge.models[0].stage: "exam" (evaluate) yields a report; a policy is needed here. '
            "Stages that fit: domain, sft, dpo, final",
            'spec.stages[5].merge.models[1].stage: there is no stage "spt". Did you mean sft?',
            'spec.stages[5].merge.base: "prefs" is a dataset; a stage is needed here. '
            "Stages: domain, sft, dpo, final, exam, blend",
        ],
    ),
    "a merge of what starts from it": (
        {
            "stages": [
                *stages_with(3, merge={"method": "linear", "models": [{"stage": "sft"}, {"stage": "late"}]}),
                {"name": "late", "model": "final", "merge": {}},
            ]
        },
        [
            "spec.stages[3]: the stages form a cycle: final → late → final. Take one of these references (model, after, …) out"
        ],
    ),
    "cycle": (
        {"stages": stages_with(0, model="dpo")},
        [
            "spec.stages[0]: the stages form a cycle: domain → dpo → sft → domain. Take one of these references (model, "
            "after, …) out"
        ],
    ),
    "two stages of one name": (
        {"stages": stages_with(2, name="sft")},
        ['spec.stages[2].name: "sft" is taken by spec.stages[1]; stages and datasets share one name space'],
    ),
    "built-in name": (
        {"stages": stages_with(2, name="preflight")},
        ['spec.stages[2].name: "preflight" is the name of a built-in step; choose another'],
    ),
    "no test split": (
        {"datasets": [DATASETS[0], {**DATASETS[1], "split": {}}, DATASETS[2]]},
        [
            'spec.stages[4].evaluate.suites[0].perplexity.dataset: "tickets" has no test split. Set spec.datasets[1].split.test '
            "(such as 0.1), or spec.datasets[1].role to test if no stage trains on it"
        ],
    ),
    "negative beta": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": 0})},
        ["spec.stages[2].dpo.beta: 0 is too small; it must be over 0"],
    ),
    "text for a number": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": "0.1"})},
        ['spec.stages[2].dpo.beta: this is the text "0.1"; a number is needed, without quotes'],
    ),
    "a switch for a number": (
        {"stages": stages_with(1, retries=True)},
        ["spec.stages[1].retries: this is true; a whole number is needed"],
    ),
    "a number for a duration": (
        {"stages": stages_with(1, timeout=300)},
        ["spec.stages[1].timeout: this is the number 300; write a duration such as 90s, 30m or 1h30m"],
    ),
    "a fraction for a whole number": (
        {"stages": stages_with(1, retries=1.5)},
        ["spec.stages[1].retries: 1.5 is no whole number"],
    ),
    "a whole number written as a fraction": ({"stages": stages_with(1, retries=2.0)}, []),
    "a number that is none": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": float("nan")})},
        ["spec.stages[2].dpo.beta: nan is no finite number"],
    ),
    "a mapping for a list": ({"stages": {}}, ["spec.stages: this is a mapping; a list is needed"]),
    "no stages": ({"stages": []}, ["spec.stages: the list must not be empty"]),
    "a type without its settings": (
        {"stages": stages_with(3, merge=None)},
        ["spec.stages[3].merge: nothing is set below it; leave the field out, or write {} for its defaults"],
    ),
    "an adapter without its settings": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "lora": None})},
        ["spec.stages[1].sft.lora: nothing is set below it; leave the field out, or write {} for its defaults"],
    ),
    "a quantity that is none": (
        {"stages": stages_with(1, resources={"memory": "lots"})},
        ['spec.stages[1].resources.memory: "lots" must be a quantity such as 500m, 4 or 16Gi'],
    ),
    "a fraction as a quantity": (
        {"stages": stages_with(1, resources={"cpu": 0.5, "memory": 4})},
        ['spec.stages[1].resources.cpu: this is the number 0.5; write it as text: "0.5"'],
    ),
    "a name that is none": (
        {"stages": stages_with(1, name="Größe")},
        [
            'spec.stages[1].name: "Größe" must be small letters, digits and dashes, with a letter first and no dash at '
            "the end"
        ],
    ),
    "kto on pairs with a named reference": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "prefs", "reference": "sft"}}]},
        [],
    ),
    "kto on raw text": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "manuals"}}]},
        [
            'spec.stages[5].kto.dataset: "manuals" holds raw text; kto needs preference rows (prompt, chosen, rejected) or '
            "ranked rows (prompt, completions) or unpaired rows (prompt, completion, label). Datasets that fit: prefs"
        ],
    ),
    "unpaired rows for dpo": (
        {"datasets": [*DATASETS[:2], {**DATASETS[2], "format": "unpaired"}], "stages": STAGES[:3]},
        [
            'spec.stages[2].dpo.dataset: "prefs" holds unpaired rows (prompt, completion, label); dpo needs preference rows '
            "(prompt, chosen, rejected) or ranked rows (prompt, completions). Datasets that fit: none"
        ],
    ),
    "kto with a batch of one": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "prefs", "training": {"globalBatch": 1}}}]},
        ["spec.stages[5].kto.training.globalBatch: 1 is too small; it must be at least 2"],
    ),
    "kto with a reference that is none": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "prefs", "reference": "exam"}}]},
        [
            'spec.stages[5].kto.reference: "exam" (evaluate) yields a report; a policy is needed here. Stages that fit: '
            "domain, sft, dpo, final"
        ],
    ),
    **{
        f"{stage} with beta 0": (
            {"stages": retyped(2, **{stage: {"dataset": "prefs", "beta": 0}})},
            [f"spec.stages[2].{stage}.beta: 0 is too small; it must be over 0"],
        )
        for stage in ("orpo", "simpo", "cpo")
    },
    "negative margin": (
        {"stages": retyped(2, simpo={"dataset": "prefs", "gamma": -1})},
        ["spec.stages[2].simpo.gamma: -1 is too small; it must be at least 0"],
    ),
    "rrhf on instruction rows": (
        {"stages": retyped(2, rrhf={"dataset": "tickets"})},
        [
            'spec.stages[2].rrhf.dataset: "tickets" holds instruction rows (instruction, input, output); rrhf needs preference '
            "rows (prompt, chosen, rejected) or ranked rows (prompt, completions). Datasets that fit: prefs"
        ],
    ),
    "unknown loss": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipo_sum"})},
        [
            'spec.stages[2].dpo.loss: "ipo_sum" is not one of sigmoid, robust, ipo, ipoSum, hinge, exo, nca, apoZero, apoDown. '
            "Did you mean ipoSum?"
        ],
    ),
    "label smoothing of a loss without": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "hinge", "labelSmoothing": 0.1})},
        [
            "spec.stages[2].dpo.labelSmoothing: 0.1 with loss hinge, which has no label smoothing; leave it out, or take loss "
            "exo, robust, sigmoid"
        ],
    ),
    "robust without label smoothing": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "robust"})},
        [
            "spec.stages[2].dpo: loss robust needs labelSmoothing, the share of pairs believed to be swapped, such as 0.1"
        ],
    ),
    "robust with half of the labels swapped": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "robust", "labelSmoothing": 0.5})},
        ["spec.stages[2].dpo.labelSmoothing: 0.5 is too large; it must be below 0.5"],
    ),
    "exo without label smoothing": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "exo", "labelSmoothing": 0})},
        ["spec.stages[2].dpo.labelSmoothing: 0 with loss exo, which needs a share above 0; leave it out for 0.001"],
    ),
    "means of means": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipo", "lengthNormalized": True})},
        [
            "spec.stages[2].dpo.lengthNormalized: true with loss ipo, which takes means over tokens by itself; leave it out"
        ],
    ),
    "means of sums": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipoSum", "lengthNormalized": True})},
        [
            "spec.stages[2].dpo.lengthNormalized: true with loss ipoSum, which takes sums; leave it out, or take loss ipo for means"
        ],
    ),
    "gate without bound": (
        {"stages": stages_with(4, gates=[{"metric": "perplexity"}])},
        ["spec.stages[4].gates[0]: a gate needs atLeast, atMost or both"],
    ),
    "gate on what is not measured": (
        {"stages": stages_with(4, gates=[{"metric": "winrate.lower", "atLeast": 0.5}])},
        [
            'spec.stages[4].gates[0].metric: "winrate.lower" is not measured by this stage. Did you mean winRate?',
        ],
    ),
    "gate on a suite that is not there": (
        {"stages": stages_with(4, gates=[{"metric": "helpfulness", "atLeast": 0.5}])},
        [
            'spec.stages[4].gates[0].metric: "helpfulness" is not measured by this stage. Its suites measure: perplexity, '
            "preferenceAccuracy, winRate"
        ],
    ),
    "gate on a suite of one dataset": (
        {"stages": stages_with(4, gates=[{"metric": "perplexity.tickets.lower", "atLeast": 0.5}])},
        [],
    ),
    "gate that nothing passes": (
        {"stages": stages_with(4, gates=[{"metric": "winRate", "atLeast": 0.7, "atMost": 0.6}])},
        ["spec.stages[4].gates[0]: no value is at least 0.7 and at most 0.6"],
    ),
    "a column that the format does not have": (
        {"datasets": [DATASETS[0], DATASETS[1], {**DATASETS[2], "columns": {"choosen": "a", "question": "b"}}]},
        [
            'spec.datasets[2].columns.choosen: format preference has no field "choosen". Did you mean chosen?',
            'spec.datasets[2].columns.question: format preference has no field "question". Its fields: chosen, rejected, '
            "prompt, margin, weight",
        ],
    ),
    "a folder without its scheme": (
        {"model": {"source": "model"}},
        [
            'spec.model.source: "model": models are read from hf://, s3://, pvc://, bundled://, file://. For a folder of '
            "this machine write file://model"
        ],
    ),
    "hub shorthand": (
        {"model": {"source": "org/name"}},
        [
            'spec.model.source: "org/name": models are read from hf://, s3://, pvc://, bundled://, file://. For a folder of this machine write file://org/name, for a hub model hf://org/name'
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problems_name_field_value_and_remedy(case: str) -> None:
    changes, expected = CASES[case]
    assert problems_with(pipeline_body(**changes)) == expected


def test_long_name_is_refused_with_its_length() -> None:
    (problem,) = problems_with(pipeline_body(name="a" * 64))
    assert problem.startswith("metadata.name:")
    assert "64 characters; at most 40" in problem


def test_local_files_are_refused_on_a_cluster_only() -> None:
    body = pipeline_body(model={"source": "file:///models/m"})
    assert problems_with(body, place="local") == []
    (problem,) = problems_with(body, runtime_body(), "cluster")
    assert problem.startswith("spec.model.source:")
    assert "plumbline run" in problem


def test_runtime_limits_and_allow_lists() -> None:
    runtime = runtime_body(
        allow={"namespaces": ["team-b"], "storagePrefixes": ["s3://alignment/{namespace}"], "secretNames": ["other"]},
        limits={"nodes": 1, "memory": "8Gi"},
    )
    body = pipeline_body(
        stages=stages_with(1, resources={"nodes": 2, "memory": "16Gi"}),
        storage={"uri": "s3://alignment/team-ab", "secretName": "s3-credentials"},
    )
    found = problems_with(body, runtime, "cluster")
    assert [p.split(":")[0] for p in found] == [
        "spec.runtimeRef",
        "spec.storage.uri",
        "spec.storage.secretName",
        "spec.stages[1].resources.nodes",
        "spec.stages[1].resources.memory",
    ]


@pytest.mark.parametrize("uri", ["s3://alignment/team-a/../team-b", "s3://alignment/team-ab", "s3://other/team-a"])
def test_a_prefix_ends_at_a_path_boundary(uri: str) -> None:
    runtime = AlignmentRuntime.parse(runtime_body())
    assert not runtime.allows(["s3://alignment/{namespace}"], uri, "team-a")
    assert runtime.allows(["s3://alignment/{namespace}"], "s3://alignment/team-a/x", "team-a")

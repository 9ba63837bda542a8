"""What a reference to the wrong thing gets, and what is read from what."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_api.check import check
from plumbline_api.graph import BASE_MODEL, dependencies, references, start_of
from plumbline_api.pipeline import AlignmentPipeline
from support.pipelines import (
    DATASETS,
    REWARD,
    STAGES,
    exam_of,
    pipeline_body,
    problems_with,
    retyped,
    stages_with,
)


def test_a_range_test_is_no_start_for_what_follows() -> None:
    probe = {"name": "probe", "sft": {"dataset": "tickets", "training": {"rangeTest": {}}}}
    pipeline = AlignmentPipeline.parse(pipeline_body(stages=[STAGES[0], probe, *STAGES[1:]]))
    assert check(pipeline) == []
    assert start_of(pipeline.spec, 2) == "domain"


def test_the_nearest_earlier_policy_is_no_reward_model() -> None:
    spec = AlignmentPipeline.parse(pipeline_body(stages=[STAGES[1], REWARD, STAGES[2], STAGES[3]])).spec
    assert [start_of(spec, index) for index in range(4)] == [BASE_MODEL, "sft", "sft", "dpo"]


def test_a_judge_is_waited_for() -> None:
    body = pipeline_body(stages=[STAGES[1], REWARD, exam_of("exam", judge={"stage": "reward"}, baseline="sft")])
    assert problems_with(body) == []
    assert dependencies(AlignmentPipeline.parse(body).spec, 2) == ["sft", "reward"]


def test_a_policy_that_kl_compares_with_is_waited_for() -> None:
    held = {"name": "again", "model": "sft", "sft": {"dataset": "tickets", "kl": {"reference": "domain"}}}
    body = pipeline_body(stages=[*STAGES[:2], held])
    assert problems_with(body) == []
    assert dependencies(AlignmentPipeline.parse(body).spec, 2) == ["sft", "domain"]
    held["sft"] = {"dataset": "tickets", "kl": {"baseModel": True}}
    spec = AlignmentPipeline.parse(pipeline_body(stages=[*STAGES[:2], held])).spec
    assert [ref.target for ref in references(spec, 2) if ref.role == "kl.reference"] == [BASE_MODEL]
    assert dependencies(spec, 2) == ["sft"]


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
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
    "rehearsal of pairs": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "rehearsal": [{"dataset": "prefs", "share": 0.1}]})},
        [
            'spec.stages[1].sft.rehearsal[0].dataset: "prefs" holds preference rows (prompt, chosen, rejected); sft '
            "needs instruction rows (context, response) or dialogues (USER: … ASSISTANT: …) or instruction rows "
            "(instruction, input, output) or chats (messages with role and content) or instruction rows (prompt, "
            "completion) or scored rows (prompt, completion, score) or raw text. Datasets that fit: manuals, tickets"
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
    "no test split": (
        {"datasets": [DATASETS[0], {**DATASETS[1], "split": {}}, DATASETS[2]]},
        [
            'spec.stages[4].evaluate.suites[0].perplexity.dataset: "tickets" has no test split. Set spec.datasets[1].split.test '
            "(such as 0.1), or spec.datasets[1].role to test if no stage trains on it"
        ],
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
    "kto with a reference that is none": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "prefs", "reference": "exam"}}]},
        [
            'spec.stages[5].kto.reference: "exam" (evaluate) yields a report; a policy is needed here. Stages that fit: '
            "domain, sft, dpo, final"
        ],
    ),
    "rrhf on instruction rows": (
        {"stages": retyped(2, rrhf={"dataset": "tickets"})},
        [
            'spec.stages[2].rrhf.dataset: "tickets" holds instruction rows (instruction, input, output); rrhf needs preference '
            "rows (prompt, chosen, rejected) or ranked rows (prompt, completions). Datasets that fit: prefs"
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
    "kl to a stage that is not there": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "kl": {"reference": "domian"}})},
        ['spec.stages[1].sft.kl.reference: there is no stage "domian". Did you mean domain?'],
    ),
    "kl to a report": (
        {"stages": [*STAGES, {"name": "again", "sft": {"dataset": "tickets", "kl": {"reference": "exam"}}}]},
        [
            'spec.stages[5].sft.kl.reference: "exam" (evaluate) yields a report; a policy is needed here. '
            "Stages that fit: domain, sft, dpo, final"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problems_name_field_value_and_remedy(case: str) -> None:
    changes, expected = CASES[case]
    assert problems_with(pipeline_body(**changes)) == expected

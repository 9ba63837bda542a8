"""What preflight says of rewards, before anything has asked for an accelerator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from plumbline_api.runtime import RewardEndpoint
from plumbline_trainer.rewards.functions import source_digest
from support import tiny
from support.preflighting import pipeline, plan_of, preflight
from support.reward_service import Service, saying, serving
from support.trainer import LocalPipeline, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "image"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def online(
    folder: Path,
    model: Path,
    *rewards: dict[str, Any],
    prompts: str = "q",
    endpoints: tuple[RewardEndpoint, ...] = (),
) -> LocalPipeline:
    write_jsonl(folder / "asked.jsonl", [{"prompt": f"Say {n}"} for n in range(12)])
    training = {"globalBatch": 4, "maxLength": 64, "maxSteps": 2}
    stage = {
        "name": "rl",
        "grpo": {
            "prompts": prompts,
            "rewards": list(rewards),
            "training": training,
            "rollout": {"maxNewTokens": 16},
            "lora": {"rank": 4},
        },
    }
    others = ({"name": "asked", "source": f"file://{folder}/asked.jsonl"},)
    return pipeline(folder, model, [stage], others=others, endpoints=endpoints)


def classifier(folder: Path, labels: int) -> Path:
    tokenizer = tiny.make_tokenizer()
    config = tiny.make_config("llama", tokenizer)
    config.num_labels = labels
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def test_everything_that_scores_is_pinned(tmp_path: Path, model: Path, modules: Path) -> None:
    (modules / "kindness.py").write_text("def score(prompts, answers, references):\n    return [0.0] * len(answers)\n")
    scorer = classifier(tmp_path / "rm", 1)
    made = online(
        tmp_path, model, {"function": "kindness:score"}, {"model": f"file://{scorer}"}, {"rule": "exactMatch"}
    )
    result, code = preflight(made)
    assert code == 0, result.message
    pins = {item["name"]: item["digest"] for item in plan_of(made)["inputs"]}
    assert pins["function/kindness:score"] == source_digest("kindness:score")
    assert len(pins["reward/rl/1"]) == 64
    run = made.stage("rl")
    assert {item.role: item.kind for item in run.inputs}["rewards.0.function"] == "function"
    assert {item.role: item.kind for item in run.inputs}["rewards.1.model"] == "classifier"


def test_every_reward_that_cannot_work_is_told_at_once(tmp_path: Path, model: Path) -> None:
    scorer = classifier(tmp_path / "three", 3)
    made = online(
        tmp_path,
        model,
        {"function": "absent_kit.rewards:score"},
        {"model": f"file://{scorer}"},
        {"rule": "jsonSchema", "schema": '{"type": "set"}'},
    )
    result, code = preflight(made)
    assert code == 2
    lines = result.message.splitlines()
    assert any('reward function "absent_kit.rewards:score": there is no module absent_kit' in line for line in lines)
    here = "spec.stages[0].grpo.rewards"
    assert any(f"{here}[1].model: " in line and "3 labels; a reward is one number" in line for line in lines)
    assert any(f"{here}[2].schema: is not a JSON schema" in line for line in lines)


def test_a_classifier_without_its_head_is_refused(tmp_path: Path, model: Path) -> None:
    """A language model whose configuration says that it is a classifier."""
    scorer = classifier(tmp_path / "rm", 1)
    config = transformers.AutoConfig.from_pretrained(str(scorer))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(scorer))
    result, code = preflight(online(tmp_path, model, {"model": f"file://{scorer}"}))
    assert code == 2
    assert "spec.stages[0].grpo.rewards[0].model: " in result.message
    assert "1 weights that its config.json asks for are not there (score.weight)" in result.message


@pytest.mark.parametrize(("reward", "field"), [({"metric": "bleu"}, "metric"), ({"rule": "numericMatch"}, "rule")])
def test_rows_that_turn_out_to_have_no_answers_are_refused(
    tmp_path: Path, model: Path, reward: dict[str, Any], field: str
) -> None:
    """Their format is auto, so that nothing could be said before they were read."""
    result, code = preflight(online(tmp_path, model, reward, prompts="asked"))
    assert code == 2
    assert f"spec.stages[0].grpo.rewards[0].{field}: {reward[field]} compares with the answer" in result.message
    assert '"asked" holds prompts without answers' in result.message


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


def judged(folder: Path, model: Path, service: Service, **fields: Any) -> LocalPipeline:
    """Asked by two rewards of a stage, and compared with the rows' answers."""
    offered = RewardEndpoint.model_validate({"name": "judge", "url": service.url, "timeout": "300ms", **fields})
    return online(folder, model, {"endpoint": "judge"}, {"endpoint": "judge", "name": "b"}, endpoints=(offered,))


def test_an_endpoint_is_asked_once_with_the_first_row(tmp_path: Path, model: Path, service: Service) -> None:
    result, code = preflight(judged(tmp_path, model, service))
    assert code == 0, result.message
    [(_, body)] = service.requests
    [[turn]], [answer], [reference] = body["prompts"], body["answers"], body["references"]
    number = turn["content"].removeprefix("Say ")
    assert turn == {"role": "user", "content": f"Say {number}"}
    assert answer == reference == f"It is {number}."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (saying("no", 403), 'the reward endpoint "judge" (http://127.0.0.1'),
        (saying("gone", 404), "answered 404: gone"),
        (saying('{"scores": [1, 2]}'), "sent 2 scores for 1 answers"),
        (saying("<html>"), "sent no JSON: '<html>'"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused_before_anything_trains(
    tmp_path: Path, model: Path, service: Service, answer: Any, words: str
) -> None:
    service.answer = answer
    result, code = preflight(judged(tmp_path, model, service))
    assert code == 2
    assert result.message.startswith("spec.stages[0].grpo.rewards[0].endpoint: ")
    assert words in result.message
    assert len(service.requests) == 1


def test_a_missing_token_is_refused(tmp_path: Path, model: Path, service: Service) -> None:
    result, code = preflight(judged(tmp_path, model, service, secretName="judge-token"))
    assert code == 2
    assert "needs a token and PLUMBLINE_ENDPOINT_TOKEN_JUDGE is not set" in result.message
    assert not service.requests


def test_an_endpoint_that_is_down_is_only_remarked(tmp_path: Path, model: Path, service: Service) -> None:
    """It may be up by the time the stage runs."""
    service.answer = saying("busy", 503)
    made = judged(tmp_path, model, service)
    result, code = preflight(made)
    assert code == 0, result.message
    assert len(service.requests) == 1
    assert result.preflight is not None
    assert result.preflight.notes[0].startswith('rl: the reward endpoint "judge"')
    assert plan_of(made)["notes"][0].endswith("answered 503 once")

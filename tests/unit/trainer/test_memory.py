"""Memory of a training rank: the estimate, what frozen parts spare, and whether activations are computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.training import Freeze, Lora
from plumbline_trainer import cgroups
from plumbline_trainer.engine import recomputation
from plumbline_trainer.engine.recomputation import largest_batch
from plumbline_trainer.engine.trained import make_trainable
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.models.selection import module_names, trained_parts
from plumbline_trainer.planning.memory import RUNTIME_BYTES, Sizes, Weights, fits, training_memory
from safetensors.torch import load_file
from support.preflighting import pipeline, plan_of, preflight
from support.tiny import STYLES, Style, make_model, save_model
from support.trainer import base_model, output_folder, run_in_process, stage_context, stage_run, write_jsonl
from support.training_data import phrase, training_run

SIZES = Sizes(layers=4, hidden=8, intermediate=16, heads=2, key_value_heads=1, head_size=4)
PER_BLOCK = 10 * 8 + (2 * 2 + 2 * 1) * 4 + 3 * 16


class TestArithmetic:
    def test_by_hand(self) -> None:
        weights = Weights(frozen=1000, trained=10, blocks=4, held=7)
        base = RUNTIME_BYTES + 1000 + 160 + 7
        kept = training_memory(SIZES, weights, tokens=5, width=2, recomputed=False)
        again = training_memory(SIZES, weights, tokens=5, width=2, recomputed=True)
        assert kept == base + 5 * 2 * 4 * PER_BLOCK
        assert again == base + 5 * 2 * (4 * 8 + PER_BLOCK)

    def test_blocks_below_what_learns_keep_nothing(self) -> None:
        whole, half = (
            training_memory(SIZES, Weights(0, 0, blocks=blocks), tokens=5, width=4, recomputed=False) - RUNTIME_BYTES
            for blocks in (4, 2)
        )
        assert whole == 2 * half

    def test_a_tenth_of_the_device_is_left(self) -> None:
        assert fits(90, 100)
        assert not fits(91, 100)
        assert fits(10**15, None), "where nobody knows the device nothing is spared"

    def test_the_largest_micro_batch_is_part_of_a_step(self) -> None:
        assert largest_batch([5, 9, 7], budget=100, global_batch=2) == 16
        assert largest_batch([5, 9, 7], budget=12, global_batch=2) == 12
        assert largest_batch([5, 30, 7], budget=12, global_batch=2) == 30, "a longer row stands alone"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("lora", "freeze", "blocks"),
    [
        (None, None, 2),
        (None, Freeze(layers=1), 2),
        (None, Freeze(layers=1, modules=["embed_tokens", "wte", "wpe"]), 1),
        (Lora(rank=2), None, 2),
        (Lora(rank=2), Freeze(layers=1), 1),
        (Lora(rank=2), Freeze(layers=-1), 1),
    ],
)
def test_trained_parts_are_those_that_training_leaves_open(
    style: Style, lora: Lora | None, freeze: Freeze | None, blocks: int
) -> None:
    model = make_model(style, seed=1)
    if freeze is not None and freeze.modules:
        fitting = ["wte", "wpe"] if style == "gpt2" else ["embed_tokens"]
        freeze = freeze.model_copy(update={"modules": fitting})
    found = trained_parts(module_names(model), lora, freeze)
    policy: Any = type("Loaded", (), {"model": model, "quantization": None})()
    trained = make_trainable(policy, lora, 0, freeze=freeze)
    if lora is None:
        assert found.whole == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    else:
        assert found.whole == 0
        assert found.adapted == (1.0 if freeze is None else 0.5)
    assert found.blocks == blocks


class TestChoice:
    def weights(self, folder: Path, run: Any) -> dict[str, torch.Tensor]:
        result, code = run_in_process(folder, run)
        assert code == 0, result.message
        return load_file(next(output_folder(run).glob("*.safetensors")))

    @pytest.mark.parametrize("lora", [{"rank": 4}, None])
    def test_memory_alone_decides_and_no_bit_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lora: Any
    ) -> None:
        found = {}
        for name, limit in (("roomy", 2**40), ("tight", 2**20), ("unknown", None)):
            monkeypatch.setattr(recomputation, "memory_limit", lambda limit=limit: limit)
            run = training_run(tmp_path / name, "dpo", lora=lora, globalBatch=4, maxSteps=3, learningRate=1e-3)
            found[name] = self.weights(tmp_path / name, run)
            said = [line for line in capsys.readouterr().err.splitlines() if "activations are" in line]
            assert len(said) == 1
            assert ("computed again" in said[0]) == (name == "tight")
        for other in ("tight", "unknown"):
            assert all(torch.equal(found["roomy"][key], found[other][key]) for key in found["roomy"])

    @pytest.mark.parametrize("said", [True, False])
    def test_a_manifest_that_says_so_is_obeyed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bool
    ) -> None:
        monkeypatch.setattr(recomputation, "memory_limit", lambda: 2**20 if not said else 2**40)
        seen: list[bool] = []
        from plumbline_trainer.stages import sft

        real = sft.prepare_modes
        monkeypatch.setattr(
            sft, "prepare_modes", lambda *a, **k: (seen.append(k["gradient_checkpointing"]), real(*a, **k))[1]
        )
        run = training_run(tmp_path, "sft", lora={"rank": 4}, maxSteps=1, gradientCheckpointing=said)
        self.weights(tmp_path, run)
        assert seen == [said]

    def test_ranks_of_a_node_share_its_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recomputation, "memory_limit", lambda: 1000)
        context = stage_context(tmp_path)
        assert recomputation.memory_of_this_rank(context) == 1000
        context.world_size = 4
        assert recomputation.memory_of_this_rank(context) == 250

    def test_the_limit_is_the_control_groups_where_it_has_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = cgroups.memory_limit()
        assert machine is not None
        assert machine > 2**20
        monkeypatch.setattr(cgroups, "_oom_counters", lambda: [tmp_path / "memory.events"])
        (tmp_path / "memory.max").write_text("max\n")
        unlimited = cgroups.memory_limit()
        (tmp_path / "memory.max").write_text(f"{2**20}\n")
        assert cgroups.memory_limit() == 2**20
        assert unlimited is not None
        assert unlimited >= machine


class TestPreflight:
    """What preflight says is what training will take."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_model(tmp_path_factory.mktemp("model") / "base")

    def memory(self, folder: Path, model: Path, **stage: Any) -> int:
        training = {"maxLength": 64, "globalBatch": 8, "precision": "float32"} | stage.pop("training", {})
        made = pipeline(folder, model, [{"name": "s", "sft": {"dataset": "q", "training": training, **stage}}])
        result, code = preflight(made)
        assert code == 0, result.message
        return int(plan_of(made)["stages"][0]["estimate"]["memoryBytes"])

    @pytest.mark.parametrize(("lora", "freeze"), [(None, {"layers": 1}), ({"rank": 4}, {"layers": 1})])
    def test_frozen_parts_are_spared(self, tmp_path: Path, model: Path, lora: Any, freeze: Any) -> None:
        kind = {} if lora is None else {"lora": lora}
        whole = self.memory(tmp_path / "whole", model, **kind)
        partly = self.memory(tmp_path / "partly", model, freeze=freeze, **kind)
        context = stage_context(tmp_path / "x", stage_run(tmp_path / "x", inputs=[base_model(f"file://{model}")]))
        policy = load_policy(context, context.input("model"), precision="float32", device="cpu")
        settings = None if lora is None else Lora.model_validate({**lora, "alpha": 8})
        trained = make_trainable(policy, settings, 0, freeze=Freeze.model_validate(freeze))
        open_ = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in trained.parameters() if not p.requires_grad)
        if lora is None:
            assert whole - partly == 12 * frozen, "4 bytes in place of 16; the embeddings learn, so all blocks keep"
        else:
            assert whole - partly > 16 * open_, "half of the adapter, and what the frozen block would have kept"

    def test_raw_text_makes_as_many_sequences_as_it_fills(self, tmp_path: Path, model: Path) -> None:
        import random

        rng = random.Random(1)
        texts = [{"text": phrase(rng, 5, 400)} for _ in range(60)]
        source = write_jsonl(tmp_path / "text.jsonl", texts)
        training = {"maxLength": 64, "globalBatch": 4, "precision": "float32", "tokensPerBatch": 256}
        made = pipeline(
            tmp_path,
            model,
            [{"name": "s", "pretrain": {"dataset": "raw", "training": training}}],
            others=({"name": "raw", "source": source},),
        )
        result, code = preflight(made)
        assert code == 0, result.message
        found = plan_of(made)["stages"][0]["estimate"]
        trained, code = run_in_process(tmp_path / "train", made.stage("s"))
        assert code == 0, trained.message
        assert found["steps"] == pytest.approx(trained.metrics["steps"], rel=0.05)
        assert found["tokens"] == pytest.approx(trained.metrics["tokens"], rel=0.05)

"""Several models become one: by hand, by peft's formulas on the same tensors, and as a stage."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from peft.utils import merge_utils
from plumbline_api.stages import Merge
from plumbline_trainer.models import combining
from plumbline_trainer.models.combining import Account, Draws, Recipe, combine
from plumbline_trainer.models.merging import round_to, weights_digest
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.stages import merge as merge_stage
from safetensors.torch import load_file
from support import tiny, trainer
from support.adapted import lora_of
from support.chains import train_by_hand
from support.threads import computing_on

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def merged(method, models, base=None, *, shares=None, dtype=torch.float32, account=None, **fields):
    shares = shares or [1.0] * len(models)
    recipe = Recipe(method, tuple(share / sum(shares) for share in shares), **fields)
    return combine(recipe, "w", models, base, dtype, account or Account())


class TestByHand:
    def test_linear_is_the_weighted_mean(self):
        found = merged("linear", [tensor(1, 2, 4), tensor(5, -2, 0)], shares=[3, 1])
        assert found.tolist() == [2.0, 1.0, 3.0]

    def test_slerp_keeps_the_length_on_the_arc(self):
        """A quarter turn: half way is 45°, a third of the way 30°."""
        half = merged("slerp", [tensor(2, 0), tensor(0, 2)], t=0.5)
        assert half.tolist() == pytest.approx([2**0.5, 2**0.5])
        third = merged("slerp", [tensor(2, 0), tensor(0, 2)], t=1 / 3)
        assert third.tolist() == pytest.approx([3**0.5, 1.0])

    @pytest.mark.parametrize("t", [0.0, 1.0])
    def test_slerp_ends_at_the_models(self, t):
        models = [tensor(2, 1, 0), tensor(0, 3, -1)]
        assert merged("slerp", models, t=t).tolist() == pytest.approx(models[int(t)].tolist())

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ((1, 2), (2, 4), (1.25, 2.5)),  # parallel
            ((1, 2), (1, 2.0001), (1, 2.000025)),  # nearly
            ((1, 0), (-1, 0), (0.5, 0)),  # opposite: no arc is the shortest
            ((0, 0), (4, 8), (1, 2)),  # no direction
        ],
    )
    def test_slerp_falls_back_to_the_straight_line_and_says_so(self, first, second, expected):
        account = Account()
        found = merged("slerp", [tensor(*first), tensor(*second)], t=0.25, account=account)
        assert found.tolist() == pytest.approx(list(expected))
        assert account.straight == 1

    def test_slerp_of_a_small_angle_stays_on_the_arc(self):
        """Where others give up at a cosine of 0.9995: branches of one base are always that close."""
        account = Account()
        angle = 1e-3
        models = [torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([math.cos(angle), math.sin(angle)], dtype=F64)]
        found = merged("slerp", models, t=0.25, dtype=F64, account=account)
        assert account.straight == 0
        assert found.tolist() == pytest.approx([math.cos(angle / 4), math.sin(angle / 4)], abs=1e-15)

    def test_ties_trims_elects_and_averages_what_agrees(self):
        """Density ½ of six: each model keeps its three largest changes.

        kept:     [6, 0, 0, -4, 5, 0] and [2, 0, -7, 0, -8, 0]; sums 8, 0, -7, -4, -3, 0;
        averages: 4, 0, -7, -4, -8, 0 (at the fifth, 5 is outvoted), times scale 0.5, on top of the base.
        """
        base = tensor(1, 1, 1, 1, 1, 1)
        models = [base + tensor(6, 1, 2, -4, 5, 0), base + tensor(2, 1.5, -7, 1, -8, 0.5)]
        account = Account()
        found = merged("ties", models, base, density=0.5, scale=0.5, account=account)
        assert found.tolist() == [3.0, 1.0, -2.5, -1.0, -3.0, 1.0]
        assert (account.touched, account.conflicts) == (4, 1)

    def test_ties_weighs_votes_and_averages(self):
        """Shares ¾ and ¼: 0.75·1 − 0.25·2 > 0 keeps +1; (0.75·1 + 0.25·3)/1 = 1.5."""
        base = tensor(0, 0)
        found = merged("ties", [tensor(1, 1), tensor(-2, 3)], base, shares=[3, 1], density=1.0)
        assert found.tolist() == [1.0, 1.5]

    def test_of_equal_changes_the_first_are_kept(self):
        kept = combining.largest(tensor(1, -1, 1, 1, 0), tensor(0, 0, 0, 0, 0), 0.4)
        assert kept.tolist() == [True, True, False, False, False]

    def test_dare_drops_and_rescales(self):
        base = torch.zeros(4000)
        found = merged("dareLinear", [torch.ones(4000), torch.full((4000,), 3.0)], base, density=0.25, seed=5)
        assert set(found.tolist()) == {0.0, 2.0, 6.0, 8.0}  # ½·1/¼ and ½·3/¼, together or alone
        assert float(found.mean()) == pytest.approx(2.0, rel=0.1)  # the mean change survives

    def test_dare_draws_are_pinned_and_independent(self):
        """A change of these numbers is a change of every DARE merge: raise the numerics version of merge."""
        assert [round(value, 12) for value in Draws(7, 0, "w").next(3).tolist()] == PINNED_DRAWS
        one, other, name = Draws(7, 0, "w").next(4000), Draws(7, 1, "w").next(4000), Draws(7, 0, "v").next(4000)
        for found in (other, name, Draws(8, 0, "w").next(4000)):
            both = torch.stack([one, found])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 0.06
        parts = Draws(7, 0, "w")
        assert torch.equal(torch.cat([parts.next(1500), parts.next(2500)]), one)

    def test_one_rounding(self):
        """½ of neighbours in bfloat16 plus a hair: by way of float32 the hair is lost and the tie goes to even."""
        models = [torch.tensor([1.0, 1.0]), torch.tensor([1.0 + 2**-7, 1.0 + 2**-7 + 2**-23])]
        assert merged("linear", models, dtype=torch.bfloat16).tolist() == [1.0, 1.0 + 2**-7]


PINNED_DRAWS = [0.226712104923, 0.350150803095, 0.43411338857]


def random_tensor(seed, size):
    return torch.randn(37, 53, generator=torch.Generator().manual_seed(seed), dtype=F64) * size


class TestAgainstPeft:
    base = random_tensor(0, 1.0)
    deltas = (random_tensor(1, 0.1), random_tensor(2, 0.2), random_tensor(3, 0.05))

    def ours(self, method, shares=(1, 1, 1), **fields):
        found = merged(
            method,
            [self.base + delta for delta in self.deltas],
            self.base,
            shares=list(shares),
            dtype=F64,
            **fields,
        )
        return found - self.base

    @pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 1.0])
    def test_ties(self, density):
        changes = [(self.base + delta) - self.base for delta in self.deltas]
        expected = merge_utils.ties(changes, torch.ones(3, dtype=F64), density) if density < 1 else None
        if expected is None:
            stacked = torch.stack(changes)
            mask = merge_utils.calculate_majority_sign_mask(stacked)
            expected = merge_utils.disjoint_merge(stacked, mask)
        torch.testing.assert_close(self.ours("ties", density=density), expected, rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("shares", [(1, 1, 1), (5, 2, 1)])
    def test_linear_is_task_arithmetic_of_normalised_weights(self, shares):
        weights = torch.tensor(shares, dtype=F64) / sum(shares)
        expected = merge_utils.task_arithmetic(self.deltas, weights)
        found = merged("linear", [self.base + delta for delta in self.deltas], shares=list(shares), dtype=F64)
        torch.testing.assert_close(found - self.base, expected, rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("method", ["dareLinear", "dareTies"])
    def test_dare_with_the_same_masks(self, method, monkeypatch):
        draws = [Draws(11, position, "w").next(37 * 53).reshape(37, 53) for position in range(3)]
        masks = iter([(draw < 0.4).to(F64) for draw in draws])
        monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: next(masks))
        changes = [(self.base + delta) - self.base for delta in self.deltas]
        theirs = merge_utils.dare_linear if method == "dareLinear" else merge_utils.dare_ties
        factor = 1 / 3 if method == "dareLinear" else 1.0
        expected = theirs(changes, torch.full((3,), factor, dtype=F64), 0.4)
        monkeypatch.undo()
        found = self.ours(method, density=0.4, seed=11)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_blocks_and_threads_do_not_change_the_bits(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3, 997, generator=generator)
    models = [base + torch.randn(3, 997, generator=generator) * 0.1 for _ in range(2)]
    for method in ("linear", "slerp", "ties", "dareLinear", "dareTies"):
        start = base if method not in ("linear", "slerp") else None
        whole = merged(method, models, start, density=0.3)
        with computing_on(2):
            assert torch.equal(merged(method, models, start, density=0.3), whole)
        if method != "slerp":  # its lengths are sums, whose order the block size is a part of
            with monkeypatch.context() as patch:
                patch.setattr(combining, "_BLOCK", 100)
                assert torch.equal(merged(method, models, start, density=0.3), whole)


class TestStage:
    def branches(self, folder, dtype="float32", **model):
        """A base and two branches from one stage: plain LoRA, and DoRA with modules trained whole."""
        base = trainer.base_model(f"file://{tiny.save_model(folder / 'base', dtype=dtype, **model)}")
        root = train_by_hand(folder, "root", base, seed=1)
        style = model.get("style", "llama")
        left = train_by_hand(folder, "left", trainer.output_of(root), seed=2)
        right = train_by_hand(folder, "right", trainer.output_of(root), seed=3, lora=lora_of("everything", style))
        return base, root, left, right

    def merge(self, folder, runs, base=None, *, seed=0, name="blend", **fields):
        inputs = [
            item.model_copy(update={"role": f"models.{n}"}) for n, item in enumerate(trainer.output_of(r) for r in runs)
        ]
        inputs += [] if base is None else [base.model_copy(update={"role": "base"})]
        body = {"models": [{"stage": run.stage} for run in runs]} | fields
        parameters = Merge.model_validate(body).to_wire() | {"seed": seed}
        run = trainer.stage_run(folder, "merge", inputs=inputs, parameters=parameters, stage=name)
        return run, trainer.run_in_process(folder / name, run)

    def loaded(self, folder, item, precision="chain"):
        context = trainer.stage_context(folder / "reader", trainer.stage_run(folder))
        return load_policy(context, item, precision=precision, device="cpu")

    def weights(self, folder, item):
        from plumbline_trainer.models.merging import stored_weights

        return {k: v.detach().clone() for k, v in stored_weights(self.loaded(folder, item).model).items()}

    @pytest.mark.parametrize(
        ("style", "method"),
        [
            ("llama", "linear"),
            ("qwen2", "slerp"),
            ("gemma2", "ties"),
            ("gpt2", "ties"),
            ("gpt2", "dareLinear"),
            ("llama", "dareTies"),
        ],
    )
    def test_every_method_and_style(self, tmp_path, style, method):
        _base, root, left, right = self.branches(tmp_path, style=style)
        based = method not in ("linear", "slerp")
        run, (result, code) = self.merge(
            tmp_path, [left, right], trainer.output_of(root) if based else None, method=method
        )
        assert code == 0, result.message
        parts = [self.weights(tmp_path, trainer.output_of(part)) for part in (left, right)]
        origin = self.weights(tmp_path, trainer.output_of(root))
        written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
        assert set(written) == set(parts[0])
        defaults = {"ties": {"density": 0.2}, "dareLinear": {"density": 0.5}, "dareTies": {"density": 0.5}}
        recipe = Recipe(method, (0.5, 0.5), **defaults.get(method, {}))
        for name in written:
            expected = combine(
                recipe, name, [part[name] for part in parts], origin[name] if based else None, torch.float32, Account()
            )
            assert torch.equal(written[name], expected), name
        if method == "linear":
            name = next(name for name in written if "layers.0" in name or "h.0" in name)
            mean = (parts[0][name].double() + parts[1][name].double()) / 2
            assert torch.equal(written[name], round_to(mean, torch.float32))
        metrics = trainer.manifest_of(run).metrics
        assert metrics["models"] == 2
        assert metrics["logitKl.left"] > 0
        assert metrics["distance.right"] > 0
        assert ("lostPart" in metrics) == based
        assert ("straightTensors" in metrics) == (method == "slerp")
        meta = trainer.manifest_of(run).meta
        assert meta["mergedDigest"] == weights_digest(written.items())
        assert [part["name"] for part in meta["models"]] == ["left", "right"]
        assert (meta["form"], meta["storageDtype"]) == ("full", "float32")
        # The next stage trains on it, and a tied model is still tied.
        policy = self.loaded(tmp_path, trainer.output_of(run), "float32")
        assert policy.lineage.adapters == ()
        assert policy.model.config.tie_word_embeddings
        after = train_by_hand(tmp_path, "after", trainer.output_of(run), seed=9)
        assert trainer.manifest_of(after).meta["mergedDigest"]

    def test_a_model_and_its_base_are_interpolated(self, tmp_path):
        """WiSE-FT: spec.model takes part as a model."""
        base, root, *_ = self.branches(tmp_path)
        inputs = [
            trainer.output_of(root).model_copy(update={"role": "models.0"}),
            base.model_copy(update={"role": "models.1"}),
        ]
        body = Merge.model_validate({"method": "linear", "models": [{"stage": "root", "weight": 3}, {}]})
        run = trainer.stage_run(tmp_path, "merge", inputs=inputs, parameters=body.to_wire() | {"seed": 0})
        result, code = trainer.run_in_process(tmp_path / "blend", run)
        assert code == 0, result.message
        written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
        tuned, before = (
            self.weights(tmp_path, trainer.output_of(root)),
            load_file(str(tmp_path / "base/model.safetensors")),
        )
        for name in written:
            exact = tuned[name].double() * 0.75 + before[name].double() * 0.25
            assert torch.equal(written[name], round_to(exact, torch.float32))

    def test_a_model_merged_with_itself_twice_over_stays(self, tmp_path):
        """And so do its predictions."""
        _base, _root, left, _ = self.branches(tmp_path, dtype="bfloat16")
        run, (result, code) = self.merge(tmp_path, [left, left], method="linear")
        assert code == 0, result.message
        written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
        part = self.weights(tmp_path, trainer.output_of(left))
        assert all(torch.equal(written[name], part[name]) for name in part)
        assert trainer.manifest_of(run).metrics["logitKl.left"] == pytest.approx(0, abs=1e-12)
        assert {weight.dtype for weight in written.values()} == {torch.bfloat16}

    def test_the_seed_decides_what_dare_drops(self, tmp_path):
        _base, root, left, right = self.branches(tmp_path)
        files = []
        for name, seed in (("one", 1), ("again", 1), ("two", 2)):
            run, (result, code) = self.merge(
                tmp_path, [left, right], trainer.output_of(root), seed=seed, name=name, method="dareTies", density=0.3
            )
            assert code == 0, result.message
            files.append((trainer.output_folder(run) / "model.safetensors").read_bytes())
            if name == "one":  # The second is computed, not found.
                import shutil

                shutil.rmtree(trainer.output_folder(run).parent)
        assert files[0] == files[1] != files[2]

    def test_types_that_differ_are_merged_in_the_wider(self, tmp_path):
        _base, _root, left, right = self.branches(tmp_path, dtype="bfloat16")
        wide = trainer.stage_run(
            tmp_path,
            "merge",
            inputs=[trainer.output_of(left)],
            parameters=Merge(storage_dtype="float32").to_wire() | {"seed": 0},
            stage="wide",
        )
        assert trainer.run_in_process(tmp_path / "wide", wide)[1] == 0
        run, (result, code) = self.merge(tmp_path, [wide, right], method="linear")
        assert code == 0, result.message
        assert trainer.manifest_of(run).meta["storageDtype"] == "float32"

    def test_a_small_change_in_bfloat16_is_warned_about(self, tmp_path, caplog):
        base = trainer.base_model(f"file://{tiny.save_model(tmp_path / 'base', dtype='bfloat16')}")
        runs = [train_by_hand(tmp_path, name, base, seed=seed) for seed, name in enumerate(("left", "right"))]
        inputs = [trainer.output_of(run, f"models.{number}") for number, run in enumerate(runs)]
        inputs.append(base.model_copy(update={"role": "base"}))
        body = {"method": "ties", "density": 1.0, "scale": 0.01, "models": [{"stage": "left"}, {"stage": "right"}]}
        context = trainer.stage_context(
            tmp_path / "blend", trainer.stage_run(tmp_path, "merge", inputs=inputs, parameters=body)
        )
        context.log = logging.getLogger("test-of-merging")
        with caplog.at_level(logging.WARNING, logger="test-of-merging"):
            output = merge_stage.run(context)
        assert output.metrics["lostPart"] > 0.3
        assert "of the merged change. Set merge.storageDtype: float32" in caplog.text

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"width": 32}, r'differ in shape: ".*" is .*64.* in one and .*32.* in the other'),
            ({"layers": 1}, 'do not have the same weights: only one of them has "model.layers.1'),
            ({"bos": True}, "have different tokenizers, chat templates or end tokens"),
        ],
    )
    def test_models_that_do_not_fit_are_named(self, tmp_path, other, said):
        import re

        one = trainer.base_model(f"file://{tiny.save_model(tmp_path / 'one')}", "models.0")
        two = trainer.base_model(f"file://{tiny.save_model(tmp_path / 'two', **other)}", "models.1")
        two = two.model_copy(update={"name": "two"})
        body = {"method": "linear", "models": [{"stage": "one"}, {"stage": "two"}], "seed": 0}
        run = trainer.stage_run(tmp_path, "merge", inputs=[one, two], parameters=body)
        result, code = trainer.run_in_process(tmp_path / "run", run)
        assert (code, result.reason) == (2, "BadInput")
        assert re.search(r'merge.models\[0\] \("base"\) and merge.models\[1\] \("two"\) ' + said, result.message), (
            result
        )


def test_manifest_of_a_merge_tells_every_parent(tmp_path):
    stage = TestStage()
    _base, root, left, right = stage.branches(tmp_path)
    run, (result, code) = stage.merge(tmp_path, [left, right], trainer.output_of(root), method="ties")
    assert code == 0, result.message
    parents = trainer.manifest_of(run).parents
    assert [(parent.role, parent.name) for parent in parents] == [
        ("models.0", "left"),
        ("models.1", "right"),
        ("base", "root"),
    ]
    assert all(parent.manifest_digest for parent in parents)


def test_ancestry_goes_through_every_merged_model(tmp_path):
    """Held-out figures are marked where any of the merged models has seen the rows."""
    from plumbline_trainer.context import StageOutput
    from plumbline_trainer.models.ancestry import trace
    from plumbline_trainer.storage.manifests import commit_output

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "weights").write_text("some")

    def commit(name, type_, *inputs):
        run = trainer.stage_run(tmp_path, type_, inputs=inputs, stage=name)
        commit_output(trainer.stage_context(tmp_path / name, run), StageOutput(tmp_path / "weights", "policy"))
        return run

    def outside(role, letter, kind):
        return trainer.external(role, f"file:///{letter}", kind=kind).model_copy(update={"digest": letter * 64})

    left = commit("left", "sft", outside("model", "a", "policy"), outside("dataset", "b", "dataset"))
    right = commit("right", "sft", outside("model", "a", "policy"), outside("dataset", "c", "dataset"))
    blend = commit(
        "blend",
        "merge",
        trainer.output_of(left, "models.0"),
        trainer.output_of(right, "models.1"),
        outside("base", "e", "policy"),
    )
    found = trace(trainer.stage_context(tmp_path / "reader", trainer.stage_run(tmp_path)), trainer.output_of(blend))
    assert set(found.datasets) == {"b" * 64, "c" * 64}
    assert found.models == {"a" * 64, "e" * 64}

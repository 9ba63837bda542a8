"""Whatever is seen, in whatever order: a run ends in the same state, and nothing starts twice.

A random world moves jobs, loses messages, deletes pods, edits, suspends and retries; the operator restarts, dies in
the middle of its writes and acts on views that are old. Then the world calms down, and the run has to end as one in
which nothing of this happened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plumbline_operator.snapshot import JobView, PodFailure, Snapshot, StartStage
from support.planning import FORK, World, failed, pipeline_body

SECONDS = st.sampled_from([1, 15, 40, 400])
BROKEN_EPOCHS = 3.0
"""A variant of `left` that always fails, so that an edit can break and mend the run."""
FLAKY_FAILURES = 2


def variant(*, broken: bool, seed: int) -> dict[str, Any]:
    stages = [dict(stage) for stage in FORK]
    if broken:
        stages[1] = stages[1] | {"sft": {"dataset": "tickets", "training": {"epochs": BROKEN_EPOCHS}}}
    return {"stages": stages, "seed": seed}


class SimulatedWorld(World):
    """A world with fates: how each attempt ends is fixed by what it computes."""

    def __init__(self, flaky: frozenset[str]) -> None:
        super().__init__(pipeline_body(FORK))
        self.flaky = flaky
        self.failed_so_far: dict[tuple[str, str], int] = {}
        self.vanished: set[str] = set()
        self.version = 0

    def fate(self, job: JobView) -> tuple[Any, PodFailure | None]:
        """Result and pod failure of an attempt that is left in peace."""
        run = self.runs[job.name]
        if job.role == "stage" and run.parameters.get("training", {}).get("epochs") == BROKEN_EPOCHS:
            return failed("BadInput", "broken"), PodFailure(exit_code=2)
        key = (job.stage, job.fingerprint)
        if job.role == "stage" and job.stage in self.flaky and self.failed_so_far.get(key, 0) < FLAKY_FAILURES:
            self.failed_so_far[key] = self.failed_so_far.get(key, 0) + 1
            return failed("Transient", "flaky"), PodFailure(exit_code=75)
        return self.default_result(job), None

    def finish(self, job: JobView, *, lose_message: bool) -> None:
        """An attempt ends as its fate has it."""
        result, failure = self.fate(job)
        good = result.outcome == "Succeeded"
        self.change(
            job.name,
            state="succeeded" if good else "failed",
            active=False,
            suspended=False,
            started=job.started or self.now,
            finished=self.now,
            result=None if lose_message else result,
            result_lost=lose_message,
            failure=failure,
        )

    def act(self, action: Any, *, is_view_true: bool = True) -> bool:
        """Carry one action out; nothing may start twice.

        On an old view an attempt at other work of the stage may be unknown; it writes elsewhere, and the next pass
        stops it. Two attempts at the same work are never right.
        """
        if isinstance(action, StartStage) and action.job not in self.jobs:
            for job in self.jobs.values():
                same_work = job.fingerprint == action.run.fingerprint
                same = job.stage == action.run.stage and (same_work or is_view_true)
                over = job.state in ("succeeded", "failed") and not job.active
                assert over or not same, f"{action.job} starts while {job.name} is live"
            before = [start.job for start in self.starts]
            assert action.job not in before or action.job in self.vanished, f"{action.job} starts twice"
        return self._do(action)

    def calm(self) -> None:
        """Nothing goes wrong any more until the run ends."""
        for _ in range(200):
            self.settle()
            self.reap()
            plan = self.plan()
            if self.condition("Succeeded") is not None and self.condition("Succeeded").status != "Unknown":
                return
            for job in list(self.live()):
                if not job.suspended:
                    self.finish(job, lose_message=False)
            self.later(max(plan.requeue_after or 0.0, 1.0))
        raise AssertionError(f"the run does not end: {self.phases()}, {self.live()}")

    def outcome(self) -> dict[str, Any]:
        """How the run ended, without what may differ: attempts, times, cost."""
        stages = {e.name: (e.phase, e.fingerprint) for e in self.status.stages if e.name != "finalize"}
        conditions = {item.type: item.status for item in self.status.conditions}
        return {"phase": self.status.phase, "stages": stages, "conditions": conditions, "model": self.status.model}


@dataclass
class View:
    """A snapshot and the version of the object in it; short in hypothesis' reports."""

    version: int
    snapshot: Snapshot

    def __repr__(self) -> str:
        jobs = ", ".join(f"{job.name}={job.state}" for job in self.snapshot.jobs)
        return f"<version {self.version}: {jobs}>"


class AnyOrder(RuleBasedStateMachine):
    """Chaos, then calm."""

    @initialize(flaky=st.sets(st.sampled_from(["base", "left", "right"])), ahead=st.integers(0, 3))
    def begin(self, flaky: set[str], ahead: int) -> None:
        """A run that has come some way already, so that chaos reaches every part of it."""
        self.world = SimulatedWorld(frozenset(flaky))
        self.world.go(*["preflight", "base"][:ahead])
        if ahead == 3:
            self.world.run("left")
            self.world.run("right")
            self.world.settle()
        self.views: list[View] = []
        self.nonce = 0

    # The operator

    @rule()
    def reconcile(self) -> None:
        """A pass on what is true now, carried out whole; then a second one finds nothing to do."""
        for _ in range(6):
            decided = self.world.plan()
            if not decided.actions and decided.status is None:
                assert decided.events == ()
                self.nothing_outdated_runs()
                return
            self.carry_out(decided, self.world.version)
        raise AssertionError("the world does not come to rest")

    def nothing_outdated_runs(self) -> None:
        """What runs is what the status tells of, once the new preflight has said what is wanted."""
        known = {entry.name: entry for entry in self.world.status.stages}
        if known["preflight"].phase == "Succeeded":
            for job in self.world.live():
                assert job.deleting or (job.role, job.stage, job.fingerprint) == (
                    self.world.runs[job.name].role,
                    job.stage,
                    known[job.stage].fingerprint,
                )

    @rule(cut=st.integers(0, 3))
    def reconcile_and_die(self, cut: int) -> None:
        """A pass of which only the first writes happen."""
        for action in self.world.plan().actions[:cut]:
            if not self.world.act(action):
                break

    @rule()
    def look(self) -> None:
        """Keep a view of the world for later."""
        self.views.append(View(self.world.version, self.world.snapshot()))

    @precondition(lambda self: self.views)
    @rule(data=st.data(), keep_status=st.booleans())
    def reconcile_on_an_old_view(self, data: st.DataObject, keep_status: bool) -> None:
        """Jobs as they were; the object as it was, or as it is."""
        view = data.draw(st.sampled_from(self.views[-4:]), label="view")
        if keep_status:
            view = View(self.world.version, replace(self.world.snapshot(), jobs=view.snapshot.jobs))
        self.carry_out(self.world.plan(view.snapshot), view.version, is_view_true=False)

    def carry_out(self, decided: Any, version: int, *, is_view_true: bool = True) -> None:
        """Actions first, then status if nobody has written it since it was read."""
        for action in decided.actions:
            if not self.world.act(action, is_view_true=is_view_true):
                return
        if decided.status is not None and version == self.world.version:
            self.world.version += 1
            self.world.status = decided.status

    # The cluster

    def some_job(self, data: st.DataObject, *states: str) -> JobView | None:
        found = sorted((job for job in self.world.jobs.values() if job.state in states), key=lambda job: job.name)
        return self.world.jobs[data.draw(st.sampled_from([job.name for job in found]), label="job")] if found else None

    @rule(data=st.data(), seen=st.booleans())
    def pod_starts(self, data: st.DataObject, seen: bool) -> None:
        job = self.some_job(data, "waiting")
        if job is not None and not job.suspended and not job.deleting:
            self.world.change(job.name, state="running", active=True, started=self.world.now)
        if seen:
            self.reconcile()

    @rule(data=st.data(), lose_message=st.booleans(), seen=st.booleans())
    def attempt_ends(self, data: st.DataObject, lose_message: bool, seen: bool) -> None:
        job = self.some_job(data, "running")
        if job is not None:
            self.world.finish(job, lose_message=lose_message and job.role != "collect")
        if seen:
            self.reconcile()

    @rule(data=st.data())
    def pod_is_preempted(self, data: st.DataObject) -> None:
        job = self.some_job(data, "running")
        if job is not None:
            gone = {"state": "failed", "active": False, "finished": self.world.now, "result_lost": True}
            self.world.change(job.name, **gone, failure=PodFailure(disrupted=True))

    @rule(data=st.data())
    def suspended_pod_goes(self, data: st.DataObject) -> None:
        job = self.some_job(data, "running")
        if job is not None and job.suspended:
            self.world.change(job.name, state="waiting", active=False, started=None)

    @rule()
    def deleted_jobs_go(self) -> None:
        self.world.vanished |= {job.name for job in self.world.jobs.values() if job.deleting}
        self.world.reap()

    @rule(data=st.data())
    def job_is_deleted_by_hand(self, data: st.DataObject) -> None:
        job = self.some_job(data, "waiting", "running", "succeeded", "failed")
        if job is not None:
            self.world.vanished.add(job.name)
            self.world.vanish(job.name)

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: int) -> None:
        self.world.later(seconds)

    # The user

    @rule(broken=st.booleans(), seed=st.sampled_from([0, 1]), seen=st.booleans())
    def edit(self, broken: bool, seed: int, seen: bool) -> None:
        self.change_spec(**variant(broken=broken, seed=seed))
        if seen:
            self.reconcile()

    @rule(suspend=st.booleans(), seen=st.booleans())
    def suspend(self, suspend: bool, seen: bool) -> None:
        self.change_spec(suspend=suspend)
        if seen:
            self.reconcile()

    @rule(stage=st.sampled_from([None, "preflight", "base", "left", "join", "finalize", "nothing"]))
    def retry(self, stage: str | None) -> None:
        self.nonce += 1
        self.change_spec(retry={"nonce": str(self.nonce)} | ({"stage": stage} if stage is not None else {}))

    def change_spec(self, **spec: Any) -> None:
        self.world.edit(**spec)
        self.world.version += 1

    # What must hold

    @invariant()
    def status_tells_of_current_work_only(self) -> None:
        if not hasattr(self, "world"):
            return
        for entry in self.world.status.stages:
            if entry.job is not None and entry.job in self.world.runs:
                run = self.world.runs[entry.job]
                assert (run.stage, run.fingerprint) == (entry.name, entry.fingerprint)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.change_spec(suspend=False)
        self.world.calm()
        peaceful = SimulatedWorld(frozenset())
        spec = {key: value for key, value in self.world.body["spec"].items() if key != "retry"}
        peaceful.body["spec"] = spec
        peaceful.calm()
        assert self.world.outcome() == peaceful.outcome()


# Shrinking a failure takes minutes: ask for it with PLUMBLINE_SHRINK=1.
PHASES = (Phase.generate, Phase.shrink) if os.environ.get("PLUMBLINE_SHRINK") else (Phase.generate,)
AnyOrder.TestCase.settings = settings(
    max_examples=int(os.environ.get("PLUMBLINE_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=PHASES,
    derandomize="PLUMBLINE_EXAMPLES" not in os.environ,
    database=None,
)
TestAnyOrder = AnyOrder.TestCase

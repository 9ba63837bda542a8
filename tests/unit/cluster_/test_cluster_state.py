"""The record of a running cluster: processes are ended only if they are the ones we started; keys follow contents."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster.binaries import PROGRAMS, Program, kubernetes_version, linker_flags
from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.imageload import older_references
from cluster.images import RECIPES, Recipe, build_arguments, image_reference, recipe_inputs
from cluster.lifecycle import bring_down, describe_environment, describe_status
from cluster.packages import ensure_packages, missing_packages
from cluster.places import REPOSITORY, cache_root, content_key
from cluster.state import ClusterState, ProcessRecord, load_state, record_of_this_process, wait_until
from cluster.teardown import mounts_below

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def state(tmp_path: Path) -> ClusterState:
    return ClusterState(tmp_path / "state", kind="control-plane")


def test_state_survives_being_written_and_read(state: ClusterState) -> None:
    state.object_store = {"endpoint": "http://127.0.0.1:1"}
    state.start("sleeper", SLEEPER)
    try:
        assert load_state(state.folder) == state
    finally:
        state.stop()
    assert load_state(state.folder) == state
    assert state.processes == []


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"version": 99, "processes": []}))
    with pytest.raises(ClusterFailedError, match="another version"):
        load_state(tmp_path)


def test_stop_ends_the_named_process_only(state: ClusterState) -> None:
    state.start("one", SLEEPER)
    state.start("two", SLEEPER)
    one, two = state.process("one"), state.process("two")
    assert one is not None
    assert two is not None
    try:
        state.stop("one")
        assert not one.is_running() or one.status() == psutil.STATUS_ZOMBIE
        assert state.process("two") == two
    finally:
        state.stop()


def test_a_process_that_took_over_the_number_is_left_alone(state: ClusterState) -> None:
    state.start("mine", SLEEPER)
    mine = state.process("mine")
    assert mine is not None
    try:
        impostor = ClusterState(state.folder.parent / "other", kind="control-plane")
        impostor.processes = [ProcessRecord("mine", mine.pid, mine.create_time() - 100)]
        impostor.stop()
        assert mine.is_running()
        assert impostor.process("mine") is None
    finally:
        state.stop()


def test_a_cluster_is_abandoned_once_its_keeper_is_gone(state: ClusterState) -> None:
    assert not state.abandoned()
    state.keeper = record_of_this_process("pytest")
    state.save()
    loaded = load_state(state.folder)
    assert loaded is not None
    assert not loaded.abandoned()
    loaded.keeper = ProcessRecord("pytest", state.keeper.pid, state.keeper.started - 100)
    assert loaded.abandoned()


def test_start_is_idempotent(state: ClusterState) -> None:
    state.start("sleeper", SLEEPER)
    first = state.process("sleeper")
    try:
        state.start("sleeper", SLEEPER)
        assert state.process("sleeper") == first
        assert len(state.processes) == 1
    finally:
        state.stop()


def test_waiting_for_a_process_that_died_quotes_its_log_at_once(state: ClusterState) -> None:
    state.start("broken", [sys.executable, "-c", "import sys; sys.exit('no such option: --frobnicate')"])
    begun = time.monotonic()
    with pytest.raises(ClusterFailedError, match="frobnicate"):
        wait_until(lambda: False, "broken answers", state, "broken", seconds=30)
    assert time.monotonic() - begun < 10


def test_down_without_a_cluster_does_nothing(tmp_path: Path) -> None:
    bring_down(tmp_path / "nothing")
    (tmp_path / "precious").write_text("kept")
    bring_down(tmp_path)
    assert (tmp_path / "precious").exists()


def test_status_names_dead_parts(state: ClusterState) -> None:
    state.processes = [ProcessRecord("etcd", 2**22 - 1, 1.0)]
    state.save()
    text, healthy = describe_status(state.folder)
    assert "etcd" in text
    assert "DEAD" in text
    assert not healthy


def test_environment_is_quoted_for_the_shell(tmp_path: Path) -> None:
    state = ClusterState(tmp_path / "a b", kind="control-plane")
    state.save()
    assert f"export KUBECONFIG='{tmp_path}/a b/kubeconfig'" in describe_environment(state.folder)


def test_environment_without_a_cluster_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ClusterFailedError, match="cluster up"):
        describe_environment(tmp_path)


def test_mounts_below_a_folder_deepest_first_and_no_neighbour() -> None:
    table = (
        "tmpfs /a/b tmpfs rw 0 0\ntmpfs /a/b/c\\040d tmpfs rw 0 0\ntmpfs /a/bc tmpfs rw 0 0\nproc /proc proc rw 0 0\n"
    )
    assert mounts_below(Path("/a/b"), table) == ["/a/b/c d", "/a/b"]


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"no-such-package": "no-such-program", "no-such-plugin": "/no/such/file"}
    assert missing_packages(wanted) == ["no-such-package", "no-such-plugin"]
    monkeypatch.setattr("cluster.packages.os.geteuid", lambda: 1000)
    with pytest.raises(ClusterUnavailableError, match="apt-get install no-such-package no-such-plugin"):
        ensure_packages(wanted)


def test_content_key_follows_content_and_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    two.write_text("x")
    assert content_key(["a"], [one], tmp_path) != content_key(["a"], [two], tmp_path)
    assert content_key(["ab", "c"]) != content_key(["a", "bc"])
    before = content_key(["a"], [one], tmp_path)
    one.write_text("y")
    assert content_key(["a"], [one], tmp_path) != before


def test_cache_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path


def test_every_program_has_its_module_and_kubernetes_is_told_its_version() -> None:
    for program in PROGRAMS.values():
        assert all(source.exists() for source in program.sources()), program.name
    flags = linker_flags(PROGRAMS["kubernetes"])
    assert f"gitVersion={kubernetes_version()}" in flags
    assert linker_flags(Program("etcd", Path(), ".")) == "-s -w"


def test_image_name_follows_the_sources(tmp_path: Path) -> None:
    recipe = RECIPES["operator"]
    for path in recipe_inputs(recipe):
        target = tmp_path / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    before = image_reference(recipe, "base", tmp_path)
    assert before == image_reference(recipe, "base", tmp_path)
    assert before != image_reference(recipe, "another-base", tmp_path)
    source = next(tmp_path.glob("operator/plumbline_api/*.py"))
    source.write_text(source.read_text() + "\n# changed\n")
    assert image_reference(recipe, "base", tmp_path) != before


@pytest.mark.parametrize("engine", ["docker", "buildah"])
def test_build_arguments(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    recipe = Recipe("trainer", "trainer_image/Dockerfile", (), (("WITH_DEMO_MODEL", "1"),))
    arguments = build_arguments(recipe, engine, "localhost/x:1", "base:1", tmp_path)
    assert arguments[-1] == str(tmp_path)
    assert "WITH_DEMO_MODEL=1" in arguments
    assert "BASE_IMAGE=base:1" in arguments
    assert ("--isolation" in arguments) == (engine == "buildah")


def test_older_builds_are_found_under_every_name() -> None:
    listing = """REF TYPE DIGEST SIZE PLATFORMS LABELS
localhost/plumbline-trainer:old application/vnd.oci.image.manifest.v1+json sha256:1 6.2 GiB linux/amd64 managed
sha256:config-of-old application/vnd.oci.image.manifest.v1+json sha256:1 6.2 GiB linux/amd64 managed
localhost/plumbline-trainer:new application/vnd.oci.image.manifest.v1+json sha256:2 6.2 GiB linux/amd64 managed
localhost/plumbline-trainer:same application/vnd.oci.image.manifest.v1+json sha256:2 6.2 GiB linux/amd64 managed
sha256:config-of-new application/vnd.oci.image.manifest.v1+json sha256:2 6.2 GiB linux/amd64 managed
localhost/plumbline-operator:old application/vnd.oci.image.manifest.v1+json sha256:3 0.3 GiB linux/amd64 managed
"""
    older = older_references(listing, "localhost/plumbline-trainer:new")
    assert older == ["localhost/plumbline-trainer:old", "sha256:config-of-old"]

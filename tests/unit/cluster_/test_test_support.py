"""What other tests lean on: the audit log's reader, the rule about skips and the one about threads."""

import json
from pathlib import Path

import pytest
from support.audit import count_creates, count_writes, read_audit_log
from support.skips import AllowedSkip, find_unannounced, parse_allowed_skips


def event(verb: str, resource: str, name: str, code: int = 201, **more: object) -> str:
    reference = {"resource": resource, "namespace": more.pop("namespace", "ns"), "name": name, "apiGroup": "batch"}
    if subresource := more.pop("subresource", None):
        reference["subresource"] = subresource
    return json.dumps(
        {
            "stage": more.pop("stage", "ResponseComplete"),
            "verb": verb,
            "objectRef": reference,
            "user": {"username": more.pop("user", "operator")},
            "responseStatus": {"code": code},
        }
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.log"
    path.write_text(
        "\n".join(
            [
                event("create", "jobs", "a"),
                event("create", "jobs", "a", code=409),
                event("create", "jobs", "a", stage="ResponseStarted"),
                event("create", "jobs", "b"),
                event("create", "jobs", "b"),
                event("create", "jobs", "c", namespace="other"),
                event("create", "pods", "a-x"),
                event("create", "pods", "a-x", subresource="binding"),
                event("patch", "alignmentpipelines", "p", code=200, subresource="status"),
                event("get", "jobs", "a", code=200),
                event("delete", "jobs", "a", code=200, user="someone"),
                json.dumps({"stage": "ResponseComplete", "verb": "get", "requestURI": "/version", "user": {}}),
            ]
        )
        + '\n{"stage": "ResponseComp'
    )
    return path


def test_only_real_creates_count(log: Path) -> None:
    assert count_creates(log, "jobs", "ns") == {"a": 1, "b": 2}
    assert count_creates(log, "jobs") == {"a": 1, "b": 2, "c": 1}
    assert count_creates(log, "pods", "ns") == {"a-x": 1}


def test_writes_of_one_user(log: Path) -> None:
    assert count_writes(log, "operator", "ns") == {
        "create jobs": 4,
        "create pods": 1,
        "create pods/binding": 1,
        "patch alignmentpipelines/status": 1,
    }
    assert count_writes(log, "someone") == {"delete jobs": 1}


def test_no_log_is_no_events(tmp_path: Path) -> None:
    assert list(read_audit_log(tmp_path / "nothing")) == []


def test_allowed_skips_need_name_tab_and_reason() -> None:
    assert parse_allowed_skips("# comment\n\ntests/a.py::*\tno GPU\n") == [AllowedSkip("tests/a.py::*", "no GPU")]
    with pytest.raises(ValueError, match=r"line 2.*tests/b\.py"):
        parse_allowed_skips("# comment\ntests/b.py no tab\n")


def test_a_skip_for_another_reason_or_of_another_test_is_unannounced() -> None:
    allowed = [AllowedSkip("tests/a.py::test_gpu*", "no GPU")]
    skips = [
        ("tests/a.py::test_gpu_1", "Skipped: no GPU here"),
        ("tests/a.py::test_gpu_2", "Skipped: torch is missing"),
        ("tests/b.py::test_gpu_1", "Skipped: no GPU here"),
    ]
    assert find_unannounced(skips, allowed) == skips[1:]


def test_an_unannounced_skip_fails_the_run_under_ci_only(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("import pytest\ndef test_one():\n    pytest.skip('not today')\n")
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.delenv("CI", raising=False)
    assert pytester.runpytest_subprocess("-p", "support.skips").ret == 0
    monkeypatch.setenv("CI", "true")
    result = pytester.runpytest_subprocess("-p", "support.skips")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*under CI they fail the run*", "*test_one*not today*"])


def test_tests_compute_on_one_thread() -> None:
    import torch  # takes seconds

    assert torch.get_num_threads() == 1

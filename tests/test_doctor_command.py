"""`attnlrp-fx doctor`: what it finds here, and what it says of what does not work."""

from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from attnlrp_fx import doctor_command
from attnlrp_fx.cli import app
from attnlrp_fx.doctor_command import Finding, versions
from attnlrp_fx.errors import BackendError


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "160"})


def lines_of(result: Any) -> dict[str, str]:
    """What was found, with its sign, by what was looked at."""
    rows = (line.split("  ") for line in result.stdout.splitlines())
    parts = [[part.strip() for part in row if part.strip()] for row in rows]
    return {name: f"{sign} {' '.join(found)}" for sign, name, *found in parts}


def test_all_is_well_here() -> None:
    result = run("--quick")
    found = lines_of(result)
    assert result.exit_code == 0, result.stdout
    for name in ("attnlrp-fx", "Python", "torch", "transformers", "self-test, eager"):
        assert found[name].startswith("✓"), found
    assert "the ledger closes" in found["self-test, eager"]
    assert "self-test, inductor" not in found
    assert "pytest" not in found, "no user needs it"
    assert found["extra 'plot'"] == "✓ installed"
    assert "self-test, eager ..." in result.stderr


def test_what_fails_is_named() -> None:
    def explained(device: str, backend: str) -> Any:
        raise BackendError(f"no {backend} here", why="the compiler is broken")

    with mock.patch.object(doctor_command, "_explained", explained):
        result = run()
    found = lines_of(result)
    assert result.exit_code == 1
    assert found["self-test, inductor"].startswith("✗ BackendError: no inductor here why: the comp")
    assert found["Python"].startswith("✓")


def test_wrong_results_fail() -> None:
    with mock.patch.object(doctor_command, "TOLERANCE", -1.0):
        result = run("--quick")
    assert result.exit_code == 1
    assert "outputs differ from the model's by" in lines_of(result)["self-test, eager"]


def test_programs_that_run_op_by_op_fail() -> None:
    """Their results are right, and Inductor is not well."""
    refused = mock.PropertyMock(return_value=("RuntimeError: no kernel",))
    with mock.patch("attnlrp_fx.codegen.report.Compilation.refused", refused, create=True):
        result = run("--quick")
    assert "programs run op by op: RuntimeError: no kernel" in lines_of(result)["self-test, eager"]


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("torch>=99", Finding("torch", mock.ANY, False, 'pip install "torch>=99"')),
        ("nowhere>=1", Finding("nowhere", "not installed", False, 'pip install "nowhere>=1"')),
    ],
)
def test_what_is_too_old_or_missing(requirement: str, expected: Finding) -> None:
    with mock.patch.object(doctor_command, "requires", return_value=[requirement]):
        assert [*versions()][-1] == expected


def test_an_extra_that_lacks_something_is_no_failure() -> None:
    lines = ["nowhere>=1; extra == 'plot'", "pytest>=999; extra == 'test'"]
    with mock.patch.object(doctor_command, "requires", return_value=lines):
        last = [*versions()][-1]
    assert last == Finding("extra 'plot'", "lacks nowhere", None, 'pip install "attnlrp-fx[plot]"')

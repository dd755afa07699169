"""`actsparse doctor` on the releases that the package is tested with."""

from __future__ import annotations

import json
import warnings
from importlib import metadata

import pytest

from actsparse import kernels
from actsparse.cli import doctor, main


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs the verb without its measurement; yields the facts and what went to stderr."""
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: (10.0, 9.0, 11.0))

    def run() -> tuple[dict[str, str], str]:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            assert main(["doctor", "--json"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]), printed.err

    return run


def lowest(package: str) -> str:
    return next(bound.version for bound in doctor.tested_range(package) if bound.operator == ">=")


@pytest.mark.parametrize("package", doctor.TESTED)
def test_what_is_installed_is_inside_the_tested_range(package, report) -> None:
    facts, err = report()
    assert metadata.version(package) in facts[package]
    assert f"{package} >={lowest(package)},<" in facts["tested with"]
    assert "tested are" not in err


@pytest.mark.parametrize("package", doctor.TESTED)
@pytest.mark.parametrize("suffix", [".dev1", "rc1", ""])
def test_doctor_warns_outside_the_tested_range(package, suffix, report, monkeypatch) -> None:
    first = lowest(package)
    release = f"{first}{suffix}" if suffix else "99.0"
    releases = {name: metadata.version(name) for name in doctor.TESTED} | {package: release}
    monkeypatch.setattr(metadata, "version", releases.__getitem__)
    _, err = report()
    assert f"actsparse: warning: {package} is {release}, tested are >={first},<" in err
    assert err.count("tested are") == 1


def test_the_local_build_and_later_fixes_of_the_oldest_release_are_tested(monkeypatch) -> None:
    for suffix in ("", "+cpu", ".post1", ".1"):
        monkeypatch.setattr(metadata, "version", lambda name, suffix=suffix: f"{lowest(name)}{suffix}")
        assert [doctor.outside_tested_range(package) for package in doctor.TESTED] == ["", ""]


def test_no_range_is_known_where_the_package_is_only_on_the_path(report, monkeypatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    facts, err = report()
    assert facts["tested with"] == "unknown: actsparse itself is not installed"
    assert "tested are" not in err

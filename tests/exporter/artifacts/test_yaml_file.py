"""Numbers of YAML files that a user writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts.yaml_file import parse_yaml


@pytest.mark.parametrize(
    ("written", "value"), [("3e-4", 3e-4), ("-1E3", -1e3), ("2.e+1", 20.0), ("2.5e-1", 0.25)]
)
def test_a_number_with_an_exponent_is_a_number(written: str, value: float) -> None:
    assert parse_yaml(f"rate: {written}", Path("file.yaml")).data == {"rate": value}


@pytest.mark.parametrize("written", ["e4", "3e", "3e-4x", "'3e-4'", "3e4e5", "12e4567"])
def test_a_name_stays_a_name(written: str) -> None:
    assert parse_yaml(f"rate: {written}", Path("file.yaml")).data == {"rate": written.strip("'")}

from __future__ import annotations

import json

import pytest

from exporter.errors import MissingDependencyError
from exporter.optional import require


def test_an_installed_module_comes_back() -> None:
    assert require("json", extra="cpu") is json


def test_a_missing_module_names_its_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'depthcut\[rtx\]'") as error:
        require("no_such_module_here.deeper", extra="rtx")
    assert "no_such_module_here" in error.value.message

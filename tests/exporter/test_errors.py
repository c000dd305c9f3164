"""What is made of other libraries' errors."""

from __future__ import annotations

import pytest

from exporter.errors import ExportError, first_line, pass_on_memory_error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\n one thing.\nand another"), "one thing"),
        (ValueError("as follows:"), "as follows"),
        (ValueError(" "), "ValueError"),
        (KeyError("a"), "'a'"),
    ],
)
def test_the_first_line(error: Exception, told: str) -> None:
    assert first_line(error) == told


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("17 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 17 GiB"),
    ],
)
def test_memory_that_ran_out_is_nobodys_file(error: Exception) -> None:
    wrapped = ExportError("It can't be exported.")
    wrapped.__cause__ = error
    for item in (error, wrapped):
        with pytest.raises(MemoryError, match="17 GiB"):
            pass_on_memory_error(item)


def test_other_errors_are_left_to_the_handler() -> None:
    pass_on_memory_error(RuntimeError("shapes don't match"))

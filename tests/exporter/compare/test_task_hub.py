"""What libraries raise that get their tasks from the hub."""

from __future__ import annotations

import pytest

from exporter.compare.tasks.items import failing_as_task
from exporter.errors import TaskError, UsageError
from tests.raising import raises


def test_a_librarys_own_error_is_one_of_the_task() -> None:
    with (
        raises(TaskError, "mteb-failed", "STS12", "no route"),
        failing_as_task("mteb", "STS12", ""),
    ):
        raise RuntimeError("no route\nto the hub")


@pytest.mark.parametrize("error", [UsageError("ours", code="ours"), KeyboardInterrupt()])
def test_other_errors_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, failing_as_task("mteb", "STS12", ""):
        raise error
    assert caught.value is error

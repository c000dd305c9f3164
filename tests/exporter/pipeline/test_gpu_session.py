"""A whole GPU session on the stand-in of a card: killed, taken up again, and its page."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.artifacts import GpuSession, GpuStep
from exporter.artifacts.ledger import FOLDER
from exporter.cli import run
from exporter.engines.build.driver import ask_driver
from exporter.errors import BackendError, UsageError
from exporter.pipeline.children import ChildEnd
from exporter.pipeline.gpu import session as session_module
from exporter.pipeline.gpu.session import run_session
from exporter.pipeline.gpu.steps import STEPS, StepJob
from exporter.pipeline.gpu.workplace import Order
from tests.raising import raises
from tests.stand_in import rehearsal

no_driver = pytest.mark.skipif(not ask_driver().problem, reason="there is an NVIDIA driver")


ORDER = rehearsal.order()
PAGE = Path(__file__).parents[3] / "exporter/engines/build/docs/rehearsal.md"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose session was killed within the step ``8b``."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    child = os.fork()
    if child == 0:
        os.environ["REHEARSAL"] = "8b"
        run_session(out, ORDER, names=("doctor", "8b"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return out


@pytest.fixture(scope="module")
def kept(killed: Path) -> dict[str, str]:
    """What the killed session has left, by file."""
    files = [*(killed / "steps").iterdir(), killed / FOLDER / "gpu/8b.jsonl"]
    return {path.name: path.read_text() for path in files}


@pytest.fixture(scope="module")
def resumed(killed: Path, kept: dict[str, str]) -> GpuSession:
    return run_session(killed, ORDER)


def test_all_steps_are_done_after_all(resumed: GpuSession, killed: Path) -> None:
    assert {step.name: step.status for step in resumed.steps} == dict.fromkeys(STEPS, "done")
    names = sorted(path.name for path in (killed / "steps").iterdir())
    assert names == [f"{number}-{name}.json" for number, name in enumerate(STEPS, 1)]
    for step, name in zip(resumed.steps, names, strict=True):
        assert GpuStep.read(killed / "steps" / name) == step
    assert GpuSession.read(killed / "rehearsal.json").steps == resumed.steps
    assert not [path for path in (killed / FOLDER / "gpu").iterdir() if path.suffix != ".log"]


def test_what_was_done_before_the_kill_is_not_done_again(
    resumed: GpuSession, kept: dict[str, str], killed: Path
) -> None:
    assert kept.keys() == {"1-doctor.json", "8b.jsonl"}
    assert (killed / "steps/1-doctor.json").read_text() == kept["1-doctor.json"]
    large = next(step for step in resumed.steps if step.name == "8b")
    samples = [repr(sample) for row in large.times[:3] for sample in row.samples_ms]
    assert all(sample in kept["8b.jsonl"] for sample in samples)
    later = [repr(sample) for row in large.times[3:] for sample in row.samples_ms]
    assert later
    assert not any(sample in kept["8b.jsonl"] for sample in later)


def test_each_step_has_measured_what_it_is_for(resumed: GpuSession) -> None:
    steps = {step.name: step for step in resumed.steps}
    assert resumed.card is not None
    assert steps["doctor"].card == resumed.card
    tests = steps["tests"].tests
    assert tests is not None
    assert (tests.passed, tests.failed, tests.skipped) == (1, 1, 1)
    assert [name.endswith("::test_wrong") for name in tests.failures] == [True]
    for name, count in (("numbers", 4), ("attention", 2), ("logits", 1)):
        checks = steps[name].checks
        assert len(checks) == count
        assert all(check.passed for check in checks)
    arms = [(row.arm, row.batch, row.past_length) for row in steps["attention"].times]
    assert len(set(arms)) == len(arms) == 2 * 2 * 3
    assert [row.arm for row in steps["logits"].times] == ["last", "all"]
    assert [(r.arm, r.phase) for r in steps["smollm2"].times] == [
        (arm, phase) for arm in ("whole", "cut") for phase in ("prefill", "decode")
    ]


@pytest.mark.parametrize("name", ["8b", "70b"])
def test_the_largest_batch_was_seen_from_both_sides(name: str, resumed: GpuSession) -> None:
    step = next(step for step in resumed.steps if step.name == name)
    whole, cut = step.largest
    assert (whole.arm, cut.arm) == ("whole", "cut")
    assert 1 < whole.batch < cut.batch
    for row in step.largest:
        assert row.fits_not == row.batch + 1
        assert row.batch_with_both < row.batch
        steps = [r.batch for r in step.times if (r.arm, r.phase) == (row.arm, "decode")]
        assert steps == [1, row.batch]
    assert (whole.layers < whole.of_layers) == (name == "70b")


def test_no_number_of_a_rehearsal_is_on_its_page(resumed: GpuSession, killed: Path) -> None:
    assert resumed.rehearsal
    assert all(step.rehearsal for step in resumed.steps)
    assert all(each.agrees is None and not each.found for each in resumed.findings)
    page = (killed / "rehearsal.md").read_text()
    assert "REHEARSAL WITHOUT A GPU" in page[:200]
    assert not list(killed.glob("session.*"))
    largest = [row for step in resumed.steps for row in step.largest]
    numbers = {f"{row.tokens_per_s:,.0f}" for row in largest}
    numbers |= {str(row.batch) for row in largest if row.batch > 9}
    assert not numbers & set(re.findall(r"[\d,.]+", page))
    assert page.count("rehearsed") > 50
    assert page == PAGE.read_text(), "python -m tests.stand_in.rehearsal writes it"


def test_a_finished_session_runs_nothing(
    resumed: GpuSession, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "run_child", None)
    assert run_session(killed, ORDER).steps == resumed.steps


def test_no_step_begins_after_the_time(tmp_path: Path) -> None:
    found = run_session(tmp_path / "out", ORDER, time_s=0)
    assert {step.status for step in found.steps} == {"missing"}


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (ChildEnd({}, -signal.SIGKILL, "a build"), "failed"),
        (ChildEnd({}, -signal.SIGKILL, late=True), "late"),
    ],
)
def test_a_step_whose_process_ends_without_a_word_is_a_result(
    end: ChildEnd, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "run_child", lambda *_, **__: end)
    found = run_session(tmp_path, ORDER, names=("8b", "70b"))
    by_name = {step.name: step for step in found.steps}
    assert by_name["8b"].status == by_name["70b"].status == status
    failure = by_name["8b"].failure
    assert (failure is not None) == (status == "failed")
    if failure is not None:
        assert "a build" in failure.message
    assert GpuStep.read(tmp_path / "steps/7-8b.json").status == status


def test_tests_that_are_given_later_are_run(tmp_path: Path) -> None:
    found = []
    for order in (replace(ORDER, tests=None), ORDER, replace(ORDER, tests=None)):
        session = run_session(tmp_path, order, names=("tests",))
        (step,) = (step for step in session.steps if step.name == "tests")
        assert step.status == "done"
        found.append(step)
    assert [step.tests is not None for step in found] == [False, True, True]
    assert found[1] == found[2]


@no_driver
def test_without_a_card_nothing_is_measured(tmp_path: Path) -> None:
    with raises(BackendError, "no-driver"):
        run_session(tmp_path / "out", Order("tensorrt"))
    assert not (tmp_path / "out").exists()
    assert run(["gpu-session", str(tmp_path / "out")]) == 2


def test_a_rehearsal_and_a_session_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "session.json").write_text("{}")
    with raises(UsageError, "rehearsal-mixed", "session.json"):
        run_session(tmp_path, ORDER)


def test_a_step_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert run(["gpu-session", str(tmp_path), "--steps", "9b"]) == 2


def test_a_job_passes_as_text() -> None:
    job = StepJob("8b", "/somewhere", ORDER)
    assert StepJob.from_json(job.to_json()) == job

"""Two workers of one local cluster, which serves all tests here: equal sums, losses, refusals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import CalibrationError, ClusterError
from exporter.progress import QUIET
from tests.raising import raises
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.torch, pytest.mark.cluster]
torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")  # before the pool: Ray decides on import what addresses it takes

from exporter.models.loading.model_source import load_model  # noqa: E402
from exporter.pipeline.sweep.job import Job  # noqa: E402
from exporter.pipeline.sweep.run import run_on_ray  # noqa: E402
from exporter.score.cluster import scoring  # noqa: E402
from exporter.score.cluster.pool import _refuse_silence, open_pool  # noqa: E402
from exporter.score.cluster.worker import versions  # noqa: E402
from exporter.score.options import ScoreOptions  # noqa: E402
from exporter.score.scoring import score  # noqa: E402


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file that whoever imports from there takes for PyTorch."""
    folder = Path(tmp_path_factory.mktemp("bait"))
    (folder / "torch.py").write_text("raise SystemExit('imported from the working folder')")
    return folder


@pytest.fixture(scope="module")
def pool(bait: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Where depthcut isn't installed, it is found by the folder that tests are called in.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.chdir(bait)
        # As many threads as in this process: sums in another order may round otherwise.
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with open_pool(workers=2) as opened:
            assert signal.getsignal(signal.SIGTERM) is on_sigterm
            session = Path(ray._private.worker._global_node.get_session_dir_path())
            assert session.is_dir()
            assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
            yield opened
        torch.set_num_threads(before)
    assert not session.parent.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(tmp_path_factory.mktemp("text")) / "words.txt"
    path.write_text(" ".join(f"w{number * number % 59}" for number in range(200)))
    return path


def dying_once(flag: Path, which: Callable[[Any], bool], work: Callable[[Any, Any], Any]) -> Any:
    """Work during which the first worker that has a certain piece is killed."""

    def dies(state: Any, job: Any) -> Any:
        import os
        import signal

        if which(job) and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(state, job)

    return dies


@pytest.mark.long
def test_scores_with_a_killed_worker_are_the_single_processs(
    pool: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    options = ScoreOptions(
        metrics=("cosine", "angular-last", "kl", "perplexity", "random"),
        calibration=(str(text),), samples=5, sequence_length=16, batch_size=2, blocks=True, seed=4,
    )  # fmt: skip
    alone = score(load_model(str(model)), options)
    flag = tmp_path / "killed"
    work = dying_once(flag, lambda job: job.kind == "cuts" and job.first == 2, scoring.work)
    monkeypatch.setattr(scoring, "work", work)
    spread = scoring.score_on_cluster(str(model), pool, options)
    assert flag.exists()
    names = ("metric", "scores", "further", "made_from", "calibration", "model")
    figures = [{name: getattr(report, name) for name in names} for report in (spread, alone)]
    assert figures[0] == figures[1]  # to the last bit
    assert capfd.readouterr().out == ""


def of_nothing(work: Callable[[Any, Any], Any]) -> tuple[Callable[[], list[Any]], Any]:
    """Work with its setup, which is sent by value: workers don't have this module."""

    def setup() -> list[Any]:
        return []

    return setup, work


def test_results_come_with_their_numbers_and_workers_keep_their_state(
    pool: Any, bait: Path
) -> None:
    def work(state: list[int], job: int) -> tuple[int, int, str, list[str]]:
        import importlib.util
        import sys

        state.append(job)
        spec = importlib.util.find_spec("torch")
        return job * job, len(state), str(spec and spec.origin), sys.path

    results = dict(pool.run(*of_nothing(work), range(6)))
    assert {number: square for number, (square, *_) in results.items()} == {
        n: n * n for n in range(6)
    }
    assert max(count for _, count, *_ in results.values()) > 2  # of six, on two workers
    for _, _, origin, path in results.values():
        assert origin == torch.__file__
        assert str(bait) not in path
    assert Path.cwd() == bait  # where Ray would have had them look first
    assert dict(pool.run(*of_nothing(work), [])) == {}


def test_a_librarys_error_comes_as_itself(pool: Any) -> None:
    def work(_state: Any, job: int) -> int:
        from exporter.errors import CalibrationError

        if job == 2:
            raise CalibrationError("Too short.", "Take more.")
        return job

    with pytest.raises(CalibrationError) as caught:
        list(pool.run(*of_nothing(work), range(4)))
    assert (caught.value.message, caught.value.hint) == ("Too short.", "Take more.")


@pytest.mark.parametrize(
    ("jobs", "fields"),
    [
        (["a", ""], ("piece-failed", "2 of 2", "ZeroDivisionError")),
        (["lock"], ("piece-failed", "1 of 1", "pickle")),
        (["exit"], ("piece-lost", 2, "1 of 1", "exit")),
    ],
)
def test_a_piece_without_a_result_is_named(
    pool: Any, jobs: list[str], fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker more takes a second more to start, and shows nothing more.
    monkeypatch.setattr("exporter.score.cluster.pool.ATTEMPTS", 2)

    def work(_state: Any, job: str) -> Any:
        import os
        import threading

        if job == "exit":
            os._exit(7)
        return threading.Lock() if job == "lock" else 1 / len(job)

    with raises(ClusterError, *fields):
        list(pool.run(*of_nothing(work), jobs))


def test_other_versions_are_refused(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_state: None, job: int) -> int:
        return job

    other = {**versions(), "torch": "0.1", "depthcut": "9"}
    monkeypatch.setattr("exporter.score.cluster.pool.versions", lambda: other)
    with raises(ClusterError, "other-versions", "depthcut", 9, "torch", 0.1):
        list(pool.run(*of_nothing(work), [1]))


def test_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    loaded = load_model(str(model))
    text: Any = None

    def setup(source: Path, sha256: str) -> scoring.ScoringSetup:
        return scoring.ScoringSetup(str(source), sha256, {}, text, ("cosine",), 1, 1)

    assert setup(model, loaded.ref.sha256).begin()
    with raises(ClusterError, "another-model", model, "000000000000"):
        setup(model, "0" * 64).begin()
    with raises(ClusterError, "another-model", tmp_path / "gone"):
        setup(tmp_path / "gone", "0" * 64).begin()


def test_silence_is_told_at_once() -> None:
    with raises(ClusterError, "no-answer", "127.0.0.1:1"):
        _refuse_silence("127.0.0.1:1")


@pytest.mark.long
def test_a_sweep_s_cell_runs_on_a_worker_and_comes_back(pool: Any, tmp_path: Path) -> None:
    # Refused before PyTorch is loaded: a failure is a cell's result, like any other.
    text = "models: [m]\nplans: [mlp:1, mlp:2]\n"
    out, gone = str(tmp_path / "out"), str(tmp_path / "m")
    job = Job(str(tmp_path / "s.yaml"), text, out, 1, gone, "a cell", "key")
    ((number, cell),) = run_on_ray([job], QUIET, address=None)
    assert (number, cell.plan) == (0, "mlp-2")
    assert cell.failure is not None
    assert gone in cell.failure.message

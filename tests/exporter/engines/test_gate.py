"""What a cut leaves is held to what an engine's parser took before."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import PlannedDeletion, PruneReport
from exporter.cli import run
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build import check as checking
from exporter.engines.build.check import EngineCheck, Finding
from exporter.errors import EngineError, VerificationError
from exporter.progress import QUIET
from graph_passes import save_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

CUT = [PlannedDeletion(layer=1, kind="attention")]
BROKEN = Finding(1, "n", "Odd", "no plugin", "")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(tiny_model(TinySpec()), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def answers(monkeypatch: pytest.MonkeyPatch, *, source: bool, result: bool) -> None:
    """The parser's answers about the graph before the cut and after."""

    def check(onnx: Path, **_: object) -> EngineCheck:
        sound = source if onnx.name == "m.onnx" else result
        return EngineCheck("tensorrt-rtx", "1", () if sound else (BROKEN,))

    monkeypatch.setattr(checking, "check_engine", check)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(True, True, (True, None, [])), (True, False, None),
     (False, False, (False, False, ["node 'n' (Odd): no plugin"]))],
)  # fmt: skip
def test_a_result_is_held_to_what_the_parser_took_before(
    before: bool,
    after: bool,
    told: tuple[bool, bool | None, list[str]] | None,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers(monkeypatch, source=before, result=after)
    call = (source, source.with_name("cut.onnx"), CUT, CutOptions(verify="none"))
    if told is None:
        with raises(VerificationError, "not-parsed", "'n'", "(Odd)", "no plugin"):
            prune_file(*call, engine_check=checking.engine_gate())
        assert [path.name for path in source.parent.iterdir()] == ["m.onnx"]
        return
    engine = prune_file(*call, engine_check=checking.engine_gate()).engine
    assert engine is not None
    assert (engine.parsed, engine.parsed_before, list(engine.reasons)) == told
    assert PruneReport.read(source.with_name("prune.json")).engine == engine


def test_where_nobody_asked_a_library_that_fails_is_no_failure(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> EngineCheck:
        raise EngineError("its libraries can't be loaded")

    monkeypatch.setattr(checking, "check_engine", fails)
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda _: object())
    check = checking.gate_where_installed(QUIET)
    report = prune_file(
        source, source.with_name("cut.onnx"), CUT, CutOptions(verify="none"), engine_check=check
    )
    assert report.engine is None
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda _: None)
    assert checking.gate_where_installed(QUIET) is None


@pytest.mark.rtx
@pytest.mark.parametrize("weights", ["compact", "share"])
def test_the_command_asks_the_real_parser(
    weights: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = source.parent
    import onnx_ir as ir

    ir.save(tiny_model(TinySpec()), source, external_data="m.data", size_threshold_bytes=0)
    call = ["prune", str(source), "-o", str(folder / "cut.onnx"), "--drop", "attention:1"]
    assert run([*call, "--verify", "none", "--weights", weights, "--check-engine"]) == 0
    assert "parses it" in capsys.readouterr().out
    engine = PruneReport.read(folder / "prune.json").engine
    assert engine is not None
    assert engine.parsed
    assert not [item for item in folder.iterdir() if item.name.endswith(".part")]

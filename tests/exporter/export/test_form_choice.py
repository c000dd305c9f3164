"""Which writer a decoder's form comes from, and that a slower one is never taken in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from exporter.errors import BackendError, ExportError, MissingDependencyError
from exporter.export.forms import onnxruntime as choice
from exporter.export.forms.portable import WrittenForm
from exporter.export.onnx_output import save_onnx
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises
from tests.reading import Heard, names_in

pytestmark = pytest.mark.torch


def write_config(_loaded: Any, folder: Path) -> bool:
    (folder / "genai_config.json").write_text("ours")
    return True


NOT_KNOWN = ExportError("The builder doesn't know Foo.")
NOT_RUN = BackendError("ONNX Runtime can't run it: no such operator.")
NOT_HERE = MissingDependencyError("onnxruntime_genai is needed.", "pip install")
PLAIN = WrittenForm("torch 2, opset 23", remark="so this is the plain export")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Writes with writers that give or raise what they are told to."""

    def write(
        *,
        builder: Any = NOT_KNOWN,
        fused: Any = NOT_KNOWN,
        plain: Any = PLAIN,
        check: Any = lambda folder: None,
        genai: str | None = None,
    ) -> tuple[WrittenForm, list[str]]:
        def gives(answer: Any, *, config: bool = False) -> Callable[..., WrittenForm]:
            def writer(loaded: Any, folder: Path, *_: Any, **__: Any) -> WrittenForm:
                if isinstance(answer, Exception):
                    raise answer
                save_onnx(fused_model(FusedSpec()), folder)
                (folder / "who").write_text(answer.writer)
                if config:
                    (folder / "genai_config.json").write_text("{}")
                return answer

            return writer

        def checked(loaded: Any, path: Path, **_: Any) -> None:
            check(path.parent)

        monkeypatch.setattr(choice, "build_decoder", gives(builder, config=True))
        monkeypatch.setattr(choice, "write_fused_export", gives(fused))
        monkeypatch.setattr(choice, "write_portable", gives(plain))
        monkeypatch.setattr(choice, "write_genai_config", write_config)
        monkeypatch.setattr(choice, "genai_failure", lambda _: genai)
        monkeypatch.setattr("exporter.export.parity.check_export", checked)
        loaded: Any = SimpleNamespace(ref=SimpleNamespace(architecture="Foo"))
        heard = Heard()
        return choice.write_decoder(loaded, tmp_path, "cpu", heard), heard.lines

    return write


def test_the_builder_comes_first(told: Callable[..., Any], tmp_path: Path) -> None:
    written, heard = told(builder=WrittenForm("builder 1"), fused=WrittenForm("passes 1"))
    assert (written.writer, written.remark, heard) == ("builder 1", None, [])
    assert written.passes == ("num_logits_to_keep",)
    assert names_in(tmp_path) == ["genai_config.json", "model.onnx", "model.onnx.*.data", "who"]
    inputs = {value.name for value in ir.load(tmp_path / "model.onnx").graph.inputs}
    assert "num_logits_to_keep" in inputs


def test_what_the_runtime_does_not_run_is_not_taken(
    told: Callable[..., Any], tmp_path: Path
) -> None:
    def check(folder: Path) -> None:
        if (folder / "who").read_text() == "builder 1":
            raise NOT_RUN

    written, heard = told(
        builder=WrittenForm("builder 1"), fused=WrittenForm("passes 1"), check=check
    )
    assert written.writer == "passes 1"
    assert written.remark == "ONNX Runtime can't run it: no such operator"
    assert heard == [f"form: {written.remark}"]
    assert (tmp_path / "genai_config.json").read_text() == "ours"


@pytest.mark.parametrize("reason", [None, "no such cache"])
def test_a_config_is_left_where_the_runtime_runs_the_folder(
    told: Callable[..., Any], tmp_path: Path, reason: str | None
) -> None:
    written, heard = told(builder=WrittenForm("builder 1"), genai=reason)
    assert (tmp_path / "genai_config.json").exists() is (reason is None)
    assert any("no such cache" in line for line in heard) is (reason is not None)
    assert written.remark is None


def test_a_plain_form_is_told(told: Callable[..., Any]) -> None:
    written, heard = told()
    assert written.writer == PLAIN.writer
    assert written.remark.endswith("so this is the plain export, whose cache grows")
    assert "doesn't know Foo" in written.remark
    assert len(heard) == 3  # the builder, and the passes at either opset


def test_a_missing_builder_is_asked_for_unless_the_passes_serve(
    told: Callable[..., Any], tmp_path: Path
) -> None:
    written, _ = told(builder=NOT_HERE, fused=WrittenForm("passes 1"))
    assert "not installed" in written.remark
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(MissingDependencyError) as error:
        told(builder=NOT_HERE)
    assert error.value is NOT_HERE
    assert not list(tmp_path.iterdir())


def test_no_form_at_all_is_an_error(told: Callable[..., Any], tmp_path: Path) -> None:
    with raises(ExportError, "no-exporter", "Foo"):
        told(plain=ExportError("PyTorch's exporter can't export Foo."))
    assert not list(tmp_path.iterdir())

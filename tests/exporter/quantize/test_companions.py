"""What goes with a model into a result: its own files, and no stranger's links."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import UnsafeInputError
from exporter.models.texts.tokenizer import read_tokenizer
from exporter.quantize.quantize import stage_companions


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The source, the output and the stage."""
    for name in ("source", "out", "stage"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "source" / "m.onnx", tmp_path / "out" / "m.onnx", tmp_path / "stage"


def test_a_models_own_files_go_with_it(places: tuple[Path, Path, Path]) -> None:
    moves = stage_companions(*places)
    assert [final.name for _, final in moves] == ["config.json"]
    assert moves[0][0].read_text() == "{}"


@pytest.mark.parametrize("target", ["../secret", "/proc/self/environ"])
def test_links_out_of_the_folder_do_not(places: tuple[Path, Path, Path], target: str) -> None:
    (places[0].parent / "chat_template.jinja").symlink_to(target)
    with pytest.raises(UnsafeInputError):
        stage_companions(*places)
    assert not (places[2] / "chat_template.jinja").exists()


def test_a_tokenizer_beside_a_graph_is_no_link_out_of_the_folder(
    places: tuple[Path, Path, Path],
) -> None:
    pytest.importorskip("tokenizers")
    path = places[0].with_name("tokenizer.json")
    path.symlink_to("../secret")
    with pytest.raises(UnsafeInputError):
        read_tokenizer(path)

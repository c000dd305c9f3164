"""The sample for llama.cpp cuts a tiny file; the answer needs llama-cpp-python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from exporter.models.gguf_header import read_header
from tests.tiny_gguf import TinyGguf

SAMPLE = Path(__file__).parents[2] / "samples" / "10_llama_cpp" / "run.sh"


def test_a_file_is_cut(tmp_path: Path) -> None:
    source = TinyGguf.llama().write(tmp_path / "source.gguf")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", SAMPLE, source, tmp_path / "out", "attention:1,2"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = read_header(tmp_path / "out" / "cut.gguf").entries
    assert entries["deci.attention.head_count"].wholes == [4, 0, 0, 4]

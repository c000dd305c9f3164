"""The sweep's sample asks for nine cells, and the files that the documents show are understood."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.pipeline.sweep.cells import cells_of
from exporter.pipeline.sweep.schema import parse_sweep

pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]


def test_the_sample_names_its_cells(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", ROOT / "samples" / "08_sweep" / "run.sh", tmp_path / "out", "--dry-run"],
        env={**os.environ, "PATH": path, "MODEL": str(tmp_path / "model")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 plans x 3 precisions: 9 cells" in done.stdout
    assert "attention8-cosine+linear  int4" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sweep.yaml"}


def test_the_documents_files_are_understood(tmp_path: Path) -> None:
    text = (ROOT / "exporter" / "docs" / "sweeps.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        sweep = parse_sweep(block, tmp_path / "sweep.yaml")
        cells = cells_of(sweep, tmp_path / "out", look=False)
        assert len(cells) == 2 * 4 * 4

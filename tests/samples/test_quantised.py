"""The sample that quantises runs, on a tiny model in the demo's folders."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import ComparisonReport
from tests.samples.running import run_sample
from tests.text_graphs import write_tiny_lm, write_tokenizer


def _once(folder: Path) -> Path:
    """Loads the arms once, which is quicker."""
    path = folder / "once.yaml"
    path.write_text("reload: false\n")
    return path


def test_all_four_are_compared(tmp_path: Path) -> None:
    for arm, layers in (("baseline", (0, 1)), ("candidate", (0,))):
        folder = tmp_path / "demo" / arm
        plan = (
            [{"kind": "attention", "layer": 1, "replacement": "none"}] if len(layers) < 2 else None
        )
        write_tiny_lm(folder, layers=layers, plan=plan)
        write_tokenizer(folder)
    quick = [
        "--threads",
        "1",
        "--config",
        str(_once(tmp_path)),
        "--prefill",
        "4",
        "--decode-past",
        "4",
        "--rounds",
        "2",
        "--eval-tokens",
        "64",
    ]
    folders = (tmp_path / "demo", tmp_path / "out")
    done = run_sample(tmp_path, "09_quantised/run.sh", *folders, "int8", *quick)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("products: 1 in 8 bits") == 2
    assert (tmp_path / "out" / "candidate" / "tokenizer.json").is_file()
    report = ComparisonReport.read(tmp_path / "out" / "report" / "report.json")
    assert sorted((c.pruned, c.quantized) for c in report.corners) == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip

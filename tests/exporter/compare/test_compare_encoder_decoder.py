"""What an encoder-decoder's comparison does with each option, and what its report holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import ComparisonReport, MachineState, PlannedDeletion
from exporter.artifacts.stacks import Stacks
from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.errors import ComparisonError, DisturbedMachineError, UsageError
from tests.raising import raises
from tests.reading import Heard, leaves_of
from tests.tiny_models import made_loaded, write_source

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

CUTS: dict[str, list[tuple[int, Any]]] = {
    "encoder": [(0, "mlp")],
    "less": [(0, "mlp"), (2, "attention")],
    "block": [(0, "mlp"), (2, "block")],
    "least": [(0, "mlp"), (2, "attention"), (3, "cross_attention")],
}


@pytest.fixture(scope="module")
def models(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator of random weights, whole and cut, each in a folder of its name."""
    from exporter.cut.surgery import prune_stacks
    from exporter.export.encoder_decoder import write_stacks

    place = tmp_path_factory.mktemp("models")
    write_stacks(made_loaded("bart"), write_source(place / "whole", "bart"))
    for name, dropped in CUTS.items():
        plan = [PlannedDeletion(layer=layer, kind=kind) for layer, kind in dropped]
        beside = shutil.ignore_patterns("*.onnx*", "*.safetensors")
        shutil.copytree(place / "whole", place / name, ignore=beside)
        report = prune_stacks(place / "whole", place / name, plan, Stacks(2, 2))
        (place / f"{name}.json").write_text(report.model_dump_json())
    text = "\n\n".join(" ".join(f"w{n + k}" for k in range(20)) for n in range(9))
    (place / "sources.txt").write_text(text)
    return place


def compared(
    models: Path, arms: tuple[str, str] = ("whole", "least"), heard: Any = None, **changes: Any
) -> ComparisonReport:
    from exporter.compare.session import compare

    results: dict[str, Any] = {
        "eval_text": str(models / "sources.txt"), "threads": 1, "rounds": 2,
        "prefill_lengths": (8,), "decode_past_lengths": (16,),
    }  # fmt: skip
    options = CompareOptions(**results | changes)
    return compare(models / arms[0], models / arms[1], options, progress=heard or Heard())


def test_what_a_cut_baseline_lacks_already_is_not_told_as_dropped(models: Path) -> None:
    plan = compared(models, ("less", "least")).plan
    assert [(item.layer, item.kind) for item in plan] == [(3, "cross_attention")]
    rest = compared(models, ("less", "block")).plan
    assert [(item.layer, item.kind) for item in rest] == [(2, "cross_attention"), (2, "mlp")]
    whole = compared(models).plan
    assert [(item.layer, item.kind) for item in whole] == CUTS["least"]
    assert compared(models, ("less", "less")).plan == []


def test_the_machine_is_watched(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.compare import latency as timing_session

    quiet = compared(models).environment
    assert len(quiet.states) >= 2
    assert quiet.other_cpu_share is not None
    disturbed = MachineState(seconds=0, steal_share=0.5)
    monkeypatch.setattr(timing_session, "machine_state", lambda *_: disturbed)
    with raises(DisturbedMachineError, "disturbed-machine"):
        compared(models, rounds=12)
    heard = Heard()
    warned = TimingOptions(on_disturbance="warn")
    compared(models, rounds=12, timing=warned, heard=heard)
    assert sum("disturbed" in line for line in heard.lines) == 1


def test_the_report_of_a_cut_tells_the_size_of_what_was_written(models: Path) -> None:
    arms = compared(models).arms
    report = json.loads((models / "least.json").read_text())
    for size, arm in ((report["before"], arms.baseline), (report["after"], arms.candidate)):
        assert (size["nodes"], size["parameters"]) == (arm.nodes, arm.parameters)


def test_sources_without_targets_are_as_many_as_tokens_are_asked_for(models: Path) -> None:
    few, all_ = (compared(models, eval_tokens=tokens).accuracy for tokens in (90, 8192))
    assert few is not None
    assert all_ is not None
    assert few.generation is not None
    assert all_.generation is not None
    assert 0 < few.generation.prompts < all_.generation.prompts == 9


def test_a_generation_reads_a_source_of_the_length_that_is_named(models: Path) -> None:
    heard = Heard()
    timing = TimingOptions(generate=((7, 4), (9, 99)))
    rows = compared(models, timing=timing, heard=heard).latency
    result = [row for row in rows if row.phase == "generate"]
    assert [(row.sequence_length, row.new_tokens) for row in result] == [(7, 4)]
    assert any("99" in line and "left out" in line for line in heard.lines)


def test_a_length_that_the_model_does_not_reach_is_told(models: Path) -> None:
    heard = Heard()
    rows = compared(models, prefill_lengths=(8, 512), decode_past_lengths=(500,), heard=heard)
    lengths = [(row.phase, row.sequence_length, row.past_length) for row in rows.latency]
    assert lengths == [("encode", 8, 0), ("encode", 40, 0), ("prefill", 1, 0), ("decode", 1, 39)]
    assert sum("ends there" in line for line in heard.lines) == 2


def test_settings_that_greedy_answers_do_not_heed_are_told(models: Path, tmp_path: Path) -> None:
    assert compared(models).arms.baseline.notes == []
    for name in ("whole", "least"):
        shutil.copytree(models / name, tmp_path / name)
        file = tmp_path / name / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 4}))
    shutil.copy(models / "sources.txt", tmp_path)
    report = compared(tmp_path)
    for arm in (report.arms.baseline, report.arms.candidate):
        assert any("num_beams 4" in note for note in arm.notes)


@pytest.mark.parametrize("kind", ["torch", "torch-compile", "openvino", "llama.cpp"])
def test_another_runtime_does_not_run_three_graphs(models: Path, kind: str) -> None:
    from exporter.compare.session import compare

    with raises(ComparisonError, "pair-alone"):
        compare(f"{kind}:{models / 'whole'}", f"{kind}:{models / 'least'}")
    with raises(ComparisonError, "different-kinds"):
        compare(models / "whole", f"{kind}:{models / 'least'}")
    with raises(ComparisonError, "pair-alone"):
        compare(models / "whole", models / "least", references=[f"{kind}:{models / 'least'}"])


USED = {
    "provider", "threads", "prefill_lengths", "decode_past_lengths", "batches", "rounds",
    "eval_text", "eval_tokens", "timing.time_budget_s", "timing.threshold",
    "timing.generate", "timing.on_disturbance", "timing.reload",
}  # fmt: skip
"""What a comparison of encoder-decoders heeds."""
REFUSED: dict[str, Any] = {
    "other_text": "a.txt", "eval_sequence_length": 64, "quality.tasks": ("copy",),
    "quality.task_data": ".", "quality.task_limit": 3,
    "quality.agreement_prompts": 3, "quality.agreement_tokens": 5,
    "quality.prompts": "a.txt", "quality.answer_tokens": 5,
    "quality.chat": True,
}  # fmt: skip
"""What it refuses, each with a value."""


def test_every_option_is_heeded_or_refused() -> None:
    assert sorted(leaves_of(CompareOptions)) == sorted({*USED, *REFUSED})
    assert not USED & {*REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_effect_is_refused(models: Path, name: str) -> None:
    part, _, field = name.rpartition(".")
    own = {field: REFUSED[name]}
    if field in ("task_data", "task_limit"):  # they go with tasks alone
        own["tasks"] = ("copy",)
    with raises(UsageError, "one-graph-option"):
        compared(models, **({"quality": QualityOptions(**own)} if part else own))

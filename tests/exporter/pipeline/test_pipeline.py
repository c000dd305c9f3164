"""The whole road on a tiny random model: what is there afterwards, what is reused, what is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter import errors
from exporter.artifacts import ParityCheck
from exporter.choose.budgets.budget import Budget, SearchOptions
from exporter.cli.compare import compare
from exporter.cli.export import export
from exporter.compare import kinds as engine_arm
from exporter.compare.options import CompareOptions, QualityOptions
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.libraries import Driver
from exporter.engines.build.settings import BuildSettings
from exporter.files import sha256_file, sha256_files
from exporter.models.graph_facts import read_facts
from exporter.models.loading.sources import SourceOptions
from exporter.pipeline import road, stages
from exporter.pipeline import stages as engines
from exporter.pipeline.request import DropRequest, EngineRequest, ExportRequest
from exporter.pipeline.road import export_model, write_models
from exporter.pipeline.run import QUANTIZE
from exporter.quantize.settings import QuantizeSettings
from exporter.report.words import named_arms
from exporter.score.options import ScoreOptions
from tests.engine_support import decoder_record, written_as
from tests.raising import raises
from tests.reading import Heard, data_of, lines_of, names_in, run_lines

pytestmark = pytest.mark.torch

SHIPPED = {"model.onnx", "model.onnx.*.data", "config.json", "generation_config.json"}
SHIPPED |= {"tokenizer.json", "tokenizer_config.json"}
RESULTS = {"importance.json", "plan.json", "prune.json", "report.json", "report.md", "report.html"}
RESULTS |= {"baseline", "candidate"}
STAGES = ("score", "plan", "export", "prune", "measure")


def _request(checkpoint: Path, out: Path, /, **changes: Any) -> Any:
    request = ExportRequest(
        source=str(checkpoint),
        out=out,
        drops=DropRequest(Budget(attention=1)),
        score=ScoreOptions(samples=4, sequence_length=16, batch_size=2),
        compare=CompareOptions(
            prefill_lengths=(8,), decode_past_lengths=(8,), rounds=2, eval_tokens=64,
            eval_sequence_length=16, threads=1,  # finding out how many takes a second a run
        ),
    )  # fmt: skip
    return replace(request, **changes)


def _walk(request: Any) -> tuple[Any, Heard]:
    heard = Heard()
    return export_model(request, heard), heard


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("road") / "out"
    report, heard = _walk(_request(checkpoint, out))
    assert heard.reused == []
    return out, report


@pytest.fixture
def again(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the finished folder, to walk in once more."""
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def test_everything_is_there_and_names_its_parents(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    assert {path.name for path in out.iterdir()} == RESULTS | {".depthcut"}
    for arm in ("baseline", "candidate"):
        assert {*names_in(out / arm)} >= SHIPPED
        assert json.loads((out / arm / "config.json").read_text())["model_type"] == "llama"
        lines = lines_of((out / arm / "USE.md").read_text(encoding="utf-8"))
        assert "optimum" in lines
        assert run_lines(lines["ONNX Runtime"], out / arm)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["importance_sha256"] == sha256_file(out / "importance.json")
    prune = json.loads((out / "prune.json").read_text())
    assert sha256_file(out / "plan.json") in prune["made_from"].values()
    assert sha256_file(out / "baseline" / "model.onnx") in prune["made_from"].values()
    assert prune["verification"]["passed"] is True


def test_the_lowest_score_is_dropped_and_the_report_tells_all_of_it(
    finished: tuple[Path, Any],
) -> None:
    out, report = finished
    scores = json.loads((out / "importance.json").read_text())["scores"]
    lowest = min((s for s in scores if s["kind"] == "attention"), key=lambda s: s["score"])
    assert [d.layer for d in report.plan] == [lowest["layer"]]
    kv = [arm.kv_cache_bytes_per_token for arm in (report.arms.baseline, report.arms.candidate)]
    # Two heads of eight floats, keys and values, three layers and then two.
    assert kv == [3 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 4]
    assert {(check.phase, check.passed) for check in report.parity} == {
        ("prefill", True),
        ("decode", True),
    }
    assert [row.phase for row in report.latency] == ["prefill", "decode"]
    assert report.accuracy.perplexity is not None
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "text sampled by the model" in (out / "importance.json").read_text()
    assert "pydoc (evaluation half" in text


def test_a_second_run_reuses_all_that_does_not_depend_on_what_changed(
    checkpoint: Path, again: Path
) -> None:
    before = _contents(again)
    report, heard = _walk(_request(checkpoint, again))
    assert heard.reused == list(STAGES)
    assert _contents(again) == before
    assert [d.kind for d in report.plan] == ["attention"]
    report, heard = _walk(_request(checkpoint, again, drops=DropRequest(Budget(mlp=1))))
    assert heard.reused == ["score", "export"]
    assert [d.kind for d in report.plan] == ["mlp"]


def test_another_way_of_choosing_plans_anew(checkpoint: Path, again: Path) -> None:
    search = SearchOptions(search="greedy", tokens=64)
    _, heard = _walk(_request(checkpoint, again, search=search))
    assert {"score", "export"} <= set(heard.reused)
    assert "plan" not in heard.reused
    plan = json.loads((again / "plan.json").read_text())
    assert plan["budget"] == {"attention": 1, "search": "greedy", "objective": "kl"}
    assert plan["predicted"]["kl"] > 0
    with raises(errors.UsageError, "options-clash", "search"):
        _request(checkpoint, again, search=search, drops=DropRequest(plan=again / "plan.json"))


def test_a_damaged_result_is_made_again(checkpoint: Path, again: Path) -> None:
    with data_of(again / "candidate" / "model.onnx").open("r+b") as file:
        file.write(b"\xff" * 8)
    _, heard = _walk(_request(checkpoint, again))
    assert heard.reused == ["score", "plan", "export", "measure"]


def test_a_plan_by_hand_needs_no_scores_where_there_is_no_report(
    checkpoint: Path, again: Path, tmp_path: Path
) -> None:
    drops = DropRequest(plan=again / "plan.json")
    out, heard = tmp_path / "new", Heard()
    write_models(_request(checkpoint, out, drops=drops, compared=False), heard)
    assert {path.name for path in out.iterdir()} == {
        "plan.json", "prune.json", "baseline", "candidate", ".depthcut",
    }  # fmt: skip
    # With a report the scores are part of it.
    assert (again / "importance.json").exists()
    _, heard = _walk(_request(checkpoint, out, drops=drops))
    assert (out / "importance.json").exists()
    assert {"export", "prune"} <= set(heard.reused)


@pytest.mark.parametrize(
    ("deletions", "code"),
    [
        ([{"layer": 7, "kind": "attention"}], "layer-missing"),
        ([{"layer": n, "kind": "block"} for n in range(3)], "nothing-left"),
        ([], "drops-nothing"),
    ],
)
def test_a_bad_plan_is_refused_and_damages_nothing(
    checkpoint: Path, again: Path, tmp_path: Path, deletions: list[Any], code: str
) -> None:
    plan = json.loads((again / "plan.json").read_text()) | {"deletions": deletions}
    (tmp_path / "bad.json").write_text(json.dumps(plan))
    before = _contents(again)
    with raises(errors.DepthcutError, code, "bad.json"):
        _walk(_request(checkpoint, again, drops=DropRequest(plan=tmp_path / "bad.json")))
    assert _contents(again) == before


def test_a_failed_check_keeps_the_earlier_candidate(
    checkpoint: Path, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import exporter.export.parity as parity

    wrong = ParityCheck(
        name="logits", phase="decode", max_abs_error=1.0, tolerance=0.1, passed=False
    )
    monkeypatch.setattr(parity, "check_export", lambda *_, **__: [wrong])
    before = _contents(again)
    with raises(errors.VerificationError, "wrong-results", "logits", "1.00e+00"):
        _walk(_request(checkpoint, again, drops=DropRequest(Budget(mlp=1))))
    assert _contents(again) == before
    assert not any((again / ".depthcut").rglob("candidate"))


def test_a_run_that_failed_late_is_taken_up_again(
    checkpoint: Path, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise errors.BackendError("no more.")

    before = _contents(again)
    request = _request(checkpoint, again, drops=DropRequest(Budget(mlp=1)))
    with monkeypatch.context() as patch:
        patch.setattr(stages, "compare", fails)
        with pytest.raises(errors.BackendError):
            _walk(request)
    assert _contents(again) == before
    report, heard = _walk(request)
    assert heard.reused == ["score", "plan", "export", "prune"]
    assert [d.kind for d in report.plan] == ["mlp"]
    assert not (again / ".depthcut" / "work").exists()
    prune = json.loads((again / "prune.json").read_text())
    assert [entry["kind"] for entry in prune["deleted"]] == ["mlp"]


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"compare": CompareOptions(eval_text="/nothing.txt")}, "unreadable", "nothing.txt"),
        (
            {"compare": CompareOptions(quality=QualityOptions(tasks=("none",), task_data=Path()))},
            "unknown-task",
            "none",
        ),
        ({"engines": EngineRequest("tensorrt")}, "no-driver", "tensorrt"),
        (
            {
                "score": ScoreOptions(calibration=(__file__,), samples=2, sequence_length=16),
                "compare": CompareOptions(
                    eval_text=__file__, eval_tokens=32, eval_sequence_length=16
                ),
            },
            "same-text",
            "test_pipeline.py",
        ),
    ],
)
def test_what_can_not_work_fails_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any, changes: Any, code: str, named: str
) -> None:
    monkeypatch.setattr(
        "exporter.engines.build.libraries.ask_driver", lambda: Driver("no NVIDIA driver")
    )
    with raises(errors.DepthcutError, code, named):
        _walk(_request(checkpoint, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    request = _request(tmp_path / "no-model", tmp_path / "out")  # before a model is looked for, too
    for item, name in ((request.load, "dtype"), (request, "choose_dtype")):
        with raises(errors.OptionError, "option-value", name, "float8"):
            replace(item, **{name: "float8"})


def test_both_models_are_quantised_after_the_cut_and_all_four_compared(
    checkpoint: Path, again: Path
) -> None:
    request = _request(checkpoint, again, quantize=QuantizeSettings(scheme="int8"))
    report, heard = _walk(request)
    assert heard.reused == ["score", "plan", "export", "prune"]
    folders = {"baseline-quantized", "candidate-quantized"}
    assert {path.name for path in again.iterdir()} == RESULTS | folders | {".depthcut"}
    for folder in folders:
        assert {*names_in(again / folder)} >= SHIPPED
        facts = read_facts(again / folder / "model.onnx")
        assert ("depthcut.plan" in facts.metadata) == folder.startswith("candidate")
        assert json.loads(facts.metadata["depthcut.quantization"])["scheme"] == "int8"
    whole, cut, whole_quantised, both = report.corners
    sizes = [named_arms(report)[c.arm].file_bytes for c in (whole, whole_quantised, both)]
    assert sizes == sorted(sizes, reverse=True)
    key = "kl_divergence"
    assert cut.figures[key] > whole_quantised.figures[key] > 0
    paths = {name: Path(arm.path) for name, arm in report.arms.references.items()}
    assert paths == {
        "float baseline": again / "baseline" / "model.onnx",
        "float candidate": again / "candidate" / "model.onnx",
    }
    assert Path(report.arms.candidate.path) == again / "candidate-quantized" / "model.onnx"
    _, heard = _walk(request)
    assert heard.reused == ["score", "plan", "export", "prune", *QUANTIZE.values(), "measure"]


def test_export_takes_every_option_that_says_how_compare_judges() -> None:
    own = {
        "baseline",
        "candidate",
        "output",
        "engine_onnx",
        "reference",
        "float",
    }  # export makes its own arms
    names = [set(command.leaves) for command in (compare, export)]
    assert names[0] - own <= names[1]


def test_a_foreign_folder_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "mine.txt").touch()
    with raises(errors.UsageError, "not-ours", "baseline"):
        _walk(_request(checkpoint, tmp_path))
    assert (tmp_path / "baseline" / "mine.txt").exists()


def test_ctrl_c_leaves_finished_stages_and_no_half_ones(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (  # interrupted inside the export, however fast the machine is
        "import os, signal, sys, time, torch, exporter.cli as c\n"
        "def export(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "torch.onnx.export = export\n"
        "sys.exit(c.run(sys.argv[1:]))\n"
    )
    command = [
        sys.executable, "-c", script, "export", str(checkpoint), "-o", str(out),
        "--drop-attn", "1", "--heal", "none", "--samples", "2", "--sequence-length", "16",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 130, ran.stderr
    assert "export to ONNX" in ran.stderr, "it was in the export"
    assert "Traceback" not in ran.stderr
    assert {path.name for path in out.iterdir()} == {".depthcut", "importance.json", "plan.json"}
    assert [path.name for path in (out / ".depthcut").iterdir()] == ["stages.json"]


def _contents(folder: Path) -> dict[str, bytes]:
    """What a user sees: all but depthcut's own notes and workplace."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(p): (folder / p).read_bytes() for p in files if p.parts[0] != ".depthcut"}


def _fake_builds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Lets builds end at once; their records are as real ones', and no driver is there."""
    made = []

    def build_engines(onnx: Path, target: Path, *, builds: int, **_: Any) -> list[Any]:
        made.append((target.name, builds))
        hashes = {
            "model": sha256_file(onnx),
            "weights": sha256_files([data_of(onnx)], onnx.parent),
        }
        paths = [target / f"m-b{number + 1}.engine" for number in range(builds)]
        for path in paths:
            written_as(path, ["prefill", "decode"], made_from=hashes)
        return [(path, decoder_record(["prefill", "decode"])) for path in paths]

    monkeypatch.setattr(engines, "build_engines", build_engines)
    monkeypatch.setattr(road, "check_engines", lambda _: None)
    monkeypatch.setattr(engine_arm, "ask_driver", lambda: Driver("no NVIDIA driver"))
    return made


def test_engines_are_built_on_the_way_and_told_in_the_report(
    checkpoint: Path, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _fake_builds(monkeypatch)
    request = _request(checkpoint, again, engines=EngineRequest("tensorrt-rtx", builds=2))
    report, heard = _walk(request)
    assert heard.reused == ["score", "plan", "export", "prune"]
    assert made == [("baseline", 2), ("candidate", 2)]
    for name in ("baseline", "candidate"):
        arm = getattr(report.arms, name)
        folder = again / "engines" / name
        assert [engine.path for engine in arm.engines] == [
            str(folder / "m-b1.engine"),
            str(folder / "m-b2.engine"),
        ]
        assert all(Path(engine.path).is_file() for engine in arm.engines)
        assert (arm.path, arm.backend) == (str(again / name / "model.onnx"), "onnxruntime")
        assert arm.not_run is not None
    assert "no NVIDIA driver" in (again / "report.md").read_text()
    _, heard = _walk(request)
    assert heard.reused == [*STAGES[:4], "engines", "measure"]

    _, heard = _walk(_request(checkpoint, again))  # the same graphs: the engines are still theirs
    assert (again / "engines" / "baseline" / "m-b1.engine").is_file()
    assert heard.reused == list(STAGES[:4])
    _, heard = _walk(_request(checkpoint, again, drops=DropRequest(Budget(mlp=1))))
    assert not (again / "engines").exists()
    assert any(line.startswith("engines:") for line in heard.lines)


@pytest.mark.rtx
def test_engines_for_a_card_that_is_not_known_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    settings = BuildSettings(compute_capabilities=("sm89", "sm1"))
    wanted = EngineRequest("tensorrt-rtx", settings=settings)
    with raises(errors.EngineError, "other-card", "sm1"):
        _walk(_request(checkpoint, tmp_path / "out", engines=wanted))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.rtx
def test_bfloat16_is_exported_and_built_and_compared_in_float32(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_arm, "ask_driver", lambda: Driver("no NVIDIA driver"))
    settings = BuildSettings(compute_capabilities=("sm89",), optimization_level=0)
    request = _request(
        checkpoint,
        tmp_path / "out",
        load=SourceOptions(dtype="bfloat16"),
        engines=EngineRequest("tensorrt-rtx", settings=settings),
    )
    report, heard = _walk(request)
    for name in ("baseline", "candidate"):
        arm = getattr(report.arms, name)
        assert arm.precision == "bf16 as fp32"
        assert [engine.precision for engine in arm.engines] == ["bf16"]
        (record,) = find_engines(tmp_path / "out" / "engines" / name).records
        assert {output.dtype for output in record.outputs} == {"bf16"}
    assert all(check.passed for check in report.parity)
    assert all("bfloat16 as float32" in check.name for check in report.parity)
    assert report.accuracy is not None
    assert sum("kernels" in line for line in heard.lines) == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "bfloat16" in text

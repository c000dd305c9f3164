"""compare() from the files to the report, and what may stand in it besides two ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.artifacts import (
    CalibrationRef,
    ComparisonReport,
    LatencyRow,
    MachineState,
    ParityCheck,
    PlannedDeletion,
    PlanParts,
    PruningPlan,
)
from exporter.artifacts.plans import note_texts
from exporter.cli.compare import compare as compare_command
from exporter.cli.export import export as export_command
from exporter.compare import latency
from exporter.compare.evaluation import RANDOM_TOKENS, tokenize
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.compare.session import compare
from exporter.engines.runners.registry import RUNNERS
from exporter.errors import (
    ComparisonError,
    DisturbedMachineError,
    OnnxFileError,
    TextSourceError,
    UnsafeInputError,
    UsageError,
)
from exporter.models.model_folder import ModelFolder
from exporter.models.texts.sources import read_texts
from graph_passes.files.storage import load_model, save_model
from tests.compared import PLAN, QUICK, accuracy_of, language_model, quick
from tests.made_reports import as_markdown
from tests.present import present
from tests.raising import raises
from tests.reading import Heard
from tests.reference_runner import ROW
from tests.text_graphs import WORDS, write_tiny_lm, write_tokenizer

OPTIONS = quick(prefill_lengths=(4, 8), decode_past_lengths=(6,), eval_tokens=96)


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, Path]:
    """Two language models, of which the second was cut; the first has a tokenizer."""
    baseline = write_tiny_lm(tmp_path / "baseline")
    candidate = write_tiny_lm(tmp_path / "candidate", layers=(1,), noise=0.3, plan=PLAN)
    write_tokenizer(baseline)
    return baseline, candidate


def test_the_report_has_all_parts_and_survives_the_disk(
    judged: tuple[Path, Path], tmp_path: Path
) -> None:
    report = compare(*judged, OPTIONS)
    assert [(row.phase, row.sequence_length, row.past_length) for row in report.latency] == [
        ("prefill", 4, 0),
        ("prefill", 8, 0),
        ("decode", 1, 6),
    ]
    whole, cut = report.arms.baseline, report.arms.candidate
    assert whole.kv_cache_bytes_per_token == 2 * cut.kv_cache_bytes_per_token == 2 * 2 * 2 * 4 * 4
    assert (whole.precision, whole.parameters) == ("fp32", 2 * 8 * 32)
    assert cut.nodes == whole.nodes - 2
    assert whole.file_bytes == sum(path.stat().st_size for path in judged[0].glob("model.onnx*"))
    assert whole.provider == "CPUExecutionProvider"
    assert report.environment.threads == 1
    assert report.environment.other_cpu_share is None or report.environment.other_cpu_share <= 1
    assert {row.verdict for row in report.latency} == {"inconclusive"}  # of two rounds each
    assert all(row.settled is not None for row in report.latency)
    assert report.made_from["candidate"] == cut.sha256
    assert report.corners == []
    accuracy = present(report.accuracy)
    assert accuracy.text_source.startswith("pydoc (evaluation half")
    assert accuracy.tokens == 96
    assert present(accuracy.perplexity).baseline != present(accuracy.perplexity).candidate
    assert present(accuracy.kl_divergence) > 0
    assert ComparisonReport.read(report.write(tmp_path / "report.json")) == report


def test_without_a_tokenizer_there_is_no_perplexity_and_the_report_says_so(
    judged: tuple[Path, Path],
) -> None:
    (judged[0] / "tokenizer.json").unlink()
    accuracy = accuracy_of(*judged)
    assert accuracy.text_source == RANDOM_TOKENS
    assert accuracy.perplexity is None
    assert present(accuracy.kl_divergence) > 0


def test_a_tokenizer_that_leads_elsewhere_is_refused_unread(tmp_path: Path) -> None:
    def beside() -> Path | None:
        return ModelFolder.beside(tmp_path / "m" / "model.onnx", tmp_path / "m").tokenizer

    write_tokenizer(language_model(tmp_path / "m"))
    tokenizer = tmp_path / "m" / "tokenizer.json"
    assert beside() == tokenizer
    tokenizer.rename(tmp_path / "elsewhere.json")
    assert beside() is None
    tokenizer.symlink_to("../elsewhere.json")
    with pytest.raises(UnsafeInputError):
        beside()


def with_opening(folder: Path, single: str, **tokens: int) -> Path:
    """Has a folder's tokenizer put tokens before each text."""
    from tokenizers import Tokenizer, processors

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(f"[{name}]", number) for name, number in tokens.items()]
    )
    tokenizer.save(str(path))
    return path


def test_a_begin_token_opens_each_sample(judged: tuple[Path, Path]) -> None:
    texts = replace(read_texts("pydoc", part="evaluation"), documents=("the a and of " * 9,))
    options: dict[str, Any] = {"sequence_length": 4, "tokens": 8, "separator_id": None}
    turned = [[*range(n, 5), *range(1, n)] for n in range(1, 5)]
    drawn = tokenize(texts, judged[0] / "tokenizer.json", **options).ids
    assert [row.tolist() in turned for row in drawn] == [True, True]
    path = with_opening(judged[0], "[BOS] $A", BOS=20)
    drawn = tokenize(texts, path, **options).ids
    assert [row.tolist() in [[20, *one[:3]] for one in turned] for row in drawn] == [True, True]


def test_opening_tokens_that_fill_a_sample_are_refused(judged: tuple[Path, Path]) -> None:
    with_opening(judged[0], "[BOS] [SEP] $A", BOS=20, SEP=19)
    with raises(ComparisonError, "text-too-short", 2, "--eval-tokens") as caught:
        compare(*judged, quick(eval_tokens=2))
    assert "--eval-tokens" in caught.value.hint
    assert accuracy_of(*judged, options=quick(eval_tokens=3)).tokens == 3


def test_the_plan_comes_from_the_caller_or_from_the_candidate(
    judged: tuple[Path, Path], tmp_path: Path
) -> None:
    recorded = PlannedDeletion(layer=0, kind="attention")
    assert compare(*judged, QUICK).plan == [recorded]
    given = [PlannedDeletion(layer=3, kind="mlp", replacement="bias")]
    check = ParityCheck(
        name="logits", phase="prefill", max_abs_error=1e-6, tolerance=1e-4, passed=True
    )
    report = compare(*judged, QUICK, plan=given, parity=[check])
    assert (report.plan, report.parity) == (given, [check])
    broken = write_tiny_lm(tmp_path / "broken", layers=(1,), plan={"layer": 0})
    with raises(ComparisonError, "broken-plan-record", "depthcut.plan"):
        compare(judged[0], broken, QUICK)


def calibration(source: str, sha256: str = "0" * 64) -> CalibrationRef:
    return CalibrationRef(source=source, samples=1, sequence_length=8, tokens=8, sha256=sha256)


def test_the_calibration_text_is_no_evaluation_text(judged: tuple[Path, Path]) -> None:
    own = read_texts("pydoc", part="evaluation")
    for ref in (calibration("copy", own.sha256), calibration(own.source)):
        with raises(ComparisonError, "same-text", "--eval-text") as caught:
            compare(*judged, QUICK, calibration=ref)
        assert "--eval-text" in caught.value.hint
    other = read_texts("pydoc", part="calibration")
    ref = calibration(other.source, other.sha256)
    assert compare(*judged, QUICK, calibration=ref).calibration == ref


@pytest.mark.parametrize("role", ["chosen_on", "fitted_on", "stopped_on"])
def test_what_a_plan_was_made_by_is_no_evaluation_text(
    judged: tuple[Path, Path], role: str
) -> None:
    own = read_texts("pydoc", part="evaluation")
    parts = PlanParts(**{role: [calibration("a"), calibration("copy", own.sha256)]})
    with raises(ComparisonError, "same-text", own.source):
        compare(*judged, QUICK, parts=parts)
    of_judges = PlanParts(judged_on=parts.roles[role.split("_")[0]])
    assert compare(*judged, QUICK, parts=of_judges).parts == of_judges


@pytest.mark.parametrize("stands", ["candidate", "also"])
@pytest.mark.parametrize("known_by", ["nothing", "sha256", "content"])
def test_what_a_graph_notes_of_its_texts_is_heeded(
    judged: tuple[Path, Path], tmp_path: Path, stands: str, known_by: str
) -> None:
    own = read_texts("pydoc", part="evaluation")
    noted = write_tiny_lm(tmp_path / "noted", layers=(1,))
    model = load_model(noted / "model.onnx")
    ref = calibration("text", own.sha256 if known_by == "sha256" else "0" * 64)
    if known_by == "content":
        ref = ref.model_copy(update={"content": own.content.written()})
    note_texts(model.metadata_props, PruningPlan(deletions=[], chosen_on=[ref]).decided)
    save_model(model, noted / "model.onnx")
    refused = known_by != "nothing"
    with raises(ComparisonError, "same-text", own.source) if refused else nullcontext():
        if stands == "also":
            compare(*judged, QUICK, also=[noted])
        else:
            compare(judged[0], noted, QUICK)


def test_an_encoder_is_measured_as_a_whole(tmp_path: Path) -> None:
    folders = [write_tiny_lm(tmp_path / name, layers=(), output="features") for name in "ab"]
    heard = Heard()
    report = compare(*folders, OPTIONS, progress=heard)
    rows = [(row.phase, row.sequence_length) for row in report.latency]
    assert rows == [("encode", 4), ("encode", 8)]
    assert report.accuracy is None
    assert report.arms.baseline.kv_cache_bytes_per_token == 0
    assert any("no output called logits" in line for line in heard.lines)
    with raises(ComparisonError, "no-kv-cache", "--prefill") as caught:
        compare(*folders, quick(prefill_lengths=(), decode_past_lengths=(6,)))
    assert "--prefill" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "lengths"),
    [((), (128, 256)), (("--prefill", "128,512"), (128, 512)), (("--prefill", "512"), (512,))],
)
@pytest.mark.parametrize("command", [compare_command, export_command], ids=["compare", "export"])
def test_lengths_that_are_asked_for_stay_though_they_are_the_usual_ones(
    command: Any, words: tuple[str, ...], lengths: tuple[int, ...]
) -> None:
    call = command.read(["a", *(["b"] if command is compare_command else []), "-o", "o", *words])
    options = getattr(call, "request", call).compare
    assert options.for_texts(256).prompt_lengths == lengths
    assert options.prompt_lengths == (lengths if words else (128, 512))


@pytest.mark.parametrize(
    ("asked", "lengths", "told"),
    [({}, [6], True), ({"prefill_lengths": (4, 8)}, [4, 8], False)],
    ids=["usual", "asked for"],
)
def test_an_encoder_is_timed_at_the_length_of_its_users_texts(
    tmp_path: Path, asked: dict[str, Any], lengths: list[int], told: bool
) -> None:
    folders = [write_tiny_lm(tmp_path / name, layers=(), output="features") for name in "ab"]
    (folders[0] / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    heard = Heard()
    options = CompareOptions(threads=1, rounds=2, eval_tokens=96, **asked)
    report = compare(*folders, options, progress=heard)
    assert [row.sequence_length for row in report.latency] == lengths
    assert any("sentence_bert_config.json" in line for line in heard.lines) is told


@pytest.mark.parametrize(("architecture", "causal"), [("GPT2LMHeadModel", True), ("Bert", False)])
def test_without_a_cache_the_config_tells_who_predicts_the_next_token(
    tmp_path: Path, architecture: str, causal: bool
) -> None:
    folder = language_model(tmp_path, config={"architectures": [architecture]}, layers=())
    assert (accuracy_of(folder, folder).perplexity is not None) == causal


def test_shapes_beyond_the_model_s_positions_are_left_out_aloud(arms: tuple[Path, Path]) -> None:
    config, heard = arms[0] / "config.json", Heard()
    config.write_text('{"max_position_embeddings": 6}')
    report = compare(*arms, OPTIONS, progress=heard)
    assert [row.sequence_length for row in report.latency] == [4]
    left_out = "prefill 8: left out, the model ends at 6 positions"
    assert left_out in heard.lines
    assert left_out in as_markdown(report)
    assert report.command == []  # Python's own is no command of ours
    assert report.accuracy is not None
    config.write_text('{"max_position_embeddings": 3}')
    with raises(ComparisonError, "nothing-to-time"):
        compare(*arms, OPTIONS)


def test_a_candidate_without_any_attention_left_is_measured_but_continues_no_text(
    judged: tuple[Path, Path], tmp_path: Path
) -> None:
    bare, heard = write_tiny_lm(tmp_path / "bare", layers=()), Heard()
    report = compare(judged[0], bare, OPTIONS, progress=heard)
    assert present(report.accuracy).prompts is None
    assert [row.phase for row in report.latency] == ["prefill", "prefill", "decode"]
    assert accuracy_of(*judged, options=OPTIONS, progress=heard).prompts is not None
    assert sum(line.startswith("generation: left out") for line in heard.lines) == 1


def test_arms_of_other_interfaces_are_refused(
    judged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged[0]
    broken = language_model(tmp_path / "nan", scale=float("nan"))
    with monkeypatch.context() as nothing_runs:
        nothing_runs.delattr("exporter.compare.session.witness_checks")
        with raises(ComparisonError, "other-model", "candidate", "'past_key_values.0.key'"):
            compare(judged[1], whole, QUICK)
    with raises(ComparisonError, "other-model", "'scores'"):
        compare(whole, write_tiny_lm(tmp_path / "other", output="scores"), QUICK)
    with raises(ComparisonError, "other-model"):
        compare(whole, write_tiny_lm(tmp_path / "larger", vocabulary=40), QUICK)
    for pair, name in (((whole, broken), "candidate"), ((broken, whole), "baseline")):
        with raises(ComparisonError, "not-finite", name, "sample 0"):
            compare(*pair, QUICK)
    small = language_model(tmp_path / "small", vocabulary=5)
    with raises(ComparisonError, "token-out-of-range", 5):
        compare(small, small, QUICK)


def test_bad_files_are_named(judged: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(kind: Any, code: str, *named: object, arms: Any = judged, **changes: Any) -> None:
        with raises(kind, code, *named):
            compare(*arms, quick(**changes))

    (tmp_path / "empty").mkdir()
    short = tmp_path / "short.txt"
    short.write_text(" ".join(WORDS[:5]))
    refused(OnnxFileError, "file-missing", "nowhere", arms=(judged[0], tmp_path / "nowhere"))
    refused(OnnxFileError, "file-missing", "empty", arms=(tmp_path / "empty", judged[1]))
    refused(TextSourceError, "unreadable", "none.txt", eval_text=str(tmp_path / "none.txt"))
    refused(ComparisonError, "text-too-short", "short.txt", 16, eval_text=str(short))
    (judged[0] / "tokenizer.json").write_text("{}")
    refused(ComparisonError, "broken-tokenizer", "tokenizer.json")
    (judged[1] / "model.onnx.data").unlink()
    refused(OnnxFileError, "data-missing", "model.onnx.data")
    (judged[1] / "model.onnx").write_bytes(b"no graph")
    refused(OnnxFileError, "incomplete-onnx")
    (judged[0] / "config.json").write_text("[")
    refused(ComparisonError, "not-json", "config.json")


def test_a_folder_of_several_graphs_asks_which(arms: tuple[Path, Path]) -> None:
    for name in ("one.onnx", "two.onnx"):
        (arms[0] / name).write_bytes((arms[0] / "model.onnx").read_bytes())
    assert compare(*arms, QUICK).arms.baseline.path.endswith("model.onnx")
    (arms[0] / "model.onnx").unlink()
    with raises(OnnxFileError, "file-missing", 2):
        compare(*arms, QUICK)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *((CompareOptions, wrong) for wrong in (
            {"prefill_lengths": (0,)}, {"prefill_lengths": (), "decode_past_lengths": ()},
            {"batches": (0,)}, {"batches": ()}, {"threads": 0}, {"rounds": 1}, {"eval_tokens": 1},
            {"eval_sequence_length": 1},
        )),
        *((TimingOptions, wrong) for wrong in (
            {"time_budget_s": 0}, {"time_budget_s": float("nan")}, {"threshold": 0},
            {"threshold": 1.5}, {"generate": ((0, 3),)}, {"generate": ((4, 1),)},
        )),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        kind(**wrong)


# References, other backends, and a machine that is disturbed.


def test_references_are_recorded_by_the_end_of_their_path(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    third, again = tmp_path / "third", tmp_path / "again" / "third"
    for folder in (third, again):
        write_tiny_lm(folder, noise=0.1)
    report = compare(*arms, QUICK, references=[third])
    assert list(report.arms.references) == ["third"]
    assert report.made_from["third"] == report.arms.references["third"].sha256
    report = compare(*arms, QUICK, references=[third, again])
    assert list(report.arms.references) == [str(third), str(again)]
    with raises(UsageError, "named-twice", "third"):
        compare(*arms, QUICK, references=[third, third])


def test_a_reference_may_want_token_types_that_the_baseline_does_without(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_tiny_lm(tmp_path / "other", extra_input="token_type_ids")
    report = compare(*arms, QUICK, references=[other])
    assert "other" in report.arms.references
    with raises(ComparisonError, "other-model", "candidate", "'token_type_ids'"):
        compare(arms[0], other, QUICK)
    strange = write_tiny_lm(tmp_path / "strange", extra_input="pixel_values")
    with raises(ComparisonError, "other-model", "reference strange", "'pixel_values'"):
        compare(*arms, QUICK, references=[strange])


def test_a_backend_is_a_runner_and_a_row(
    judged: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pair it answers what ONNX Runtime does, as a reference it stands beside others."""
    monkeypatch.setitem(RUNNERS, "reference", ROW)
    named = [f"reference:{arm}" for arm in judged]
    ours = compare(*named, QUICK, references=[judged[0]])
    assert (ours.arms.baseline.backend, ours.arms.candidate.backend) == ("reference",) * 2
    assert ours.arms.baseline.path.startswith("reference:")
    assert [arm.backend for arm in ours.arms.references.values()] == ["onnxruntime"]
    assert [check.passed for check in ours.parity] == [True]
    row, usual = ours.latency[0], compare(*judged, QUICK, references=named[:1])
    assert min(row.baseline.samples_ms) > 0
    theirs, accuracy = present(usual.accuracy), present(ours.accuracy)
    assert accuracy.kl_divergence == pytest.approx(theirs.kl_divergence, rel=1e-3)
    assert accuracy.figures["exact_match"] == theirs.figures["exact_match"]
    assert list(usual.arms.references) == ["reference:baseline"]
    with raises(ComparisonError, "different-kinds"):
        compare(named[0], judged[1], QUICK)


def chunks(*_: Any, after_chunk: Callable[[], None], **__: Any) -> list[LatencyRow]:
    for _chunk in range(6):
        after_chunk()
    return []


@pytest.mark.parametrize(
    ("stolen", "how", "lines"),
    [(0.5, "stop", None), (0.5, "warn", 1), (0.0, "stop", 0), (0.0, "warn", 0)],
)
def test_a_disturbed_measurement_stops_or_warns_once(
    monkeypatch: pytest.MonkeyPatch, stolen: float, how: Any, lines: int | None
) -> None:
    """Six chunks on a machine of which each look says the same."""
    state = MachineState(steal_share=stolen)
    for name, result in {
        "machine_state": state, "shapes_of": ["a shape"], "generations_of": [],
        "machine_remarks": [],
    }.items():  # fmt: skip
        monkeypatch.setattr(latency, name, lambda *_, result=result: result)
    monkeypatch.setattr(latency, "measure_rows", chunks)
    comparison: Any = SimpleNamespace(
        options=CompareOptions(timing=TimingOptions(on_disturbance=how)), judged=(), timed=dict,
        whole=SimpleNamespace(runner=SimpleNamespace(threads=1), cells=None), on_gpu=False,
        in_turns=False, progress=Heard(),
    )  # fmt: skip
    stops = raises(DisturbedMachineError, "disturbed-machine", "--on-disturbance")
    with stops if lines is None else nullcontext():
        assert len(latency.time_all(comparison).states) == 7
        assert len(comparison.progress.lines) == lines

"""compare() from the files to the report."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import (
    CalibrationRef,
    ComparisonReport,
    ParityCheck,
    PlannedDeletion,
    PlanParts,
    PruningPlan,
)
from exporter.artifacts.plans import note_texts
from exporter.cli.compare import compare as compare_command
from exporter.cli.export import export as export_command
from exporter.compare.evaluation import RANDOM_TOKENS
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.errors import (
    ComparisonError,
    OnnxFileError,
    TextSourceError,
    UnsafeInputError,
    UsageError,
)
from exporter.models.model_folder import ModelFolder
from exporter.models.texts.sources import read_texts
from graph_passes.files.storage import load_model, save_model
from tests.raising import raises
from tests.reading import Heard
from tests.text_graphs import WORDS, write_tiny_lm, write_tokenizer

OPTIONS = CompareOptions(
    threads=1,
    prefill_lengths=(4, 8),
    decode_past_lengths=(6,),
    rounds=2,
    eval_tokens=96,
    eval_sequence_length=16,
)
PLAN = [{"layer": 0, "kind": "attention", "replacement": "none"}]


@pytest.fixture
def arms(tmp_path: Path) -> tuple[Path, Path]:
    baseline = write_tiny_lm(tmp_path / "baseline")
    candidate = write_tiny_lm(tmp_path / "candidate", layers=(1,), noise=0.3, plan=PLAN)
    write_tokenizer(baseline)
    return baseline, candidate


def test_the_report_has_all_parts_and_survives_the_disk(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    report = compare(*arms, OPTIONS)
    assert [(row.phase, row.sequence_length, row.past_length) for row in report.latency] == [
        ("prefill", 4, 0),
        ("prefill", 8, 0),
        ("decode", 1, 6),
    ]
    assert report.arms.baseline.kv_cache_bytes_per_token == 2 * 2 * 2 * 4 * 4
    assert report.arms.candidate.kv_cache_bytes_per_token == 2 * 2 * 4 * 4
    assert report.arms.baseline.precision == "fp32"
    assert report.arms.baseline.parameters == 2 * 8 * 32
    assert report.arms.candidate.nodes == report.arms.baseline.nodes - 2
    sizes = sum(path.stat().st_size for path in arms[0].glob("model.onnx*"))
    assert report.arms.baseline.file_bytes == sizes
    assert report.arms.baseline.provider == "CPUExecutionProvider"
    assert report.environment.threads == 1
    assert report.environment.other_cpu_share is None or report.environment.other_cpu_share <= 1
    assert {row.verdict for row in report.latency} == {"inconclusive"}  # of two rounds each
    assert all(row.settled is not None for row in report.latency)
    assert report.made_from["candidate"] == report.arms.candidate.sha256
    assert ComparisonReport.read(report.write(tmp_path / "report.json")) == report


def test_accuracy_is_on_text_that_is_named(arms: tuple[Path, Path]) -> None:
    accuracy = compare(*arms, OPTIONS).accuracy
    assert accuracy is not None
    assert accuracy.text_source.startswith("pydoc (evaluation half")
    assert accuracy.tokens == 96
    assert accuracy.perplexity is not None
    assert accuracy.perplexity.baseline != accuracy.perplexity.candidate
    assert accuracy.kl_divergence is not None
    assert accuracy.kl_divergence > 0


def test_a_model_against_itself_differs_in_nothing(arms: tuple[Path, Path]) -> None:
    report = compare(arms[0], arms[0] / "model.onnx", OPTIONS)
    assert report.accuracy is not None
    assert report.accuracy.kl_divergence == 0.0
    assert report.accuracy.top1_agreement == 1.0
    assert report.plan == []


def test_without_a_tokenizer_there_is_no_perplexity_and_the_report_says_so(
    arms: tuple[Path, Path],
) -> None:
    (arms[0] / "tokenizer.json").unlink()
    accuracy = compare(*arms, OPTIONS).accuracy
    assert accuracy is not None
    assert accuracy.text_source == RANDOM_TOKENS
    assert accuracy.perplexity is None
    assert accuracy.kl_divergence is not None
    assert accuracy.kl_divergence > 0


def test_a_tokenizer_that_leads_elsewhere_is_refused_unread(arms: tuple[Path, Path]) -> None:
    tokenizer = arms[0] / "tokenizer.json"
    tokenizer.rename(arms[0].parent / "elsewhere.json")
    tokenizer.symlink_to("../elsewhere.json")
    with pytest.raises(UnsafeInputError):
        ModelFolder.beside(arms[0] / "model.onnx", arms[0])
    tokenizer.unlink()
    assert ModelFolder.beside(arms[0] / "model.onnx", arms[0]).tokenizer is None
    (arms[0].parent / "elsewhere.json").rename(tokenizer)
    assert ModelFolder.beside(arms[0] / "model.onnx", arms[0]).tokenizer == tokenizer


def test_a_begin_token_opens_each_sample(arms: tuple[Path, Path]) -> None:
    from tokenizers import Tokenizer, processors

    from exporter.compare.evaluation import tokenize

    path = arms[0] / "tokenizer.json"
    plain = Tokenizer.from_file(str(path))
    texts = replace(read_texts("pydoc", part="evaluation"), documents=("the a and of " * 9,))
    options: dict[str, Any] = {"sequence_length": 4, "tokens": 8, "separator_id": None}
    turned = [[*range(n, 5), *range(1, n)] for n in range(1, 5)]
    drawn = tokenize(texts, path, **options).token_ids.tolist()
    assert [row in turned for row in drawn] == [True, True]
    plain.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 20)]
    )
    plain.save(str(path))
    drawn = tokenize(texts, path, **options).token_ids.tolist()
    assert [row in [[20, *before[:3]] for before in turned] for row in drawn] == [True, True]


def test_opening_tokens_that_fill_a_sample_are_refused(arms: tuple[Path, Path]) -> None:
    from tokenizers import Tokenizer, processors

    path = arms[0] / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] [SEP] $A", special_tokens=[("[BOS]", 20), ("[SEP]", 19)]
    )
    tokenizer.save(str(path))
    with raises(ComparisonError, "no-room-for-text", 2, "--eval-tokens") as caught:
        compare(*arms, replace(OPTIONS, eval_tokens=2))
    assert "--eval-tokens" in caught.value.hint
    accuracy = compare(*arms, replace(OPTIONS, eval_tokens=3)).accuracy
    assert accuracy is not None
    assert accuracy.tokens == 3


def test_the_plan_comes_from_the_caller_or_from_the_candidate(arms: tuple[Path, Path]) -> None:
    recorded = PlannedDeletion(layer=0, kind="attention")
    assert compare(*arms, OPTIONS).plan == [recorded]
    given = [PlannedDeletion(layer=3, kind="mlp", replacement="bias")]
    check = ParityCheck(
        name="logits", phase="prefill", max_abs_error=1e-6, tolerance=1e-4, passed=True
    )
    report = compare(*arms, OPTIONS, plan=given, parity=[check])
    assert (report.plan, report.parity) == (given, [check])


def test_a_broken_record_in_the_candidate_is_named(arms: tuple[Path, Path], tmp_path: Path) -> None:
    broken = write_tiny_lm(tmp_path / "broken", layers=(1,), plan={"layer": 0})
    with raises(ComparisonError, "broken-plan-record", "depthcut.plan"):
        compare(arms[0], broken, OPTIONS)


def calibration(source: str, sha256: str) -> CalibrationRef:
    return CalibrationRef(source=source, samples=1, sequence_length=8, tokens=8, sha256=sha256)


def test_the_calibration_text_is_no_evaluation_text(arms: tuple[Path, Path]) -> None:
    own = read_texts("pydoc", part="evaluation")
    for ref in (calibration("copy", own.sha256), calibration(own.source, "0" * 64)):
        with raises(ComparisonError, "same-text", "--eval-text") as caught:
            compare(*arms, OPTIONS, calibration=ref)
        assert "--eval-text" in caught.value.hint
    other = read_texts("pydoc", part="calibration")
    ref = calibration(other.source, other.sha256)
    assert compare(*arms, OPTIONS, calibration=ref).calibration == ref


@pytest.mark.parametrize("role", ["chosen_on", "fitted_on", "stopped_on"])
def test_what_a_plan_was_made_by_is_no_evaluation_text(arms: tuple[Path, Path], role: str) -> None:
    own = read_texts("pydoc", part="evaluation")
    parts = PlanParts(**{role: [calibration("a", "0" * 64), calibration("copy", own.sha256)]})
    with raises(ComparisonError, "same-text", own.source):
        compare(*arms, OPTIONS, parts=parts)
    judged = PlanParts(judged_on=parts.roles[role.split("_")[0]])
    assert compare(*arms, OPTIONS, parts=judged).parts == judged


@pytest.mark.parametrize("stands", ["candidate", "also"])
@pytest.mark.parametrize("known_by", ["nothing", "sha256", "content"])
def test_what_a_graph_notes_of_its_texts_is_heeded(
    arms: tuple[Path, Path], tmp_path: Path, stands: str, known_by: str
) -> None:
    own = read_texts("pydoc", part="evaluation")
    noted = write_tiny_lm(tmp_path / "noted", layers=(1,))
    path = noted / "model.onnx" if noted.is_dir() else noted
    model = load_model(path)
    ref = calibration("text", own.sha256 if known_by == "sha256" else "0" * 64)
    if known_by == "content":
        ref = ref.model_copy(update={"content": own.content.written()})
    note_texts(model.metadata_props, PruningPlan(deletions=[], chosen_on=[ref]).decided)
    save_model(model, path)
    refused = known_by != "nothing"
    with raises(ComparisonError, "same-text", own.source) if refused else nullcontext():
        if stands == "also":
            compare(*arms, OPTIONS, also=[noted])
        else:
            compare(arms[0], noted, OPTIONS)


def test_an_encoder_is_measured_as_a_whole(tmp_path: Path) -> None:
    folders = [write_tiny_lm(tmp_path / name, layers=(), output="features") for name in "ab"]
    listener = Heard()
    report = compare(folders[0], folders[1], OPTIONS, progress=listener)
    assert [(row.phase, row.sequence_length) for row in report.latency] == [
        ("encode", 4),
        ("encode", 8),
    ]
    assert report.accuracy is None
    assert report.arms.baseline.kv_cache_bytes_per_token == 0
    assert any("no output called logits" in line for line in listener.lines)


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [
        (None, (128, 512)), (8192, (128, 512)), (512, (128, 512)), (256, (128, 256)),
        (128, (128,)), (75, (75,)),
    ],
)  # fmt: skip
def test_the_usual_lengths_end_where_texts_are_cut(
    longest: int | None, lengths: tuple[int, ...]
) -> None:
    usual = CompareOptions().for_texts(longest)
    assert usual.prompt_lengths == lengths
    assert usual.for_texts(longest) == usual
    assert OPTIONS.for_texts(longest) == OPTIONS  # others are asked for


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
    listener = Heard()
    options = CompareOptions(threads=1, rounds=2, eval_tokens=96, **asked)
    report = compare(folders[0], folders[1], options, progress=listener)
    assert [row.sequence_length for row in report.latency] == lengths
    named = [line for line in listener.lines if "sentence_bert_config.json" in line]
    assert bool(named) is told


def test_cache_lengths_alone_are_nothing_to_time_without_a_cache(tmp_path: Path) -> None:
    folder = write_tiny_lm(tmp_path, layers=(), output="last_hidden_state")
    with raises(ComparisonError, "no-kv-cache", "--prefill") as caught:
        compare(folder, folder, replace(OPTIONS, prefill_lengths=()))
    assert "--prefill" in caught.value.hint


def test_one_kind_of_length_is_enough(arms: tuple[Path, Path]) -> None:
    for empty, phase in (("prefill_lengths", "decode"), ("decode_past_lengths", "prefill")):
        report = compare(*arms, replace(OPTIONS, **{empty: ()}))
        assert {row.phase for row in report.latency} == {phase}


@pytest.mark.parametrize(("architecture", "causal"), [("GPT2LMHeadModel", True), ("Bert", False)])
def test_without_a_cache_the_config_tells_who_predicts_the_next_token(
    tmp_path: Path, architecture: str, causal: bool
) -> None:
    folder = write_tiny_lm(tmp_path, layers=())
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    accuracy = compare(folder, folder, OPTIONS).accuracy
    assert accuracy is not None
    assert (accuracy.perplexity is not None) == causal


def test_shapes_beyond_the_model_s_positions_are_left_out_aloud(arms: tuple[Path, Path]) -> None:
    config = arms[0] / "config.json"
    config.write_text(json.dumps({"max_position_embeddings": 6}))
    listener = Heard()
    report = compare(*arms, OPTIONS, progress=listener)
    assert [row.sequence_length for row in report.latency] == [4]
    assert "prefill 8: left out, the model ends at 6 positions" in listener.lines
    assert report.accuracy is not None
    config.write_text(json.dumps({"max_position_embeddings": 3}))
    with raises(ComparisonError, "no-shape-left"):
        compare(*arms, OPTIONS)


def test_a_candidate_without_any_attention_left_is_measured_but_continues_no_text(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = write_tiny_lm(tmp_path / "bare", layers=())
    listener = Heard()
    report = compare(arms[0], bare, OPTIONS, progress=listener)
    assert report.accuracy is not None
    assert report.accuracy.generation is None
    assert [row.phase for row in report.latency] == ["prefill", "prefill", "decode"]
    whole = compare(*arms, OPTIONS, progress=listener).accuracy
    assert whole is not None
    assert whole.generation is not None
    assert sum(line.startswith("generation: left out") for line in listener.lines) == 1


def test_arms_of_other_interfaces_are_refused(
    arms: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as nothing_runs:
        nothing_runs.delattr("exporter.compare.session.witness_checks")
        with raises(ComparisonError, "other-inputs", "candidate", "'past_key_values.0.key'"):
            compare(arms[1], arms[0], OPTIONS)
    other = write_tiny_lm(tmp_path / "other", output="scores")
    with raises(ComparisonError, "other-outputs", "'scores'"):
        compare(arms[0], other, OPTIONS)
    larger = write_tiny_lm(tmp_path / "larger", vocabulary=40)
    with raises(ComparisonError, "other-vocabulary"):
        compare(arms[0], larger, OPTIONS)
    for arm, name in (((arms[0], "nan"), "candidate"), (("nan", arms[0]), "baseline")):
        broken = write_tiny_lm(tmp_path / "nan", scale=float("nan"))
        pair = [broken if path == "nan" else path for path in arm]
        write_tokenizer(broken)
        with raises(ComparisonError, "not-finite", name, "sample 0"):
            compare(Path(pair[0]), Path(pair[1]), OPTIONS)


def test_bad_files_are_named(arms: tuple[Path, Path], tmp_path: Path) -> None:
    with raises(OnnxFileError, "file-missing", "nowhere"):
        compare(arms[0], tmp_path / "nowhere", OPTIONS)
    (tmp_path / "empty").mkdir()
    with raises(OnnxFileError, "not-one-file", "empty"):
        compare(tmp_path / "empty", arms[1], OPTIONS)
    (arms[1] / "model.onnx.data").unlink()
    with raises(OnnxFileError, "data-missing", "model.onnx.data"):
        compare(*arms, OPTIONS)
    (arms[1] / "model.onnx").write_bytes(b"no graph")
    with raises(OnnxFileError, "incomplete-onnx"):
        compare(*arms, OPTIONS)


def test_a_folder_of_several_graphs_asks_which(arms: tuple[Path, Path]) -> None:
    for name in ("one.onnx", "two.onnx"):
        (arms[0] / name).write_bytes((arms[0] / "model.onnx").read_bytes())
    assert compare(arms[0], arms[1], OPTIONS).arms.baseline.path.endswith("model.onnx")
    (arms[0] / "model.onnx").unlink()
    with raises(OnnxFileError, "not-one-file", 2):
        compare(*arms, OPTIONS)


def test_bad_texts_tokenizers_and_configs_are_named(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    with raises(TextSourceError, "file-missing", "none.txt"):
        compare(*arms, replace(OPTIONS, eval_text=str(tmp_path / "none.txt")))
    short = tmp_path / "short.txt"
    short.write_text(" ".join(WORDS[:5]))
    with raises(ComparisonError, "text-too-short", "short.txt", 16):
        compare(*arms, replace(OPTIONS, eval_text=str(short)))
    (arms[0] / "tokenizer.json").write_text("{}")
    with raises(ComparisonError, "broken-tokenizer", "tokenizer.json"):
        compare(*arms, OPTIONS)
    (arms[0] / "config.json").write_text("[")
    with raises(ComparisonError, "not-json", "config.json"):
        compare(*arms, OPTIONS)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_lm(tmp_path, vocabulary=5)
    write_tokenizer(folder)
    with raises(ComparisonError, "token-out-of-range", 5):
        compare(folder, folder, OPTIONS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefill_lengths": (0,)},
        {"prefill_lengths": (), "decode_past_lengths": ()},
        {"batches": (0,)},
        {"batches": ()},
        {"threads": 0},
        {"rounds": 1},
        {"eval_tokens": 1},
        {"eval_sequence_length": 1},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CompareOptions(**wrong)

"""The whole road with an encoder-decoder: three graphs, scored, planned, cut and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport, PlanParts, PruneReport, PruningPlan
from exporter.choose.budgets.budget import USUAL_REQUEST, Budget, Floors, Memory, SearchOptions
from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.compare.session import compare as compare_folders
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.errors import (
    ComparisonError,
    DepthcutError,
    HealingError,
    ModelSourceError,
    PlanError,
    ScoringError,
    UsageError,
)
from exporter.heal.options import HealOptions
from exporter.models.decoding_rules import DecodingRules
from exporter.models.loading.model_source import load_model
from exporter.models.loading.sources import SourceOptions
from exporter.pipeline.request import DropRequest, EngineRequest, ExportRequest
from exporter.pipeline.road import export_model, in_stacks, write_models
from exporter.progress import QUIET
from exporter.quantize.settings import QuantizeSettings
from exporter.score.options import ScoreOptions
from tests.raising import raises
from tests.reading import leaves_of
from tests.tiny_models import made_loaded, write_recordings, write_source

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

GRAPHS = ("encoder_model", "decoder_model", "decoder_with_past_model")
JOINT = DropRequest(Budget(joint=2))


def request_for(source: Path, out: Path, **changes: Any) -> ExportRequest:
    options: dict[str, Any] = {
        "drops": JOINT,
        "search": SearchOptions(search="auto", protect=("encoder",)),
        "score": ScoreOptions(calibration=("random",), samples=2),
        "compare": compare(),
    }
    return ExportRequest(source=str(source), out=out, **options | changes)


def compare(**changes: Any) -> CompareOptions:
    results: dict[str, Any] = {"decode_past_lengths": (512,), "rounds": 2, "threads": 1}
    return CompareOptions(**results | changes)


@pytest.fixture(scope="module")
def whisper(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that was scored on recordings, cut, and judged on others."""
    pytest.importorskip("jiwer")
    place = tmp_path_factory.mktemp("whisper")
    source = write_source(place / "source", "whisper")
    scored, judged = (write_recordings(place / name, at) for name, at in (("a", 0), ("b", 5)))
    request = request_for(
        source,
        place / "out",
        drops=DropRequest(Budget(attention=1, cross_attention=1, mlp=1)),
        search=SearchOptions(search="auto"),
        heal=HealOptions(kind="auto"),
        score=ScoreOptions(calibration=(str(scored),)),
        compare=compare(
            eval_text=str(judged),
            quality=QualityOptions(),
            timing=TimingOptions(generate=((1, 4),)),
        ),
    )
    return place / "out", export_model(request)


def test_every_sublayer_of_both_halves_is_scored(whisper: tuple[Path, Any]) -> None:
    report = ImportanceReport.read(whisper[0] / "importance.json")
    assert (report.model.num_layers, report.model.encoder_layers) == (4, 2)
    kinds = {n: [s.kind for s in report.scores if s.layer == n] for n in range(4)}
    assert kinds[1] == ["attention", "mlp", "block"]
    assert kinds[2] == ["attention", "cross_attention", "mlp", "block"]
    assert all(0 < score.score < 2 for score in report.scores)
    assert all(score.std_error is not None for score in report.scores)
    assert report.calibration.samples == 4


def test_the_plan_is_chosen_by_damage_and_healed(whisper: tuple[Path, Any]) -> None:
    chosen = PruningPlan.read(whisper[0] / "plan.json")
    assert chosen.predicted["kl"] > 0
    assert chosen.predicted_on == "searched"
    assert chosen.chosen_on[0].samples == 4
    healed = PruningPlan.read(whisper[0] / "healing" / "plan.json")
    assert [(d.layer, d.kind) for d in healed.deletions] == [
        (d.layer, d.kind) for d in chosen.deletions
    ]
    assert {d.replacement for d in healed.deletions} & {"bias", "linear"}
    assert (healed.fitted_on[0].samples, healed.judged_on[0].samples) == (3, 1)
    (result,) = whisper[1].healing.texts
    assert result.figures["kl"].dropped > 0
    assert result.text.samples == 1
    assert any("replaced" in check.name for check in whisper[1].parity)


def test_both_decoder_graphs_lose_the_same_and_its_caches(whisper: tuple[Path, Any]) -> None:
    report = PruneReport.read(whisper[0] / "prune.json")
    plan = PruningPlan.read(whisper[0] / "plan.json")
    for deletion in plan.deletions:
        names = {
            e.graph for e in report.deleted if (e.layer, e.kind) == (deletion.layer, deletion.kind)
        }
        inside = GRAPHS[:1] if deletion.layer < 2 else GRAPHS[1:]
        assert names == {f"{graph}.onnx" for graph in inside}
    cross = [entry for entry in report.deleted if entry.kind == "cross_attention"]
    gone = [*cross[0].outputs_removed, *cross[1].inputs_removed]
    assert len(gone) == 4
    assert all(".encoder." in name for name in gone)
    assert report.verification.passed
    assert report.after.parameters < report.before.parameters
    for size, arm in (
        (report.before, whisper[1].arms.baseline),
        (report.after, whisper[1].arms.candidate),
    ):
        assert (size.nodes, size.parameters) == (arm.nodes, arm.parameters)


def test_both_models_compute_what_pytorch_computes(whisper: tuple[Path, Any]) -> None:
    parity = whisper[1].parity
    assert {check.phase for check in parity} == {"encode", "prefill", "decode"}
    names = {check.name.split(" against")[0] for check in parity}
    assert {"logits", "last_hidden_state"} < names
    assert {f"{kind}-attention keys and values" for kind in ("self", "cross")} < names
    assert all(check.passed and check.max_abs_error < 1e-4 for check in parity)
    assert any("candidate" in check.name for check in parity)


def test_each_graph_and_a_generation_are_timed_and_judged(whisper: tuple[Path, Any]) -> None:
    rows = whisper[1].latency
    assert [row.phase for row in rows] == [
        "encode", "prefill", "decode", "first_token", "per_token", "generate",
    ]  # fmt: skip
    assert rows[0].sequence_length == 100  # frames
    assert rows[2].past_length == 39  # as far as the decoder reaches
    accuracy = whisper[1].accuracy
    assert accuracy.kl_divergence > 0
    assert 0 <= accuracy.top1_agreement < 1
    assert accuracy.perplexity.baseline > 1
    assert accuracy.prompts == 4
    errors = accuracy.tasks[0]
    assert (errors.metric, errors.items, errors.higher_is_better) == ("wer", 4, False)
    assert errors.difference.ci95[0] <= errors.difference.value <= errors.difference.ci95[1]
    arms = whisper[1].arms
    assert arms.candidate.parameters < arms.baseline.parameters
    assert arms.candidate.kv_cache_bytes_per_token in (256, 512)
    assert arms.baseline.kv_cache_bytes_per_token == 512  # 2 layers, 2 parts, 32 floats


def test_greedy_generation_is_that_of_transformers(whisper: tuple[Path, Any]) -> None:
    import torch
    from transformers import GenerationMixin

    loaded = load_model(str(whisper[0].parent / "source"))
    model: Any = loaded.model
    sound = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(2))
    rules = DecodingRules.of(model.config.to_dict(), model.generation_config.to_dict())
    with EncoderDecoderRunner(whisper[0] / "baseline", threads=1, brief=True) as runner:
        ours = runner.generate({"input_features": sound.numpy()}, rules, 12)
    with torch.inference_mode():
        theirs = GenerationMixin.generate(  # Whisper's own drops the start token
            model,
            inputs=sound,
            decoder_input_ids=torch.tensor([[1]] * 3),
            max_new_tokens=12,
            do_sample=False,
            num_beams=1,
        )
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[0].tolist())) > 2


def test_text_goes_the_same_way(exports_once: None, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "bart")
    pairs = [{"source": f"w{n} w{n + 1} w{n + 2}", "target": f"w{n + 9} w{n}"} for n in range(6)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{n + k}" for k in range(20)) for n in range(9)))
    report = export_model(
        request_for(
            source,
            tmp_path / "out",
            drops=DropRequest(Budget(block=1)),
            score=ScoreOptions(calibration=(str(text),), samples=3),
            compare=compare(eval_text=str(file), prefill_lengths=(8,)),
        )
    )
    assert all(check.passed for check in report.parity)
    assert report.accuracy.perplexity.candidate != report.accuracy.perplexity.baseline
    assert [row.phase for row in report.latency] == ["encode", "prefill", "decode"]
    assert len(report.environment.states) > 1
    deleted = PruneReport.read(tmp_path / "out" / "prune.json").deleted
    assert {entry.kind for entry in deleted} == {"attention", "cross_attention", "mlp"}


def plan_file(folder: Path, encoder_layers: int | None) -> Path:
    deletions = [{"layer": 3, "kind": "mlp"}]
    plan = PruningPlan(deletions=deletions, encoder_layers=encoder_layers)  # type: ignore[arg-type]
    return plan.write(folder / "given.json")


@pytest.mark.parametrize(
    ("changes", "kind", "code"),
    [
        ({"target": "onnxruntime-cpu"}, UsageError, "one-graph-option"),
        ({"heal": HealOptions(kind="fold")}, HealingError, "no-weights-changed"),
        ({"load": SourceOptions(dtype="bfloat16")}, UsageError, "one-graph-option"),
        ({"search": SearchOptions("greedy", "cosine")}, PlanError, "numbers-only"),
        ({"search": SearchOptions("auto", "similarity")}, PlanError, "numbers-only"),
        ({"score": ScoreOptions()}, UsageError, "not-one-text"),
        ({"score": ScoreOptions(calibration=("random", "pydoc"))}, UsageError, "not-one-text"),
        (
            {"score": ScoreOptions(metrics=("depth",), calibration=("random",))},
            UsageError,
            "one-graph-option",
        ),
        ({"score": ScoreOptions(calibration=("pydoc",))}, DepthcutError, "no-text"),
        ({"drops": DropRequest(Budget(joint=7))}, PlanError, "too-many"),
        ({"drops": DropRequest(Budget(cross_attention=3))}, PlanError, "too-many"),
        # Recordings have one length.
        ({"compare": compare(prefill_lengths=(8,))}, UsageError, "one-graph-option"),
        (
            {"compare": compare(timing=TimingOptions(generate=((2, 4),)))},
            UsageError,
            "one-graph-option",
        ),
    ],
)
def test_what_an_encoder_decoder_can_not_have_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[DepthcutError], code: str
) -> None:
    source = write_source(tmp_path / "source", "whisper")
    with raises(kind, code):
        export_model(request_for(source, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "baseline").exists()


HEEDED = {
    "source", "out", "opset", "compared", "redo", "allow_empty", "choose_dtype", "shared",
    *(f"drops.budget.{kind}" for kind in ("attention", "cross_attention", "mlp", "block", "joint")),
    "drops.plan", "search.search", "search.objective", "search.protect", "search.shortlist",
    "heal.kind", "heal.batch_size",
    "score.metrics", "score.calibration", "score.samples", "score.batch_size",
    "score.kl_positions", "score.blocks",
    *(f"load.{name}" for name in ("dtype", "revision", "trust_remote_code", "allow_pickle")),
    "load.allow_any_model_type",
}  # fmt: skip
"""What `export` of an encoder-decoder heeds; what its comparison does has a table of its own."""
NO_OPTIONS = {"refuses_useless", "in_stacks"}
BY_RULES = {
    "heal.server",  # as server
    "heal.seed", "heal.sequence_length",  # as those of scores
    "drops.budget.fits.context", "drops.budget.fits.batch",  # with a limit of bytes alone
    "stream_dir", "cache_length",
}  # fmt: skip
"""What other options must be given for, which are refused."""


def budget(**changes: Any) -> dict[str, Any]:
    return {"drops": DropRequest(Budget(**{"joint": 2} | changes))}


def heal(**changes: Any) -> dict[str, Any]:
    return {"heal": HealOptions(**{"kind": "auto"} | changes)}


LESS: dict[str, Callable[[], dict[str, Any]]] = {
    "target": lambda: {"target": "onnxruntime-cpu"},
    "exporter": lambda: {"exporter": "optimum"},
    "pooling": lambda: {"pooling": True},
    "checkpoint": lambda: {"checkpoint": True},
    "also": lambda: {"also": (Path("other"),)},
    "server": lambda: {"server": "llama.cpp"},
    "stream": lambda: {"stream": True, "search": SearchOptions()},
    "quantize": lambda: {"quantize": QuantizeSettings(scheme="int8")},
    "engines": lambda: {"engines": EngineRequest()},
    "drops.budget.keep_first": lambda: budget(joint=0, keep_first=1),
    "drops.budget.parameters": lambda: budget(joint=0, parameters=0.1),
    "drops.budget.fits.limit_bytes": lambda: budget(joint=0, fits=Memory(limit_bytes=9)),
    "drops.budget.target_speedup": lambda: budget(joint=0, target_speedup=1.2, at=USUAL_REQUEST),
    "drops.budget.at": lambda: budget(at=USUAL_REQUEST),
    "drops.budget.kinds": lambda: budget(kinds=("mlp",)),
    **{
        f"drops.budget.floors.{name}": lambda name=name: budget(floors=Floors(**{name: 0.5}))
        for name in ("perplexity_increase", "top1_agreement", "embedding_cosine", "similarity")
    },
    "search.tokens": lambda: {"search": SearchOptions("greedy", tokens=64)},
    "heal.rank": lambda: heal(rank=4),
    "heal.calibration": lambda: heal(calibration=("other",)),
    "heal.samples": lambda: heal(samples=3),
    "heal.check_text": lambda: heal(check_text="pydoc"),
    "heal.tokens": lambda: heal(tokens=1000),
    "heal.time_s": lambda: heal(time_s=60.0),
    "heal.train": lambda: heal(train="all"),
    "heal.learning_rate": lambda: heal(learning_rate=0.1),
    "heal.step_tokens": lambda: heal(step_tokens=64),
    "heal.replacements": lambda: heal(replacements="bias"),
    "score.sequence_length": lambda: {"score": ScoreOptions(sequence_length=64)},
    "score.seed": lambda: {"score": ScoreOptions(seed=1)},
}


def test_every_option_is_heeded_or_refused() -> None:
    parts = ("compare.", "quantize.", "engines.")
    texts = {name for name in leaves_of(ExportRequest) if not name.startswith(parts)}
    whole = {"quantize", "engines"}
    assert texts == (HEEDED | NO_OPTIONS | BY_RULES | {*LESS}) - whole
    assert not {*LESS} & (HEEDED | BY_RULES)


@pytest.mark.parametrize("name", LESS)
def test_an_option_without_effect_is_refused(name: str) -> None:
    codes = {"one-graph-option", "numbers-only"}
    with pytest.raises(DepthcutError) as caught:
        in_stacks(request_for(Path("m"), Path("out"), **LESS[name]()), QUIET)
    assert caught.value.code in codes


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_what_the_scores_are_to_rest_on_is_refused_before_anything_is_done(
    tmp_path: Path, family: str
) -> None:
    source, scored = write_source(tmp_path / "source", family), tmp_path / "a"
    write_recordings(scored, 0)
    judged: Path | str = scored / "recordings.jsonl"
    given: Path | str = scored  # the same recordings without their words, as a folder
    if family == "bart":
        given, judged = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
        lines = [{"source": f"w{n}", "target": f"w{n + 1}"} for n in range(4)]
        given.write_text("\n".join(map(json.dumps, lines)))
        others = [{"source": line["source"]} for line in reversed(lines)]
        judged.write_text("\n".join(map(json.dumps, others)))
    result = {
        "score": ScoreOptions(calibration=(str(given),)),
        "compare": compare(eval_text=str(judged)),
    }
    with raises(ComparisonError, "same-text"):
        export_model(request_for(source, tmp_path / "out", **result))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("told", ["the caller", "the plan's parts", "the graphs' notes"])
def test_what_anything_was_decided_by_judges_nothing(whisper: tuple[Path, Any], told: str) -> None:
    out, report = whisper
    scored, other = (out.parent / name / "recordings.jsonl" for name in ("a", "b"))
    known: dict[str, Any] = {
        "the caller": {"calibration": report.calibration},
        "the plan's parts": {"parts": PlanParts(chosen_on=[report.calibration])},
    }.get(told, {})
    same = compare(eval_text=str(scored))
    baseline, candidate = out / "baseline", out / "candidate"
    if known:  # the folder of both arms notes nothing
        candidate = baseline
    with raises(ComparisonError, "same-text"):
        compare_folders(baseline, candidate, same, **known)
    if told == "the plan's parts":
        assert compare_folders(baseline, candidate, compare(eval_text=str(other)), **known)


@pytest.mark.parametrize("encoder_layers", [None, 1])
def test_a_plan_for_another_kind_of_model_is_refused(
    tmp_path: Path, encoder_layers: int | None
) -> None:
    source = write_source(tmp_path / "source", "whisper")
    drops = DropRequest(plan=plan_file(tmp_path, encoder_layers))
    with raises(PlanError, "other-stacks"):
        export_model(request_for(source, tmp_path / "out", drops=drops, search=SearchOptions()))


def test_a_plan_by_hand_is_taken_without_scores(exports_once: None, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "whisper")
    request = request_for(
        source,
        tmp_path / "out",
        drops=DropRequest(plan=plan_file(tmp_path, 2)),
        search=SearchOptions(),
        compared=False,
    )
    report = write_models(request)
    assert {(e.layer, e.kind, e.graph) for e in report.deleted} == {
        (3, "mlp", f"{graph}.onnx") for graph in GRAPHS[1:]
    }
    assert not (tmp_path / "out" / "importance.json").exists()


def test_the_features_must_be_there_and_fit_and_streams_be_finite(tmp_path: Path) -> None:
    from exporter.score.scoring import score

    source = write_source(tmp_path / "source", "whisper")
    options = ScoreOptions(calibration=(str(write_recordings(tmp_path / "a", 0)),))
    content = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(content | {"feature_size": 9}))
    with raises(ModelSourceError, "odd-setting", 9, 8):
        score(load_model(str(source)), options)
    (source / "preprocessor_config.json").unlink()
    with raises(ModelSourceError, "no-processor", source):
        score(load_model(str(source)), options)
    loaded = made_loaded("t5")
    loaded.model.decoder.block[1].layer[2].DenseReluDense.wo.weight.data[0, 0] = np.nan
    with raises(ScoringError, "not-finite", 3):
        score(loaded, ScoreOptions(calibration=("random",), samples=2))

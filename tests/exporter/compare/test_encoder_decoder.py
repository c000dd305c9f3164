"""Encoder-decoders compared: each option's effect, the lengths that are timed, word errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from exporter.artifacts import ComparisonReport, PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.artifacts.stacks import Stacks
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.kept import open_store
from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.compare.sequences import (
    JudgedPairs,
    Normalizer,
    Sequences,
    hash_of,
    normalizer_of,
    stack_cells,
    word_errors,
)
from exporter.compare.session import compare
from exporter.engines.runners.base import Capabilities
from exporter.errors import (
    ComparisonError,
    DisturbedMachineError,
    MissingDependencyError,
    UsageError,
)
from exporter.models.decoding_rules import DecodingRules, target_positions
from exporter.models.texts.pairs import PairReader, paired_text, read_pairs
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from tests.present import present
from tests.raising import raises
from tests.reading import Heard, leaves_of
from tests.tiny_models import made_loaded, write_source

CUTS: dict[str, list[tuple[int, Any]]] = {
    "less": [(0, "mlp"), (2, "attention")],
    "block": [(0, "mlp"), (2, "block")],
    "least": [(0, "mlp"), (2, "attention"), (3, "cross_attention")],
}


@pytest.fixture(scope="module")
def models(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator of random weights, whole and cut, each in a folder of its name."""
    from exporter.cut.surgery import prune_stacks
    from exporter.export.forms.portable import write_stacks

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
    models: Path,
    arms: tuple[str, str] = ("whole", "least"),
    heard: Any = None,
    options: Any = None,
    **changes: Any,
) -> ComparisonReport:
    results: dict[str, Any] = {
        "eval_text": str(models / "sources.txt"), "threads": 1, "rounds": 2,
        "prefill_lengths": (8,), "decode_past_lengths": (16,),
    }  # fmt: skip
    how = CompareOptions(**results | changes)
    more = {"progress": heard or Heard(), **(options or {})}
    return compare(*(models / arm for arm in arms), how, **more)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arms", "plan"),
    [
        (("less", "least"), [(3, "cross_attention")]),
        (("less", "block"), [(2, "cross_attention"), (2, "mlp")]),
        (("whole", "least"), CUTS["least"]),
        (("less", "less"), []),
    ],
)
def test_what_a_cut_baseline_lacks_already_is_not_told_as_dropped(
    models: Path, arms: tuple[str, str], plan: list[Any]
) -> None:
    assert [(item.layer, item.kind) for item in compared(models, arms).plan] == plan


@pytest.mark.torch
def test_the_machine_is_watched(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compared(models)
    assert len(report.environment.states) >= 2
    assert report.environment.other_cpu_share is not None
    assert report.arms.baseline.notes == []
    written = json.loads((models / "least.json").read_text())  # what the cut's own report tells
    for size, arm in (("before", report.arms.baseline), ("after", report.arms.candidate)):
        assert (written[size]["nodes"], written[size]["parameters"]) == (arm.nodes, arm.parameters)
    disturbed = report.environment.states[0].model_copy(update={"steal_share": 0.5})
    monkeypatch.setattr("exporter.compare.latency.machine_state", lambda *_: disturbed)
    with raises(DisturbedMachineError, "disturbed-machine"):
        compared(models, rounds=12)
    heard = Heard()
    compared(models, rounds=12, timing=TimingOptions(on_disturbance="warn"), heard=heard)
    assert sum("disturbed" in line for line in heard.lines) == 1


@pytest.mark.torch
def test_sources_without_targets_are_as_many_as_tokens_are_asked_for(models: Path) -> None:
    few, every = (
        present(compared(models, eval_tokens=tokens).accuracy).prompts for tokens in (90, 8192)
    )
    assert 0 < few < every == 9


@pytest.mark.torch
def test_a_generation_reads_a_source_of_the_length_that_is_named(models: Path) -> None:
    heard = Heard()
    timing = TimingOptions(generate=((7, 4), (9, 99)))
    rows = compared(models, timing=timing, heard=heard).latency
    result = [row for row in rows if row.phase == "generate"]
    assert [(row.sequence_length, row.new_tokens) for row in result] == [(7, 4)]
    assert any("99" in line and "left out" in line for line in heard.lines)


@pytest.mark.torch
def test_a_length_that_the_model_does_not_reach_is_told(models: Path) -> None:
    heard = Heard()
    rows = compared(models, prefill_lengths=(8, 512), decode_past_lengths=(500,), heard=heard)
    lengths = [(row.phase, row.sequence_length, row.past_length) for row in rows.latency]
    assert lengths == [("encode", 8, 0), ("encode", 40, 0), ("prefill", 1, 0), ("decode", 1, 39)]
    assert sum("ends there" in line for line in heard.lines) == 2


@pytest.mark.torch
def test_settings_that_greedy_answers_do_not_heed_are_told(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for name in ("whole", "least"):
        file = tmp_path / name / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 4}))
    report = compared(tmp_path)
    for arm in (report.arms.baseline, report.arms.candidate):
        assert any("num_beams 4" in note for note in arm.notes)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["torch", "torch-compile", "openvino", "llama.cpp"])
def test_another_runtime_does_not_run_three_graphs(models: Path, kind: str) -> None:
    whole, cut = models / "whole", models / "least"
    for arms, more in (
        ((f"{kind}:{whole}", f"{kind}:{cut}"), ()),
        ((whole, f"{kind}:{cut}"), ()),
        ((whole, cut), (f"{kind}:{cut}",)),
        ((whole, cut), (models,)),
    ):
        with raises(ComparisonError, "different-kinds"):
            compare(*arms, references=more)


@pytest.mark.torch
def test_further_arms_are_judged_and_timed_as_those_of_one_graph(models: Path) -> None:
    options = {"also": [models / "less"], "references": [models / "block"]}
    report = compared(models, options=options)
    assert [*report.arms.references] == ["less", "block"]
    assert all({*row.references} == {"less", "block"} for row in report.latency)
    kls = {one.arm: one.figures.get("kl_divergence") for one in report.corners}
    own = present(compared(models, ("whole", "less")).accuracy)
    assert kls == {
        "baseline": None,
        "candidate": present(report.accuracy).kl_divergence,
        "less": pytest.approx(own.kl_divergence),
    }
    assert present(own.kl_divergence) > 0


@pytest.mark.torch
def test_float_forms_of_both_are_judged_and_timed_beside_them(models: Path, tmp_path: Path) -> None:
    names = ("whole", "less")
    for name in names:
        beside = shutil.ignore_patterns("*.onnx*", "*.safetensors")
        shutil.copytree(models / name, tmp_path / name, ignore=beside)
        for graph in (models / name).glob("*.onnx"):
            quantize_file(graph, tmp_path / name / graph.name, QuantizeSettings(scheme="int8"))
    floats = {"floats": [models / name for name in names]}
    report = compared(tmp_path, names, options=floats, eval_text=str(models / "sources.txt"))
    assert [(one.arm, one.pruned, one.quantized) for one in report.corners] == [
        ("float baseline", False, False),
        ("float candidate", True, False),
        ("baseline", False, True),
        ("candidate", True, True),
    ]
    whole, *others = [one.figures.get("kl_divergence") for one in report.corners]
    assert whole is None
    assert all(present(one) > 0 for one in others)
    assert all(one.over_whole for one in report.corners if one.pruned)


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


@pytest.mark.torch
@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_effect_is_refused(models: Path, name: str) -> None:
    part, _, field = name.rpartition(".")
    own = {field: REFUSED[name]}
    if field in ("task_data", "task_limit"):  # they go with tasks alone
        own["tasks"] = ("copy",)
    with raises(UsageError, "one-graph-option"):
        compared(models, **({"quality": QualityOptions(**own)} if part else own))


# Which lengths are timed, as far as positions reach.

ASKED = CompareOptions(
    prefill_lengths=(600,), decode_past_lengths=(700,), timing=TimingOptions(generate=((600, 8),))
)
T5 = {"n_positions": 512, "relative_attention_num_buckets": 32}


@pytest.mark.parametrize(
    ("config", "shortened", "reached"),
    [
        (T5, 0, [Shape("encode", 1, 600), Shape("prefill", 1, 1), Shape("decode", 1, 1, 700),
                 Shape("prefill", 1, 600, new_tokens=8)]),
        *(({name: 512}, 3,
           [Shape("encode", 1, 512), Shape("prefill", 1, 1), Shape("decode", 1, 1, 511)])
          for name in ("n_positions", "max_position_embeddings")),
    ],
)  # fmt: skip
def test_relative_positions_reach_as_far_as_is_asked_and_a_table_of_them_ends(
    config: dict[str, Any], shortened: int, reached: list[Any]
) -> None:
    left_out: list[str] = []
    runs, generations = stack_cells(ASKED, 1, target_positions(config), None, left_out.append)
    assert len(left_out) == shortened
    assert [*runs, *generations] == reached


@pytest.mark.parametrize(("frames", "counts"), [(None, "tokens"), (100, "frames")])
def test_a_source_is_of_tokens_or_a_recording_of_frames(frames: int | None, counts: str) -> None:
    (encode, prefill, *_), _ = stack_cells(ASKED, 1, target_positions(T5), frames, print)
    assert (encode.counts, prefill.counts) == (counts, "tokens")
    assert (encode.sequence_length == 100) is (counts == "frames")


IDS, MASK = np.arange(6)[None], np.ones((1, 6), np.int64)


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ({"attention_mask": MASK.copy(), "input_ids": IDS.copy()}, True),
        ({"input_ids": IDS[:, :5], "attention_mask": MASK[:, :5]}, False),  # a shorter one
        ({"input_ids": IDS + 1, "attention_mask": MASK}, False),
        ({"input_features": IDS, "attention_mask": MASK}, False),
    ],
)
def test_times_count_for_the_source_that_they_were_taken_on(
    source: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    def kept(source: dict[str, Any]) -> Any:
        runner = SimpleNamespace(backend="b", provider="p", capabilities=Capabilities())
        facts: Any = SimpleNamespace(sha256="s")
        arm = ComparedArm((cast("Any", runner),), facts, facts, timed_on=hash_of(source))
        return open_store(Comparison({"baseline": arm, "candidate": arm}), tmp_path)

    kept({"input_ids": IDS, "attention_mask": MASK}).keep("a", 1)
    assert kept(source).count == same


# Word error rates, and the interval of their difference.


def test_without_jiwer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with raises(MissingDependencyError, "", "speech"):
        word_errors(["a"], ["a"], ["a"], "r", Normalizer("", str))


class Marks:
    """A tokenizer whose tokens are named, with Whisper's list of spellings."""

    english_spelling_normalizer: ClassVar[dict[str, str]] = {"colour": "color"}

    def __init__(self, *names: str) -> None:
        self._names = names

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self._names[number] for number in ids]


def normalizer(*names: str, model_type: str = "whisper") -> Normalizer:
    rules = DecodingRules(prompt=tuple(range(len(names))), end_ids=frozenset({0}), pad_id=0)
    config = {"model_type": model_type}
    return normalizer_of(PairReader("m", Path("m"), config, rules, Marks(*names)))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("marks", "right", "heard", "errors"),
    [
        ("en", "the cat sat on the mat, today", "The cat sat -- on the mat today.", 0),
        ("en", "twenty dollars", "$20", 0),
        ("en", "I can't say we're late", "i can not say we are late", 0),
        ("en", "It's the twenty first of May, Mr. Smith", "it is the 21st of may mister smith", 0),
        ("en", "a colour", "a color", 0),
        ("en", "um, nineteen ninety six", "1996", 0),
        ("en", "the cat sat", "the mat sat", 1 / 3),
        ("de translate", "twenty dollars", "$20", 0),
        ("", "twenty dollars", "$20", 0),
        ("de", "Schöne Grüße, bis morgen!", "schöne grüße bis morgen", 0),
        ("de", "zwanzig Euro", "20 euro", 1 / 2),
        ("ja", "\u732b\u304c\u3044\u308b", "\u732b\u304c\u3044\u305f", 1 / 4),
    ],
)
def test_what_says_the_same_counts_as_the_same(
    marks: str, right: str, heard: str, errors: float
) -> None:
    pytest.importorskip("jiwer")
    by = normalizer("<|startoftranscript|>", *(f"<|{mark}|>" for mark in marks.split()))
    task_result = word_errors([right], [right], [heard], "r", by)
    assert (task_result.baseline, task_result.candidate) == (0.0, pytest.approx(errors))
    assert task_result.difference.value == pytest.approx(errors)
    assert not task_result.higher_is_better
    assert by.name in task_result.source


@pytest.mark.torch
def test_a_model_that_names_no_language_has_the_basic_normaliser() -> None:
    assert normalizer("<s>", model_type="speech_to_text").apply("Twenty!").split() == ["twenty"]


@pytest.mark.torch
def test_words_where_nothing_was_said_are_edits() -> None:
    pytest.importorskip("jiwer")
    by = normalizer("<|startoftranscript|>")
    task_result = word_errors(["", "one two"], ["", "one two"], ["uh oh", "one two"], "r", by)
    assert task_result.baseline == 0
    assert task_result.candidate == 1
    with raises(ComparisonError, "no-words", "r"):
        word_errors(["?!"], ["a"], ["a"], "r", by)


class Arm:
    """Answers as it is asked to, and remembers how long it may."""

    def __init__(self) -> None:
        self.most: list[int] = []

    def encode(self, source: Any) -> None: ...

    def step(self, _state: None, tokens: Any) -> tuple[Any, None]:
        return np.zeros((1, tokens.shape[1], 8), np.float32), None

    def answer(self, _state: None, rules: DecodingRules, most: int) -> Any:
        self.most.append(most)
        return np.array([[*rules.prompt, 5]])


def speech_reader(**sizes: int) -> PairReader:
    config = {"max_target_positions": 448, "vocab_size": 8, **sizes}
    rules = DecodingRules(prompt=(1, 2), end_ids=frozenset({0}), pad_id=0)
    return PairReader("m", Path("m"), config, rules, None)


def judged(reader: PairReader, pairs: Any = None) -> tuple[Any, list[list[int]]]:
    """What two arms of no sense say, and how long each might answer."""
    noise = read_pairs("random", part="evaluation", sound=True)
    text = paired_text(reader, noise, lambda _: np.array([[1, 2, 5, 6]]), number=1)
    arms: dict[str, Any] = {"baseline": Arm(), "candidate": Arm()}
    kind, pair = Sequences(JudgedPairs.of(pairs or noise, reader), text), (*arms,)
    return kind.hold(arms, [pair])[pair], [arm.most for arm in arms.values()]


@pytest.mark.parametrize(
    ("sizes", "most"), [({"num_mel_bins": 2, "max_source_positions": 3}, 446), ({}, 126)]
)
def test_answers_of_speech_may_take_all_of_the_decoder(sizes: dict[str, int], most: int) -> None:
    _, mosts = judged(speech_reader(**sizes))
    assert mosts == [[most], [most]]

"""From a plan to a healed one: what is put in, what it gains and where, and what is refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exporter.cli as command_line
from exporter.artifacts import CalibrationRef, HealingReport, PruningPlan
from exporter.errors import (
    HealingError,
    MissingDependencyError,
    OptionError,
    PlanError,
    TextSourceError,
    UnknownArchitectureError,
)
from exporter.heal.options import HealOptions
from graph_passes.files import placing
from tests.raising import ends_in, raises, tells
from tests.reading import Heard
from tests.text_graphs import WORDS, write_tokenizer
from tests.tiny_models import planned

pytestmark = pytest.mark.torch

PLAN = planned(("attention", 1, "none"), ("mlp", 0, "none"), ("attention", 2, "none"))
SHORT = {"samples": 12, "sequence_length": 16}


FIRST, SECOND = WORDS[:6], WORDS[10:]
"""Two domains that share no word."""


def words_of(words: Sequence[str], count: int, seed: int) -> list[str]:
    """A text in which two words foretell the next, nearly always."""
    source, numbers = random.Random(seed), [0, 1]
    while len(numbers) < count:
        result = (numbers[-1] * 3 + numbers[-2] + 1) % len(words)
        numbers.append(result if source.random() < 0.9 else source.randrange(len(words)))
    return [words[number] for number in numbers]


def write_text(path: Path, words: Sequence[str], count: int = 800, seed: int = 0) -> str:
    path.write_text(" ".join(words_of(words, count, seed)))
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers that has learned both domains a little."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = [
        tokenizer(" ".join(words_of(words, 16, seed))).input_ids
        for words in (FIRST, SECOND) for seed in range(100, 164)
    ]  # fmt: skip
    ids, steps = torch.tensor(rows), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    from exporter.models.loading.model_source import load_model

    return load_model(str(checkpoint))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    first = write_text(folder / "first.txt", FIRST)
    return first, write_text(folder / "second.txt", SECOND, seed=1)


def healed(loaded: Any, texts: tuple[str, str], plan: Any = PLAN, **options: Any) -> Any:
    from exporter.heal.healed import heal

    given = {"calibration": texts[:1], "check_text": texts[1], **SHORT, **options}
    return heal(loaded, PruningPlan(deletions=plan), HealOptions(**given))


@pytest.mark.parametrize("kind", ["bias", "linear", "best"])
def test_healing_takes_back_what_dropping_cost(
    loaded: Any, texts: tuple[str, str], kind: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    result = healed(loaded, texts, kind=kind)
    assert all(tensor.equal(before[name]) for name, tensor in loaded.model.state_dict().items())
    assert not any(module._forward_hooks for module in loaded.model.modules())
    own, other = result.report.healing.texts
    assert (own.role, other.role) == ("calibration", "other")
    assert own.gain > 0
    assert own.healed.kl < own.dropped.kl
    assert own.gain == pytest.approx(
        own.dropped.log_perplexity_increase - own.healed.log_perplexity_increase, abs=1e-9
    )
    kinds = {deletion.replacement for deletion in result.plan.deletions}
    assert kinds == {kind} or kind == "best"
    assert [(d.kind, d.layer) for d in result.plan.deletions] == [(d.kind, d.layer) for d in PLAN]
    assert result.plan.predicted["kl"] == own.healed.kl


def test_the_report_is_of_what_was_written(loaded: Any, texts: tuple[str, str]) -> None:
    """The damage of the healed cut, measured again from the returned replacements."""
    from exporter.heal.texts import healing_texts
    from exporter.models.ablation.meter import DamageMeter

    result = healed(loaded, texts)
    options = HealOptions(calibration=texts[:1], check_text=texts[1], **SHORT)  # type: ignore[arg-type]
    samples = healing_texts(loaded, options)
    fitted, held_out = samples.fitting.input_ids, samples.held_out.input_ids
    assert len(fitted) + len(held_out) == 16
    assert 4 <= len(held_out) <= 5  # documents stay whole
    assert not {tuple(row) for row in fitted} & {tuple(row) for row in held_out}
    meter = DamageMeter(loaded.model, held_out, samples.held_out.mask)
    again = meter.measure(result.branch_replacements)
    assert result.report.healing.texts[0].healed.kl == pytest.approx(again.kl, rel=1e-6)


def test_domains_that_share_nothing_are_warned_of(loaded: Any, texts: tuple[str, str]) -> None:
    apart = healed(loaded, texts, kind="bias").report.healing
    assert len(apart.warnings) == 1
    only = healed(loaded, texts, kind="bias", check_text="none").report.healing
    assert [text.role for text in only.texts] == ["calibration"]
    assert only.warnings
    again = write_text(Path(texts[0]).with_name("again.txt"), FIRST, seed=7)
    alike = healed(loaded, (texts[0], again), kind="linear", samples=24).report.healing
    assert alike.warnings == []


def test_both_halves_of_what_is_held_out_are_mixtures(loaded: Any, texts: tuple[str, str]) -> None:
    """`best` would else choose on one text alone and be judged on the other."""
    from exporter.heal.fit import held_out_tokens
    from exporter.heal.texts import healing_texts

    more = [write_text(Path(texts[0]).with_name(f"{n}.txt"), WORDS[6:10], seed=n) for n in range(3)]
    for calibration in (texts, (*texts, *more)):
        options = HealOptions(calibration=calibration, check_text="pydoc", **SHORT)  # type: ignore[arg-type]
        result = healing_texts(loaded, options)
        samples = [text.input_ids.tolist() for text in result.held]
        for half in result.halves:
            rows = half.input_ids.tolist()
            both = [(sum(row in rows for row in text), len(text)) for text in samples]
            assert all(0 < number < whole for number, whole in both)
        # Of every fifth sample, on which ridges are judged, too.
        chosen = result.fitting.input_ids[held_out_tokens(result.fitting.mask, 0.2).any(1)]
        domains = {bool(np.isin(row, result.held[0].input_ids).all()) for row in chosen}
        assert domains == {True, False}


def test_a_sample_that_serves_both_ends_is_warned_of(loaded: Any, texts: tuple[str, str]) -> None:
    short = write_text(Path(texts[0]).with_name("two.txt"), FIRST, count=40)
    warnings = {
        kind: healed(loaded, (short, texts[1]), kind=kind).report.healing.warnings
        for kind in ("best", "linear")
    }
    result = [
        any("chosen and measured on the same one" in one for one in warnings[kind])
        for kind in warnings
    ]
    assert result == [True, False]


def chosen_part(loaded: Any, source: str, samples: int, length: int = 16) -> CalibrationRef:
    from exporter.models.texts.calibration import calibration_text

    return calibration_text(loaded, source, samples=samples, sequence_length=length).part


@pytest.mark.parametrize(
    ("samples", "length", "again"),
    [(8, 16, False), (40, 16, False), (4, 32, False), (3, 40, False), (60, 16, True)],
)
def test_what_has_chosen_judges_nothing_and_is_fitted_on_only_where_the_text_is_short(
    samples: int, length: int, again: bool, loaded: Any, texts: tuple[str, str]
) -> None:
    """Held-out samples went on in the article that had chosen."""
    from exporter.heal.texts import healing_texts
    from exporter.models.texts.documents import keys_of
    from exporter.models.texts.sources import read_texts

    long = write_text(Path(texts[0]).with_name("long.txt"), FIRST, count=4000)
    options = HealOptions(calibration=(long,), check_text=texts[1], **SHORT)  # type: ignore[arg-type]
    part = chosen_part(loaded, long, samples, length)
    result = healing_texts(loaded, options, chosen_on=[part])
    source = read_texts(long, part="calibration")
    chosen = source.units(length).keys(part.spans)

    def shared(text: Any) -> bool:
        units = source.units(16)
        keys = [keys_of(item) for number in set(text.documents) for item in units.parts[number]]
        return bool(frozenset().union(*keys) & chosen)

    assert [*result.again] == [long] * again
    assert result.chose == ()
    assert len(result.fitting.input_ids) >= 8
    assert len(result.held_out.input_ids) >= 3
    assert not shared(result.held_out)
    assert not set(result.fitting.documents) & set(result.held_out.documents)
    if length == 16:
        assert shared(result.fitting) is again
    first, second = (set(half.documents) for half in result.halves)
    assert again or not first & second


def test_what_has_chosen_leaves_other_texts_alone(loaded: Any, texts: tuple[str, str]) -> None:
    from exporter.heal.texts import healing_texts

    part = chosen_part(loaded, texts[0], 13)
    options = HealOptions(calibration=texts, check_text="pydoc", **SHORT)  # type: ignore[arg-type]
    result = [healing_texts(loaded, options, chosen_on=item) for item in ([part], [])]
    (first, second), (whole, other) = ([text.input_ids for text in item.held] for item in result)
    assert not np.array_equal(first, whole)
    assert np.array_equal(second, other)


@pytest.mark.parametrize(("seed", "expected"), [(0, 1), (3, 0)])
def test_text_that_the_model_samples_is_another_than_what_has_chosen(
    seed: int, expected: int, loaded: Any, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    from exporter.heal.texts import healing_texts
    from exporter.models.texts.calibration import calibration_text, seed_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part = calibration_text(loaded, "self", samples=2, sequence_length=16, seed=seed).part
    options = HealOptions(calibration=("self",), check_text=texts[0], **SHORT)  # type: ignore[arg-type]
    result = healing_texts(loaded, options, chosen_on=[part])
    assert seed_of(result.fitting.ref.source) == expected


def test_a_text_that_is_too_short_for_four_parts_is_told_of(
    loaded: Any, texts: tuple[str, str]
) -> None:
    from exporter.heal.healed import heal

    short = write_text(Path(texts[0]).with_name("short.txt"), FIRST, count=16 * 20, seed=7)
    result = {}
    for source, samples in ((short, 12), (short, 13), (texts[0], 13), (texts[1], 13)):
        options = HealOptions(calibration=(source,), check_text="pydoc", **SHORT)  # type: ignore[arg-type]
        chosen = chosen_part(loaded, source if source != texts[1] else short, samples)
        outcome = heal(loaded, PruningPlan(deletions=PLAN, chosen_on=[chosen]), options)
        parts = [ref.ids_sha256 for refs in outcome.plan.roles.values() for ref in refs]
        assert (len(set(parts)) == len(parts)) == ((source, samples) != (short, 12))
        result[source, samples] = outcome.plan.predicted_on
        assert outcome.report.healing.warnings or source != short
    assert result == {
        (short, 12): "unseen",
        (short, 13): "searched",
        (texts[0], 13): "unseen",
        (texts[1], 13): "unseen",
    }


@pytest.mark.parametrize(
    ("cause", "error", "code"),
    [
        ("quantized", HealingError, "quantized-student"),
        ("old", MissingDependencyError, "too-old"),
        ("missing", MissingDependencyError, ""),
    ],
)
def test_what_can_not_be_trained_costs_no_text(
    cause: str, error: Any, code: str, loaded: Any, texts: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import peft

    monkeypatch.setattr("exporter.heal.healed.healing_texts", lambda *_, **__: pytest.fail("read"))
    if cause == "quantized":
        monkeypatch.setattr(loaded.model, "is_quantized", True, raising=False)
    elif cause == "missing":
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        monkeypatch.setattr(peft, "__version__", "0.9.1")
    with raises(error, code):
        healed(loaded, texts, kind="distill")


def test_a_block_becomes_its_two_sublayers(loaded: Any, texts: tuple[str, str]) -> None:
    outcome = healed(loaded, texts, plan=planned(("block", 1, "none")))
    result = [(d.kind, d.layer, d.replacement) for d in outcome.plan.deletions]
    assert result == [("attention", 1, "linear"), ("mlp", 1, "linear")]


def run(*arguments: Any) -> int:
    return command_line.run([*map(str, arguments)])


def command(checkpoint: Path, plan: Path, output: Path, texts: tuple[str, str]) -> list[Any]:
    return ["heal", checkpoint, plan, "-o", output, "--heal-calibration", texts[0],
            "--check-text", texts[1], "--samples", 12, "--sequence-length", 16]  # fmt: skip


def test_the_command_writes_plan_numbers_and_report(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from exporter.artifacts.loaded_plan import read_replacements
    from exporter.artifacts.plans import read_plan
    from exporter.files import sha256_file

    plan = PruningPlan(deletions=PLAN).write(tmp_path / "plan.json")
    output = tmp_path / "out" / "healed.json"
    assert run(*command(checkpoint, plan, output, texts), "--heal", "bias") == 0
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"healed.json", "healed.safetensors", "healed.report.json"}
    replacements = read_replacements(read_plan(output), output)
    assert replacements is not None
    assert len(replacements.tensors) == 3
    report = HealingReport.read(output.parent / "healed.report.json")
    assert report.made_from["plan"] == sha256_file(plan)
    text = "".join(capfd.readouterr())
    assert "perplexity" in text
    assert tells(text, 3)
    assert "bias" in text
    (warning,) = report.healing.warnings
    assert text.count(warning) == 1
    assert run(*command(checkpoint, plan, output, texts), "--heal", "bias", "--quiet") == 0
    assert capfd.readouterr().out.count(warning) == 1
    assert (output.parent / "healed.safetensors").stat().st_mode & 0o077 == (
        output.stat().st_mode & 0o077
    )


def test_a_checkpoint_that_fails_takes_no_plan_with_it(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from exporter.models import pruned_structure

    plan = PruningPlan(deletions=PLAN).write(tmp_path / "plan.json")
    output, folder = tmp_path / "healed.json", tmp_path / "hf"
    monkeypatch.setattr(pruned_structure, "_lonely_norms", lambda m, *_: [m.model.norm])
    arguments = [*command(checkpoint, plan, output, texts), "--save-checkpoint", folder]
    with ends_in(UnknownArchitectureError, "wrong-results"):
        assert run(*arguments) == 2
    assert tells(capfd.readouterr().out, 3)
    assert output.exists()
    assert not folder.exists()


def test_a_failure_leaves_an_earlier_result(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "healed.json"
    PruningPlan(deletions=PLAN).write(plan)
    assert run(*command(checkpoint, plan, output, texts)) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    home, place = placing.home_of(output), placing.place

    def full(where: Path, *arguments: Any) -> None:
        if where == home:
            raise OSError(28, "No space left on device")
        place(where, *arguments)

    monkeypatch.setattr(placing, "place", full)
    assert run(*command(checkpoint, plan, output, texts), "--heal", "bias") == 2
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert files == before


def test_what_an_earlier_plan_had_beside_it_goes_with_it(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan for a budget may replace nothing, and then has neither numbers nor report."""
    from exporter.heal.plan_file import write_healed_plan

    plan, output = PruningPlan(deletions=PLAN).write(tmp_path / "plan.json"), tmp_path / "h.json"
    assert run(*command(checkpoint, plan, output, texts)) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    bare = PruningPlan(deletions=PLAN)

    def fail(_folder: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("graph_passes.files.record.sync_names", fail)
        with pytest.raises(OSError, match="Errno 5"):
            write_healed_plan(output, bare, {})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_healed_plan(output, bare, {})
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "h.json"}
    for name in ("plan.safetensors", "plan.report.json"):
        (tmp_path / name).write_text("mine")
    write_healed_plan(plan, bare, {})
    assert (tmp_path / "plan.safetensors").read_text() == "mine"
    assert (tmp_path / "plan.report.json").read_text() == "mine"


@pytest.mark.parametrize("output", ["plan.json", "first.json"])
def test_no_input_is_written_over(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, output: str
) -> None:
    plan = PruningPlan(deletions=PLAN).write(tmp_path / "plan.json")
    first = write_text(tmp_path / "first.safetensors", WORDS)
    before = plan.read_bytes()
    arguments = command(checkpoint, plan, tmp_path / output, (first, texts[1]))
    assert run(*arguments) == 2
    assert plan.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "save", "told"),
    [
        ("healed.safetensors", None, "is the name of the file for the plan's numbers"),
        ("folder", None, "is a folder"),
        ("model/healed.json", None, "would be taken for weights of the model"),
        ("hf/healed.json", "hf", "can't be inside it"),  # it would be gone again
        ("healed.json", "plans", "can't be inside it"),
        ("healed.json", "model/hf", "can't be inside it"),
    ],
)
def test_places_that_would_do_harm_are_refused_before_any_work(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, output: str, save: str | None, told: str,
) -> None:  # fmt: skip
    import shutil

    monkeypatch.setattr("exporter.cli.heal.load_model", lambda *_, **__: pytest.fail("loaded"))
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "plans").mkdir()
    plan = PruningPlan(deletions=PLAN).write(tmp_path / "plans" / "plan.json")
    before = sorted(tmp_path.rglob("*"))
    more = [] if save is None else ["--save-checkpoint", tmp_path / save]
    assert run(*command(model, plan, tmp_path / output, texts), *more) == 2
    assert told in "".join(capfd.readouterr())
    assert sorted(tmp_path.rglob("*")) == before


def test_activations_that_are_not_finite_are_refused(
    checkpoint: Path, texts: tuple[str, str]
) -> None:
    from exporter.models.loading.model_source import load_model

    broken = load_model(str(checkpoint))
    broken.model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with raises(HealingError, "not-finite", "attention", 1, 0):
        healed(broken, texts)


def test_a_text_of_one_sample_is_refused(loaded: Any, texts: tuple[str, str]) -> None:
    short = write_text(Path(texts[0]).with_name("short.txt"), WORDS, count=20)
    with raises(HealingError, "too-few-samples", "short.txt", 16):
        healed(loaded, (short, texts[1]))


def test_the_same_text_is_no_other_domain(loaded: Any, texts: tuple[str, str]) -> None:
    with raises(OptionError, "", "--check-text"):
        healed(loaded, (texts[0], texts[0]))
    copy = Path(texts[0]).with_name("copy.txt")
    copy.write_bytes(Path(texts[0]).read_bytes())
    with raises(HealingError, "same-text", "copy.txt", "--check-text"):
        healed(loaded, (texts[0], str(copy)))
    both = {"calibration": (texts[0], str(copy)), "check_text": texts[1]}
    with raises(HealingError, "named-twice", "first.txt", "copy.txt"):
        healed(loaded, texts, **both)
    both["calibration"] = (str(copy), f"{copy.parent}/./{copy.name}")
    with raises(HealingError, "named-twice", "copy.txt"):
        healed(loaded, texts, **both)
    with raises(TextSourceError, "file-missing", "none.txt"):
        healed(loaded, (texts[0], str(copy.with_name("none.txt"))))


@pytest.mark.parametrize("replacements", ["none", "linear"])
def test_a_fold_that_gains_nothing_ends_only_what_asked_for_it_alone(
    loaded: Any, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch, replacements: Any
) -> None:
    """A first look asks for maps, too: then the best of them, or nothing, takes the places."""
    monkeypatch.setattr("exporter.heal.folded._loses", lambda *_: True)
    if replacements == "none":
        with raises(HealingError, "folding-gained-nothing"):
            healed(loaded, texts, kind="fold")
    else:
        result = healed(loaded, texts, kind="fold", replacements=replacements)
        assert result.report.healing.asked == "best"


@pytest.mark.parametrize(
    ("kind", "server", "wanted"),
    [
        ("linear", "llama.cpp", {"linear", "none"}),
        ("best", "llama.cpp", {"linear", "none"}),
        ("linear", "mlx", {"linear"}),
        ("linear", "onnxruntime", {"linear"}),
    ],
)
def test_replacements_are_those_that_a_runtime_holds(
    loaded: Any, texts: tuple[str, str], kind: Any, server: Any, wanted: set[str]
) -> None:
    from exporter.artifacts.servers import SERVERS, refuse_unheld

    result = healed(loaded, texts, kind=kind, server=server)
    deletions = result.plan.deletions
    assert {deletion.replacement for deletion in deletions} <= wanted
    refuse_unheld([server], deletions)
    maps = [replacement for replacement in result.branch_replacements.values() if replacement.maps]
    free = not SERVERS[server].intercept
    assert all(free == (not item.bias.any()) for item in maps if item.bias is not None)


@pytest.mark.parametrize(
    ("plan", "kind", "server", "error", "code"),
    [
        (PLAN, "linear", "vllm", HealingError, "server-holds-none"),
        (PLAN, "bias", "llama.cpp", HealingError, "server-holds-none"),
        (planned(("attention", 0, "none")), "fold", "vllm", PlanError, "server-needs-it"),
        (planned(("attention", 0, "none")), "linear", "sglang", PlanError, "server-needs-it"),
    ],
)
def test_a_runtime_without_a_place_for_it_is_named(
    loaded: Any, texts: tuple[str, str], plan: Any, kind: Any, server: Any, error: Any, code: str
) -> None:
    with raises(error, code, server):
        healed(loaded, texts, plan, kind=kind, server=server)


EVERYTHING = planned(*(("block", layer, "none") for layer in range(3)))


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING])
def test_the_command_writes_a_checkpoint_that_is_the_healed_model(
    checkpoint: Path, texts: tuple[str, str], tmp_path: Path, plan: Any
) -> None:
    import torch

    from exporter.artifacts.loaded_plan import read_replacements
    from exporter.artifacts.plans import read_plan
    from exporter.checkpoint.pruned_model import load_pruned
    from exporter.cut.branch_replacements import branch_replacements_of
    from exporter.models.ablation.branch_replacements import branches_replaced
    from exporter.models.loading.model_source import load_model

    written = PruningPlan(deletions=plan).write(tmp_path / "plan.json")
    output, folder = tmp_path / "healed.json", tmp_path / "hf"
    arguments = [*command(checkpoint, written, output, texts), "--save-checkpoint", folder]
    if plan == EVERYTHING:
        assert run(*arguments) == 2
        assert not output.exists()
        arguments[2:2] = ["--allow-empty"]
    assert run(*arguments) == 0
    whole, healed_plan = load_model(str(checkpoint)), read_plan(output)
    cut = branch_replacements_of(
        healed_plan.deletions, read_replacements(healed_plan, output), whole.model
    )
    ids = torch.arange(1, 21)[None]
    with torch.inference_mode():
        with branches_replaced(whole.model, cut):
            wanted = whole.model(ids).logits
        loaded = load_pruned(folder)
        assert loaded.tokenizer is not None
        # The same products in the same order.
        torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=0, atol=1e-6)
        assert not torch.allclose(wanted, whole.model(ids).logits, atol=1e-2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert run(*arguments[:-1], tmp_path / "taken") == 2
    assert run(*arguments[:-1], checkpoint) == 2


@pytest.mark.parametrize("of_this_model", [True, False])
def test_a_plan_of_another_model_is_healed_with_a_warning(
    loaded: Any, texts: tuple[str, str], of_this_model: bool
) -> None:
    from exporter.heal.healed import heal

    options, heard = HealOptions(kind="bias", calibration=texts[:1], **SHORT), Heard()
    meant = loaded.ref.sha256 if of_this_model else "f" * 64
    plan = PruningPlan(deletions=PLAN[:1], made_from={"model": meant})
    made = heal(loaded, plan, options, progress=heard)
    assert any(meant[:8] in line for line in heard.lines) is not of_this_model
    assert made.plan.made_from["model"] == loaded.ref.sha256


@pytest.mark.parametrize(
    ("kind", "alone", "error", "code"),
    [
        ("auto", True, HealingError("", code="distillation-gained-nothing"), ""),
        (
            "distill",
            True,
            HealingError("", code="distillation-gained-nothing"),
            "distillation-gained-nothing",
        ),
        ("auto", True, MemoryError(), ""),
        ("auto", False, MemoryError(), "out-of-memory"),  # the other processes would wait
    ],
)
def test_a_training_that_fails_is_replaced_only_where_nobody_asked_for_it(
    loaded: Any, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch, kind: Any, alone: bool,
    error: Exception, code: str,
) -> None:  # fmt: skip
    def failing(_: Any) -> None:
        raise error

    monkeypatch.setattr("exporter.heal.distill.training.Trainer._begin", failing)
    monkeypatch.setattr("exporter.heal.healed.is_alone", lambda: alone)
    if code:
        with raises(HealingError, code):
            healed(loaded, texts, kind=kind)
    else:
        healing = healed(loaded, texts, kind=kind).report.healing
        assert healing.asked in ("fold", "best")
        assert healing.training is None

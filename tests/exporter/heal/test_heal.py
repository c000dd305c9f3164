"""From a plan to a healed one: what is put in, what it gains and where, and what is refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import exporter.cli as command_line
from exporter.artifacts import HealingReport, PruningPlan
from exporter.artifacts.loaded_plan import read_replacements
from exporter.artifacts.plans import read_plan
from exporter.artifacts.servers import SERVERS, refuse_unheld
from exporter.errors import HealingError, OptionError, PlanError, TextSourceError
from exporter.files import sha256_file
from exporter.heal.options import HealOptions
from graph_passes.files import placing
from tests.raising import raises, tells
from tests.text_graphs import WORDS, write_tokenizer
from tests.tiny_models import planned

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.checkpoint.pruned_model import load_pruned  # noqa: E402
from exporter.cut.branch_replacements import branch_replacements_of  # noqa: E402
from exporter.heal.fit import held_out_tokens  # noqa: E402
from exporter.heal.healed import heal  # noqa: E402
from exporter.heal.plan_file import write_healed_plan  # noqa: E402
from exporter.heal.texts import healing_texts  # noqa: E402
from exporter.models.ablation.branch_replacements import branches_replaced  # noqa: E402
from exporter.models.loading.model_source import load_model  # noqa: E402
from exporter.models.tasks import Tokens  # noqa: E402
from exporter.models.texts.calibration import calibration_text  # noqa: E402
from exporter.models.texts.documents import keys_of  # noqa: E402
from exporter.models.texts.sources import read_texts  # noqa: E402

EVERYTHING = planned(*(("block", layer, "none") for layer in range(3)))
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers that has learned both domains a little."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
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
    return load_model(str(checkpoint))


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("texts")

    def written(name: str, words: Sequence[str] = FIRST, count: int = 800, seed: int = 0) -> str:
        path = folder / f"{name}.txt"
        path.write_text(" ".join(words_of(words, count, seed)))
        return str(path)

    return written


@pytest.fixture(scope="module")
def texts(write: Any) -> tuple[str, str]:
    return write("first"), write("second", SECOND, seed=1)


def asked(texts: Sequence[str], **options: Any) -> HealOptions:
    return HealOptions(**{"calibration": texts[:1], "check_text": texts[1], **SHORT, **options})


def healed(loaded: Any, texts: tuple[str, str], plan: Any = PLAN, **options: Any) -> Any:
    return heal(loaded, PruningPlan(deletions=plan), asked(texts, **options))


@pytest.mark.parametrize("kind", ["bias", "linear", "best"])
def test_healing_takes_back_what_dropping_cost_and_says_how_much(
    loaded: Any, texts: tuple[str, str], kind: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    result = healed(loaded, texts, kind=kind)
    assert all(tensor.equal(before[name]) for name, tensor in loaded.model.state_dict().items())
    assert not any(module._forward_hooks for module in loaded.model.modules())
    own, other = result.report.healing.texts
    assert (own.role, other.role) == ("calibration", "other")
    assert own.gain > 0
    assert own.figures["kl"].healed < own.figures["kl"].dropped
    rise = own.figures["log_perplexity_increase"]
    assert own.gain == pytest.approx(rise.dropped - rise.healed, abs=1e-9)
    deletions = result.plan.deletions
    assert {deletion.replacement for deletion in deletions} == {kind} or kind == "best"
    assert [(cut.kind, cut.layer) for cut in deletions] == [(cut.kind, cut.layer) for cut in PLAN]
    assert result.plan.predicted["kl"] == own.figures["kl"].healed
    # Measured again from the returned replacements.
    samples = healing_texts(loaded, asked(texts))
    fitted, held_out = samples.fitting.input_ids, samples.held_out.input_ids
    assert len(fitted) + len(held_out) == 16
    assert 4 <= len(held_out) <= 5  # documents stay whole
    assert not {tuple(row) for row in fitted} & {tuple(row) for row in held_out}
    judged = samples.halves[1] if kind == "best" else samples.held_out
    again = Tokens(loaded.model).meter(judged.input_ids, judged.mask)
    assert own.figures["kl"].healed == pytest.approx(
        again.measure(result.branch_replacements).kl, rel=1e-6
    )


def test_a_block_becomes_its_two_sublayers(loaded: Any, texts: tuple[str, str]) -> None:
    deletions = healed(loaded, texts, planned(("block", 1, "none"))).plan.deletions
    names = [(cut.kind, cut.layer, cut.replacement) for cut in deletions]
    assert names == [("attention", 1, "linear"), ("mlp", 1, "linear")]


@pytest.mark.parametrize("others", [0, 3])
def test_both_halves_of_what_is_held_out_are_mixtures(
    loaded: Any, texts: tuple[str, str], write: Any, others: int
) -> None:
    """`best` would else choose on one text alone and be judged on the other."""
    more = [write(str(n), WORDS[6:10], seed=n) for n in range(others)]
    options = asked(texts, calibration=(*texts, *more), check_text="pydoc")
    result = healing_texts(loaded, options)
    samples = [text.input_ids.tolist() for text in result.held]
    for half in result.halves:
        rows = half.input_ids.tolist()
        assert all(0 < sum(row in rows for row in text) < len(text) for text in samples)
    # Of every fifth sample, on which ridges are judged, too.
    chosen = result.fitting.input_ids[held_out_tokens(result.fitting.mask).any(1)]
    domains = {bool(np.isin(row, result.held[0].input_ids).all()) for row in chosen}
    assert domains == {True, False}
    # What has chosen on the first leaves other texts alone.
    part = chosen_part(loaded, texts[0], 13)
    again = healing_texts(loaded, options, chosen_on=[part]).held
    same = [
        np.array_equal(a.input_ids, b.input_ids) for a, b in zip(result.held, again, strict=True)
    ]
    assert same == [False, *[True] * (1 + others)]


def chosen_part(loaded: Any, source: str, samples: int, length: int = 16, **more: Any) -> Any:
    return calibration_text(loaded, source, samples=samples, sequence_length=length, **more).part


@pytest.mark.parametrize(
    ("samples", "length", "again"),
    [(8, 16, False), (40, 16, False), (4, 32, False), (3, 40, False), (60, 16, True)],
)
def test_what_has_chosen_judges_nothing_and_is_fitted_on_only_where_the_text_is_short(
    samples: int, length: int, again: bool, loaded: Any, texts: tuple[str, str], write: Any
) -> None:
    """Held-out samples went on in the article that had chosen."""
    long = write("long", count=4000)
    part = chosen_part(loaded, long, samples, length)
    result = healing_texts(loaded, asked((long, texts[1])), chosen_on=[part])
    source = read_texts(long, part="calibration")
    chosen, units = source.units(length).keys(part.spans), source.units(16)

    def shared(text: Any) -> bool:
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


@pytest.fixture
def call(checkpoint: Path, texts: tuple[str, str], tmp_path: Path) -> Any:
    """Runs the command on a plan beside what it writes."""

    def made(output: Any, *more: Any, plan: Any = PLAN, model: Any = checkpoint) -> int:
        written = tmp_path / "plans" / "plan.json"
        written.parent.mkdir(exist_ok=True)
        PruningPlan(deletions=plan).write(written)
        words = ["heal", model, written, "-o", tmp_path / output, "--heal-calibration", texts[0],
                 "--check-text", texts[1], "--samples", 12, "--sequence-length", 16]  # fmt: skip
        return command_line.run([*map(str, [*words, *more])])

    return made


def test_the_command_writes_plan_numbers_and_report(
    call: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "healed.json"
    assert call(output, "--heal", "bias") == 0
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"healed.json", "healed.safetensors", "healed.report.json"}
    replacements = read_replacements(read_plan(output), output)
    assert len(replacements.tensors) == 3
    report = HealingReport.read(output.with_name("healed.report.json"))
    assert report.made_from["plan"] == sha256_file(tmp_path / "plans" / "plan.json")
    text = "".join(capfd.readouterr())
    assert tells(text, 3)
    assert all(word in text for word in ("perplexity", "bias"))
    (warning,) = report.healing.warnings
    assert text.count(warning) == 1
    assert call(output, "--heal", "bias", "--quiet") == 0
    assert capfd.readouterr().out.count(warning) == 1
    modes = [path.stat().st_mode & 0o077 for path in output.parent.iterdir()]
    assert len(set(modes)) == 1


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_failure_leaves_an_earlier_result(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, bare = tmp_path / "healed.json", PruningPlan(deletions=PLAN)
    assert call(output) == 0
    before = contents(tmp_path)
    home, place = placing.home_of(output), placing.place

    def full(where: Path, *arguments: Any) -> None:
        if where == home:
            raise OSError(28, "No space left on device")
        place(where, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(placing, "place", full)
        assert call(output, "--heal", "bias") == 2
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        failing = Mock(side_effect=OSError(5, "Input/output error"))
        patch.setattr("graph_passes.files.record.sync_names", failing)
        with pytest.raises(OSError, match="Errno 5"):
            write_healed_plan(output, bare, {})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "more", "told"),
    [
        ("healed.safetensors", "", "is the name of the file for the plan's numbers"),
        ("folder", "", "is a folder"),
        ("model/healed.json", "", "would be taken for weights of the model"),
        ("plans/plan.json", "", "plan.json"),
        ("first.json", "--heal-calibration first.safetensors", "first.safetensors"),
    ],
)
def test_places_that_would_do_harm_are_refused_before_any_work(
    call: Any, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, output: str, more: str, told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("exporter.cli.heal.load_model", lambda *_, **__: pytest.fail("loaded"))
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "plan.json").touch()
    (tmp_path / "first.safetensors").write_text(" ".join(WORDS * 40))
    before = sorted(tmp_path.rglob("*"))
    assert call(output, *more.split(), model=model) == 2
    assert told in "".join(capfd.readouterr())
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_that_are_too_few_or_the_same_are_refused(
    loaded: Any, texts: tuple[str, str], write: Any
) -> None:
    short, copy = write("short", WORDS, count=20), write("copy")
    twice = f"{Path(copy).parent}/./copy.txt"
    for given, more, error, code, named in (
        ((short, texts[1]), {}, HealingError, "too-few-samples", ["short.txt", 16]),
        ((texts[0], texts[0]), {}, OptionError, "options-clash", ["check_text"]),
        ((texts[0], copy), {}, HealingError, "same-text", ["copy.txt", "--check-text"]),
        (
            texts, {"calibration": (texts[0], copy)}, HealingError, "named-twice",
            ["first.txt", "copy.txt"],
        ),
        (texts, {"calibration": (copy, twice)}, HealingError, "named-twice", ["copy.txt"]),
        ((texts[0], f"{copy}.none"), {}, TextSourceError, "unreadable", ["none"]),
    ):  # fmt: skip
        with raises(error, code, *named):
            healed(loaded, given, **more)


@pytest.mark.parametrize("replacements", ["none", "linear"])
def test_a_fold_that_gains_nothing_ends_only_what_asked_for_it_alone(
    loaded: Any, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch, replacements: Any
) -> None:
    """A first look asks for maps, too: then the best of them, or nothing, takes the places."""
    lost = Mock(side_effect=HealingError("", code="healing-gained-nothing"))
    monkeypatch.setattr("exporter.heal.folded._refuse_loss", lost)
    if replacements == "none":
        with raises(HealingError, "healing-gained-nothing"):
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
    result = healed(loaded, texts, kind=kind, server=server)
    assert {deletion.replacement for deletion in result.plan.deletions} <= wanted
    refuse_unheld([server], result.plan.deletions)
    maps = [item for item in result.branch_replacements.values() if item.weight is not None]
    free = not SERVERS[server].intercept
    assert all(free == (not item.bias.any()) for item in maps if item.bias is not None)


@pytest.mark.parametrize(
    ("plan", "kind", "server", "error", "code"),
    [
        (PLAN, "linear", "vllm", HealingError, "server-holds-none"),
        (PLAN, "bias", "llama.cpp", HealingError, "server-holds-none"),
        (planned(("attention", 0, "none")), "fold", "vllm", PlanError, "replacement-unheld"),
        (planned(("attention", 0, "none")), "linear", "sglang", PlanError, "replacement-unheld"),
    ],
)
def test_a_runtime_without_a_place_for_it_is_named(
    loaded: Any, texts: tuple[str, str], plan: Any, kind: Any, server: Any, error: Any, code: str
) -> None:
    with raises(error, code, server):
        healed(loaded, texts, plan, kind=kind, server=server)


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING])
def test_the_checkpoint_of_a_healed_plan_is_the_healed_model(
    call: Any, checkpoint: Path, tmp_path: Path, plan: Any
) -> None:
    output, folder, more = tmp_path / "healed.json", tmp_path / "hf", []
    if plan == EVERYTHING:
        assert call(output, plan=plan) == 2
        assert not output.exists()
        more = ["--allow-empty"]
    assert call(output, *more, plan=plan) == 0
    written = ["checkpoint", str(checkpoint), str(output), "-o"]
    assert command_line.run([*written, str(folder)]) == 0
    whole, healed_plan = load_model(str(checkpoint)), read_plan(output)
    numbers = read_replacements(healed_plan, output)
    cut = branch_replacements_of(healed_plan.deletions, numbers, whole.model)
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
    for taken in (tmp_path / "taken", checkpoint):
        assert command_line.run([*written, str(taken)]) == 2


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("auto", HealingError("", code="healing-gained-nothing"), ""),
        ("distill", HealingError("", code="healing-gained-nothing"), "healing-"),
        ("auto", MemoryError(), ""),
    ],
)
def test_a_training_that_fails_is_replaced_only_where_nobody_asked_for_it(
    loaded: Any, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch, kind: Any,
    error: Exception, code: str,
) -> None:  # fmt: skip
    failing = Mock(side_effect=error)
    monkeypatch.setattr("exporter.heal.distill.training.Trainer._begin", failing)
    if code:
        with pytest.raises(HealingError) as caught:
            healed(loaded, texts, kind=kind)
        assert caught.value.code.startswith(code)
    else:
        healing = healed(loaded, texts, kind=kind).report.healing
        assert healing.asked in ("fold", "best")
        assert healing.training is None

"""The real onnxruntime-genai generates with a pruned folder what the masked original says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.decoding.runner_decoder import RunnerDecoder, SharedCache
from exporter.engines.runners.cache_form import read_cache_form
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import make_inputs
from exporter.errors import BackendError
from graph_passes import Deletion, ResidualSite, find_sites
from graph_passes.files.storage import load_model
from graph_passes.testing import masked_model
from tests.dialects.checks import LAYERS
from tests.dialects.registry import Workshop
from tests.trials import run_named, session_of

pytestmark = pytest.mark.genai

PROMPT, NEW = [5, 9, 20, 33, 7, 11, 13, 17, 19, 23], 8
CUTS = {
    "attention": [(1, "attention")],
    "first attention and an MLP": [(0, "attention"), (2, "mlp")],
    "block": [(1, "block")],
    "MLPs alone": [(0, "mlp"), (1, "mlp")],
    "all attentions": [(layer, "attention") for layer in range(LAYERS)],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("genai"))


@pytest.fixture(scope="module", params=["llama", "llama, int4"], ids=["fp32", "int4"])
def source(request: Any, shop: Workshop) -> Path:
    return shop.make(f"onnxruntime-genai builder, {request.param}", LAYERS)


@pytest.fixture(scope="module")
def windowed(shop: Workshop) -> Path:
    return shop.make("onnxruntime-genai builder, gemma2", LAYERS)


def generator_of(folder: Path, length: int) -> Any:
    """A greedy generator of onnxruntime-genai."""
    import onnxruntime_genai as runtime

    parameters = runtime.GeneratorParams(model := runtime.Model(str(folder)))
    parameters.set_search_options(max_length=length, do_sample=False)
    return runtime.Generator(model, parameters)


def generated(folder: Path) -> list[int]:
    """What onnxruntime-genai makes of the prompt, greedily; the prompt left out."""
    generator = generator_of(folder, len(PROMPT) + NEW)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]


def runtime_logits(folder: Path, steps: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """What onnxruntime-genai gives after each step for its last position."""
    generator, result = generator_of(folder, sum(map(len, steps)) + 16), []
    for step in steps:
        generator.append_tokens(step)
        result.append(np.array(generator.get_logits()).reshape(-1))
    return np.stack(result)


def shortfalls(model: ir.Model, folder: Path, tokens: Sequence[int]) -> list[float]:
    """How far below the best each token's logit is, given those before; 0 for a greedy choice."""
    session = session_of(model, folder)
    sizes = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    heads, size = sizes["num_key_value_heads"], sizes["head_size"]
    window = sizes.get("sliding_window", {}).get("window_size", 0)
    caches = {
        value.name: np.zeros((1, heads, window * ("sliding" in value.shape[2]), size), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    step, length, values = list(PROMPT), 0, []
    for token in tokens:
        length += len(step)
        feed = {"input_ids": np.array([step]), "attention_mask": np.ones((1, length), np.int64)}
        outputs = run_named(session, feed | caches)
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        logits = outputs["logits"][0, -1]
        values.append(float((logits.max() - logits[token]) / np.abs(logits).max()))
        step = [token]
    return values


@pytest.mark.parametrize("renumber", [False, True], ids=["gaps", "dense"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_runtime_generates_with_a_pruned_folder(
    source: Path, tmp_path: Path, cut: str, renumber: bool
) -> None:
    before = source.with_name("genai_config.json").read_bytes()
    plan = [PlannedDeletion(layer=layer, kind=kind) for layer, kind in CUTS[cut]]
    prune_file(source, tmp_path / "cut.onnx", plan, CutOptions(renumber_kv=renumber))
    tokens = generated(tmp_path)
    assert len(tokens) == NEW or tokens[-1] in _ends(tmp_path)
    original = load_model(source)
    masked = masked_model(original, [Deletion(d.layer, d.kind) for d in plan])
    # int4 products quantise their input, so that rounding may decide between close logits.
    slack = 3e-2 if "int4" in str(source) else 1e-5
    assert max(shortfalls(masked, source.parent, tokens)) <= slack
    assert max(shortfalls(original, source.parent, tokens)) > 0.1
    assert source.with_name("genai_config.json").read_bytes() == before


@pytest.mark.parametrize("renumber", [False, True], ids=["gaps", "dense"])
@pytest.mark.parametrize("layer", [0, 1])
def test_caches_of_a_window_stay_with_their_layers(
    windowed: Path, tmp_path: Path, layer: int, renumber: bool
) -> None:
    """Layers 0 and 2 keep a window; told otherwise, the runtime would make their buffers whole."""
    plan = [PlannedDeletion(layer=layer, kind="attention")]
    report = prune_file(windowed, tmp_path / "cut.onnx", plan, CutOptions(renumber_kv=renumber))
    assert report.verification.passed
    config = json.loads((tmp_path / "genai_config.json").read_text())
    expected = {(0, False): [2], (0, True): [1], (1, False): [0, 2], (1, True): [0, 1]}
    windows = config["model"]["decoder"]["sliding_window"]["layers"]
    assert windows == expected[layer, renumber]
    masked = masked_model(load_model(windowed), [Deletion(layer, "attention")])
    assert max(shortfalls(masked, windowed.parent, generated(tmp_path))) <= 1e-5


def _ends(folder: Path) -> list[int]:
    ends = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def test_a_layer_for_each_cache_is_declared(source: Path, tmp_path: Path) -> None:
    plan = [PlannedDeletion(layer=0, kind="attention"), PlannedDeletion(layer=1, kind="mlp")]
    prune_file(source, tmp_path / "cut.onnx", plan, CutOptions(verify="none"))
    config = json.loads((tmp_path / "genai_config.json").read_text())
    sites = [
        s for s in find_sites(load_model(tmp_path / "cut.onnx")) if isinstance(s, ResidualSite)
    ]
    assert config["model"]["decoder"]["num_hidden_layers"] == sum(bool(s.kv_inputs) for s in sites)
    assert config["model"]["decoder"]["filename"] == "cut.onnx"


def test_cuts_in_which_a_rounding_shows_are_verified(source: Path, tmp_path: Path) -> None:
    """Joined sums round in another place; int4 products made a step of a quantiser of that."""
    plan = [(1, "mlp"), (2, "attention"), (0, "attention"), (0, "mlp")]
    deletions = [PlannedDeletion(layer=layer, kind=kind) for layer, kind in plan]
    assert prune_file(source, tmp_path / "cut.onnx", deletions).verification.passed


@pytest.mark.parametrize("cut", [None, "attention", "first attention and an MLP"])
def test_depthcut_generates_what_the_runtime_does(
    source: Path, tmp_path: Path, cut: str | None
) -> None:
    """With gaps in the caches' numbers too; both keep the cache in one buffer."""
    folder = source.parent
    if cut is not None:
        folder = tmp_path
        plan = [PlannedDeletion(layer=layer, kind=kind) for layer, kind in CUTS[cut]]
        prune_file(source, folder / "cut.onnx", plan)
    wanted = generated(folder)
    ends = frozenset(_ends(folder))
    with open_decoder(folder, threads=1) as decoder:
        assert isinstance(decoder, RunnerDecoder)
        result = generate(decoder, PROMPT, new_tokens=NEW, stop_ids=ends)
        assert isinstance(decoder.cache, SharedCache)
        assert [*result.token_ids] == [token for token in wanted if token not in ends]
        other = generate(decoder, PROMPT[::-1], new_tokens=NEW, stop_ids=ends)
    assert other.token_ids != result.token_ids
    limit = read_cache_form(next(folder.glob("*.onnx"))).positions
    assert limit is not None
    with pytest.raises(BackendError, match=f"room for {limit} positions"):
        decoder.refuse_unfit(1, limit, 2)
    decoder.refuse_unfit(1, limit, 1)


def test_a_window_s_cache_has_room_for_the_whole_text(windowed: Path) -> None:
    """Twice the window; the runtime keeps a window's worth, with the same logits."""
    with open_decoder(windowed, threads=1) as decoder:
        result = [decoder.prefill(np.array([PROMPT]), context=len(PROMPT) + NEW)]
        result += [decoder.step(np.array([[token]])) for token in PROMPT[:NEW]]
        short = decoder.prefill(np.array([PROMPT[:3]]), context=3)  # less than a window
        assert isinstance(decoder.cache, SharedCache)
        whole = decoder.prefill(np.array([PROMPT + PROMPT[:NEW]]))
        assert not np.allclose(whole, result[0], rtol=0, atol=0.1)
    wanted = runtime_logits(windowed.parent, [PROMPT, *([token] for token in PROMPT[:NEW])])
    limit = 1e-4 * max(1.0, np.abs(wanted).max())
    assert np.abs(np.concatenate(result) - wanted).max() <= limit
    assert np.abs(whole - wanted[-1]).max() <= limit
    assert np.abs(short - runtime_logits(windowed.parent, [PROMPT[:3]])).max() <= limit
    with OnnxRuntimeRunner(windowed, threads=1) as runner:
        feed = make_inputs(runner.inputs, Shape("prefill", 1, len(PROMPT), 0), np.array([PROMPT]))
        assert np.abs(runner.run(feed)["logits"][:, -1] - result[0]).max() <= limit

"""The second witness: PyTorch with the same modules skipped, on graphs that PyTorch exported."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from graph_passes import Deletion, ReplacementTensors, SublayerRef
from graph_passes.files.storage import load_model
from tests.graph_passes.graph_support import all_deletions, proper_subsets, sites_of, usual
from tests.tiny_graphs import check_clean, check_tidy
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

TOLERANCE = 1e-5


class Export(NamedTuple):
    """A family at an opset, and what onnxruntime's transformers tool is told to fuse in it."""

    family: str
    opset: int = 20
    fused_as: str = ""
    operator: str = ""
    count: int = 0


_LAYER, _SIMPLIFIED = "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"
# Whose residuals and sites other rows have; the catalogue of architectures has more of both.
_EXPERTS, _PARALLEL = Export("mixtral"), Export("gpt_neox", 23)
# The tool's own pass for GPT-2 fails on a language head without a bias; BERT's does the same.
EXPORTS = [
    *(Export(family) for family in ("llama", "gpt2", "gemma2", "bert")),
    Export("llama", 23),
    *(pytest.param(made, marks=pytest.mark.long) for made in (_EXPERTS, _PARALLEL)),
    Export("bert", 20, "bert", _LAYER, 4),
    Export("gpt2", 20, "bert", _LAYER, 4),
    Export("llama", 20, "gpt_neox", _SIMPLIFIED, 4),
    Export("gpt_neox", 20, "gpt_neox", _LAYER, 2),
    Export("gemma2", 20, "gpt_neox", _SIMPLIFIED, 4),
]


@pytest.fixture(
    scope="module", params=EXPORTS, ids=lambda e: f"{e.family}-{e.opset}{'-fused' * bool(e.count)}"
)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from exporter.export.torch_export import export_onnx

    export: Export = request.param
    loaded, folder = family_loaded(export.family), tmp_path_factory.mktemp(export.family)
    for name, weight in loaded.model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide whose bias goes where
            weight.normal_(std=0.1)
    source = export_onnx(loaded, folder, opset=export.opset)
    if not export.count:
        return loaded, source
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(source), model_type=export.fused_as, num_heads=4, opt_level=0)
    made.save_model_to_file(str(folder / "fused.onnx"))
    operators = Counter(node.op_type for node in load_model(folder / "fused.onnx").graph)
    assert operators[export.operator] == export.count
    return loaded, folder / "fused.onnx"


def worst_error(loaded: Any, path: Path, deletions: list[Deletion]) -> float:
    from exporter.export.parity import check_export

    planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in deletions]
    return max(check.max_abs_error for check in check_export(loaded, path, deletions=planned))


def cut(source: Path, target: Path, deletions: list[Deletion]) -> Path:
    planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in deletions]
    prune_file(source, target, planned, CutOptions(verify="none"))
    return target


def skip_norms(path: Path) -> dict[str, str]:
    nodes = load_model(path).graph
    return {node.name or "": node.op_type for node in nodes if node.op_type.startswith("Skip")}


def test_all_subsets_equal_pytorch_with_the_modules_skipped(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    loaded, source = exported
    assert worst_error(loaded, source, []) < TOLERANCE
    everything = all_deletions(load_model(source))
    assert [(d.layer, d.kind) for d in everything] == usual(2)
    fused = bool(skip_norms(source))
    for number, subset in enumerate(proper_subsets(everything)):
        if fused and len(subset) == 2:  # each alone, and all but each
            continue
        path = cut(source, tmp_path / str(number) / "m.onnx", subset)
        assert worst_error(loaded, path, subset) < TOLERANCE
        if fused:
            check_tidy(load_model(path))
        else:
            check_clean(load_model(path), path)


def test_pytorch_catches_the_wrong_layer(exported: tuple[Any, Path], tmp_path: Path) -> None:
    loaded, source = exported
    wrong = cut(source, tmp_path / "m.onnx", [Deletion(1, "mlp")])
    assert worst_error(loaded, wrong, [Deletion(0, "mlp")]) > 1e-3


def test_each_attention_owns_its_caches(exported: tuple[Any, Path]) -> None:
    model = load_model(exported[1])
    declared = [value.name for value in model.graph.inputs if "past" in (value.name or "")]
    assert [name for site in sites_of(model) for name in site.kv_inputs] == declared


def test_neighbours_stay_fused(exported: tuple[Any, Path], tmp_path: Path) -> None:
    before = skip_norms(exported[1])
    joints = {site.residual_add for site in sites_of(load_model(exported[1])) if site.layer == 1}
    after = skip_norms(cut(exported[1], tmp_path / "m.onnx", [Deletion(1, "block")]))
    assert len(before) - len(after) == len(before.keys() & joints)


# Replacements: PyTorch with the same maps hooked into it

HIDDEN = 96
ATTENTION, MLP = SublayerRef(0, "attention"), SublayerRef(1, "mlp")
PLAN = [
    PlannedDeletion(layer=0, kind="attention", replacement="linear"),
    PlannedDeletion(layer=1, kind="mlp", replacement="bias"),
]


def numbers(seed: int = 0) -> dict[SublayerRef, ReplacementTensors]:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN).astype(np.float32)
    biases = (rng.standard_normal((2, HIDDEN)) / 10).astype(np.float32)
    return {ATTENTION: ReplacementTensors(biases[0], weight), MLP: ReplacementTensors(biases[1])}


@contextlib.contextmanager
def replaced(model: Any, given: dict[SublayerRef, ReplacementTensors]) -> Iterator[None]:
    """A llama in which the two sublayers return what takes their place."""
    import torch

    tensors = {
        ref: (torch.tensor(one.bias), None if one.weight is None else torch.tensor(one.weight))
        for ref, one in given.items()
    }

    def attention(_module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        bias, weight = tensors[ATTENTION]
        normed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return (torch.nn.functional.linear(normed, weight, bias), *output[1:])

    def mlp(_module: Any, _args: Any, output: Any) -> Any:
        return tensors[MLP][0].expand(output.shape)

    layers = model.model.layers
    hooks = [
        layers[0].self_attn.register_forward_hook(attention, with_kwargs=True),
        layers[1].mlp.register_forward_hook(mlp),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_prefill_and_decode_equal_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.export import parity
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama")
    source, target = export_onnx(loaded, tmp_path / "source", opset=20), tmp_path / "out" / "m.onnx"
    given = Replacements(tmp_path, "0" * 64, numbers())
    report = prune_file(source, target, LoadedPlan.of(PLAN, given))
    assert report.verification.passed
    skipped = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in PLAN]

    def worst(witness: dict[SublayerRef, ReplacementTensors]) -> float:
        monkeypatch.setattr(parity, "branches_replaced", lambda model, _: replaced(model, witness))
        checks = parity.check_export(loaded, target, deletions=skipped)
        assert {check.phase for check in checks} == {"prefill", "decode"}
        return max(check.max_abs_error for check in checks)

    assert worst(numbers()) < 1e-5
    turned = numbers()
    turned[ATTENTION] = ReplacementTensors(
        turned[ATTENTION].bias, np.array(turned[ATTENTION].weight).T
    )
    assert worst(turned) > 1e-4
    assert worst(numbers(seed=1)) > 1e-2

"""Whatever is done to a graph: it is refused with a reason, or cut as the masked oracle says."""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes import Deletion, SurgeryError, find_sites, prune_graph
from graph_passes.testing import masked_model
from tests.fuzz import judge
from tests.fuzz.judge import Cut, WrongModel, check_file, graph
from tests.fuzz.mutations import MUTATIONS, spoil_bytes, spoil_locations
from tests.graph_passes.graph_support import GRAPHS
from tests.tiny_graphs import tiny_model

_ASKED = int(os.environ.get("DEPTHCUT_FUZZ_EXAMPLES", "0"))
_SEEDS = st.integers(0, 2**32 - 1)
_GRAPHS = st.sampled_from(GRAPHS)
_STEPS = st.lists(st.tuples(st.sampled_from(sorted(MUTATIONS)), _SEEDS), max_size=4)
_CUTS = st.builds(Cut, picks=st.lists(st.floats(0, 0.999), min_size=1, max_size=4).map(tuple),
whole_blocks=st.booleans(), renumber=st.booleans(),)  # fmt: skip


def _examples(count: int) -> settings:
    return settings(max_examples=_ASKED or count, derandomize=not _ASKED, database=None,
    deadline=None, suppress_health_check=list(HealthCheck),)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """onnx_ir tells of every broken graph; the runtime's process ends with the tests."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)
    judge.RUNTIME.close()


def _mutant(name: str, steps: list[tuple[str, int]]) -> onnx.ModelProto:
    model = graph(name)
    for step, seed in steps:
        if model.graph.node and model.graph.output and model.graph.input:
            MUTATIONS[step](model, random.Random(seed))
    return model


def _checked(data: bytes, cut: Cut, *, run: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        return check_file(path, cut, run=run)


def test_mutated_graphs_are_refused_or_cut_right() -> None:
    outcomes: Counter[str] = Counter()

    @_examples(160)
    @given(name=_GRAPHS, steps=_STEPS, cut=_CUTS)
    def check(name: str, steps: list[tuple[str, int]], cut: Cut) -> None:
        outcomes[_checked(_mutant(name, steps).SerializeToString(), cut, run=True)] += 1

    check()
    # The mutations must leave something to cut, and something to refuse.
    assert outcomes["equal"] > 0.1 * outcomes.total(), outcomes
    assert outcomes["refused"] > 0.1 * outcomes.total(), outcomes


@_examples(100)
@given(name=_GRAPHS, steps=_STEPS.map(lambda steps: steps[:1]), seed=_SEEDS, cut=_CUTS)
def test_spoilt_bytes_are_told_or_cut(
    name: str, steps: list[tuple[str, int]], seed: int, cut: Cut
) -> None:
    data = spoil_bytes(_mutant(name, steps).SerializeToString(), random.Random(seed))
    _checked(data, cut, run=False)


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data key")
@_examples(60)
@given(name=_GRAPHS, seed=_SEEDS, cut=_CUTS)
def test_spoilt_external_data_is_told(name: str, seed: int, cut: Cut) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(
            graph(name), path,
            save_as_external_data=True, location="model.data", size_threshold=0,
        )  # fmt: skip
        model = onnx.load(path, load_external_data=False)
        spoil_locations(model, random.Random(seed))
        path.write_bytes(model.SerializeToString())
        check_file(path, cut, run=False)


def test_every_mutation_changes_something() -> None:
    """Else the tests above would say less than they seem to."""
    for name, mutate in MUTATIONS.items():
        changed = 0
        for seed in range(30):
            model = graph("pre_norm" if seed % 2 else "genai_bias")
            before = model.SerializeToString(deterministic=True)
            mutate(model, random.Random(seed))
            changed += model.SerializeToString(deterministic=True) != before
        assert changed >= 5, name


def _masks_another(model: ir.Model, deletions: list[Deletion]) -> ir.Model:
    return masked_model(model, [Deletion(1 - d.layer, d.kind) for d in deletions])


def _spoils(model: ir.Model, *arguments: Any, **options: bool) -> object:
    result = prune_graph(model, *arguments, **options)
    model.graph.name = "spoilt"
    return result


def _breaks(*arguments: Any, **options: bool) -> object:
    pruned, report = prune_graph(*arguments, **options)
    pruned.graph[0].op_type = "Nonsense"
    return pruned, report


@pytest.mark.parametrize(
    ("name", "fault", "wrong"),
    [
        ("masked_model", _masks_another, "differs|other outputs"),
        ("prune_graph", _spoils, "has changed"),
        ("prune_graph", _breaks, "the result doesn't"),
    ],
)
def test_a_fault_is_noticed(
    name: str, fault: object, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph("pre_norm").SerializeToString())
    assert check_file(path, Cut((0.3,))) == "equal"
    monkeypatch.setattr(judge, name, fault)
    with pytest.raises(WrongModel, match=wrong):
        check_file(path, Cut((0.3,)))


def test_find_sites_never_raises_on_a_graph_without_anything() -> None:
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    assert find_sites(empty)
    with pytest.raises(SurgeryError):
        prune_graph(empty, [Deletion(0, "mlp")])
    assert find_sites(tiny_model())

"""Graphs that are refused as a whole, before anyone looks for sublayers."""

from __future__ import annotations

import pytest
from graph_support import sites_of, tiny

from graph_passes import Deletion, Refusal, SurgeryError, find_sites, prune_graph
from tests.raising import raises


def test_a_node_name_that_stands_twice_is_refused() -> None:
    model = tiny("pre_norm")
    model.graph[3].name = model.graph[7].name = "same"
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.node) == ("repeated-name", "same")
    with raises(SurgeryError, "repeated-name", 2, "'same'"):
        prune_graph(model, [Deletion(1, "mlp")])


@pytest.mark.parametrize("name", ["", None])
def test_nodes_without_names_are_no_obstacle(name: str | None) -> None:
    model = tiny("pre_norm")
    for node in (model.graph[3], model.graph[7]):
        node.name = name
    assert len(sites_of(model)) == 6

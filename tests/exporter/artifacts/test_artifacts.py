from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import exporter
from exporter.artifacts import (
    SCHEMA_VERSION,
    ImportanceReport,
    PlannedDeletion,
    PruningPlan,
)
from exporter.artifacts.base import _MADE_BY
from exporter.errors import ArtifactError, UnsafeInputError
from tests.raising import raises

KINDS = ["attention", "mlp", "block", "cross_attention", "mixer"]


def _plan_json(tmp_path: Path, **changes: Any) -> Path:
    plan = PruningPlan(deletions=[PlannedDeletion(layer=25, kind="attention")])
    data = json.loads(plan.to_json())
    data.update(changes)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_a_file_says_first_what_it_is() -> None:
    keys = list(json.loads(PruningPlan(deletions=[]).to_json()))
    assert keys[:2] == ["schema_version", "kind"]
    assert {"made_from", "versions", "command"} < set(keys)


@given(
    st.lists(
        st.builds(
            PlannedDeletion,
            layer=st.integers(0, 200),
            kind=st.sampled_from(KINDS),
            replacement=st.sampled_from(["none", "bias", "linear"]),
        ),
        max_size=20,
    )
)
def test_a_plan_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, deletions: list[PlannedDeletion]
) -> None:
    plan = PruningPlan(deletions=deletions, budget={"attention": 8})
    path = plan.write(tmp_path_factory.mktemp("plan") / "plan.json")
    assert PruningPlan.read(path) == plan


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = _plan_json(tmp_path, schema_version=SCHEMA_VERSION + 1, something_new=1)
    with raises(
        ArtifactError, "newer-schema", "$.schema_version", SCHEMA_VERSION + 1, SCHEMA_VERSION
    ):
        PruningPlan.read(path)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"deletions": [{"layer": 1, "kind": "head"}]}, "$.deletions[0].kind:"),
        ({"deletions": [{"layer": -1, "kind": "mlp"}]}, "$.deletions[0].layer:"),
        ({"deletion": []}, "$.deletion:"),
        ({"schema_version": "one"}, "$.schema_version:"),
    ],
)
def test_what_is_wrong_is_named_by_its_json_path(
    tmp_path: Path, changes: dict[str, Any], where: str
) -> None:
    with raises(ArtifactError, "", where):
        PruningPlan.read(_plan_json(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"schema_version": 1, "kind": "importance_report"}', "an importance file"),
        (b'{"schema_version": 1, "kind": "stranger"}', "stranger"),
        *((text, "") for text in (b'{"model_type": "llama"}', b"[]", b'{"schema_version": 1}')),
        (b"\xff\xfe", ""),
    ],
)
def test_a_file_of_another_kind_is_told_as_one(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with raises(ArtifactError, "wrong-kind", path, "depthcut plan", named):
        PruningPlan.read(path)


def test_every_kind_of_file_has_a_name_and_a_command() -> None:
    kinds = {
        line.split('"')[1]
        for file in Path(exporter.__file__).parent.rglob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("    kind: Literal[") and line.endswith('"')
    }
    assert len(kinds) > 10
    assert kinds - _MADE_BY.keys() == set()


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": "one"}'])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "importance.json"
    path.write_text(text, encoding="utf-8")
    with raises(ArtifactError, "", "importance.json: $"):
        ImportanceReport.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with raises(ArtifactError, "file-missing", tmp_path / "nothing.json"):
        PruningPlan.read(tmp_path / "nothing.json")


def test_what_the_user_names_may_be_a_link_and_what_is_found_may_not(tmp_path: Path) -> None:
    plan = PruningPlan(deletions=[])
    plan.write(tmp_path / "elsewhere.json")
    link = tmp_path / "folder" / "plan.json"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "elsewhere.json")
    assert PruningPlan.read(link) == plan
    with pytest.raises(UnsafeInputError):
        PruningPlan.read(link, named=False)


def test_describe_groups_by_kind_in_the_order_of_choice() -> None:
    chosen = [(25, "attention"), (3, "mlp"), (7, "attention")]
    plan = PruningPlan(deletions=[PlannedDeletion(layer=n, kind=k) for n, k in chosen])
    assert plan.describe() == "attention 25, 7; mlp 3"

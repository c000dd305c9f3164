"""The files that pass between the stages, and the words and numbers that they are read by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import exporter
from exporter.artifacts import SCHEMA_VERSION, PlannedDeletion, PruningPlan
from exporter.artifacts.base import _MADE_BY, IMAGES, RECORDINGS, TEXTS, Nouns, nouns_of
from exporter.artifacts.yaml_file import parse_yaml
from exporter.errors import ArtifactError, UnsafeInputError
from exporter.report.words import read_by, shape_words, short_shape
from tests.made_reports import gate_report, gate_row
from tests.raising import raises

KINDS = ["attention", "mlp", "block", "cross_attention", "mixer"]
NEWER = SCHEMA_VERSION + 1


def plan_json(**changes: Any) -> bytes:
    plan = PruningPlan(deletions=[PlannedDeletion(layer=25, kind="attention")])
    return json.dumps(json.loads(plan.to_json()) | changes).encode()


def test_a_file_says_first_what_it_is() -> None:
    keys = list(json.loads(plan_json()))
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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, ("file-missing",)),
        (plan_json(schema_version=NEWER, something_new=1),
         ("newer-schema", "$.schema_version", NEWER, SCHEMA_VERSION)),
        (plan_json(deletions=[{"layer": 1, "kind": "head"}]), ("", "$.deletions[0].kind:")),
        (plan_json(deletions=[{"layer": -1, "kind": "mlp"}]), ("", "$.deletions[0].layer:")),
        (plan_json(deletion=[]), ("", "$.deletion:")),
        (plan_json(schema_version="one"), ("", "$.schema_version:")),
        (b'{"schema_version": 1, "kind": "importance_report"}',
         ("wrong-kind", "depthcut plan", "an importance file")),
        (b'{"schema_version": 1, "kind": "stranger"}', ("wrong-kind", "depthcut plan", "stranger")),
        *((text, ("wrong-kind", "depthcut plan"))
          for text in (b'{"model_type": "llama"}', b"[]", b'{"schema_version": 1}', b"\xff\xfe")),
        *((text, ("", "plan.json: $")) for text in (b"", b"{", b'{"schema_version": "one"}')),
    ],
)  # fmt: skip
def test_a_file_that_can_t_be_read_is_named_with_the_place_and_what_is_wrong(
    tmp_path: Path, content: bytes | None, told: tuple[Any, ...]
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with raises(ArtifactError, *told, path):
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


@pytest.mark.parametrize(
    ("architecture", "read"),
    [
        ("ViTForImageClassification", IMAGES),
        ("DeiTForImageClassificationWithTeacher", IMAGES),
        ("WhisperForConditionalGeneration", RECORDINGS),
        ("T5ForConditionalGeneration", TEXTS),
        ("BertForSequenceClassification", TEXTS),
    ],
)
def test_a_models_class_says_what_it_reads(architecture: str, read: Nouns) -> None:
    assert nouns_of(architecture) == read


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_rows_length_is_called_what_it_counts(read: Nouns) -> None:
    row = gate_row(100, phase="encode", counts=read.parts)
    result, short = shape_words(row), short_shape(row)
    assert ("tokens" in result) is (read == TEXTS)
    assert ("patches" in result) is (read == IMAGES)
    # A recording has one length, which is no number that anyone gave.
    assert ("100" in result) is ("100" in short) is (read != RECORDINGS)
    assert ("recording" in result) is ("recording" in short) is (read == RECORDINGS)
    assert read_by(gate_report([row, gate_row(4)])) == read


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("-1E3", -1e3), ("2.e+1", 20.0), ("2.5e-1", 0.25), ("'3e-4'", "3e-4"),
     *((name, name) for name in ("e4", "3e", "3e-4x", "3e4e5", "12e4567"))],
)  # fmt: skip
def test_a_number_with_an_exponent_is_a_number_and_a_name_a_name(written: str, value: Any) -> None:
    assert parse_yaml(f"rate: {written}", Path("file.yaml")).data == {"rate": value}

"""A sweep's file: what may stand there, where a mistake is, which cells it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import OptionError, SweepError
from tests.raising import raises

pytest.importorskip("yaml")

LEAST = "models: [m]\nplans: [attention:1]\n"


def read(folder: Path, text: str) -> object:
    from exporter.pipeline.sweep.schema import read_sweep

    (folder / "sweep.yaml").write_text(text)
    return read_sweep(folder / "sweep.yaml")


def cells(folder: Path, text: str) -> list[object]:
    from exporter.pipeline.sweep.cells import cells_of

    (folder / "m").mkdir(exist_ok=True)
    return list(cells_of(read(folder, text), folder / "out"))  # type: ignore[arg-type]


def refused(folder: Path, text: str) -> str:
    with pytest.raises(SweepError) as caught:
        cells(folder, text)
    return str(caught.value)


def test_the_cells_are_the_product_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "n.gguf").touch()
    (tmp_path / "p.json").touch()
    text = """
        models: [m, n.gguf]
        plans:
          - attention:1,2 mlp:0
          - {drop_attn: 2, metric: angular, heal: linear}
          - p.json
        precisions: [fp16, {quantize: int4, block_size: 64, name: small}]
    """
    result = cells(tmp_path, text)
    names = ["attention-1-2_mlp-0", "attention2-angular+linear", "p"]
    assert [cell.folder for cell in result] == [
        f"cells/{model}/{plan}/{precision}"
        for model in ("m", "n")
        for plan in names
        for precision in ("fp16", "small")
    ]


def test_texts_of_a_mixture_are_relative_to_the_file(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    text = "precisions: [{quantize: int8-qdq, calibration: [b.txt, pydoc]}]\n"
    (cell,) = cells(tmp_path, LEAST + text + "scoring: {calibration: [a.txt, chat, b.txt]}\n")
    assert cell.request.score.calibration == (a, "chat", b)
    assert cell.request.quantize.calibration == (b, "pydoc")


def test_what_a_cell_asks_the_pipeline_for(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    result = cells(
        tmp_path,
        LEAST + "precisions: [fp16, {quantize: int8, quantize_method: hqq, head_bits: none}]\n"
        "scoring: {calibration: text.txt, samples: 3}\n"
        "shapes: {prefill: [8], decode_past: [], batch: [1, 2], generate: [[4, 5]]}\n"
        "measuring: {time_budget: 2, eval_text: hf:some/text}\n"
        "export: {opset: 21, checkpoint: true}\n",
    )
    half, quantised = (cell.request for cell in result)
    assert half.source == str(tmp_path / "m")
    assert (half.load.dtype, half.choosing.dtype, half.quantize) == ("float16", "float32", None)
    assert half.score.calibration == (str(tmp_path / "text.txt"),)
    assert (half.score.samples, half.opset, half.checkpoint) == (3, 21, True)
    assert half.compare.prefill_lengths == (8,)
    assert half.compare.batches == (1, 2)
    assert half.compare.timing.generate == ((4, 5),)
    assert half.compare.timing.time_budget_s == 2.0
    assert half.compare.eval_text == "hf:some/text"
    assert quantised.quantize.method == "hqq"
    assert quantised.quantize.head_bits is None
    assert quantised.quantize.embedding_bits == 8
    assert quantised.shared == half.shared == tmp_path / "out" / ".depthcut" / "shared"
    assert not quantised.load.trust_remote_code


def test_a_file_can_not_switch_a_danger_on(tmp_path: Path) -> None:
    result = refused(tmp_path, "models: [{source: m, trust_remote_code: true}]\nplans: [mlp:1]")
    assert "$.models[0].trust_remote_code:" in result


def test_only_a_search_of_blocks_has_them_scored_on_demand(tmp_path: Path) -> None:
    plans = (
        "{drop_block: 1, metric: kl}",
        "{drop_block: 1, metric: [cosine]}",
        "{drop_mlp: 1, metric: kl}",
    )
    text = f"models: [m]\nplans: [{', '.join(plans)}]\n"
    assert [cell.request.score.blocks for cell in cells(tmp_path, text)] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "$: keys and their values are expected here"),
        ("- m", "line 1: $: keys and their values"),
        ("models: [m]", "$.plans: this is missing"),
        ("models: m\nplans: [mlp:1]", "line 1: $.models: "),
        ("models: []\nplans: [mlp:1]", "$.models: "),
        (LEAST + "speed: 3", "line 3: $.speed: this key is not known here"),
        (LEAST + "shapes:\n  prefill: [1]\n  batches: [1]", "line 5: $.shapes.batches: this key"),
        (LEAST + "shapes: {prefill: [yes]}", "$.shapes.prefill[0]: "),
        (LEAST + "measuring: {threshold: 2}", "$.measuring.threshold: "),
        (LEAST + "measuring: {time_budget: yes}", "$.measuring.time_budget: "),
        ("models: [m]\nplans:\n- {mlp: 1, name: 2026-13-45}", "line 3: this is not a valid number"),
        (LEAST + "keep: !!int many", "line 3: this is not a valid number or date: invalid literal"),
        (LEAST + "keep: !!timestamp noon", "line 3: this is not a valid number or date"),
        (LEAST + "precisions: [fp31]", "$.precisions[0]: 'fp31': "),
        (LEAST + "precisions: [{block_size: 32}]", "$.precisions[0]: --block-size is"),
        ("models: [m]\nplans: [attn:3]", "$.plans[0]: 'attn:3': "),
        ("models: [m]\nplans: [mlp:3 mlp:3]", "drops mlp 3 twice"),
        ("models: [m]\nplans: [{metric: kl}]", "say what to drop in one way"),
        ("models: [m]\nplans: [{drop_mlp: 1, plan: a.json}]", "say what to drop in one way"),
        ("models: [m]\nplans: [{drop_mlp: -1}]", "$.plans[0].drop_mlp: "),
        ("models: [m]\nplans: [{drop_mlp: 1, rank: 4}]", "$.plans[0]: --rank is for --heal"),
        ("models: [m]\nplans: [{drop_mlp: 1, by: kl}]", "$.plans[0].by: this key is not known"),
        (LEAST + "measuring: {task_limit: 4}", "$.measuring: --task-limit is for --tasks"),
        ("models: [m]\nplans: [{drop_mlp: 1, metric: taste}]", "$.plans[0].metric[0]: 'taste': "),
        ("models: [m]\nplans: [{plan: a.json, metric: kl}]", "metric says how numbers are chosen"),
        ("models: [m]\nplans: [mlp:1, mlp:1]", "plans[0] and plans[1] are both called mlp-1"),
        ("models: [m]\nplans: [a.json]", "There is no plan "),
        ("models: [n]\nplans: [mlp:1]", "There is no model "),
        (LEAST + "measuring: {eval_text: gone.txt}", "There is no text "),
        ("models: [m\nplans: 3", "line 2, column 6: this is not valid YAML"),
        ("models: [m]\nplans: [mlp:1]\nmodels: [n]", "line 3: the key 'models' is there twice"),
        ("a: !!python/object/apply:os.getcwd []", "this is not valid YAML: could not determine"),
        ("[" * 3000, "this is not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    assert told in refused(tmp_path, text)


def test_a_quantisation_that_makes_no_sense_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with raises(OptionError, "no-calibration", "--calibration"):
        cells(tmp_path, LEAST + "precisions: [int8-qdq]")
    assert cells(tmp_path, LEAST + "precisions: [int8-qdq]\nscoring: {calibration: pydoc}")


def test_a_path_is_relative_to_the_file_and_to_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "owner" / "model").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # A hub id that is a folder beside the caller would be loaded from there.
    result = refused(tmp_path / "there", "models: [owner/model]\nplans: [mlp:1]")
    assert str(tmp_path / "there" / "owner" / "model") in result
    monkeypatch.chdir(tmp_path / "there")
    (cell,) = cells(tmp_path / "there", "models: [owner/model]\nplans: [mlp:1]")
    assert cell.request.source == "owner/model"


def test_paths_are_told_without_detours_unless_those_lead_elsewhere(tmp_path: Path) -> None:
    for folder in ("here/x", "there/y"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("here", "there"):
        (tmp_path / folder / "p.json").touch()
    text = "models: [{source: ./x/../m/., name: a}]\nplans: [./x/../p.json]"
    (tmp_path / "here" / "m").mkdir()
    (cell,) = cells(tmp_path / "here", text)
    assert cell.request.source == str(tmp_path / "here" / "m")
    assert cell.request.drops.plan == tmp_path / "here" / "p.json"
    assert f"{tmp_path}/here/gone" in refused(tmp_path / "here", text.replace("/m/", "/gone/"))
    (cell,) = cells(tmp_path / "here", text.replace(", name: a", ""))
    assert cell.model == "m"
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "y")
    (cell,) = cells(tmp_path / "here", text.replace("x/../p", "link/../p"))
    assert cell.request.drops.plan is not None
    assert cell.request.drops.plan.samefile(tmp_path / "there" / "p.json")

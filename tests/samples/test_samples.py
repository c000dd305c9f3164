"""The samples' scripts run, on tiny models in the places of their own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from safetensors import safe_open

from exporter.artifacts import (
    ComparisonReport,
    DepthsReport,
    PruneReport,
    PruningPlan,
    ScoreComparison,
)
from exporter.cli import cli
from exporter.cli.command import SchemaCommand
from exporter.cli.export import ExportCall
from exporter.engines.build.engine_set import read_sidecar
from exporter.models.gguf_header import read_header
from exporter.pipeline.sweep.cells import cells_of
from exporter.pipeline.sweep.schema import parse_sweep
from graph_passes import Deletion, prune_graph, save_model
from tests.samples.running import SAMPLES, run_sample
from tests.text_graphs import write_llama_folder, write_tiny_lm, write_tokenizer
from tests.tiny_gguf import TinyGguf
from tests.tiny_graphs import TinySpec, tiny_model
from tests.tiny_models import write_encoder, write_sentence_files

ROOT = SAMPLES.parent
ONCE = "reload: false\n"
"""Loads the arms once, which is quicker."""


def run(folder: Path, script: str, *arguments: str | Path, **settings: str) -> str:
    done = run_sample(folder, script, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(config: str) -> ExportCall:
    command = cli.get_command(None, "export")
    assert isinstance(command, SchemaCommand)
    file = SAMPLES / "01_quickstart" / config
    call = command.read(["MODEL", "-o", "out", "--config", str(file)])
    assert isinstance(call, ExportCall)
    return call


def test_the_quick_demo_asks_for_the_same_cut_and_trains_nothing() -> None:
    full, quick = asked("plan.yaml").request, asked("quick.yaml").request
    assert quick.drops == full.drops
    assert quick.quantize == full.quantize
    assert (full.heal.kind, quick.heal.kind) == ("distill", "fold")
    assert quick.heal.calibration == full.heal.calibration


@pytest.mark.parametrize("config", ["plan.yaml", "quick.yaml"])
def test_the_demo_judges_on_sixteen_windows(config: str) -> None:
    options = asked(config).request.compare
    assert options.eval_tokens >= 16 * options.eval_sequence_length
    assert options.timing.reload or config == "quick.yaml"


@pytest.mark.torch
@pytest.mark.genai
@pytest.mark.long
@pytest.mark.usefixtures("exports_once")
def test_the_demo_puts_both_cuts_of_one_size_in_one_table(tmp_path: Path) -> None:
    write_llama_folder(tmp_path / "model")
    out = tmp_path / "out"
    small = [
        *("--drop-attn", "1", "--threads", "1", "--samples", "24", "--sequence-length", "16"),
        *("--prefill", "8", "--rounds", "2", "--eval-tokens", "1024"),
    ]
    settings = {"MODEL": str(tmp_path / "model"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    output = run(tmp_path, "01_quickstart/run.sh", out, *small, **settings)
    report = ComparisonReport.read(out / "report.json")
    assert [(c.arm, c.whole, c.pruned) for c in report.corners] == [
        ("float baseline", None, False),
        ("float candidate", "float baseline", True),
        ("baseline", None, False),
        ("candidate", "baseline", True),
        ("cut-bare", "float baseline", True),
        ("paper-bare", "float baseline", True),
    ]
    for corner in report.corners:
        if corner.whole is not None:
            assert {"perplexity", "other_perplexity"} <= {*corner.rises}
            assert corner.over_whole.keys() == corner.verdicts.keys() != set()
    assert all({"perplexity", "other_perplexity"} <= {*c.figures} for c in report.corners)
    assert report.healing is not None
    assert report.healing.training is not None
    assert {deletion.replacement for deletion in report.plan} == {"none"}
    plans = [PruningPlan.read(out / name) for name in ("plan.json", "paper-plan.json")]
    assert [len(plan.deletions) for plan in plans] == [1, 1]
    assert str(out / "report.html") in output


def assert_two_sentences_are_near(report: Path, cut: int, output: str) -> None:
    result = PruneReport.read(report)
    assert [entry.kind for entry in result.deleted] == ["attention"] * cut
    assert result.verification.passed is True
    assert "0.60" in output.partition("before  after")[2]  # the uncut model's first pair


@pytest.mark.real_model
@pytest.mark.long
def test_an_encoder_from_pytorch(tmp_path: Path) -> None:
    output = run(tmp_path, "02_prune_any_onnx/encoder.sh", tmp_path)
    assert_two_sentences_are_near(tmp_path / "prune.json", 2, output)
    assert "12 sites can be cut" in output


@pytest.mark.optimum
@pytest.mark.long
def test_an_encoder_from_optimum(tmp_path: Path) -> None:
    quick = ("--prefill", "32", "--rounds", "2")
    output = run(tmp_path, "02_prune_any_onnx/optimum.sh", tmp_path, *quick)
    assert_two_sentences_are_near(tmp_path / "pruned" / "prune.json", 2, output)
    assert (tmp_path / "report" / "report.md").is_file()


@pytest.mark.torch
@pytest.mark.long
def test_a_training_is_followed_and_its_last_model_pruned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "04_checkpoints/run.sh", out, "32", "-n", "1,2", "--eval-tokens", "512")
    report = ScoreComparison.read(out / "training.json")
    assert [Path(name).stem for name in report.models] == ["1", "2", "4", "8", "16", "32"]
    assert len({model.sha256 for model in report.models.values()}) == 6
    assert len({text.sha256 for text in report.texts.values()}) == 1
    assert {pair.kind for pair in report.agreements} == {"attention", "mlp", "block"}
    depths = DepthsReport.read(out / "depths.json")
    assert all(cell.damage is not None for cell in depths.cells)
    assert {cell.number for cell in depths.cells} == {1, 2}
    assert all((out / name).is_file() for name in ("training.html", "depths.html"))


@pytest.mark.rtx
def test_engines_are_built_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what follows there needs a real tokenizer
    whole, out = tiny_model(TinySpec(layers=3)), tmp_path / "out"
    cut, _ = prune_graph(whole, [Deletion(1, "attention")])
    for name, model in (("baseline", whole), ("candidate", cut)):
        (tmp_path / "demo" / name).mkdir(parents=True)
        save_model(model, tmp_path / "demo" / name / "model.onnx")
        (tmp_path / "demo" / name / "tokenizer.json").write_text("{}")
    sizes = ["--prompt-range", "1:4:8", "--context-range", "1:4:8"]
    output = run(tmp_path, "05_tensorrt/run.sh", tmp_path / "demo", out, "sm80,sm89", *sizes)
    engines = sorted(out.glob("*/*.engine"))
    assert len(engines) == 4
    for engine in engines:
        assert read_sidecar(engine).settings.compute_capabilities == ("sm80", "sm89")
        assert (engine.parent / "tokenizer.json").is_file()
    assert len(re.findall(r"sublayers cut: 1, sha256 [0-9a-f]{12}\n", output)) == 2
    assert "Built, not run" in output


def test_an_encoder_is_packed_for_triton(tmp_path: Path) -> None:
    repository, encoder = tmp_path / "repository", tmp_path / "encoder" / "pruned.onnx"
    encoder.parent.mkdir()
    save_model(tiny_model(TinySpec(layers=2, cache=False)), encoder)
    output = run(tmp_path, "06_triton/run.sh", encoder, repository)
    assert (repository / "encoder" / "1" / "model.onnx").exists()
    assert 'backend: "onnxruntime"' in output
    assert "dynamic_batching" in output
    line = output.splitlines()[-1]
    assert line.startswith("docker run --rm -p 8000:8000 ")
    assert "--gpus" not in line
    again = run(tmp_path, "06_triton/run.sh", encoder, repository, DEVICE="gpu")
    assert "docker run --rm --gpus all -p 8000:8000 " in again
    assert "KIND_GPU" in again


def test_the_sweep_names_its_cells(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    out, model = tmp_path / "out", str(tmp_path / "model")
    output = run(tmp_path, "08_sweep/run.sh", out, "--dry-run", MODEL=model)
    assert "3 plans x 3 precisions: 9 cells" in output
    assert "attention8-cosine+linear  int4" in output
    assert {path.name for path in out.iterdir()} == {"sweep.yaml"}


def test_the_sweeps_in_the_documents_are_understood(tmp_path: Path) -> None:
    text = (ROOT / "exporter" / "docs" / "sweeps.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        sweep = parse_sweep(block, tmp_path / "sweep.yaml")
        assert len(cells_of(sweep, tmp_path / "out", look=False)) == 2 * 4 * 4


def test_all_four_are_compared(tmp_path: Path) -> None:
    gone = [{"kind": "attention", "layer": 1, "replacement": "none"}]
    for arm, layers, plan in (("baseline", (0, 1), None), ("candidate", (0,), gone)):
        write_tiny_lm(tmp_path / "demo" / arm, layers=layers, plan=plan)
        write_tokenizer(tmp_path / "demo" / arm)
    (tmp_path / "once.yaml").write_text(ONCE)
    quick = [
        *("--threads", "1", "--config", str(tmp_path / "once.yaml"), "--prefill", "4"),
        *("--decode-past", "4", "--rounds", "2", "--eval-tokens", "64"),
    ]
    out = tmp_path / "out"
    output = run(tmp_path, "09_quantised/run.sh", tmp_path / "demo", out, "int8", *quick)
    assert output.count("products: 1 in 8 bits") == 2
    assert (out / "candidate" / "tokenizer.json").is_file()
    report = ComparisonReport.read(out / "report" / "report.json")
    corners = sorted((corner.pruned, corner.quantized) for corner in report.corners)
    assert corners == [(False, False), (False, True), (True, False), (True, True)]


def test_a_file_is_cut_for_llama_cpp(tmp_path: Path) -> None:
    source = TinyGguf.llama().write(tmp_path / "source.gguf")
    run(tmp_path, "10_llama_cpp/run.sh", source, tmp_path / "out", "attention:1,2")
    entries = read_header(tmp_path / "out" / "cut.gguf").entries
    assert entries["deci.attention.head_count"].wholes == [4, 0, 0, 4]


@pytest.mark.torch
@pytest.mark.parametrize("dropped", [3, 4])
def test_a_folder_is_written_for_vllm_which_keeps_the_first_attention(
    tmp_path: Path, dropped: int
) -> None:
    model, served = tmp_path / "model", tmp_path / "out" / "served"
    write_llama_folder(model, layers=4, positions=1024, intermediate_size=256)
    call = ("11_vllm/run.sh", model, tmp_path / "out", "--drop-attn", str(dropped))
    done = run_sample(tmp_path, *call)
    if dropped == 4:
        assert done.returncode == 2
        assert not served.exists()
        return
    assert done.returncode == 0, done.stderr
    blocks = json.loads((served / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, True, True]
    assert not any(block["ffn"]["no_op"] for block in blocks)
    with safe_open(served / "model.safetensors", "np") as file:
        held = {name.split(".")[2] for name in file.keys() if "self_attn" in name}  # noqa: SIM118
    assert held == {"0"}
    assert str(served) in done.stdout.splitlines()[-1]


@pytest.mark.torch
@pytest.mark.long
@pytest.mark.usefixtures("exports_once")
def test_the_corpus_is_searched_before_and_after_the_cut(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_encoder(model)
    write_sentence_files(model, normalise=True)
    (tmp_path / "once.yaml").write_text(f"{ONCE}allow_damage: true\n")
    quick = [
        *("--heal", "none", "--search", "one-shot", "--threads", "1"),
        *("--config", str(tmp_path / "once.yaml"), "--prefill", "8", "--rounds", "2"),
    ]
    output = run(tmp_path, "12_embeddings/run.sh", out, *quick, MODEL=str(model))
    searched = output.partition("== The best answer")[2].splitlines()
    folders = [line.partition(":")[0] for line in searched if " right" in line]
    assert folders == ["baseline", "candidate", "candidate-quantized"]
    accuracy = ComparisonReport.read(out / "report.json").accuracy
    assert accuracy is not None
    assert {task.metric for task in accuracy.tasks} == {"ndcg@10", "recall@10"}
    assert (out / "checkpoint" / "modules.json").is_file()


def test_every_question_has_its_answer_among_the_texts() -> None:
    lines = (SAMPLES / "12_embeddings" / "tasks" / "help.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    answers = [name for item in read for name in item.get("relevant", [])]
    assert sorted(answers) == sorted(item["id"] for item in read if "id" in item)


SCRIPTS = sorted(
    path
    for path in SAMPLES.glob("*/*.sh")
    if "depthcut " in path.read_text() and path.parent.name != "07_ci"  # run by test_ci.py
)


def calls(script: Path) -> list[list[str]]:
    """The words of each call, with the defaults of its variables, without what a user may add."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    known = dict(re.findall(r"^(\w+)=\$\{\w+:-([^}]*)\}", text, flags=re.MULTILINE))
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text.replace('"$@"', ""))
    texts = []
    for line in re.findall(r"^[^#\n]*?\bdepthcut ((?!\$)[a-z].*)$", text, flags=re.MULTILINE):
        words = [re.sub(r"\$(\w+)", lambda m: known.get(m[1], m[0]), w) for w in shlex.split(line)]
        texts.append(_of_depthcut(words, script.parent))
    return texts


def _of_depthcut(words: list[str], here: Path) -> list[str]:
    """Without what the shell does with a call."""
    ends = [i for i, word in enumerate(words) if word in (">", "|", "||", "&&", "}")]
    words = words[: min(ends, default=len(words))]
    return [re.sub(r"\$here|\$\(dirname \$0\)", str(here), word) for word in words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_call_is_one_that_depthcut_has(script: Path) -> None:
    result = calls(script)
    assert result
    for name, *rest in result:
        command = cli.get_command(None, name)
        assert command is not None, name
        known = {
            option for param in command.get_params(click.Context(command)) for option in param.opts
        }
        parts = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert parts <= known, (name, parts - known)
        for file in map(Path, rest):
            if file.suffix == ".yaml" and file.is_file() and isinstance(command, SchemaCommand):
                keys = yaml.safe_load(file.read_text(encoding="utf-8"))
                assert keys.keys() <= command.leaves.keys(), file


def test_a_call_that_is_gone_would_be_found(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text('out=${1:-there}\ndepthcut prune a.onnx -o "$out/b" --gone 1 > /dev/null\n')
    assert calls(script) == [["prune", "a.onnx", "-o", "there/b", "--gone", "1"]]
    with pytest.raises(AssertionError, match="--gone"):
        test_every_call_is_one_that_depthcut_has(script)

"""The sample of sentence embeddings runs, on a tiny encoder in MiniLM's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.artifacts import ComparisonReport
from tests.samples.running import SAMPLES, run_sample
from tests.tiny_models import write_encoder, write_sentence_files

pytestmark = pytest.mark.torch


def test_the_corpus_is_searched_before_and_after_the_cut(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_encoder(model)
    write_sentence_files(model, normalise=True)
    once = tmp_path / "once.yaml"
    once.write_text("reload: false\nallow_damage: true\n")
    quick = [
        *("--heal", "none", "--search", "one-shot", "--threads", "1"),
        *("--config", str(once), "--prefill", "8", "--rounds", "2"),
    ]
    done = run_sample(tmp_path, "12_embeddings/run.sh", out, *quick, MODEL=str(model))
    assert done.returncode == 0, done.stderr
    searched = done.stdout.partition("== The best answer")[2]
    folders = ("baseline", "candidate", "candidate-quantized")
    assert [line.partition(":")[0] for line in searched.splitlines() if " right" in line] == [
        *folders
    ]
    accuracy = ComparisonReport.read(out / "report.json").accuracy
    assert accuracy is not None
    assert {task.metric for task in accuracy.tasks} == {"ndcg@10", "recall@10"}
    assert (out / "candidate" / "hf" / "modules.json").is_file()


def test_every_question_has_its_answer_among_the_texts() -> None:
    lines = (SAMPLES / "12_embeddings" / "tasks" / "help.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    answers = [name for item in read for name in item.get("relevant", [])]
    assert sorted(answers) == sorted(item["id"] for item in read if "id" in item)

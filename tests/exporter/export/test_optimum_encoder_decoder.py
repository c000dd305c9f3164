"""optimum's runtime loads an encoder-decoder's folder, whole and cut, and answers as our runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.stacks import Stacks
from tests.tiny_models import made_loaded

pytestmark = [pytest.mark.optimum, pytest.mark.usefixtures("exports_once")]

CUTS = [
    [("attention", 1), ("mlp", 2), ("cross_attention", 2)],
    [("mlp", 0), ("attention", 2)],  # fewer self-attentions than cross-attentions
    [("block", 3)],
]
NEW = 9


@pytest.mark.parametrize("family", ["whisper", "t5"])
def test_optimum_answers_as_our_runner_does(
    exports_once: None, tmp_path: Path, family: str
) -> None:
    from exporter.cut.surgery import prune_stacks
    from exporter.export.encoder_decoder import check_stacks, write_stacks
    from exporter.models.loading.model_files import save_pretrained_files

    loaded, whole = made_loaded(family), tmp_path / "whole"
    save_pretrained_files(loaded, whole)
    write_stacks(loaded, whole)
    folders = [whole]
    for number, drops in enumerate(CUTS):
        plan = [PlannedDeletion(layer=layer, kind=kind) for kind, layer in drops]  # type: ignore[arg-type]
        folders.append(tmp_path / f"cut{number}")
        save_pretrained_files(loaded, folders[-1])
        prune_stacks(whole, folders[-1], plan, Stacks(2, 2))
        assert all(check.passed for check in check_stacks(loaded, folders[-1], deletions=plan))
    answers = [by_optimum(folder, family) for folder in folders]
    assert answers == [by_us(folder, family) for folder in folders]
    assert len(set(map(str, answers))) == len(folders)


def source(family: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(3)
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 100, generator=generator)}
    ids = torch.randint(6, 64, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_optimum(folder: Path, family: str) -> list[list[int]]:
    import torch
    from optimum import onnxruntime
    from transformers import GenerationMixin

    name = "SpeechSeq2Seq" if family == "whisper" else "Seq2SeqLM"
    model = getattr(onnxruntime, f"ORTModelFor{name}").from_pretrained(folder)
    given = source(family)
    first = torch.full((2, 1), 1)
    result = {"decoder_input_ids": first, "max_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    if family == "whisper":  # its own way is for recordings, and drops the start token
        outcome = GenerationMixin.generate(model, inputs=given["input_features"], **result)
    else:
        outcome = model.generate(**given, **result)
    rows: list[list[int]] = outcome.tolist()
    return rows


def by_us(folder: Path, family: str) -> list[list[int]]:
    from exporter.compare.encoder_decoder.arms import StackFolder
    from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner

    given = {name: tensor.numpy() for name, tensor in source(family).items()}
    with EncoderDecoderRunner(folder, threads=1, brief=True) as runner:
        result = runner.generate(given, StackFolder(folder).rules, NEW)
    rows: list[list[int]] = result.tolist()
    return rows

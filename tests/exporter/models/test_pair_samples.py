"""What rerankers are scored, chosen and healed on: pairs, with the types that they are served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced
from exporter.models.loading.model_source import load_model
from exporter.models.tasks import meter_here
from exporter.models.texts.calibration import CalibrationText, calibration_text, joined
from tests.reading import Heard
from tests.text_graphs import WORDS
from tests.tiny_models import write_bert_tokenizer, write_encoder

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

_HEAD = "ForSequenceClassification"
_CUT: Any = {(1, "attention"): NOTHING}


def _loaded(folder: Path, head: str = _HEAD, **config: Any) -> Any:
    folder.mkdir(exist_ok=True)
    write_encoder(folder, head, initializer_range=0.4, **config)
    write_bert_tokenizer(folder)
    result = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    from transformers import PreTrainedTokenizerFast

    file = str(folder / "tokenizer.json")
    named = PreTrainedTokenizerFast(tokenizer_file=file, **result, pad_token="[UNK]")
    named.save_pretrained(folder)
    return load_model(str(folder))


@pytest.fixture
def reranker(tmp_path: Path) -> Any:
    return _loaded(tmp_path / "model", num_labels=1)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Twelve passages, each with a first sentence."""
    path = tmp_path / "text.txt"
    paragraphs = [
        f"the {word} the {word} of in to a of in. rest of {word} in the value string to the class"
        for word in WORDS[4:16]
    ]
    path.write_text("\n\n".join(paragraphs))
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    lines = [{"query": f"the {word}", "passages": [f"a {word}", "of in"]} for word in WORDS[4:10]]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def _samples(loaded: Any, spec: str, **asked: Any) -> CalibrationText:
    return calibration_text(loaded, spec, sequence_length=64, passages=True, **asked)


def test_a_reranker_reads_pairs_that_are_made_of_a_text(reranker: Any, text: str) -> None:
    result = _samples(reranker, text)
    assert result.types is not None
    assert len(result.input_ids) == 24
    assert result.types[result.mask].max() == 1
    # As its users call the tokenizer.
    paragraph = Path(text).read_text().split("\n\n")[0]
    first, rest = paragraph[: paragraph.index(".") + 1], paragraph[paragraph.index(".") + 2 :]
    path = reranker.tokenizer(first, rest)
    assert result.input_ids[0][result.mask[0]].tolist() == path["input_ids"]
    assert result.types[0][result.mask[0]].tolist() == path["token_type_ids"]


def test_pairs_of_a_file_serve_each_classifier_of_texts(tmp_path: Path, pairs: str) -> None:
    for classes in (1, 3):
        result = _samples(_loaded(tmp_path / str(classes), num_labels=classes), pairs)
        assert result.types is not None
        assert len(result.input_ids) == 12
    embedder = _samples(_loaded(tmp_path / "embedder", "Model"), pairs)
    tokens = _samples(_loaded(tmp_path / "tokens", "ForTokenClassification"), pairs)
    assert embedder.types is None
    assert tokens.types is None


def test_a_text_without_sentences_is_read_singly_and_says_so(reranker: Any, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(f"the {word}" for word in WORDS[4:10]))
    heard = Heard()
    result = _samples(reranker, str(path), progress=heard)
    assert result.types is None
    assert len(result.input_ids) == 6
    assert any("query and passage" in item for item in heard.lines)


def test_a_cut_is_measured_with_the_types(reranker: Any, text: str) -> None:
    result = _samples(reranker, text)
    assert result.types is not None

    def logits() -> Any:
        with torch.no_grad():
            ids, mask, types = map(torch.from_numpy, (result.input_ids, result.mask, result.types))
            given = {"attention_mask": mask.long(), "token_type_ids": types}
            return reranker.model(input_ids=ids, **given).logits[:, 0].double()

    whole = logits()
    with branches_replaced(reranker.model, _CUT):
        cut = logits()
    one, other = ((item - item.roll(-1))[::2] for item in (whole, cut))
    p, q = torch.sigmoid(one), torch.sigmoid(other)
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    measured = meter_here(reranker, result, batch_size=4).measure(_CUT)
    assert measured.distance == pytest.approx(float(expected.mean()), rel=1e-3)
    assert float(expected.mean()) > 1e-4


def test_other_parts_keep_the_types(reranker: Any, text: str, tmp_path: Path) -> None:
    result = _samples(reranker, text)
    assert result.types is not None
    lesson = result.batch([3, 1])
    given = lesson.inputs(torch.device("cpu"))["token_type_ids"]
    width = int(result.mask[[3, 1]].any(axis=0).sum())
    assert given.tolist() == result.types[[3, 1], :width].tolist()
    (tmp_path / "words.txt").write_text("\n\n".join(f"the {word}" for word in WORDS[4:10]))
    single = calibration_text(
        reranker, str(tmp_path / "words.txt"), sequence_length=32, passages=True
    )
    both = joined([result, single])
    assert both.types is not None
    assert both.types.shape == both.input_ids.shape == (30, 64)
    first, second = both.apart
    assert first.types is not None
    assert np.array_equal(first.types, result.types)
    assert not second.types.any() if second.types is not None else True
    assert first.ids_sha256 == result.ids_sha256

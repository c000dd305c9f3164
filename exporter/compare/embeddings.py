"""How near the arms' embeddings are, for models that predict no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.artifacts import Accuracy
from exporter.compare.arms import FLOAT_BASELINE, Pair
from exporter.compare.corners import CornerQuality
from exporter.compare.judgement import Judgement

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.models.texts import TextSource

_TEXTS = 64
_LONGEST_TEXT = 128  # tokens, as sentence-transformers trains its small encoders


def embedding_accuracy(pair: Pair, texts: TextSource) -> Judgement | None:
    """Embeds passages of the evaluation text; None for models that embed nothing.

    Raises:
        ComparisonError: There are too few passages, or embeddings aren't finite.
        BackendError: A run fails.
    """
    from exporter.compare.quality.embeddings import (
        compare_embeddings,
        embed,
        embedding_output,
    )

    runner = pair.baseline.runner
    if embedding_output(runner.outputs) is None:
        return None
    if runner.capabilities.shapes == "compiled":
        pair.progress.say(f"embeddings: left out, {runner.backend} would compile each length")
        return None
    passages = _passages(pair, texts)
    pair.progress.say(f"accuracy: embeddings of {len(passages.ids)} texts from {passages.source}")
    vectors = {
        name: embed(arm.runner, passages.ids, arm=name, progress=pair.progress)
        for name, arm in pair.judged.items()
    }
    found = {
        names: compare_embeddings(*(vectors[name] for name in names)) for names in pair.held_against
    }
    own = Accuracy(
        text_source=passages.source,
        text_sha256=passages.sha256,
        tokens=sum(map(len, passages.ids)),
        perplexity=None,
        kl_divergence=None,
        top1_agreement=None,
        embeddings=found["baseline", "candidate"],
    )
    return Judgement(
        own,
        {
            second: CornerQuality(embedding_cosine=agreement.cosine)
            for (first, second), agreement in found.items()
            if first == FLOAT_BASELINE
        },
    )


@dataclass(frozen=True)
class _Passages:
    """The tokens of each, ``[length]``, and where they are from."""

    ids: list[NDArray[np.int64]]
    source: str
    sha256: str


def _passages(pair: Pair, texts: TextSource) -> _Passages:
    """Passages of the text; random tokens where neither arm has a tokenizer."""
    from exporter.compare.evaluation import random_ids, tokenize_passages
    from exporter.compare.quality.agreement import check_tokens

    folder = pair.baseline.folder
    longest = min(_LONGEST_TEXT, folder.longest_sequence or _LONGEST_TEXT)
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        drawn = random_ids(pair.vocabulary(), sequence_length=longest, tokens=_TEXTS * longest)
        return _Passages([*drawn.token_ids], drawn.source, drawn.sha256)
    ids = tokenize_passages(texts, tokenizer, most=_TEXTS, longest=longest)
    check_tokens(max((int(each.max()) for each in ids), default=0), pair.vocabulary())
    return _Passages(ids, texts.source, texts.sha256)

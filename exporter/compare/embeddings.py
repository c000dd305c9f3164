"""How near the arms' embeddings are, for models that predict no tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.artifacts import Accuracy
from exporter.compare.arms import FLOAT_BASELINE, Pair
from exporter.compare.corners import CornerQuality
from exporter.compare.judgement import Judgement

if TYPE_CHECKING:
    from exporter.texts import TextSource

_TEXTS = 64
_LONGEST_TEXT = 128  # tokens, as sentence-transformers trains its small encoders


def embedding_accuracy(pair: Pair, texts: TextSource) -> Judgement | None:
    """Embeds passages of the evaluation text; None for models that embed nothing.

    Raises:
        ComparisonError: There are too few passages, or embeddings aren't finite.
        BackendError: A run fails.
    """
    from exporter.measure.evaluation import random_ids, tokenize_passages
    from exporter.measure.quality.agreement import check_tokens
    from exporter.measure.quality.embeddings import compare_embeddings, embed, embedding_output
    from exporter.tasks.choosing import takes_any_shape

    runner = pair.baseline.runner
    if embedding_output(runner.outputs) is None:
        return None
    if not takes_any_shape(runner):
        pair.progress.say(f"embeddings: left out, {runner.backend} would compile each length")
        return None
    folder = pair.baseline.folder
    longest = min(_LONGEST_TEXT, folder.longest_sequence or _LONGEST_TEXT)
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        drawn = random_ids(pair.vocabulary(), sequence_length=longest, tokens=_TEXTS * longest)
        passages, source, sha256 = [*drawn.token_ids], drawn.source, drawn.sha256
    else:
        passages = tokenize_passages(texts, tokenizer, most=_TEXTS, longest=longest)
        source, sha256 = texts.source, texts.sha256
        check_tokens(max((int(ids.max()) for ids in passages), default=0), pair.vocabulary())
    pair.progress.say(f"accuracy: embeddings of {len(passages)} texts from {source}")
    vectors = {
        name: embed(arm.runner, passages, arm=name, progress=pair.progress)
        for name, arm in pair.judged.items()
    }
    found = {
        names: compare_embeddings(*(vectors[name] for name in names)) for names in pair.held_against
    }
    own = Accuracy(
        text_source=source,
        text_sha256=sha256,
        tokens=sum(map(len, passages)),
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

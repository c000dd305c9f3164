"""What arms answer with: a kind makes samples of a text, reads answers, says how two differ.

A new kind of answers is a subclass of :class:`Answers`, and its place in
:data:`exporter.compare.accuracy.KINDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy, TaskResult
from exporter.artifacts.latency import Shape
from exporter.compare.agreement import (
    COLUMNS,
    FEWEST_TEXTS,
    LOGITS,
    NO_TARGETS,
    accuracy_of,
    check_tokens,
    class_rows,
    compare_embeddings,
    embed,
    embedding_output,
    figures,
    log_probabilities_of,
    prefill_logits,
    unit_length,
)
from exporter.compare.arms import Comparison
from exporter.compare.evaluation import (
    EvaluationTokens,
    random_ids,
    tokenize,
    tokenize_pairs,
    tokenize_passages,
)
from exporter.compare.generations import generation_agreements, sample_answers
from exporter.compare.intervals import MOST_JUDGED
from exporter.compare.tasks.choosing import task_results
from exporter.compare.tasks.encoding import labels_in
from exporter.compare.tasks.items import TaskScores, compare_scores
from exporter.engines.environment import default_threads
from exporter.engines.runners.base import Array, Runner
from exporter.engines.tensors import has_cache, make_inputs
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Clusters, Distributions, Floats, chunks
from exporter.models.model_folder import PIXELS, ModelFolder
from exporter.models.residual_stream import classes_of_texts, ranks_pairs
from exporter.models.sentence_folder import MEAN, Pooling, pooling_of, why_not_whole
from exporter.models.tasks import MULTI_LABEL
from exporter.models.texts.images import IMAGES, ImageReader, Images, Picture
from exporter.models.texts.passages import LONGEST_PAIR, LONGEST_PASSAGE, pairs_of
from exporter.models.texts.sources import TextSource
from exporter.progress import QUIET, Progress

Pair = tuple[str, str]
"""Two arms' names; the second is held against the first."""
Judgement = dict[Pair, Accuracy]
_EMBEDDED_TEXTS = 64
_FIVE = 5


class Answers(ABC):
    """What arms answer with, to the samples of one text."""

    at_once: ClassVar[bool] = True  # whether an arm answers all samples before another begins
    has_perplexity: ClassVar[bool] = False  # which a text of another domain is for
    unit: ClassVar[str] = "texts"

    def __init__(
        self, words: str, source: str, sha256: str, samples: int, documents: Clusters = None
    ) -> None:
        self.words = f"{words} {source}"  # what of how much is compared
        self.source, self.sha256, self.samples, self.documents = source, sha256, samples, documents

    @classmethod
    @abstractmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        """The samples that arms are judged on; None where they don't answer so."""

    @abstractmethod
    def answer(self, name: str, runner: Any, sample: int) -> Array:
        """One arm's answer to a sample."""

    @abstractmethod
    def take(self, sample: int, answers: Mapping[str, Array], pairs: Sequence[Pair]) -> None:
        """Holds arms' answers to a sample, which are of one shape, against each other."""

    @abstractmethod
    def accuracy(self, pair: Pair) -> Accuracy:
        """What all samples tell of two arms."""

    def hold(
        self, runners: Mapping[str, Runner], pairs: Sequence[Pair], progress: Progress = QUIET
    ) -> Judgement:
        """Has each arm answer each sample once, and holds pairs of arms against each other."""
        whole = range(self.samples)
        parts = [whole] if self.at_once else [whole[sample : sample + 1] for sample in whole]
        total = self.samples * len(runners)
        with progress.task("answers of all arms", total=total, unit=self.unit) as task:
            for place, part in enumerate(parts):
                answers: dict[str, list[Array]] = {name: [] for name in runners}
                # The one that was used last goes first, which helps those that are loaded in turns.
                for name in [*runners][:: -1 if place % 2 else 1]:
                    for sample in part:
                        answers[name].append(self.answer(name, runners[name], sample))
                        task.advance()
                for sample, every in zip(part, zip(*answers.values(), strict=True), strict=True):
                    self.take(sample, _alike(dict(zip(answers, every, strict=True))), pairs)
        return {pair: self.accuracy(pair) for pair in pairs}

    def judge(self, comparison: Comparison, pairs: Sequence[Pair], other: Self | None) -> Judgement:
        """The same of a comparison's arms, with the pair's scores where it is known what is right.

        other: of a text of another domain.
        """
        runners = {name: arm.runner for name, arm in comparison.judged.items()}
        judgement, own = self.hold(runners, pairs, comparison.progress), comparison.pair
        tasks = self.tasks(comparison)
        return {**judgement, own: judgement[own].model_copy(update={"tasks": tasks})}

    def tasks(self, comparison: Comparison) -> list[TaskResult]:
        """The scores of the pair."""
        return task_results(comparison)


def _alike(answers: dict[str, Array]) -> dict[str, Array]:
    """Refuses answers of different shapes."""
    shapes = {name: list(answer.shape) for name, answer in answers.items()}
    first, *others = shapes.values()
    if any(other != first for other in others):
        raise ComparisonError(
            f"The arms' answers have the shapes {shapes}.",
            "Compare two forms of the same model.",
            code="other-model",
        )
    return answers


class Distributed(Answers):
    """Answers that are distributions: logits ``[rows, classes or tokens]``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sums: dict[Pair, Floats] = {}

    def targets(self, sample: int) -> NDArray[np.int64]:
        """The right answers of the first rows, for a perplexity."""
        return NO_TARGETS

    def take(self, sample: int, answers: Mapping[str, Array], pairs: Sequence[Pair]) -> None:
        """Adds up the figures of all rows."""
        parts = [*chunks(*next(iter(answers.values())).shape)]
        reduce = partial(self._figures, sample, answers, pairs)
        with ThreadPoolExecutor(default_threads()) as pool:
            for part in map(reduce, parts) if len(parts) == 1 else pool.map(reduce, parts):
                for pair, sums in zip(pairs, part, strict=True):
                    none = np.zeros((len(COLUMNS), self.samples))
                    self._sums.setdefault(pair, none)[:, sample] += sums

    def _figures(
        self, sample: int, answers: Mapping[str, Array], pairs: Sequence[Pair], rows: slice
    ) -> list[Floats]:
        """Of each pair, summed over some rows, ``[len(COLUMNS)]``."""
        targets, arms = self.targets(sample)[rows], dict[str, Distributions]()
        for name, answer in answers.items():
            what = f"The {name}'s logits in sample {sample}"
            arms[name] = Distributions(answer[rows].astype(np.float64), targets, what)
        return [figures(arms[first], arms[second]).sum(axis=1) for first, second in pairs]

    def accuracy(self, pair: Pair) -> Accuracy:
        """Divergence and agreement, and where there are targets a perplexity."""
        sums = self._sums.get(pair, np.zeros((len(COLUMNS), 0)))
        return accuracy_of(sums, self.source, self.sha256, self.documents)


class Tokens(Distributed):
    """Tokens of a vocabulary, at every position: the next ones, or of a masked model its own."""

    at_once = False  # logits of all tokens take too much memory
    has_perplexity = True
    unit = "samples"

    def __init__(self, drawn: EvaluationTokens, *, causal: bool) -> None:
        words = f"{sum(map(len, drawn.ids))} tokens of"
        super().__init__(words, drawn.source, drawn.sha256, len(drawn.ids), drawn.documents)
        self.drawn, self._causal = drawn, causal and drawn.is_text

    @classmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        """Samples of the text; random tokens where neither arm has a tokenizer."""
        options, whole = comparison.options, comparison.whole
        shape = _logits(comparison)
        if shape is None or classes_of_texts(shape) is not None or whole.folder.classifies:
            return None
        longest = whole.folder.longest_sequence or options.eval_sequence_length
        length = min(options.eval_sequence_length, options.eval_tokens, longest)
        vocabulary, tokens = comparison.vocabulary(), options.eval_tokens
        if comparison.tokenizer is None:
            drawn = random_ids(vocabulary, sequence_length=length, tokens=tokens)
        else:
            drawn = tokenize(
                texts,
                comparison.tokenizer,
                sequence_length=length,
                tokens=tokens,
                separator_id=whole.folder.end_of_text,
            )
        check_tokens(drawn.largest, vocabulary)
        causal = has_cache(whole.runner.inputs) or whole.folder.predicts_next_token
        return cls(drawn, causal=causal)

    def answer(self, name: str, runner: Any, sample: int) -> Array:
        """Logits, ``[tokens, vocabulary]``."""
        return prefill_logits(runner, self.drawn.ids[sample])

    def take(self, sample: int, answers: Mapping[str, Array], pairs: Sequence[Pair]) -> None:
        """Of a vocabulary that has the text's tokens."""
        check_tokens(self.drawn.largest, next(iter(answers.values())).shape[-1])
        super().take(sample, answers, pairs)

    def targets(self, sample: int) -> NDArray[np.int64]:
        """The next tokens of a text, where the model is causal."""
        return self.drawn.ids[sample][1:] if self._causal else NO_TARGETS

    def judge(self, comparison: Comparison, pairs: Sequence[Pair], other: Self | None) -> Judgement:
        """With greedy texts, a text of another domain, and what the pair says to prompts."""
        judgement, there = super().judge(comparison, pairs, other), Judgement()
        if other is not None:
            runners = {name: arm.runner for name, arm in comparison.judged.items()}
            there = other.hold(runners, pairs, comparison.progress)
        generated = generation_agreements(comparison, self.drawn)
        for pair, accuracy in judgement.items():
            more = {"other": there[pair]} if pair in there else {}
            judgement[pair] = accuracy.model_copy(update=generated.get(pair, {}) | more)
        said = {"answers": sample_answers(comparison)}
        return {
            **judgement, comparison.pair: judgement[comparison.pair].model_copy(update=said)
        }  # fmt: skip


def _logits(comparison: Comparison) -> Sequence[int | str | None] | None:
    """The shape of the arms' logits; None where they give none."""
    outputs = {spec.name: spec.shape for spec in comparison.whole.runner.outputs}
    return outputs.get(LOGITS)


class Classes(Distributed):
    """Distributions over classes of texts or of their tokens; of a reranker each two texts' order.

    A single logit, by which rerankers order texts, says nothing by itself: of each two texts counts
    which stands higher, and the last of an odd number is held against the first.
    """

    def __init__(
        self, drawn: EvaluationTokens, *, separate: bool = False, orders: bool = False
    ) -> None:
        documents, texts = drawn.documents, len(drawn.ids)
        if orders:
            documents, texts = None if documents is None else documents[::2], -(-texts // 2)
        words = f"classes of {len(drawn.ids)} {'texts' if drawn.types is None else 'pairs'} from"
        super().__init__(words, drawn.source, drawn.sha256, texts, documents)
        self._drawn, self._separate, self._orders = drawn, separate, orders

    @classmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        """Passages of the text, or pairs where the model reads such."""
        if (shape := _logits(comparison)) is None:
            return None
        classes = classes_of_texts(shape)
        problem = comparison.whole.folder.config.get("problem_type")
        paired = pairs_of(texts) if ranks_pairs(classes, problem) else texts.pairs
        most = _EMBEDDED_TEXTS if classes is None else MOST_JUDGED
        drawn = _passages(comparison, texts, most, paired=classes is not None and bool(paired))
        separate = classes is not None and problem == MULTI_LABEL
        return cls(drawn, separate=separate, orders=classes == 1)

    def answer(self, name: str, runner: Any, sample: int) -> Floats:
        """Log-probabilities, ``[rows, classes]``: one row, or one for each token."""
        texts = len(self._drawn.ids)
        if not self._orders or texts == 1:
            return self._rows(name, runner, sample)
        places = 2 * sample, (2 * sample + 1) % texts
        first, second = (np.diff(self._rows(name, runner, place)) for place in places)
        return -np.logaddexp(0, np.hstack([first - second, second - first]))

    def _rows(self, name: str, runner: Any, text: int) -> Floats:
        types = None if self._drawn.types is None else self._drawn.types[text]
        what = f"The {name}'s logits of text {text}"
        ids = self._drawn.ids[text]
        return class_rows(runner, ids, what, types=types, separate=self._separate)

    def accuracy(self, pair: Pair) -> Accuracy:
        """Of classes, or of the order of two texts."""
        compared = {"compared": "order" if self._orders else "classes"}
        return super().accuracy(pair).model_copy(update=compared)


class Pictures(Distributed):
    """Distributions over classes of images; each image is read once for all arms."""

    at_once = False
    unit = "images"

    def __init__(self, images: Images, folder: ModelFolder) -> None:
        samples = IMAGES if images.is_random else len(images.pictures)
        which = f"{samples:,} of {images.there:,}" if samples < images.there else f"{samples:,}"
        words = f"classes of {which} images from"
        super().__init__(words, images.source, images.content_sha256, samples)
        self._images, self._config = images, folder.config
        self._right = class_numbers(images.pictures, folder.config) if images.has_labels else None
        home = folder.onnx if folder.onnx.is_dir() else folder.onnx.parent
        self._reader = ImageReader(str(folder.onnx), home, folder.config)
        self._rows: dict[str, list[Floats]] = {}
        self._read: tuple[int, NDArray[np.float32]] | None = None

    @classmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        """The images that are named, or noise."""
        folder = comparison.whole.folder
        if comparison.reads_images and not folder.classifies_images:
            raise ComparisonError(
                f"{folder.onnx} reads images, and no config.json beside it names a class that ends "
                "with ForImageClassification.",
                "Put the model's config.json and preprocessor_config.json next to it.",
                code="config-missing",
            )
        return cls(texts, folder) if isinstance(texts, Images) else None

    def answer(self, name: str, runner: Any, sample: int) -> Floats:
        """Log-probabilities, ``[rows, classes]``."""
        inputs = make_inputs(runner.inputs, Shape("encode", 1, 1), np.zeros((1, 1), np.int64))
        inputs[PIXELS] = self._pixels(sample).astype(inputs[PIXELS].dtype)
        logits = runner.run(inputs, [LOGITS], phase="encode")[LOGITS]
        separate = self._config.get("problem_type") == MULTI_LABEL
        what = f"The {name}'s logits of image {sample}"
        rows = log_probabilities_of(logits, what, separate=separate)
        self._rows.setdefault(name, []).append(rows)
        return rows

    def _pixels(self, sample: int) -> NDArray[np.float32]:
        if self._read is None or self._read[0] != sample:
            if self._images.is_random:
                noise = self._reader.noise(self.samples, "evaluation")
                self._read = sample, noise[sample : sample + 1]
            else:
                self._read = sample, self._reader.pixels([self._images.pictures[sample]])
        return self._read[1]

    def accuracy(self, pair: Pair) -> Accuracy:
        """Of more than five classes with the share of the five likeliest that is the same."""
        more: dict[str, Any] = {"compared": "images"}
        first, second = (_likeliest(self._rows[name])[:, :_FIVE] for name in pair)
        if self._rows[pair[0]][0].shape[1] > _FIVE:
            shared = (first[:, :, None] == second[:, None]).any(axis=2)
            more["figures"] = {"top5_agreement": float(shared.mean())}
        return super().accuracy(pair).model_copy(update=more)

    def tasks(self, comparison: Comparison) -> list[TaskResult]:
        """Both arms against the labels."""
        if self._right is None:
            return []
        sides = (self._rows[name] for name in comparison.pair)
        return compare_scores(*(label_scores(rows, self._right, self.source) for rows in sides))


def class_numbers(pictures: Sequence[Picture], config: Mapping[str, Any]) -> NDArray[np.int64]:
    """The class of each image, ``[images]``."""
    numbers = label_numbers(config)
    wrong = next((one for one in pictures if str(one.label) not in numbers), None)
    if wrong is not None:
        names = [name for name, _ in labels_in(config)]
        some = ", ".join(names[:_FIVE]) + (", ..." if len(names) > _FIVE else "")
        raise ComparisonError(
            f"{wrong.name} has the label {wrong.label!r}; the model's "
            f"{len({*numbers.values()})} classes are called {some}.",
            "Name the folders as id2label in config.json has the classes, or by their numbers.",
            code="labels-mismatch",
        )
    return np.array([numbers[str(picture.label)] for picture in pictures], np.int64)


def label_numbers(config: Mapping[str, Any]) -> dict[str, int]:
    """The class that each label stands for: by name, by number, by the first of several names.

    ImageNet's classes have several names, parted by commas; one that two classes have, or begin
    with, counts for neither.
    """
    result = labels_in(config)
    names = [name for name, _ in result]
    firsts = [name.partition(",")[0].strip() for name in names]
    numbers = [number for _, number in result]
    outcome = {str(number): number for number in numbers}
    for called in (firsts, names):
        pairs = zip(called, numbers, strict=True)
        outcome |= {name: number for name, number in pairs if called.count(name) == 1}
    return outcome


def _likeliest(said: Sequence[Floats]) -> NDArray[np.intp]:
    """The classes of each row of one arm's answers, the likeliest first."""
    return np.argsort(-np.concatenate(said), axis=1, kind="stable")


def label_scores(said: Sequence[Floats], right: NDArray[np.int64], source: str) -> TaskScores:
    """One arm's answers against the labels.

    said: log-probabilities of each image, `[1, classes]`.
    right: the class of each, `[images]`.
    """
    rows = np.concatenate(said)
    if right.max(initial=0) >= rows.shape[1]:
        raise ComparisonError(
            f"The config names a class {right.max()}, and the model gives {rows.shape[1]}.",
            "Put the config next to it that belongs to the model.",
            code="labels-mismatch",
        )
    order = _likeliest(said)
    metrics = {"top1": order[:, 0] == right}
    if rows.shape[1] > _FIVE:
        metrics["top5"] = (order[:, :_FIVE] == right[:, None]).any(axis=1)
    hits = {name: values.astype(np.float64) for name, values in metrics.items()}
    return TaskScores("image classes", source, hits)


class Embeddings(Answers):
    """A vector for each text, and how similar texts are by it."""

    def __init__(self, drawn: EvaluationTokens, pooling: Pooling = MEAN) -> None:
        if len(drawn.ids) < FEWEST_TEXTS:
            raise ComparisonError(
                f"The evaluation text gives {len(drawn.ids)} texts to embed; {FEWEST_TEXTS} are "
                "needed.",
                "Name a longer text with --eval-text.",
                code="text-too-short",
            )
        words, texts = f"embeddings of {len(drawn.ids)} texts from", len(drawn.ids)
        super().__init__(words, drawn.source, drawn.sha256, texts, drawn.documents)
        self._drawn, self._pooling = drawn, pooling
        self._vectors: dict[str, list[Floats]] = {}

    @classmethod
    def of(cls, comparison: Comparison, texts: TextSource) -> Self | None:
        """Passages of the text."""
        runner, home = comparison.whole.runner, comparison.whole.folder.home
        if embedding_output(runner.outputs) is None or runner.capabilities.shapes == "compiled":
            return None
        pooling = pooling_of(home)
        if why := why_not_whole(home):
            comparison.progress.say(f"embeddings: by {' and '.join(pooling.modes)} alone; {why}")
        return cls(_passages(comparison, texts, _EMBEDDED_TEXTS), pooling)

    def answer(self, name: str, runner: Any, sample: int) -> Floats:
        """A vector of length 1, ``[size]``."""
        what = f"The {name}'s embedding of text {sample}"
        return unit_length(embed(runner, self._drawn.ids[sample], what, pooling=self._pooling))

    def take(self, sample: int, answers: Mapping[str, Array], pairs: Sequence[Pair]) -> None:
        """Keeps vectors: each text is held against all others."""
        for name, vector in answers.items():
            self._vectors.setdefault(name, []).append(vector)

    def accuracy(self, pair: Pair) -> Accuracy:
        """Cosines, and the ranking of pairs of texts."""
        first, second = (np.stack(self._vectors[name]) for name in pair)
        figures, intervals = compare_embeddings(first, second, self.documents)
        return Accuracy(
            text_source=self.source,
            text_sha256=self.sha256,
            tokens=sum(map(len, self._drawn.ids)),
            perplexity=None,
            compared="embeddings",
            figures=figures,
            intervals=intervals,
        )


def _passages(
    comparison: Comparison, texts: TextSource, most: int, *, paired: bool = False
) -> EvaluationTokens:
    """Passages of the text, or its pairs; random tokens where neither arm has a tokenizer."""
    paired = paired and comparison.tokenizer is not None
    longest = LONGEST_PAIR if paired else LONGEST_PASSAGE
    longest = min(longest, comparison.whole.folder.longest_sequence or longest)
    if comparison.tokenizer is None:
        tokens = most * longest
        return random_ids(comparison.vocabulary(), sequence_length=longest, tokens=tokens)
    read = tokenize_pairs if paired else tokenize_passages
    drawn = read(texts, comparison.tokenizer, most=most, longest=longest)
    check_tokens(drawn.largest, comparison.vocabulary())
    return drawn

"""What every backend offers to the measurements: a runner of one model."""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from numpy.typing import NDArray

from exporter.artifacts.latency import Phase, Shape
from exporter.engines.tensors import TensorSpec, make_inputs, random_tokens
from exporter.errors import BackendError
from exporter.progress import Progress

Array = NDArray[Any]

_WIDENED = "ONNX Runtime's CPU has no bfloat16 kernels: the same weights run in float32"


@dataclass(frozen=True)
class Capabilities:
    """What a runner can do and takes of the machine; complete once the runner was entered."""

    device: Literal["cpu", "gpu"] = "cpu"
    shapes: Literal["any", "profiles", "compiled"] = "any"
    gpu_memory_bytes: int | None = None  # None where the backend can't tell
    widened: bool = False
    huge_page_bytes: int = 0
    prefill_chunk_tokens: int = 0
    one_text: bool = False  # its caches hold no more: others would be run from their start
    notes: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int | None:
        """How many sequences are best run together; None where any number may be.

        An engine takes the shapes that it was built for, of which one sequence is the surest.
        """
        return 1 if self.shapes == "profiles" else None


def tell_notes(capabilities: Iterable[Capabilities], progress: Progress) -> None:
    """Says what a user must know of the runners that were entered, once."""
    every = list(capabilities)
    widened = [_WIDENED] if any(able.widened for able in every) else []
    for note in dict.fromkeys([*widened, *(note for able in every for note in able.notes)]):
        progress.say(note)


@dataclass(frozen=True)
class BoundCall:
    """One run of the model on bound inputs, into preallocated outputs."""

    run: Callable[[], None]
    timed: Callable[[], float] | None = None
    launches: Callable[[], str] = lambda: ""

    def __call__(self) -> None:
        """Runs once."""
        self.run()


def refuse_cuda(backend: str, provider: str) -> None:
    """Refuses another provider than the CPU, which is all that some backends are run on."""
    if provider != "cpu":
        raise BackendError(
            f"The provider {provider!r} is not known: depthcut runs {backend} on the CPU.",
            "Leave --provider out.",
            code="unknown-provider",
        )


class Runner(ABC):
    """A model, ready to run between ``__enter__`` and ``__exit__``."""

    has_device_clock: ClassVar[bool] = False
    backend: str
    name: str  # the model, as messages call it: its file, as a rule
    provider: str  # the device path that really runs, as the backend calls it
    threads: int  # for one operator, from when it is entered on
    capabilities: Capabilities = Capabilities()

    @abstractmethod
    def __enter__(self) -> Self:
        """Loads the model."""

    @abstractmethod
    def __exit__(self, *exc_info: object) -> None:
        """Frees the model; does nothing where none is loaded."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in the graph's order."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in the graph's order."""

    @abstractmethod
    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs once and returns the named outputs, or all of them.

        ``phase`` is for engines that are built for each; None where the caller can't know.
        """

    @abstractmethod
    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Binds inputs and preallocated outputs, so that a call costs the engine's work alone.

        The model runs once to learn the shapes of its outputs.
        """

    def value(self, array: Array) -> Any:
        """An array where the model runs, or on the host where a runner keeps nothing there."""
        return array

    def continued(
        self, tokens: Mapping[str, Array], caches: Mapping[str, Any], outputs: Sequence[str],
        *, phase: Phase,
    ) -> list[Any]:  # fmt: skip
        """Runs on values of caches; gives the first output on the host, the others as values."""
        arrays = self.run({**tokens, **caches}, outputs, phase=phase)
        return [arrays[name] for name in outputs]

    def inputs_of(self, shape: Shape, vocabulary: int) -> dict[str, Array]:
        """What is bound to time a shape: the same random tokens for every model."""
        return make_inputs(self.inputs, shape, random_tokens(shape, vocabulary))

    def refuse_missing(self, inputs: Mapping[str, Array]) -> None:
        """Refuses a call that lacks an input."""
        missing = next((spec.name for spec in self.inputs if spec.name not in inputs), None)
        if missing is not None:
            raise BackendError(
                f"{self.name}: no value for the input {missing}.", code="wrong-shape"
            )

    def not_entered(self) -> BackendError:
        """The error for a use of the model before it was loaded, or after it was freed."""
        return BackendError(
            f"The runner of {self.name} is used outside its with block.", code="not-entered"
        )

    def refuse_shapes(  # noqa: B027
        self, shapes: Mapping[str, tuple[int, ...]], *, phase: Phase | None = None
    ) -> None:
        """Refuses inputs of such shapes; a runner that takes any refuses none."""


HUGE_PAGE_BYTES = 2 << 20

_MAPS = Path("/proc/self/maps")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h, asm-generic/mman-common.h
_FEWEST_PAGES = 2  # a smaller region holds hardly a whole page


def move_to_huge_pages() -> int:
    """Moves what this process has in large private memory to huge pages."""
    if not _allowed():
        return 0
    try:
        maps = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a sandbox without /proc
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for begin, end in private_regions(maps):
        madvise(begin, end - begin, _MADV_HUGEPAGE)  # for what is still to be written there
        for page in range(begin, end, HUGE_PAGE_BYTES):
            moved += madvise(page, HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0
    return moved * HUGE_PAGE_BYTES


def private_regions(maps: str) -> Iterator[tuple[int, int]]:
    """The whole huge pages of regions that hold a program's own data, and are writable."""
    for line in maps.splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        # Stacks grow, and a file's pages are not this program's.
        if rights != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        begin, end = (int(address, 16) for address in span.split("-"))
        first = -(-begin // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        last = end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if last - first >= _FEWEST_PAGES * HUGE_PAGE_BYTES:
            yield first, last


def _allowed() -> bool:
    """Whether the kernel gives huge pages; where it gives all or none there is nothing to ask."""
    try:
        return sys.platform == "linux" and "[madvise]" in _ENABLED.read_text(encoding="ascii")
    except OSError:
        return False

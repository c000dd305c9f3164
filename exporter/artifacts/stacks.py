"""The layers of a model: one stack, or an encoder's and a decoder's, numbered through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.errors import PlanError, UnknownArchitectureError
from graph_passes.types import DeletionKind, SublayerKind, SublayerRef

Stack = Literal["encoder", "decoder"]
Deleted = PlannedDeletion | tuple[int, str]

ENCODER_KINDS: tuple[SublayerKind, ...] = ("attention", "mlp")
"""What a layer of the encoder consists of."""
DECODER_KINDS: tuple[SublayerKind, ...] = ("attention", "cross_attention", "mlp")
"""What a layer of the decoder consists of."""
DECODER_UNITS: tuple[DeletionKind, ...] = (*DECODER_KINDS, "block")
"""What may be dropped of it."""

_DEPTHS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))


@dataclass(frozen=True)
class Stacks:
    """How many layers the encoder and the decoder have; a model without both has one stack."""

    encoder: int
    decoder: int = 0

    @classmethod
    def numbered(cls, layers: int, encoder_layers: int | None) -> Stacks:
        """Those of so many layers, of which the encoder has some; None: there is one stack."""
        return (
            cls(layers) if encoder_layers is None else cls(encoder_layers, layers - encoder_layers)
        )

    @classmethod
    def of(cls, config: Any) -> Stacks:
        """Those of a model's config."""
        for names in _DEPTHS:
            encoder, decoder = (getattr(config, name, None) for name in names)
            if isinstance(encoder, int) and isinstance(decoder, int) and min(encoder, decoder) > 0:
                return cls(encoder, decoder)
        raise UnknownArchitectureError(
            "The config doesn't tell how many layers the encoder and the decoder have.",
            code="no-stacks",
        )

    @property
    def layers(self) -> int:
        """Of both together."""
        return self.encoder + self.decoder

    def stack(self, layer: int) -> Stack:
        """Whose layer it is."""
        return "encoder" if layer < self.encoder else "decoder"

    def first(self, stack: Stack) -> int:
        """The number of a stack's first layer."""
        return 0 if stack == "encoder" else self.encoder

    def kinds(self, layer: int) -> tuple[SublayerKind, ...]:
        """What a layer consists of, in the order in which it runs."""
        return ENCODER_KINDS if layer < self.encoder else DECODER_KINDS

    def units(self, layer: int) -> tuple[DeletionKind, ...]:
        """What of a layer is scored: its sublayers, and all of them as a block."""
        return (*self.kinds(layer), "block")

    def named(self, layer: int, kind: str) -> list[SublayerRef]:
        """The sublayers that a deletion names; a block stands for all of its layer."""
        if not 0 <= layer < self.layers:
            text = f"There is no layer {layer}: {self.words()}."
            raise PlanError(text, code="layer-missing")
        kinds = self.kinds(layer)
        if kind != "block" and kind not in kinds:
            raise PlanError(
                f"Layer {layer} has no {kind} that could be dropped.",
                f"Of the model, {self.words()}." if self.decoder else "",
                code="sublayer-missing",
            )
        return [SublayerRef(layer, item) for item in kinds if kind in (item, "block")]

    def every(self, deletions: Iterable[Deleted]) -> list[SublayerRef]:
        """The sublayers that deletions name, in the layers' order."""
        pairs = (d if isinstance(d, tuple) else (d.layer, d.kind) for d in deletions)
        return sorted({ref for layer, kind in pairs for ref in self.named(layer, kind)})

    def within(self, deletions: Iterable[PlannedDeletion], stack: Stack) -> list[PlannedDeletion]:
        """What goes of one stack, by the layers' numbers in its own graph."""
        first = self.first(stack)
        return [
            deletion.model_copy(update={"layer": deletion.layer - first})
            for deletion in deletions
            if self.stack(deletion.layer) == stack
        ]

    def words(self) -> str:
        """``layers 0 to 5 are the encoder's, 6 to 11 the decoder's``."""
        if not self.decoder:
            return f"layers 0 to {self.layers - 1} are the model's"
        return (
            f"layers 0 to {self.encoder - 1} are the encoder's, {self.encoder} to "
            f"{self.layers - 1} the decoder's"
        )


def refuse_other_stacks(
    plan: PruningPlan, encoder_layers: int | None, where: str = "", model: str = "the model"
) -> None:
    """Refuses a plan whose layers are numbered otherwise than the model's."""
    if plan.encoder_layers == encoder_layers:
        return
    planned, own = (
        "one stack of layers" if layers is None else f"an encoder of {layers} layers and a decoder"
        for layers in (plan.encoder_layers, encoder_layers)
    )
    raise PlanError(
        f"{where}The plan is for a model with {planned}, and {model} has {own}.",
        "Make a plan for this model: depthcut export MODEL --drop-joint N. A plan by hand for an "
        'encoder-decoder says how many layers the encoder has ("encoder_layers"); the next one is '
        "then the decoder's first.",
        code="other-stacks",
    )

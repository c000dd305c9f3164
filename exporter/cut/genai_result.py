"""What a cut writes for onnxruntime-genai, and what it tells the user to do about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.models.genai_config import (
    CONFIG_FILE,
    GenaiConfig,
    companions,
    config_target,
    find_config,
    rewritten,
)
from graph_passes.types import PassReport

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class GenaiResult:
    """The config of onnxruntime-genai beside the source, and where the new one goes.

    Attributes:
        config: The uncut decoder's.
        target: The file for the new one.
        model: The pruned ONNX file.
    """

    config: GenaiConfig
    target: Path
    model: Path

    @classmethod
    def beside(cls, source: Path, target: Path) -> GenaiResult | None:
        """Looks for a config that names the source; None where there is none.

        Raises:
            SurgeryError: There is one, but a cut can't be written into it, or its place is taken.
        """
        config = find_config(source)
        return None if config is None else cls(config, config_target(source, target), target)

    def text(self, original: ir.Model, passed: PassReport) -> str:
        """The new config, for a cut that is done.

        Raises:
            SurgeryError: The config doesn't fit the graph, or the runtime needs other numbers.
        """
        names = [value.name or "" for value in original.graph.inputs]
        gone = [name for entry in passed.deleted for name in entry.inputs_removed]
        return rewritten(self.config, self.model.name, names, gone, passed.kv_renumbering)

    def advice(self, own: Sequence[Path]) -> str:
        """What is still to do before onnxruntime-genai runs the result."""
        needed = companions(self.config, [*own, self.target])
        if self.target.name != CONFIG_FILE:
            others = ", ".join(needed)
            more = f" beside copies of {others}" if others else ""
            return (
                f"onnxruntime-genai: {self.target.name} is the result's config; move it with the "
                f"result to a folder of its own, as {CONFIG_FILE}{more}"
            )
        others = ", ".join(name for name in needed if not self.target.with_name(name).exists())
        more = f"; it also needs {others} from {self.config.path.parent}" if others else ""
        return f"onnxruntime-genai: {CONFIG_FILE} is rewritten for the result{more}"

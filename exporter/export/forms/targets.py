"""The runtimes that a graph can be written for, and what each of them asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from exporter.artifacts import FormRecord, Target
from exporter.engines.build.libraries import Backend
from exporter.errors import UsageError
from exporter.export.forms.portable import (
    WrittenForm,
    form_in_words,
    note_form,
    write_portable,
    write_stacks,
)
from exporter.export.onnx_output import MODEL_FILE, add_pooling, pooling_for
from exporter.export.options import ExporterName
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.artifacts import ParityCheck
    from exporter.export.forms.genai import Provider
    from exporter.models.loading.model_source import LoadedModel

Write = Callable[..., WrittenForm]
"""Is given a LoadedModel, a folder and a Progress; writes the model's form into the folder, or
raises ExportError. Where caches have a fixed length it takes ``room``, too."""


@dataclass(frozen=True)
class TargetForm:
    """What a target's form takes."""

    write: Write
    provider: str | None = None  # the one provider of ONNX Runtime that it is made for; None: any
    engines: tuple[Backend, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    plain: bool = False
    fixed_caches: bool = False


def _write_for_onnxruntime(
    loaded: LoadedModel, folder: Path, progress: Progress, *, provider: Provider, **options: Any
) -> WrittenForm:
    if loaded.model.can_generate():
        from exporter.export.forms.onnxruntime import write_decoder

        return write_decoder(loaded, folder, provider, progress, **options)
    from exporter.export.forms.onnxruntime import write_encoder

    return write_encoder(loaded, folder, progress, **options)


def _write_for_tensorrt(
    loaded: LoadedModel, folder: Path, progress: Progress, *, room: int | None, **options: Any
) -> WrittenForm:
    from exporter.export.forms.tensorrt import write_for_tensorrt

    return write_for_tensorrt(loaded, folder, progress, room=room, **options)


TARGETS: Mapping[Target, TargetForm] = {
    "portable": TargetForm(write_portable, engines=get_args(Backend), plain=True),
    "onnxruntime-cpu": TargetForm(
        partial(_write_for_onnxruntime, provider="cpu"), provider="cpu", dtypes=("float32",)
    ),
    "onnxruntime-cuda": TargetForm(
        partial(_write_for_onnxruntime, provider="cuda"), provider="cuda", dtypes=("float16",)
    ),
    "tensorrt": TargetForm(_write_for_tensorrt, engines=("tensorrt",), fixed_caches=True),
    "tensorrt-rtx": TargetForm(_write_for_tensorrt, engines=("tensorrt-rtx",), fixed_caches=True),
}


def refuse_options(
    target: Target,
    *,
    exporter: ExporterName | None,
    opset: int | None,
    dtype: str,
    provider: str,
    engine: Backend | None,
    cache_length: int | None = None,
) -> None:
    """Refuses what contradicts a target, before anything is done."""
    form, name = TARGETS[target], f"--target {target}"
    fixed = [other for other, item in TARGETS.items() if item.fixed_caches]
    builders = [other for other, item in TARGETS.items() if engine in item.engines]
    rules = (
        *((value is not None and not form.plain,
           f"{name} decides the {key} itself; {key}: {value} contradicts it.",
           f"Leave {key} out, or take --target portable.")
          for key, value in (("exporter", exporter), ("opset", opset))),
        (cache_length is not None and not form.fixed_caches,
         f"The caches of {name} have no fixed length.",
         f"Leave --cache-length out, or take --target {' or '.join(fixed)}."),
        (dtype not in form.dtypes, f"{name} has no form in {dtype}.",
         f"Say --dtype {' or '.join(form.dtypes)}."),
        (form.provider not in (None, provider),
         f"{name} is measured on {form.provider}, not on {provider}.",
         f"Say --provider {form.provider}."),
        (engine is not None and engine not in form.engines,
         f"{engine} builds no engines of a graph for {target}.",
         f"Say --target {' or '.join(builders)}, or leave --engine out."),
    )  # fmt: skip
    for broken, message, hint in rules:
        if broken:
            raise UsageError(message, hint, code="options-clash")


def write_form(
    loaded: LoadedModel,
    folder: Path,
    *,
    target: Target = "portable",
    exporter: ExporterName | None = None,  # None for PyTorch's
    opset: int | None = None,  # for `portable` alone; None for the exporter's usual one
    room: int | None = None,  # 0 lets them grow, None takes the usual number
    pooling: bool = False,
    progress: Progress = QUIET,
) -> tuple[Path, FormRecord]:
    """Exports a model in the form of a target."""
    form, pools = TARGETS[target], pooling_for(loaded) if pooling else None
    options: dict[str, Any] = {"exporter": exporter, "opset": opset} if form.plain else {}
    options |= {"room": room} if form.fixed_caches else {}
    written = form.write(loaded, folder, progress, **options)
    if pools is not None:
        add_pooling(folder, pools)
    record = note_form(folder, written, target, loaded.ref.sha256)
    progress.say(form_in_words(record))
    return folder / MODEL_FILE, record


def write_onnx(
    model: LoadedModel,
    folder: Path | str,
    *,
    target: Target = "portable",
    exporter: ExporterName | None = None,
    opset: int | None = None,
    room: int | None = None,
    pooling: bool = False,
    progress: Progress = QUIET,
) -> list[ParityCheck]:
    """Exports a model to a folder that runs, and compares it with PyTorch.

    The folder appears whole or not at all: ``model.onnx`` and its weights' file, the config, the
    tokenizer and ``USE.md``, which tells how to load it.

    Args:
        model: What :func:`exporter.load_model` gives.
        folder: A new or empty folder.
        target: The runtime that the graph is written for, in the form that is fastest there.
        exporter: For ``portable``: ``torch`` or ``optimum``; None: PyTorch's.
        opset: For ``portable``: 18 to 23; None: the exporter's usual one.
        room: For ``tensorrt`` and ``tensorrt-rtx``: the caches' length in tokens; 0: they grow.
        pooling: Encoders: the graph also pools and normalises, and gives an embedding a text.
        progress: Hears of each step.

    Returns:
        What was compared with PyTorch, for prefill and decode: the largest absolute error of the
        logits [batch, sequence, vocabulary] or embeddings, and of keys and values [batch, heads,
        sequence, size], with the tolerance of the model's dtype.

    Raises:
        ExportError: PyTorch or the form's writer can't export the model.
        VerificationError: The graph's answers differ from PyTorch's.
        UsageError: The folder isn't empty, or the target decides otherwise.
    """
    from exporter.engines.usage import write_graph_use
    from exporter.export.parity import check_export
    from exporter.files import staged_directory
    from exporter.models.loading.model_files import save_pretrained_files
    from exporter.models.sentence_folder import copy_settings

    if target not in TARGETS:
        raise UsageError(f"There is no target {target!r}.", f"Take {', '.join(TARGETS)}.")
    folder = Path(folder)
    provider, dtype = TARGETS[target].provider or "cpu", str(model.model.dtype)
    refuse_options(
        target, exporter=exporter, opset=opset, dtype=dtype.removeprefix("torch."),
        provider=provider, engine=None, cache_length=room,
    )  # fmt: skip
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} isn't empty, and would be replaced as a whole.",
            "Name a new folder.",
            code="not-ours",
        )
    in_stacks = model.ref.encoder_layers is not None
    with staged_directory(folder) as stage:
        file = stage / MODEL_FILE
        if in_stacks:
            write_stacks(model, stage, opset=opset, progress=progress)
        else:
            write_form(
                model, stage, target=target, exporter=exporter, opset=opset, room=room,
                pooling=pooling, progress=progress,
            )  # fmt: skip
        save_pretrained_files(model, stage)
        checks = check_export(model, file, provider=provider, progress=progress)
        copy_settings(model.path, stage)
        if not in_stacks:
            write_graph_use(file)
    return checks

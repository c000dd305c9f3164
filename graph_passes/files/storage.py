"""ONNX files: read without their weights, written with only the weights that are left."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from graph_passes.errors import OnnxFileError, UnsafeInputError
from graph_passes.files.file_checks import (
    AGAIN,
    check_external,
    other_reader,
    read_graph,
    reads,
    refuse_unsupported,
)
from graph_passes.files.hashing import content_sha256
from graph_passes.files.locations import common_folder, leaves_folder, real
from graph_passes.files.placing import finish_interrupted, staging
from graph_passes.files.weight_file import WeightWriter, read_bytes

Weights = Literal["compact", "share"]

_INLINE_BYTES = 1024
_HASH_LETTERS = 16
_MOST_INLINE_BYTES = 1 << 20


def load_model(path: Path) -> ir.Model:
    """Reads an ONNX file. External weights stay on disk until someone asks for them.

    All external data is checked to be there, long enough, and inside the model's folder, links
    followed; where the folder is a snapshot in a Hugging Face cache, the blobs of the same
    repository count as inside. A data file with several hard links, which onnx refuses to read,
    is accepted.
    """
    finish_interrupted(path)
    model = _deserialised(path)
    ir.external_data.set_base_dir(model.graph, path.parent)
    attributes = list(_external_attributes(model))
    check_external(path, _external_initializers(model))
    check_external(path, (attribute.value for _, attribute in attributes))
    for node, attribute in attributes:  # so that only initializers are left in data files
        inline = _inline(attribute.value)
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, inline)
    return model


def _deserialised(path: Path) -> ir.Model:
    proto = _parsed(path)
    refuse_unsupported(path, proto)
    try:
        return ir.from_proto(proto)
    except MemoryError:
        raise
    except Exception as error:  # onnx_ir wraps whatever happens into classes of its own
        text = f"{path} is not a valid ONNX model: {_innermost(error)}."
        raise OnnxFileError(text, "Export it again.", code="invalid-onnx") from error


def _parsed(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        text = f"{path} can't be read: it is a folder."
        raise OnnxFileError(text, "Name the file in it.", code="is-a-folder")
    try:
        proto = read_graph(path)
    except FileNotFoundError:
        raise OnnxFileError(f"The ONNX file {path} does not exist.", code="file-missing") from None
    except (UnsafeInputError, MemoryError):
        raise
    except OSError as error:
        raise OnnxFileError(f"{path} can't be read: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's own classes
        raise _incomplete(path, _innermost(error)) from error
    if not proto.ir_version or not proto.graph.node or not proto.graph.output:
        raise _incomplete(path, "it holds no graph")
    return proto


def _incomplete(path: Path, reason: str) -> OnnxFileError:
    text = f"{path} is not a complete ONNX file ({reason})."
    gguf = f"A GGUF file is llama.cpp:{path} in compare, and is cut by depthcut gguf."
    return OnnxFileError(text, gguf if path.suffix == ".gguf" else AGAIN, code="incomplete-onnx")


def _innermost(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor of a model that lies in a data file: initializers, then attributes."""
    yield from _external_initializers(model)
    for _, attribute in _external_attributes(model):
        yield attribute.value


def data_files(model: ir.Model) -> list[Path]:
    """The data files that a model's weights lie in, sorted."""
    return sorted(map(Path, {tensor.path for tensor in external_tensors(model)}))


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.initializers.values()


def _external_initializers(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def _external_attributes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    for node in model.graph.all_nodes():
        if node.attributes:
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ir.ExternalTensor):
                    yield node, attribute


def _inline(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """The same tensor in memory; the file is read here, since onnx refuses hard links."""
    proto = onnx.TensorProto(
        name=tensor.name or "",
        data_type=tensor.dtype.value,
        dims=tensor.shape.numpy(),
        raw_data=read_bytes(tensor),
    )
    return ir.serde.deserialize_tensor(proto)


def save_model(model: ir.Model, path: Path, weights: Weights = "compact") -> None:
    """Writes a model, whole or not at all.

    Args:
        model: The model; it is unchanged. Its data files must still be there.
        path: The ONNX file to write. An earlier one is replaced.
        weights: ``compact`` writes ``<name>.<hash>.data`` beside it with the weights that this
            model uses, copied in pieces; ``share`` points into the data files that the weights lie
            in already, which must be in the folder of ``path``. Weights that are made anew (an
            ``onnx_ir.LazyTensor``) go into the graph, or if they are large into such a file.

    Raises:
        OnnxFileError: ``share`` is asked for in another folder, the new files would overwrite
            what the weights come from or what another model reads, or the disk is full.
    """
    refuse_collision(model, path, weights)
    try:
        with staging(path) as stage:
            written = write_files(model, stage.folder, path.name, weights)
            moves = [(file, path.parent / file.name) for file in written]
            stage.place(moves, stale_data(path, written, data_files(model)))
    except OSError as error:
        raise write_error(path, error) from error


def refuse_collision(model: ir.Model, path: Path, weights: Weights) -> None:
    """Refuses to write where weights stand that someone needs, or to share across folders."""
    _refuse_foreign(path)
    if weights == "compact":
        return
    for source in data_files(model):
        if real(source.parent) != real(path.parent):
            raise OnnxFileError(
                f"Weights can only be shared within one folder: {source.name} lies in "
                f"{source.parent}, the result would stand in {path.parent}.",
                "Write the result beside the source, or use --weights compact.",
                code="other-folder",
            )
        if leaves_folder(source):
            raise OnnxFileError(
                f"{source} is a link that leaves its folder, as in a Hugging Face cache: no "
                "runtime would follow it from the result.",
                "Write the result to a folder of its own with --weights compact.",
                code="weights-linked",
            )


def _refuse_foreign(path: Path) -> None:
    reader = other_reader(path, path) if path.is_file() else None
    if reader is not None:
        raise OnnxFileError(
            f"{path} holds weights of {reader.name}, which a new file would spoil.",
            "Write the result under another name, or remove that model first.",
            code="weights-in-use",
        )


def stale_data(path: Path, written: Iterable[Path], still_read: Iterable[Path] = ()) -> list[Path]:
    """The data files of an earlier result that nothing needs once a new one takes its place."""
    new, still_read = {file.name for file in written}, list(still_read)
    return [
        data
        for data in own_data(path)
        if data.name not in new
        and path.is_file()
        and reads(path, data)
        and not any(_same_file(data, source) for source in still_read)
        and not other_reader(data, path)
    ]


def own_data(path: Path) -> list[Path]:
    """The data files beside an ONNX file whose names say that depthcut wrote them for it."""
    named = re.compile(re.escape(path.name) + rf"(\.[0-9a-f]{{{_HASH_LETTERS}}})?\.data")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(file for file in beside if named.fullmatch(file.name) and file.is_file())


def data_name(name: str, sha256: str) -> str:
    """What the weights of an ONNX file are named that depthcut writes: by what is in them.

    So no graph can meet weights that it wasn't written for, wherever a write or a copy of the two
    was cut off.
    """
    return f"{name}.{sha256[:_HASH_LETTERS]}.data"


def write_error(path: Path, error: OSError) -> OnnxFileError:
    """What went wrong while a model was written, in one line."""
    reason = error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    text = f"{path} can't be written: {reason}. Nothing was left behind."
    hint = "Free some space, or choose another place." if full else "Choose another place."
    return OnnxFileError(text, hint, code="write-failed")


def write_files(
    model: ir.Model,
    folder: Path,
    name: str,
    weights: Weights,
    *,
    inline_bytes: int | None = None,  # None: 1024
    # is told of each piece of the weights how many bytes were written
    told: Callable[[int], None] | None = None,
) -> list[Path]:
    """Writes a model's files into a folder, not yet safe from interruption."""
    graph_file, inline = folder / name, _INLINE_BYTES if inline_bytes is None else inline_bytes
    moved = [*(_initializers(model) if weights == "compact" else _large(model))]
    weight_file = folder / f"{name}.data"
    with WeightWriter(weight_file, told=told) as writer:
        replaced = {value: _rehoused(value, writer, inline) for value in moved}
    if not writer.size:
        weight_file.unlink()
        graph_file.write_bytes(_serialised_with(model, replaced.items()))
        return [graph_file]
    named = weight_file.rename(folder / data_name(name, content_sha256(weight_file)))
    placed = {value: _at(tensor, named, writer.path) for value, tensor in replaced.items()}
    graph_file.write_bytes(_serialised_with(model, placed.items()))
    return [named, graph_file]


def _at(tensor: ir.TensorProtocol | None, named: Path, before: Path) -> ir.TensorProtocol | None:
    """The tensor in the file that has its name now, where it lies in that file."""
    if not isinstance(tensor, ir.ExternalTensor) or Path(tensor.path) != before:
        return tensor
    return ir.ExternalTensor(
        location=named.name,
        offset=tensor.offset,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        base_dir=named.parent,
    )


def weight_bytes(model: ir.Model) -> int:
    """How many bytes a model's weights take."""
    sizes = (v.const_value.nbytes for v in _initializers(model) if v.const_value is not None)
    return sum(sizes)


def _large(model: ir.Model) -> list[ir.Value]:
    """The new weights, which lie in no file yet, if they are too large for the graph's own."""
    new = [v for v in _initializers(model) if isinstance(v.const_value, ir.LazyTensor)]
    size = sum(value.const_value.nbytes for value in new if value.const_value is not None)
    return new if size > _MOST_INLINE_BYTES else []


def _rehoused(value: ir.Value, writer: WeightWriter, inline_bytes: int) -> ir.TensorProtocol | None:
    """Where an initializer's content stands in the new files: in the graph if it is small."""
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return tensor
    if tensor.nbytes > inline_bytes:
        return writer.add(tensor)
    if isinstance(tensor, ir.LazyTensor):  # here, so that its own errors come through
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    return _inline(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor


def _serialised_with(
    model: ir.Model, replaced: Iterable[tuple[ir.Value, ir.TensorProtocol | None]]
) -> bytes:
    """The model's bytes with other tensors in its initializers; the model itself stays."""
    before = [(value, value.const_value) for value, _ in replaced]
    try:
        for value, tensor in replaced:
            value.const_value = tensor
        return _serialised(model)
    finally:
        for value, original in before:
            value.const_value = original


def _serialised(model: ir.Model) -> bytes:
    try:
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return data
    except Exception as error:  # protobuf's own classes
        raise OnnxFileError(
            f"The graph can't be serialised: {_innermost(error)}.",
            "Inside an ONNX file weights may take 2 GB at most: if they are more, use "
            "--weights compact. Otherwise export the model again.",
        ) from error


def runtime_form(model: ir.Model, folder: Path) -> tuple[bytes, Path]:
    """A model as ONNX Runtime takes it from memory: it follows no link that leaves the folder.

    The bytes, and the folder that their locations start from.
    """
    files = [file for file in data_files(model) if file.exists()]  # others are given by hand
    if not any(map(leaves_folder, files)):
        return _serialised(model), folder
    root = common_folder(files)
    placed = [
        (value, _placed(value.const_value, root))
        for value in _initializers(model)
        if isinstance(value.const_value, ir.ExternalTensor)
        and Path(value.const_value.path) in files
    ]
    return _serialised_with(model, placed), root


def _placed(tensor: ir.ExternalTensor, root: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location=real(Path(tensor.path)).relative_to(root).as_posix(),
        offset=tensor.offset,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
    )


def _same_file(one: Path, other: Path) -> bool:
    return real(one) == real(other) or (one.exists() and one.samefile(other))

"""Values of ONNX Runtime: arrays where the model runs, and bindings to them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 from its import on
import numpy as np
import onnx

from exporter.engines.runners.base import Array

_BFLOAT16 = onnx.TensorProto.BFLOAT16


def device_value(values: Any, array: Array, device: str) -> Any:
    """An array as a value on a device; on the CPU it lies over the array's own memory.

    Args:
        values: ONNX Runtime's class ``OrtValue``.
        array: A contiguous one.
        device: As ONNX Runtime calls it.
    """
    if array.dtype != np.dtype("bfloat16"):
        return values.ortvalue_from_numpy(array, device)
    if device == "cpu":
        return values.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return bfloat16_copy(values, array, device)


def bfloat16_copy(values: Any, array: Array, device: str) -> Any:
    """A copy of a bfloat16 array on a device; ``ortvalue_from_numpy`` takes numpy's types alone."""
    value = values.ortvalue_from_shape_and_type(array.shape, _BFLOAT16, device)
    value.update_inplace(array.view(np.uint16))  # it copies bytes
    return value


def host_array(value: Any) -> Array:
    """A value's content; a bfloat16 one must lie on the host, since ``OrtValue.numpy`` lacks it."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(words, np.uint16).reshape(shape).view("bfloat16")


@dataclass(frozen=True)
class BoundInputs:
    """A binding with the arrays whose memory it borrows for as long as it is used.

    Attributes:
        binding: Of inputs, and of outputs once it is settled.
        values: What the inputs are bound to.
        arrays: The memory of values on the CPU.
    """

    binding: Any
    values: dict[str, Any]
    arrays: list[Array]

    def add(self, name: str, value: Any, array: Array) -> None:
        """Binds one more input."""
        self.values[name] = value
        self.arrays.append(array)
        self.binding.bind_ortvalue_input(name, value)

    def settle(
        self, session: Any, outputs: Sequence[str], shared: Mapping[str, str], device: str
    ) -> None:
        """Runs once; the outputs' buffers are then those of all later runs."""
        for name in outputs:
            if name in shared:
                self.binding.bind_ortvalue_output(name, self.values[shared[name]])
            else:
                self.binding.bind_output(name, device)
        session.run_with_iobinding(self.binding)
        for name, value in zip(outputs, self.binding.get_outputs(), strict=True):
            self.binding.bind_ortvalue_output(name, value)

"""A disk that is full while a library writes. A limit on file sizes stands in for it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import ExportError
from exporter.files import telling_full_disk
from tests.reading import names_in

ROOT = Path(__file__).parents[2]
# Only a child is limited: this process has reports of its own to write.
LIMITED = """
import resource, signal, sys
from pathlib import Path

sys.path.insert(0, {root!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({folder!r})

def limited(write, most_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    try:
        write()
    except OSError as error:
        cause = type(error.__cause__).__name__
        print(error.errno, error.strerror, error.filename, cause, sep="|")
    else:
        print("written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def told_by(code: str, folder: Path) -> list[str]:
    """The lines that a child prints, which runs ``code`` with ``limited`` and ``folder``."""
    script = LIMITED.format(root=str(ROOT), folder=str(folder)) + code
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_an_onnx_model_that_does_not_fit(tmp_path: Path) -> None:
    code = """
import numpy as np, onnx_ir as ir
from exporter.export.onnx_output import save_onnx
from tests.exporter.export.test_onnx_output import model

big = model(1.0)
big.graph.initializers["w"].const_value = ir.tensor(np.zeros(250_000, np.float32), name="w")
limited(lambda: save_onnx(big, folder), 25_000)
limited(lambda: save_onnx(big, folder), 50)
limited(lambda: save_onnx(big, folder), 2_000_000)
"""
    short, limit, fits = told_by(code, tmp_path)
    # The limit stands for a full disk here, and the system tells it by its own number.
    assert short == limit == f"{errno.EFBIG}|File too large|{tmp_path}|OSError"
    assert fits == "written"
    assert names_in(tmp_path) == ["model.onnx", "model.onnx.*.data"]


@pytest.mark.torch
def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    code = """
from tests.tiny_models import tiny_loaded, tiny_tokenizer
from exporter.models.loading.model_files import save_checkpoint, save_pretrained_files

loaded = tiny_loaded("llama", tiny_tokenizer())
limited(lambda: save_pretrained_files(loaded, folder), 100)
limited(lambda: save_pretrained_files(loaded, folder), 2_000)
limited(lambda: save_checkpoint(loaded, folder), 5_000)
limited(lambda: save_checkpoint(loaded, folder), 2_000_000)
"""
    *result, fits = told_by(code, tmp_path)
    one_line = f"{errno.EFBIG}|File too large|{tmp_path}"
    assert result == [f"{one_line}|{name}" for name in ("OSError", "Exception", "SafetensorError")]
    assert fits == "written"


@pytest.mark.torch
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_tokenizer_on_a_full_device(tmp_path: Path) -> None:
    from exporter.models.loading.model_files import save_pretrained_files
    from tests.tiny_models import tiny_loaded, tiny_tokenizer

    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="Errno 28") as caught:
        save_pretrained_files(tiny_loaded("llama", tiny_tokenizer()), tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


@pytest.mark.optimum
def test_optimum_on_a_full_disk(tmp_path: Path) -> None:
    code = """
from tests.tiny_models import family_loaded
from exporter.export.forms.portable import export_with_optimum
from exporter.files import scratch_folder

loaded = family_loaded("llama")
size = sum(p.numel() * 4 for p in loaded.model.parameters())
limited(lambda: export_with_optimum(loaded, folder), size // 2)
# The checkpoint fits; optimum's graph does not, which carries its operators as well.
limited(lambda: export_with_optimum(loaded, folder), size + 10_000)
with scratch_folder("test") as place:
    print(place.parent)
"""
    *result, place = told_by(code, tmp_path)
    one_line = f"{errno.EFBIG}|File too large|{place}"
    assert result == [f"{one_line}|OSError", f"{one_line}|ExportError"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_what_a_full_disk_is_wrapped_in_does_not_hide_it(tmp_path: Path, error: Exception) -> None:
    wrapped = ExportError("optimum can't export this.")
    wrapped.__cause__ = error
    with pytest.raises(OSError, match=str(tmp_path)) as caught, telling_full_disk(tmp_path):
        raise wrapped
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "a"),
        RuntimeError("Not a directory (os error 20)"),
        ValueError("9 requested and 3 written"),
        KeyboardInterrupt(),
        MemoryError(),
    ],
)
def test_other_errors_pass_as_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, telling_full_disk(tmp_path):
        raise error
    assert caught.value is error

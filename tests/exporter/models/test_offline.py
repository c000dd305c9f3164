"""With the hub off no request leaves the process, whatever was asked of the hub before."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, sys
calls = []
sys.addaudithook(lambda event, args: event == "socket.connect" and calls.append(event))
import huggingface_hub, huggingface_hub.constants as constants
from exporter.models.loading.model_class import hub_off
from transformers.utils import hub

def ask():
    before = len(calls)
    try:
        huggingface_hub.HfApi().model_info("owner/name", timeout=2)
    except Exception as error:
        pass
    return len(calls) - before

def state():
    flags = [constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_IMPLICIT_TOKEN]
    return [*flags, getattr(hub, "_is_offline_mode", False), "HF_HUB_OFFLINE" in os.environ]

first = state()
online = ask()
with hub_off():
    with hub_off():
        off = [ask()]
    off.append(ask())  # the inner block has not switched it on again
    inside = state()
print(online > 0, off, ask() > 0, state() == first, all(inside[:2]), inside[-1])
"""


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("5", marks=pytest.mark.torch),
        pytest.param("4.57", marks=pytest.mark.optimum),
    ],
)
def test_the_hub_is_off_in_the_block_and_only_there(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120,
        # Nobody listens there, so asking is a connection that is refused at once.
        env={"PATH": "/usr/bin", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x"},
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == "True [0, 0] True True True True", done.stderr

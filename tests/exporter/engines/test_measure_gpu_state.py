"""What nvidia-smi answers."""

from __future__ import annotations

import pytest

from exporter.engines.environment import GpuClocks, parse_clocks


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1980, 41, 0x0000000000000000\n", GpuClocks(1980, 41, False)),
        ("345, 33, 0x0000000000000001\n", GpuClocks(345, 33, False)),  # idle
        ("1200, 87, 0x0000000000000020\n", GpuClocks(1200, 87, True)),
        ("[N/A], 41, [N/A]\n", GpuClocks(None, 41, None)),
        ("no devices were found\n", None),
    ],
)
def test_clocks_are_read(line: str, found: GpuClocks | None) -> None:
    assert parse_clocks(line.strip()) == found

"""How far cut graphs of every architecture are from PyTorch with the same modules silenced."""

from __future__ import annotations

import sys

from tests.architectures.command import main

if __name__ == "__main__":
    sys.exit(main(["--fresh", *sys.argv[1:]]))

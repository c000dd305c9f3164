"""How far cut graphs of every architecture are from PyTorch with the same modules silenced.

Run it with ``python -m tests.benchmarks architectures``. Tiny random models of every entry
of ``tests/architectures/catalogue.py`` are exported; over a thousand random sets of sublayers, the
same in every run, are cut out of them, beside every sublayer alone. It prints the worst relative
error and the number of wrong models, and fails when there is one. Half an hour.
"""

from __future__ import annotations

import sys

from tests.architectures.command import main

if __name__ == "__main__":
    sys.exit(main(["--fresh", *sys.argv[1:]]))

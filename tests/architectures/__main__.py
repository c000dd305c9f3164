"""Runs the catalogue: ``python -m tests.architectures [NAME ...] [--write FILE]``."""

import sys

from tests.architectures.command import main

sys.exit(main())

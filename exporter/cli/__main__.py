"""``python -m exporter.cli``: the ``depthcut`` command without its script."""

from exporter.cli import main

main()

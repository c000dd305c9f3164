"""A plan carried out on a Hugging Face model: a folder that is smaller by what was dropped.

Importing this costs no PyTorch.
"""

from exporter.checkpoint.facts import CheckpointFacts
from exporter.checkpoint.write import write_checkpoint

__all__ = ["CheckpointFacts", "write_checkpoint"]

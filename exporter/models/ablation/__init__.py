"""What becomes of a model's answers when branches are skipped or replaced, measured in PyTorch.

Importing this costs no PyTorch.
"""

from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import DamageMeter
from exporter.models.ablation.substitutes import NOTHING, Cut, Substitute, cut_of, substituted

__all__ = ["NOTHING", "Cut", "Damage", "DamageMeter", "Substitute", "cut_of", "substituted"]

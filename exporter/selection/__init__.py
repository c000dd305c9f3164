"""Chooses what to drop by what becomes of the model's answers. Importing this costs no PyTorch."""

from exporter.selection.choosing import choose
from exporter.selection.evolution import evolve
from exporter.selection.greedy import greedy
from exporter.selection.iterative import iterative
from exporter.selection.meters import MakeMeter, Meter, RememberingMeter
from exporter.selection.options import (
    Name,
    Objective,
    Option,
    Step,
    chosen,
    cut_of_options,
    objective_of,
    options_for,
)
from exporter.selection.protection import protected_names
from exporter.selection.search_options import Search, SearchOptions

__all__ = [
    "MakeMeter",
    "Meter",
    "Name",
    "Objective",
    "Option",
    "RememberingMeter",
    "Search",
    "SearchOptions",
    "Step",
    "choose",
    "chosen",
    "cut_of_options",
    "evolve",
    "greedy",
    "iterative",
    "objective_of",
    "options_for",
    "protected_names",
]

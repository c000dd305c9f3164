"""Chooses what to drop by what becomes of the model's answers. Importing this costs no PyTorch."""

from exporter.choose.selection.by_scores import iterative
from exporter.choose.selection.evolution import evolve
from exporter.choose.selection.greedy import greedy
from exporter.choose.selection.meters import MakeMeter, Meter, RememberingMeter
from exporter.choose.selection.options import (
    Objective,
    Option,
    Step,
    chosen,
    cut_of_options,
    objective_of,
    options_for,
    protected_names,
)
from exporter.choose.selection.search_options import Search, SearchOptions

__all__ = [
    "MakeMeter",
    "Meter",
    "Objective",
    "Option",
    "RememberingMeter",
    "Search",
    "SearchOptions",
    "Step",
    "chosen",
    "cut_of_options",
    "evolve",
    "greedy",
    "iterative",
    "objective_of",
    "options_for",
    "protected_names",
]

"""Plans: made from scores, read from others' configurations, loaded with their replacements.

In go scores, ``--drop`` texts and files, out come :class:`~exporter.artifacts.PruningPlan` and
:class:`~exporter.artifacts.plans.loaded.LoadedPlan`.
"""

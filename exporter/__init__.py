"""Everything that has a model, an engine or a measurement in its hands."""

__version__ = "0.1.0"

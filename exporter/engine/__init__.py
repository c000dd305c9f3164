"""TensorRT and TensorRT-RTX engines: checked, built, described, and loaded only where they fit.

Both libraries have one Python API; they are told apart in :mod:`exporter.engine.flavours` alone.
Neither raises: each None or False that they return becomes an error here. All that runs inside
them runs in a process of its own, since a crash there is no exception.
"""

"""TensorRT and TensorRT-RTX engines: checked, built, described, and loaded only where they fit.

Both libraries have one Python API; they are told apart in
:mod:`exporter.engines.build.libraries` alone. Neither raises: each None or False that they return
becomes an error here. A crash in them is no exception: so they build in a process of their own, and
an engine is run in one before it is run here.
"""

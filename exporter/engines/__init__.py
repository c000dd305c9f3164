"""Engines: build, load, run, decode, package."""

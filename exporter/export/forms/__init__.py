"""A graph written for the runtime that will run it: by which exporter, with which passes after."""

"""Holds engines against ONNX Runtime by Polygraphy, and finds where they begin to differ."""

"""What a model's sublayers cost: parameters, bytes, and milliseconds on an engine, as measured.

Importing this costs neither PyTorch nor a runtime.
"""

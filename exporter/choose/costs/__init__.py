"""What a model's sublayers cost: parameters, bytes, and milliseconds on an engine, as measured."""

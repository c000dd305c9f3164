"""Scores of models larger than memory: a layer's weights at a time, the whole text through each."""

"""MaxTrain: train a language model from a YAML file, on a laptop's CPU first and on pods with the same code."""

__version__ = "0.1.0"

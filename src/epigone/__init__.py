"""Epigone: language models that teach language models, generation after generation."""

__version__ = "0.1.0"

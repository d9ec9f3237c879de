"""Étude: published techniques for language models, run side by side on your own checkpoint and text."""

__version__ = "0.1.0"

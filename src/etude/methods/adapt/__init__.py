"""Adapting a model to new text."""

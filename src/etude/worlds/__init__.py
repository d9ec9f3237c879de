"""Data and models that are always at hand, with no download."""

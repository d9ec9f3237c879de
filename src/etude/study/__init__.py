"""From recipe to plan to results."""

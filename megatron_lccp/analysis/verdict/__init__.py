"""From signals to saturated, improving or undecided."""

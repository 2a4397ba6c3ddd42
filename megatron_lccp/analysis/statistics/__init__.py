"""Correlations, intervals, trends, laws and rankings, over samples and checkpoints."""

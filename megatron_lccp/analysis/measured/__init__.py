"""One file for each thing measured: its frames, figures, tables, highlights and signals."""

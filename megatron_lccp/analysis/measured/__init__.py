"""One file for each thing measured: its frames, figures, tables, facts and signals."""

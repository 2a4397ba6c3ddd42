"""Documents -> tokens on disk (`prepare`), tokens -> batches (`loader`), held-out tokens -> needle samples (`needles`)."""

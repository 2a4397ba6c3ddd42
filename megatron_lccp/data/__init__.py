"""Documents -> tokens on disk (`prepare`) -> batches (`loader`), and held-out tokens -> needle samples (`needles`)."""

"""How a model is measured: the window, prefills that many cells share, head scores."""

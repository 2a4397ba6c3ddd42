"""Training: the loop (`loop`), one step (`step`), optimizer and learning rate (`optimizer`), checkpoints
(`checkpoint`), and the window in which monitors measure (`window`)."""

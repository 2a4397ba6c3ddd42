"""What a command does once its line is parsed: train, measure, and where results go."""

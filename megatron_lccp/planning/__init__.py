"""What a run would take, before it starts: memory, FLOPs, monitors, and one step without a GPU."""

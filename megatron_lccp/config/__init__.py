"""What a run is: frozen dataclasses (`tree`), how a YAML file becomes one (`load`), what contradicts (`rules`)."""

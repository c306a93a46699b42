"""The training process: real models, real data, one row per step, joined to the run's barrier."""

"""The training loop, and what it works with: models, tasks, checkpoints, processes, devices."""

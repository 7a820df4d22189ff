"""What has to run on a GPU, as one command of at most ten minutes: `make gpu` (docs/how-to/gpu.md)."""

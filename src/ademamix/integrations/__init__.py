"""One small file per tool, imported by nobody else."""

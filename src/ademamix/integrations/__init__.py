"""The optimizers in the tools that people train with: one file per tool, imported only by its users."""

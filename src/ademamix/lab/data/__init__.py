"""Text and images to files, and files to batches."""

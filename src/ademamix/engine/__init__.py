"""From tensors to launches of a backend. Read `optimizer.py` first; what it calls lies below it, never above."""

"""What makes clipo.py fast, and what keeps a run alive. To read the method you need nothing of it."""

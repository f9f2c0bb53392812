"""What makes clipo.py fast and safe, and tells what a run does. To read the method you need nothing of it."""

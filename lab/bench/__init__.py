"""Tables of speed for `python -m lab.bench` and `lab.gpu`, a file each; they share `load.py` and `machine.py`."""

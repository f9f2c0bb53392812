"""Four attacks on what CLIPO promises. Each prints a line of figures and ends with status 1 where it succeeds.

python -m lab.attack bits        the same seed twice, on several threads: does a single bit differ?
python -m lab.attack grader      wrong answers made from every gold answer, one answer for all, a busy machine
python -m lab.attack signals     Ctrl-C at every moment of a run: is anything lost or broken?
python -m lab.attack mistakes    files and options that are wrong: does each get one clear line?
python -m lab.attack NAME --quick    in short; `python -m lab.attack NAME --help` lists what else it takes
"""

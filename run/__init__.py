"""A run, from its options to its page. In the order in which `python train.py` comes to the files:

    both.py         no options: two runs, GRPO and then CLIPO from the same start, each into its folder under runs/
    settings.py     options -> what a run computes, and the name of its folder
    folder.py       the folder: one process holds it; a state is saved there, and a run goes on from it
    warm_start.py   on the toy world the start is made, once, by supervised training; models.py opens it on a device
    log.py          what is said before the first step, and after each (the steps are train.train's)
    table.py        at the end, of two runs after the second: the levels, what to see in them; intervals.py: how sure
    page.py         the page of a run, or of two

stopping.py: at Ctrl-C the step, or the warm start's batch, is finished and saved, and the way to go on is said; the
second time all stops at once. eval.py has evaluation.py (which questions, decoded how) and scores.py (its tables),
tsne.py has points.py.
"""

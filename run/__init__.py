"""A run, from its options to its page. In the order in which `python train.py` comes to the files:

    both.py         no options: two runs, GRPO and then CLIPO from the same start; the second one makes the table
    settings.py     options -> what a run computes, and the name of its folder
    folder.py       the folder: one process holds it, a state is saved there, a run goes on from it
    models.py       a model is opened, on a device
    warm_start.py   ... on the toy world after supervised training, made once and kept
    log.py          what is said before the first step, and after each
    stopping.py     Ctrl-C: what is at work is finished and saved; the second time it stops at once
    table.py        at the end of a toy run: its levels, and what to see in them; intervals.py: how sure that is
    page.py         the page of a run, or of two

eval.py has evaluation.py (which questions, decoded how) and scores.py (its tables); tsne.py has points.py.
"""

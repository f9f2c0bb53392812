"""What is asked, and how an answer is judged.

A *task* is what a run trains on. `toy.ToyTask` makes new stories for each step, from the seed and the step's number;
`data.DataTask` gives step s the s-th slice of a data set, shuffled anew in each epoch. Both have
    problems(step), more(step)     the P problems of a step; further ones, without end, for DAPO's resampling
    prompt(problem)                its token ids
    are_correct(texts, problems)   the verifiable reward (grading.py)
    measure(scored)                what else it knows of a step, for its line in metrics.jsonl
    remarks(problem, text)         what else it knows of a response, for the page
"""

"""What is asked, and how an answer is judged.

A *task* (`toy.ToyTask`, `data.DataTask`) is what a run trains on. It has
    problems(step), more(step)     the P problems of a step; further ones, without end
    prompt(problem)                its token ids
    are_correct(texts, problems)   the verifiable reward
    measure(scored), remarks(problem, text)   what else it knows: of a step, for the log; of a response, for the page
"""

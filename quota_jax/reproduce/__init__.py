"""The paper's tables and figures on any model and benchmarks, all methods in this one stack.

`study` makes checkpoints and runs benchmarks, each once, whoever asks for it; `tables` says which
rows a table has, `paper` what the paper reports, `report` how both are written side by side.
`earlier` lets a table go on from one that was written before, `credits` keeps what each question
earned, and `collect` puts both together. `deployment` measures memory and power (Table 7),
`kept_figure` draws Fig. 4, `pareto` sets accuracy beside speed.
"""

"""From a model to scores: needle tests, LongBench-Chat, judges, and the statistics that say how far to trust them.

`needles` invents facts to hide, `needle` hides them and runs the grid, `generate` answers greedily with one kept cache,
`longbench_chat` asks long questions, `judge` rates the answers, `stats` puts intervals around all of it.
"""

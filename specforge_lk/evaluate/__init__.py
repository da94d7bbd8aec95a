"""What a draft is worth: τ and acceptance rates, on held-out responses and on benchmarks.

`runner` measures drafts as `settings` say: with `held_out`, whose rules of acceptance are in
`acceptance`, and with `benchmarks`. What it finds is a `report`, shown by `tables`, `chart` and
`render`; `published` has the paper's figures.

A further way to draft or to verify is a rule in `acceptance` with a name in `settings`. A further
figure is computed in ``figures`` of `held_out` or in `benchmarks`, is a field of `report.Result`,
and a column in `tables`.
"""

"""``make gains``: what a draft of SmolLM2-135M-Instruct gains by what it is trained with.

`plan` says what is trained, `measure` measures it, `results` keeps a row of every draft in the
repository, and `report` draws the report from the rows alone.
"""

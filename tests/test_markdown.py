"""Markdown tables, in both forms that committed pages have."""

from specforge_lk.markdown import markdown_table


def test_forms():
    rows = [["a", "1", ""], ["b", "2", "x"]]
    assert markdown_table(["", "n", ""], rows).splitlines() == [
        "|  | n |  |",
        "| --- | --- | --- |",
        "| a | 1 |  |",
        "| b | 2 | x |",
    ]
    tight = markdown_table(["", "n", ""], iter(rows), tight=True).splitlines()
    assert tight == ["| | n | |", "|---|---|---|", "| a | 1 |  |", "| b | 2 | x |"]

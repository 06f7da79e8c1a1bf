from __future__ import annotations

from family_table import make_table, table_in_docs


def test_the_docs_show_the_table_that_the_tests_run_over() -> None:
    assert table_in_docs() == make_table(), "run: python tests/family_table.py --write"

from longspan.launch.table import Column, table


def test_numbers_stand_to_the_right_and_words_to_the_left():
    rows = [("name", "size"), ("weights", "1,024.5 MiB"), ("loss", "3 MiB"), ("other", "none")]
    assert table(rows).splitlines() == [
        "name     size",
        "weights  1,024.5 MiB",
        "loss           3 MiB",
        "other    none",
    ]


def test_columns_may_be_wider_and_stand_otherwise():
    columns = [Column("right", 6), Column("left")]
    rows = [("a", "12", "3"), ("bcd", "4", "56")]
    assert table(rows, columns).splitlines() == ["     a  12   3", "   bcd  4   56"]


def test_the_text_at_the_end_of_a_shorter_row_runs_over_the_columns_after_it():
    rows = [("length", "ms", "MiB"), ("1", "skipped: too long to be measured"), ("2", "3", "4")]
    assert table(rows).splitlines() == [
        "length  ms  MiB",
        "     1  skipped: too long to be measured",
        "     2   3    4",
    ]

from longspan.launch.table import Column, table


def test_numbers_are_aligned_right_and_words_left():
    rows = [("name", "size"), ("weights", "1,024.5 MiB"), ("loss", "3 MiB"), ("other", "none")]
    assert table(rows).splitlines() == [
        "name     size",
        "weights  1,024.5 MiB",
        "loss           3 MiB",
        "other    none",
    ]


def test_columns_may_set_width_and_alignment():
    columns = [Column("right", 6), Column("left")]
    rows = [("a", "12", "3"), ("bcd", "4", "56")]
    assert table(rows, columns).splitlines() == ["     a  12   3", "   bcd  4   56"]


def test_the_last_text_of_a_short_row_spans_the_remaining_columns():
    rows = [("length", "ms", "MiB"), ("1", "skipped: too long to be measured"), ("2", "3", "4")]
    assert table(rows).splitlines() == [
        "length  ms  MiB",
        "     1  skipped: too long to be measured",
        "     2   3    4",
    ]

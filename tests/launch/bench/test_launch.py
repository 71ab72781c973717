"""``longspan bench launch``: a call of attention launches as much for any number of documents."""

import json

import pytest


def test_launches_are_the_same_for_any_number_of_documents(longspan, tmp_path):
    options = ["--patterns", "S2(64, 16, 16)", "--documents", "1", "1000", "--repeats", "2"]
    completed = longspan("bench", "launch", *options, "--out", tmp_path)
    assert completed.returncode == 0, completed.stderr
    one, many = json.loads((tmp_path / "launch.json").read_text())["rows"]
    # Forward, delta, dQ, dK and dV of the band and of the stripes, and the sums of these.
    assert one["triton_launches"] == many["triton_launches"] == 7
    assert one["torch_operations"] == many["torch_operations"] <= 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--documents", "1001"], "--documents: must be 1 to 1000, got 1001"),
        (["--kv-heads", "3"], "--kv-heads: 3 does not divide --heads 8"),
        (["--patterns", "Banana()"], "Banana"),
    ],
)
def test_requests_that_make_no_sense_are_refused(longspan, options, message):
    completed = longspan("bench", "launch", *options)
    assert completed.returncode == 2
    assert message in completed.stderr

"""``longspan eval loss``: held-out loss by position in the context."""

import argparse

from ..options import add_evaluated_text, numbers
from ..table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the held-out loss by position in the context, over documents that are long enough "
        "for all of it."
    )
    add_evaluated_text(parser)
    parser.add_argument(
        "--documents", type=int, default=64, help="most documents of each length (default 64)"
    )


def run(options: argparse.Namespace) -> None:
    from ..evaluation import (
        inference_engine,
        open_corpus,
        open_run,
        save_evaluation,
        trained_length,
    )

    folder = open_run(options, "loss")
    lengths = sorted(numbers("--lengths", options.lengths)) if options.lengths else None

    # Import torch, which is not needed to report what is checked so far.
    from ...trainer.evaluation.plots import plot_position_loss
    from ...trainer.evaluation.position_loss import choose_documents, choose_lengths, position_loss
    from ...trainer.progress import track

    corpus = open_corpus(folder, options.data)
    trained = trained_length(folder)
    documents_by_length = {
        length: choose_documents(corpus, length, options.documents)
        for length in choose_lengths(corpus, lengths, trained)
    }
    num_documents = sum(map(len, documents_by_length.values()))

    ranges = []
    with (
        inference_engine(folder) as engine,
        track("reading", num_documents, of_bytes=False) as advance,
    ):
        for length, documents in documents_by_length.items():
            for result in position_loss(engine, corpus, length, documents, advance):
                ranges.append(
                    {
                        "length": length,
                        "documents": len(documents),
                        "trained": result.stop <= trained,
                        **result._asdict(),
                    }
                )

    print(_table(ranges))
    print(
        "gain: how much more the same tokens cost if the text begins at half the first of these "
        "positions"
    )
    report = {"corpus": corpus.prefix, "trained_length": trained, "ranges": ranges}
    save_evaluation(
        folder, "loss", report, lambda path, title: plot_position_loss(ranges, trained, path, title)
    )


def _table(ranges: list[dict]) -> str:
    lines = [("documents of", "positions", "loss", "gain", "+-", "")]
    for row in ranges:
        notes = []
        if row["start"] == 0:
            notes.append(f"{row['documents']} documents")
        if not row["trained"]:
            notes.append("(longer than trained)")
        lines.append(
            (
                f"{row['length']:,}",
                f"{row['start']:,} .. {row['stop']:,}",
                _number(row["loss"]),
                _number(row["gain"]),
                _number(row["error"]),
                " ".join(notes),
            )
        )
    return table(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

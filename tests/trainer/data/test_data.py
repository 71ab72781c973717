import json
from pathlib import Path

import numpy as np
import pytest
import torch
from longspan.trainer.data import text_files
from longspan.trainer.data.buckets import BucketCorpus, BucketSteps
from longspan.trainer.data.build import build_corpus
from longspan.trainer.data.corpus import Corpus
from longspan.trainer.data.corpus_check import check_corpus
from longspan.trainer.data.corpus_files import read_record
from longspan.trainer.data.mixture import Mixture
from longspan.trainer.data.packing import BestFitCorpus, PackedCorpus
from longspan.trainer.data.tokenizer import ByteTokenizer, load_tokenizer
from longspan.trainer.errors import UserError

END = ByteTokenizer.end_of_document


def test_megatron_reads_our_corpora(corpus, texts):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(corpus)
    assert len(dataset.document_indices) - 1 == len(dataset) == len(texts)
    for text, ids in zip(texts, dataset, strict=True):
        assert ids.tolist() == [*text.encode(), END]
    record = read_record(corpus)
    assert (record.documents, record.bytes) == (len(texts), sum(map(len, texts)))
    assert record.tokens == record.bytes + record.documents


def test_we_read_megatrons_corpora(tmp_path):
    """The corpus has documents of several sequences, an empty one, another dtype and no record."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in ([[1, 2], [3]], [[]], [[4, 5, 6, 7]]):
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    check_corpus(prefix, "bytes", 10)
    ours = Corpus(prefix, 10)
    assert [ours.read(d, 0, int(ours.lengths[d])).tolist() for d in range(len(ours))] == [
        [1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert ours.read(1, 1, 2).tolist() == [5, 6]
    assert ours.bytes_per_token is None


def test_jsonl_and_folders(tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.jsonl").write_text(
        '{"text": "one"}\n{"text": "zwei ü", "id": 2}\n'
    )
    (tmp_path / "in" / "z.txt").write_text("three")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / "__pycache__").mkdir()
    for ignored_file in (".hidden", ".git/config", "__pycache__/z.pyc", "deep/image.png"):
        (tmp_path / "in" / ignored_file).write_bytes(b"no\xff")
    record = build_corpus([tmp_path / "in"], ByteTokenizer(), str(tmp_path / "out"))
    corpus = Corpus(str(tmp_path / "out"), 257)
    texts = [
        ByteTokenizer().decode(corpus.read(d, 0, int(corpus.lengths[d])).tolist())
        for d in range(len(corpus))
    ]
    assert texts == ["one", "zwei ü", "three"]
    assert record.documents == 3
    assert "left out 1 files that are not UTF-8 text" in capsys.readouterr().err


def test_a_hugging_face_tokenizer(tmp_path, texts):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = __import__("tokenizers").decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path / "tokenizer.json"), "--tokenizer")
    assert ours.decode(ours.encode(texts[3].encode())) == texts[3]
    text = tmp_path / "a.txt"
    text.write_text(texts[3])
    record = build_corpus([text], ours, str(tmp_path / "out"))
    assert (record.vocab_size, record.bytes) == (tokenizer.get_vocab_size(), len(texts[3]))
    assert record.tokens < len(texts[3])
    corpus = Corpus(str(tmp_path / "out"), record.vocab_size)
    assert corpus.read(0, record.tokens - 1, 1).tolist() == [tokenizer.token_to_id("<|endoftext|>")]
    with pytest.raises(
        UserError, match=r"was made with tokenizer sha256:.*but data.tokenizer is bytes"
    ):
        check_corpus(str(tmp_path / "out"), "bytes", 1000)
    with pytest.raises(
        UserError, match=r"recorded vocabulary of 300 is larger than model\.vocab_size 299"
    ):
        check_corpus(str(tmp_path / "out"), ours.identity, 299)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no text found in"),
        (
            {"a.jsonl": b'{"text": "x"}\n{"txt": 1}\n'},
            "a.jsonl:2: has no key text; its keys are txt",
        ),
        ({"a.jsonl": b"[1]\n"}, "a.jsonl:1"),
        ({"a.txt": b"caf\xe9"}, "no document found in"),
    ],
)
def test_invalid_text_is_located_and_leaves_no_files(tmp_path, files, message):
    source = tmp_path / "in"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_corpus([source], ByteTokenizer(), str(tmp_path / "out" / "x"))
    assert not list(tmp_path.glob("out/*"))


def test_a_file_given_by_name_must_be_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 text \(byte 3\)"):
        build_corpus([tmp_path / "a.txt"], ByteTokenizer(), str(tmp_path / "out"))


def test_an_existing_corpus_is_not_overwritten(corpus):
    before = Path(f"{corpus}.bin").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        build_corpus([Path(__file__)], ByteTokenizer(), corpus)
    assert Path(f"{corpus}.bin").read_bytes() == before


@pytest.fixture
def damaged(corpus, tmp_path):
    """Return the prefix of a copy of the small corpus, which a test may damage."""
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"copy.{suffix}").write_bytes(Path(f"{corpus}.{suffix}").read_bytes())
    return tmp_path / "copy"


def damage(path, change):
    """Change the content of a file, or remove it if ``change`` is None."""
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("bin", None, "copy.bin: no such file"),
        ("idx", None, "copy.idx: no such file"),
        ("bin", lambda b: b[:-2], r"copy.bin: is \d+ bytes long, but copy.idx describes \d+"),
        ("bin", lambda b: b + b"x", r"copy.bin: is \d+ bytes long"),
        ("idx", lambda b: b[:20], "copy.idx: not an index in Megatron's format, or cut short"),
        ("idx", lambda b: b[:-8], r"copy.idx: is \d+ bytes long, but its header asks for \d+"),
        ("idx", lambda b: b"x" + b[1:], "copy.idx: not an index"),
        ("idx", lambda b: b[:9] + b"\2" + b[10:], "copy.idx: version 2"),
        (
            "idx",
            lambda b: b[:-8] + b"\7" + b[-7:],
            "copy.idx: its documents do not fit its 40 sequences",
        ),
        ("json", lambda b: b[:-9], "copy.json: not JSON"),
        (
            "json",
            lambda b: b.replace(b"257", b"999"),
            "recorded vocabulary of 999 is larger than model.vocab_size 257",
        ),
    ],
)
def test_damaged_files_are_found_before_any_token_is_read(damaged, suffix, change, message):
    check_corpus(str(damaged), "bytes", 257)
    damage(damaged.with_suffix(f".{suffix}"), change)
    with pytest.raises(UserError, match=message):
        check_corpus(str(damaged), "bytes", 257)


def test_a_token_outside_the_vocabulary_is_located(damaged):
    data = damaged.with_suffix(".bin")
    content = bytearray(data.read_bytes())
    content[40:42] = (300).to_bytes(2, "little")
    data.write_bytes(content)
    corpus = Corpus(str(damaged), 257)
    lengths = corpus.lengths.tolist()
    message = (
        r"copy.bin: token id 300 at byte offset 40 \(token 20\) is outside the vocabulary of 257"
    )
    with pytest.raises(UserError, match=message):
        list(map(corpus.read, range(len(corpus)), [0] * len(corpus), lengths))


@pytest.mark.parametrize(("length", "alignment"), [(64, 1), (64, 8), (32, 32), (256, 4)])
def test_packing_holds_every_token_once(corpus, length, alignment, texts):
    packed = PackedCorpus(Corpus(corpus, 257), length, alignment, shuffle_seeds=(7,))
    counted_labels = []
    padding = 0
    for number in range(packed.samples_per_epoch):
        sample = packed.sample(number)
        edges = np.flatnonzero(np.diff(sample.documents, prepend=-1))
        assert (edges % alignment == 0).all()
        assert (np.diff(sample.documents) >= 0).all()
        padding += sample.padding
        for start, stop in zip(edges, [*edges[1:], length], strict=True):
            weights = sample.weights[start:stop]
            num_labels = int(weights.sum()) if weights.any() else 0
            # Labels that count come first, then the last token and padding.
            assert (weights[:num_labels] == 1).all()
            labels = sample.labels[start : start + num_labels]
            next_tokens = sample.tokens[start + 1 : start + num_labels + 1]
            assert (labels[: stop - start - 1] == next_tokens[: stop - start - 1]).all()
            counted_labels.append(labels)
    # Together, the slices of cut documents predict every token of every text but the first.
    predicted = sorted(int(label) for labels in counted_labels for label in labels)
    expected = sorted(byte for text in texts for byte in [*text.encode(), END][1:])
    assert predicted == expected
    assert padding == packed.samples_per_epoch * length - read_record(corpus).tokens
    assert sum(
        int(s.weights.sum()) for s in map(packed.sample, range(packed.samples_per_epoch))
    ) == len(expected)


def test_a_cut_document_continues_in_the_next_sample(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    build_corpus([tmp_path / "a.txt"], ByteTokenizer(), str(tmp_path / "out"))
    packed = PackedCorpus(Corpus(str(tmp_path / "out"), 257), 64, 8, None)
    first = packed.sample(0)
    second = packed.sample(1)
    assert first.tokens.tolist() == list(range(1, 65))
    assert first.labels.tolist() == list(range(2, 66))
    assert first.weights.all()
    assert second.tokens[:37].tolist() == [*range(65, 101), END]
    assert second.labels[:36].tolist() == [*range(66, 101), END]
    assert second.weights.tolist() == [1.0] * 36 + [0.0] * 28
    assert (first.padding, second.padding) == (0, 27)


def test_order_depends_only_on_seed_and_epoch(corpus):
    def stream(order, epochs=2):
        packed = PackedCorpus(Corpus(corpus, 257), 64, 8, order)
        return [packed.sample(n).tokens.tobytes() for n in range(epochs * packed.samples_per_epoch)]

    once = stream((0, 0))
    assert once == stream((0, 0))
    assert once != stream((1, 0))
    half = len(once) // 2
    assert sorted(once[:half]) != once[:half]
    assert once[:half] != once[half:]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(tiny_recipe, replicas):
    from longspan.trainer.data.batches import Batches, BatchShard
    from longspan.trainer.data.prepare import prepare_data
    from longspan.trainer.recipe.file import load_recipe

    recipe = load_recipe(str(tiny_recipe), ["training.global_batch_size=8"])
    data = prepare_data(recipe)
    cpu = torch.device("cpu")
    for step in (0, 5):
        alone = list(Batches(recipe, data, 257, BatchShard(0, 1, 0), cpu).step(step))
        shared = [
            batch
            for rank in range(replicas)
            for batch in Batches(recipe, data, 257, BatchShard(rank, replicas, 0), cpu).step(step)
        ]
        assert len(shared) == 8
        tokens = {batch.tokens.numpy().tobytes() for batch in shared}
        expected_tokens = {batch.tokens.numpy().tobytes() for batch in alone}
        assert tokens == expected_tokens
        assert len(tokens) == 8


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_context_parallel_shards_form_the_batch(tiny_recipe, layout):
    from longspan.trainer.data.batches import Batches, BatchShard
    from longspan.trainer.data.prepare import prepare_data
    from longspan.trainer.recipe.file import load_recipe

    recipe = load_recipe(
        str(tiny_recipe), ["parallel.cp=3", f"parallel.layout={layout}", "launch.processes=3"]
    )
    data = prepare_data(recipe)
    cpu = torch.device("cpu")
    alone = Batches(load_recipe(str(tiny_recipe)), data, 257, BatchShard(0, 1, 0), cpu)
    ranks = [Batches(recipe, data, 257, BatchShard(0, 1, rank), cpu) for rank in range(3)]
    for whole, *shards in zip(alone.step(3), *(batches.step(3) for batches in ranks), strict=True):
        unshard = shards[0].sequence.layout.unshard
        for name in ("tokens", "labels", "weights"):
            assert torch.equal(
                unshard([getattr(shard, name) for shard in shards]), getattr(whole, name)
            )
        positions = unshard([shard.sequence.positions for shard in shards])
        assert torch.equal(positions, whole.sequence.positions)
        assert sum(shard.padding for shard in shards) == whole.padding


def test_the_layout_of_an_epoch_is_computed_once(corpus, monkeypatch):
    laid_out = []
    real = PackedCorpus._lay_end_to_end
    monkeypatch.setattr(
        PackedCorpus,
        "_lay_end_to_end",
        lambda self, epoch: laid_out.append(epoch) or real(self, epoch),
    )
    mixture = Mixture(
        [PackedCorpus(Corpus(corpus, 257), 64, 1, (seed,)) for seed in range(3)], [1.0, 1.0, 1.0]
    )
    for number in range(60):
        mixture.sample(number)
    assert laid_out == [0, 0, 0]


def test_mixture_follows_the_weights(corpus):
    packed = [PackedCorpus(Corpus(corpus, 257), 64, 1, (seed,)) for seed in (0, 1, 2)]
    mixture = Mixture(packed, [6.0, 3.0, 1.0])
    drawn = [mixture.sample(n) for n in range(100)]
    counts = [0, 0, 0]
    for sample in drawn:
        source = next(
            i for i in range(3) if (packed[i].sample(counts[i]).tokens == sample.tokens).all()
        )
        counts[source] += 1
        assert np.abs(np.array(counts) - sum(counts) * np.array([0.6, 0.3, 0.1])).max() <= 1
    assert counts == [60, 30, 10]
    assert (Mixture(packed, [6.0, 3.0, 1.0]).sample(77).tokens == drawn[77].tokens).all()


def test_the_standard_library_corpus_is_built_once(tmp_path, monkeypatch):
    from longspan.trainer.data import stdlib

    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    train, held_out = stdlib.python_stdlib(ByteTokenizer())
    records = [read_record(prefix) for prefix in (train, held_out)]
    assert records[0].bytes > 9_000_000
    assert 0.005 < records[1].bytes / records[0].bytes < 0.1
    monkeypatch.setattr(stdlib, "build_corpus", None)
    assert stdlib.python_stdlib(ByteTokenizer()) == (train, held_out)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names - {"lock"}) == 6
    assert json.loads(Path(f"{train}.json").read_text())["tokenizer"] == "bytes"


def test_training_and_held_out_files_are_disjoint():
    from longspan.trainer.data.stdlib import _source_files

    train = set(_source_files(False))
    held_out = set(_source_files(True))
    assert not train & held_out
    assert not any("test" in path.parts for path in train | held_out)


def test_any_number_of_workers_builds_the_same_corpus(tmp_path, texts, monkeypatch):
    """The sources are a JSONL file read in many chunks, a Parquet file and small text files."""
    import pyarrow as pa
    from pyarrow import parquet

    source = tmp_path / "in"
    source.mkdir()
    lines = [json.dumps({"content": text}) for text in texts]
    (source / "a.jsonl").write_text("\n".join(lines))
    parquet.write_table(pa.table({"content": texts[:30]}), source / "b.parquet", row_group_size=7)
    for n, text in enumerate(texts[:5]):
        (source / f"c{n}.txt").write_text(text)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 100)
    files_by_workers = []
    for workers in (1, 3):
        record = build_corpus(
            [source], ByteTokenizer(), str(tmp_path / f"{workers}"), workers=workers, key="content"
        )
        assert record.documents == len(texts) + 30 + 5
        files_by_workers.append(
            [(tmp_path / f"{workers}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]
        )
    assert files_by_workers[0] == files_by_workers[1]
    corpus = Corpus(str(tmp_path / "1"), 257)
    read = [
        ByteTokenizer().decode(corpus.read(d, 0, int(corpus.lengths[d])).tolist())
        for d in range(len(corpus))
    ]
    assert read == [*texts, *texts[:30], *texts[:5]]


def test_a_bad_line_is_numbered_from_the_start_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 10)
    lines = ['{"text": "one"}'] * 5 + ["no"] + ['{"text": "one"}'] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a.jsonl:6: not JSON: expecting value at character 1"):
        build_corpus([tmp_path / "a.jsonl"], ByteTokenizer(), str(tmp_path / "out"))


def test_errors_in_parquet_files_are_reported(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": [1, 2], "text": ["a", None]}), tmp_path / "a.parquet")
    error_by_key = {
        "body": "has no column body; its columns are id, text",
        "text": "row 1 of row group 0: has null in column text, not a string",
    }
    for key, message in error_by_key.items():
        with pytest.raises(UserError, match=message):
            build_corpus([tmp_path / "a.parquet"], ByteTokenizer(), str(tmp_path / "out"), key=key)
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b.parquet: not a Parquet file"):
        build_corpus([tmp_path / "b.parquet"], ByteTokenizer(), str(tmp_path / "out"))


def documents_in(sample):
    """Yield, for each document in a sample, its mask, its tokens and its labels with a weight."""
    for number in range(sample.documents.max() + 1):
        inside = sample.documents == number
        num_labels = int((sample.weights[inside] > 0).sum())
        yield inside, sample.tokens[inside], sample.labels[inside][:num_labels]


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("length", [64, 256, 1024])
def test_best_fit_cuts_only_long_documents_and_pads_little(corpus, alignment, length):
    ours = Corpus(corpus, 257)
    packed = BestFitCorpus(ours, length, alignment, (3,))
    concat = PackedCorpus(ours, length, alignment, (3,))
    orders = []
    for epoch in range(2):
        samples = [list(packed.slices(epoch, n)) for n in range(packed.samples_per_epoch)]
        orders.append(samples)
        packed_tokens = {}  # of each document
        for document, start, num_tokens in (part for sample in samples for part in sample):
            assert start % length == 0
            assert num_tokens == min(length, ours.lengths[document] - start)
            packed_tokens[document] = packed_tokens.get(document, 0) + num_tokens
        assert packed_tokens == dict(enumerate(ours.lengths.tolist()))
        assert all(
            sum(-(-part.num_tokens // alignment) * alignment for part in sample) <= length
            for sample in samples
        )
    assert orders[0] != orders[1]
    room = int((-(-ours.lengths // alignment) * alignment).sum())
    assert packed.samples_per_epoch <= 1.25 * max(concat.samples_per_epoch, room / length) + 1
    sample = packed.sample(packed.samples_per_epoch + 1)
    for (inside, tokens, labels), (document, start, num_tokens) in zip(
        documents_in(sample), orders[1][1], strict=True
    ):
        ids = ours.read(document, start, int(ours.lengths[document]) - start)
        assert np.flatnonzero(inside)[0] % alignment == 0
        assert tokens[:num_tokens].tolist() == ids[:num_tokens].tolist()
        assert labels.tolist() == ids[1 : len(labels) + 1].tolist()
        assert len(labels) == min(num_tokens, len(ids) - 1)


def test_buckets_hold_every_token_once_with_one_document_a_sequence(corpus):
    ours = Corpus(corpus, 257)
    buckets = [BucketCorpus(ours, length, 128, 16, 8, (5,)) for length in (16, 32, 64, 128)]
    covered = [np.zeros(length, int) for length in ours.lengths]
    for bucket in buckets:
        for number in range(bucket.samples_per_epoch):
            ((document, start, num_tokens),) = bucket.slices(0, number)
            covered[document][start : start + num_tokens] += 1
            assert num_tokens == bucket.seq_length or bucket.seq_length == 16
            sample = bucket.sample(number)
            assert set(sample.documents) == {0}
            assert sample.padding == bucket.seq_length - num_tokens
    assert all((counts == 1).all() for counts in covered)


@pytest.mark.parametrize("odds", ["uniform", "grow_p2", "grow_p100", "shrink_p100"])
def test_a_cycle_has_every_length_in_proportion_to_its_tokens(corpus, odds):
    ours = Corpus(corpus, 257)
    steps = BucketSteps([(ours, 1.0)], 128, 16, 4, 8, odds, 50, (1,))
    lengths = [steps.length(step) for step in range(150)]
    again = BucketSteps([(ours, 1.0)], 128, 16, 4, 8, odds, 50, (1,))
    assert [again.length(step) for step in reversed(range(150))] == lengths[::-1]
    assert "100" in odds or lengths[:50] != lengths[50:100]
    tokens = {
        length: BucketCorpus(ours, length, 128, 16, 8, (0,)).num_tokens
        for length in (16, 32, 64, 128)
    }
    for length, num_tokens in tokens.items():
        for cycle in (lengths[:50], lengths[50:100]):
            assert abs(cycle.count(length) - 50 * num_tokens / sum(tokens.values())) <= 1

    early_mean = np.mean(lengths[:10])
    late_mean = np.mean(lengths[40:50])
    if odds.startswith("grow"):
        assert early_mean < late_mean
    elif odds.startswith("shrink"):
        assert early_mean > late_mean

    # A step takes the samples of its length that follow those of earlier steps.
    steps_of_64 = [step for step in range(150) if lengths[step] == 64]
    seen = [
        steps.sample(step, number).tokens.tolist()
        for step in steps_of_64[:3]
        for number in range(4 * 2)
    ]
    bucket = BucketCorpus(ours, 64, 128, 16, 8, (1, 0))
    assert seen == [bucket.sample(number).tokens.tolist() for number in range(len(seen))]

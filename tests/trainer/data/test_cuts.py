"""Long texts are cut only where the ids of the parts are those of the whole."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.trainer.data import cuts
from longspan.trainer.data.cuts import find_cuts
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from .small_tokenizers import END, KINDS, LLAMA3, byte_level, load, split

WORDS = ["the", "cat", "größer", "漢字", "слова", "I'm", "x1", "12345", "é", "e\u0301", "a.b"]
GAPS = [" ", " ", "  ", "\n", " \n ", "\t", "", ". ", "\r\n", "\u00a0", "▁", "Ġ", "'s ", "    "]
TEXTS = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(GAPS)), min_size=2, max_size=12)


@pytest.fixture(params=list(KINDS))
def tokenizer(request, tmp_path):
    return load(KINDS[request.param](), tmp_path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=TEXTS, size=st.integers(1, 9), block=st.integers(1, 7))
def test_ids_of_the_parts_are_those_of_the_whole(tokenizer, words, size, block):
    text = "".join(word + gap for word, gap in words)
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE_CHARACTERS", size)
        pieces = list(tokenizer.pieces(blocks))
    ids = [token for piece in pieces for token in tokenizer.encode(piece.encode())]
    assert ids == tokenizer.encode(text.encode())


def test_every_kind_lets_long_texts_be_cut(tokenizer, monkeypatch):
    assert tokenizer.cut_obstacle is None
    monkeypatch.setattr(cuts, "PIECE_CHARACTERS", 20)
    words = ["слово", "word"] * 50
    pieces = list(tokenizer.pieces([" ".join(words)]))
    assert max(map(len, pieces)) <= 20 + len(" слово")
    assert " ".join(words) in ("".join(pieces), " ".join(pieces))


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (byte_level(normalizer=normalizers.Strip()), "normalizer Strip"),
        (byte_level(normalizer=normalizers.Prepend("x")), "puts 'x' before every text"),
        (byte_level(pre_tokenizers.UnicodeScripts()), "pre-tokenizer UnicodeScripts"),
        (byte_level(split(r"\w+ \w+|.")), r"may match several words"),
        (byte_level(split(r"\w+(?=\s)|.")), "cannot be analyzed"),
        (byte_level(split(r"(?<=a)b")), "cannot be analyzed"),
        (byte_level(split(r"\p{Armenian}+")), "cannot be analyzed"),
        (byte_level(split(r"[^\n]+|\n")), "may match several words"),
        # Trained without a cut at spaces, the vocabulary has tokens of several words.
        (byte_level(split(r"\n")), "spans words"),
    ],
)
def test_where_it_cannot_be_shown_a_text_stays_whole(tmp_path, tokenizer, reason):
    ours = load(tokenizer, tmp_path)
    assert reason in ours.cut_obstacle
    assert list(ours.pieces(["a b ", "c d"] * 99)) == ["a b c d" * 99]


def test_an_added_token_may_span_words(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("New York", normalized=False)])
    assert "'New York'" in load(tokenizer, tmp_path).cut_obstacle
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("word", rstrip=True, normalized=False)])
    assert "'word'" in load(tokenizer, tmp_path).cut_obstacle
    # A special token counts only if it is read in text.
    tokenizer = byte_level(specials=(END, "of sentence"))
    assert load(tokenizer, tmp_path).cut_obstacle is None
    assert "'of sentence'" in load(tokenizer, tmp_path, True).cut_obstacle


def test_a_model_that_looks_at_whole_words_needs_a_cut_before_it():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    assert "to its Unigram model" in find_cuts(json.loads(tokenizer.to_str()), False).obstacle
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert find_cuts(json.loads(tokenizer.to_str()), False).obstacle is None


def test_what_the_library_is_given_does_not_grow_with_a_document(tmp_path):
    from longspan.trainer.data.build import build_corpus
    from longspan.trainer.data.corpus import Corpus

    class Measured(type(load(byte_level(), tmp_path))):
        longest = 0

        def encode(self, text):
            Measured.longest = max(Measured.longest, len(text))
            return super().encode(text)

    tokenizer = Measured(tmp_path / "tokenizer.json")
    text = "the cat sat on the mat " * (6 * cuts.PIECE_CHARACTERS // 23)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    record = build_corpus(sources, tokenizer, str(tmp_path / "out"))
    assert Measured.longest < cuts.PIECE_CHARACTERS + 30
    assert (record.documents, record.bytes) == (2, 2 * len(text))
    corpus = Corpus(str(tmp_path / "out"), record.vocab_size)
    # The text repeats itself, and so do its ids.
    period = tokenizer.encode(b"the cat sat on the mat ")[1:-1]
    ids = corpus.read(0, 1, 50_000).tolist()
    assert ids[: len(period)] == period
    assert corpus.read(1, 1, 50_000).tolist() == ids
    assert corpus.lengths[0] == corpus.lengths[1]


def test_a_long_text_that_stays_whole_is_named(tmp_path, capsys, monkeypatch):
    from longspan.trainer.data import build

    monkeypatch.setattr(build, "_LONG_PIECE", 100)
    tokenizer = load(byte_level(normalizer=normalizers.Strip()), tmp_path)
    (tmp_path / "a.txt").write_text("the cat " * 50)
    build.build_corpus([tmp_path / "a.txt"], tokenizer, str(tmp_path / "out"))
    error = capsys.readouterr().err
    assert f"{tmp_path}/a.txt: 400 characters are encoded whole" in error
    assert "its normalizer Strip may look at a whole text" in error

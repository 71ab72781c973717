"""Text that spells a special token is text, unless the user means the token."""

import json
import pickle

import pytest
from longspan.trainer.data.build import build_corpus
from longspan.trainer.data.corpus import Corpus
from longspan.trainer.data.corpus_files import read_record
from longspan.trainer.data.tokenizer import HubTokenizer, SpecialTokenError
from longspan.trainer.errors import UserError
from tokenizers import Tokenizer, models, pre_tokenizers

from .small_tokenizers import END, byte_level, load

TEXT = f"the string {END} ends a document"


def build(tokenizer, tmp_path, text=TEXT, **options):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    build_corpus([tmp_path / "a.jsonl"], tokenizer, str(tmp_path / "out"), **options)
    corpus = Corpus(str(tmp_path / "out"), tokenizer.vocab_size)
    return corpus.read(0, 0, int(corpus.lengths[0])).tolist()


def test_a_spelled_end_of_document_is_text(tmp_path):
    tokenizer = load(byte_level(), tmp_path)
    ids = build(tokenizer, tmp_path)
    assert [place for place, i in enumerate(ids) if i == tokenizer.end_of_document] == [
        len(ids) - 1
    ]
    assert tokenizer.decode(ids[:-1]) == TEXT
    assert not read_record(str(tmp_path / "out")).reads_special_tokens


def test_one_who_means_the_token_gets_it(tmp_path):
    tokenizer = load(byte_level(), tmp_path, reads_special_tokens=True)
    assert build(tokenizer, tmp_path).count(tokenizer.end_of_document) == 2
    assert read_record(str(tmp_path / "out")).reads_special_tokens


def test_worker_processes_read_as_this_one_does(tmp_path):
    for reads in (False, True):
        tokenizer = load(byte_level(), tmp_path, reads)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(TEXT.encode()) == tokenizer.encode(TEXT.encode())


@pytest.mark.parametrize("change", ["not special", "not an added token"])
def test_the_end_of_a_document_is_special_whatever_the_file_says(tmp_path, change):
    description = json.loads(byte_level().to_str())
    if change == "not special":
        description["added_tokens"][0]["special"] = False
    else:
        description["added_tokens"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    tokenizer = HubTokenizer(path)
    assert tokenizer.end_of_document == 0
    assert 0 not in tokenizer.encode(TEXT.encode())


def test_a_model_that_reads_spellings_itself_is_not_trusted_with_them(tmp_path):
    """Words are tokens; one of them is the end of a document."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "word": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "</s>"])
    ours = load(tokenizer, tmp_path)
    assert ours.encode(b"word other [UNK]") == [2, 0, 0]
    with pytest.raises(SpecialTokenError):
        ours.encode(b"word </s> word")
    with pytest.raises(UserError, match=r"a.jsonl:1: spells the special token </s>.*--parse-spec"):
        build(ours, tmp_path, "word </s> word")


def test_deepseeks_end_of_a_sentence_ends_a_document(tmp_path):
    names = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
    tokenizer = load(byte_level(specials=names), tmp_path)
    assert tokenizer.end_of_document == 1
    assert tokenizer.cut_obstacle is None

"""The tokenizer that a run keeps, and the one of its export: the ids of the corpus."""

import json
import shutil

import pytest
from longspan.trainer.checkpoint.run_folder import RunFolder
from longspan.trainer.data.tokenizer import load_tokenizer, recipe_tokenizer
from longspan.trainer.errors import UserError
from longspan.trainer.huggingface.tokenizer import require_same_tokens, write_tokenizer
from longspan.trainer.recipe.file import load_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

END = "<|endoftext|>"
TEXT = "def f(x):\n    return x  # naïve, 漢字 <|endoftext|> and more\r\n"


def byte_level(vocabulary_first="ab"):
    """A tokenizer of bytes with one merge, and tokens for beginning and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", END, *alphabet, vocabulary_first]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [tuple(vocabulary_first)])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", END])
    return tokenizer


def begins(tokenizer):
    return processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )


def ends(tokenizer):
    return processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )


POST_PROCESSORS = {
    "none": lambda tokenizer: None,
    "begins": begins,
    "ends": ends,
    "roberta": lambda tokenizer: processors.RobertaProcessing((END, 1), ("<s>", 0)),
    "bert": lambda tokenizer: processors.BertProcessing((END, 1), ("<s>", 0)),
    "bytes, begins": lambda tokenizer: processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begins(tokenizer)]
    ),
}


@pytest.fixture
def tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    return path


@pytest.fixture
def recipe(tiny_recipe, tokenizer_file):
    return load_recipe(str(tiny_recipe), [f"data.tokenizer={tokenizer_file}"])


def write_export(recipe, folder):
    """The tokenizer of an export, beside the config of a small model."""
    from transformers import AutoConfig, LlamaConfig

    folder.mkdir()
    ids = write_tokenizer(recipe, folder, 128)
    LlamaConfig(**{"bos_token_id": None, **ids}).save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_an_export_gives_the_ids_of_the_corpus(recipe, tokenizer_file, tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = byte_level()
    post_processor = POST_PROCESSORS[kind](tokenizer)
    if post_processor:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(tokenizer_file))
    config = write_export(recipe, tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = recipe_tokenizer(recipe).encode(TEXT.encode())
    assert exported(TEXT).input_ids == ids
    assert 1 not in ids
    assert exported(END, split_special_tokens=False).input_ids == [1]
    assert require_same_tokens(recipe, tmp_path / "out", config) > 4
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (None, 1, 1)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 1, 1)

    # As exports of before were written: with what the file adds.
    tokenizer.save(str(tmp_path / "out" / "tokenizer.json"))
    if post_processor:
        with pytest.raises(UserError, match=r"tokenizer.json: the text .* becomes .*; export the"):
            require_same_tokens(recipe, tmp_path / "out", config)


def test_wrong_ends_of_an_export_are_named(recipe, tmp_path):
    config = write_export(recipe, tmp_path / "out")
    config.bos_token_id = 0
    with pytest.raises(UserError, match=r"config.json: bos is token 0, but the run was trained wi"):
        require_same_tokens(recipe, tmp_path / "out", config)
    config.bos_token_id = None
    file = tmp_path / "out" / "tokenizer_config.json"
    file.write_text(file.read_text().replace(f'"eos_token": "{END}"', '"eos_token": "<s>"'))
    with pytest.raises(UserError, match=r"tokenizer_config.json: eos is token 0, but .* with 1"):
        require_same_tokens(recipe, tmp_path / "out", config)


def test_a_run_keeps_its_tokenizer(recipe, tokenizer_file, tmp_path, monkeypatch):
    """Whatever happens to the file, from any folder."""
    ours = recipe_tokenizer(recipe)
    folder = RunFolder(recipe.run_dir)
    folder.begin(recipe, 0, {})
    other = byte_level("cd")
    other.save(str(tokenizer_file))
    monkeypatch.chdir("/")
    again = RunFolder(recipe.run_dir)
    assert again.tokenizer.differs_from(recipe)
    for kept in (again.recipe, again.recipe.at_step(1), again.tokenizer.read_by(recipe)):
        assert recipe_tokenizer(kept).identity == ours.identity
        assert recipe_tokenizer(kept).encode(b"abcd") == ours.encode(b"abcd")
    assert recipe_tokenizer(recipe).encode(b"abcd") != ours.encode(b"abcd")
    tokenizer_file.unlink()
    assert recipe_tokenizer(again.recipe).identity == ours.identity

    # A resumed run writes the recipe as it is, and keeps the copy.
    again.begin(again.recipe, 5, {})
    assert load_recipe(str(again.recipe_file)).data.tokenizer == str(tokenizer_file)
    assert recipe_tokenizer(RunFolder(recipe.run_dir).recipe).identity == ours.identity


def test_another_file_in_the_runs_folder_is_refused(recipe, tmp_path):
    folder = RunFolder(recipe.run_dir)
    folder.begin(recipe, 0, {})
    byte_level("cd").save(str(folder.path / "tokenizer" / "tokenizer.json"))
    with pytest.raises(UserError, match=r"is not the file that the run was trained with"):
        recipe_tokenizer(RunFolder(recipe.run_dir).recipe)
    (folder.path / "tokenizer" / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record.json: is damaged"):
        _ = RunFolder(recipe.run_dir).recipe


def test_stages_with_data_of_their_own_read_the_kept_tokenizer(recipe, tiny_recipe, tokenizer_file):
    stage = {"from_step": 3, "data": {"sources": {"x": 1.0}, "tokenizer": str(tokenizer_file)}}
    staged = load_recipe(
        str(tiny_recipe),
        [f"data.tokenizer={tokenizer_file}", f"stages={json.dumps([stage])}"],
    )
    folder = RunFolder(staged.run_dir)
    folder.begin(staged, 0, {})
    tokenizer_file.unlink()
    kept = RunFolder(staged.run_dir).recipe
    assert recipe_tokenizer(kept.at_step(5)).identity == recipe_tokenizer(kept).identity


def test_a_run_of_before_reads_the_recipes_path_if_its_corpus_agrees(
    tiny_recipe, tokenizer_file, tmp_path
):
    from longspan.trainer.data.build import build_corpus
    from longspan.trainer.recipe.file import to_yaml

    (tmp_path / "a.txt").write_text("abcd")
    ours = load_tokenizer(str(tokenizer_file), "--tokenizer")
    build_corpus([tmp_path / "a.txt"], ours, str(tmp_path / "built"))
    sources = json.dumps({str(tmp_path / "built"): 1.0})
    recipe = load_recipe(
        str(tiny_recipe), [f"data.tokenizer={tokenizer_file}", f"data.sources={sources}"]
    )
    folder = RunFolder(recipe.run_dir)
    folder.path.mkdir()
    folder.recipe_file.write_text(to_yaml(recipe))

    assert recipe_tokenizer(RunFolder(folder.path).recipe).identity == ours.identity
    kept = tmp_path / "kept.json"
    shutil.copy(tokenizer_file, kept)
    byte_level("cd").save(str(tokenizer_file))
    with pytest.raises(UserError, match=r"is not the file that the run was trained with"):
        recipe_tokenizer(RunFolder(folder.path).recipe)
    tokenizer_file.unlink()
    with pytest.raises(UserError, match=r"no such file, and the run is of a version that kept"):
        recipe_tokenizer(RunFolder(folder.path).recipe)
    (folder.path / "tokenizer").mkdir()
    shutil.copy(kept, folder.path / "tokenizer" / "tokenizer.json")
    assert recipe_tokenizer(RunFolder(folder.path).recipe).identity == ours.identity


def test_what_comes_after_training_uses_the_kept_tokenizer(
    tiny_recipe, tokenizer_file, tmp_path, longspan
):
    """Resume and generate with another file under the recipe's path, and then with none."""
    source = tmp_path / "a.txt"
    source.write_text("ab cd ef " * 600)
    corpus = str(tmp_path / "built")
    from longspan.trainer.data.build import build_corpus

    build_corpus([source], load_tokenizer(str(tokenizer_file), "--tokenizer"), corpus)
    train = [
        "train",
        tiny_recipe,
        f"data.tokenizer={tokenizer_file}",
        "data.sources=" + json.dumps({corpus: 1.0}),
        "training.steps=2",
        "training.global_batch_size=1",
    ]
    done = longspan(*train)
    assert done.returncode == 0, done.stderr
    byte_level("cd").save(str(tokenizer_file))
    done = longspan(*train[:-2], "training.steps=3", train[-1])
    assert done.returncode == 0, done.stderr
    assert f"data.tokenizer: {tokenizer_file} is not what the run in" in done.stderr
    tokenizer_file.unlink()
    done = longspan("generate", tmp_path / "run", "--prompt", END, "--tokens", "0")
    assert done.stdout.strip() == END
    done = longspan(
        "generate", tmp_path / "run", "--prompt", f"ab{END}", "--tokens", "0", "--parse-special"
    )
    assert done.stdout.strip() == "ab"

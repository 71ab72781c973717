"""The examples of ``longspan eval`` and how they are scored.

First with models whose answers are known, then with the commands on a run.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from longspan.launch.cli import main
from longspan.trainer.checkpoint.weights_file import write_weights
from longspan.trainer.data.build import build_corpus
from longspan.trainer.data.corpus import Corpus
from longspan.trainer.data.tokenizer import ByteTokenizer, load_tokenizer
from longspan.trainer.errors import UserError
from longspan.trainer.evaluation.examples import needle_examples, task_examples
from longspan.trainer.evaluation.held_out import Haystack
from longspan.trainer.evaluation.position_loss import (
    choose_documents,
    choose_lengths,
    position_loss,
)
from longspan.trainer.evaluation.scoring import score_examples
from longspan.trainer.evaluation.tasks import EARLIER_NAMES, TASKS, choose_tasks

LENGTH = 700


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, texts):
    """Return a tokenizer of bytes and one of byte pairs, which may split numbers and words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    more = ["The number of kuvamu is 53132.\n In digits, the most frequent word"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    pairs.train_from_iterator(texts + more, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    pairs.save(str(path))
    return {"bytes": ByteTokenizer(), "pairs": load_tokenizer(str(path), "--tokenizer")}


@pytest.fixture(scope="module")
def haystack(tmp_path_factory, texts, tokenizers):
    def make(tokenizer_name="bytes"):
        prefix = str(tmp_path_factory.mktemp("held-out") / "text")
        source = tmp_path_factory.getbasetemp() / "lines.txt"
        source.write_text("\n".join(texts))
        tokenizer = tokenizers[tokenizer_name]
        build_corpus([source], tokenizer, prefix)
        return Haystack(Corpus(prefix, 500), tokenizer)

    return make


class CopyingModel:
    """Predict the token that followed the last ``context_length`` tokens when they last occurred.

    It looks back at most ``reach`` tokens.
    """

    device = torch.device("cpu")

    def __init__(self, context_length: int, reach: int = 10**9):
        self.context_length = context_length
        self.reach = reach

    def token_losses(self, tokens, labels):
        predicted = torch.full_like(tokens, -1)
        for row, text in enumerate(tokens.tolist()):
            last_occurrence = {}
            for position in range(self.context_length - 1, len(text)):
                context = tuple(text[position - self.context_length + 1 : position + 1])
                earlier = last_occurrence.get(context)
                if earlier is not None and position - earlier <= self.reach:
                    predicted[row, position] = text[earlier + 1]
                last_occurrence[context] = position
        is_likeliest = predicted == labels
        return torch.where(is_likeliest, 0.1, 5.0), is_likeliest


def decode_answered(haystack, answered):
    """Return the text and the answers of an AnsweredText."""
    decode = haystack.tokenizer.decode
    answers = [decode([answered.tokens[i] for i in answer]) for answer in answered.answers]
    return decode(answered.tokens), answers


@pytest.mark.parametrize("tokenizer_name", ["bytes", "pairs"])
@pytest.mark.parametrize("task", ["needle", *TASKS])
def test_answers_follow_from_the_text(haystack, tokenizer_name, task):
    hay = haystack(tokenizer_name)
    if task == "needle":
        examples = needle_examples(hay, 5, 1, LENGTH, 0.5)
    else:
        examples = list(task_examples(hay, 5, 1, task, LENGTH))
    seen = set()
    for right, wrong in examples:
        assert len(right.tokens) == LENGTH
        text, answers = decode_answered(hay, right)
        wrong_texts = [decode_answered(hay, text) for text in wrong]
        seen.add(text)
        assert len(answers) == len(wrong_texts) == (4 if task == "multi_query" else 1)
        assert text.endswith(answers[-1])
        for answer, (wrong_text, (wrong_answer,)) in zip(answers, wrong_texts, strict=True):
            assert answer != wrong_answer
            assert wrong_text.endswith(wrong_answer)
            before = wrong_text.removesuffix(wrong_answer)
            assert text.startswith(before + answer), "all is right before it"
            if task in ("needle", "multi_query", "multi_key"):
                assert text.count(f" is{answer}") == 2, "once in the text and once as the answer"
                assert f" is{wrong_answer}." in text
        body, question = text.rsplit("\n", 1)
        if task == "variable_tracking":
            name_asked = question.removeprefix("In digits, the number of ").split(" ")[0]
            for _ in range(3):
                (name_asked,) = [
                    line.removesuffix(".").rsplit(" ", 1)[1]
                    for line in body.splitlines()
                    if f"The number of {name_asked} is that of" in line
                ]
            assert f"The number of {name_asked} is{answers[0]}." in body
        if task == "frequent_words":
            first, second = (
                body.split("is ", 1)[1].split().count(word.strip())
                for word in (answers[0], wrong_texts[0][1][0])
            )
            assert first > second > 0
    assert len(seen) == 5


def test_needles_lie_at_the_requested_depth(haystack):
    hay = haystack()
    fact_length = len("\nThe number of kuvamu is 53132.\n")
    for depth in (0.0, 0.25, 1.0):
        for right, _ in needle_examples(hay, 8, 0, 1500, depth):
            text, (answer,) = decode_answered(hay, right)
            place = text.index(f"is{answer}.") - (fact_length - 9)
            expected = depth * (1500 - 3 * fact_length)
            assert place == pytest.approx(expected, abs=fact_length + 2), (
                "another fact may lie before it"
            )


def test_a_copying_model_gets_the_expected_scores(haystack):
    hay = haystack()
    model = CopyingModel(12)
    advanced = []
    needles = needle_examples(hay, 30, 0, LENGTH, 0.2)
    score = score_examples(model, needles, LENGTH, advanced.append)
    assert score[:4] == (1.0, 0.0, 1.0, 0.0)
    assert sum(advanced) == 30
    scores = {
        task: score_examples(model, task_examples(hay, 20, 0, task, LENGTH), LENGTH)
        for task in TASKS
    }
    assert scores["multi_query"][:4] == scores["multi_key"][:4] == (1.0, 0.0, 1.0, 0.0)
    assert scores["multi_key"].loss == pytest.approx(0.1, abs=1e-6)
    assert scores["variable_tracking"].exact == 0.0, "the last name leads to another name"
    assert scores["frequent_words"].exact == 0.0, "it says the example's word"


def test_a_model_with_a_short_reach_misses_deep_needles(haystack):
    hay = haystack()
    model = CopyingModel(12, reach=400)
    near, far = (
        score_examples(model, needle_examples(hay, 20, 0, 1500, depth), 1500)
        for depth in (1.0, 0.0)
    )
    assert near[:4] == (1.0, 0.0, 1.0, 0.0)
    assert far.exact == 0.0
    assert 0.0 <= far.preferred < 0.9, "the other number is near in some of them"
    assert far.loss > 4


def test_examples_depend_only_on_the_seed(haystack):
    hay = haystack()
    once, again, other_seed = (
        list(task_examples(hay, 4, seed, "multi_query", LENGTH)) for seed in (0, 0, 1)
    )
    assert once == again
    assert not any(a == b for a, b in zip(once, other_seed, strict=True))
    assert list(task_examples(hay, 2, 0, "multi_query", LENGTH)) == once[:2]


def test_earlier_task_names_are_accepted():
    assert choose_tasks(["chain", "multi_key"]) == ["variable_tracking", "multi_key"]
    assert choose_tasks(list(EARLIER_NAMES)) == choose_tasks(None) == list(TASKS)


class ContextCountingModel:
    """A token after ``n`` visible ones costs ``8 / (1 + n) + id / 1000`` nats."""

    device = torch.device("cpu")

    def __init__(self, sees=10**9):
        self.sees = sees

    def token_losses(self, tokens, labels):
        before = torch.arange(tokens.shape[1]).clamp(max=self.sees)
        return (8 / (1 + before) + labels / 1000).float(), None


def test_position_loss_and_the_gain_from_context(tmp_path):
    lengths = [30, 200, 97, 400, 98]
    for i, length in enumerate(lengths):
        # One byte less than the length: the end of the document is a token, too.
        text = bytes((7 * i + j) % 100 + 20 for j in range(length - 1))
        tmp_path.joinpath(f"{i}.txt").write_bytes(text)
    build_corpus([tmp_path], ByteTokenizer(), str(tmp_path / "held"))
    corpus = Corpus(str(tmp_path / "held"), 257)
    advanced = []
    chosen = choose_documents(corpus, 97, 8)
    assert chosen.tolist() == [1, 3, 4], "one of 97 tokens has 96 labels"
    assert choose_documents(corpus, 97, 2).tolist() == [1, 4]
    ranges = position_loss(ContextCountingModel(), corpus, 97, chosen, advanced.append)
    assert sum(advanced) == 3
    assert [r[:2] for r in ranges] == [(0, 16), (16, 32), (32, 64), (64, 97)]
    texts = np.stack([corpus.read(document, 0, 98) for document in chosen])
    for start, stop, loss, gain, error in ranges:
        id_cost = texts[:, start + 1 : stop + 1].mean() / 1000
        context_cost = np.mean([8 / (1 + p) for p in range(start, stop)])
        assert loss == pytest.approx(id_cost + context_cost, rel=1e-5)
        if start:
            shorter_context_cost = np.mean([8 / (1 + p - start // 2) for p in range(start, stop)])
            assert gain == pytest.approx(id_cost + shorter_context_cost - loss, abs=1e-6)
            assert error == pytest.approx(0, abs=1e-6), "it is the same for all documents"
    assert ranges[0].gain is ranges[0].error is None
    assert ranges[1].gain > 0.1

    near = position_loss(ContextCountingModel(sees=16), corpus, 97, chosen)
    assert near[1].gain > 0.01
    assert [r.gain for r in near[2:]] == pytest.approx([0, 0], abs=1e-6), (
        "nothing that lies farther back than it sees"
    )

    assert choose_lengths(corpus, None, 97) == [97, 194], "two documents should have them"
    assert choose_lengths(corpus, None, 1000) == [128]
    assert choose_lengths(corpus, [16, 399], 97) == [16, 399]
    single_document = choose_documents(corpus, 399, 8)
    ranges = position_loss(ContextCountingModel(), corpus, 399, single_document)
    assert ranges[1].error is None
    with pytest.raises(
        UserError, match=r"--lengths: 400, but the longest document of .* has 399 labels"
    ):
        choose_lengths(corpus, [400], 97)


def test_corpora_of_empty_documents_are_refused(tmp_path, tokenizers):
    """Corpora of others, and ours of before, have such documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "none.bin"), dtype=np.uint16)
    for _ in range(3):
        builder.add_item(torch.tensor([tokenizers["bytes"].end_of_document]))
        builder.end_document()
    builder.finalize(str(tmp_path / "none.idx"))
    hay = Haystack(Corpus(str(tmp_path / "none"), 257), tokenizers["bytes"])
    with pytest.raises(UserError, match="has no document of more than one token"):
        hay.text(10, np.random.default_rng(0))
    with pytest.raises(
        UserError, match=r"--lengths: 16, but the longest document of .* has 0 labels"
    ):
        choose_lengths(Corpus(str(tmp_path / "none"), 257), None, 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """Return the folder of a run whose weights are untrained."""
    from longspan.launch.process import process_group
    from longspan.trainer.checkpoint.run_folder import RunFolder
    from longspan.trainer.engines.build import build_engine
    from longspan.trainer.recipe.file import load_recipe

    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        "model.hidden_size=32",
        "model.intermediate_size=32",
        "launch.processes=1",
        "parallel.cp=1",
    ]
    overrides += [
        f"data.sources={{{corpus}: 1.0}}",
        f"data.validation={corpus}",
        "training.seq_length=128",
    ]
    recipe = load_recipe("quickstart", [*overrides, f"run_dir={folder / 'run'}"])
    run_folder = RunFolder(recipe.run_dir)
    run_folder.begin(recipe, 0, {})
    with process_group(1):
        engine = build_engine(recipe)
        weights = engine.weights()
        write_weights(run_folder.weights, weights, weights.__getitem__, 0)
        engine.close()
    return run_folder


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    return exit_info.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("command", "rows", "line"),
    [
        ("loss --lengths 64,150", "ranges", "       150  128 .. 150  "),
        ("loss --lengths 16", "ranges", "        16  0 .. 16  "),
        ("needle --lengths 200,256 --depths 2 --examples 3", "settings", "   256   100%  "),
        (  # by their names before those of RULER
            "tasks --tasks several,chain --lengths 700 --examples 3",
            "settings",
            "variable_tracking     700  ",
        ),
        (
            "tasks --tasks variable_tracking,frequent_words --examples 1",
            "settings",
            "frequent_words     512  ",
        ),
    ],
)
def test_the_commands_write_the_numbers_they_print(capsys, run, command, rows, line):
    name, *options = command.split()
    status, out, err = run_command(capsys, "eval", name, run.path, *options)
    assert status == 0, err
    assert line in out
    report = json.loads(run.evaluation(name).read_text())
    assert report["step"] == 0
    for row in report[rows]:
        assert (f"{row['loss']:.4f}" if name == "loss" else f"{row['loss']:.3f}") in out
        assert 3 < row["loss"] < 10, "of 257 ids"
        assert row["trained"] == (row.get("stop", row["length"]) <= 128)
    assert run.evaluation(name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("loss {run} --lengths 8", "--lengths: must be at least 16, got 8"),
        ("loss {run} --lengths 4096", "--lengths: 4,096, but the longest document of"),
        ("loss {run} --documents 0", "--documents: must be at least 1, got 0"),
        ("loss {run} --data {run}/nothing", "nothing.bin: no such file; build it with"),
        ("loss {run}/none", "not the folder of a run"),
        ("needle {run} --lengths 64,x", "--lengths: must be whole numbers"),
        (
            "needle {run} --lengths 40",
            "--lengths: a question and what it asks for take 94 tokens; use at least 64 more",
        ),
        ("needle {run} --depths 1", "--depths: must be at least 2, got 1"),
        ("needle {run} --examples 0", "--examples: must be at least 1, got 0"),
        (
            "tasks {run} --tasks variable_tracking,ruler",
            "--tasks: ruler is not a task; "
            "known: multi_query, multi_key, variable_tracking, frequent_words",
        ),
        ("tasks {run} --lengths 300", "tokens; use at least 64 more"),
        ("tasks {run} --seed -1", "--seed: must not be negative, got -1"),
    ],
)
def test_invalid_options_give_one_line_and_status_2(capsys, run, arguments, message):
    status, _, err = run_command(capsys, "eval", *arguments.replace("{run}", str(run.path)).split())
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_runs_without_held_out_text_are_refused(capsys, run, tmp_path):
    content = yaml.safe_load(run.recipe_file.read_text())
    content["data"]["validation"] = None
    tmp_path.joinpath("recipe.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(run.weights, tmp_path)
    status, _, err = run_command(capsys, "eval", "needle", tmp_path)
    assert (status, err) == (
        2,
        "longspan: data.validation: the run has no held-out text; name some with --data PREFIX\n",
    )

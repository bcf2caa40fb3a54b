"""Multiple choice: results computed by hand from made-up losses, and a model's own logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.cli import run
from cllm_gpu.data.tokenizers import ByteTokenizer
from cllm_gpu.inference.evaluate import model_losses
from cllm_gpu.inference.hellaswag import Item, choose, cleaned_text, read_hellaswag
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.utils.errors import UserError

COSTS = {"a": 1.0, "b": 2.0, " ": 0.5}
"""Nats of a byte, whatever stands before it."""


def priced(tokens: Any, targets: Any) -> tuple[Any, Any]:
    """Losses by COSTS; what is not counted costs much, and must not be."""
    costs = np.full(257, 1000.0)
    for letter, cost in COSTS.items():
        costs[ord(letter)] = cost
    return np.where(targets == IGNORE_INDEX, 5000.0, costs[targets]).reshape(-1), None


def chosen(items: list[Item], losses: Any = priced, **changes: Any) -> Any:
    settings = {"context": 64, "batch": 3} | changes
    return choose(items, ByteTokenizer(), losses, lambda x: x, **settings)


# with the space before it, an ending costs: aaa 3.5 (1.17 a byte), b 2.5 (2.5), bb 4.5 (2.25), a 1.5 (1.5)
HARD = Item("x y", ("aaa", "b"), 0, "here")  # b is likelier, aaa by character
EASY = Item("zz", ("bb", "a", "bb"), 1, "here")  # a both ways


def test_by_hand() -> None:
    found = chosen([HARD, EASY])
    assert (found.items, found.accuracy, found.accuracy_per_character) == (2, 0.5, 1.0)
    assert found.as_dict()["acc_stderr"] == pytest.approx(0.5)  # sqrt(0.5 * 0.5 / 1)
    assert found.as_dict()["acc_norm_stderr"] == 0.0
    assert chosen([EASY]).as_dict()["acc_stderr"] is None


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 16])
def test_batches_change_nothing(batch: int) -> None:
    told: list[int] = []
    found = chosen([HARD, EASY, HARD, EASY, HARD], batch=batch, progress=lambda done, so_far: told.append(done))
    assert (found.items, found.accuracy, found.accuracy_per_character) == (5, 2 / 5, 1.0)
    assert told[-1] == 5
    assert told == sorted(told)


def test_the_length_is_in_characters() -> None:
    """é costs 2000.5 and is two bytes, c costs 1000.5: by character c wins, by byte é would."""
    found = chosen([Item("x", ("é", "c"), 1, "here")])
    assert (found.accuracy, found.accuracy_per_character) == (1.0, 1.0)


def test_equal_scores_go_to_the_first() -> None:
    assert chosen([Item("x", ("a", "a"), 0, "here"), Item("x", ("a", "a"), 1, "here")]).accuracy == 0.5


class Recorder:
    """Keeps what it is asked to score."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any]] = []

    def __call__(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        self.asked.append((tokens.copy(), targets.copy()))
        return priced(tokens, targets)


def test_only_the_ending_is_counted_and_a_long_context_is_cut_on_the_left() -> None:
    recorder = Recorder()
    chosen([Item("0123456789" * 5, ("ab", "b"), 0, "here")], recorder, context=8, batch=2)
    ((tokens, targets),) = recorder.asked
    assert tokens.shape == (2, 8)
    assert bytes(tokens[0].astype(np.uint8)) == b"456789 a"
    assert targets[0].tolist() == [IGNORE_INDEX] * 5 + list(b" ab")
    assert bytes(tokens[1].astype(np.uint8)) == b"3456789 "
    assert targets[1].tolist() == [IGNORE_INDEX] * 6 + list(b" b")


def test_an_empty_context_begins_a_document_and_spaces_belong_to_the_ending() -> None:
    recorder = Recorder()
    chosen([Item("", ("ab", "b"), 0, "here"), Item("x ", ("a", "b"), 0, "here")], recorder, batch=4)
    ((tokens, targets),) = recorder.asked
    assert tokens[0, :2].tolist() == [256, ord("a")]
    assert targets[0, :3].tolist() == [*b"ab", IGNORE_INDEX]
    assert targets[2, :4].tolist() == [*b"  a", IGNORE_INDEX]


def test_few_shapes() -> None:
    recorder = Recorder()
    items = [Item("z" * length, ("a", "b"), 0, "here") for length in range(1, 90, 3)]
    chosen(items, recorder, context=100, batch=2)
    assert {tokens.shape for tokens, _ in recorder.asked} == {(2, 32), (2, 64), (2, 100)}


def test_an_ending_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="line 7: an ending has 9 tokens beside its context, the model reads 8"):
        chosen([Item("x", ("a" * 8, "b"), 0, "line 7")], context=8)


def test_the_models_own_logits(build_model: Callable[..., Any]) -> None:
    """Each ending's score from the model's logits of that text alone, without padding and batches."""
    a = Architecture(vocabulary=257, context=20, layers=2, heads=2, kv_heads=2, width=16, mlp_width=32)
    model, _ = build_model(a)
    texts = [
        ("The cat", ("sat down.", "flew.", "is a dog")),
        ("I", ("am here", "was")),
        ("A longer context it is", ("so", "no")),
    ]
    labels = []
    for context, endings in texts:
        scores = []
        for ending in endings:
            ids = np.frombuffer(f"{context} {ending}".encode(), np.uint8).astype(np.int32)[-(a.context + 1) :]
            count = len(ending) + 1
            tokens = np.ascontiguousarray(ids[None, :-1])
            logits = model.logits(Activations(a, model.backend, *tokens.shape, np.float64, training=False), tokens)[0]
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            scores.append(float(sum(logs[-count + n, ids[1:][-count + n]] for n in range(count))))
        labels.append(int(np.argmax(scores)))
    items = [Item(context, endings, label, "here") for (context, endings), label in zip(texts, labels, strict=True)]
    settings = {"context": a.context, "batch": 4}
    assert choose(items, ByteTokenizer(), model_losses(model), model.backend.to_host, **settings).accuracy == 1.0
    wrong = [Item(i.context, i.endings, (i.label + 1) % len(i.endings), "here") for i in items]
    assert choose(wrong, ByteTokenizer(), model_losses(model), model.backend.to_host, **settings).accuracy == 0.0


# ---- the file


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_the_forms_of_a_context(tmp_path: Path) -> None:
    endings = ["one [step] thing", "two"]
    first, second, third = read_hellaswag(
        written(
            tmp_path / "file.jsonl",
            {"activity_label": "Cooking", "ctx_a": "A man stirs.", "ctx_b": "he then", "ctx": "unused",
             "endings": endings, "label": 1},
            "",
            {"ctx": "  [header] How to cook [title] Take a pot.", "endings": endings, "label": "0"},
            {"ctx_a": "A man", "ctx_b": "", "endings": endings, "label": 0, "ind": 3},
        )
    )  # fmt: skip
    assert first.context == "Cooking: A man stirs. He then"
    assert (first.endings, first.label) == (("one thing", "two"), 1)
    assert second.context == " How to cook. Take a pot."
    assert (second.label, second.where) == (0, f"{tmp_path / 'file.jsonl'}, line 3")
    assert third.context == "A man"
    assert cleaned_text("Wash. [substeps] Use soap. [step] Rinse.") == "Wash. Use soap. Rinse."


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ({"ctx": "x", "endings": ["a"], "label": 0}, "at least two"),
        ({"ctx": "x", "endings": "ab", "label": 0}, "at least two"),
        ({"ctx": "x", "endings": ["a", "[step]"], "label": 0}, "ending 2 has no text"),
        ({"ctx": "x", "endings": ["a", "b"], "label": 2}, "label is 2; .* 0 to 1"),
        ({"ctx": "x", "endings": ["a", "b"], "label": ""}, "label is ''"),
        ({"ctx": "x", "endings": ["a", "b"], "label": True}, "label is True"),
        ({"ctx": "x", "endings": ["a", "b"]}, "label is None"),
        ({"ctx_a": "x", "endings": ["a", "b"], "label": 0}, "neither ctx_a and ctx_b nor ctx"),
    ],
)
def test_lines_that_are_no_items(tmp_path: Path, line: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        read_hellaswag(written(tmp_path / "f.jsonl", {"ctx": "x", "endings": ["a", "b"], "label": 0}, line))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.jsonl"):
        read_hellaswag(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no items"):
        read_hellaswag(written(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_hellaswag(tmp_path / "latin.jsonl")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that learnt one line knows its ending."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CLLM_BACKEND", "numpy")
    (tmp_path / "text.txt").write_text("The dog says woof.\n" * 400)
    flags = ["--data.source", "text.txt", "--model.size", "tiny", "--model.layers", "1", "--model.width", "32",
             "--model.context", "32", "--training.batch", "8", "--training.sample-tokens", "0",
             "--training.steps", "80", "--optimizer.rate", "0.01", "--training.evaluate-every", "0"]  # fmt: skip
    assert run(["train", *flags]) == 0
    endings = ["meow.", "woof.", "quack."]
    written(tmp_path / "task.jsonl", *({"ctx": "The dog says", "endings": endings, "label": n} for n in (1, 1, 0)))
    capsys.readouterr()
    assert run(["evaluate", "--task", "hellaswag", "task.jsonl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["items"]) == ("hellaswag", 3)
    assert found["acc"] == found["acc_norm"] == pytest.approx(2 / 3)
    assert run(["evaluate", "task.jsonl", "--task", "hellaswag", "--batch", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "hellaswag: acc 66.67% ± 33.33%  acc_norm 66.67% ± 33.33%  (3 items, step 80)\n"
    assert err == ""
    assert run(["evaluate", "task.jsonl", "--task", "hellaswag", "--batches", "2"]) == 2
    assert "always uses the whole file" in capsys.readouterr().err

"""The text data set: requests a language model can decode, labels it can learn, lengths from a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from corun import registry
from corun.errors import InputError
from corun.registry import DataOptions

TEXT = registry.dataset("text")


def test_made_requests_depend_on_the_seed_alone() -> None:
    """The same options give the same bytes; a prompt asks for 8 to 32 tokens."""
    payloads = TEXT.requests(DataOptions(count=20, seed=3))
    assert payloads == TEXT.requests(DataOptions(count=20, seed=3)) != TEXT.requests(DataOptions(count=20, seed=4))
    assert payloads[:5] == TEXT.requests(DataOptions(count=5, seed=3))
    for payload in payloads:
        request = json.loads(payload.data)
        assert set(request) == {"prompt", "max_new_tokens"}
        assert 8 <= request["max_new_tokens"] <= 32


def test_made_labels_are_right() -> None:
    """The label of a made question is its true answer, and both answers occur."""
    items = TEXT.training(DataOptions(count=40, task="generation"))
    labels = set()
    for item in items:
        a, b = (int(word) for word in item.turns[0].rstrip("?").split() if word.isdigit())
        assert item.label == ("yes" if a > b else "no")
        labels.add(item.label)
    assert labels == {"yes", "no"}
    assert items.collate([items[0], items[1]]) == {
        "turns": [list(items[0].turns), list(items[1].turns)],
        "label": [items[0].label, items[1].label],
    }


def test_a_users_file_is_served_and_trained_on(tmp_path: Path) -> None:
    """Sentences become prompts, over and over; a conversation keeps its turns; a missing label is named."""
    path = tmp_path / "talk.json"
    path.write_text('[[["hello"], ["a", "b", "c"]], ["yes", null]]')
    found = [json.loads(payload.data)["prompt"] for payload in TEXT.requests(DataOptions(root=path, count=3))]
    assert found == ["hello", ["a", "b", "c"], "hello"]
    with pytest.raises(InputError) as refused:
        TEXT.training(DataOptions(root=path, count=2, task="generation"))
    assert list(refused.value.problems) == ["label 1 is null"]


def test_lengths_come_from_a_trace(tmp_path: Path) -> None:
    """Each request has as many ids and asks for as many tokens as its row says, within the bounds."""
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00.1,12,5\n2024-01-01 00:00:01,4000,900\n"
    )
    requests = [json.loads(payload.data) for payload in TEXT.requests(DataOptions(root=path, count=3))]
    assert [(len(one["ids"]), one["max_new_tokens"]) for one in requests] == [(12, 5), (1024, 256), (12, 5)]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="ContextTokens and GeneratedTokens"):
        TEXT.requests(DataOptions(root=tmp_path / "other.csv"))


def test_requests_need_no_torch() -> None:
    """A client that sends text imports neither torch nor transformers."""
    code = (
        "import sys; sys.path.insert(0, 'src'); from corun import registry; "
        "registry.request_payloads('text', registry.DataOptions(count=2)); "
        "assert not {'torch', 'transformers', 'sklearn', 'peft'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_a_generating_model_gets_text_by_default() -> None:
    """The default pictures are replaced, a data set asked for by name is not."""
    assert registry.fitting_data("sample", "generation") == registry.fitting_data("digits", "generation") == "text"
    assert registry.fitting_data("coco", "generation") == "coco"
    assert registry.fitting_data("sample", "detection") == "sample"

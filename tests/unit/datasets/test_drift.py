"""The data set that shifts: every picture a function of seed and position, the shift exactly where it was asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import images, registry
from corun.errors import InputError
from corun.registry import DataOptions

drift = registry.load_plugin("datasets", "drift")
SOURCE = registry.dataset("drift")
KINDS = [name for name in drift.CORRUPTIONS if name != "none"]
INDEX, SEED = st.integers(0, 10_000), st.integers(0, 2**31)


def options(count: int = 8, seed: int = 0, **extra: object) -> DataOptions:
    return DataOptions(image_size=28, count=count, seed=seed, extra=extra)


@given(INDEX, SEED, st.integers(12, 48))
@settings(max_examples=40, deadline=None)
def test_a_picture_depends_on_seed_and_position_alone(index: int, seed: int, side: int) -> None:
    """The same request is the same picture and class each time, whatever came before it."""
    first, again = (drift.arrival(drift.Drift(), seed, index, side) for _ in range(2))
    assert first[1] == again[1]
    assert np.array_equal(first[0], again[0])
    assert first[0].shape == (side, side, 3)
    assert first[0].dtype == np.uint8


@given(st.integers(0, 12), SEED, st.sampled_from(KINDS), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_requests_change_from_the_shift_on_and_not_before(shift: int, seed: int, kind: str, severity: int) -> None:
    """Payload i is that of an unshifted stream for i < shift_at, another picture of the same class from there on."""
    plain = SOURCE.requests(options(10, seed))
    moved = SOURCE.requests(options(10, seed, shift_at=shift, corruption=kind, severity=severity))
    assert [payload.label for payload in plain] == [payload.label for payload in moved]
    assert [a.data == b.data for a, b in zip(plain, moved, strict=True)] == [i < shift for i in range(10)]
    assert ["shifted" in payload.name for payload in moved] == [i >= shift for i in range(10)]


@given(st.lists(st.integers(0, 5), min_size=8, max_size=8).filter(any), SEED)
@settings(max_examples=30, deadline=None)
def test_classes_of_weight_zero_never_come(mix: list[int], seed: int) -> None:
    """Labels are drawn from the weighted classes only, before and after the shift separately."""
    extra = {"shift_at": 20, "class_mix": {"before": mix, "after": mix[::-1]}}
    labels = [payload.label for payload in SOURCE.requests(options(40, seed, **extra))]
    assert all(mix[label or 0] for label in labels[:20])
    assert all(mix[::-1][label or 0] for label in labels[20:])


def test_the_class_mix_is_the_one_asked_for() -> None:
    """A class of three times the weight comes about three times as often."""
    mix = (3.0, 1.0, 0, 0, 0, 0, 0, 0)
    drawn = Counter(drift.label_of(drift.generator(1, "x", index), mix) for index in range(4000))
    assert set(drawn) == {0, 1}
    assert 0.70 < drawn[0] / 4000 < 0.80


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rotation"])
def test_a_stronger_corruption_is_further_from_the_clean_picture(kind: str) -> None:
    """Severity orders the distance in pixels; only a turned shape may fall on itself again."""
    picture = drift.clean(drift.generator(0, "x", 0), 5, 40)
    far = [
        float(np.abs(drift.corrupt(picture, kind, level, np.random.default_rng(0)).astype(float) - picture).mean())
        for level in drift.SEVERITIES
    ]
    assert far[0] > 0
    assert far[-1] == max(far)


def test_arrivals_are_the_requests_with_their_labels() -> None:
    """Item i of the split "arrivals" is payload i, prepared as the service prepares it, with its class."""
    given_options = options(6, 3, shift_at=3, corruption="noise")
    payloads = SOURCE.requests(given_options)
    items = SOURCE.training(DataOptions(**{**vars(given_options), "split": "arrivals"}))
    assert len(items) == 6
    assert items.num_classes == 8
    for payload, (pixels, label) in zip(payloads, [items[i] for i in range(6)], strict=True):
        assert label == payload.label
        expected = drift.common.normalised(images.decode_rgb(payload.data), 28)
        assert torch.equal(pixels, expected)


def test_training_never_sees_the_requests_nor_the_shift() -> None:
    """Splits "train" and "test" are clean pictures of streams of their own."""
    given_options = options(30, 3, shift_at=0, corruption="invert", severity=5)
    clean = [SOURCE.training(DataOptions(**{**vars(options(30, 3)), "split": split})) for split in ("train", "test")]
    shifted = SOURCE.training(DataOptions(**{**vars(given_options), "split": "train"}))
    assert torch.equal(clean[0][4][0], shifted[4][0])
    assert not torch.equal(clean[0][4][0], clean[1][4][0])
    requests = SOURCE.training(DataOptions(**{**vars(options(30, 3)), "split": "arrivals"}))
    assert not any(torch.equal(clean[0][i][0], requests[i][0]) for i in range(30))


def test_a_specification_file_is_the_root(tmp_path: Path) -> None:
    """`drift:/path` reads it; count and seed in it win, so that every process makes the same requests."""
    path = tmp_path / "drift.json"
    path.write_text(json.dumps({"shift_at": 2, "corruption": "blur", "count": 5, "seed": 9}))
    one, other = (
        registry.request_payloads(f"drift:{path}", DataOptions(image_size=28, seed=seed)) for seed in (0, 1)
    )
    assert [payload.data for payload in one] == [payload.data for payload in other]
    assert len(one) == 5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"corruption": "blurr"}, 'did you mean "blur"'),
        ({"shift_at": -1}, "shift_at is -1"),
        ({"shift_at": 1.5}, "shift_at is 1.5"),
        ({"severity": 6}, "severity is 6"),
        ({"severity": True}, "severity is True"),
        ({"class_mix": {"after": [1, 2]}}, "class_mix.after must be 8 weights"),
        ({"class_mix": {"before": [-1] * 8}}, "none negative"),
        ({"class_mix": {"before": [0] * 8}}, "not all 0"),
        ({"class_mix": [1]}, "class_mix must be"),
        ({"shift": 3}, 'key "shift" is unknown'),
        ({"count": 0}, "count is 0"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_impossible_drifts_are_refused_in_a_sentence(given: dict[str, object], sentence: str) -> None:
    """Every bad value is named with what would be right."""
    with pytest.raises(InputError) as raised:
        drift.parse(given)
    assert any(sentence in problem for problem in raised.value.problems)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    """The root must be a JSON object."""
    (tmp_path / "list.json").write_text("[]")
    for name in ("list.json", "missing.json"):
        with pytest.raises(InputError, match="no drift specification"):
            registry.request_payloads(f"drift:{tmp_path / name}", DataOptions())

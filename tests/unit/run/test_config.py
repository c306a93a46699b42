"""config.json: the original's files load, and every mistake is reported at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError
from corun.run import config

ORIGINAL = {
    "train": [
        {"arch": "resnet152", "workers": 1, "epochs": 5000, "batch_size": 8, "image_size": 224, "device": "cuda"}
    ],
    "infer": [{"arch": "None"}],
}
EMPTY_ORIGINAL = {"train": [{"arch": "None"}], "infer": [{"arch": "None"}]}


def _problems(value: object) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        config.parse(value)
    return caught.value.problems


def test_the_originals_file_loads_unchanged() -> None:
    """The research code's config.json means what it meant there: train one job, serve nothing."""
    (cell,) = config.pairs(config.parse(ORIGINAL))
    assert cell.train_label == "resnet152_8"
    assert cell.services == ()
    assert cell.arms == ("train",)


def test_none_on_both_sides_is_no_cell() -> None:
    """Nothing to train and nothing to serve leaves nothing to measure."""
    assert config.pairs(config.parse(EMPTY_ORIGINAL)) == []


def test_empty_lists_mean_without() -> None:
    """The original replaced an empty infer list by "None"; so does an empty train list."""
    (cell,) = config.pairs(config.parse({"train": [{"arch": "a"}], "infer": []}))
    assert cell.arms == ("train",)
    (cell,) = config.pairs(config.parse({"train": [], "infer": [{"arch": "x"}]}))
    assert cell.arms == ("alone",)


def test_every_pair_is_a_cell_with_the_arms_that_fit() -> None:
    """The grid is the product of both lists; alone needs services, train a job, corun both."""
    cells = config.pairs(
        config.parse(
            {"train": [{"arch": "none"}, {"arch": "a"}], "infer": [{"arch": "x"}, [{"arch": "x"}, {"arch": "y"}]]}
        )
    )
    assert [(cell.train_label, len(cell.services), cell.arms) for cell in cells] == [
        ("none", 1, ("alone",)),
        ("a_16", 1, ("alone", "train", "corun")),
        ("none", 2, ("alone",)),
        ("a_16", 2, ("alone", "train", "corun")),
    ]


def test_combinations_and_rates_multiply() -> None:
    """3 services choose 2, 2 rates and 2 jobs make 12 cells, each its own."""
    value = {"train": [{"arch": "a"}, {"arch": "b"}], "infer": [{"arch": "x"}, [{"arch": "y"}, {"arch": "z"}]]}
    cells = config.pairs(config.parse({**value, "comb": [2], "rates": [5, 10]}))
    assert len({cell.digest() for cell in cells}) == 12
    assert {(tuple(service.arch for service in cell.services), cell.services[0].rate) for cell in cells} == {
        (pair, rate) for pair in (("x", "y"), ("x", "z"), ("y", "z")) for rate in (5, 10)
    }


def test_services_of_one_model_get_distinct_names() -> None:
    """Two services of one model would write one file."""
    (cell,) = config.pairs(config.parse({"infer": [[{"arch": "x"}, {"arch": "x"}]]}))
    assert [service.label for service in cell.services] == ["x", "x-2"]


def test_all_problems_are_listed_with_their_path() -> None:
    """One run of the program shows every mistake of the file, each with the key's path and a suggestion."""
    problems = _problems(
        {
            "train": [{"archs": "x", "lr": -1}],
            "infer": [{"arch": "a", "rat": 3}, [{"arch": "b"}, {"arch": "b", "devic": "x"}]],
            "durtion_s": 3,
            "repeat": 0,
        }
    )
    text = "\n".join(problems)
    assert 'durtion_s: unknown key; did you mean "duration_s"?' in problems
    assert 'infer.0.rat: unknown key; did you mean "rate"?' in problems
    assert 'infer.1.1.devic: unknown key; did you mean "device"?' in problems
    for path in ("train.0.arch", "train.0.lr", "repeat"):
        assert f"{path}: " in text
    assert len(problems) == 7


def test_duration_is_one_number_or_one_per_arm() -> None:
    """A number counts for every arm; a table for the arms it names, the rest keep the default."""
    assert config.parse({"duration_s": 3}).duration("corun") == 3
    per_arm = config.parse({"duration_s": {"train": 4}})
    assert per_arm.duration("train") == 4
    assert per_arm.duration("alone") == config.DEFAULT_DURATION_S


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_accepted_or_refused_with_a_sentence(value: object) -> None:
    """No JSON value crashes the parser."""
    try:
        config.parse(value)
    except InputError as error:
        message = str(error)
    else:
        return
    assert message


@given(st.permutations(list(ORIGINAL["train"][0].items())))
def test_the_digest_ignores_key_order(items: list[tuple[str, object]]) -> None:
    """The same configuration written in another order is the same cell."""
    (cell,) = config.pairs(config.parse({"train": [dict(items)]}))
    (first,) = config.pairs(config.parse({"train": ORIGINAL["train"]}))
    assert cell.digest() == first.digest()


def test_the_digest_changes_with_what_is_measured() -> None:
    """Another seed is another cell."""
    (one,) = config.pairs(config.parse({"infer": [{"arch": "x"}]}))
    (two,) = config.pairs(config.parse({"infer": [{"arch": "x"}], "seed": 1}))
    assert one.digest() != two.digest()


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """A missing file and broken JSON are bad input with the place of the fault."""
    with pytest.raises(InputError, match="cannot read"):
        config.load(tmp_path / "none.json")
    broken = tmp_path / "config.json"
    broken.write_text('{"train": [}')
    with pytest.raises(InputError, match="line 1, column 12"):
        config.load(broken)


def test_the_shipped_config_is_valid() -> None:
    """config.json at the root loads and has something to measure."""
    assert config.pairs(config.load(Path(__file__).parents[3] / "config.json"))


def test_the_schema_knows_every_key() -> None:
    """Editors get the keys from the generated JSON schema."""
    text = json.dumps(config.schema())
    for name in (*config.Config.model_fields, *config.Train.model_fields, *config.Service.model_fields):
        assert f'"{name}"' in text


def test_every_serving_cell_has_a_twin_under_the_originals_load() -> None:
    """The twin sends even seconds and rests after replies, without the arm that has no load; rate 0 stays the trace."""
    value = {
        "train": [{"arch": "resnet18"}],
        "infer": [[{"arch": "null", "rate": 5}, {"arch": "resnet18", "rate": 0}]],
    }
    cell, twin = config.with_legacy(config.pairs(config.parse(value)))
    assert cell.arms == config.ARMS
    assert twin.arms == ("alone", "corun")
    assert [service.mode for service in twin.services] == ["closed", "closed"]
    assert [service.process for service in twin.services] == [{"name": "legacy", "rate": 5.0}, "poisson"]
    assert twin.digest() != cell.digest()
    assert twin.label.endswith("(the original's load)")


def test_a_cell_without_services_has_no_twin() -> None:
    """Training alone sends nothing, so there is no other load to send."""
    cells = config.pairs(config.parse(ORIGINAL))
    assert config.with_legacy(cells) == cells


def test_windows_and_policy_can_be_overridden() -> None:
    """Ticks become seconds of every arm; another policy keeps the options that were given; nothing stays nothing."""
    given = config.parse({"period_s": 0.5, "sharing": {"policy": "slo", "slo_ms": 100}})
    assert config.overridden(given) == given
    assert config.overridden(given, 8).duration_s == dict.fromkeys(config.ARMS, 4.0)
    assert config.overridden(given, policy="idle+slo").sharing == {"policy": "idle+slo", "slo_ms": 100}
    assert config.overridden(config.parse({"sharing": "nice"}), policy="idle").sharing == {"policy": "idle"}

"""Which process runs on which node, and the `launch` key that says so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.launch import cells
from corun.launch.arguments import launch_of
from corun.launch.placement import Node, Want, distinct_names, place
from corun.launch.ray_crew import wants
from corun.run import config

HOME = Node("1", "home", "10.0.0.1", {"role": "clients"})
EDGE_A = Node("2", "edge-a", "10.0.0.2", {"role": "servers"}, frozenset({"GPU"}))
EDGE_B = Node("3", "edge-b", "10.0.0.3", {"role": "servers", "rack": "2"})
NODES = (HOME, EDGE_B, EDGE_A)
SERVERS = Want(labels={"role": "servers"})

some_wants = st.builds(
    Want,
    node=st.sampled_from([None, "home", "10.0.0.2"]),
    labels=st.sampled_from([{}, {"role": "servers"}, {"rack": "2"}]),
    resource=st.sampled_from([None, "GPU"]),
)


def test_everything_is_on_the_launchers_node_when_nothing_is_placed() -> None:
    """Roles that are left out run on the launcher's node, which is profiled once."""
    placed = place(NODES, HOME, {}, services=2, trains=True)
    assert placed.servers == placed.clients == (HOME, HOME)
    assert placed.trainer == HOME
    assert placed.profiled == placed.nodes == (HOME,)
    assert placed.measured == HOME
    assert placed.shared


def test_services_are_spread_and_the_trainer_is_beside_the_first() -> None:
    """Service k is on the k-th node that fits, by name; the trainer is where it disturbs a service."""
    placed = place(NODES, HOME, {"server": SERVERS}, services=3, trains=True)
    assert placed.servers == (EDGE_A, EDGE_B, EDGE_A)
    assert placed.trainer == placed.measured == EDGE_A
    assert placed.clients == (HOME, HOME, HOME)
    assert set(placed.profiled) == {EDGE_A, EDGE_B, HOME}
    assert not placed.shared
    assert placed.roles(EDGE_A) == ("server", "trainer", "profiler")
    assert placed.roles(HOME) == ("client", "profiler")


def test_a_placement_nobody_fits_lists_every_role_and_every_node() -> None:
    """The error names each role that cannot be placed, what it asked for, and what there is."""
    asked = {"server": Want(labels={"role": "server"}), "client": Want(resource="TPU"), "trainer": Want(node="home")}
    with pytest.raises(InputError) as caught:
        place(NODES, HOME, asked, services=1, trains=True)
    assert len(caught.value.problems) == 2
    text = str(caught.value)
    for part in ("server: no node has label role=server", "client: no node has resource TPU", "edge-a (10.0.0.2"):
        assert part in text


def test_a_profiler_that_profiles_nothing_is_an_error() -> None:
    """A profiler placed where nothing runs is refused rather than started in vain."""
    with pytest.raises(InputError, match="profiler"):
        place(NODES, HOME, {"profiler": Want(node="edge-b")}, services=1, trains=False)


@settings(max_examples=60)
@given(some_wants, some_wants, st.integers(0, 4), st.booleans())
def test_what_is_placed_fits_what_was_asked(server: Want, client: Want, services: int, trains: bool) -> None:
    """Every process is on a node that fits, all used nodes are profiled, and the order of nodes does not matter."""
    asked = {"server": server, "client": client}
    try:
        placed = place(NODES, HOME, asked, services, trains)
    except InputError:
        assert not all(any(want.fits(node) for node in NODES) for want in asked.values())
        return
    assert len(placed.servers) == len(placed.clients) == services
    assert all(map(server.fits, placed.servers))
    assert all(map(client.fits, placed.clients))
    assert set(placed.profiled) == {*placed.servers, *placed.clients, *([placed.trainer] if trains else [])}
    assert place(NODES[::-1], HOME, asked, services, trains) == placed


@settings(max_examples=60)
@given(st.lists(st.text("ab-/. ", max_size=4), max_size=6))
def test_node_names_become_distinct_directory_names(names: list[str]) -> None:
    """Whatever Ray calls its nodes, each gets a directory of its own below the run."""
    found = distinct_names(names)
    assert len(set(found)) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") for name in found)


def _launch(value: Any) -> config.Config:
    return config.parse({"infer": [{"arch": "null"}], "train": [{"arch": "None"}], "launch": value})


def test_the_launch_key_lists_all_its_problems() -> None:
    """Unknown keys at every depth, bad labels and bad values of `launch` are reported together, with suggestions."""
    placement = {"servr": {}, "client": {"label": "x", "resorce": "a"}}
    with pytest.raises(InputError) as caught:
        _launch({"backend": "rai", "adress": "a:1", "placement": placement})
    assert len(caught.value.problems) == 5
    text = str(caught.value)
    for part in ('did you mean "address"', 'did you mean "server"', 'did you mean "resource"', "launch.backend"):
        assert part in text


def test_keys_of_a_cluster_need_the_backend() -> None:
    """An address without `"backend": "ray"` would be silently ignored, so it is an error."""
    with pytest.raises(InputError, match="has no effect without"):
        _launch({"address": "10.0.0.1:6379"})


def test_a_local_launch_does_not_change_a_cells_name() -> None:
    """Cells measured before there were clusters keep their digest; a placement is part of one, an address is not."""
    placement = {"server": {"label": "role=servers"}}
    digests = [
        config.pairs(_launch(value))[0].digest()
        for value in (
            {},
            {"backend": "local"},
            {"backend": "ray", "address": "a:1", "placement": placement},
            {"backend": "ray", "address": "b:2", "placement": placement},
        )
    ]
    assert digests[0] == digests[1] != digests[2] == digests[3]
    assert "launch" not in config.pairs(_launch({}))[0].resolved()


def test_labels_are_written_either_way() -> None:
    """`"role=servers"` and {"role": "servers"} ask for the same node."""
    for label in ("role=servers", {"role": "servers"}):
        launch = _launch({"backend": "ray", "placement": {"server": {"label": label}}}).launch
        assert wants(launch.placement) == {"server": SERVERS}


def test_the_launch_option_takes_a_file_or_the_object(tmp_path: Any) -> None:
    """`--launch` is a config.json, whose `launch` key counts, or that object itself."""
    path = tmp_path / "config.json"
    path.write_text('{"launch": {"backend": "ray", "address": "a:1"}}')
    assert launch_of(str(path)) == launch_of('{"backend": "ray", "address": "a:1"}')
    assert launch_of(None).local
    for bad in ('{"backend": ', '{"backend": "rei"}'):
        with pytest.raises(InputError, match="--launch"):
            launch_of(bad)


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster without the optional library is refused before anything starts, with the pip line."""
    monkeypatch.setattr(cells, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "corun\[ray\]"'):
        cells.require_known(config.pairs(_launch({"backend": "ray"})))


def test_a_host_has_no_effect_on_a_cluster() -> None:
    """Services of a cluster listen on their node's address, so a `host` beside it is an error."""
    value = {"infer": [{"arch": "null"}], "host": "0.0.0.0", "launch": {"backend": "ray"}}
    with pytest.raises(InputError, match="host: has no effect"):
        cells.require_known(config.pairs(config.parse(value)))

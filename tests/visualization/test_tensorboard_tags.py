"""Where TensorBoard shows each scalar, whatever the teachers are called."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from odp_callbacks.visualization.tensorboard_tags import PINNED, ScalarPlaces, pinned_cards, run_names

NAMES = ("step", "gain", "probe", "all", "a - b", "a", "b")


@pytest.mark.parametrize(
    ("name", "run", "tag"),
    [
        ("odp/step/gain", "", "odp/step/gain"),
        ("odp/step/reward_change", "reward change", "odp/step/gain_sum"),
        ("odp/step/cosine/gain", "gain", "odp details/step/cosine"),
        ("odp/probe/seconds", "", "odp details/probe/seconds"),
        ("odp/update_gain/step/all", "step", "odp/update_gain"),
        ("odp/update_gain/all/all", "all", "odp/update_gain"),
        ("odp/update_gain/a - b/all", "a - b", "odp/update_gain"),
        ("odp/update_gain/step - gain/all", "step - gain", "odp details/difference/update_gain"),
        ("odp/update_gain/a/incorrect-correct", "a", "odp/update_gain/incorrect-correct"),
        ("odp/training/update_gain/probe/correct", "probe", "odp details/training/update_gain/correct"),
        ("odp/training/success_rate", "", "odp details/training/success_rate"),
        ("odp/pooled/update_gain_low/a/all", "a", "odp details/pooled/update_gain_low"),
        ("odp/adam/update_gain/a/all", "a", "odp/adam/update_gain"),
        ("odp/correlation_reverse_kl/a", "a", "odp details/correlation_reverse_kl"),
        ("odp/gate/step/correct", "step", "odp/gate/correct"),
        ("odp/gate/a/correct depth 4-7", "a", "odp details/gate/correct depth 4-7"),
        ("threshold", "", "threshold"),
    ],
)
def test_places(name: str, run: str, tag: str) -> None:
    assert ScalarPlaces(NAMES, "odp").of(name) == (run, tag)


def test_the_group_has_the_callback_s_name() -> None:
    places = ScalarPlaces(["a"], "odp-hard")
    assert places.of("odp-hard/update_gain/a/all") == ("a", "odp-hard/update_gain")
    assert places.of("odp-hard/nodes/a/all") == ("a", "odp-hard details/nodes")


@pytest.mark.parametrize("names", [("a:b", "a?b", "a*b"), ("..", "."), (" a", "a "), ("con", "größer", "日本")])
def test_runs_are_different_folders_inside_the_callback_s(names: tuple[str, ...]) -> None:
    runs = list(run_names(names).values())
    assert len(set(runs)) == len(names)
    for run in runs:
        assert run.strip(" .") == run
        assert not set(run) & set('/\\:*?"<>|')


def test_the_pins_are_what_tensorboard_reads() -> None:
    address = urlsplit(pinned_cards("odp-hard", "predicted_gain"))
    (cards,) = parse_qs(address.query)["pinnedCards"]
    assert [card["tag"] for card in json.loads(cards)] == [
        f"odp-hard/{tag.format(gain='predicted_gain')}" for tag in PINNED
    ]
    assert {card["plugin"] for card in json.loads(cards)} == {"scalars"}
    assert address.fragment == "timeseries"

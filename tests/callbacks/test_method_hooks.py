"""Hooks on a method of one object."""

from typing import Any

import pytest

from odp_callbacks.callbacks.method_hooks import MethodHook


class Host:
    def double(self, number: int) -> int:
        return 2 * number

    @staticmethod
    def triple(number: int) -> int:
        return 3 * number


def test_only_the_object_itself_is_observed_and_static_methods_work() -> None:
    host, other, seen = Host(), Host(), []
    hooks = [
        MethodHook(host, name, lambda result, *args, **keywords: seen.append((result, args, keywords)))
        for name in ("double", "triple")
    ]
    assert host.double(2) == 4
    assert host.triple(number=2) == 6
    assert other.double(2) == 4
    assert seen == [(4, (2,), {}), (6, (), {"number": 2})]
    for hook in hooks:
        hook.remove()
    assert vars(host) == {}
    with pytest.raises(AttributeError, match="none"):
        MethodHook(host, "none", print)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_hooks_can_be_removed_in_any_order(order: tuple[int, int]) -> None:
    host, seen = Host(), []
    hooks = [MethodHook(host, "double", lambda result, number, name=name: seen.append(name)) for name in "ab"]
    host.double(1)
    assert seen == ["a", "b"]
    hooks[order[0]].remove()
    host.double(1)
    assert seen[2:] == ["ba"[order[0]]]
    hooks[order[1]].remove()
    assert vars(host) == {}


def test_what_was_there_before_and_what_came_later_stay() -> None:
    host, seen = Host(), []
    host.double = lambda number: 10 * number  # type: ignore[method-assign]
    before = host.double
    hook = MethodHook(host, "double", lambda result, number: seen.append(result))
    hook.remove()
    assert host.double is before
    hook = MethodHook(host, "double", lambda result, number: seen.append(result))
    inner = host.double

    def later(number: int) -> Any:
        return inner(number) + 1

    host.double = later  # type: ignore[method-assign]
    hook.remove()
    assert host.double is later
    assert host.double(1) == 11
    assert seen == [], "it observes no more"

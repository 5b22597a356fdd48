"""Lets an observer see the calls of one method of one object."""

from collections.abc import Callable
from typing import Any


class MethodHook:
    """Calls an observer after each call of a method, with its result and its arguments.

    The method itself does what it did before. Nothing else of the object changes, and other objects of its class do
    not change at all.

    Args:
        host: The object.
        method_name: Name of the method.
        observer: Called with the result, then with the arguments of the call.

    Raises:
        AttributeError: If the object has no such method.

    Examples:
        >>> class Counter:
        ...     def add(self, number):
        ...         return number + 1
        >>> counter, seen = Counter(), []
        >>> hook = MethodHook(counter, "add", lambda result, number: seen.append((number, result)))
        >>> counter.add(2), seen
        (3, [(2, 3)])
        >>> hook.remove()
        >>> vars(counter)
        {}
    """

    def __init__(self, host: Any, method_name: str, observer: Callable[..., None]) -> None:
        self.host, self.method_name, self.is_active = host, method_name, True
        self.original = getattr(host, method_name)
        self.was_replaced_before = method_name in vars(host)

        def observed_method(*args: Any, **keywords: Any) -> Any:
            result = self.original(*args, **keywords)
            if self.is_active:
                observer(result, *args, **keywords)
            return result

        observed_method.odp_hook = self  # type: ignore[attr-defined]
        setattr(host, method_name, observed_method)

    def remove(self) -> None:
        """Stop observing, and put the method back that was there before.

        Something else may have wrapped the method since then. It stays, and so does this hook, which then does nothing.
        """
        self.is_active = False
        while (hook := _outermost_hook(self.host, self.method_name)) is not None and not hook.is_active:
            if hook.was_replaced_before:
                setattr(self.host, self.method_name, hook.original)
            else:
                delattr(self.host, self.method_name)


def _outermost_hook(host: Any, method_name: str) -> MethodHook | None:
    """The hook that a call of the method meets first; None if something else is there."""
    hook: MethodHook | None = getattr(vars(host).get(method_name), "odp_hook", None)
    return hook

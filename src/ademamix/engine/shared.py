"""What one call on an optimizer leaves for another, also where a wrapper of the optimizer gets the one or the other."""

from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """An attribute that is kept in the dict ``_shared`` of the optimizer that has it.

    Lightning and others hand out objects whose class derives from the optimizer's. They look up its attributes, or have
    copies of them, but keep to themselves what is set on them. They share the dict.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> T:
        try:
            value: T = optimizer._shared[self.name]
        except KeyError:
            raise AttributeError(f"{type(optimizer).__name__} has no {self.name} now") from None
        return value

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._shared[self.name] = value

    def __delete__(self, optimizer: Any) -> None:
        optimizer._shared.pop(self.name, None)

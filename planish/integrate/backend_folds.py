"""Which weights a fold was made of, and whether they still are those.

Dynamo guards neither the identity of a parameter nor its numbers: two instances of a class share one compiled graph,
and an update in place goes unseen. A fold is therefore found by the tensors of each call:

    the same object                 weak references: an `id` is given again when an object is freed
    not written to since            the version counter, which every operation in place advances
    on the same memory              `parameter.data = other` and `module.to(dtype)` exchange the memory under an object;
                                    a weak reference to the storage keeps its address from being given again

What these do not see is a write to the same memory past the counter: `parameter.data.mul_(2)`, an array of numpy that
shares the memory. A fold goes when the first of its tensors dies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from planish.integrate.backend_code import Code


@dataclass(frozen=True, eq=False)
class Mark:
    """One tensor as it was.

    Attributes:
        index: its placeholder.
        tensor: a weak reference to the object.
        version: of its counter; None: it has none, and nothing was made of it.
        address: of its data.
        storage: a weak reference to its storage.
    """

    index: int
    tensor: weakref.ref[torch.Tensor]
    version: int | None
    address: int
    storage: StorageWeakRef


@dataclass(eq=False)
class Fold:
    """Constants that were made of one set of weights, and the code that reads them.

    Attributes:
        marks: the weights.
        own: the constants.
        code: the code; None: the weights cannot be folded, the float graph runs.
        again: True once it has served a later call.
        changes: for tensors that were written to before each of the last calls: how many.
    """

    marks: tuple[Mark, ...]
    own: tuple[torch.Tensor, ...]
    code: Code | None
    again: bool = False
    changes: Mapping[int, int] = field(default_factory=dict)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """True if the weights of this call are those of the fold, unchanged."""
        expired = torch.UntypedStorage._expired
        for mark in self.marks:
            tensor = mark.tensor()
            if (
                tensor is None
                or tensor is not inputs[mark.index]
                or (mark.version is not None and tensor._version != mark.version)
                or tensor.data_ptr() != mark.address
                or expired(mark.storage.cdata)
            ):
                return False
        return True


class Folds:
    """The folds of one graph, by the weights that they were made of."""

    def __init__(self) -> None:
        self._folds: dict[tuple[int, ...], Fold] = {}
        self._last: weakref.ref[Fold] | None = None
        self.lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._folds)

    def find(self, inputs: Sequence[Any], held: Sequence[int]) -> Fold | None:
        """The fold of the weights of a call, if there is one and it is still true."""
        last = self._last() if self._last is not None else None
        found = last if last is not None and last.holds(inputs) else None
        if found is None:
            found = self._folds.get(tuple(id(inputs[i]) for i in held))
            if found is None or not found.holds(inputs):
                return None
            self._last = weakref.ref(found)
        found.again = True
        return found

    def changes(self, inputs: Sequence[Any], held: Sequence[int]) -> dict[int, int]:
        """The placeholders whose tensors were written to since their fold was made, and for how many calls in a row."""
        found = self._folds.get(tuple(id(inputs[i]) for i in held))
        if found is None:
            return {}
        before = {} if found.again else found.changes
        marks = [mark for mark in found.marks if mark.version is not None]
        stale = [mark.index for mark in marks if inputs[mark.index]._version != mark.version]
        return {index: before.get(index, 0) + 1 for index in stale}

    def add(
        self,
        inputs: Sequence[Any],
        held: Sequence[int],
        own: Sequence[torch.Tensor],
        code: Code | None,
        changes: Mapping[int, int] | None = None,
    ) -> Fold:
        """Keep a fold until one of its weights dies."""
        key = tuple(id(inputs[i]) for i in held)
        forget = _forgetting(weakref.ref(self), key)
        marks = tuple(_mark(i, inputs[i], forget) for i in held)
        fold = Fold(marks, tuple(own), code, changes=dict(changes or {}))
        self._folds[key] = fold
        self._last = weakref.ref(fold)
        return fold

    def clear(self) -> None:
        """Forget all."""
        self._folds.clear()
        self._last = None

    def drop(self, tensors: Collection[int]) -> None:
        """Forget the folds of tensors, given by their `id`."""
        for key in [key for key in self._folds if any(i in tensors for i in key)]:
            self._folds.pop(key, None)

    def _forget(self, key: tuple[int, ...], reference: Any) -> None:
        fold = self._folds.get(key)
        if fold is not None and any(mark.tensor is reference for mark in fold.marks):
            self._folds.pop(key, None)


def _forgetting(folds: weakref.ref[Folds], key: tuple[int, ...]) -> Callable[[Any], None]:
    def forget(reference: Any) -> None:
        owner = folds()
        if owner is not None:
            owner._forget(key, reference)

    return forget


def _mark(index: int, tensor: torch.Tensor, forget: Callable[[Any], None]) -> Mark:
    storage = StorageWeakRef(tensor.untyped_storage())
    version = tensor._version if counts_versions(tensor) else None
    return Mark(index, weakref.ref(tensor, forget), version, tensor.data_ptr(), storage)


def counts_versions(tensor: torch.Tensor) -> bool:
    """False for a tensor made in inference mode: it does not say when it is written to."""
    return not tensor.is_inference()

"""Micro-batches from bytes: decoding, augmentation, and other samples in the place of those that stay bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from data_pipeline.codec import decode
from data_pipeline.collate import Batch, Example, TrainRecipe, collate, make_example
from data_pipeline.errors import DataError
from data_pipeline.fetch import Fetched, read_single
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, Place
from data_pipeline.storage import Storage
from model.errors import UserError

_MOST_CANDIDATES = 100  # so many bad samples in a row are no accident


@dataclass(frozen=True)
class Substitution:
    """A sample that cannot be used, and the next good one of the order, which took its place."""

    position: int
    key: str
    cause: str
    """Names the shard and the byte."""
    substitute: str
    """Key of what is shown instead."""


@dataclass(frozen=True)
class Work:
    """A micro-batch before decoding."""

    positions: tuple[int | None, ...]
    places: tuple[Place | None, ...]
    members: tuple[Fetched, ...]


@dataclass(frozen=True)
class Spoiled:
    """A micro-batch with samples that cannot be used."""

    task: Work
    causes: tuple[tuple[int, DataError], ...]
    """Rows and what is wrong."""


class MicroBatches(Dataset["Batch | Spoiled | UserError"]):
    """Decodes and augments a task. An error is a result like others: re-raised by torch it would lose its form."""

    def __init__(self, recipes: Sequence[TrainRecipe]) -> None:
        self._recipes = recipes  # of every data set

    def __getitem__(self, index: Work | UserError) -> Batch | Spoiled | UserError:
        """The batch of a task (torch calls what it hands to a data set an index)."""
        if isinstance(index, UserError):
            return index
        rows = list(zip(index.positions, index.places, index.members, strict=True))
        try:
            examples = [self._example(*row) for row in rows]
            causes = tuple((row, found) for row, found in enumerate(examples) if isinstance(found, DataError))
            if causes:
                return Spoiled(index, causes)
            whole = [example for example in examples if not isinstance(example, DataError)]
            return collate(whole, self._recipes[0].canvas)
        except UserError as error:
            return error

    def _example(self, position: int | None, place: Place | None, members: Fetched) -> Example | DataError | None:
        if position is None or place is None or members is None or isinstance(members, DataError):
            return members if isinstance(members, DataError) else None
        try:
            return make_example(decode(members), place.dataset, position, self._recipes[place.dataset])
        except DataError as error:
            return error


class Repair:
    """Puts other samples in the place of bad ones, in this process: it happens rarely."""

    def __init__(self, manifests: Sequence[Manifest], order: Order, storage: Storage, make: MicroBatches) -> None:
        self._manifests, self._order, self._storage, self._make = manifests, order, storage, make

    def __call__(self, spoiled: Spoiled) -> tuple[Batch, tuple[Substitution, ...]]:
        """The batch with other samples in the bad ones' rows. Raises DataError where none can be found."""
        task, substitutions = spoiled.task, []
        for row, cause in spoiled.causes:
            task, substitution = self._replace(task, row, cause)
            substitutions.append(substitution)
        result = self._make[task]
        if isinstance(result, Spoiled):
            raise result.causes[0][1]
        return checked(result, None)[0], tuple(substitutions)

    def _replace(self, task: Work, row: int, cause: DataError) -> tuple[Work, Substitution]:
        """The next sample of the order that is whole: a function of the position alone, whatever the ranks."""
        position, bad = task.positions[row], task.places[row]
        assert position is not None
        assert bad is not None
        for ahead in range(1, _MOST_CANDIDATES + 1):
            place = self._order.at(position + ahead)
            try:
                members = read_single(self._manifests[place.dataset], place.index, self._storage)
                decode(members)
            except DataError:
                continue
            places, contents = list(task.places), list(task.members)
            places[row], contents[row] = place, members
            keys = [str(self._manifests[p.dataset].key[p.index]) for p in (bad, place)]
            repaired = Work(task.positions, tuple(places), tuple(contents))
            return repaired, Substitution(position, keys[0], str(cause), keys[1])
        raise DataError(f"{cause}; nor can any of the {_MOST_CANDIDATES} samples after it in the order be used")


def checked(result: Batch | Spoiled | UserError, repair: Repair | None) -> tuple[Batch, tuple[Substitution, ...]]:
    """The batch, repaired where that is wanted; otherwise raises what is wrong with it."""
    match result:
        case UserError():
            raise result
        case Spoiled(causes=causes):
            if repair is None:
                raise causes[0][1]
            return repair(result)
        case _:
            return result, ()

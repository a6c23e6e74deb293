"""Micro-batches from bytes: decoding, augmentation, and other samples in the place of those that stay bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch.utils.data import Dataset

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.fetch import Members, read_single
from m2f.data_pipeline.order.order import Order, Place
from m2f.data_pipeline.randomness import Stream
from m2f.data_pipeline.shards.codec import decode
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import TrainBatch, collate, collate_sources
from m2f.data_pipeline.transforms.example import Example, TrainRecipe, cut_example, paste_objects, without_empty
from m2f.model.errors import UserError

_MOST_CANDIDATES = 100  # so many bad samples in a row are no accident


@dataclass(frozen=True)
class Substitution:
    """A sample that cannot be used, and the next good one of the order, which took its place in the image shown there
    or as the one that gives objects to it.
    """

    position: int
    key: str
    cause: str
    """Names the shard and the byte."""
    substitute: str
    """Key of what is shown instead."""


Role = Literal["shown", "pasted"]


@dataclass(frozen=True)
class Visit:
    """One sample before decoding."""

    place: Place
    members: Members | DataError


@dataclass(frozen=True)
class Row:
    """What one image of a micro-batch is made of."""

    position: int
    shown: Visit
    pasted: Visit | None
    """Whose objects are pasted on it."""

    def visit(self, role: Role) -> Visit | None:
        """The sample in this role."""
        return self.shown if role == "shown" else self.pasted

    def having(self, role: Role, visit: Visit) -> Row:
        """The row with another sample in this role."""
        return replace(self, shown=visit) if role == "shown" else replace(self, pasted=visit)


@dataclass(frozen=True)
class Work:
    """A micro-batch before decoding; None is a filler."""

    rows: tuple[Row | None, ...]


@dataclass(frozen=True)
class Cause:
    """A sample that cannot be used, and what is wrong with it."""

    row: int
    role: Role
    error: DataError


@dataclass(frozen=True)
class Spoiled:
    """A micro-batch with samples that cannot be used."""

    work: Work
    causes: tuple[Cause, ...]


class MicroBatches(Dataset["TrainBatch | Spoiled | UserError"]):
    """Decodes and augments work. An error is a result like others: re-raised by torch it would lose its form."""

    def __init__(self, recipes: Sequence[TrainRecipe]) -> None:
        self._recipes = recipes  # of every data set

    def __getitem__(self, index: Work | UserError) -> TrainBatch | Spoiled | UserError:
        """The batch of a piece of work (torch calls what it hands to a data set an index)."""
        if isinstance(index, UserError):
            return index
        causes: list[Cause] = []
        try:
            examples = [None if row is None else self._example(n, row, causes) for n, row in enumerate(index.rows)]
            if causes:
                return Spoiled(index, tuple(causes))
            recipe = self._recipes[0]
            return (collate_sources if recipe.on_device else collate)(examples, recipe.canvas)
        except UserError as error:
            return error

    def _example(self, number: int, row: Row, causes: list[Cause]) -> Example | None:
        """The example of a row; None where a sample of it cannot be used, which is added to the causes."""
        shown, pasted = (self._cut(number, row, role, causes) for role in ("shown", "pasted"))
        if shown is None:
            return None
        recipe = self._recipes[row.shown.place.dataset]
        return without_empty(shown if pasted is None else paste_objects(shown, pasted, recipe), recipe)

    def _cut(self, number: int, row: Row, role: Role, causes: list[Cause]) -> Example | None:
        visit, stream = row.visit(role), Stream.AUGMENT if role == "shown" else Stream.PASTED
        if visit is None:
            return None
        try:
            if isinstance(visit.members, DataError):
                raise visit.members
            dataset = visit.place.dataset
            return cut_example(decode(visit.members), dataset, row.position, self._recipes[dataset], stream)
        except DataError as error:
            causes.append(Cause(number, role, error))
            return None


class Repair:
    """Puts other samples in the place of bad ones, in this process: it happens rarely."""

    def __init__(self, manifests: Sequence[Manifest], order: Order, storage: Storage, make: MicroBatches) -> None:
        self._manifests, self._order, self._storage, self._make = manifests, order, storage, make

    def __call__(self, spoiled: Spoiled) -> tuple[TrainBatch, tuple[Substitution, ...]]:
        """The batch with other samples in the place of the bad ones. Raises DataError where none can be found."""
        rows, substitutions = list(spoiled.work.rows), []
        for cause in spoiled.causes:
            row = rows[cause.row]
            assert row is not None
            rows[cause.row], substitution = self._replace(row, cause)
            substitutions.append(substitution)
        result = self._make[Work(tuple(rows))]
        if isinstance(result, Spoiled):
            raise result.causes[0].error
        return checked(result, None)[0], tuple(substitutions)

    def _replace(self, row: Row, cause: Cause) -> tuple[Row, Substitution]:
        """The next sample of the order that is whole: a function of the position alone, whatever the ranks."""
        bad = row.visit(cause.role)
        assert bad is not None
        for ahead in range(1, _MOST_CANDIDATES + 1):
            place = self._order.at(row.position + ahead)
            try:
                members = read_single(self._manifests[place.dataset], place.index, self._storage)
                decode(members)
            except DataError:
                continue
            keys = [str(self._manifests[p.dataset].key[p.index]) for p in (bad.place, place)]
            found = row.having(cause.role, Visit(place, members))
            return found, Substitution(row.position, keys[0], str(cause.error), keys[1])
        raise DataError(f"{cause.error}; nor can any of the {_MOST_CANDIDATES} samples after it in the order be used")


def checked(
    result: TrainBatch | Spoiled | UserError, repair: Repair | None
) -> tuple[TrainBatch, tuple[Substitution, ...]]:
    """The batch, repaired where that is wanted; otherwise raises what is wrong with it."""
    match result:
        case UserError():
            raise result
        case Spoiled(causes=causes):
            if repair is None:
                raise causes[0].error
            return repair(result)
        case _:
            return result, ()

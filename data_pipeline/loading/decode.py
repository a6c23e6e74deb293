"""Decoding and augmentation of micro-batches, and replacement of unusable samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.fetch import RawSample, read_single
from m2f.data_pipeline.order.order import Order, SampleRef
from m2f.data_pipeline.randomness import Stream
from m2f.data_pipeline.shards.codec import decode
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.data_pipeline.transforms.collate import Batch, collate
from m2f.data_pipeline.transforms.example import (
    Example,
    TrainTransform,
    augment_sample,
    paste_objects,
    without_empty_targets,
)
from m2f.model.errors import UserError

_MAX_CANDIDATES = 100
"""Number of samples that are tried as a substitute. More bad samples in a row indicate a damaged data set."""


@dataclass(frozen=True)
class Substitution:
    """An unusable sample and its substitute, the next good sample of the order.

    Either the image itself is replaced, or the image whose objects are pasted.
    """

    position: int
    """Position of the image in the order."""
    key: str
    """Key of the unusable sample."""
    cause: str
    """Reason. It names the sample, and for a wrong checksum also the shard and the byte offset."""
    substitute: str
    """Key of the substitute."""


@dataclass(frozen=True)
class RawExample:
    """The undecoded samples of one image of a micro-batch."""

    position: int
    base: RawSample
    """The image itself."""
    partner: RawSample | None
    """The image whose objects are pasted onto it; None if nothing is pasted."""

    @property
    def error(self) -> DataError | None:
        """Return the error of the first unusable sample; None if all are usable."""
        samples = (self.base, self.partner)
        return next((s.members for s in samples if s is not None and isinstance(s.members, DataError)), None)


RawBatch = tuple[RawExample | None, ...]
"""A micro-batch before decoding; None is a filler."""

BatchResult = Batch | RawBatch | UserError
"""A batch, or the raw batch with errors in place of its unusable samples, or an error that ends loading."""


class MicroBatchDataset(Dataset[BatchResult]):
    """Decodes, augments and collates raw batches. Errors are returned, because torch would change a raised error."""

    def __init__(self, transforms: Sequence[TrainTransform]) -> None:
        self._transforms = transforms  # one for each data set of the mixture

    def __getitem__(self, index: RawBatch | UserError) -> BatchResult:
        """Return the batch for a raw batch. torch calls the argument of a data set an index."""
        if isinstance(index, UserError):
            return index
        try:
            results = [None if raw is None else self._example(raw) for raw in index]
            examples = [example for example in results if not isinstance(example, RawExample)]
            if len(examples) < len(results):
                return tuple(e if isinstance(e, RawExample) else raw for e, raw in zip(results, index, strict=True))
            return collate(examples, self._transforms[0].canvas)
        except UserError as error:
            return error

    def _example(self, raw: RawExample) -> Example | RawExample:
        """Return the example. If a sample is unusable, return `raw` with the error in place of the sample."""
        base = self._augment(raw.base, raw.position, Stream.AUGMENT)
        partner = None if raw.partner is None else self._augment(raw.partner, raw.position, Stream.PASTED)
        if isinstance(base, RawSample) or isinstance(partner, RawSample):
            return RawExample(
                raw.position,
                base if isinstance(base, RawSample) else raw.base,
                partner if isinstance(partner, RawSample) else raw.partner,
            )
        transform = self._transforms[raw.base.ref.dataset]
        return without_empty_targets(base if partner is None else paste_objects(base, partner, transform), transform)

    def _augment(self, sample: RawSample, position: int, stream: Stream) -> Example | RawSample:
        """Return the augmented image. If the sample is unusable, return it with the error in place of its members."""
        dataset = sample.ref.dataset
        if isinstance(sample.members, DataError):
            return sample
        try:
            return augment_sample(decode(sample.members), dataset, position, self._transforms[dataset], stream)
        except DataError as error:
            return replace(sample, members=error)


class SubstituteFinder:
    """Replaces unusable samples in the main process, since this is rare."""

    def __init__(
        self, manifests: Sequence[Manifest], order: Order, storage: Storage, dataset: MicroBatchDataset
    ) -> None:
        self._manifests, self._order, self._storage, self._dataset = manifests, order, storage, dataset

    def __call__(self, raw: RawBatch) -> tuple[Batch, tuple[Substitution, ...]]:
        """Return the batch with substitutes for its bad samples, and the list of substitutions.

        Raises:
            DataError: no substitute is found.
        """
        substitutions: list[Substitution] = []
        replaced = tuple(None if example is None else self._replace(example, substitutions) for example in raw)
        return resolve_batch(self._dataset[replaced], None)[0], tuple(substitutions)

    def _replace(self, example: RawExample, substitutions: list[Substitution]) -> RawExample:
        base = self._find_usable(example.base, example.position, substitutions)
        partner = example.partner
        if partner is not None:
            partner = self._find_usable(partner, example.position, substitutions)
        return RawExample(example.position, base, partner)

    def _find_usable(self, sample: RawSample, position: int, substitutions: list[Substitution]) -> RawSample:
        """Return the sample, or the first good one after `position` in the order. It does not depend on the ranks."""
        if not isinstance(sample.members, DataError):
            return sample
        for offset in range(1, _MAX_CANDIDATES + 1):
            ref = self._order.at(position + offset)
            try:
                members = read_single(self._manifests[ref.dataset], ref.index, self._storage)
                decode(members)
            except DataError:
                continue
            cause = str(sample.members)
            substitutions.append(Substitution(position, self._key(sample.ref), cause, self._key(ref)))
            return RawSample(ref, members)
        raise DataError(f"{sample.members}; none of the next {_MAX_CANDIDATES} samples in the order can be used either")

    def _key(self, ref: SampleRef) -> str:
        return str(self._manifests[ref.dataset].key[ref.index])


def resolve_batch(result: BatchResult, substitutes: SubstituteFinder | None) -> tuple[Batch, tuple[Substitution, ...]]:
    """Return the batch, with substitutes for bad samples if `substitutes` is given.

    Raises:
        UserError: the result is an error, or a sample is bad and `substitutes` is None.
    """
    match result:
        case UserError():
            raise result
        case tuple():
            if substitutes is not None:
                return substitutes(result)
            raise next(raw.error for raw in result if raw is not None and raw.error is not None)
        case _:
            return result, ()

"""What a sharding job found and did, and how it can fail."""

from __future__ import annotations

from dataclasses import dataclass

from m2f.cluster.terminal import first_lines, format_duration
from m2f.data_pipeline.shards.write import SampleProblem
from m2f.data_pipeline.storage.storage import join
from m2f.model.counted import counted
from m2f.model.errors import UserError

REPORT_FILE = "report.json"
SHOWN_PROBLEMS = 10


class ShardJobError(UserError):
    """A shard that cannot be written. Names the shard, the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """A shard that could not be written, and why."""

    index: int
    message: str


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a sharding job found and did; stored as report.json beside the shards."""

    dataset: str
    target: str
    """Folder or `s3://` prefix of the data set."""
    num_samples: int
    """Samples that the source has."""
    num_shards: int
    num_bytes: int
    """Of all shards."""
    written_shards: int
    """By this run; the others were there already."""
    elapsed_s: float
    problems: tuple[SampleProblem, ...]
    """Samples, and annotations of other samples, that cannot be used."""
    repairs: tuple[tuple[str, int], ...] = ()
    """What was mended in the samples, and how often."""
    notes: tuple[str, ...] = ()
    """What became of the source files since shards were made of them."""
    failures: tuple[ShardFailure, ...] = ()
    """Shards that could not be written, where the job was told to go on."""
    committed: bool
    """Whether the manifest is written: the data set exists."""

    def summary(self) -> str:
        """As text: what is written, and why the rest is not."""
        kept = self.num_samples - sum(not problem.is_in_shard for problem in self.problems)
        lines = [
            f"{self.dataset}: {counted(kept, 'sample')} in {counted(self.num_shards, 'shard')}, "
            f"{self.num_bytes / 1e6:.1f} MB"
        ]
        if not self.written_shards:
            lines[0] += ", all there already"
        else:
            lines[0] += f"; wrote {counted(self.written_shards, 'shard')} in {format_duration(self.elapsed_s)}"
        lines += [f"  {note}" for note in self.notes]
        problems = [problem.line for problem in self.problems]
        lines += first_lines(problems, SHOWN_PROBLEMS, f" in {join(self.target, REPORT_FILE)}")
        lines += [f"  {count:,} {what}" for what, count in self.repairs]
        return "\n".join(lines)

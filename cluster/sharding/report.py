"""Report and errors of a sharding job."""

from __future__ import annotations

from dataclasses import dataclass

from m2f.cluster.terminal import first_lines, format_duration
from m2f.data_pipeline.shards.write import SampleProblem
from m2f.data_pipeline.storage.storage import join
from m2f.model.errors import UserError
from m2f.model.format_count import format_count

REPORT_FILE = "report.json"
MAX_SHOWN_PROBLEMS = 10
"""Number of problems that are printed. The report file has all."""


class ShardJobError(UserError):
    """A shard cannot be written. The message names the shard, the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """Index of a shard that could not be written, with the error message."""

    index: int
    message: str


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Outcome of a sharding job, stored as report.json beside the shards."""

    dataset: str
    target: str
    """Folder or `s3://` prefix of the data set."""
    num_samples: int
    """Number of samples in the source."""
    num_shards: int
    num_bytes: int
    """Size of all shards in bytes."""
    written_shards: int
    """Number of shards that this job wrote; the others existed before."""
    elapsed_s: float
    """Duration of the job in seconds."""
    problems: tuple[SampleProblem, ...]
    """Samples that cannot be used, and unusable annotations of usable samples."""
    repairs: tuple[tuple[str, int], ...] = ()
    """Descriptions of repairs to samples, with their counts."""
    notes: tuple[str, ...] = ()
    """Messages about source files that changed since their shards were written."""
    failures: tuple[ShardFailure, ...] = ()
    """Shards that could not be written in a job with `keep_going`."""
    committed: bool
    """Whether the manifest is written, which means that the data set exists."""

    def summary(self) -> str:
        """Return the report as text: counts, messages, and the first problems."""
        num_kept = self.num_samples - sum(not problem.is_in_shard for problem in self.problems)
        lines = [
            f"{self.dataset}: {format_count(num_kept, 'sample')} in {format_count(self.num_shards, 'shard')}, "
            f"{self.num_bytes / 1e6:.1f} MB"
        ]
        if not self.written_shards:
            lines[0] += ", no new shards written"
        else:
            lines[0] += f"; wrote {format_count(self.written_shards, 'shard')} in {format_duration(self.elapsed_s)}"
        lines += [f"  {note}" for note in self.notes]
        problems = [problem.line for problem in self.problems]
        lines += first_lines(problems, MAX_SHOWN_PROBLEMS, f" in {join(self.target, REPORT_FILE)}")
        lines += [f"  {count:,} {repair}" for repair, count in self.repairs]
        return "\n".join(lines)

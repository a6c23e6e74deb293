"""`m2f doctor`: check what a run needs on a machine or a cluster, with a remedy for each problem."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m2f.cluster.doctor import machine, services
from m2f.cluster.doctor.finding import THIS_MACHINE, Finding, State
from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.printable import printable

Check = Callable[[], Finding]
_STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def run_checks(checks: Iterable[Check], where: str = THIS_MACHINE) -> list[Finding]:
    """Run the checks one at a time and return their findings. An exception in a check becomes a failed finding."""
    findings: list[Finding] = []
    for check in checks:
        try:
            finding = check()
        except Exception as error:
            name = getattr(check, "__name__", None) or getattr(getattr(check, "func", None), "__name__", "check")
            detail = traceback.format_exception_only(error)[-1].strip()
            finding = Finding(
                name.removeprefix("check_"), "failed", detail, "this is a bug in the check; please report it"
            )
        findings.append(replace(finding, where=where))
    return findings


def machine_checks(config: RunConfig | None, gpus: int | None = None) -> list[Check]:
    """Return the checks to run on every machine. `gpus` is the number that Ray counts there; None without Ray."""
    checks: list[Check] = [
        machine.check_versions,
        partial(machine.check_gpus, config, gpus),
        machine.check_collectives,
        machine.check_shared_memory,
        partial(machine.check_compiler, config),
        machine.check_op_cache,
        partial(machine.check_disk, config),
        partial(services.check_run_folder, config),
        partial(services.check_shards, config),
        partial(services.check_clock, config),
    ]
    return checks


def driver_checks(config: RunConfig | None, dashboard: str | None = None) -> list[Check]:
    """Return the checks to run only on the driver's machine. `dashboard` is the URL of the cluster's dashboard."""
    return [
        partial(services.check_data, config),
        partial(services.check_tracking, config),
        partial(services.check_ray_token, dashboard),
    ]


def exit_status(findings: Sequence[Finding]) -> int:
    """Return FAILED if a check failed, else DONE."""
    return ExitStatus.FAILED if any(finding.state == "failed" for finding in findings) else ExitStatus.DONE


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print a table of the findings and a line with their numbers by state."""
    console = console or Console(highlight=False)
    shows_nodes = {finding.where for finding in findings} != {THIS_MACHINE}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*(("node",) if shows_nodes else ()), "check", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("finding and remedy", overflow="fold")
    for finding in findings:
        style = _STYLES[finding.state]
        text = finding.detail + (f"\n-> {finding.remedy}" if finding.remedy else "")
        row = (finding.check, f"[{style}]{finding.state}[/]", escape(printable(text)))
        table.add_row(*((finding.where,) if shows_nodes else ()), *row)
    console.print(table)
    count = {state: sum(finding.state == state for finding in findings) for state in _STYLES}
    console.print(", ".join(f"{number} {state}" for state, number in count.items() if number))

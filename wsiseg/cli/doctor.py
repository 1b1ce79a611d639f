"""`wsiseg doctor`: what works on this machine, and what to do where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wsiseg.cli.say import PATH


@click.command("doctor")
@click.option(
    "--out",
    type=PATH,
    default=Path(),
    help="Folder whose disk is measured; the current one if not given.",
)
@click.option("--no-model", is_flag=True, help="Do not run the bundled model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, out: Path, no_model: bool, as_json: bool) -> None:
    """Check libraries, slide readers, devices, disk and the bundled model.

    Each line is OK, WARN (works, with a drawback) or FAIL, and says what to do. The exit code is 1
    if something failed.
    """
    from wsiseg.cli.doctor_checks import FAIL, OK, Check, run_checks

    checks: list[Check] = []
    for check in run_checks(out, model=not no_model):
        checks.append(check)
        if not as_json:
            click.echo(f"{check.status:<5} {check.name:<17} {check.text}")
            if check.fix:
                click.echo(f"{'':<5} {'':<17} fix: {check.fix}")
    failed = sum(c.status == FAIL for c in checks)
    if as_json:
        data = {"ok": not failed, "checks": [c._asdict() for c in checks]}
        click.echo(json.dumps(data, indent=2))
    else:
        warned = sum(c.status != OK for c in checks) - failed
        click.echo(f"{len(checks)} checks, {warned} warning{'s' * (warned != 1)}, {failed} failed")
    context.exit(1 if failed else 0)

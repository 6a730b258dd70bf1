"""The command line: arguments, one call each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qbench.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The benchmark harness for neural-network quantization: what is measured is what ships.",
)

Results = Annotated[Path, typer.Option("--results", help="Folder of the results; each suite has a folder in it.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="Python file with plugins; repeat for more.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
SuitePath = Annotated[Path, typer.Argument(help="YAML file of the suite.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a key: limits.time=60. Repeatable.")]
Only = Annotated[str | None, typer.Option("-k", help="Only runs whose label contains this text.")]
HERE = Path("results")


@app.command()
def run(
    suite: SuitePath,
    results: Results = HERE,
    plugin: Plugins = None,
    settings: Settings = None,
    only: Only = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    redo: Annotated[str | None, typer.Option(help="Do again what is there: failed, stale or all.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one for every two cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of a suite, and write its leaderboard."""
    from qbench import commands

    raise typer.Exit(
        commands.run(
            suite,
            results,
            plugins=plugin or [],
            settings=settings or [],
            only=only,
            dry_run=dry_run,
            redo=redo,
            jobs=jobs,
            as_json=as_json,
        )
    )


@app.command()
def status(
    suite: SuitePath,
    results: Results = HERE,
    plugin: Plugins = None,
    settings: Settings = None,
    only: Only = None,
    as_json: AsJson = False,
) -> None:
    """Show which runs of a suite are done, failed, or missing."""
    from qbench import commands

    commands.status(suite, results, plugins=plugin or [], settings=settings or [], only=only, as_json=as_json)


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="Key of a result, or the beginning of it.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for curves of training and pictures.")] = None,
    results: Results = HERE,
    plugin: Plugins = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Write KEY.png: boxes, where they differ most from the float network's.")
    ] = False,
    pyperf: Annotated[
        Path | None, typer.Option(help="Write the latencies to this file, for pyperf's compare_to.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show all that one run left, and draw how its training went."""
    if pictures:
        from qbench import commands

        commands.pictures(key, results, out or Path(), plugins=plugin or [])
        return
    from qbench import reports

    reports.show(key, results, out, pyperf=pyperf, as_json=as_json)


@app.command()
def board(
    folders: Annotated[list[Path], typer.Argument(help="Folders of results: results/quickstart.", show_default=False)],
    profile: Annotated[
        str | None, typer.Option(help="Of hardware: rank only what it can execute, and print that.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge the results again: write LEADERBOARD.md and leaderboard.csv, and print the table."""
    from qbench import reports

    reports.board(folders, profile=profile, as_json=as_json)


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Argument(help="method, model, dataset, metric or runtime.")] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """List the plugins."""
    from qbench import catalogue

    catalogue.show_list(kind, plugin or [], as_json=as_json)


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="Name of a plugin.")],
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show a plugin's options with their types and defaults, its track and its paper."""
    from qbench import catalogue

    catalogue.describe(name, plugin or [], as_json=as_json)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="Method to check: `name` or `name[option=value]`.")],
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Check that a method keeps its promises: shape, determinism, true bits, packing, no evaluation data."""
    from qbench import commands

    raise typer.Exit(commands.check(name, plugin or [], as_json=as_json))


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Model to train: `name[option=value]`.")],
    dataset: Annotated[str, typer.Option(help="Dataset to train on.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Safetensors file to write.")],
    plugin: Plugins = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Checkpoint to start from, in place of random weights.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other option of training: key=value.")
    ] = None,
) -> None:
    """Train a float checkpoint; the same command goes on with a training that was stopped."""
    from qbench import commands

    commands.train(
        model,
        dataset,
        out,
        plugins=plugin or [],
        settings=settings or [],
        start=start,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
    )


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="Model: `name[option=value]`.")],
    dataset: Annotated[str, typer.Option(help="Dataset whose training images are used.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the table and its heat maps.")] = None,
    plugin: Plugins = None,
    bits: Annotated[str, typer.Option(help="Bit widths, with commas between them.")] = "8,4,3,2",
    measure: Annotated[str, typer.Option(help="kl, loss (with labels), sqnr, hawq or fisher.")] = "kl",
    method: Annotated[
        str, typer.Option(help="What rounds the weights: `name[option=value]`.")
    ] = "rtn[calibration=mse]",
    images: Annotated[int, typer.Option(min=1, help="How many images to use.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Show what each layer loses at each bit width."""
    from qbench.analyze import analyze as show_sensitivity

    show_sensitivity(
        model,
        dataset,
        out,
        plugins=plugin or [],
        bits=bits,
        measure=measure,
        method=method,
        images=images,
        seed=seed,
    )


@app.command()
def export(
    what: Annotated[str, typer.Argument(help="Key of a run, or the beginning of it; or the file of an artifact.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model and its card.")],
    target: Annotated[str, typer.Option("--format", help="onnx or openvino.")] = "onnx",
    results: Results = HERE,
    plugin: Plugins = None,
) -> None:
    """Write a run's network as a file that other programs run, with a model card."""
    from qbench.export import export as write

    write(what, out, target, results=results, plugins=plugin or [])


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"qbench: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)

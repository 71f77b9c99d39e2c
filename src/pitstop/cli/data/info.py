"""`pitstop data info`: what a dataset holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pitstop.core.errors import InputError

BAR = 40
"""Characters of the longest bar."""


def info(
    data: Annotated[str, typer.Argument(help="A packed dataset, or what can be packed")],
    plot: Annotated[Path | None, typer.Option(help="Draw the sizes into this PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show counts, classes and sizes; of what is not packed, what its listing tells."""
    from pitstop.data.inspect import describe_packed, describe_source
    from pitstop.data.resolve import resolve

    named = resolve(data)
    facts = describe_packed(named) if isinstance(named, Path) else describe_source(named)
    if plot is not None:
        if facts["kind"] != "packed":
            raise InputError(f"--plot: the sizes of {data} are not known: pack it first")
        _draw(facts, plot)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for line in _lines(facts):
        typer.echo(line)


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    splits = facts["splits"]
    yield facts["path"]
    images = (
        f"{splits['train']['images']:,} for training, {splits['val']['images']:,} for validation"
    )
    yield f"  {'images':12} {images}"
    yield f"  {'classes':12} {len(facts['classes']):,}: {_few(facts['classes'])}"
    for split, balance in facts["images_a_class"].items():
        low, middle, high = balance["min"], balance["median"], balance["max"]
        spread = f"{low:,} to {high:,}, median {middle:,.6g}" if low < high else f"{low:,}"
        yield f"  {split:12} {spread} images a class{_extremes(balance)}"
    if facts["kind"] == "packed":
        yield from _packed_lines(facts)
    for note in facts["notes"]:
        yield f"  {'note':12} {note}"


def _packed_lines(facts: dict[str, Any]) -> Iterator[str]:
    made = facts["made"]
    side = f"short side {made['short_side']}" if made["short_side"] else "original sizes"
    yield f"  {'made':12} by pitstop {made['pitstop']} from {made['source']}"
    yield f"  {'':12} {side}, quality {made['quality']}"
    yield f"  {'skipped':12} {facts['skipped']:,} bad images"
    converted = ", ".join(f"{why} {count:,}" for why, count in facts["converted"].items())
    yield f"  {'converted':12} {converted or 'none'}"
    yield f"  {'digest':12} {facts['digest'][:16]}"
    yield f"  {'on disk':12} {_bytes(facts['bytes'])}"
    levels = {f"level {side}": level for side, level in facts["levels"].items()}
    for name, split in (facts["splits"] | levels).items():
        sizes, sides = split["image_bytes"], split["short_side"]
        yield ""
        yield (
            f"{name}: {_bytes(split['bytes'])} in {_shards(split['shards'])}; "
            f"an image {_bytes(sizes['min'])} to {_bytes(sizes['max'])}, "
            f"median {_bytes(sizes['p50'])} "
            f"(5% below {_bytes(sizes['p5'])}, 5% above {_bytes(sizes['p95'])})"
        )
        yield (
            f"  short side {sides['min']:,} to {sides['max']:,} pixels, median {sides['p50']:,} "
            f"(5% below {sides['p5']:,}, 5% above {sides['p95']:,})"
        )
        yield from _bars(split["short_side_histogram"])


def _bars(histogram: dict[str, list[int]]) -> Iterator[str]:
    """Yields a bar for each range of pixels."""
    edges, counts = histogram["edges"], histogram["images"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        yield f"  {low:6,} - {high - 1:<6,} {bar:{BAR}} {count:,}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _extremes(balance: dict[str, Any]) -> str:
    """Names the smallest and the largest class, where they differ."""
    (fewest, low), (most, high) = balance["fewest"][0], balance["most"][0]
    return f" (fewest {fewest}, most {most})" if low < high else ""


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _draw(facts: dict[str, Any], plot: Path) -> None:
    from matplotlib.figure import Figure

    from pitstop.io.pictures import save

    splits = facts["splits"] | {f"level {side}": level for side, level in facts["levels"].items()}
    figure = Figure((8.0, 1.0 + 2.2 * len(splits)), layout="constrained")
    figure.suptitle(f"{facts['path']}: {len(facts['classes']):,} classes")
    stack = figure.subplots(len(splits), 1, squeeze=False)
    for axes, (name, split) in zip(stack.flat, splits.items(), strict=True):
        histogram = split["short_side_histogram"]
        labels = [f"{edge:,}" for edge in histogram["edges"][:-1]]
        axes.bar(labels, histogram["images"], width=0.95)
        axes.set_title(f"{name}: {split['images']:,} images, {_bytes(split['bytes'])}", loc="left")
        axes.set_ylabel("images")
        axes.spines[["top", "right"]].set_visible(False)
    stack[-1, 0].set_xlabel("short side from [pixels]")
    try:
        save(figure, plot)
    except OSError as error:
        raise InputError(f"--plot {plot}: cannot be written: {error.strerror}") from None
    typer.echo(f"drawn into {plot}", err=True)

"""The report of `data check` as people read it: labelled lines, a histogram, one example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.render.text import LABEL_WIDTH, entry, plural

LEAST_BAR, MOST_BAR = 8, 40
OPEN, CLOSE = "[[", "]]"


def report_lines(report: Mapping[str, Any], width: int) -> list[str]:
    """The report's numbers and warnings as lines of at most `width` columns.

    Args:
        report: what `data check --json` prints.
        width: columns of the terminal.
    """
    lines: list[str] = []
    for label, text in _entries(report):
        lines += entry(label, text, width)
        if label == "lengths":
            lines += histogram(report["lengths"]["histogram"], width)
    return lines


def _entries(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows = report["rows"]
    form = report["format"] or "no known format"
    yield "data", f"{report['dataset']} ({form}; loss: {report['loss']})"
    yield "rows", _rows(rows)
    if "tokens" not in report:
        return
    yield from _numbers(report)
    if report["held_out"]:
        yield "held out", _held_out(report["held_out"])
    for finding in report["findings"]:
        yield finding["level"], finding_text(finding)


def _rows(rows: Mapping[str, Any]) -> str:
    parts = [f"{rows['read']:,} read"]
    if rows["bad"]:
        parts.append(f"{rows['bad']:,} cannot be used")
    if rows.get("without_label"):
        parts.append(f"{rows['without_label']:,} have no label and are dropped")
    if "used" in rows:
        parts.append(f"{rows['used']:,} are trained on")
    return ", ".join(parts)


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    tokens, lengths, cut = report["tokens"], report["lengths"], report["truncation"]
    yield (
        "tokens",
        f"{tokens['used']:,}, of which {tokens['trained']:,} "
        f"({percent(tokens['trained_share'])}) are trained on",
    )
    if not lengths["histogram"]:
        return
    yield (
        "lengths",
        f"mean {lengths['mean']:,.1f} tokens, half up to {lengths['p50']:,}, 90% up to "
        f"{lengths['p90']:,}, 99% up to {lengths['p99']:,}, longest {lengths['max']:,}",
    )
    if cut["max_length"] is not None:
        yield (
            "truncation",
            f"at {cut['max_length']:,} tokens: {cut['rows']:,} rows ({percent(cut['row_share'])}) "
            f"lose {percent(cut['token_share'])} of all tokens",
        )
    yield (
        "padding",
        f"{percent(report['padding']['share'])} of the cells, in micro batches of "
        f"{report['padding']['micro_batch_size']}",
    )
    packing = report["packing"]
    if packing:
        state = "planned" if packing["planned"] else "not planned"
        yield (
            "packing",
            f"{state}: {packing['strategy']} would make {packing['sequences']:,} sequences, "
            f"{percent(packing['utilisation'])} full",
        )


def _held_out(held: Mapping[str, Any]) -> str:
    return f"{held['rows']['used']:,} rows, {held['tokens']['used']:,} tokens"


def finding_text(finding: Mapping[str, Any]) -> str:
    """A finding with its count, its fix and its first places."""
    rows = finding["rows"]
    text = f"{plural(rows, 'row')}: {finding['message']}" if rows else finding["message"]
    if finding["fix"]:
        text += f"; {finding['fix']}"
    if finding["places"]:
        more = " ..." if rows > len(finding["places"]) else ""
        text += f": {', '.join(finding['places'])}{more}"
    return text


def histogram(bars: Sequence[Mapping[str, int]], width: int) -> list[str]:
    """A bar a line, in plain characters."""
    names = [f"{bar['from']:,}-{bar['to']:,}" for bar in bars]
    counts = [f"{bar['rows']:,}" for bar in bars]
    label, number = max(map(len, names)), max(map(len, counts))
    room = width - (LABEL_WIDTH + 1) - label - number - 4
    size = max(LEAST_BAR, min(MOST_BAR, room))
    most = max(bar["rows"] for bar in bars)
    lines = []
    for bar, name, count in zip(bars, names, counts, strict=True):
        filled = -(-bar["rows"] * size // most) if most else 0
        indent = " " * (LABEL_WIDTH + 1)
        lines.append(f"{indent}{name:>{label}} |{'#' * filled:<{size}} {count:>{number}}")
    return lines


def bad_lines(report: Mapping[str, Any]) -> list[str]:
    """The first rows that cannot be used, one a line, with their fixes."""
    lines = [f"  {bad['place']}: {bad['what']}; {bad['fix']}" for bad in report["bad_rows"]]
    more = report["bad"]["rows"] - len(report["bad_rows"])
    return [*lines, f"  and {more:,} more"] if more else lines


def marked(example: Mapping[str, Any]) -> str:
    """The example with its trained tokens in brackets."""
    return "".join(
        f"{OPEN}{piece['text']}{CLOSE}" if piece["trained"] else piece["text"]
        for piece in example["pieces"]
    )


def percent(share: float) -> str:
    """12.3%; small shares do not become none, nor large ones all."""
    if 0 < share < 0.001:  # noqa: PLR2004 - the last digit that is shown
        return "below 0.1%"
    if 0.999 < share < 1:  # noqa: PLR2004
        return "above 99.9%"
    return f"{share:.1%}"

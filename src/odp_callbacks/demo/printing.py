"""What the demo prints at its end: the answer first, then a table, the tokens, and where to look."""

from math import isfinite

from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from odp_callbacks.analysis.jackknife import Estimate
from odp_callbacks.demo.influential_tokens import influential_tokens, token_kinds
from odp_callbacks.demo.results import DemoResults, confirmation, control_check, headline, order, verdict
from odp_callbacks.text import displayable, quoted_names

SHOWN_TOKENS = 5
HELPS, HARMS = "bold white on magenta", "bold black on dark_orange"
"""Styles of a token on which distilling adds to success, and of one where it takes away, in the report's colours."""


def print_results(results: DemoResults, console: Console) -> None:
    """Print the answer, the table and the tokens."""
    console.print(f"\n[bold]{escape(headline(results))}[/bold]")
    console.print(escape(confirmation(results)), "\n", sep="")
    console.print(gain_table(results))
    for sentence in (order(results), control_check(results)):
        if sentence:
            console.print(escape(sentence))
    if results.places[0].verdict == "helps":
        print_tokens(results, results.places[0].teacher, console)


def gain_table(results: DemoResults) -> Table:
    """Each teacher's predicted gain beside what a step did, the best prediction first."""
    questions, held_out = len({rollout.question for rollout in results.report.rollouts}), len(results.before)
    table = Table(box=SIMPLE_HEAVY, show_edge=False, pad_edge=False)
    table.add_column("teacher", no_wrap=True)
    for heading in ("predicted gain\nof one step", "success\nbefore → after", "realised\ngain"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for place in results.places:
        name = f"[bold]{escape(displayable(place.teacher))}[/bold]"
        name += "\n(control)" if place.teacher == results.control else ""
        gain = results.gains.get(place.teacher)
        if gain is None:
            table.add_row(name, place.gain.note or "no estimate", "", "", verdict(results, place))
            continue
        success = f"{gain.before.value:.1%} → {gain.after.value:.1%}"
        table.add_row(name, _points(gain.predicted), success, _points(gain.change), verdict(results, place))
    table.caption = (
        f"Gains are percentage points of success, with {results.analysis.confidence:.0%} intervals: predicted from "
        f"{questions} questions, realised on {held_out} others. A step moves the LoRA parameters by {results.length:g} "
        "along the summed distillation gradient of the teacher."
    )
    table.caption_justify = "left"
    return table


def print_tokens(results: DemoResults, teacher: str, console: Console) -> None:
    """Print where the predicted gain of the best teacher comes from, and the most influential tokens."""
    kinds = [kind for kind in token_kinds(results.report, teacher) if isfinite(kind.share)]
    if not kinds:
        return
    shares = ", ".join(
        f"{round(100 * kind.share) + 0}% from {kind.kind} ({kind.token_share:.0%} of the tokens)" for kind in kinds
    )
    tokens = influential_tokens(results.report, teacher, SHOWN_TOKENS)
    name = escape(quoted_names([teacher]))
    console.print(f"\nThe predicted gain of {name} comes to {shares}.")
    if tokens:
        console.print("What distilling on the most influential tokens adds to it:")
    for token in tokens:
        value, low, high = (100 * results.length * end for end in (token.influence, token.low, token.high))
        line = Text(f"  {value:+.2f} points ({low:+.2f} to {high:+.2f})  ")
        line.append(displayable(token.before)).append(f"[{displayable(token.text)}]", HELPS if value > 0 else HARMS)
        line.append(displayable(token.after)).append("  correct" if token.correct else "  incorrect", "dim")
        console.print(line, soft_wrap=True)


def _points(estimate: Estimate) -> str:
    """An estimate in percentage points above its interval."""
    if not isfinite(estimate.value):
        return f"no estimate\n{estimate.note}"
    value = f"{100 * estimate.value:+.1f}"
    if not isfinite(estimate.low):
        return f"{value}\n{estimate.note or 'no interval'}"
    return f"{value}\n{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"

"""Wording of chains: one thing is where, or what, another one is, and only the last says where or what.

A different subject and notation from RULER's variables, on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """What a chain is about.

    Parameters
    ----------
    names : kinds of the things that refer to each other (`selfsup_values.KINDS`)
    values : kinds of the value at the chain's end
    roots : says that {b} has the {value}
    links : says that {a} has what {b} has
    forward : asks for the value of {a}
    backward : asks for everything that has the {value}
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    roots: tuple[str, ...]
    links: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[str, ...]


SUBJECTS = (
    Subject(
        names=("thing", "venture"),
        values=("place",),
        roots=("{B} was left at {value}.", "You'll find {b} at {value}.", "{B} lies in a corner of {value}."),
        links=(
            "{A} is kept on the same spot as {b}.",
            "Look for {a} wherever {b} is.",
            "{A} was packed together with {b}.",
            "They put {a} beside {b} for good.",
            "{A} never leaves the side of {b}.",
        ),
        forward=(
            "Where does one have to go for {a}?",
            "At which place would you look for {a}?",
            "{A} is wanted. Where is it?",
        ),
        backward=(
            "Which things are to be found at {value}?",
            "Name everything that is kept at {value}.",
            "What would you find at {value}, directly or not?",
        ),
    ),
    Subject(
        names=("word", "code"),
        values=("number", "decimal", "colour"),
        roots=(
            "Gauge {b} shows {value}.",
            "Gauge {b} stands at {value}.",
            "They fixed gauge {b} at {value}.",
        ),
        links=(
            "Gauge {a} copies gauge {b}.",
            "Gauge {a} is wired to gauge {b} and shows the same.",
            "Whatever gauge {b} shows, gauge {a} shows as well.",
            "Gauge {a} takes its reading from gauge {b}.",
        ),
        forward=(
            "Follow the wiring: what does gauge {a} show?",
            "In the end, gauge {a} stands at what?",
            "Reading of gauge {a}?",
        ),
        backward=(
            "Which gauges show {value}?",
            "Name each gauge that stands at {value} in the end.",
            "{Value} is on the display of which gauges?",
        ),
    ),
    Subject(
        names=("word",),
        values=("number", "hex", "code"),
        roots=("{b} := {value}", "set {b} to {value}", "let {b} be {value}"),
        links=("{a} := {b}", "set {a} to {b}", "let {a} be {b}", "copy {b} into {a}"),
        forward=("What does {a} hold after all steps?", "Content of {a} at the end?", "Evaluate {a}."),
        backward=(
            "Which names hold {value} after all steps?",
            "{Value}: list the names that end up with it.",
            "Give the names whose content is {value}.",
        ),
    ),
    Subject(
        names=("person",),
        values=("place", "colour"),
        roots=("{B} votes for {value}.", "{B} has chosen {value}.", "The choice of {b} fell on {value}."),
        links=(
            "{A} votes the way {b} does.",
            "{A} leaves the choice to {b}.",
            "As {b} chooses, so does {a}.",
            "{A} always sides with {b}.",
        ),
        forward=("What has {a} chosen, then?", "For what does {a} vote?", "Choice of {a}?"),
        backward=(
            "Who votes for {value}?",
            "Count up the voters of {value} and name them.",
            "Name the people behind {value}.",
        ),
    ),
)
"""What chains can be about."""

FORWARD_ANSWERS = ("{value}", "{value}", "{value}.", "{A}: {value}")
FORWARD_PREFIXES = ("{A}:", "In the end it's", "Following the steps:")
BACKWARD_PREFIXES = ("These:", "There are {n}:", "In order:")

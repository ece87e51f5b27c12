"""Wording of planted facts and of the questions about them.

Slots: {what} attribute, {key}, {value}; {Key} and the like start a sentence. None of it shares five words in
a row with a benchmark (`tests/training/test_wording.py` holds it to that).
"""

from __future__ import annotations

INTROS = (
    "Go through the material below with care. A request follows it.\n\n",
    "Keep the details of this passage in mind.\n\n",
    "Notes, to be used afterwards:\n\n",
    "Here comes some reading. You won't see it twice.\n",
    "Study what comes next; small details matter.\n\n",
    "[document]\n",
    "Source text\n===========\n",
    "Reading matter for today. Mind the particulars, since one of them will be needed.\n\n",
)
"""Before a context, in some of the samples."""

ENDS = ("\n", "\n\n", "\n\n---\n", "\n\n", "\n[end]\n", " ")
"""Between a context and what follows; eviction sees it."""

LEADS = ("", "", "", "Q: ", "Request: ", "Now: ", "Task: ")
"""Before a question."""

TAILS = ("", "", "", " ", "\n", " Be brief.", " Just that, please.")
"""After a question."""

STATEMENTS = (
    "For the record, the {what} of {key} reads {value}.",
    "{Key} was given {value} as its {what}.",
    "Anyone who asked after {key} heard that its {what} was {value}.",
    "({Key}; {what}: {value})",
    "Under {what}, the entry beside {key} says {value}.",
    "In the register {key} stands with {value} in the column for the {what}.",
    "It was agreed that {value} would serve as {what} for {key}.",
    "Somebody had scribbled on the wall: {key}, {what} {value}.",
    "Remember {key}? Its {what} has always been {value}.",
    "{Value} is what they wrote down as {what} of {key}.",
    "The clerk said it twice: {key} has the {what} {value}.",
    "My papers list {value} against {key}, {what}.",
    "NOTE. {Key}, {what} = {value}.",
    "With regard to {key}, the {what} turned out to be {value}.",
    "If they ask about the {what} of {key}, answer {value}.",
    "No one forgot {key}, whose {what} remained {value} all year.",
)

QUESTIONS = (
    "Which {what} belongs to {key}?",
    "Look up {key}. Its {what}, please?",
    "Tell me the {what} of {key}.",
    "I need the {what} that goes with {key}.",
    "{Key}: {what}?",
    "Somewhere above, {key} gets a {what}. Write it out.",
    "How does the {what} of {key} read?",
    "Complete this: {key}, {what} = ____",
    "Going by what you read, {key} has which {what}?",
    "Do you recall the {what} of {key}?",
    "What did they put down as {what} for {key}?",
    "Repeat the {what} noted for {key}.",
)

PREFIXES = (
    "The {what} of {key} reads",
    "{Key}, {what}:",
    "For {key} it was",
    "That would be",
    "{What} of {key}:",
)
"""Starts of an answer that are given, as `answer_prefix` is."""

ANSWERS = ("{value}", "{value}", "{value}", "{value}.", "It is {value}.", "{Key}: {value}")

SEVERAL_QUESTIONS = (
    "Give the {what}s of {keys}, in this order.",
    "Which {what}s go with {keys}?",
    "{Keys}: write down the {what} of each.",
    "I have to know the {what}s of {keys}.",
    "Look up {keys} and tell me every {what}.",
    "Fill in the {what}s: {blanks}",
    "For each of {keys}, name its {what}.",
    "Remind me which {what}s were noted for {keys}.",
)
SEVERAL_PREFIXES = ("The {what}s, in order:", "{What}s:", "In the order asked:", "They read")

VALUE_STATEMENTS = (
    "One {what} of {key} is {value}.",
    "{Key} also has {value} for a {what}.",
    "Among the {what}s of {key} there is {value}.",
    "A further {what}, {value}, belongs to {key}.",
    "They added {value} to the {what}s of {key}.",
    "{Value} counts as a {what} of {key} too.",
    "On another page {key} shows the {what} {value}.",
    "[{key}] {what}: {value}",
)
VALUE_QUESTIONS = (
    "{Key} has more than one {what}. Name each of them.",
    "List every {what} of {key}.",
    "Never mind the order: which {what}s does {key} have?",
    "Collect the {what}s that belong to {key}.",
    "{Key} has {n} {what}s. Which ones?",
    "Write down the {n} {what}s of {key}.",
    "All {what}s of {key}, please.",
    "Find each {what} that goes with {key}.",
)
VALUE_PREFIXES = ("{Key} has the {what}s", "{What}s of {key}:", "Found:", "There are {n}:")

LIST_ANSWERS = (
    "{commas}",
    "{commas}",
    "{and}",
    "{and}.",
    "{semicolons}",
    "{lines}",
    "{bullets}",
    "{bullets}",
)
"""How several values are listed."""

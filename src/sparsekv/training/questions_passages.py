"""Wording of what is asked about a passage itself and about lists: continue, repeat, fill a gap, count."""

from __future__ import annotations

CONTINUE = (
    'Continue the passage that starts with "{quote}".',
    'One passage has the words "{quote}". Go on from there.',
    'What comes right after "{quote}"?',
    "Pick up after these words and carry on: {quote}",
    'Recite what follows upon "{quote}".',
    'The text runs "{quote} ..." and then? Keep going.',
    "{quote} ... (go on as in the original)",
    'After "{quote}" the author writes:',
)

REPEAT = (
    'Write out, word for word, the part from "{first}" up to "{last}".',
    'Copy the stretch that opens with "{first}" and closes with "{last}".',
    'Quote exactly: it begins "{first}" and it ends "{last}".',
    'Repeat verbatim from "{first}" through "{last}".',
    'I want the original wording between "{first}" and "{last}", both included.',
    'Reproduce this without changes: "{first} [...] {last}"',
    'Restore what is left out in "{first} ... {last}", the ends too.',
    'Say again the lines that run from "{first}" to "{last}".',
)

CLOZE = (
    'Put back the missing word: "{gap}"',
    "One word was taken out of this line. Which? {gap}",
    'A word is gone from "{gap}". Restore it.',
    "Fill the gap as it was in the original: {gap}",
    '"{gap}" - the hidden word, please.',
    "{gap}\nWhat stood at the blank?",
    'Supply the word for the blank: "{gap}"',
    "Compare with the original and name the absent word. {gap}",
)

NAME = (
    'Who or what is hidden here? "{gap}"',
    "A name was blotted out: {gap} Which name?",
    'Whose name, or the name of what, belongs in "{gap}"?',
    "{gap}\nSupply the name that was blacked out.",
    'Name the one who is left blank in "{gap}"',
    'Restore the proper name: "{gap}"',
    "Someone or something is missing by name. {gap}",
    'Identify the blank in this line: "{gap}"',
)

DETAIL = (
    "One sentence brings together {cues}. Which {kind} does it give?",
    "Something is told of {cues}. The {kind}?",
    "Look for {cues}. I need the {kind} found there.",
    "{cues}: which {kind} goes with them?",
    "Where {cues} stand in one sentence, what is its {kind}?",
    "Find the line on {cues} and quote its {kind}.",
    "Concerning {cues}: state the {kind}.",
    "It has to do with {cues}. Tell me the {kind}.",
)
"""{kind}: "number", "name", 'phrase after "the old"'; {cues}: other words of the sentence."""

GAPS = ("____", "[...]", "(?)", "______", "[blank]")

RANKED = (
    "Which {n} turned up more often than any other? Start with the top one.",
    "Name the {n} with the highest counts, highest first.",
    "Rank by frequency and give me the first {n}.",
    "Tally this. The winners ({n}) by rank, please.",
    "Most repeated: which {n}? Sort by count.",
    "Count, then report the leading {n} from the top down.",
    "Order by number of appearances; stop after {n}.",
    "At the head of the ranking: which {n}?",
)
"""{n}: "one entry", "3 entries"; their counts differ."""

COMMON = (
    "Some entries were repeated a lot. Give the leading {n}.",
    "Tally the list. The winners ({n}), please.",
    "Most repeated: which {n}?",
    "Report the {n} seen the greatest number of times.",
    "Find the {n} that dominate here.",
    "Which {n} keep coming back?",
    "Name the {n} with the highest counts.",
    "By frequency, what are the leading {n}?",
)
"""As RANKED, but all are equally frequent."""

DUPLICATES = (
    "Which entries occur more than once?",
    "List the entries that were entered twice or more.",
    "Most entries are unique. Name those that aren't.",
    "Find the repeats in this list.",
    "Name every entry with a duplicate.",
    "What was put down more than one time?",
    "Duplicates, please.",
    "Report all entries that come back later.",
)

LIST_HEADS = (
    "A list of entries, with repeats:\n",
    "Entries in the order they came in:\n",
    "Log of names called\n",
    "Roll call:\n",
    "",
    "Tickets drawn today:\n",
)

RECORD_LINES = (
    "{key}: {value}",
    "{key} = {value}",
    "{key} -> {value}",
    "| {key} | {value} |",
    "{key}, {value}",
    "- {key} ({value})",
    "#{i} {key}; {value}",
    '{{"id": "{key}", "{what}": "{value}"}}',
    "{what} of {key}: {value}",
    "<{key}> {value}",
)
"""Lines of dense contexts; or the sentences of `questions.STATEMENTS`."""

RECORD_HEADS = (
    "Register of {what}s:\n",
    "{What}s on file\n",
    "The following {what}s apply.\n",
    "",
    "Export of table {what}s\n\n",
    "Directory\n---------\n",
)

REVERSE = (
    "Whose {what} is {value}?",
    "{Value} is listed as a {what}. Who or what has it?",
    "Find the line with the {what} {value}. To what does it belong?",
    "Which entry carries the {what} {value}?",
)
"""Questions that give the value and ask for the key."""

LIST_PREFIXES = ("Result:", "In descending order:", "I found", "Entries:")
PASSAGE_PREFIXES = ("The missing part:", "It goes:", "...", "Verbatim:")
WORD_PREFIXES = ("The word was", "Restored:", "Blank =")
DETAIL_PREFIXES = ("It says", "There it reads", "Found:")
NAME_PREFIXES = ("Name:", "Restored:", "It must be")

"""Words that say little by themselves. Imports nothing, since data is made without torch too."""

_WORDS = (
    "a about after again all also am an and any are as at be because been before being between both but by can "
    "could did do does doing down during each for from further had has have having he her here hers him his how i "
    "if in into is it its itself just me more most my no nor not now of off on once only or other our ours out "
    "over own same she should so some such than that the their theirs them then there these they this those "
    "through to too under until up us very was we were what when where which while who whom why will with would "
    "you your yours"
)
STOP_WORDS = frozenset(_WORDS.split())
"""English function words. Words of other languages count as content."""

_LONGER = (
    "about above after again against almost along already also although always among another anything because "
    "before being below between beyond could during either enough every everything first from further great "
    "having however itself least little might more most much never nothing often other others ought perhaps "
    "quite rather really seemed shall should since something still such than their theirs them then there "
    "these they thing things this those though through under until upon very were what when where which while "
    "whole whom whose will with within without would your yours"
)
COMMON = frozenset(_LONGER.split())
"""Longer words that could stand in any sentence, function words among them: nobody would ask for them."""

"""QCG-PilotJob's texts for wrong submits, for programs and tests that search for them. Pure.

Our own text, which says the place and what to do, follows in brackets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from pilotq.broker.errors import InvalidInput

WRONG_SUBMIT: Final = "Wrong submit request"  # the beginning of its refusals

# The ends of our texts -> its texts.
_PHRASES: Final = tuple(
    (re.compile(pattern), phrase)
    for pattern, phrase in (
        (r"\.execution\.args: expected", "Execution arguments must be an array"),
        (r"\.execution\.env: expected", "Execution environment must be an dictionary"),
        (r"\.execution\.model_opts: expected", "Execution model options must be an dictionary"),
        (r"\.execution: (args go|give exec or script)", "Job script and exec or args or env defined"),
        (r"\.execution: exec or script is missing", "Job execution (exec or script) not defined"),
        (r"\.execution: expected", "Job execution not defined or wrong type"),
        (r"\.resources: expected", "Job resources not defined or wrong type"),
        (r"\.resources: it asks for nothing", "No resources defined"),
        (r"\.num(Cores|Nodes).*expected a whole number >=", "Neative number of resources"),
        (r"\.numCores: expected", "Wrong definition of number of cores"),
        (r"\.numNodes: expected", "Wrong definition of number of nodes"),
        (r"\.num(Cores|Nodes): (give exact|a scheduler)", "Exact number of resources defined with min/max/scheduler"),
        (r"\.num(Cores|Nodes): min is above", "Maximum number greater than minimal"),
        (r"\.num(Cores|Nodes): it says no number", "No resources defined"),
        (r"\.resources\.wt: expected", "Wrong wall time format"),
        (r"\.resources\.wt: ", "Wall time must be greater than 0"),
        (r"\.nodeCrs: .*only gpu and mem", "Unknown consumable resource"),
        (r"\.nodeCrs: expected", "Wrong definition of Consumable Resources"),
        (r"\.iteration: give start and stop, or values", "Stop and values iteration are excluding"),
        (r"\.iteration: stop must", "Job iteration stop greater or equal than start"),
        (r"\.iteration", "Job iteration wrong specification"),
        (r"\.dependencies\.after.*: expected", "Dependency task's list must be an array of job names"),
        (r"\.dependencies: expected", "Job dependencies wrong type"),
        (r"\.dependencies", "Job dependencies wrong specification"),
        (r"\.attributes: expected", "Job attributes must be dictionary"),
        (r"\.name: .*\bhas a :", "Invalid job name"),
    )
)

# For a name its text lacks the common beginning.
_NAME: Final = re.compile(r"(\S+name): (Job identifier .* unknown variables)(.*)", re.DOTALL)


def check_form(bodies: Sequence[Any]) -> None:
    """The first check of a submit, in QCG-PilotJob's order and with its texts; raises InvalidInput."""
    if not bodies:
        raise InvalidInput(f"Invalid request: {WRONG_SUBMIT} - missing jobs data")
    for number, body in enumerate(bodies):
        for problem in _problems(body):
            raise InvalidInput(f"Invalid request: {problem} (jobs[{number}])")


def _problems(body: Any) -> Sequence[str]:
    if not isinstance(body, dict):
        return [f"{WRONG_SUBMIT} - wrong job data"]
    if missing := [key for key in ("name", "execution") if key not in body]:
        what = {"name": "Missing name", "execution": "Missing execution element"}[missing[0]]
        return [f"{what} in job description"]
    iteration = body.get("iteration", {"stop": 1})
    if not isinstance(iteration, dict) or not {"stop", "values"} & iteration.keys():
        return ["Wrong format of iteration directive: not a dictionary"]
    start, stop = iteration.get("start", 0), iteration.get("stop")
    if isinstance(start, int) and isinstance(stop, int) and start > stop:
        return ["Wrong format of iteration directive: start index larger then stop one"]
    return []


def with_original_text(error: InvalidInput) -> InvalidInput:
    """The same refusal, with QCG-PilotJob's text first where it has one for that."""
    text = str(error)
    detail = text.removeprefix(f"{WRONG_SUBMIT}: ")
    if found := _NAME.match(detail):
        return type(error)(f"{found[2]} ({found[1]}{found[3]})")
    for pattern, phrase in _PHRASES:
        if detail != text and pattern.search(detail):
            return type(error)(f"{WRONG_SUBMIT}: {phrase} ({detail})")
    return error

"""A second question: do the NPUs of the hosts reach each other? Their addresses come first."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address

import msgspec

from v4_ascend.deploy.doctor import outputs
from v4_ascend.deploy.doctor.facts import Answer, Question
from v4_ascend.deploy.doctor.gathering import ping

SECONDS = 30.0  # ours: three packets of 16 devices, some of them lost
AskAll = Callable[[Sequence[Question]], list[Answer]]


def with_pings(answers: Sequence[Answer], ask_all: AskAll) -> list[Answer]:
    """Return the answers, each with its devices' pings of the next host's, if both have addresses.

    A device asks the one of its number: pairs, not all with all, which a switch would have to
    treat alike anyway.
    """
    addresses = [_addresses(a) for a in answers]
    questions = []
    for i, answer in enumerate(answers):
        other = addresses[(i + 1) % len(answers)]
        pairs = [ping(d, other[d]) for d in addresses[i] if d in other]
        questions.append(
            Question(answer.host, kind="cpu", commands=tuple(pairs), timeout_s=SECONDS)
        )
    if len(answers) < 2 or not any(q.commands for q in questions):
        return list(answers)
    found = []
    for answer, question, second in zip(answers, questions, ask_all(questions), strict=True):
        facts = answer.facts
        if facts is None or second.facts is None or not question.commands:
            found.append(answer)
            continue
        said = {k: v for k, v in second.facts.commands.items() if k in question.commands}
        facts = msgspec.structs.replace(facts, commands=facts.commands | said)
        found.append(msgspec.structs.replace(answer, facts=facts))
    return found


def _addresses(answer: Answer) -> dict[int, str]:
    """Return the address of each device of a host: what is none is nobody's to ping."""
    found: dict[int, str] = {}
    for command, output in answer.facts.commands.items() if answer.facts is not None else ():
        if (device := re.fullmatch(r"hccn_tool -i (\d+) -ip -g", command)) is None:
            continue
        try:
            found[int(device[1])] = str(IPv4Address(outputs.after(output.text, "ipaddr") or ""))
        except ValueError:
            continue
    return found

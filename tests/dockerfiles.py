"""Dockerfiles taken apart, and the rules of hadolint that ours must keep."""

import json
import re
from dataclasses import dataclass, field

INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK",
                "LABEL", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction: its lines joined, and the rules a comment before it sets aside."""

    op: str
    rest: str
    line: int
    ignored: frozenset[str] = frozenset()

    @property
    def words(self):
        """What a JSON list says, or None if it is a shell's line."""
        try:
            value = json.loads(self.rest)
        except ValueError:
            return None
        return value if isinstance(value, list) else None

    @property
    def mounts(self):
        """The options of each ``--mount=`` of a RUN."""
        found = re.findall(r"--mount=(\S+)", self.rest)
        return [dict(pair.split("=", 1) for pair in text.split(",")) for text in found]

    @property
    def command(self):
        """A RUN's shell command, without its mounts."""
        return re.sub(r"--mount=\S+\s*", "", self.rest)


@dataclass
class Stage:
    """One FROM and what follows."""

    base: str
    name: str | None
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, op):
        return [i for i in self.instructions if i.op == op]


@dataclass(frozen=True)
class Dockerfile:
    """The arguments before the first FROM, and the stages."""

    args: dict[str, str]
    stages: tuple[Stage, ...]

    def chosen(self, **args):
        """Return the base of the last stage, all arguments and names of stages looked up."""
        values, base = self.args | args, self.stages[-1].base
        named = {s.name: s.base for s in self.stages}
        while (following := named.get(base := expand(base, values), base)) != base:
            base = following
        return base


def expand(text, values):
    """Replace ``${NAME}`` until there is none."""
    while (new := re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], text)) != text:
        text = new
    return text


def instructions(text):
    """Yield the instructions; a comment may stand between the lines of one."""
    op, parts, start, ignored = None, [], 0, frozenset()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("#") or not stripped:
            if op is None and (found := re.match(r"#\s*hadolint\s+ignore=(\S+)", stripped)):
                ignored = frozenset(found[1].split(","))
            continue
        if op is None:
            op, _, stripped = stripped.partition(" ")
            start = number
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            yield Instruction(op.upper(), " ".join(parts), start, ignored)
            op, parts, ignored = None, [], frozenset()
    assert op is None, f"line {start}: {op} does not end"


def parse(text):
    args, stages = {}, []
    for i in instructions(text):
        if i.op == "FROM":
            base, _, name = i.rest.partition(" AS ")
            stages.append(Stage(base, name or None, [i]))
        elif stages:
            stages[-1].instructions.append(i)
        else:
            assert i.op == "ARG", f"line {i.line}: {i.op} before FROM"
            name, _, value = i.rest.partition("=")
            args[name] = value
    return Dockerfile(args, tuple(stages))


def problems(text):
    """Return what hadolint would say, of the rules written down here: ``line: rule``."""
    found = []
    dockerfile = parse(text)
    names = {s.name for s in dockerfile.stages if s.name}
    for stage in dockerfile.stages:
        for i in stage.instructions:
            if stage.instructions[0] is i:
                rules = set(_base(stage.base, names))
            else:
                rules = set(_rules(i, bool(stage.of("SHELL"))))
            found += [f"{i.line}: {rule}" for rule in sorted(rules - i.ignored)]
    users = dockerfile.stages[-1].of("USER")
    if not users or users[-1].rest.partition(":")[0] in ("root", "0"):
        found.append(f"{users[-1].line if users else 0}: DL3002")
    return found


def _base(base, names):
    tag = base.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if base not in names and not tag and "@" not in base:
        yield "DL3006"  # no tag
    if tag == "latest":
        yield "DL3007"


def _rules(i, has_shell):
    if i.op not in INSTRUCTIONS:
        yield "DL1000"  # MAINTAINER, or no instruction
    if i.op == "ADD":
        yield "DL3020"
    if i.op == "WORKDIR" and not i.rest.startswith(("/", "$")):
        yield "DL3000"
    if i.op in ("CMD", "ENTRYPOINT") and i.words is None:
        yield "DL3025"
    if i.op == "HEALTHCHECK" and not re.search(r"CMD \[", i.rest):
        yield "DL3025"
    if i.op != "RUN":
        return
    if "|" in i.rest.replace("||", "") and not has_shell:
        yield "DL4006"  # without pipefail
    for command in re.split(r"&&|\|\||;|\|", i.command):
        words = [w for w in command.split() if not re.match(r"\w+=", w)]
        yield from _command(words, i.rest)


def _command(words, run):
    first, flags = words[0], {w.partition("=")[0] for w in words if w.startswith("-")}
    if first == "sudo":
        yield "DL3004"
    if first == "cd":
        yield "DL3003"
    if first == "apt":
        yield "DL3027"
    if first == "useradd" and not flags & {"-l", "--no-log-init"}:
        yield "DL3046"
    if first == "apt-get" and "install" in words:
        packages = [w for w in words[words.index("install") + 1 :] if not w.startswith("-")]
        if not all("=" in p for p in packages):
            yield "DL3008"
        if "rm -rf /var/lib/apt/lists/*" not in run:
            yield "DL3009"
        if not flags & {"-y", "--yes"}:
            yield "DL3014"
        if "--no-install-recommends" not in flags:
            yield "DL3015"
    pip = words[words.index("pip") :] if "pip" in words else []
    if first.startswith("pip") or pip:
        if {"install", "wheel"} & set(words) and "--no-cache-dir" not in flags:
            yield "DL3042"
        if "install" in words and not flags & {"--constraint", "--requirement", "-c", "-r"}:
            yield "DL3013"  # nothing says which versions

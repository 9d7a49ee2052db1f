"""Text without secrets, addresses and names; the same thing always gets the same alias."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from urllib.parse import quote

SHORT = 6  # a secret shorter than this is replaced only where it stands alone
# What is a secret by its looks: keys of Hugging Face, OpenAI style, GitHub, AWS; JSON web tokens.
_LOOKS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
_BEARER = re.compile(r"(\b(?:bearer|basic) +)([^\s\"',;]+)", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:token|(?:api[-_ ]?keys?|secret|passw(?:or)?d|pwd|authorization|credentials?)"
    r"(?:[-_]\w+)*)"
    r"[\"']?\s*[:=]\s*\[?\s*(?:b?[\"'])?)((?!bearer |basic )[^\s\"',;}\])]+)",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://)([^\s/@\"']+)(?=@)")
_KEY_BLOCK = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_URL_HOST = re.compile(r"(://(?:[^\s/@\"']*@)?)([A-Za-z0-9][A-Za-z0-9.-]*[A-Za-z0-9])")
_HOME = re.compile(r"(/home/|/Users/|\\Users\\)([^/\\\s\"':]+)")
_MAC = re.compile(r"(?<![0-9A-Fa-f:-])(?:[0-9A-Fa-f]{2}([:-]))(?:[0-9A-Fa-f]{2}\1){4}"
                  r"[0-9A-Fa-f]{2}(?![0-9A-Fa-f:-])")  # fmt: skip
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:]*(?![\w:])")


class Redactor:
    """Replaces what must not leave; `counts` says how many things of each kind it met.

    Loopback and unspecified addresses stay, and the hosts of `public` URLs. Whatever looks like
    an address is taken for one, such as a version of four numbers.
    """

    def __init__(
        self,
        secrets: Iterable[str] = (),
        hosts: Iterable[str] = (),
        users: Iterable[str] = (),
        public: Iterable[str] = (),
    ) -> None:
        self._alias: dict[tuple[str, str], str] = {}
        self._public = {h.casefold() for h in public} | {"localhost"}
        forms: dict[str, str] = {}
        for secret in filter(None, secrets):
            for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1]):
                forms[form] = secret
        self._secrets = {form: self._of("secret", secret) for form, secret in forms.items()}
        self._secret = _any_of(forms)
        names = {h for h in hosts if h and not _is_address(h)} - self._public
        short = {h.partition(".")[0] for h in names if not h.replace(".", "").isdigit()}
        self._host = _any_of(names | short - self._public, alone=True, flags=re.IGNORECASE)
        self._user = _any_of({u for u in users if len(u) > 2 and u != "root"}, alone=True)

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of different things of each kind."""
        kinds = [kind for kind, _ in self._alias]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def text(self, text: str) -> str:
        """Return the text without them."""
        if self._secret is not None:
            text = self._secret.sub(lambda m: self._secrets[m[0]], text)
        text = _KEY_BLOCK.sub(lambda m: self._of("secret", m[0]), text)
        text = _LOOKS.sub(lambda m: self._of("secret", m[0]), text)
        for regex in (_IN_URL, _BEARER, _NAMED):
            text = regex.sub(lambda m: m[1] + self._kept_or("secret", m[2]), text)
        text = _MAC.sub(lambda m: self._of("mac", m[0]), text)
        text = _IPV6.sub(self._address, text)
        text = _IPV4.sub(self._address, text)
        text = _URL_HOST.sub(lambda m: m[1] + self._url_host(m[2]), text)
        text = _HOME.sub(lambda m: m[1] + self._of("user", m[2]), text)
        for kind, known in (("host", self._host), ("user", self._user)):
            if known is not None:
                text = known.sub(self._alias_as(kind), text)
        return text

    def _of(self, kind: str, thing: str) -> str:
        if kind in ("host", "mac", "addr"):
            thing = thing.casefold()
        if kind == "host":
            thing = thing.partition(".")[0]
        number = 1 + sum(k == kind for k, _ in self._alias)
        return self._alias.setdefault((kind, thing), f"{kind}-{number}")

    def _alias_as(self, kind: str) -> Callable[[re.Match[str]], str]:
        return lambda m: self._of(kind, m[0])

    def _kept_or(self, kind: str, thing: str) -> str:
        return thing if re.fullmatch(rf"{kind}-\d+", thing) else self._of(kind, thing)

    def _address(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        if address.is_loopback or address.is_unspecified:
            return match[0]
        return self._of("addr", str(address))

    def _url_host(self, host: str) -> str:
        if host.casefold() in self._public or _is_address(host):
            return host
        if re.fullmatch(r"(?:host|addr|secret)-\d+", host):
            return host
        return self._of("host", host)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _any_of(
    words: Iterable[str], *, alone: bool = False, flags: re.RegexFlag = re.NOFLAG
) -> re.Pattern[str] | None:
    """Return what matches any of the words, the longest first."""
    parts = []
    for word in sorted(set(words), key=len, reverse=True):
        escaped = re.escape(word)
        whole = alone or len(word) < SHORT
        parts.append(rf"(?<![A-Za-z0-9]){escaped}(?![A-Za-z0-9])" if whole else escaped)
    return re.compile("|".join(parts), flags) if parts else None

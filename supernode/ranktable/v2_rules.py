"""What the keys of a 2.0 table must be to each other. A value already refused is passed over."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from v4_ascend.supernode.ranktable.findings import Entry, Findings, ip, show
from v4_ascend.supernode.ranktable.model import HOST_PORT

MAX_LEVELS, MAX_ADDRESSES = 8, 24
_ADDR_OF = {"IPV4": ip(4), "IPV6": ip(6)}


class Layer(NamedTuple):
    """An entry of level_list and its addresses."""

    entry: Entry
    addresses: list[Entry]


class Rank(NamedTuple):
    """An entry of rank_list and its levels."""

    entry: Entry
    layers: list[Layer]

    @property
    def instance(self) -> str | None:
        """The layer-0 instance it belongs to."""
        return self.layers[0].entry["net_instance_id"] if self.layers else None


def check_relations(found: Findings, top: Entry, ranks: Sequence[Rank]) -> None:
    """Note each broken relation."""
    if ranks and top["rank_count"] not in (None, len(ranks)):
        what = f"must be {len(ranks)}, the ranks in rank_list, got {top['rank_count']}"
        found.add("rank_count", what)
    for rank in ranks:
        _check_rank(found, rank, len(ranks))


def _check_rank(found: Findings, rank: Rank, n_ranks: int) -> None:
    entry = rank.entry
    if entry["rank_id"] is not None:
        found.once("rank_id", entry["rank_id"], entry.at("rank_id"))
        if entry["rank_id"] >= n_ranks:
            what = f"must be below {n_ranks}, the number of ranks, got {entry['rank_id']}"
            found.add(entry.at("rank_id"), what)
    if entry["local_id"] is not None and rank.instance is not None:
        found.once("local_id", entry["local_id"], entry.at("local_id"), scope=rank.instance)
    if len(rank.layers) > MAX_LEVELS:
        what = f"must have at most {MAX_LEVELS} levels, got {len(rank.layers)}"
        found.add(entry.at("level_list"), what)
    _check_order(found, rank.layers)
    for layer in rank.layers:
        _check_layer(found, rank, layer)


def _check_order(found: Findings, layers: Sequence[Layer]) -> None:
    below = None
    for i, (entry, _) in enumerate(layers):
        number = entry["net_layer"]
        if number is None:
            continue
        if i == 0 and number != 0:
            found.add(entry.at("net_layer"), f"must be 0 in the first level, got {number}")
        elif below is not None and number <= below:
            what = f"must be above {below}, the level before it, got {number}"
            found.add(entry.at("net_layer"), what)
        below = number


def _check_layer(found: Findings, rank: Rank, layer: Layer) -> None:
    entry = layer.entry
    if entry["net_layer"] == 0 and entry["net_type"] == "CLOS":
        found.add(entry.at("net_type"), 'must be "TOPO_FILE_DESC" on layer 0, got "CLOS"')
    if len(layer.addresses) > MAX_ADDRESSES:
        what = f"must have at most {MAX_ADDRESSES} addresses, got {len(layer.addresses)}"
        found.add(entry.at("rank_addr_list"), what)
    for address in layer.addresses:
        for port in address["ports"] or ():
            found.once("port", port, address.at("ports"), scope=entry.where)
        if address["addr_type"] is not None and address["addr"] is not None:
            _check_addr(found, rank, entry, address)


def _check_addr(found: Findings, rank: Rank, layer: Entry, address: Entry) -> None:
    where = address.at("addr")
    try:
        addr = _one_spelling(address["addr_type"], address["addr"])
    except ValueError as e:
        found.add(where, f"must be {e}, got {show(address['addr'])}")
        return
    found.once("addr", addr, where, scope=layer.where)
    # One rank may use an address on several layers; ranks of one host share the host's NIC.
    owner: Hashable = rank.entry.where
    if HOST_PORT in (address["ports"] or ()):
        owner = ("host", rank.instance)
    found.once("addr", addr, where, owner=owner)


def _one_spelling(addr_type: str, addr: str) -> str:
    if addr_type in _ADDR_OF:
        return str(ip_address(_ADDR_OF[addr_type](addr)))
    if not re.fullmatch(r"[0-9a-fA-F]{32}", addr):
        raise ValueError("32 hexadecimal digits, as an EID has")
    return addr.lower()

"""What a plan has room for: the same figures for the scheduler and for the ranks' caches."""

from __future__ import annotations

from v4_ascend.config.model import ModelConfig
from v4_ascend.runtime.scheduler import Limits
from v4_ascend.supernode.cache import BLOCK_TOKENS, MIN_PAGE_ROWS, page_tokens
from v4_ascend.supernode.plan import Plan


def limits_of(plan: Plan, config: ModelConfig) -> Limits:
    """Return the limits of one DP group."""
    size = page_tokens(MIN_PAGE_ROWS.get(plan.backend, 1))
    per_request = -(-plan.max_model_len // size)
    n_pages = plan.slots_per_group * per_request
    if plan.cache_tokens is not None:
        share = plan.cache_tokens // plan.parallel.dp_size // size
        n_pages = max(per_request, min(n_pages, share))
    # A snapshot has one block of each window.
    may_share = config.window_size <= BLOCK_TOKENS
    return Limits(
        n_slots=plan.slots_per_group,
        max_chunk=plan.max_chunk,
        n_pages=n_pages,
        page_tokens=size,
        group_tokens=BLOCK_TOKENS,
        n_snapshots=plan.prefix_snapshots if may_share else 0,
        n_drafts=plan.n_draft_tokens,
    )

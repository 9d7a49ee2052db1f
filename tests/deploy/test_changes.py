"""What a changed setting restarts, and that every setting of a plan is known."""

import pytest
from explain_plan import two_hosts

from v4_ascend import __version__
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.deploy.changes import FIELDS, Scope, changes, scope_of
from v4_ascend.supernode.plan import Plan


def test_every_field_of_a_plan_is_classified():
    assert set(FIELDS) == set(Plan.model_fields)


def test_the_same_plan_has_no_change():
    assert changes(two_hosts(), two_hosts()) == []
    assert scope_of([]) is Scope.NOTHING


@pytest.mark.parametrize(
    ("field", "value", "key", "shown", "scope"),
    [
        ("max_batch_size", 8, "serve.concurrency", ("4", "8"), Scope.ALL),
        ("checkpoint", "/m/v4.1", "model.checkpoint", ("/models/v4", "/m/v4.1"), Scope.ALL),
        ("cache_tokens", 4096, "serve.cache_tokens", ("not given", "4096"), Scope.ALL),
        ("port", 8001, "serve.port", ("8000", "8001"), Scope.ALL),
        ("cors_origins", ("http://a", "http://b"), "serve.cors_origins",
         ("none", "http://a, http://b"), Scope.FRONT),
        ("requests_per_minute", 60, "serve.requests_per_minute", ("not given", "60"), Scope.FRONT),
        ("max_body_bytes", 2048, "serve.max_body_bytes", ("1048576", "2048"), Scope.FRONT),
        ("api_keys", ("secret",), "serve.api_keys", ("(hidden)", "(hidden)"), Scope.FRONT),
        ("parallel", ParallelConfig(dp_size=4, ep_size=4), "layout.ep_size", ("2", "4"), Scope.ALL),
    ],
)  # fmt: skip
def test_a_change_is_named_as_in_the_file(field, value, key, shown, scope):
    (found,) = changes(two_hosts(), two_hosts(**{field: value}))
    assert (found.key, (found.running, found.wanted), found.restarts) == (key, shown, scope)


def test_all_changes_together_restart_what_the_greatest_does():
    both = changes(two_hosts(), two_hosts(api_keys=("k",), max_batch_size=1))
    assert {c.restarts for c in both} == {Scope.FRONT, Scope.ALL}
    assert scope_of(both) is Scope.ALL


def test_the_device_s_number_is_no_difference_and_the_host_is():
    running = two_hosts()
    moved = tuple(r.model_copy(update={"device": r.device + 8}) for r in running.ranks)
    assert changes(running, two_hosts(ranks=moved)) == []
    elsewhere = tuple(r.model_copy(update={"host": "host-c"}) for r in running.ranks)
    (found,) = changes(running, two_hosts(ranks=elsewhere))
    assert (found.key, found.restarts) == ("ranks", Scope.ALL)


def test_another_version_of_the_software_restarts_everything():
    (found,) = changes(two_hosts(), two_hosts(), "0.0.1")
    assert (found.key, found.running, found.wanted) == ("v4-ascend", "0.0.1", __version__)
    (found,) = changes(two_hosts(), two_hosts(), "")
    assert (found.running, found.restarts) == ("an earlier one", Scope.ALL)

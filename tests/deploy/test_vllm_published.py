"""What we generate for a published layout is what is published, but for a table of differences."""

import pytest
import vllm_published as published
import yaml

from v4_ascend.deploy.vllm.arguments import arguments, parse
from v4_ascend.errors import DeployError

DIFFERENCES = yaml.safe_load((published.DATA / "published_differences.yaml").read_text())
# What the published launcher gives each process, and what is the first host's own address.
GIVEN = {"$DEVICES", "$PORT", "$RANK", ("$LOCAL", "$FIRST")}
LATER = {"flash-a2-dspark"}  # of a later release than the arguments here
PICK = {
    "first": lambda launch: launch.role == "both" and launch.url,
    "other": lambda launch: launch.role == "both" and not launch.url,
    "prefill": lambda launch: launch.role == "prefill",
    "decode": lambda launch: launch.role == "decode",
}


def _differences(tmp_path, name):
    launches = published.launched(published.topology_file(name, tmp_path))
    for process in published.LAYOUTS[name]["processes"]:
        role = process["role"]
        env, flags = published.spelled(next(x for x in launches if PICK[role](x)))
        ours = published.leaves({"env": env, "flags": flags})
        theirs = dict(zip(("env", "flags"), published.published(process), strict=True))
        theirs = published.leaves(theirs)
        for path in sorted(ours | theirs):
            pair = theirs.get(path, "-"), ours.get(path, "-")
            if pair[0] != pair[1] and pair[0] not in GIVEN and pair not in GIVEN:
                yield (f"{name}/{role}", path, *map(str, pair))


def test_every_difference_from_what_is_published_is_in_the_table_and_no_other(tmp_path):
    found = {d for n in published.LAYOUTS if n not in LATER for d in _differences(tmp_path, n)}
    told = {
        (where, d["path"], str(d["published"]), str(d["ours"]))
        for d in DIFFERENCES
        for where in d["where"]
    }
    assert sorted(found - told) == []
    assert sorted(told - found) == []


def test_every_difference_has_a_reason():
    assert all(len(d["why"]) > 20 for d in DIFFERENCES)


@pytest.mark.parametrize("name", sorted(set(published.LAYOUTS) - LATER))
def test_most_of_each_layout_comes_out_as_published(tmp_path, name):
    wrong = {(where, path) for where, path, *_ in _differences(tmp_path, name)}
    for process in published.LAYOUTS[name]["processes"]:
        theirs = published.leaves({"env": process["env"], "flags": process["flags"]})
        n_wrong = sum(where == f"{name}/{process['role']}" for where, _ in wrong)
        assert n_wrong <= len(theirs) / 4


def test_dspark_is_refused_for_a_release_that_has_none(tmp_path):
    file = published.topology_file("flash-a2-dspark", tmp_path)
    with pytest.raises(DeployError, match="does not know 'dspark'"):
        published.launched(file)


@pytest.mark.parametrize("name", sorted(published.LAYOUTS))
def test_published_commands_use_flags_of_the_release(name):
    for process in published.LAYOUTS[name]["processes"]:
        for flag in process["flags"]:
            spelled = flag if flag in arguments("0.23.0").flags else flag.removeprefix("no-")
            assert spelled in arguments("0.23.0").flags


def test_the_arguments_know_what_the_release_never_reads():
    # Both are published; the wheels' text has neither (searched file by file, 2026-11-26).
    accepted = arguments("0.23.0")
    assert "VLLM_RPC_TIMEOUT" not in accepted.environment
    assert "multistream_dsa_preprocess" not in accepted.additional_config
    argv = ["vllm", "serve", "m", "--additional-config", '{"multistream_dsa_preprocess": 1}']
    with pytest.raises(DeployError, match="does not know 'multistream_dsa_preprocess'"):
        parse(argv, accepted)

"""support-bundle: nothing secret survives in any member, and the story still reads."""

import os
import random
import stat
import string
import subprocess
import sys
import tarfile

import pytest
from explain_plan import two_hosts

from v4_ascend.deploy.support import bundle
from v4_ascend.deploy.support.redaction import Redactor

RNG = random.Random(20261126)
LETTERS = string.ascii_letters + string.digits


def some(n, letters=LETTERS):
    return "".join(RNG.choice(letters) for _ in range(n))


FORMS = """password: {}
PASSWD='{}'
secret = {}
x-api-key: {}
Api-Key:{}
Authorization: Bearer {}
authorization: basic {}
curl -H "Bearer {}"
'password': b'{}'
https://bob:{}@hub.example/x
apikeys: ['{}']
HF_TOKEN={}
--api-key={}
aws_secret_access_key = {}
client_secret_v2: {}
db_password_ro={}""".splitlines()


def secrets_in_context():
    """Yield a secret and a line as logs have it, whose other words do not give it away."""
    api_key, token = some(24), some(32)
    yield from (
        (key := "hf_" + some(34), f"login with {key} ok"),
        (key := "sk-" + some(40), f"OPENAI={key}"),
        (key := "ghp_" + some(36), f"git clone with {key}"),
        (key := "AKIA" + some(16, string.ascii_uppercase), f"aws {key} used"),
        (key := f"eyJ{some(20)}.eyJ{some(30)}.{some(20)}", f"jwt {key}"),
        (api_key, f"api_key={api_key}"),
        (token, f'{{"token": "{token}", "prompt_tokens": 64}}'),
    )
    for form in FORMS:
        secret = some(20)
        yield secret, form.format(secret)
    body = some(64)
    yield body, f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"


def addresses_in_context():
    def octets():
        return ".".join(str(RNG.randrange(1, 255)) for _ in range(4)).replace("127.", "128.")

    def group():
        return f"{RNG.randrange(1, 1 << 16):x}"

    for form in ("connect to {}:16666", "[{}]:80", "ip[{}%eth0]", "{}/24", "(192.0.2.1,{})",
                 "tcp://{}:29500", "'{}'", "rank[0]-localIpAddr[{}/1]", "host={},"):  # fmt: skip
        address = octets()
        yield address, form.format(address)
    full = ":".join(group() for _ in range(8))
    short = f"fe80::{group()}:{group()}"
    yield from ((full, f"listen on {full} now"), (short, f"[{short}]:60000"))
    yield from (
        (short := f"2001:db8::{group()}", f"peer {short}."),
        (short.upper(), f"x {short.upper()}"),
    )
    for sep in ":-":
        mac = sep.join(f"{RNG.randrange(256):02x}" for _ in range(6))
        yield mac, f"link {mac} down"
        yield mac.upper(), f"link {mac.upper()} down"


def names_in_context():
    yield "host-a", "rank 0 (stage 0, host-a device 0) waits"
    yield "host-b", "ssh: connect to host HOST-B port 22; host-b.rack7.example"
    yield "secretbox", "GET http://secretbox.corp.example:8000/v1"
    yield "zoe.miller", "/home/zoe.miller/models and /Users/zoe.miller/x"


CORPUS = [*secrets_in_context(), *addresses_in_context(), *names_in_context()]


def redactor(**known):
    return Redactor(**({"hosts": ["host-a", "host-b"]} | known))


@pytest.mark.parametrize(("thing", "line"), CORPUS, ids=[line[:40] for _, line in CORPUS])
def test_a_thing_in_its_line_is_replaced(thing, line):
    out = redactor().text(line)
    assert thing.casefold() not in out.casefold()


def test_random_mixtures_keep_nothing():
    for _ in range(300):
        chosen = RNG.sample(CORPUS, 6)
        glue = RNG.choice(["\n", " | ", ", ", "\t"])
        out = redactor().text(glue.join(line for _, line in chosen)).casefold()
        assert not [t for t, _ in chosen if t.casefold() in out]


def test_known_secrets_go_in_every_form_and_length():
    r = redactor(secrets=["p w/d&1", "abc", 'line\nbreak"quote'])
    out = r.text('x p w/d&1 y p%20w%2Fd%261 abc abcd "line\\nbreak\\"quote"')
    assert out == 'x secret-1 y secret-1 secret-2 abcd "secret-3"'


def test_the_same_thing_keeps_its_alias_and_the_story_reads():
    r = redactor()
    text = "host-b (192.0.2.7) lost HOST-A (192.0.2.9): 192.0.2.7 gone, host-b.example too"
    assert r.text(text) == ("host-1 (addr-1) lost host-2 (addr-2): addr-1 gone, host-1.example too")
    assert r.text("192.0.2.9") == "addr-2"
    assert r.counts == {"addr": 2, "host": 2}
    assert r.text(r.text(text)) == r.text(text)


@pytest.mark.parametrize(
    "line",
    [
        "http://127.0.0.1:8000/v1 on localhost, [::1] and 0.0.0.0",
        '{"prompt_tokens": 64, "completion_tokens": 48, "time": "2026-11-26T17:38:37.763+00:00"}',
        "std::vector<c10::Error> at NPUEvent.cpp:215, 17:38:37.763, torch 2.13.0, v0.26.0rc1",
        "error code is 507034; MoeDistributeDispatchV2; EI0006: [PID: 12]",
        "step 7: 12 tokens, layers 0 to 4, experts 4 to 7",
    ],
)
def test_what_helps_stays(line):
    assert redactor(public=["github.com"]).text(line) == line


def everything(file):
    with tarfile.open(file) as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers()}


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    folder = tmp_path / "state" / "v4-ascend" / "pair"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hunter2-from-environment")
    monkeypatch.setenv("HCCL_IF_IP", "192.0.2.44")
    monkeypatch.setenv("VLLM_API_KEY", "vllm-key-from-environment")
    monkeypatch.setenv("FAVOURITE_COLOUR", "ultramarine")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("plain-token-of-a-file\n")
    two_hosts(api_keys=("k1", "key-of-the-plan")).write(folder / "plan.json")
    (folder / "link.json").write_text('{"front": "tcp://192.0.2.1:1", "secret": "link-secret-9"}')
    known = "hunter2-from-environment plain-token-of-a-file key-of-the-plan k1 link-secret-9"
    text = "\n".join(line for _, line in CORPUS)
    (folder / "ranks.log").write_text(f"{known}\n[1]: MemoryError\n")
    (folder / "ranks-host-b.log").write_text(text)
    (tmp_path / "topology.yaml").write_text("serve: {api_keys: [key-of-the-plan]}\n")
    return tmp_path


def test_nothing_of_the_corpus_survives_in_any_member(deployed):
    out = deployed / "out.tar.gz"
    bundle.write(bundle.Wanted("pair", deployed / "topology.yaml"), out)
    files = everything(out)
    whole = "\n".join(f"{name}\n{text}" for name, text in files.items()).casefold()
    secrets = ["hunter2", "plain-token", "key-of-the-plan", "link-secret", "vllm-key", "192.0.2.44"]
    assert not [s for s in (*secrets, *(t for t, _ in CORPUS)) if s.casefold() in whole]
    names = {name.partition("/")[2] for name in files}
    assert {"README.txt", "versions.json", "environment.txt", "plan.json", "status.json",
            "explanation.txt", "topology.yaml", "logs/ranks.log"} <= names  # fmt: skip
    assert "ultramarine" not in whole
    assert "HCCL_IF_IP=addr-" in files["v4-ascend-support/environment.txt"]
    assert "rank 1 (stage 0" in files["v4-ascend-support/explanation.txt"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_half_a_bundle_is_never_left(deployed, monkeypatch):
    monkeypatch.setattr(bundle, "_status", lambda name: 1 / 0)
    before = sorted(deployed.iterdir())
    with pytest.raises(ZeroDivisionError):
        bundle.write(bundle.Wanted("pair", None), deployed / "out.tar.gz")
    assert sorted(deployed.iterdir()) == before


def test_a_long_log_keeps_both_ends_in_whole_lines(deployed, monkeypatch):
    monkeypatch.setattr(bundle, "LOG_BYTES", 1000)
    log = deployed / "state" / "v4-ascend" / "pair" / "ranks.log"
    log.write_text("".join(f"line {i} password={some(9)}\n" for i in range(400)))
    bundle.write(bundle.Wanted("pair", None), deployed / "out.tar.gz")
    lines = everything(deployed / "out.tar.gz")["v4-ascend-support/logs/ranks.log"].splitlines()
    assert lines[0].startswith("line 0 ")
    assert lines[-1].startswith("line 399 ")
    assert sum("bytes left out" in line for line in lines) == 1
    assert all("password=secret-" in line or "left out" in line for line in lines)


def test_the_command(deployed):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "v4_ascend", "support-bundle", *args],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=deployed,
            env=os.environ,
        )

    done = run("pair", "--out", "b.tar.gz")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("b.tar.gz: ")
    assert run("--out", "machine.tar.gz").returncode == 0
    for args, error in (
        (("pair", "--out", "b.zip"), "error: --out: b.zip does not end in .tar.gz\n"),
        (("pair", "--out", "no/b.tar.gz"), "error: --out: no folder no\n"),
        (("pair", "--out", "c.tar.gz", "--topology", "t"), "error: --topology: no file t\n"),
    ):
        done = run(*args)
        assert (done.returncode, done.stderr) == (2, error)
    done = run("nobody", "--out", "c.tar.gz")
    assert (done.returncode, (deployed / "c.tar.gz").exists()) == (2, False)

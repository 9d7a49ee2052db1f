"""Chat with tools and schemas, Responses and Messages: one deployment, each API's own client."""

import json
import re

import anthropic
import httpx
import openai
import pytest
from broken_bodies import broken
from prometheus_client.parser import text_string_to_metric_families
from test_deploy import ROOT, Box, wait_for

from v4_ascend.chat import ChatTokenizer
from v4_ascend.runtime.conformance.cases import CASES
from v4_ascend.runtime.conformance.endpoint import CaseFailedError, Endpoint
from v4_ascend.runtime.operator_times import EVERY

KEY = "secret-1"
PER_MINUTE = 400
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Ulm", "Köln"]}, "n": {"enum": [1, 2]}},
    "required": ["city"],
}
FUNCTION = {"name": "weather", "description": "of a city", "parameters": WEATHER}
TOOL = {"type": "function", "function": FUNCTION}
PICK = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
PICK["additionalProperties"] = False
ASK = {"model": "v4-tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("apis"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    settings = (f"serve.api_keys=[{KEY},slow]", "serve.max_body_bytes=60000", "name=apis")
    settings += ("serve.max_model_len=3000", f"serve.requests_per_minute={PER_MINUTE}")
    options = [word for s in settings for word in ("--set", s)]
    done = box.run("deploy", "--topology", box.topology, *options, "--detach")
    assert done.returncode == 0, done.stderr
    yield box
    assert box.run("down", "apis").returncode == 0


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def claude(served):
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as client:
        yield client


def post(served, path, body, **headers):
    headers = {"Authorization": f"Bearer {KEY}"} | headers
    return httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=60)


def test_an_answer_ends_when_the_time_it_was_given_is_over(served, client):
    late = post(served, "/v1/chat/completions", ASK | {"max_tokens": 2000, "timeout": 0.2})
    assert late.status_code == 408
    assert late.headers["x-should-retry"] == "false"
    assert late.json()["error"]["message"] == "timeout: 0.2 s are over"
    soon = client.chat.completions.create(**ASK, max_tokens=2, extra_body={"priority": -1})
    assert soon.usage.completion_tokens == 2
    wrong = post(served, "/v1/chat/completions", ASK | {"priority": 2000})
    assert wrong.status_code == 400
    assert "priority" in wrong.json()["error"]["message"]


def require_weather(arguments):
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert value["city"] in ("Ulm", "Köln")
    assert isinstance(value.get("n", 0), int)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_required_call_streamed_and_whole(served, client, thinking):
    ask = ASK | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    ask |= {"max_tokens": 1000, "extra_body": {"min_p": 0.001}}
    if thinking:  # a random model thinks until it is cut off, unless its reasoning is kept short
        end = ChatTokenizer.load(served.folder / "tiny").token_id("</think>")
        ask |= {"reasoning_effort": "high", "logit_bias": {str(end): 100}}
    whole = client.chat.completions.create(**ask).choices[0]
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather"
        require_weather(call.function.arguments)
    called = [c.message.tool_calls[0].function for c in (whole, streamed)]
    assert called[0].arguments == called[1].arguments


def test_a_named_call_and_what_follows_it(client):
    other = {"type": "function", "function": {"name": "other"}}
    ask = ASK | {"tools": [other, TOOL], "max_tokens": 1000}
    choice = {"type": "function", "function": {"name": "weather"}}
    said = client.chat.completions.create(**ask, tool_choice=choice).choices[0].message
    assert [c.function.name for c in said.tool_calls] == ["weather"]
    answer = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "rain"}
    messages = [*ASK["messages"], said.model_dump(exclude_none=True), answer]
    more = client.chat.completions.create(
        model="v4-tiny", messages=messages, tools=[TOOL], tool_choice="none", max_tokens=3
    )
    assert more.usage.prompt_tokens > 100


@pytest.mark.parametrize(
    ("extra", "is_right"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PICK}}},
         lambda t: json.loads(t)["a"] in (1, 2)),
        ({"extra_body": {"structured_outputs": {"regex": "[ab]{3}"}}}, lambda t: len(t) == 3),
        ({"extra_body": {"guided_regex": "[ab]{3}"}}, lambda t: set(t) <= {"a", "b"}),
        ({"extra_body": {"structured_outputs": {"choice": ["ja", "nein"]}}},
         lambda t: t in ("ja", "nein")),
        ({"extra_body": {"guided_json": PICK}}, lambda t: json.loads(t)["a"] in (1, 2)),
    ],
    ids=["json_schema", "regex", "guided_regex", "choice", "guided_json"],
)  # fmt: skip
def test_structured_answers_hold_for_each_choice(client, extra, is_right):
    answer = client.chat.completions.create(**ASK, max_tokens=300, n=2, **extra)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert is_right(choice.message.content), choice.message.content


def test_responses_whole_and_streamed_agree(client):
    ask = {"model": "v4-tiny", "input": "hi", "instructions": "be brief", "max_output_tokens": 20}
    ask |= {"extra_body": {"seed": 5}}
    whole = client.responses.create(**ask)
    assert whole.store is False
    assert whole.status in ("completed", "incomplete")
    text, done, numbers = "", None, []
    for event in client.responses.create(**ask, stream=True):
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type in ("response.completed", "response.incomplete"):
            done = event.response
    assert numbers == list(range(len(numbers)))
    assert whole.output_text == text == done.output_text
    assert whole.usage == done.usage


def test_responses_call_a_function_and_go_on(client):
    tool = {"type": "function", **FUNCTION}
    question = {"role": "user", "content": [{"type": "input_text", "text": "rain?"}]}
    ask = {"model": "v4-tiny", "tools": [tool], "parallel_tool_calls": False}
    with client.responses.stream(**ask, input=[question], tool_choice="required") as stream:
        response = stream.get_final_response()
    (call,) = response.output
    require_weather(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    thought["content"] = [{"type": "reasoning_text", "text": "hm"}]
    history = [question, thought, call.model_dump(exclude_none=True), result]
    shape = {"format": {"type": "json_schema", "name": "p", "schema": PICK}}
    more = client.responses.create(
        **ask, input=history, text=shape, tool_choice="none", max_output_tokens=200
    )
    assert json.loads(more.output_text)["a"] in (1, 2)


def test_responses_tell_reasoning_apart(client):
    ask = {
        "model": "v4-tiny",
        "input": "hi",
        "max_output_tokens": 12,
        "temperature": 0,  # drawn by chance, a token may be the end
        "reasoning": {"effort": "high"},
    }
    response = client.responses.create(**ask)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.type for item in response.output] == ["reasoning"]
    assert response.usage.output_tokens_details.reasoning_tokens == 12


def test_messages_whole_and_streamed(claude):
    ask = {"model": "v4-tiny", "max_tokens": 40, "system": [{"type": "text", "text": "brief"}]}
    ask |= {"messages": ASK["messages"], "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**ask)
    with claude.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    assert [b.text for b in whole.content] == [b.text for b in streamed.content]
    assert whole.stop_reason == streamed.stop_reason in ("max_tokens", "end_turn")
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    counted = claude.messages.count_tokens(
        model="v4-tiny", messages=ask["messages"], system=ask["system"]
    )
    assert counted.input_tokens == whole.usage.input_tokens


def test_messages_use_a_tool_and_take_its_result(claude):
    tool = {"name": "weather", "description": "of a city", "input_schema": WEATHER}
    ask = {"model": "v4-tiny", "max_tokens": 1000, "tools": [tool]}
    question = {"role": "user", "content": "rain?"}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    with claude.messages.stream(**ask, messages=[question], tool_choice=choice) as stream:
        said = stream.get_final_message()
    assert said.stop_reason == "tool_use"
    (use,) = said.content
    require_weather(use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    history = [
        question,
        {"role": "assistant", "content": [thought, use.model_dump()]},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    ]
    shape = {"format": {"type": "json_schema", "schema": PICK}}
    more = claude.messages.create(
        **ask, messages=history, tool_choice={"type": "none"}, output_config=shape
    )
    assert json.loads(more.content[0].text)["a"] in (1, 2)


def test_messages_think_in_blocks_of_their_own(claude):
    ask = {"model": "v4-tiny", "max_tokens": 12, "messages": [{"role": "user", "content": "hi"}]}
    ask |= {"thinking": {"type": "adaptive"}, "extra_body": {"temperature": 0}}
    with claude.messages.stream(**ask) as stream:
        said = stream.get_final_message()
    assert [b.type for b in said.content] == ["thinking"]
    assert (said.stop_reason, said.usage.output_tokens) == ("max_tokens", 12)
    assert said.content[0].signature


def test_messages_name_the_sequence_that_stopped_them(served):
    body = {"model": "v4-tiny", "max_tokens": 300, "temperature": 0, "stop_sequences": ["zq", "b"]}
    body |= {"messages": [{"role": "user", "content": "hi"}]}
    plain = post(served, "/v1/messages", body | {"stop_sequences": []}).json()
    text = plain["content"][0]["text"]
    stopped = post(served, "/v1/messages", body | {"stop_sequences": ["\x00never", text[3:5]]})
    assert stopped.json()["stop_reason"] == "stop_sequence"
    assert stopped.json()["stop_sequence"] == text[3:5]


def test_tokenize_and_back(served):
    text = "a <｜User｜> 水"
    tokens = post(served, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert post(served, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = post(served, "/tokenize", {"messages": ASK["messages"]}).json()
    used = post(served, "/v1/chat/completions", ASK | {"max_tokens": 1}).json()["usage"]
    assert chat["count"] == used["prompt_tokens"]


OPENAI = ("/v1/chat/completions", "/v1/responses")
BAD = [
    ("/v1/chat/completions", {"tool_choice": "required"}, "'required' needs tools"),
    ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": {"type": "function",
     "function": {"name": "g"}}}, "no tool is named 'g'"),
    ("/v1/chat/completions", {"response_format": {"type": "xml"}}, "got 'xml'"),
    ("/v1/chat/completions", {"structured_outputs": {"regex": "("}}, "unclosed group"),
    ("/v1/chat/completions", {"structured_outputs": {}}, "0 given; say exactly one"),
    ("/v1/chat/completions", {"guided_regex": "a", "guided_choice": ["b"]}, "say one of them"),
    ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, "no response is kept"),
    ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "cannot be run here"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "is not supported here"),
    ("/v1/messages", {"max_tokens": 0}, "max_tokens: .* 1, got 0"),
    ("/v1/messages", {"temperature": 1.5}, "temperature: .* 1, got 1.5"),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
    ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "cannot be run"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "says"), BAD, ids=[b[2][:20] for b in BAD])
def test_bad_requests_get_their_apis_error(served, path, change, says):
    base = {"model": "v4-tiny", "max_tokens": 5, "messages": ASK["messages"]}
    body = {"model": "v4-tiny"} if path == "/v1/responses" else base
    answer = post(served, path, body | change, **{"X-Request-Id": "mine-7"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert re.search(says, error["message"])
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"] == "mine-7"
    if path == "/v1/messages":
        assert (answer.json()["type"], answer.json()["request_id"]) == ("error", "mine-7")
    else:
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", [*OPENAI, "/v1/messages", "/v1/messages/count_tokens",
                                  "/v1/completions", "/tokenize", "/detokenize"])  # fmt: skip
def test_every_api_wants_a_key_and_a_body_that_is_not_too_large(served, path):
    no_key = httpx.post(f"{served.url}{path}", json={})
    assert (no_key.status_code, no_key.json()["error"]["type"]) == (401, "authentication_error")
    large = post(served, path, {"x": "y" * 60_000}, **{"X-Api-Key": KEY})
    assert large.status_code == 413
    assert "more than 60000 bytes" in large.json()["error"]["message"]


def test_a_key_that_asks_too_often_is_told_when_to_come_again(served):
    headers = {"Authorization": "Bearer slow"}
    with httpx.Client(base_url=served.url, headers=headers) as client:
        for _ in range(3 * PER_MINUTE):
            answer = client.post("/detokenize", json={"tokens": [5]})
            if answer.status_code != 200:
                break
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert post(served, "/detokenize", {"tokens": [5]}).status_code == 200


def test_no_body_is_the_servers_fault(served):
    """A sample; the whole of it: python tests/runtime/broken_bodies.py."""
    headers = {"Authorization": f"Bearer {KEY}"}
    for path, body, what in broken(80, seed=1):
        answer = httpx.post(f"{served.url}{path}", content=body, headers=headers, timeout=60)
        assert answer.status_code < 500, f"{what}: {answer.text}"


def test_clients_raise_their_own_errors(served):
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=served.url, api_key="wrong").messages.create(
            model="v4-tiny", max_tokens=1, messages=ASK["messages"]
        )
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong").models.list()


def test_no_page_of_another_origin_may_read_an_answer(served):
    answer = httpx.get(f"{served.url}/health", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in answer.headers


def exported(text):
    """Every sample's name and labels, read by Prometheus' own parser."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_served(served):
    def counted():
        return exported(httpx.get(f"{served.url}/metrics").text)

    model = ("model_name", "v4-tiny")
    before = counted()
    body = ASK | {"max_tokens": 4, "ignore_eos": True, "n": 2}
    usage = post(served, "/v1/chat/completions", body).json()["usage"]
    after = counted()
    for name, more in (
        (("vllm:generation_tokens_total", model), 8),
        (("vllm:prompt_tokens_total", model), 2 * usage["prompt_tokens"]),
        (("vllm:request_success_total", ("finished_reason", "length"), model), 2),
        (("vllm:time_to_first_token_seconds_count", model), 2),
        (("vllm:inter_token_latency_seconds_count", model), 6),
        (("vllm:e2e_request_latency_seconds_count", model), 2),
    ):
        assert after[name] - before[name] == more, name
    assert after["v4_ascend_ranks_ready", model] == after["v4_ascend_ready", model] == 1
    assert after["v4_ascend_step_seconds_sum", model] > before["v4_ascend_step_seconds_sum", model]


def test_the_time_of_a_step_is_told_by_operator(served):
    """A timed step is measured whole: its operators, and what is between them."""

    def timed():
        told = exported(httpx.get(f"{served.url}/metrics").text)
        where = [("kind", "decode"), ("model_name", "v4-tiny"), ("stage", "0")]
        n = told.get(("v4_ascend_timed_steps_total", *where), 0)
        name = "v4_ascend_operator_seconds_total"
        operators = {dict(key[1:]).get("operator"): v for key, v in told.items() if key[0] == name
                     and set(where) <= set(key[1:])}  # fmt: skip
        return n, operators

    before, _ = timed()
    post(served, "/v1/chat/completions", ASK | {"max_tokens": 2 * EVERY + 4, "ignore_eos": True})
    after, operators = wait_for(lambda: (found := timed())[0] >= before + 2 and found)
    assert operators.keys() >= {"sparse_attn", "compress_kv", "hc_pre", "sample", "other"}
    assert all(seconds >= 0 for seconds in operators.values())
    steps = exported(httpx.get(f"{served.url}/metrics").text)
    mean = (
        steps["v4_ascend_step_seconds_sum", ("model_name", "v4-tiny")]
        / (steps["v4_ascend_step_seconds_count", ("model_name", "v4-tiny")])
    )
    assert sum(operators.values()) / after < 20 * mean


def test_every_metric_of_the_dashboard_is_exported(served):
    board = json.loads((ROOT / "configs/grafana.json").read_text())
    queries = [t["expr"] for p in board["panels"] for t in p["targets"]]
    queries += [v["query"] for v in board["templating"]["list"]]
    asked = {m for q in queries for m in re.findall(r"\b(?:vllm:|v4_ascend_)\w+", q)}
    assert len(asked) > 15

    def told():  # ranks tell with a step
        post(served, "/v1/chat/completions", ASK | {"max_tokens": EVERY, "ignore_eos": True})
        text = httpx.get(f"{served.url}/metrics").text
        return "imbalance{" in text and "v4_ascend_operator_seconds_total{" in text

    wait_for(told)
    names = {key[0] for key in exported(httpx.get(f"{served.url}/metrics").text)}
    assert asked - names == set()


def test_the_log_has_a_line_for_each_request(served):
    body = ASK | {"max_tokens": 2, "ignore_eos": True, "stream": True}
    post(served, "/v1/chat/completions", body, **{"X-Request-Id": "log-1"})
    wrong = post(served, "/v1/messages", {"no": 1}, **{"X-Request-Id": 'bad "id'})
    assert wrong.headers["x-request-id"].startswith("req_")
    log = served.folder / "state/v4-ascend/apis/front.log"

    def logged(request_id):  # once the answer has been sent
        lines = [json.loads(line) for line in log.read_text().splitlines(keepends=True)
                 if line.endswith("\n")]  # fmt: skip
        return [line for line in lines if line["request_id"] == request_id]

    (line,) = wait_for(lambda: logged("log-1"))
    assert (line["path"], line["status"]) == ("/v1/chat/completions", 200)
    assert (line["completion_tokens"], line["event"]) == (2, "request")
    (line,) = wait_for(lambda: logged(wrong.headers["x-request-id"]))
    assert (line["path"], line["status"]) == ("/v1/messages", 400)


def test_our_server_passes_every_case(served):
    done = served.run("conformance", served.url, "--api-key", KEY, "--json", timeout=300)
    told = json.loads(done.stdout)
    assert (told["diagnostics"], done.returncode) == ([], 0)
    # An answer that may have many calls has no end a random model would surely come to.
    passed = {c["case"] for c in told["data"]["cases"] if c["status"] == "passed"}
    assert set(CASES) - passed <= {"a required call is made"}


def through(served, change):
    """A client that sees what our server says, with something changed on the way."""

    def handle(request):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        url = f"{served.url}{request.url.path}"
        answer = httpx.request(
            request.method, url, content=request.content, headers=headers, timeout=60
        )
        status, text = change(answer.status_code, answer.text)
        kind = {"Content-Type": answer.headers["content-type"]}
        return httpx.Response(status, text=text, headers=kind)

    transport = httpx.MockTransport(handle)
    return httpx.Client(transport=transport, base_url="http://test/v1")


FAULTS = [
    ("an answer counts its tokens", r'"total_tokens": ?\d+', '"total_tokens": 1', "tokens is 1"),
    ("an answer counts its tokens", r'"content": ?""}', '"content": "<｜x"}', "markup in"),
    ("an answer counts its tokens", r"data: .DONE.", "", "without .DONE."),
    ("an answer counts its tokens", r'"finish_reason": ?"\w+"', '"finish_reason": null', "finish"),
    ("parallel tool calls can be switched off", r'Köln|北京', "Berlin", "city is 'Berlin'"),
    ("bad requests are refused", r'"type": ?"inv\w+"', '"type": 1', "error.type is not a string"),
    ("tool choice none calls nothing", r'"role": ?"assistant"',
     '"role": "assistant", "tool_calls": [{}]', "calls are"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pattern", "instead", "says"), FAULTS)
def test_a_wrong_server_fails_the_case(served, name, pattern, instead, says):
    def change(status, text):
        return status, re.sub(pattern, instead, text)

    with through(served, change) as client, pytest.raises(CaseFailedError, match=says):
        CASES[name](Endpoint(client, "v4-tiny"))


def test_a_server_that_takes_everything_fails(served):
    def change(status, text):
        return 200, text

    with through(served, change) as client, pytest.raises(CaseFailedError, match="must be 400"):
        CASES["bad requests are refused"](Endpoint(client, "v4-tiny"))


def test_bench_serve_measures_what_was_asked(served, tmp_path):
    size = ("--num-prompts", "5", "--input-len", "20", "--output-len", "6")
    size += ("--max-concurrency", "2")
    where = ("--url", served.url, "--model", "v4-tiny", "--api-key", KEY, "--out", tmp_path)
    done = served.run("bench", "serve", *where, *size, "--goodput", "e2el:60000", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["data"]
    assert (result["completed"], result["input_lens"]) == (5, [20] * 5)
    assert result["output_lens"] == [6] * 5
    assert result["request_goodput"] == result["request_throughput"]
    assert 0 < result["p50_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
    assert result["output_throughput"] == pytest.approx(30 / result["duration"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    page = (tmp_path / "index.html").read_text()
    assert page.count("<polyline") >= 3
    assert "http" not in page.replace("http-equiv", "")


def test_bench_serve_from_a_file_in_open_loop_and_with_errors(served, tmp_path):
    file = tmp_path / "p.jsonl"
    long = json.dumps({"prompt": "x" * 4000, "output_len": 2})
    file.write_text('{"prompt": "a", "output_len": 2}\n' + long + "\n")
    where = ("--url", served.url, "--model", "v4-tiny", "--api-key", KEY, "--prompts", file)
    rate = ("--num-prompts", "4", "--request-rate", "20", "--json")
    done = served.run("bench", "serve", *where, *rate)
    assert done.returncode == 1
    assert "2 of 4 requests failed: status 400" in done.stderr
    result = json.loads(done.stdout)["data"]
    assert (result["completed"], result["output_lens"]) == (2, [2, 0, 2, 0])

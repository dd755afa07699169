"""OpenAI's own client against the server; answers are those of ``generate``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
import torch

from actsparse.runtime.generate import generate
from actsparse.runtime.swap import without_rules
from actsparse.serve.lanes import Lane
from actsparse.serve.text import Detokenizer, Stops

from ..conftest import tiny_model
from .conftest import running

openai = pytest.importorskip("openai", reason="openai's client is not installed")
PROMPT = "The function returns"


@pytest.fixture
def client(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(model: Any, tokenizer: Any, prompt: str = PROMPT, **options: Any) -> str:
    return generate(model, tokenizer, prompt, **{"max_new_tokens": 24, **options}).text


def test_completions_are_those_of_generate(client: Any, sparse_model: Any, chat_tokenizer: Any) -> None:
    for seed, temperature in ((0, 0.0), (7, 0.9)):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=24, temperature=temperature, seed=seed, top_p=0.95
        )
        wanted = expected(sparse_model, chat_tokenizer, temperature=temperature, seed=seed, top_p=0.95)
        assert answer.choices[0].text.strip() == wanted.strip()
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 24
        assert answer.usage.total_tokens == 24 + len(chat_tokenizer(PROMPT)["input_ids"])
        assert 0 < answer.usage.actsparse["bits_read"] < 32
        assert answer.usage.actsparse["weights_read_mb_per_token"] > 0


def test_the_dense_lane_sets_the_rules_aside(client: Any, sparse_model: Any, chat_tokenizer: Any) -> None:
    answer = client.completions.create(model="tiny-dense", prompt=PROMPT, max_tokens=24, temperature=0)
    with without_rules(sparse_model):
        assert answer.choices[0].text.strip() == expected(sparse_model, chat_tokenizer).strip()
    assert answer.usage.actsparse["bits_read"] == pytest.approx(32)
    assert {each.id for each in client.models.list()} == {"tiny", "tiny-dense"}
    assert client.models.retrieve("tiny-dense").id == "tiny-dense"


def test_a_stream_is_the_whole_in_pieces(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20,
                               "temperature": 0.7, "seed": 3, "logprobs": True, "top_logprobs": 2}  # fmt: skip
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}, extra_body={"layer_bits": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    bits = [chunk.layer_bits for chunk in chunks if getattr(chunk, "layer_bits", None)]
    assert len(bits) >= 19
    assert all(len(each) == 3 and min(each) > 0 for each in bits)
    entries = [
        entry for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]  # fmt: skip
    assert [entry.token for entry in entries] == [entry.token for entry in whole.choices[0].logprobs.content]
    assert len(entries) == 20
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob <= 0 for entry in entries)


def test_logprobs_are_those_of_the_model(client: Any, sparse_model: Any, chat_tokenizer: Any) -> None:
    answer = client.completions.create(model="tiny-dense", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    tokens = torch.tensor([chat_tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad(), without_rules(sparse_model):
        logs = sparse_model(tokens).logits[0, -1].log_softmax(-1)
    assert found.token_logprobs[0] == pytest.approx(float(logs.max()), abs=1e-4)
    assert sorted(found.top_logprobs[0].values())[::-1] == pytest.approx(logs.topk(3).values.tolist(), abs=1e-4)
    assert found.text_offset == [0, len(found.tokens[0]), len(found.tokens[0]) + len(found.tokens[1])]


def test_stop_strings_end_an_answer_and_are_not_shown(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[10:13]
    for stream in (False, True):
        answer = client.completions.create(**options, stop=["never this", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
        assert choices[-1].finish_reason == "stop"


def test_an_end_token_ends_an_answer(chat_tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=4096)
    first = int(model(torch.tensor([[5, 6]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    with running([Lane("m", model, 64)], model, chat_tokenizer) as (_, address):
        body = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{address}/v1/completions", json=body).json()
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")
        more = httpx.post(f"{address}/v1/completions", json={**body, "ignore_eos": True}).json()
        assert more["usage"]["completion_tokens"] == 4


def test_many_clients_get_the_answers_they_get_alone(address: str) -> None:
    """More of them than slots, of different lengths, some streamed: rows are not mixed up and no bit moves."""

    def ask(number: int, stream: bool) -> tuple[str, list[float]]:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
            answer = client.completions.create(
                model=("tiny", "tiny-dense")[number % 2], prompt=f"{PROMPT} {number} " * (1 + number % 5), seed=number,
                max_tokens=5 + 7 * (number % 6), temperature=(number % 3) / 2, logprobs=0, stream=stream,
            )  # fmt: skip
            choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
            found = [choice.logprobs.token_logprobs for choice in choices if choice.logprobs]
            return "".join(choice.text for choice in choices), [value for each in found for value in each]

    alone = [ask(number, False) for number in range(24)]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda number: ask(number, number % 4 > 0), range(24)))
    assert together == alone
    assert len({text for text, _ in alone}) > 20


def test_long_prompts_run_in_pieces_between_others(address: str, sparse_model: Any, chat_tokenizer: Any) -> None:
    tokens = [int(t) for t in torch.randint(5, 4000, (900,), generator=torch.Generator().manual_seed(1))]
    body = {"model": "tiny-dense", "prompt": tokens, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == 900
    with torch.no_grad(), without_rules(sparse_model):
        first = int(sparse_model(torch.tensor([tokens])).logits[0, -1].argmax())
    assert answer["choices"][0]["text"].startswith(Detokenizer(chat_tokenizer, tokens).add(first) or "")


@pytest.mark.parametrize("kind", ["modules", "prompts"])
def test_models_without_a_shared_step_are_served_one_after_another(kind: str, chat_tokenizer: Any) -> None:
    if kind == "prompts":
        from actsparse.runtime.swap import sparsify

        from ..test_prompts import plan_of

        model = tiny_model("llama", vocab_size=4096)
        sparsify(model, plan_of(model, "griffin"))
    else:
        model = tiny_model("gemma", vocab_size=4096, hidden_act="gelu_pytorch_tanh", rope_parameters={
            "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}).float()  # fmt: skip
    lane = Lane("m", model, 128, 4)
    assert not lane.together
    with running([lane], model, chat_tokenizer) as (_, address):
        health = httpx.get(f"{address}/health").json()
        assert health["models"][0]["sequences"] == "one after another"
        assert health["models"][0]["because"]

        def ask(number: int) -> str:
            body = {"prompt": f"{PROMPT} {number}", "max_tokens": 12, "temperature": 0}
            return str(httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])

        alone = [ask(number) for number in range(5)]
        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(ask, range(5))) == alone
        for number, text in enumerate(alone):
            wanted = generate(model, chat_tokenizer, f"{PROMPT} {number}", max_new_tokens=12).text
            assert text.strip() == wanted.strip()


def test_text_is_cut_at_characters(chat_tokenizer: Any) -> None:
    text = "naïve 😀 日本語 \n end"
    tokens = chat_tokenizer(text)["input_ids"]
    stream = Detokenizer(chat_tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.end() == chat_tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
def test_stops(cut: int) -> None:
    def run(text: str, *stops: str) -> tuple[str, bool]:
        found = Stops(stops)
        shown = "".join(found.add(text[at : at + cut]) for at in range(0, len(text), cut))
        return shown + ("" if found.found else found.end()), found.found

    assert run("abcabd!", "abd") == ("abc", True)
    assert run("aaab", "aab", "zz") == ("a", True)
    assert run("nothing", "ngx") == ("nothing", False)
    assert run("xEND", "END", "ENDLESS") == ("x", True)
    assert run("any", *()) == ("any", False)

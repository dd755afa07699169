"""Text in, text out: both paths, sampling, chat sessions, and the two verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import actsparse
from actsparse.cli import main
from actsparse.cli.generate import diverged
from actsparse.models.sites import ModelError, describe
from actsparse.models.text import TextError
from actsparse.plan import ModelIdentity, Plan
from actsparse.runtime.generate import Generation, Sampling, Session, generate
from actsparse.runtime.swap import sparsify

PROMPT = "a token and another one"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token that random weights do not know about."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {character: index for index, character in enumerate(alphabet, 1)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
        model.lm_head.weight[0] = 0  # the end-of-text token stays unlikely
    return model


def plan_for(model: LlamaForCausalLM) -> Plan:
    rules = {f"layers.{layer}.ffn.threshold": torch.full((1,), 0.3) for layer in range(2)}
    return Plan("chess", 0.5, ModelIdentity(**describe(model)), rules)


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "actsparse.runtime.generate.Decoder.supports", staticmethod(lambda model, length=0: "switched off")
    )


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """A model directory and a plan file for it."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plan_for(model).save(tmp_path / "plan.safetensors")
    return str(tmp_path / "model"), str(tmp_path / "plan.safetensors")


@pytest.mark.parametrize("sparse", [False, True])
def test_both_paths_give_the_same_greedy_text(model, tokenizer, monkeypatch, sparse) -> None:
    if sparse:
        sparsify(model, plan_for(model))
    native = generate(model, tokenizer, PROMPT, max_new_tokens=20)
    without_native(monkeypatch)
    other = generate(model, tokenizer, PROMPT, max_new_tokens=20)
    assert native.path.startswith("native decode step, cpu-")
    assert other.path == "transformers generate: switched off"
    assert native.tokens == other.tokens
    assert native.text == other.text == tokenizer.decode(native.tokens)
    for result in (native, other):
        assert (result.prompt_tokens, result.prefill_tokens, result.stopped) == (len(PROMPT), len(PROMPT), "length")
        assert result.prefill_tok_s > 0
        assert result.decode_tok_s > 0
    assert other.weights_read_bytes is None
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n)
    assert native.weights_read_bytes == 4 * weights if not sparse else native.weights_read_bytes < 4 * weights


def test_both_paths_sample_alike(model, tokenizer, monkeypatch) -> None:
    settings = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5}
    state = torch.get_rng_state()
    native = generate(model, tokenizer, PROMPT, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, tokenizer, PROMPT, **settings).tokens == native.tokens
    assert generate(model, tokenizer, PROMPT, **settings | {"seed": 6}).tokens != native.tokens
    without_native(monkeypatch)
    assert generate(model, tokenizer, PROMPT, **settings).tokens == native.tokens


@pytest.mark.parametrize("native", [True, False])
def test_pieces_of_the_stream_make_the_text(model, tokenizer, monkeypatch, native) -> None:
    if not native:
        without_native(monkeypatch)
    pieces: list[str] = []
    result = generate(model, tokenizer, PROMPT, max_new_tokens=30, temperature=1.0, seed=1, stream=pieces.append)
    assert "".join(pieces) == result.text


@pytest.mark.parametrize("native", [True, False])
def test_stops_at_the_end_of_text(model, tokenizer, monkeypatch, native) -> None:
    if not native:
        without_native(monkeypatch)
    free = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    model.generation_config.eos_token_id = free.tokens[4]
    first = free.tokens.index(free.tokens[4])
    stopped = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.stopped == "eos"
    assert generate(model, tokenizer, PROMPT, max_new_tokens=10, stop_at_eos=False).tokens == free.tokens


@pytest.mark.parametrize("native", [True, False])
def test_a_session_runs_only_what_is_new(model, tokenizer, monkeypatch, native) -> None:
    if not native:
        without_native(monkeypatch)
    session = Session(model, tokenizer, 100)
    greedy = Sampling()
    start = tokenizer(PROMPT)["input_ids"]
    first = session.reply(start, greedy, max_new_tokens=6)
    longer = [*start, *first.tokens, *tokenizer(" more")["input_ids"]]
    second = session.reply(longer, greedy, max_new_tokens=6)
    # The answer's last token was chosen but never run.
    assert second.prefill_tokens == 1 + len(" more")
    assert second.tokens == Session(model, tokenizer, 100).reply(longer, greedy, max_new_tokens=6).tokens
    changed = [*start[:-3], *start[:5]]
    third = session.reply(changed, greedy, max_new_tokens=6)
    assert third.prefill_tokens == 5
    assert third.tokens == Session(model, tokenizer, 100).reply(changed, greedy, max_new_tokens=6).tokens
    session.reset()
    assert session.reply(start, greedy, max_new_tokens=6).prefill_tokens == len(start)


@pytest.mark.parametrize("native", [True, False])
def test_an_interrupted_answer_leaves_the_session_usable(model, tokenizer, monkeypatch, native) -> None:
    if not native:
        without_native(monkeypatch)
    session = Session(model, tokenizer, 100)
    start = tokenizer(PROMPT)["input_ids"]
    pieces = 0

    def stop(text: str) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 1:
            raise KeyboardInterrupt

    # Bytes that end in a line feed are final at once, so the stream is called while decoding.
    monkeypatch.setattr("actsparse.runtime.generate._Streamer.put", lambda self, value: _put(self, value))

    def _put(self, value: torch.Tensor) -> None:
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
        elif value.numel() == 1:
            self.on_finalized_text("x")

    result = session.reply(start, Sampling(), max_new_tokens=10, stream=stop)
    assert (result.stopped, len(result.tokens)) == ("interrupted", 1)
    again = session.reply(start, Sampling(), max_new_tokens=10)
    assert again.tokens == Session(model, tokenizer, 100).reply(start, Sampling(), max_new_tokens=10).tokens


def test_the_context_is_a_limit(model, tokenizer) -> None:
    assert len(generate(model, tokenizer, "a" * 120, max_new_tokens=50, stop_at_eos=False).tokens) == 8
    with pytest.raises(ModelError, match="128 tokens leave no room for an answer, expected fewer than 128"):
        generate(model, tokenizer, "a" * 128)
    with pytest.raises(TextError, match="prompt is empty"):
        generate(model, tokenizer, "")


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_sampling_out_of_range(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_divergence() -> None:
    def of(*tokens: int) -> Generation:
        return Generation(tokens=list(tokens))

    assert diverged(of(1, 2), of(1, 2)) is None
    assert diverged(of(1, 2, 3), of(1, 4, 3)) == 1
    assert diverged(of(1, 2), of(1, 2, 3)) == 2


def test_verb_generate(saved, capsys, tmp_path) -> None:
    directory, plan = saved
    assert main(["generate", directory, "--prompt", PROMPT, "--max-new-tokens", "9", "--plan", plan, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert len(document["tokens"]) == 9
    assert captured.out.startswith(document["text"])
    assert "native decode step" in captured.err
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    arguments = ["--prompt-file", str(prompt), "--max-new-tokens", "9", "--plan", plan, "--compare", "--json"]
    assert main(["generate", directory, *arguments]) == 0
    out = capsys.readouterr().out
    compared = json.loads(out.splitlines()[-1])
    assert compared["sparse"]["tokens"] == document["tokens"]
    assert compared["sparse"]["weights_read_bytes"] < compared["dense"]["weights_read_bytes"]
    assert "MB a token" in out
    assert "tokens are equal" in out or "diverge at new token" in out


def test_compare_is_with_every_weight_where_the_directory_has_a_plan_of_its_own(
    saved: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory, plan = saved
    model, tokenizer = actsparse.load(directory, plan)
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    options = ["--prompt", PROMPT, "--max-new-tokens", "9", "--plan", plan, "--compare", "--json"]
    documents = []
    for name in (directory, str(tmp_path / "own")):
        assert main(["generate", name, *options]) == 0
        documents.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    for part in ("dense", "sparse"):
        assert documents[0][part]["tokens"] == documents[1][part]["tokens"]
        assert documents[0][part]["weights_read_bytes"] == documents[1][part]["weights_read_bytes"]


def test_verb_generate_refuses(saved, capsys, tmp_path) -> None:
    directory, plan = saved
    wrong = {
        ("--prompt", " "): "prompt is empty",
        ("--prompt-file", str(tmp_path / "none.txt")): "none.txt cannot be read: No such file",
        ("--prompt", "a", "--compare"): "--compare got no --plan",
        ("--prompt", "a", "--plan", plan, "--compare", "--temperature", "1"): "got --temperature 1",
        ("--prompt", "a", "--plan", str(tmp_path / "none")): "does not exist",
        ("--prompt", "a" * 128): "leave no room",
    }
    for arguments, message in wrong.items():
        assert main(["generate", directory, *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err.splitlines()[-1]
    for arguments in (["--prompt", "a", "--top-p", "2"], ["--prompt", "a", "--temperature", "x"], []):
        with pytest.raises(SystemExit) as left:
            main(["generate", directory, *arguments])
        assert left.value.code == 2


@pytest.mark.parametrize("template", [False, True])
def test_verb_chat(saved, tokenizer, capsys, monkeypatch, template) -> None:
    import io

    directory, plan = saved
    if template:
        turns = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        tokenizer.chat_template = turns + "{% if add_generation_prompt %}a:{% endif %}"
        tokenizer.save_pretrained(directory)
        tokenizer.chat_template = None
    lines = ["hello", "", "again", "/reset", "hello", "x" * 200, "hello", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    arguments = ["--plan", plan, "--max-new-tokens", "5", "--temperature", "0"]
    assert main(["chat", directory, *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("tokens: prefill") == 4
    assert captured.err.count("started over") == 1
    assert "leave no room" in captured.err
    assert ("no chat template" in captured.err) is not template

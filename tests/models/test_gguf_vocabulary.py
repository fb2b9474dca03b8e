"""A model with SentencePiece's vocabulary, as Llama 2's, from a GGUF file alone."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import pytest

from nano_vllm import LLM, SamplingParams
from tests.models.checkpoints import make_checkpoint, write_gguf

PIECES = ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "aa", "▁aa", "[", "]"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(PIECES)])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(PIECES))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ bos_token }}[{{ messages[0].content }}]")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("model")
    model = make_checkpoint(folder / "hf", vocab_size=len(TOKENS))
    write_gguf(model, folder / "model.gguf", add_vocabulary=add_vocabulary)
    with LLM(str(folder / "model.gguf"), device="cpu") as llm:
        yield llm


@pytest.mark.parametrize("prompt", ["ab aé", " 日本", "</s>"])
def test_prompt_and_output_are_one_text(llm: LLM, prompt: str) -> None:
    tokenizer = llm.get_tokenizer()
    bias = {TOKENS.index(piece): 6.0 for piece in PIECES}  # among them bytes of no character
    for seed in range(4):
        params = SamplingParams(max_tokens=40, seed=seed, logit_bias=bias, ignore_eos=True)
        (result,) = llm.generate([prompt], params, use_tqdm=False)
        output = result.outputs[0]
        whole = tokenizer.decode(result.prompt_token_ids + output.token_ids)
        assert tokenizer.decode(result.prompt_token_ids) + output.text == whole
        assert " ab" in output.text


def test_the_text_of_tokens_beside_their_logprobs(llm: LLM) -> None:
    bias = {TOKENS.index("▁ab"): 100.0}
    params = SamplingParams(max_tokens=3, logit_bias=bias, logprobs=0, temperature=0)
    output = llm.generate(["a"], params, use_tqdm=False)[0].outputs[0]
    assert output.text == " ab ab ab"
    entries = zip(output.token_ids, output.logprobs or [], strict=True)
    assert [entry[i].decoded_token for i, entry in entries] == [" ab"] * 3


def test_chat(llm: LLM) -> None:
    message = {"role": "user", "content": "ab"}
    result = llm.chat([message], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert [TOKENS[i] for i in result.prompt_token_ids] == ["<s>", "▁", "[", "ab", "]"]

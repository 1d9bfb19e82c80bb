"""Real GGUF files compute, tokenise and write what they do in transformers, which reads the same files.

They are looked for in the folder `SPECJAX_CHECKPOINTS`, by default `checkpoints/`. transformers reads Q4_1 and K-quants
through the `gguf` package too, so that equality says something about names, layouts, rotary positions and norms; the
values of each type are tested in `tests/test_gguf.py`.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from specjax import api

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
# Pattern of the file's name -> what to do where there is none, and how many texts are compared.
CHECKPOINTS = {
    "smollm2*.gguf": ("run `make checkpoint`", 40),
    "gemma*270m*.gguf": ("put Gemma-3-270M there as GGUF", 12),
    "qwen*0.5b*.gguf": ("put Qwen2.5-0.5B or Qwen2.5-Coder-0.5B there as GGUF", 12),
}
QUESTIONS = (
    "What is the capital of France, and why?",
    "Write a limerick about a compiler that is in love.",
    "James gets 80 emails a day.  20% of those emails don't require any response.  How many does he answer in 5 days?",
    "def quicksort(items):\n    ",
    "Translate German to English: Mein Name ist Hase, ich weiß von nichts.",
    "1, 1, 2, 3, 5, 8, 13,",
)
NEW_TOKENS = 48
TIE = 1e-4  # of two logits, times their spread: two correct programs may choose differently


def questions(count: int) -> list[str]:
    """Spec-Bench's questions, where `SPECJAX_QUESTIONS` names their file, else variations of a few of ours."""
    path = os.environ.get("SPECJAX_QUESTIONS")
    if path:
        lines = [json.loads(line)["turns"][0] for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return sorted(lines, key=len)[: 2 * count : 2]
    return [f"{text} ({index})" if index >= len(QUESTIONS) else text for index, text in enumerate(QUESTIONS * 7)][
        :count
    ]


class Pair:
    def __init__(self, path: Path, count: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.count, self.ours = count, api.load(path)
        self.theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def their_logits(self, ids: list[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.theirs(torch.tensor([ids])).logits[0].numpy()

    def prompts(self) -> list[list[int]]:
        encode = self.ours.tokenizer.encode_prompt
        if self.ours.tokenizer.has_chat_template:
            encode = lambda text: self.ours.tokenizer.apply_chat([{"role": "user", "content": text}])
        return [encode(text) for text in questions(self.count)]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda pattern: pattern.partition("*")[0])
def pair(request):
    folder = Path(os.environ.get("SPECJAX_CHECKPOINTS", ROOT / "checkpoints"))
    paths = sorted(folder.glob(request.param))
    remedy, count = CHECKPOINTS[request.param]
    if not paths:
        pytest.skip(f"there is no {folder / request.param}; {remedy}")
    return Pair(paths[0], count)


def test_logits_equal_those_of_transformers_to_a_ten_thousandth_of_their_spread(pair):
    for ids in pair.prompts()[:3]:
        ours, theirs = np.asarray(pair.ours.logits([ids]))[0], pair.their_logits(ids)
        worst = np.abs(ours - theirs[:, : ours.shape[1]]).max() / theirs.std()
        print(f"{len(ids)} tokens: largest difference {worst:.1e} of a spread of {theirs.std():.2f}")
        assert worst < 1e-4


def test_greedy_texts_are_those_that_transformers_chooses_token_for_token(pair):
    """transformers is given our text and chooses each of its tokens; by induction it would have written the same."""
    prompts = pair.prompts()
    out = api.generate(pair.ours, prompts, temperature=0.0, max_new_tokens=NEW_TOKENS)
    ties = 0
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        logits = pair.their_logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        for place in np.flatnonzero(logits.argmax(-1) != tokens):
            assert logits[place].max() - logits[place, tokens[place]] < TIE * logits.std(), (prompt, place)
            ties += 1
    print(f"{len(prompts)} texts, {sum(map(len, out.tokens))} tokens, {ties} ties")


def test_drafters_write_the_plain_text_at_temperature_0(pair):
    layers = pair.ours.decoder.config.layers
    drafters = (api.NGram(), api.EarlyExit(exit_layer=layers // 2), api.SkipLayers(skipped=(layers // 2,)), pair.ours)
    prompts = pair.prompts()[:12] + [[*prompt, 5] for prompt in pair.prompts()[:8]]
    write = lambda drafter: api.generate(
        pair.ours, prompts, drafter=drafter, temperature=0.0, max_new_tokens=24, batch_size=20
    )
    plain = write(None).tokens
    for drafter in drafters:
        out = write(drafter)
        print(type(drafter).__name__, f"{out.stats.block_efficiency:.2f} tokens per call")
        for prompt, ours, theirs in zip(prompts, plain, out.tokens, strict=True):
            if ours != theirs:
                place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
                logits = np.sort(np.asarray(pair.ours.logits([[*prompt, *ours[:place]]]))[0, -1])
                assert logits[-1] - logits[-2] < TIE * logits.std(), (drafter, prompt, place)


def test_ids_and_texts_equal_those_of_transformers(pair):
    """Also on random text. Where transformers leaves out a step of the model's own tokenizer, we add it there."""
    from tokenizers import normalizers, pre_tokenizers

    backend, architecture = pair.tokenizer.backend_tokenizer, pair.ours.decoder.config.family
    if architecture == "llama":  # SmolLM splits numbers into digits
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if architecture == "qwen2":  # Qwen composes characters
        backend.normalizer = normalizers.NFC()
    draw = random.Random(0)
    letters = "abc ABC 0123456789 \n\t  '’sSdlLvVeE.,!?<>|_-é́ñ漢字かな한국 😀👍🏽 ▁ <td> <|im_end|> \u00a0½Ⅳ٣"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(1000)]
    texts += [space * n + "x" for n in range(1, 33) for space in " \n\t"] + questions(pair.count)
    ids = pair.ours.tokenizer.encode_batch(texts)
    assert ids == pair.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert list(map(pair.ours.tokenizer.encode_prompt, texts)) == pair.tokenizer(texts)["input_ids"]
    for row in ids:
        assert pair.ours.tokenizer.decode(row) == pair.tokenizer.decode(row, skip_special_tokens=True)
    if pair.ours.tokenizer.has_chat_template:
        turns = [{"role": "user", "content": "Hello"}]
        theirs = pair.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        assert pair.ours.tokenizer.apply_chat(turns) == theirs["input_ids"]


def test_an_export_of_a_gguf_file_loads_in_transformers_with_its_tokenizer_and_template(pair, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    api.save(pair.ours, tmp_path / "export")
    again, tokenizer = api.load(tmp_path / "export"), AutoTokenizer.from_pretrained(tmp_path / "export")
    assert again.fingerprint == pair.ours.fingerprint
    assert again.tokenizer.fingerprint() == pair.ours.tokenizer.fingerprint()
    assert again.tokenizer.has_chat_template == pair.ours.tokenizer.has_chat_template
    text = 'In 2024, she said: "it\'s 3.5 km".\n'
    assert tokenizer(text)["input_ids"] == pair.ours.tokenizer.encode_prompt(text)
    assert (tokenizer.chat_template is not None) == pair.ours.tokenizer.has_chat_template
    ids = pair.prompts()[0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = exported(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(theirs - pair.their_logits(ids)).max() < 1e-4 * theirs.std()

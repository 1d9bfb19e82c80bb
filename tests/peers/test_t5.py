"""T5 against Hugging Face transformers on random checkpoints: logits, cached decoding, greedy texts, export."""

import copy

import numpy as np
import pytest
import tiny

from specjax.decoding import scheduler
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.hub.load import load
from specjax.hub.model import Model, save
from specjax.hub.tokenizer import train_byte_bpe

pytestmark = pytest.mark.peers

BASE = dict(
    vocab_size=300, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
)
VERSION_1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CONFIGS = {
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "v1.1": VERSION_1_1,
    "a shallower decoder": dict(VERSION_1_1, num_layers=3, num_decoder_layers=2),
    "heads wider than the model": dict(feed_forward_proj="relu", d_kv=24, num_heads=3, d_model=40),
    "few near buckets": dict(VERSION_1_1, relative_attention_num_buckets=8, relative_attention_max_distance=20),
    "gated silu": dict(feed_forward_proj="gated-silu", tie_word_embeddings=True),
    "another start": dict(VERSION_1_1, decoder_start_token_id=5, layer_norm_epsilon=1e-4),
}
PROMPTS, NEW, TIE = 20, 24, 1e-5


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request, tmp_path_factory):
    """The name of a config, the reference's model with random weights, and ours."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(len(request.param))
    config = T5Config(**{**BASE, **CONFIGS[request.param]}, eos_token_id=1, initializer_factor=1.0)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif "relative_attention_bias" in name:
                weight.copy_(torch.randn_like(weight))
            elif "shared" not in name:
                weight.mul_(2)
    directory = tmp_path_factory.mktemp("t5")
    model.save_pretrained(directory)
    return request.param, model, Model(*load(directory), train_byte_bpe(["a tokenizer that nobody asks"], 280))


def random_ids(seed, shape):
    return np.random.default_rng(seed).integers(2, BASE["vocab_size"], shape)


def test_logits_agree_on_prompts_longer_than_every_bucket(pair):
    """Within four times the reference's own rounding, which its logits in float64 show (1.7 times was measured)."""
    import torch

    _, theirs, ours = pair
    prompts, texts = random_ids(0, (3, 150)), random_ids(1, (3, 140))
    ids = {"input_ids": torch.tensor(prompts), "decoder_input_ids": torch.tensor(texts)}
    with torch.no_grad():
        rounded = theirs(**ids).logits.numpy()
        exact = copy.deepcopy(theirs).double()(**ids).logits.numpy()
    rounding = np.abs(rounded - exact).max()
    assert rounding < 2e-4 * exact.std()
    assert np.abs(np.asarray(ours.logits(prompts, texts)) - exact).max() < 4 * rounding


def decoded(ours, prompts, drafter, gamma, options):
    made = tiny.make_drafter(drafter, ours.decoder, gamma, options) if gamma else None
    plan = Plan.for_prompts(ours.decoder, prompts, max_new_tokens=NEW, greedy=True, drafter=made, gamma=gamma)
    result = scheduler.decode(
        plan,
        ours.params,
        ours.params if drafter == "model" else None,
        prompts,
        indices=range(len(prompts)),
        seed=0,
        sampling=Sampling.of(0.0),
        max_new_tokens=NEW,
        eos_ids=(1,),
    )
    return result.tokens


def test_greedy_texts_of_plain_and_speculative_decoding_are_the_references(pair):
    import torch

    name, theirs, ours = pair
    lengths = np.random.default_rng(2).integers(1, 40, PROMPTS)
    prompts = [random_ids(10 + i, length).tolist() for i, length in enumerate(lengths)]
    width = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    with torch.no_grad():
        out = theirs.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = []
    for row in out.sequences[:, 1:].tolist():
        expected.append(row[: row.index(1) + 1] if 1 in row else row)
    gaps = torch.stack(out.logits).topk(2).values
    gaps = (gaps[..., 0] - gaps[..., 1]).T.numpy()
    drafters = {
        "ngram": {"shortest": 1, "longest": 3},
        "early_exit": {"exit_layer": 1},
        "model": {"model": ours.decoder},
    }
    drafter = list(drafters)[list(CONFIGS).index(name) % len(drafters)]
    for kind, gamma, options in [("none", 0, {}), (drafter, 3, drafters[drafter])]:
        for row, (got, want) in enumerate(zip(decoded(ours, prompts, kind, gamma, options), expected, strict=True)):
            if got != want:
                first = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
                assert gaps[row, first] < TIE, (kind, row, first, gaps[row, first])


def test_an_export_is_the_same_model_to_the_reference(pair, tmp_path):
    import torch
    from transformers import T5ForConditionalGeneration

    _, theirs, ours = pair
    save(ours, tmp_path / "export")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "export")
    prompts, texts = torch.tensor(random_ids(3, (2, 9))), torch.tensor(random_ids(4, (2, 7)))
    with torch.no_grad():
        expected, got = (model(input_ids=prompts, decoder_input_ids=texts).logits for model in (theirs, again))
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
        alone = [model.generate(prompts, **how) for model in (theirs, again)]
    assert torch.equal(expected, got)
    assert alone[0].tolist() == alone[1].tolist()

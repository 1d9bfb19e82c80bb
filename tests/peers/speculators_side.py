"""The other side of test_speculators.py: runs where the package `speculators` is installed, in a process of its own.

    python speculators_side.py COMMANDS.json

The file lists commands with their arguments; those of DFlash have its name before them, as in "dflash_logits":

    ["logits", DRAFT, INPUTS.npz, OUT.npz]    the logits of every unrolled step, or of every block
    ["write", DRAFT, OPTIONS]                 a random draft, as the package writes it
    ["convert", DRAFT, TARGET, NEW_DRAFT]     SGLang's or z-lab's layout to the package's
"""

import json
import sys

import numpy as np
import torch
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.convert.dflash.converter import DFlashConverter
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import AutoConfig


def logits(draft, inputs, out):
    config = Eagle3SpeculatorConfig.from_pretrained(draft)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel.from_pretrained(draft, config=config, dtype=torch.float32).eval()
    values, steps = np.load(inputs), []
    model.lm_head.register_forward_hook(lambda module, args, output: steps.append(output[0].numpy()))
    tokens = torch.from_numpy(values["tokens"])[None]
    how = {"document_ids": torch.zeros_like(tokens), "ttt_steps": int(values["steps"])}
    with torch.no_grad():
        model(hidden_states=torch.from_numpy(values["states"])[None], input_ids=tokens, **how)
    np.savez(out, logits=np.stack(steps))


def write(draft, options):
    ids = torch.tensor(options.pop("ids"))
    layer, published = described("eagle3", options)
    sizes = {"draft_vocab_size": len(ids) or layer.vocab_size}
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(transformer_layer_config=layer, speculators_config=published, **sizes, **options)
    )
    if len(ids):
        marks = torch.zeros(layer.vocab_size, dtype=torch.bool)
        marks[ids] = True
        model.load_vocab_mappings(marks, ids - torch.arange(len(ids)))
    model.load_verifier_weights()
    save_random(model, draft, own_embedding=options.get("embed_requires_grad", False))


def described(algorithm, options):
    """The configs of the layers and of the target, from entries that it takes out of the options."""
    layer = AutoConfig.for_model(**options.pop("layer"))
    layer._attn_implementation = "eager"
    published = SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(options.pop("target")),
    )
    return layer, published


def save_random(model, draft, *, own_embedding=False):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "embed_tokens.weight" or own_embedding:
                random = 0.5 + torch.rand_like(parameter) if parameter.ndim == 1 else torch.randn_like(parameter) / 4
                parameter.copy_(random)
    model.save_pretrained(draft)


def convert(draft, target, new):
    Eagle3Converter().convert(draft, new, target, validate=False)


def dflash_logits(draft, inputs, out):
    """The logits of the mask tokens `[anchors, drafted, V]`, for every anchor that the package takes."""
    config = DFlashSpeculatorConfig.from_pretrained(draft)
    config.transformer_layer_config._attn_implementation = "eager"
    model = DFlashDraftModel.from_pretrained(draft, config=config, dtype=torch.float32).eval()
    model.load_verifier_weights()
    values = np.load(inputs)
    tokens, states = torch.from_numpy(values["tokens"])[None], torch.from_numpy(values["states"])[None]
    last = torch.zeros(1, tokens.shape[1], config.transformer_layer_config.hidden_size)
    how = {"document_ids": torch.zeros_like(tokens), "max_anchors": tokens.shape[1] - config.block_size}
    with torch.no_grad():
        _, logits, _, _, places = model._backbone_forward(states, tokens, torch.ones_like(tokens), last, **how)
    blocks = lambda x: x.reshape(-1, config.block_size, *x.shape[1:]).numpy()
    ids = config.aux_hidden_state_layer_ids
    np.savez(out, logits=blocks(logits[0])[:, 1:], anchors=blocks(places)[:, 0], states_after=ids)


def dflash_write(draft, options):
    layer, published = described("dflash", options)
    model = DFlashDraftModel(
        DFlashSpeculatorConfig(
            transformer_layer_config=layer,
            speculators_config=published,
            draft_vocab_size=layer.vocab_size,
            **options,
        )
    )
    model.load_verifier_weights()
    save_random(model, draft)


def dflash_convert(draft, target, new):
    DFlashConverter().convert(draft, new, target, validate=False)


COMMANDS = [logits, write, convert, dflash_logits, dflash_write, dflash_convert]

if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        for name, *arguments in json.load(file):
            {command.__name__: command for command in COMMANDS}[name](*arguments)

"""The other side of test_speculators.py: runs where the package `speculators` is installed, in a process of its own.

    python speculators_side.py COMMANDS.json

The file lists commands with their arguments:

    ["logits", DRAFT, INPUTS.npz, OUT.npz]    the logits of every unrolled step
    ["write", DRAFT, OPTIONS]                 a random draft, as the package writes it
    ["convert", DRAFT, TARGET, NEW_DRAFT]     SGLang's layout to the package's
"""

import json
import sys

import numpy as np
import torch
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
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
    torch.manual_seed(0)
    layer = AutoConfig.for_model(**options.pop("layer"))
    layer._attn_implementation = "eager"
    published = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(options.pop("target")),
    )
    ids = torch.tensor(options.pop("ids"))
    sizes = {"draft_vocab_size": len(ids) or layer.vocab_size}
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(transformer_layer_config=layer, speculators_config=published, **sizes, **options)
    )
    if len(ids):
        marks = torch.zeros(layer.vocab_size, dtype=torch.bool)
        marks[ids] = True
        model.load_vocab_mappings(marks, ids - torch.arange(len(ids)))
    model.load_verifier_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "embed_tokens.weight" or options.get("embed_requires_grad"):
                random = 0.5 + torch.rand_like(parameter) if parameter.ndim == 1 else torch.randn_like(parameter) / 4
                parameter.copy_(random)
    model.save_pretrained(draft)


def convert(draft, target, new):
    Eagle3Converter().convert(draft, new, target, validate=False)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        for name, *arguments in json.load(file):
            {"logits": logits, "write": write, "convert": convert}[name](*arguments)

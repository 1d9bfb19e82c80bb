"""The same shapes by Hugging Face transformers on the same device: plain and assisted generation, and a training step
on the draft's own text. Needs torch and transformers; weights are random, so texts are not compared."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any


def transformers_decoding(config: Any) -> Iterator[dict]:
    """Tokens per second of greedy generation, plain and with a draft; batch 1 for the latter, which takes no more."""
    import torch

    section = config.transformers_decoding
    models = {name: _model(config, name) for name in dict.fromkeys((*section.models, *section.drafts))}
    for name, draft in zip(section.models, section.drafts, strict=True):
        settings = models[draft].generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = section.gamma, "constant"
        settings.assistant_confidence_threshold = 0.0
        for size in section.batch_sizes:
            prompts = torch.randint(0, config.models[name].vocab_size, (size, config.prompt), device=_device())
            kinds = {"plain": {}} | ({"assisted": {"assistant_model": models[draft]}} if size == 1 else {})
            for kind, extra in kinds.items():
                call = functools.partial(_generate, config, models[name], prompts, **extra)
                rate = size * config.new_tokens / _median(call, config.repeats)
                row = {"system": "transformers", "model": name, "kind": kind, "batch_size": size}
                yield row | {"tokens_per_second": rate}


def transformers_step(config: Any) -> Iterator[dict]:
    """A step of on-policy distillation: the draft writes, both models read the text, the forward KL is descended."""
    import torch

    section = config.on_policy_step
    target, draft = _model(config, section.target), _model(config, section.draft).train()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4)
    prompts = torch.randint(0, draft.config.vocab_size, (section.batch_size, config.prompt), device=_device())
    write = lambda: _generate(config, draft, prompts, do_sample=True, temperature=1.0, top_k=0)

    def step() -> None:
        text = write()
        with torch.no_grad():
            aim = target(text).logits[:, config.prompt - 1 : -1].log_softmax(-1)
        logits = draft(text).logits[:, config.prompt - 1 : -1].log_softmax(-1)
        loss = torch.nn.functional.kl_div(
            logits.flatten(0, 1), aim.flatten(0, 1), log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()

    row = {"system": "transformers", "target": section.target, "draft": section.draft, "batch_size": section.batch_size}
    seconds = {"step_seconds": _median(step, config.repeats), "writing_seconds": _median(write, config.repeats)}
    yield row | seconds | {"tokens_per_second": section.batch_size * config.new_tokens / seconds["step_seconds"]}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _model(config: Any, name: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.models[name]
    described = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied_head,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(config.seed)
    with torch.device(_device()):
        model = LlamaForCausalLM(described).to(getattr(torch, shape.param_dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


def _generate(config: Any, model: Any, prompts: Any, **how: Any) -> Any:
    import torch

    with torch.no_grad():
        how = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)} | how
        return model.generate(prompts, max_new_tokens=config.new_tokens, **how)


def _median(call: Callable, repeats: int) -> float:
    import torch

    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])

"""Memory of a distillation step by vocabulary: by formula, by the compiler's account, and by the system's.

`python -m configs.benchmark.measure_memory CASE` measures one case, a JSON object, and prints the result as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.benchmark import process_memory
from specjax.distillation import divergences, objective, update
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.runtime.errors import UserError, nearest

# Float32 arrays [positions, V] that the backward pass of a chunk needs: the logits of draft and target, and the
# gradient of the draft's.
LOGITS = 3


def distillation_memory(config: Any) -> list[dict]:
    """Measures a step at each vocabulary, with the heads applied in chunks of positions and to all positions at once.

    All bytes are in addition to the training state and the target. The accounts: the formula `on_paper`, the
    compiler's temporary memory, and the peak of the process. Each case runs in a process of its own.

    Raises:
      UserError: for a model that the config does not describe, on another backend than CPU, and if a step fails.
    """
    section, rows = config.memory, []
    for name in (section.target, section.draft):
        if name not in config.models:
            raise UserError(f'the config describes no model "{name}"{nearest(name, config.models.keys())}')
    if jax.default_backend() != "cpu":
        raise UserError("the memory of a step is measured on a CPU; set JAX_PLATFORMS=cpu")
    models = {role: config.models[section[role]].to_dict() for role in ("draft", "target")}
    positions = section.batch_size * section.sequence_length
    for vocabulary in section.vocabularies:
        row = {"vocabulary": vocabulary, "logits_megabytes": positions * vocabulary * 4 / 1e6}
        for way, chunk in (("chunked", section.chunk), ("whole", positions)):
            case = {
                **{role: model | {"vocab_size": vocabulary} for role, model in models.items()},
                **{key: section[key] for key in ("batch_size", "sequence_length", "divergence")},
                "chunk": chunk,
                "seed": config.seed,
            }
            paper = on_paper(min(chunk, positions), vocabulary, models["draft"]["width"])
            bytes_of = {"on_paper": paper, **_in_a_process(case)}
            row |= {f"{way}_{name}_megabytes": count / 1e6 for name, count in bytes_of.items()}
        rows.append({**row, "chunk": section.chunk, "positions": positions})
    return rows


def on_paper(chunk: int, vocabulary: int, width: int) -> int:
    """The least float32 bytes of what grows with the vocabulary V: `4 V (LOGITS chunk + width)`.

    The second term is the gradient of the draft's head, which accumulates over the chunks.
    """
    return 4 * vocabulary * (LOGITS * chunk + width)


def measured(case: Mapping[str, Any]) -> dict[str, int]:
    """Temporary bytes of a compiled step, and the peak of this process during the step minus its memory before."""
    draft, target = (Decoder(DecoderConfig.llama(**case[role])) for role in ("draft", "target"))
    optimizer = optax.adamw(1e-3)
    loss = objective.Loss(draft, target, divergences.divergence(case["divergence"]), 1.0, case["chunk"])
    step = jax.jit(update.make_step(loss, optimizer, lambda step: step, 1), donate_argnums=0)
    draw, *keys = jax.random.split(jax.random.key(case["seed"]), 3)
    params, target_params = (model.init(key) for model, key in zip((draft, target), keys, strict=True))
    state = update.TrainState(params, optimizer.init(params), jnp.int32(0))
    size, length = case["batch_size"], case["sequence_length"]
    of_rows = lambda value: jnp.full((size,), value, jnp.int32)
    vocabulary = draft.vocab_size
    batch = {"tokens": jax.random.randint(draw, (size, length), 0, vocabulary, jnp.int32)}
    batch |= {"lengths": of_rows(length), "loss_start": of_rows(1), "prompt_lengths": of_rows(1)}
    compiled = step.lower(state, target_params, batch).compile()
    del params  # the state that is donated has them
    jax.block_until_ready((state, target_params))
    before = process_memory.settled()
    jax.block_until_ready(compiled(state, target_params, batch))
    peak = process_memory.peak() - before
    return {"compiled": compiled.memory_analysis().temp_size_in_bytes, "peak": peak}


def _in_a_process(case: Mapping[str, Any]) -> dict[str, int]:
    command = [sys.executable, "-m", "configs.benchmark.measure_memory", json.dumps(case)]
    # With filtering, the last line of the output is JAX's remark on its filter instead of the error.
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"the step with a vocabulary of {case['draft']['vocab_size']} and chunks of {case['chunk']} did not end "
            f"({reason}); if memory is short, lower memory.vocabularies, memory.batch_size or memory.sequence_length"
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))

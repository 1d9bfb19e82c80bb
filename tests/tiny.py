"""Tiny random models, short ways to decode with them, and an acceptance rule with planted faults."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import loop, rules, sampling
from specjax.decoding.drafters.table import build_drafter, make_options, options_class
from specjax.decoding.plan import capacity_for
from specjax.decoding.sampling import Stream
from specjax.models.adapters import Adapter, AdapterConfig
from specjax.models.block_parallel import BlockParallel, BlockParallelConfig
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.eagle3 import Eagle3Config, Eagle3Layer
from specjax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from specjax.models.medusa import MedusaConfig, MedusaHeads

NO_EOS = (-1,)


def config(**changes) -> DecoderConfig:
    """Two layers, two query heads to one key head: small enough to compile in about a second."""
    values = dict(
        rope_theta=1e4,
        vocab_size=24,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_size=8,
        mlp_width=32,
        max_positions=512,
        norm_epsilon=1e-5,
        tied_head=True,
        param_dtype="float32",
        compute_dtype="float32",
    )
    return DecoderConfig.llama(**{**values, **changes})


@functools.cache
def _drawn(model, seed: int):
    return jax.tree.map(np.asarray, model.init(jax.random.key(seed)))


def drawn(model, seed: int):
    """`model.init` with this seed, which runs once in a process, as it compiles dozens of small programs.

    The result is on the host, so that neither a donated array nor `jax.clear_caches` affects it.
    """
    return jax.tree.map(lambda x: x, _drawn(model, seed))  # containers of the caller's own


def random_params(model, seed: int = 0):
    """Normal values in all parameters of a model, without a compilation: for files, not for decoding."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), model.abstract_params())


def on_device(tree):
    """The arrays of a tree on JAX's default device, each a copy."""
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), tree)


def decoder(seed: int = 0, sharpness: float = 1.0, **changes):
    """A random model whose layers matter (kernels three times the usual size).

    `sharpness` multiplies the final norm's gain and so the logits. Returns the model and its parameters.
    """
    model = Decoder(config(**changes))
    return model, on_device(_decoder_params(model, seed, sharpness))


def _decoder_params(model, seed, sharpness=1.0):
    params = drawn(model, seed)
    params["blocks"] = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, params["blocks"])
    params["norm"] = params["norm"] | {"scale": sharpness * params["norm"]["scale"]}
    return params


def heads(target: Decoder, count: int = 5, **changes) -> MedusaHeads:
    """Medusa heads for the target."""
    return MedusaHeads(MedusaConfig(target.config, count, **changes))


def heads_params(target: Decoder, params, count: int = 5, seed: int = 3):
    """Parameters of `heads`: the target's own head with noise, so they agree with the target now and then."""
    start = heads(target, count).init_on(jax.random.key(0), target, params)
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def adapter(target: Decoder, seed: int = 5, **changes):
    """A random Kangaroo adapter at layer 1 and its parameters. Gains differ from 1, so that every norm matters."""
    made = Adapter(AdapterConfig(target.config, **{"exit_layer": 1, **changes}))
    return made, on_device(_spread(made, seed))


@functools.cache
def _spread(adapter, seed):
    keys = iter(jax.random.split(jax.random.key(seed + 1), 20))
    spread = lambda x: x * jax.random.uniform(next(keys), x.shape, minval=0.5, maxval=2.0) if x.ndim == 1 else x
    return jax.tree.map(lambda x: np.asarray(spread(x)), drawn(adapter, seed))


def eagle3(target: Decoder, params=None, seed: int = 7, **changes):
    """A random EAGLE-3 draft and its parameters, with the target's head if `params` is given, so it agrees at times."""
    made = Eagle3Layer(Eagle3Config(target.config, **changes))
    own = _started(made, target, params, seed)
    return made, on_device(
        jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, own) | {"unembedding": own["unembedding"]}
    )


def _started(attachment, target, params, seed):
    """Parameters of an attachment on the host, random or, if `params` is given, as its training starts."""
    if params is None:
        return drawn(attachment, seed)
    return jax.tree.map(np.asarray, attachment.init_on(jax.random.key(seed), target, params))


def block_parallel(target: Decoder, params=None, seed: int = 7, **changes):
    """A random block-parallel draft and its parameters; it uses the target's head."""
    made = BlockParallel(BlockParallelConfig(target.config, **{"layers": 2, "block_size": 6, **changes}))
    return made, on_device(jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, _started(made, target, params, seed)))


def masked(model: Decoder) -> Decoder:
    """The model with its last id as mask token, as PARD drafts have one."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, mask_id=model.config.vocab_size - 1))


def target_and_draft():
    """A target, its parameters, and parameters of a draft of the same shape that agrees about half of the time."""
    target, params = decoder(1)
    return target, params, with_noise(params, 0.15)


def with_noise(params, scale: float):
    """Parameters of a `decoder` plus those of another random one times `scale`."""
    noise = _decoder_params(Decoder(config()), 2)
    return on_device(jax.tree.map(lambda a, b: np.asarray(a) + np.float32(scale) * b, params, noise))


def drafter_options(kind: str, target, draft=None, adapter=None) -> dict:
    """Options of each drafter for a small target; the draft model is one of the target's shape unless `draft` says."""
    options = {
        "model": lambda: {"model": target if draft is None else draft},
        "pard": lambda: {"model": masked(target if draft is None else draft)},
        "ngram": lambda: {"shortest": 1, "longest": 2},
        "early_exit": lambda: {"exit_layer": 1},
        "skip_layers": lambda: {"skipped": (0,)},
        "medusa": lambda: {"adapter": heads(target)},
        "eagle3": lambda: {"adapter": eagle3(target)[0]},
        "block_parallel": lambda: {"adapter": block_parallel(target)[0]},
        "kangaroo": lambda: {"adapter": adapter},
    }
    return options[kind]()


def draft_params_of(kind: str, target, params, draft_params):
    """`draft_params`, except for drafts on the target's states, which have their own."""
    if kind in ("eagle3", "block_parallel"):
        return {"eagle3": eagle3, "block_parallel": block_parallel}[kind](target, params)[1]
    return heads_params(target, params) if kind == "medusa" else draft_params


def encoder_decoder(seed: int = 0, **changes):
    """A random encoder-decoder of T5's kind, and its parameters."""
    values = dict(
        vocab_size=24,
        width=16,
        layers=2,
        encoder_layers=2,
        heads=2,
        kv_heads=2,
        head_size=8,
        mlp_width=24,
        max_positions=1 << 30,
        rotary=None,
        norm_epsilon=1e-6,
        tied_head=False,
        param_dtype="float32",
        compute_dtype="float32",
        family="t5",
        activation="gelu_tanh",
        query_scale=1.0,
        relative_buckets=8,
        relative_distance=20,
        head_scale=1.0,
        start_token=0,
    )
    made = EncoderDecoder(EncoderDecoderConfig(**{**values, **changes}))
    return made, on_device(drawn(made, seed))


def prompts(seed: int, batch: int, slots: int, vocab: int):
    """Random prompts of 1 .. slots tokens, right-padded with 0, the first one of 1 and the last of all slots."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, slots + 1, batch)
    lengths[0], lengths[-1] = 1, slots
    tokens = random.integers(0, vocab, (batch, slots))
    tokens = np.where(np.arange(slots)[None] < lengths[:, None], tokens, 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "layers"))
def full_logits(model: Decoder, params, tokens, layers=None):
    """Logits of the uncached forward over whole rows, of all layers or of the range `layers`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden, _ = model.extend(params, None, tokens, positions, layers=layers)
    return model.head(params, hidden)


def make_drafter(kind: str, target, gamma: int, options: dict):
    """The drafter of this kind; `options` may hold those of other kinds, and "model" or "adapter", what is loaded."""
    names = options_class(kind).__dataclass_fields__
    made = make_options(kind, {name: value for name, value in options.items() if name in names})
    loaded = options.get({"model": "model", "attachment": "adapter"}.get(made.loads))
    return build_drafter(made, target, gamma, loaded)


def plan(
    target: Decoder,
    drafter: str = "ngram",
    options: dict | None = None,
    *,
    gamma: int,
    slots: int,
    max_new: int,
    rule="lossless",
    greedy: bool = False,
    spare: int = 0,
    chunk: int = 4,
) -> loop.Plan:
    """A Plan; `spare` is added to its capacity, `rule` is a name or the rule itself."""
    rule = rules.rule_named(rule) if isinstance(rule, str) else rule
    made = make_drafter(drafter, target, gamma, options or {}) if gamma else None
    capacity = capacity_for(slots, max_new, gamma, chunk) + spare
    return loop.Plan(target, made, rule, gamma, capacity, greedy, chunk=chunk, prompt_slots=slots)


def limits(batch: int, max_new, eos=NO_EOS) -> loop.Limits:
    """Limits from one number for all rows or one number per row."""
    return loop.Limits(jnp.asarray(np.broadcast_to(max_new, (batch,)), jnp.int32), jnp.asarray(eos, jnp.int32))


def decode(plan, params, draft_params, texts, lengths, max_new, *, eos=NO_EOS, seed=0, adjust=None, indices=None):
    """Runs the loop to the end. Returns the final state."""
    batch = texts.shape[0]
    keys = sampling.row_keys(seed, jnp.arange(batch) if indices is None else jnp.asarray(indices))
    adjust = sampling.Sampling.of(0.0 if plan.greedy else 1.0) if adjust is None else adjust
    state = loop.prefill(plan, params, draft_params, texts, lengths, keys)
    return loop.run(plan, params, draft_params, state, adjust, limits(batch, max_new, eos))


def texts_of(state) -> list[list[int]]:
    """Each row's committed tokens."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


@dataclasses.dataclass(frozen=True)
class Planted(rules.Rule):
    """The lossless rule implemented a second time, in the plainest way, with at most one fault."""

    fault: str

    def __call__(self, noise, proposal, target_probs, inputs):
        batch, gamma = proposal.tokens.shape
        vocab = target_probs.shape[-1]
        rows = jnp.arange(batch)
        draft = jax.nn.one_hot(proposal.tokens, vocab) if proposal.probs is None else proposal.probs
        counted = jnp.full_like(proposal.num_drafted, gamma) if self.fault == "counts all" else proposal.num_drafted
        uniforms = noise.uniforms(gamma)
        all_passed, accepted = jnp.ones((batch,), bool), jnp.zeros((batch,), jnp.int32)
        for i in range(gamma):
            bar = uniforms[:, i] * draft[rows, i, proposal.tokens[:, i]]
            target = target_probs[rows, i, proposal.tokens[:, i]]
            passed = bar <= target if self.fault == "<=" else bar < target
            all_passed &= passed & (i < counted)
            accepted += all_passed.astype(jnp.int32)
        draft = jnp.pad(draft, ((0, 0), (0, 1), (0, 0)))
        draft = jnp.where((jnp.arange(gamma + 1)[None] < counted[:, None])[..., None], draft, 0)
        row = jnp.minimum(accepted, gamma - 1) if self.fault == "no bonus" and gamma else accepted
        residual = jnp.maximum(target_probs[rows, row] - draft[rows, accepted], 0)
        if self.fault == "wrong residual":
            residual = target_probs[rows, accepted]
        if self.fault == "unclipped residual":
            residual = jnp.abs(target_probs[rows, accepted] - draft[rows, accepted])
        return accepted, noise.choose(residual, accepted, Stream.RECOVER)

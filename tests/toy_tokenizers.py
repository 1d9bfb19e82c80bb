"""Small tokenizers of every kind that a directory may hold, and texts that try them."""

import io
import json
import random

from specjax.hub.tokenizer import END, train_byte_bpe

CORPUS = [
    *(f"def function_{i}(value):\n    return value + {i}  # it's {i * 7}, isn't it?\n" for i in range(80)),
    *["naïve café 日本語 テキスト 🙂 hello world, a test of 1234 things: ﬁne ½ Å.\n"] * 20,
    *["The quick brown fox jumps over the lazy dog; she said 'no', he said \"yes\".\n"] * 20,
]
ATOMS = [
    *("hello", "Hello world", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "日本語", "テキスト", "한국어", "العربية"),
    *("🙂", "👩‍👩‍👧", "e\u0301", "é", "ﬁ", "½", "Å", "①", "def f(x):", "return x", "1234", "3.14", "it's", "isn't"),
    *("\u200b", "\u2028", "\u00a0", "\u3000", "▁", "▁▁x", "a", "Z", ".", " .", "...", " ,", "!?", "\x00", "\x7f", "</"),
    *("ñ", "ß", "İ", "\ufeff", "_", "<", ">", "<0x41>", "x" * 30, "##ing", "Δ∑√", "\\n", "{}", "[INST]"),
]
SPECIAL = ["</s>", "<s>", "<unk>", "<pad>", "<extra_id_0>", "<extra_id_7>", "<|endoftext|>", END]
ADDED = ["<|im_start|>", "<|im_end|>", "<think>", "[TOOL]", "<mask>"]
MESSAGES = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": " What's <b>1 + 1</b>? </s> 日本語 🙂\n"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And <|im_start|> doubled?"},
]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATS = {
    "turns": CHAT,
    "a system message set apart": (
        "{% if messages[0]['role'] == 'system' %}\n"
        "  {% set rest = messages[1:] %}\n"
        "  {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\n"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}\n"
        "{% for message in rest %}\n"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "{{ raise_exception('turns alternate') }}{% endif %}\n"
        "  {% if loop.first %}{{ bos_token }}{{ system }}{% endif %}\n"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}\n"
        "{%- else %}{{ ' ' ~ message['content'] ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "namespaces, loop controls, JSON, dates": (
        "{%- set seen = namespace(users=0) -%}{{ strftime_now('%Y') }}\n"
        "{%- for message in messages %}{% if message.role == 'assistant' %}{% continue %}{% endif %}\n"
        "{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}\n"
        "{{- message | tojson }}{{ {'b': [1, none], 'a': '<&>'} | tojson(indent=2) }}\n"
        "{%- if seen.users > 1 %}{% break %}{% endif %}{% endfor %}{{ seen.users }}"
        "{%- if tools is not none %}tools{% endif %}{% if documents is defined and documents %}documents{% endif %}"
    ),
    "what the assistant wrote": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
        "{{ pad_token is defined }}{{ unk_token }}"
    ),
}


def texts(count, seed=0):
    """`count` texts: runs of the atoms, special and added tokens among them; the first is empty."""
    draw = random.Random(seed)
    atoms = [*ATOMS, *SPECIAL, *ADDED]
    return ["", *("".join(draw.choices(atoms, k=draw.randint(1, 10))) for _ in range(count - 1))]


def write(directory, name, content):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def sentencepiece_model(kind, **changed):
    """A trained `.model`: of "llama", a BPE that falls back to bytes, or of "t5", a normalising unigram."""
    import sentencepiece

    settings = {
        "llama": dict(
            vocab_size=480,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
        ),
        "t5": dict(vocab_size=220, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    }[kind]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**settings, **changed},
    )
    return model.getvalue()


def llama(directory, model=None, **settings):
    write(directory, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings})
    (directory / "tokenizer.model").write_bytes(model or sentencepiece_model("llama"))


def llama_with_added_tokens(directory):
    listed = {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
    }
    model = sentencepiece_model("llama")
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    for index, content in enumerate(ADDED):
        flags = {"special": index % 2 == 0, "lstrip": content == "<mask>", "rstrip": content == "[TOOL]"}
        listed[str(size + index)] = {"content": content, "normalized": False, "single_word": False, **flags}
    for token in listed.values():
        token.update({key: token.get(key, False) for key in ("lstrip", "rstrip", "single_word", "normalized")})
    llama(directory, model, added_tokens_decoder=listed, legacy=True, add_eos_token=True, chat_template=CHAT)


def llama_of_old(directory):
    llama(directory, pad_token="<pad>", unk_token="<unk>", legacy=False)
    model = (directory / "tokenizer.model").read_bytes()
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    write(directory, "added_tokens.json", {"<pad>": size, "<think>": size + 1})
    write(directory, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})


def t5(directory, **settings):
    write(directory, "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, **settings})
    (directory / "spiece.model").write_bytes(sentencepiece_model("t5"))


def t5_with_few_sentinels(directory):
    t5(directory, extra_ids=10, clean_up_tokenization_spaces=True)


def byte_bpe(directory, **settings):
    """As Llama 3 and Qwen: byte-level, added tokens with every flag, BOS by a template, several EOS ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    library = Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    library.add_special_tokens(["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    library.add_tokens([AddedToken("<think>", normalized=False), AddedToken("[TOOL]", rstrip=True)])
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", library.token_to_id("<|begin|>"))]
    )
    library.enable_truncation(7)
    library.enable_padding(length=9, pad_token="<|im_end|>", pad_id=library.token_to_id("<|im_end|>"))
    write(directory, "tokenizer.json", library.to_str())
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    stated["pad_token"] = "<|im_end|>"
    write(directory, "tokenizer_config.json", {**stated, "chat_template": CHAT, **settings})
    ends = [library.token_to_id("<|im_end|>"), library.token_to_id("<|endoftext|>")]
    write(directory, "generation_config.json", {"eos_token_id": ends})


def byte_bpe_with_tokens_of_the_config(directory):
    """A pad token and others that only the config states, and a BOS that only it asks for."""
    byte_bpe(directory, pad_token="<pad>", extra_special_tokens=["<extra_id_7>"], add_bos_token=False)


def unigram(directory):
    """A `tokenizer.json` with a normalisation that changes texts, as T5's has, and its EOS around a prompt."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    library = Tokenizer(models.Unigram())
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    library.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    library.add_tokens(["<think>", "naïve"])
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    write(directory, "tokenizer.json", library.to_str())
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}
    write(directory, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def llama_as_json(directory, **settings):
    """As the `tokenizer.json` of many a Llama 1 or 2: a space before every stretch of text, bytes as fallback."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("llama"))
    ids = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    splits = [
        ((piece[:cut], piece[cut:]), -pieces.get_score(index))
        for piece, index in ids.items()
        for cut in range(1, len(piece))
        if not pieces.is_control(index) and not pieces.is_byte(index) and {piece[:cut], piece[cut:]} <= set(ids)
    ]
    merges = [pair for pair, _ in sorted(splits, key=lambda item: item[1])]
    library = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    write(directory, "tokenizer.json", library.to_str())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(directory, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings})


def gpt2_merges(directory):
    """As OPT: `vocab.json` and `merges.txt`, `</s>` before a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    directory.mkdir(parents=True, exist_ok=True)
    library.model.save(str(directory))
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    write(directory, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **named})


def trained(directory):
    train_byte_bpe(CORPUS, 320).save(directory)


KINDS = {
    maker.__name__: maker
    for maker in (
        *(trained, byte_bpe, byte_bpe_with_tokens_of_the_config, unigram, llama_as_json, gpt2_merges),
        *(llama, llama_with_added_tokens, llama_of_old, t5, t5_with_few_sentinels),
    )
}

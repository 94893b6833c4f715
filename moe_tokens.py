"""A GPT with mixture-of-experts blocks, and the text it learns from (2402.13089's side of the set).

The model is GPT-2's: pre-LN blocks, learned positions, tied embeddings. Every block that --moe-blocks names (default: all)
holds an MoE in place of its FFN. A group is one sequence, a token a token: x [B, T, D] is already [G, T, D].
The study's axes are flags: what is routed (--unit token or sequence), how often (--scope layer or global), to how many
(--top-k) and by what weights (--router-weights). A routing that lets the future in is refused, unless --allow-leak.

Text comes as documents with topics (the standard library of this Python, a folder, a file) or as nanoGPT's train.bin and
val.bin. train.py uses the same names here as in moe_vision.py.
"""
import collections
import colorsys
import html
import itertools
import json
import keyword
import math
import pathlib
import platform
import re
import sys
import sysconfig

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from routers import MoE, seeded

UNSCORED = -100  # label of a position that is not scored
UNIT, SPLITS = "sequences", ("validation",)  # what examples/s counts; the parts that are evaluated, the last one for the table
EXAMINED = "all"  # what experts specialise in is asked on both parts: a topic needs many documents to be told from chance
MORE_IS_BETTER = False  # of the number in the first of columns()
SIZES = {  # model and budget; every entry has a flag of its own
    "tiny": dict(dim=128, depth=4, heads=4, hidden=512, context=128, experts=8, steps=400, batch_size=16, lr=3e-3),
    "small": dict(dim=384, depth=6, heads=6, hidden=1536, context=256, experts=8, steps=5000, batch_size=64, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, context=1024, experts=4, steps=6000, batch_size=1024, grad_accum=64, lr=9.6e-4),
}
LOSSLESS = dict(capacity_factor="none")  # on text nobody is dropped, in training too
ROUTER_DEFAULTS = {  # where text differs from build_router's defaults; None: settle() or build_model() decides
    "token_choice": LOSSLESS | dict(balance="switch", renormalize=None),
    "sinkhorn_token_choice": LOSSLESS | dict(renormalize=None),
    "sparse_token_choice": LOSSLESS | dict(renormalize=None),
    "hash": LOSSLESS | dict(num_keys=None),
}


# ---------------------------------------------------------------- the model
class Block(nn.Module):
    """x + attention(norm(x)), then x + FFN or MoE(norm(x)); both steps keep [B, T, D]. run(moe, x) -> y and its Routing."""

    def __init__(self, dim, heads, feed):
        super().__init__()
        self.heads, self.feed = heads, feed
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, run):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, D/heads]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D))
        y, routing = run(self.feed, self.norm2(x)) if isinstance(self.feed, MoE) else (self.feed(self.norm2(x)), None)
        return x + y, routing


class GPT(nn.Module):
    """tokens [B, T] -> logits [B, T, V] and {block: Routing}; topic [B] is the key of topic routing.

    unit="sequence": a sequence is one wide token of T*D numbers, the B of them one group; it is routed by the mean of its
    first `prefix` positions (None: of all). scope="global": routed once, after the embeddings, for all blocks.
    """

    def __init__(self, vocab_size, context, dim, heads, feeds, unit="token", scope="layer", prefix=None, hash_key="token"):
        super().__init__()
        self.context, self.unit, self.scope, self.prefix, self.hash_key = context, unit, scope, prefix, hash_key
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.randn(context, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, feed) for feed in feeds)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.moes = [feed for feed in feeds if isinstance(feed, MoE)]  # in a plain list: they are registered with their blocks
        if scope == "global":
            for moe in self.moes:
                moe.router = self.moes[0].router

    def route(self, moe, x, key):
        """The Routing of x [B, T, D] with key [B, T]: B groups of tokens, or one group of B sequences."""
        if self.unit == "token":
            return moe.router(x, key)
        return moe.router(x[:, : self.prefix].mean(1)[None], key[None, :, 0])

    def forward(self, tokens, topic=None):
        B, T = tokens.shape
        x, routings = self.embed(tokens) + self.position[:T], {}
        key = topic[:, None].expand(B, T) if self.hash_key == "topic" else tokens
        shared = self.route(self.moes[0], F.layer_norm(x, x.shape[-1:]), key) if self.scope == "global" and self.moes else None

        def run(moe, z):
            routing = shared or self.route(moe, z, key)
            y, _ = moe(z if self.unit == "token" else z.reshape(1, B, -1), routing=routing)
            return y.view_as(z), routing

        for i, block in enumerate(self.blocks):
            x, routing = block(x, run)
            if routing is not None:
                routings[i] = routing
        return F.linear(self.norm(x), self.embed.weight), routings


def build_model(args, data, feed):
    """The GPT these flags describe; feed(block, tokens) gives each block its FFN or MoE. ValueError for what the data lacks or cannot fit."""
    if args.hash_key == "topic" and not data.topics:
        raise ValueError("--hash-key topic needs text in at least two topics: folders below --data, or the standard library")
    if args.router == "hash" and args.num_keys is None:
        args.num_keys = len(data.topics) if args.hash_key == "topic" else data.vocab_size
    feeds = [feed(block, args.context) for block in range(args.depth)]
    prefix = args.prefix if args.pool == "prefix" else None
    return GPT(data.vocab_size, args.context, args.dim, args.heads, feeds, args.unit, args.scope, prefix, args.hash_key)


def moe_blocks(depth):
    """every block (as in the study)"""
    return list(range(depth))


def settle(args, router):
    """Fill in what follows from other flags; returns a remark that labels every result: "", "leaky" or "topic oracle".

    router is one as the model will hold, None for dense. Raises ValueError for axes that clash, and for a leak not allowed.
    """
    wide = args.unit == "sequence"
    if router is None and (wide or args.scope == "global"):
        raise ValueError("--unit sequence and --scope global are for routers; --router dense has none")
    if not wide and (args.pool or args.prefix):
        raise ValueError("--pool and --prefix are for --unit sequence")
    if args.hash_key and args.router != "hash":
        raise ValueError(f"--hash-key is for --router hash, not {args.router}")
    if wide and torch.distributed.is_initialized():
        raise ValueError("--unit sequence routes the whole batch as one group; it runs in one process")
    if wide and (router.chooses != "tokens" or not router.causal or router.options.capacity_factor is not None):
        raise ValueError(f"--unit sequence needs a dropless router that judges each sequence alone, not {args.router} with these options: "
                         "one sequence would take another's place")
    if args.renormalize is None and hasattr(getattr(router, "options", None), "renormalize"):
        args.renormalize = args.top_k > 1
    args.hash_key, args.pool, args.prefix = args.hash_key or "token", args.pool or "prefix", args.prefix or 16
    pools = wide and args.router != "hash"  # hash reads the first token, or the topic
    args.score_from = args.score_from or (args.prefix if pools and args.pool == "prefix" else 1)
    for name, used in (("prefix", pools and args.pool == "prefix"), ("score_from", True)):
        if used and getattr(args, name) > args.context:
            raise ValueError(f"--{name.replace('_', '-')} must be at most --context {args.context}, got {getattr(args, name)}")
    why = None
    if router is not None and not router.causal:
        why = f"--router {args.router} is not causal with these options: what a token gets depends on later tokens"
    elif pools and args.pool == "mean":
        why = "--pool mean routes a sequence by all its tokens, later ones too; --pool prefix does not"
    elif pools and args.score_from < args.prefix:
        why = f"--score-from {args.score_from} scores tokens whose routing has read on to position {args.prefix}"
    if why and not args.allow_leak:
        raise ValueError(f"{why}. That flatters the loss on text; --allow-leak runs it all the same, every number labelled leaky")
    return "leaky" if why else "topic oracle" if args.hash_key == "topic" else ""


def ignored(setting):
    """Flags of this file without meaning beside the others of {flag: value}: a grid drops them."""
    if setting.get("--router") == "dense":
        return {"--unit", "--scope", "--pool", "--prefix", "--hash-key", "--allow-leak"}
    if setting.get("--router") == "hash":
        return {"--pool", "--prefix"}
    return {"--hash-key"} if setting.get("--unit") == "sequence" else {"--hash-key", "--pool", "--prefix"}


def loss(model, batch):
    """Cross-entropy on the positions that are scored, counts {name: sum over the batch} for metrics, and the routings."""
    logits, routings = model(batch["input"], batch.get("topic"))
    counts = {"count": (batch["label"] >= 0).sum()} | ({"bytes": batch["bytes"].sum()} if "bytes" in batch else {})
    return F.cross_entropy(logits.flatten(0, 1), batch["label"].flatten(), ignore_index=UNSCORED), counts, routings


def metrics(sums):
    """What is reported, from summed counts and the summed loss in nats: per token, and per byte, which tokenizers share."""
    mean = sums["loss"] / sums["count"]
    per_byte = {"bits_per_byte": sums["loss"] / sums["bytes"] / math.log(2)} if "bytes" in sums else {}
    return {"loss": mean, "perplexity": mean.exp() if isinstance(mean, torch.Tensor) else math.exp(min(mean, 700))} | per_byte


def columns(summary):
    """The table's columns that are this task's own, {name: number or None}; the first one decides."""
    number = lambda part: summary.get(part, {}).get("bits_per_byte")
    leak = number("as_generated") - number("as_scored") if number("as_generated") else None  # what seeing the future was worth
    return {"bits/byte": number("validation"), "dropless": number("validation_dropless"), "as generated": leak and number("validation") + leak,
            "perplexity": summary["validation"]["perplexity"], "vocabulary": summary["vocab_size"],
            "bytes/token": summary.get("bytes_per_token")}


# ---------------------------------------------------------------- the tokenizer
LEXEME = re.compile(rb"[\r\n]+[ \t]*| ?[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*| ?[0-9]+| ?([^\w\s])\1*|[ \t]+|.", re.DOTALL)


class Tokenizer:
    """Bytes to token ids and back, without loss: 0-255 the bytes, from 256 on the commonest lexemes of the training part.

    A lexeme is a word, a number or a run of one mark, each with its leading blank, a run of blanks, or line ends with the
    indent after them. One that the vocabulary lacks is cut into its longest known beginnings, at worst into bytes.
    """

    def __init__(self, lexemes):
        self.pieces = [bytes([i]) for i in range(256)] + list(lexemes)
        self.ids = {lexeme: 256 + i for i, lexeme in enumerate(lexemes)}
        self.longest = max(map(len, lexemes), default=1)
        self.cut = {}  # what was cut before

    @classmethod
    def learn(cls, texts, vocab_size):
        """The vocab_size - 256 lexemes that cover the most bytes of these texts; fewer if there are fewer."""
        counts = collections.Counter(match.group() for text in texts for match in LEXEME.finditer(text))
        ranked = sorted(counts, key=lambda lexeme: (-counts[lexeme] * len(lexeme), lexeme))
        return cls(ranked[: vocab_size - 256])

    def encode(self, text):
        """bytes -> array [N] of ids."""
        return np.array([i for match in LEXEME.finditer(text) for i in self.lexeme(match.group())], np.int32)

    def lexeme(self, lexeme):
        if lexeme in self.ids:
            return (self.ids[lexeme],)
        if lexeme not in self.cut:
            ids, start = [], 0
            while start < len(lexeme):
                ends = range(min(len(lexeme), start + self.longest), start + 1, -1)
                end = next((end for end in ends if lexeme[start:end] in self.ids), start + 1)
                ids.append(self.ids[lexeme[start:end]] if end > start + 1 else lexeme[start])
                start = end
            self.cut[lexeme] = ids
        return self.cut[lexeme]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids)

    @classmethod
    def read(cls, path):
        """The tokenizer that a run saved, lexemes with a character for each byte. Raises ValueError for another file."""
        try:
            lexemes = [lexeme.encode("latin-1") for lexeme in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} holds no tokenizer: {error}") from None
        if b"" in lexemes or len(set(lexemes)) < len(lexemes):
            raise ValueError(f"{path} holds no tokenizer: an empty lexeme, or one that stands twice")
        return cls(lexemes)


# ---------------------------------------------------------------- what a token is: the first pattern that fits its spelling
CODE = {"newline and indent": r"[\r\n]", "blank": r"\s+$", "keyword": rf" ?({'|'.join(keyword.kwlist)})$", "number": r" ?\d",
        "name": r" ?[^\W\d]", "bracket": r" ?[][(){}]", "string or comment mark": r""" ?["'#]""", "operator": r".", "raw byte": ""}
FUNCTION_WORDS = """a an the this that these those and or but if not as than of to in on at by for with from into is are was were be been has have
    had will would can could may must i you he she it we they him her us them my your his its our their who which what when where there
    der die das den dem des ein eine einen einer und oder nicht wenn dass daß auf aus bei mit nach von vor zu zum zur im ist sind wird werden
    kann sich es er sie auch für le la les un une du au aux et ou ne pas que qui ce cette est sont il elle dans par pour sur avec sans se son
    sa ses si lo gli uno una di della del dei delle da dal con per non che è sono questo ed come al alla nel nella""".split()
PROSE = {"blank": r"\s+$", "function word": rf"(?i) ?({'|'.join(FUNCTION_WORDS)})$", "other word": r" ?[^\W\d]", "number": r" ?\d",
         "punctuation": r".", "raw byte": ""}


def token_class(token, piece, classes):
    """The place in CODE or PROSE of a token, by its spelling alone; ids below 256 are raw bytes."""
    spelling = "" if token < 256 else piece.decode("utf-8", "replace").replace("\ufffd", "x")  # a cut character counts as a letter
    return next(i for i, pattern in enumerate(classes.values()) if re.match(pattern, spelling))


# ---------------------------------------------------------------- text
def read_documents(path, replace=False):
    """(topic, name, bytes) of every text: topics are the first-level subfolders of a folder; None: the standard library.

    Of the library without tests, topics are the top-level packages and modules. Raises ValueError for a path without
    text, and for bytes that are no UTF-8, unless `replace` makes them U+FFFD.
    """
    root, documents = pathlib.Path(path or sysconfig.get_paths()["stdlib"]), []
    without = set() if path else {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    inside = [file.relative_to(root) for file in sorted(root.rglob("*" if path else "*.py")) if file.is_file()]
    for name in [pathlib.Path()] if root.is_file() else inside:
        if any(part.startswith(".") or part in without for part in name.parts):
            continue
        raw = (root / name).read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            if not replace:
                raise ValueError(f"{root / name} is not UTF-8 at byte {error.start}; --replace-undecodable reads it all the same") from None
            raw = raw.decode("utf-8", "replace").encode()
        documents.append((name.parts[0].removesuffix(".py") if len(name.parts) > 1 or not path else "", str(name), raw))
    if not any(raw for _, _, raw in documents):
        raise ValueError(f"{path} {'holds no text' if root.exists() else 'does not exist'}")
    return documents


def divide(documents):
    """Training and validation documents: a tenth of each topic, at least one where it has two; of one document, its end."""
    if len(documents) == 1:
        (topic, name, raw), cut = documents[0], len(documents[0][2]) * 9 // 10
        while cut < len(raw) and raw[cut] & 0xC0 == 0x80:
            cut += 1  # not inside a character
        return [(topic, name, raw[:cut])], [(topic, name, raw[cut:])]
    sizes, groups, parts = collections.Counter(topic for topic, _, _ in documents), collections.defaultdict(list), ([], [])
    for document in sorted(documents, key=lambda d: seeded("validation split", d[1]).initial_seed()):  # an order of no meaning
        groups[document[0] if sizes[document[0]] > 1 else None].append(document)  # None: topics of a single document
    for group in groups.values():
        tenth = max(1, round(len(group) / 10)) if len(group) > 1 else 0
        parts[0].extend(group[tenth:])
        parts[1].extend(group[:tenth])
    return parts


class Text:
    """Blocks of `context` tokens that never cross documents, or windows of nanoGPT's train.bin and val.bin, which may.

    A part is tokens [N] and the first of each block [blocks], then each block's document and topic (none in .bin files).
    """

    def __init__(self, args, device):
        self.seed, self.batch_size, self.device = args.seed, args.batch_size, device
        self.context, self.score_from = args.context, args.score_from
        self.parts, self.topics, self.tokenizer, self.facts = {}, [], None, {}
        path = pathlib.Path(args.data or "")
        if args.data and ((path / "train.bin").exists() or (path / "val.bin").exists()):
            self.vocab_size = args.vocab_size or 50304
            self.about = f"{path.name}: nanoGPT's format, vocabulary of {self.vocab_size}"
            for part, file in (("train", path / "train.bin"), ("validation", path / "val.bin")):
                self.parts[part] = self.read_bin(file)
        else:
            self.read_text(args)
        counts = {part: len(starts) for part, (_, starts, *_) in self.parts.items()}
        for part, count in counts.items():
            if not count:
                raise ValueError(f"{self.about}: the {part} part is shorter than one block of {self.context + 1} tokens")
        if self.batch_size > counts["train"]:
            raise ValueError(f"--batch-size {self.batch_size} is larger than the data: {counts['train']} training blocks")
        held = counts["validation"]
        self.scored = np.linspace(0, held - 1, min(held, 1024)).astype(int)  # of a longer part, evenly spread
        self.about += f"; {counts['train']} training blocks of {self.context} tokens, {len(self.scored)} of {held} validation blocks"

    def read_bin(self, file):
        size = file.stat().st_size if file.is_file() else 0
        if size < 2 or size % 2:
            raise ValueError(f"{file} must hold tokens of two bytes each, got {size} bytes")
        tokens = np.memmap(file, np.uint16, "r")
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{file} holds token {tokens.max()}, beyond --vocab-size {self.vocab_size}")
        return tokens, np.arange(0, len(tokens) - self.context, self.context)

    def read_text(self, args):
        documents = read_documents(args.data, args.replace_undecodable)
        topics = sorted({topic for topic, _, _ in documents})
        parts = dict(zip(("train", "validation"), divide([d for d in documents if len(d[2]) > self.context] or documents)))
        saved = getattr(args, "run", None)  # a finished run's numbers are those of its own tokenizer
        learned = lambda: Tokenizer.learn((raw for _, _, raw in parts["train"]), args.vocab_size or 4096)
        self.tokenizer = Tokenizer.read(saved / "tokenizer.json") if saved else learned()
        pieces, used, first = self.tokenizer.pieces, 0, 0
        self.vocab_size, length = len(pieces), np.array([len(piece) for piece in pieces])
        for part, chosen in parts.items():
            tokens = [self.tokenizer.encode(raw) for _, _, raw in chosen]
            blocks = np.array([max(0, len(ids) - 1) // self.context for ids in tokens])
            document, ends = np.repeat(np.arange(len(chosen)), blocks), np.cumsum([len(ids) for ids in tokens])
            place = np.arange(len(document)) - np.repeat(np.cumsum(blocks) - blocks, blocks)  # a block's number within its document
            starts = (ends - [len(ids) for ids in tokens])[document] + self.context * place
            self.parts[part] = np.concatenate(tokens), starts, document + first, np.array([topics.index(d[0]) for d in chosen])[document]
            first += len(chosen)
            used += sum(length[ids[: count * self.context]].sum() for ids, count in zip(tokens, blocks))
        self.bytes_of, self.topics = torch.from_numpy(length), topics if len(topics) > 1 else []
        documents_of = collections.Counter(dict(zip(*(np.concatenate([self.parts[part][i] for part in parts]) for i in (2, 3)))).values())
        common = np.array(sorted(documents_of, key=lambda topic: (-documents_of[topic], topic))[:10])  # by documents with a block
        self.rank = torch.full((len(topics),), -1).scatter(0, torch.tensor(common), torch.arange(len(common)))
        self.common = [topics[topic] for topic in common]
        self.classes = CODE if all(name.endswith(".py") for _, name, _ in documents) else PROSE
        self.class_of = torch.tensor([token_class(i, piece, self.classes) for i, piece in enumerate(pieces)])
        size = sum(len(raw) for _, _, raw in documents)
        self.facts = {"bytes_per_token": float(length[self.parts["validation"][0]].mean())}
        name = pathlib.Path(args.data).name if args.data else f"standard library of Python {platform.python_version()}"
        self.about = (f"{name}: {len(documents)} documents, {len(topics)} topics, {size / 1e6:.1f} MB ({100 - 100 * used / size:.1f} % left out: "
                      f"tails and short documents), vocabulary of {self.vocab_size}, {self.facts['bytes_per_token']:.2f} bytes a token")

    def ready(self, part, rows):
        tokens, starts, *of = self.parts[part]
        block = torch.from_numpy(tokens[starts[rows][:, None] + np.arange(self.context + 1)].astype(np.int64))
        label = block[:, 1:].clone()
        label[:, : self.score_from - 1] = UNSCORED
        batch = {"input": block[:, :-1], "label": label} | {name: torch.from_numpy(z[rows]) for name, z in zip(("document", "topic"), of)}
        if self.tokenizer:
            batch["bytes"] = self.bytes_of[label.clamp(min=0)] * (label >= 0)
        return {name: value.to(self.device) for name, value in batch.items()}

    def batch(self, step, part=slice(None)):
        """Epoch by epoch in a fresh order."""
        count, place = len(self.parts["train"][1]), np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        order = {epoch: torch.randperm(count, generator=seeded(self.seed, "epoch", int(epoch))).numpy() for epoch in np.unique(place // count)}
        return self.ready("train", np.array([order[p // count][p % count] for p in place])[part])

    def split(self, name):
        """The validation blocks that are scored, or ("all") up to 4096 blocks evenly spread over all documents; in batches."""
        size, chosen = max(1, 8192 // self.context), [("validation", self.scored)]
        if name == "all":
            counts = {part: len(self.parts[part][1]) for part in self.parts}
            share = min(1, 4096 / sum(counts.values()))
            chosen = [(part, np.linspace(0, count - 1, math.ceil(share * count)).astype(int)) for part, count in counts.items()]
        return (self.ready(part, rows[i : i + size]) for part, rows in chosen for i in range(0, len(rows), size))


def load_data(args, device):
    """The text these flags name. Raises ValueError for text that is missing, broken or too short."""
    return Text(args, device)


def files(data):
    """What a run folder keeps of its data, {file name: content}."""
    return {"tokenizer.json": [lexeme.decode("latin-1") for lexeme in data.tokenizer.pieces[256:]]} if data.tokenizer else {}


# ---------------------------------------------------------------- what experts specialise in
def labels(batch, data, start):
    """{name: (label [B, T], -1 for none; unit [B, T] on which it is constant, None where no NMI is wanted; the labels' names)}.

    `start` blocks came before this batch.
    """
    if data.tokenizer is None:
        return {}
    tokens, wide = batch["input"].cpu(), lambda of_block: of_block.cpu()[:, None].expand(batch["input"].shape)
    each = start * data.context + torch.arange(tokens.numel()).view_as(tokens)
    found = {"token": (tokens, None, data.tokenizer.pieces), "token class": (data.class_of[tokens], each, list(data.classes))}
    return found | ({"topic": (data.rank[wide(batch["topic"])], wide(batch["document"]), data.common)} if data.topics else {})


def painted(tokens, experts, count, pieces, paint):
    """Text in which stretches of one expert [N] stand on its colour: paint(text, red, green, blue)."""
    text = []
    for expert, stretch in itertools.groupby(zip(tokens, experts), key=lambda pair: pair[1]):
        rgb = [round(255 * part) for part in colorsys.hls_to_rgb(expert / count, 0.8, 0.8)]
        text.append(paint(b"".join(pieces[token] for token, _ in stretch).decode("utf-8", "replace"), *rgb))
    return "".join(text)


def on_terminal(text, *rgb):
    paint = "\x1b[30;48;2;{};{};{}m".format(*rgb)
    return paint + text.replace("\n", "\x1b[0m\n" + paint) + "\x1b[0m"


def on_page(text, *rgb):
    return f'<span style="background:rgb{rgb}">{html.escape(text)}</span>'


@torch.no_grad()
def show(model, data, joints, folder=None):
    """Print each expert's commonest tokens and, on a terminal, validation text coloured by expert; write it to sample.html."""
    if not joints:
        return
    pieces, batch = data.tokenizer.pieces, data.ready("validation", data.scored[:: max(1, len(data.scored) // 3)][:3])
    tokens, page = batch["input"], ["<!doctype html><meta charset=utf-8><title>Text coloured by expert</title>"]
    for block, routing in loss(model, batch)[2].items():
        mass, experts = joints[block]["token"][0], routing.mass().argmax(-1).view(len(tokens), -1).expand(tokens.shape)
        for expert, share in enumerate(mass.T):
            common = [pieces[i].decode("utf-8", "replace") for i in share.topk(12).indices if share[i] > 0]
            print(f"block {block}, expert {expert}:", *(repr(piece)[1:-1] for piece in common))
        stretch = tokens.flatten().tolist(), experts.flatten().tolist(), mass.shape[1], pieces
        legend = painted([0] * mass.shape[1], range(mass.shape[1]), mass.shape[1], [b" expert "], on_page)
        page.append(f"<h2>block {block}</h2><p>{legend}</p><pre>{painted(*stretch, on_page)}</pre>")
    if sys.stdout.isatty():
        print(f"validation text, coloured by the expert of block {block}:", painted(*stretch, on_terminal), sep="\n")
    if folder:
        (folder / "sample.html").write_text("\n".join(page))


@torch.no_grad()
def report(args, model, data, fresh):
    """Facts of the text; and of a leaky model, on 32 blocks, figures "as scored", all at once, and "as generated": each token
    predicted with nothing after it there, as when the model writes."""
    facts = data.facts | {"vocab_size": data.vocab_size}
    if args.remark != "leaky":
        return facts
    batch = data.ready("validation", data.scored[:: max(1, len(data.scored) // 32)][:32])
    scored, counts, _ = loss(model, batch)
    generated = 0.0
    for end in range(args.score_from, args.context + 1):
        logits, _ = model(batch["input"][:, :end], batch.get("topic"))
        generated += F.cross_entropy(logits[:, -1], batch["label"][:, end - 1], reduction="sum")
    told = lambda total: {name: float(value) for name, value in metrics(counts | {"loss": total}).items()}
    return facts | {"as_scored": told(scored * counts["count"]), "as_generated": told(generated)}


# ---------------------------------------------------------------- sampling
@torch.no_grad()
def generate(model, tokens, count, temperature=1.0, top_p=1.0, seed=0):
    """`count` more tokens after `tokens` (a list): drawn from the likeliest that hold top_p of the probability; 0 = greedy."""
    for step in range(count):
        logits, _ = model(torch.tensor([tokens[-model.context :]], device=model.position.device))
        chance, order = (logits[0, -1].float().cpu() / max(temperature, 1e-6)).softmax(-1).sort(descending=True, stable=True)
        chance[chance.cumsum(0) - chance >= top_p] = 0  # the first is always kept
        tokens = tokens + [int(order[0 if temperature == 0 else chance.multinomial(1, generator=seeded(seed, "sample", step))])]
    return tokens


def sample(args, model, tokenizer, saved):
    """The text that --sample prints: prompt and continuation, coloured by expert on a terminal. ValueError for what it can't."""
    prompt = tokenizer.encode(args.prompt.encode()).tolist()
    if not prompt:
        raise ValueError("--prompt is empty; sampling needs something to go on from")
    if saved.hash_key == "topic":
        raise ValueError("this run routes by topic, and a prompt has none")
    if saved.unit == "sequence" and saved.router != "hash" and saved.pool == "mean":
        raise ValueError("this run routes by the mean of a whole sequence, which is not there before it is written")
    if saved.unit == "sequence" and saved.router != "hash" and len(prompt) < saved.prefix:
        raise ValueError(f"this run routes by the first {saved.prefix} tokens; --prompt has only {len(prompt)}")
    tokens = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed)
    routings = model(torch.tensor([tokens[-model.context :]], device=model.position.device))[1] if sys.stdout.isatty() else {}
    if not routings:
        return tokenizer.decode(tokens).decode("utf-8", "replace")
    mass, shown = list(routings.values())[-1].mass(), tokens[-model.context :]
    return painted(shown, mass[0].argmax(-1).expand(len(shown)).tolist(), mass.shape[-1], tokenizer.pieces, on_terminal)


def add_flags(parser, kinds):
    text = parser.add_argument_group("text")
    text.add_argument("--data", help="a UTF-8 file, a folder of topics, or nanoGPT's train.bin and val.bin; none: the standard library")
    text.add_argument("--replace-undecodable", action="store_true", help="read bytes that are no UTF-8 as U+FFFD")
    text.add_argument("--vocab-size", type=kinds.whole, help="tokens at most; none: 4096, for .bin files 50304")
    text.add_argument("--context", type=kinds.whole, help="tokens in a block")
    text.add_argument("--score-from", type=kinds.whole, help="first position that is trained and scored; none: 1, or --prefix where that routes")
    axes = parser.add_argument_group("axes of the study")
    axes.add_argument("--unit", choices=("token", "sequence"), default="token", help="what is routed")
    axes.add_argument("--pool", choices=("prefix", "mean"), help="route a sequence by the mean of its first tokens (none: this) or of all")
    axes.add_argument("--prefix", type=kinds.whole, help="tokens in that prefix; none: 16")
    axes.add_argument("--scope", choices=("layer", "global"), default="layer", help="routed in every block, or once after the embeddings")
    axes.add_argument("--hash-key", choices=("token", "topic"), help="--router hash goes by the token (none: this) or by the topic, an oracle")
    axes.add_argument("--allow-leak", action="store_true", help="run a routing that sees the future; its numbers are labelled leaky")
    drawn = parser.add_argument_group("sampling, with --sample")
    drawn.add_argument("--prompt", default="", help="text to go on from")
    drawn.add_argument("--temperature", type=kinds.at_least_0, default=0.8, help="0: always the likeliest token")
    drawn.add_argument("--top-p", type=kinds.positive, default=0.95, help="draw from the likeliest tokens that hold this much probability")
    drawn.add_argument("--max-new-tokens", type=kinds.whole, default=200, help="tokens to write")

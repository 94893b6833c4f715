"""A GPT with mixture-of-experts blocks, as studied in 2402.13089, and the text it learns from.

The model is GPT-2's: pre-LN blocks, learned positions, tied embeddings. Every block that
--moe-blocks names (default: all) holds an MoE in place of its FFN. A group is a sequence: x
[B, T, D] is already [G, T, D]. The axes of the study are settings: what is routed (--unit), how
often (--scope), to how many experts (--top-k), by what weights (--router-weights). A routing that
lets the future in is refused, unless --allow-leak.

Text comes as documents with topics (the standard library of this Python, a folder, a file) or as
nanoGPT's train.bin and val.bin. Block, GPT and Text have their twins in moe_vision.py: read the two
files side by side.
"""

import collections
import html
import json
import keyword
import math
import pathlib
import platform
import re
import sysconfig

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from routers import MoE, color, rows_of_step, seeded, send

UNIT = "sequences"  # speed is told in these per second
SPLITS = ("validation",)  # what is evaluated; the last one is for the table
EXAMINED = "all"  # the split on which experts are examined: topics need many documents
MORE_IS_BETTER = False  # is a larger number better in the first of columns()?
POSITION_STD = 0.02  # deviation of positions and embeddings at the start, as in GPT-2
UNSCORED = -100  # the label of a position that is not scored

SIZES = {  # the model, then its budget; each entry is a setting of its own
    "tiny": dict(dim=64, depth=4, heads=4, hidden=64, context=64, experts=8, vocab_size=1024,
                 steps=1200, batch_size=64, lr=5e-3),
    "small": dict(dim=384, depth=6, heads=6, hidden=1536, context=256, experts=8, vocab_size=4096,
                  steps=5000, batch_size=64, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, context=1024, experts=4, vocab_size=4096,
                 steps=6000, batch_size=1024, grad_accum=64, lr=9.6e-4),
}  # fmt: skip

SETTINGS = {  # as in train.py: name: (kind, default, what it is)
    "vocab_size": ("whole", None, "tokens at most, 256 bytes among them; .bin: all they hold"),
    "context": ("whole", None, "tokens in a sequence"),
    "score_from": ("whole", None, "first position that is scored; by default 1, or as --prefix"),
    "replace_undecodable": (bool, False, "read bytes that are no UTF-8 as U+FFFD"),
    "unit": (("token", "sequence"), "token", "what is routed"),
    "pool": (("prefix", "mean"), None, "route a sequence by its first tokens (default), or by all"),
    "prefix": ("whole", None, "how many first tokens; by default 16"),
    "scope": (("layer", "global"), "layer", "routed in every block, or once after the embeddings"),
    "hash_key": (("token", "topic"), None, "hash by token (default), or by topic, an oracle"),
    "allow_leak": (bool, False, "run a routing that sees the future; results are labelled leaky"),
}


# ---------------------------------------------------------------- the model
class Block(nn.Module):
    """x + attend(x), then x + feed(norm2(x)). No forward(): the model runs both steps."""

    def __init__(self, dim, heads, feed):
        super().__init__()
        self.heads, self.feed = heads, feed
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def attend(self, x):
        """x [B, T, D] -> what attention adds to it."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class GPT(nn.Module):
    """tokens [B, T], topic [B] or None -> logits [B, T, V] and {block: Routing}.

    unit="sequence": the batch is one group, each sequence one token in it, T*D wide, which an
    expert takes as T vectors of D. A sequence is routed by the mean of its first `prefix`
    positions, or of all if None. scope="global": one routing, made after the embeddings, serves
    all blocks. hash_key="topic": hash goes by topic.
    """

    def __init__(self, vocab_size, context, dim, heads, feeds, unit, scope, prefix, hash_key):
        super().__init__()
        self.context, self.unit, self.scope = context, unit, scope
        self.prefix, self.hash_key = prefix, hash_key
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.randn(context, dim) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(dim, heads, feed) for feed in feeds)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embed.weight, std=POSITION_STD)
        if scope == "global":
            for moe in self.moes():
                moe.router = self.moes()[0].router

    def forward(self, tokens, topic=None):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        key = tokens if self.hash_key == "token" else topic[:, None].expand_as(tokens)
        given = None  # or the one Routing of all blocks, made before any block's own norm
        if self.scope == "global":
            given = self.route(self.moes()[0], F.layer_norm(x, x.shape[-1:]), key)
        routings = {}
        for i, block in enumerate(self.blocks):
            x = x + block.attend(x)
            y, routing = self.feed_step(block, x, key, given)
            x = x + y
            if routing is not None:
                routings[i] = routing
        return F.linear(self.norm(x), self.embed.weight), routings

    def feed_step(self, block, x, key, given):
        """What the block's FFN or MoE adds to x [B, T, D], and its Routing; an FFN has none."""
        z = block.norm2(x)
        if not isinstance(block.feed, MoE):
            return block.feed(z), None
        routing = given
        if routing is None:
            routing = self.route(block.feed, z, key)
        if self.unit == "sequence":
            z = z.flatten(1)[None]  # [1, B, T * D]
        y, _ = block.feed(z, routing=routing)
        return y.view_as(x), routing

    def route(self, moe, x, key):
        """The Routing of x [B, T, D], key [B, T]: B groups of tokens, or one of B sequences."""
        if self.unit == "token":
            return moe.router(x, key)
        pooled = x[:, : self.prefix].mean(1)  # [B, D]
        return moe.router(pooled[None], key[None, :, 0])  # hash goes by a sequence's first key

    def moes(self):
        return [block.feed for block in self.blocks if isinstance(block.feed, MoE)]


def moe_blocks(depth):
    """every block (as in the study)"""
    return list(range(depth))


def settle(settings, router, said):
    """Fill in what follows from other settings; ValueError where they clash, or for a leak.

    router: as the model will hold it, or None for dense. said: {setting: value}, the user's words.
    Returns the remark beside every result: "", "leaky" or "topic oracle".
    """
    s = settings
    if s.unit == "sequence" and torch.distributed.is_initialized():
        raise ValueError("--unit sequence routes the batch as one group; it runs in one process")
    if s.unit == "sequence":
        alone = router.chooses == "tokens" and router.causal
        if not alone or router.capacity(1) is not None:
            rule = "--unit sequence needs a dropless router that judges each sequence alone"
            why = "one sequence would take another's place"
            raise ValueError(f"{rule}, not {s.router} with these options: {why}")
    if "renormalize" not in said and hasattr(s, "renormalize"):
        s.renormalize = s.top_k > 1  # as the study most likely did
    if "vocab_size" not in said and holds_bins(s.data):
        s.vocab_size = None  # as many as the files hold
    s.hash_key = s.hash_key or "token"
    s.pool = s.pool or "prefix"
    s.prefix = s.prefix or 16
    # A sequence's router reads its first `seen` tokens; these, or at least the first, go unscored.
    seen = s.prefix if reads_sequences(s) and s.pool == "prefix" else 1
    s.score_from = s.score_from or seen
    for flag, value in ("--prefix", seen), ("--score-from", s.score_from):
        if value > s.context:
            raise ValueError(f"{flag} must be at most --context {s.context}, got {value}")
    why = leak(s, router)
    if why and not s.allow_leak:
        rule = "That flatters the loss on text; --allow-leak runs it all the same"
        raise ValueError(f"{why}. {rule}, every number labelled leaky")
    if why:
        return "leaky"
    return "topic oracle" if s.hash_key == "topic" else ""


def reads_sequences(settings):
    """Does the routing read several tokens of a sequence? Hash reads its first key alone."""
    return settings.unit == "sequence" and settings.router not in ("hash", "dense")


def leak(settings, router):
    """Why the routing of a token depends on later ones; "" if it does not."""
    s = settings
    if router is not None and not router.causal:
        rule = "is not causal with these options (token_choice is, by default)"
        return f"--router {s.router} {rule}: what a token gets depends on later tokens"
    if reads_sequences(s) and s.pool == "mean":
        return "--pool mean routes a sequence by later tokens too; --pool prefix does not"
    if reads_sequences(s) and s.score_from < s.prefix:
        rule = f"tokens that the routing, by the first {s.prefix}, has seen"
        return f"--score-from {s.score_from} scores {rule}"
    return ""


def unused(settings):
    """{setting: why it has no effect beside the others}."""
    found = {}
    if settings.router == "dense":
        why = "--unit sequence and --scope global are for routers; --router dense has none"
        found["unit"] = found["scope"] = why
    if settings.router != "hash":
        found["hash_key"] = f"--hash-key is for --router hash, not {settings.router}"
    if not reads_sequences(settings):
        why = "--pool and --prefix are for --unit sequence and a router that reads tokens"
        found["pool"] = found["prefix"] = why
    elif settings.pool == "mean":
        found["prefix"] = "--prefix is for --pool prefix, not mean"
    if holds_bins(settings.data):
        found["replace_undecodable"] = "--replace-undecodable is for text; .bin files hold tokens"
    return found


# ---------------------------------------------------------------- what train.py asks of text
class Text:
    """Windows of `context` tokens, each within one document; or of nanoGPT's .bin files.

    Reading sets about, vocab_size and parts[name]: tokens [N] and where each window starts
    [windows], of documents also each window's document and topic. Of documents it also sets

    tokenizer, bytes_of  its pieces of text, and the bytes in each; .bin files have None
    topics, topic_names  all topics (none if there is one alone), and the names of the ten largest
    label_of_topic       topic -> its place in topic_names, or -1
    classes, class_of    CODE or PROSE, and the class of each token

    A batch is {"input": [B, T], "label": [B, T]}, of documents also
    "document" [B], "topic" [B] and "bytes" [B, T], how many bytes each label spells. batch(step,
    part) gives the slice `part` of the step's batch, the same for every run of one seed;
    split(name) the batches of a part.
    """

    def __init__(self, settings, device, folder=None):
        """folder: the run whose tokenizer is used; None: a new one is learned."""
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.context = self.tokens = settings.context
        self.score_from, self.device = settings.score_from, torch.device(device)
        self.parts, self.topics, self.tokenizer, self.facts = {}, [], None, {}
        if holds_bins(settings.data):
            self.read_bins(pathlib.Path(settings.data), settings.vocab_size)
        else:
            self.read_text(settings, folder)
        self.sizes = {part: len(starts) for part, (_, starts, *_) in self.parts.items()}
        for part, count in self.sizes.items():
            if not count:
                rule = f"shorter than one window of {self.context + 1} tokens"
                raise ValueError(f"{self.about}: the {part} part is {rule}")
        train, held = self.sizes["train"], self.sizes["validation"]
        if self.batch_size > train:
            larger = f"--batch-size {self.batch_size} is larger than the data"
            raise ValueError(f"{larger}: {train} training windows")
        self.scored = np.linspace(0, held - 1, min(held, 1024)).astype(int)  # evenly spread
        spread = f"{len(self.scored)} of {held} validation windows"
        self.about += f"; {train} training windows of {self.context} tokens, {spread}"

    def build(self, settings, make_feed):
        """The GPT; make_feed(block) gives each block its FFN or MoE."""
        s, V = settings, self.vocab_size
        if s.hash_key == "topic" and not self.topics:
            where = "folders below --data, or the standard library"
            raise ValueError(f"--hash-key topic needs text in at least two topics: {where}")
        if s.router == "hash" and s.num_keys is None:
            s.num_keys = len(self.topics) if s.hash_key == "topic" else V  # for make_feed
        feeds = [make_feed(block) for block in range(s.depth)]
        prefix = s.prefix if s.pool == "prefix" else None
        return GPT(V, s.context, s.dim, s.heads, feeds, s.unit, s.scope, prefix, s.hash_key)

    def batch(self, step, part=slice(None)):
        """Training windows, epoch by epoch in a fresh order."""
        rows = rows_of_step(self.seed, step, self.batch_size, self.sizes["train"])
        return self.ready("train", rows[part].numpy())

    def split(self, name):
        """The validation windows that are scored; or "all", up to 4096 windows of all documents."""
        chosen = {"validation": self.scored}
        if name == "all":
            share = min(1, 4096 / sum(self.sizes.values()))
            chosen = {}
            for part, count in self.sizes.items():
                chosen[part] = np.linspace(0, count - 1, math.ceil(share * count)).astype(int)
        size = max(1, 8192 // self.context)
        for part, rows in chosen.items():
            for i in range(0, len(rows), size):
                yield self.ready(part, rows[i : i + size])

    def ready(self, part, rows):
        """These windows of a part as a batch."""
        tokens, starts, *of_window = self.parts[part]
        window = tokens[starts[rows][:, None] + np.arange(self.context + 1)]
        window = torch.from_numpy(window.astype(np.int64))  # [B, T + 1]
        label = window[:, 1:].clone()
        label[:, : self.score_from - 1] = UNSCORED  # label[:, i] is the token at position i + 1
        batch = {"input": window[:, :-1], "label": label}
        for name, values in zip(("document", "topic"), of_window):
            batch[name] = torch.from_numpy(values[rows])
        if self.tokenizer:
            batch["bytes"] = self.bytes_of[label.clamp(min=0)] * (label >= 0)
        return {name: send(value, self.device) for name, value in batch.items()}

    def loss(self, model, batch):
        """Mean cross-entropy of scored labels, counts for metrics() {name: sum}, the routings."""
        logits, routings = model(batch["input"], batch.get("topic"))
        counts = {"count": (batch["label"] >= 0).sum()}
        if "bytes" in batch:
            counts["bytes"] = batch["bytes"].sum()
        label = batch["label"].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), label, ignore_index=UNSCORED)
        return loss, counts, routings

    def metrics(self, sums):
        """What is reported, from summed counts and the summed loss in nats.

        loss and perplexity are per token, bits_per_byte can be compared between tokenizers.
        """
        mean = sums["loss"] / sums["count"]
        if torch.is_tensor(mean):  # in training
            perplexity = mean.exp()
        else:
            perplexity = math.exp(min(mean, 700))  # beyond that a float overflows
        found = {"loss": mean, "perplexity": perplexity}
        if "bytes" in sums:
            found["bits_per_byte"] = sums["loss"] / sums["bytes"] / math.log(2)
        return found

    def labels(self, batch, start):
        """What an expert's choice may go by: {name: (label [B, T], owner [B, T], names of labels)}.

        owner: the number of the document or token that has this one label; None: no NMI, only a
        map. Label -1 is none. `start` windows came before this batch.
        """
        if self.tokenizer is None:
            return {}
        tokens = batch["input"].cpu()
        each = start * self.context + torch.arange(tokens.numel()).view_as(tokens)
        found = {"token": (tokens, None, self.tokenizer.pieces)}
        found["token class"] = self.class_of[tokens], each, list(self.classes)
        if self.topics:
            topic = self.label_of_topic[batch["topic"].cpu()][:, None].expand(tokens.shape)
            document = batch["document"].cpu()[:, None].expand(tokens.shape)
            found["topic"] = topic, document, self.topic_names
        return found

    @torch.no_grad()
    def report(self, settings, model, fresh):
        """Facts of the text; of a leaky model also the metrics of 32 windows, twice.

        as_scored: all tokens at once. as_generated: later tokens hidden, as when the model writes.
        """
        facts = self.facts | {"vocab_size": self.vocab_size}
        if settings.remark != "leaky":
            return facts
        batch = self.ready("validation", self.scored[:: max(1, len(self.scored) // 32)][:32])
        scored, counts, _ = self.loss(model, batch)
        generated = 0.0
        for end in range(settings.score_from, settings.context + 1):
            logits, _ = model(batch["input"][:, :end], batch.get("topic"))
            label = batch["label"][:, end - 1]
            generated += F.cross_entropy(logits[:, -1], label, reduction="sum")
        for way, loss in ("as_scored", scored * counts["count"]), ("as_generated", generated):
            metrics = self.metrics(counts | {"loss": loss})
            facts[way] = {name: float(value) for name, value in metrics.items()}
        return facts

    def files(self):
        """What a run folder keeps of its data, {file name: content}."""
        if self.tokenizer is None:
            return {}
        known = self.tokenizer.pieces[256:]
        return {"tokenizer.json": [lexeme.decode("latin-1") for lexeme in known]}

    def tell(self, model, joints):
        """What is printed of the experts at the end: the commonest tokens of each.

        joints: the maps of specialisation() in train.py.
        """
        lines = []
        for block, labels in joints.items():
            if "token" not in labels:
                continue
            joint, pieces = labels["token"]
            for expert, share in enumerate(joint[:, :-1].T):  # the last column is no expert
                commonest = [pieces[i] for i in share.topk(12).indices if share[i] > 0]
                words = [repr(piece.decode("utf-8", "replace"))[1:-1] for piece in commonest]
                lines.append(f"block {block}, expert {expert}: {' '.join(words)}")
        return "\n".join(lines)

    @torch.no_grad()
    def pictures(self, model, joints):
        """The report page's part on text: HTML with validation text coloured by expert."""
        if self.tokenizer is None or not joints:
            return ""
        batch = self.ready("validation", self.scored[:: max(1, len(self.scored) // 3)][:3])
        page = ["<h2>Validation text, coloured by expert</h2>"]
        _, routings = model(batch["input"], batch.get("topic"))
        for block, routing in routings.items():
            mass = routing.mass()
            E = mass.shape[-1]
            legend = [on_page(f" expert {e} ", *color(e, E, lightness=0.8)) for e in range(E)]
            legend.append(on_page(" no expert ", *color(E, E)))
            page.append(f"<h3>block {block}</h3><p>{' '.join(legend)}</p>")
            for tokens, of_tokens in zip(batch["input"], mass.view(len(batch["input"]), -1, E)):
                text = painted(tokens, of_tokens, self.tokenizer, on_page)
                page.append(f"<pre>{text}</pre>")
        return "\n".join(page)

    # Reading: what fills parts, topics, tokenizer, about and facts.
    def read_bins(self, path, vocab_size):
        """nanoGPT's files: tokens of two bytes; vocab_size None: as large as they need."""
        largest = 0
        for part, name in ("train", "train.bin"), ("validation", "val.bin"):
            file = path / name
            size = file.stat().st_size if file.is_file() else 0
            if size < 2 or size % 2:
                raise ValueError(f"{file} must hold tokens of two bytes each, got {size} bytes")
            ids = np.memmap(file, np.uint16, "r")
            self.parts[part] = ids, np.arange(0, len(ids) - self.context, self.context)
            largest = max(largest, int(ids.max()))
            if vocab_size and largest >= vocab_size:
                rule = f"beyond --vocab-size {vocab_size}"
                raise ValueError(f"{path}: {part} holds token {largest}, {rule}")
        self.vocab_size = vocab_size or 64 * (largest // 64 + 1)  # a multiple of 64 runs faster
        self.about = f"{path.resolve().name}: nanoGPT's format, vocabulary of {self.vocab_size}"

    def read_text(self, settings, folder):
        most = settings.vocab_size
        if most is not None and most < 256:
            raise ValueError(f"--vocab-size must be at least 256 for text, its bytes, got {most}")
        documents = read_documents(settings.data, settings.replace_undecodable)
        # A document of at most `context` bytes cannot fill a window.
        long = [document for document in documents if len(document[2]) > self.context]
        train, validation = divide(long or documents)
        if folder:
            self.tokenizer = Tokenizer.read(folder / "tokenizer.json")
        else:
            self.tokenizer = Tokenizer.learn((raw for _, _, raw in train), most)
        pieces = self.tokenizer.pieces
        self.vocab_size = len(pieces)
        self.bytes_of = torch.tensor(list(map(len, pieces)))
        topic_of, names, texts = zip(*documents)
        topics = sorted(set(topic_of))
        self.topics = topics if len(topics) > 1 else []
        used = self.window("train", train, topics)
        used += self.window("validation", validation, topics, first=len(train))
        self.name_topics(topics)
        self.classes = CODE if all(name.endswith(".py") for name in names) else PROSE
        kinds = [token_class(i, piece, self.classes) for i, piece in enumerate(pieces)]
        self.class_of = torch.tensor(kinds)
        held = torch.from_numpy(self.parts["validation"][0])
        self.facts = {"bytes_per_token": float(self.bytes_of[held].double().mean())}
        name = f"standard library of Python {platform.python_version()}"
        if settings.data:
            name = pathlib.Path(settings.data).resolve().name
        size = sum(map(len, texts))
        self.about = (
            f"{name}: {len(documents)} documents, {len(topics)} topics, {size / 1e6:.1f} MB "
            f"({100 - 100 * used / size:.1f} % left out: tails and short documents), vocabulary of "
            f"{self.vocab_size}, {self.facts['bytes_per_token']:.2f} bytes a token"
        )

    def window(self, part, documents, topics, first=0):
        """Set parts[part] from documents, numbered from `first`; returns the bytes in windows."""
        tokens, starts, document, topic = [], [], [], []
        end = used = 0
        for number, (topic_name, _, raw) in enumerate(documents, first):
            ids = self.tokenizer.encode(raw)
            windows = max(0, len(ids) - 1) // self.context
            tokens.append(ids)
            starts.append(end + self.context * np.arange(windows))
            document.append(np.full(windows, number))
            topic.append(np.full(windows, topics.index(topic_name)))
            end += len(ids)
            used += int(self.bytes_of[torch.from_numpy(ids[: windows * self.context])].sum())
        self.parts[part] = tuple(map(np.concatenate, (tokens, starts, document, topic)))
        return used

    def name_topics(self, topics):
        """The ten topics with the most documents are labels 0 to 9; any other is label -1."""
        topic_of = {}
        for _, _, document, topic in self.parts.values():
            topic_of.update(zip(document.tolist(), topic.tolist()))
        documents = collections.Counter(sorted(topic_of.values()))  # ties: the first by name
        self.label_of_topic, self.topic_names = torch.full((len(topics),), -1), []
        for place, (topic, _) in enumerate(documents.most_common(10)):
            self.label_of_topic[topic] = place
            self.topic_names.append(topics[topic])


class Vocabulary(Text):
    """A run's tokenizer without its documents: all that sampling needs."""

    def __init__(self, settings, device, folder):
        if settings.task != "tokens" or not (folder / "tokenizer.json").is_file():
            kind = f"a run of --task {settings.task} without a tokenizer"
            raise ValueError(f"--sample {folder}: {kind} writes no text")
        if settings.hash_key == "topic":
            raise ValueError("this run routes by topic, and a prompt has none")
        self.tokenizer = Tokenizer.read(folder / "tokenizer.json")
        self.vocab_size, self.tokens = len(self.tokenizer.pieces), settings.context


def columns(summary):
    """The table's columns that are this task's own: {name: number or None}."""

    def bits(part):
        return summary.get(part, {}).get("bits_per_byte")

    found = {"bits/byte": bits("validation"), "perplexity": summary["validation"]["perplexity"]}
    found["dropless"] = bits("validation_dropless")
    found["as generated"] = None
    if bits("as_generated"):
        # Measured on a few windows: what they lose is added to the loss of all windows.
        found["as generated"] = bits("validation") + bits("as_generated") - bits("as_scored")
    found["vocabulary"] = summary["vocab_size"]
    found["bytes/token"] = summary.get("bytes_per_token")
    return found


def load(settings, device, folder=None):
    """The text that --data names. ValueError for text that is missing, broken or too short."""
    return DATASETS.get(settings.data, Text)(settings, device, folder)


DATASETS = {}  # what --data may name beside a path: {name: a class as Text}


# ---------------------------------------------------------------- the tokenizer
LETTER = rb"(?:[A-Za-z_]|[\xc2-\xdf][\x80-\xbf])"  # ASCII, or a character of two bytes
LEXEME = re.compile(
    rb"[\r\n]+[ \t]*"  # line ends and the indent after them
    rb"| ?" + LETTER + rb"(?:" + LETTER + rb"|[0-9])*"  # a word
    rb"| ?[0-9]+"
    rb"|[\xe0-\xf7][\x80-\xbf]+"  # a character of three or four bytes, often without blanks between
    rb"| ?([^\w\s])\1*"  # a run of one mark
    rb"|[ \t]+|.",
    re.DOTALL,
)
LONGEST = 32  # bytes in a lexeme; longer ones are cut


def lexemes(text):
    """bytes -> their lexemes, in order; together they are the text again."""
    for match in LEXEME.finditer(text):
        lexeme = match.group()
        for start in range(0, len(lexeme), LONGEST):
            yield lexeme[start : start + LONGEST]


class Tokenizer:
    """Bytes to token ids and back, without loss: 0 to 255 are bytes, the others common lexemes.

    A lexeme that the vocabulary lacks is cut into its longest known beginnings, at worst bytes.
    """

    def __init__(self, known):
        self.pieces = [bytes([i]) for i in range(256)] + list(known)
        self.ids = {lexeme: 256 + i for i, lexeme in enumerate(known)}
        self.cache = {}  # {lexeme: its ids}, of those met so far

    @classmethod
    def learn(cls, texts, vocab_size=None):
        """The lexemes, met at least twice, that cover the most bytes; vocab_size - 256 at most."""
        counts = collections.Counter(lexeme for text in texts for lexeme in lexemes(text))
        common = [lexeme for lexeme in counts if counts[lexeme] > 1]
        common.sort(key=lambda lexeme: (-counts[lexeme] * len(lexeme), lexeme))
        return cls(common[: (vocab_size or 4096) - 256])

    def encode(self, text):
        """bytes -> array [N] of ids."""
        ids = []
        for lexeme in lexemes(text):
            if lexeme not in self.cache:
                self.cache[lexeme] = self.split(lexeme)
            ids.extend(self.cache[lexeme])
        return np.array(ids, np.int32)

    def split(self, lexeme):
        """The id of a known lexeme; of another, those of its longest known beginnings."""
        if lexeme in self.ids:
            return [self.ids[lexeme]]
        ids, start = [], 0
        while start < len(lexeme):
            end = len(lexeme)
            while end > start + 1 and lexeme[start:end] not in self.ids:
                end -= 1
            ids.append(self.ids[lexeme[start:end]] if end > start + 1 else lexeme[start])
            start = end
        return ids

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids)

    @classmethod
    def read(cls, path):
        """The tokenizer that a run saved, a character a byte. ValueError for another file."""
        try:
            read = json.loads(path.read_text("utf-8"))
            known = [lexeme.encode("latin-1") for lexeme in read]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} holds no tokenizer: {error}") from None
        if not isinstance(read, list) or b"" in known or len(set(known)) < len(known):
            rule = "it must be a list of lexemes, none empty, none twice"
            raise ValueError(f"{path} holds no tokenizer: {rule}")
        return cls(known)


# ---------------------------------------------------------------- what a token is
CODE = {  # {class: pattern}: the first pattern that fits a token's beginning names its class
    "newline and indent": r"[\r\n]",
    "blank": r"\s+$",
    "keyword": rf" ?({'|'.join(keyword.kwlist)})$",
    "number": r" ?\d",
    "name": r" ?[^\W\d]",
    "bracket": r" ?[][(){}]",
    "string or comment mark": r""" ?["'#]""",
    "operator": r".",
    "raw byte": "",
}
FUNCTION_WORDS = """
    a an the this that these those and or but if not as than of to in on at by for with from
    into is are was were be been has have had will would can could may must i you he she it we
    they him her us them my your his its our their who which what when where there der die das
    den dem des ein eine einen einer und oder nicht wenn dass daß auf aus bei mit nach von vor
    zu zum zur im ist sind wird werden kann sich es er sie auch für le la les un une du au aux
    et ou ne pas que qui ce cette est sont il elle dans par pour sur avec sans se son sa ses
    si lo gli uno una di della del dei delle da dal con per non che è sono questo ed come al
    alla nel nella
""".split()
PROSE = {
    "blank": r"\s+$",
    "function word": rf"(?i) ?({'|'.join(FUNCTION_WORDS)})$",
    "other word": r" ?[^\W\d]",
    "number": r" ?\d",
    "punctuation": r".",
    "raw byte": "",
}


def token_class(token, piece, classes):
    """The place in CODE or PROSE of a token, by its spelling alone; ids below 256 are raw bytes."""
    spelling = ""
    if token >= 256:
        # A character that was cut in two counts as a letter.
        spelling = piece.decode("utf-8", "replace").replace("\ufffd", "x")
    for place, pattern in enumerate(classes.values()):
        if re.match(pattern, spelling):
            return place


# ---------------------------------------------------------------- documents
def holds_bins(data):
    """Is this a folder of nanoGPT's files?"""
    names = "train.bin", "val.bin"
    return data is not None and any(pathlib.Path(data, name).exists() for name in names)


def read_documents(path, replace=False):
    """(topic, name, bytes) of every text; topics are the first-level subfolders of a folder.

    path None: the standard library without its tests; topics are top-level packages and modules.
    ValueError for a path without text, and for bytes that are no UTF-8 (unless `replace`: U+FFFD).
    """
    root = pathlib.Path(path or sysconfig.get_paths()["stdlib"])
    folder, names = root.parent, [pathlib.Path(root.name)]
    if not root.is_file():
        folder, names = root, names_below(root, library=path is None)
    documents = []
    for name in names:
        raw = (folder / name).read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            if not replace:
                where = f"{folder / name} is not UTF-8 at byte {error.start}"
                rule = "--replace-undecodable reads it all the same"
                raise ValueError(f"{where}; {rule}") from None
            raw = raw.decode("utf-8", "replace").encode()
        topic = ""
        if len(name.parts) > 1 or path is None:
            topic = name.parts[0].removesuffix(".py")
        documents.append((topic, str(name), raw))
    if not any(raw for _, _, raw in documents):
        raise ValueError(f"{root} {'holds no text' if root.exists() else 'does not exist'}")
    return documents


def names_below(folder, library):
    """The files below a folder, as paths from there; of the library, its Python files alone."""
    pattern, skipped = "*", ()
    if library:
        pattern = "*.py"
        skipped = "test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"
    names = []
    for file in sorted(folder.rglob(pattern)):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") or part in skipped for part in name.parts)
        if file.is_file() and not hidden:
            names.append(name)
    return names


def divide(documents):
    """Training and validation documents: a tenth of each topic is held out, at least one document.

    Topics of a single document are taken together. Of a lone document, the end is held out.
    """
    if len(documents) == 1:
        topic, name, raw = documents[0]
        cut = len(raw) * 9 // 10
        while cut < len(raw) and inside_character(raw[cut : cut + 1]):
            cut += 1
        return [(topic, name, raw[:cut])], [(topic, name, raw[cut:])]
    sizes = collections.Counter(topic for topic, _, _ in documents)
    groups = collections.defaultdict(list)
    # Mixed by their names alone: one document more leaves the others in order.
    mixed = sorted(documents, key=lambda d: seeded("validation split", d[1]).initial_seed())
    for document in mixed:
        alone = sizes[document[0]] == 1
        groups[None if alone else document[0]].append(document)
    train, validation = [], []
    for group in groups.values():
        tenth = min(len(group) - 1, max(1, round(len(group) / 10)))
        train.extend(group[tenth:])
        validation.extend(group[:tenth])
    return train, validation


# ---------------------------------------------------------------- sampling, with --sample
@torch.no_grad()
def generate(model, tokens, count, temperature=1.0, top_p=1.0, seed=0):
    """`count` more tokens after a list: the likeliest at temperature 0, else drawn within top_p."""
    for step in range(count):
        context = torch.tensor([tokens[-model.context :]], device=model.position.device)
        logits, _ = model(context)
        chance = (logits[0, -1].float().cpu() / max(temperature, 1e-6)).softmax(-1)
        chance, order = chance.sort(descending=True, stable=True)
        chance[1:][chance.cumsum(0)[:-1] >= top_p] = 0  # the first is always kept
        place = 0
        if temperature > 0:
            place = int(chance.multinomial(1, generator=seeded(seed, "sample", step)))
        tokens = tokens + [int(order[place])]
    return tokens


def sample(model, tokenizer, saved, asked, colored):
    """Prompt and continuation by the run of `saved` settings; ValueError for what it cannot write.

    asked: prompt, max_new_tokens, temperature, top_p and seed. colored: for a terminal, by the last
    block's experts, as far back as the model's context reaches.
    """
    prompt = tokenizer.encode(asked.prompt.encode("utf-8", "surrogateescape")).tolist()
    if not prompt:
        raise ValueError("--prompt is empty; sampling needs something to go on from")
    if reads_sequences(saved) and saved.pool == "mean":
        raise ValueError("this run routes by the mean of a whole sequence, known at its end")
    if reads_sequences(saved) and len(prompt) < saved.prefix:
        rule = f"this run routes by the first {saved.prefix} tokens"
        raise ValueError(f"{rule}; --prompt has only {len(prompt)}")
    count, temperature = asked.max_new_tokens, asked.temperature
    tokens = generate(model, prompt, count, temperature, asked.top_p, asked.seed)
    shown = tokens[-model.context :]
    while len(shown) > 1 and inside_character(tokenizer.pieces[shown[0]]):
        shown = shown[1:]
    routings = model(torch.tensor([shown], device=model.position.device))[1]
    if not colored or not routings:
        return tokenizer.decode(tokens).decode("utf-8", "replace")
    mass = list(routings.values())[-1].mass()
    before = tokenizer.decode(tokens[: -len(shown)]).decode("utf-8", "replace")
    return before + painted(torch.tensor(shown), mass[0], tokenizer, on_terminal)


def painted(tokens, mass, tokenizer, paint):
    """Text of tokens [T], each stretch of one expert coloured by paint(text, r, g, b).

    mass [T, E], or [1, E] of a sequence routed whole; a token's expert has the most of it.
    """
    E = mass.shape[-1]
    experts = torch.where(mass.sum(-1) > 0, mass.argmax(-1), E).expand(len(tokens))
    stretches = []  # [expert, its bytes]
    for expert, token in zip(experts.tolist(), tokens.tolist()):
        piece = tokenizer.pieces[token]
        # A later byte of a character is coloured as its first.
        if stretches and (inside_character(piece) or expert == stretches[-1][0]):
            stretches[-1][1] += piece
        else:
            stretches.append([expert, piece])
    text = ""
    for expert, raw in stretches:
        text += paint(raw.decode("utf-8", "replace"), *color(expert, E, lightness=0.8))
    return text


def inside_character(raw):
    """Do these bytes of UTF-8 begin with a later byte of a character?"""
    return raw[0] & 0xC0 == 0x80


def on_terminal(text, *rgb):
    paint = "\x1b[30;48;2;{};{};{}m".format(*rgb)
    return paint + text.replace("\n", "\x1b[0m\n" + paint) + "\x1b[0m"


def on_page(text, *rgb):
    return f'<span style="background:rgb{rgb}">{html.escape(text)}</span>'

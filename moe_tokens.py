"""A GPT with mixture-of-experts blocks, as studied in 2402.13089, and the text it learns from.

The model is GPT-2's: pre-LN blocks, learned positions, tied embeddings. Every block holds an MoE in
place of its FFN, or those that --moe-blocks names. A group is a sequence: x [B, T, D] is already
[G, T, D]. The axes of the study are settings: what is routed (--unit), how often (--scope), to how
many experts (--top-k), by what weights (--router-weights).
"""

import collections
import html
import itertools
import keyword
import math
import os
import pathlib
import platform
import re
import sysconfig

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from moe_vision import Block, fingerprint, rows_of_step, seeded, send
from routers import MoE

POSITION_STD = 0.02  # deviation of positions and embeddings at the start, as in GPT-2
UNSCORED = -100  # the label of a position that is not scored

SIZES = {  # the model, then its budget; each entry is a setting of its own
    "tiny": dict(dim=64, depth=4, heads=4, hidden=64, context=64, experts=8, vocab_size=1024,
                 steps=1200, batch_size=64, lr=5e-3),
    "small": dict(dim=384, depth=6, heads=6, hidden=1536, context=256, experts=8, vocab_size=4096,
                  steps=5000, batch_size=64, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, context=1024, experts=4, vocab_size=4096,
                 steps=6000, batch_size=1024, lr=9.6e-4),
}  # fmt: skip

SETTINGS = {  # as in train.py: name: (type, default, what it is)
    "vocab_size": (int, None, "tokens at most, 256 bytes among them; .bin files bring their own"),
    "context": (int, None, "tokens in a sequence"),
    "score_from": (int, None, "first position that is scored; by default 1, or as --prefix"),
    "unit": (("token", "sequence"), "token", "what is routed"),
    "pool": (("prefix", "mean"), "prefix", "route a sequence by its first tokens, or by all"),
    "prefix": (int, 16, "how many first tokens"),
    "scope": (("layer", "global"), "layer", "routed in every block, or once after the embeddings"),
    "allow_leak": (bool, False, "run a routing that sees the future; results are labeled leaky"),
}
SAMPLING = {  # with --sample
    "prompt": (str, "\n", "text to go on from"),
    "max_new_tokens": (int, 200, "tokens to write"),
    "temperature": (float, 0.8, "0: always the likeliest token"),
}


# ---------------------------------------------------------------- the model
class GPT(nn.Module):
    """tokens [B, T] -> logits [B, T, V] and {block: Routing}.

    By default each MoE routes each token by itself. unit="sequence": the batch is one group, each
    sequence a token of width T*D, routed by the mean of its first `prefix` positions (None: of
    all); MoE splits it into its T vectors. scope="global": one routing serves all blocks.
    """

    def __init__(self, vocab_size, context, dim, heads, ffns, unit, scope, prefix):
        super().__init__()
        self.context, self.unit, self.scope, self.prefix = context, unit, scope, prefix
        self.embed = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.randn(context, dim) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, causal=True) for ffn in ffns)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.embed.weight, std=POSITION_STD)
        if scope == "global":
            for moe in self.moes():
                moe.router = self.moes()[0].router  # one for all blocks

    def moes(self):
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def forward(self, tokens):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        given = None  # or the one Routing of all blocks, of the normalized embeddings
        if self.scope == "global":
            given = self.route(self.moes()[0], F.layer_norm(x, x.shape[-1:]), tokens)

        def run_moe(moe, z):
            """Stands in for moe(z): y like z [B, T, D], and its Routing."""
            routing = self.route(moe, z, tokens) if given is None else given
            # A sequence that is routed whole is a token of width T * D, in one group of B.
            groups = z if self.unit == "token" else z.flatten(1)[None]
            y, _ = moe(groups, routing=routing)
            return y.view_as(z), routing

        routings = {}
        for i, block in enumerate(self.blocks):
            x, routing = block(x, run_moe)
            if routing is not None:
                routings[i] = routing
        return F.linear(self.norm(x), self.embed.weight), routings

    def route(self, moe, z, tokens):
        """The Routing of z [B, T, D]: of B groups of tokens, or of one group of B sequences."""
        if self.unit == "token":
            return moe.router(z, tokens)
        pooled = z[:, : self.prefix].mean(1)  # [B, D]
        return moe.router(pooled[None], tokens[None, :, 0])  # hash goes by a sequence's first token


def resolve(settings, router, overrides):
    """Fill in what follows from other settings; ValueError where they clash, or for a leak.

    router: as the model will hold it, or None for dense. overrides: {setting: value} that the user
    gave. Returns the label of all results: "" or "leaky".
    """
    s = settings
    if s.moe_blocks is None:
        s.moe_blocks = list(range(s.depth))  # as in the study
    if holds_bins(s.data):
        s.vocab_size = None  # the files bring their own
    if "renormalize" not in overrides and hasattr(s, "renormalize"):
        s.renormalize = s.top_k > 1  # as the study most likely did
    if s.router == "dense":
        s.unit, s.scope = "token", "layer"
    if s.unit == "sequence" and torch.distributed.is_initialized():
        raise ValueError("--unit sequence routes the batch as one group; it runs in one process")
    if s.unit == "sequence":
        if router.chooses != "tokens" or not router.causal or s.capacity_factor is not None:
            raise ValueError("--unit sequence needs a dropless router, as each one chooses alone")
    if s.unit == "token" or s.router == "hash":  # hash reads the first token of a sequence
        s.pool, s.prefix = "prefix", 1
    if s.pool == "mean":
        s.prefix = 1
    # The router has read the prefix, so it is not scored; nor is token 0, which nothing predicts.
    s.score_from = s.score_from or s.prefix
    for flag, value in ("--prefix", s.prefix), ("--score-from", s.score_from):
        if value > s.context:
            raise ValueError(f"{flag} must be at most --context {s.context}, got {value}")
    leak = ""
    if router is not None and not router.causal:
        leak = f"--router {s.router} is not causal with these options: later tokens decide"
    elif s.pool == "mean":
        leak = "--pool mean routes a sequence by later tokens too; --pool prefix does not"
    elif s.score_from < s.prefix:
        leak = f"--score-from {s.score_from} would score tokens that the router has read"
    if leak and not s.allow_leak:
        rule = "The loss would be better than the model is"
        raise ValueError(f"{leak}. {rule}; --allow-leak runs it, every number labeled leaky")
    return "leaky" if leak else ""


# ---------------------------------------------------------------- what train.py asks of text
class Text:
    """Windows of `context` tokens of documents, or of nanoGPT's .bin files.

    Reading sets description, fingerprint, vocab_size and stored[split] = (windows [W, T + 1], which
    overlap by a token; the document of each). For documents also

    tokenizer, bytes_of  its pieces of text, and the bytes in each; .bin files have None
    topics, topic_of     names of the ten largest; each document's place among them, or -1
    classes, class_of    CODE or PROSE; each token's place in it

    A batch is {"input": [B, T], "label": [B, T], "document": [B]}; for documents also "bytes"
    [B, T], how many bytes each label spells. batch() and batches() are as in Images.
    """

    examples = "sequences"  # the unit of speed
    sign = -1  # -1: of the first column, less is better
    splits = ("validation",)  # what is evaluated; the last one is for the table
    examined = "all"  # the split on which experts are examined: topics need many documents

    def __init__(self, settings, device):
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.context = self.tokens = settings.context
        self.score_from, self.unit = settings.score_from, settings.unit
        self.device = torch.device(device)
        self.stored, self.topics, self.tokenizer = {}, [], None
        if holds_bins(settings.data):
            self.read_bins(pathlib.Path(settings.data))
        else:
            self.read_text(settings)
        self.sizes = {split: len(windows) for split, (windows, _) in self.stored.items()}
        train, held = self.sizes["train"], self.sizes["validation"]
        counts = f"{train} training and {held} validation windows"
        self.description += f"; {counts} of {self.context} tokens"
        if not held or self.batch_size > train:
            raise ValueError(f"{self.description}: too few for --batch-size {self.batch_size}")
        self.scored = np.linspace(0, held - 1, min(held, 1024)).astype(int)  # evenly spread

    def build(self, settings, make_ffn):
        """The GPT; make_ffn(block) gives each block its FFN or MoE."""
        s = settings
        if s.router == "hash" and s.num_keys is None:
            s.num_keys = self.vocab_size  # make_ffn reads it
        ffns = [make_ffn(block) for block in range(s.depth)]
        prefix = s.prefix if s.pool == "prefix" else None
        return GPT(self.vocab_size, s.context, s.dim, s.heads, ffns, s.unit, s.scope, prefix)

    def batch(self, step, part=slice(None)):
        """Training windows, epoch by epoch in a fresh order."""
        rows = rows_of_step(self.seed, step, self.batch_size, self.sizes["train"])
        return self.ready("train", rows[part].numpy())

    def batches(self, split):
        """The validation windows that are scored; or "all", up to 4096 windows of all documents."""
        if split == "all":
            share, chosen = min(1, 4096 / sum(self.sizes.values())), {}
            for name, size in self.sizes.items():
                chosen[name] = np.linspace(0, size - 1, math.ceil(share * size)).astype(int)
        else:
            chosen = {"validation": self.scored}
        most = max(1, 8192 // self.context)  # windows in a batch
        for name, rows in chosen.items():
            for i in range(0, len(rows), most):
                yield self.ready(name, rows[i : i + most])

    def few(self, count):
        """A batch of so many of the scored windows."""
        return self.ready("validation", self.scored[:: max(1, len(self.scored) // count)][:count])

    def ready(self, split, rows):
        """These windows of a split as a batch."""
        windows, document = self.stored[split]
        window = torch.from_numpy(windows[rows].astype(np.int64))  # [B, T + 1]
        label = window[:, 1:].clone()
        label[:, : self.score_from - 1] = UNSCORED  # label[:, i] is the token at position i + 1
        batch = {"input": window[:, :-1].contiguous(), "label": label}
        batch["document"] = torch.from_numpy(document[rows])
        if self.tokenizer:
            batch["bytes"] = self.bytes_of[label.clamp(min=0)] * (label >= 0)
        return {name: send(value, self.device) for name, value in batch.items()}

    def loss(self, model, batch):
        """Mean cross-entropy of scored labels, counts for metrics() {name: sum}, the routings."""
        logits, routings = model(batch["input"])
        label, counts = batch["label"].flatten(), {"count": (batch["label"] >= 0).sum()}
        if "bytes" in batch:
            counts["bytes"] = batch["bytes"].sum()
        loss = F.cross_entropy(logits.flatten(0, 1), label, ignore_index=UNSCORED)
        return loss, counts, routings

    def metrics(self, sums):
        """loss and perplexity are per token; bits_per_byte can be compared between tokenizers."""
        mean = sums["loss"] / sums["count"]  # a tensor in training, a number in evaluation
        # Of larger losses, the perplexity is no number of 32, or of 64, bits.
        perplexity = mean.clamp(max=88).exp() if torch.is_tensor(mean) else math.exp(min(mean, 700))
        found = {"loss": mean, "perplexity": perplexity}
        if "bytes" in sums:
            found["bits_per_byte"] = sums["loss"] / sums["bytes"] / math.log(2)
        return found

    def labels(self, batch, start):
        """As of Images. owner: a document, sequence or token; -1: counted, but without an NMI."""
        if self.tokenizer is None:
            return {}
        tokens = batch["input"].cpu()
        each = start * self.context + torch.arange(tokens.numel()).view_as(tokens)
        if self.unit == "sequence":
            each = each // self.context  # one routing for all its tokens
        found = {"token": (tokens, torch.full_like(tokens, -1), self.tokenizer.pieces)}
        found["token class"] = self.class_of[tokens], each, list(self.classes)
        if self.topics:
            document = batch["document"].cpu()[:, None].expand(tokens.shape)
            found["topic"] = self.topic_of[document], document, self.topics
        return found

    @torch.no_grad()
    def report(self, settings, model, untrained):
        """Of a leaky model, 32 windows as_scored and, with later tokens hidden, as_generated."""
        if settings.label != "leaky":
            return {}
        batch = self.few(32)
        scored, counts, _ = self.loss(model, batch)
        generated, found = 0.0, {}
        for seen in range(settings.score_from, settings.context + 1):  # what follows so many tokens
            logits, _ = model(batch["input"][:, :seen])
            label = batch["label"][:, seen - 1]
            generated += F.cross_entropy(logits[:, -1], label, reduction="sum")
        for way, loss in ("as_scored", scored * counts["count"]), ("as_generated", generated):
            metrics = self.metrics(counts | {"loss": loss})
            found[way] = {name: float(value) for name, value in metrics.items()}
        return found

    def columns(self, summary):
        """The table's columns that are this task's own, {name: number or None}; the first ranks."""

        def bits(part):
            return summary.get(part, {}).get("bits_per_byte")

        found = {"bits/byte": bits("validation"), "perplexity": summary["validation"]["perplexity"]}
        found["dropless"] = bits("validation_dropless")
        if bits("as_generated"):  # estimated: the loss of all, plus the gap on 32 windows
            gap = bits("as_generated") - bits("as_scored")
            found["as generated"] = bits("validation") + gap
        return found

    def notes(self, contingency):
        """What is printed of the experts at the end: the commonest tokens of each."""
        lines = []
        for block, labels in contingency.items():  # .bin files have no labels
            for expert, words in enumerate(commonest(*labels["token"])):
                lines.append(f"block {block}, expert {expert}: {words}")
        return "\n".join(lines)

    @torch.no_grad()
    def pictures(self, model, contingency):
        """The report page's part on text, HTML: validation text colored by expert."""
        if self.tokenizer is None:
            return ""
        tokens, page = self.few(3)["input"], ""
        for block, routing in model(tokens)[1].items():
            weights = routing.expert_weights
            E = weights.shape[-1]
            page += f"<h3>Block {block}: validation text, each token in its expert's color</h3>"
            for e, words in enumerate(commonest(*contingency[block]["token"])):
                page += on_page(f" expert {e}, most often: ", e, E) + f" {html.escape(words)}<br>"
            page += on_page(" no expert ", E, E)
            for of_text, some in zip(tokens, weights.view(len(tokens), -1, E)):
                page += f"<pre>{painted(of_text, some, self.tokenizer.pieces)}</pre>"
        return page

    def read_bins(self, path):
        """nanoGPT's files: tokens of two bytes."""
        found = []
        for split, name in ("train", "train.bin"), ("validation", "val.bin"):
            size = (path / name).stat().st_size
            if size % 2 or size <= 2 * self.context:
                rule = f"more than {self.context} tokens of two bytes each"
                raise ValueError(f"{path / name} must hold {rule}, got {size} bytes")
            ids = np.memmap(path / name, np.uint16, "r")
            windows = sliding_window_view(ids, self.context + 1)[:: self.context]  # not in memory
            self.stored[split] = windows, np.zeros(len(windows), int)
            found.append(ids)
        self.fingerprint, largest = fingerprint(*found), int(max(map(np.max, found)))
        self.vocab_size = 64 * (largest // 64 + 1)  # a multiple of 64 runs faster
        self.description = f"{path.name}: nanoGPT's format, vocabulary of {self.vocab_size}"

    def read_text(self, settings):
        if settings.vocab_size < 256:
            raise ValueError("--vocab-size must be at least 256 for text: all bytes are tokens")
        documents = read_documents(settings.data)
        whole = b"".join(os.fsencode(document.name) + document.raw for document in documents)
        code = fingerprint(np.frombuffer(whole, np.uint8))
        self.fingerprint = f"{len(documents)} documents, bytes: {code}"
        # A document of at most `context` bytes cannot fill a window.
        long = [document for document in documents if len(document.raw) > self.context]
        train, validation = divide(long or documents)
        self.tokenizer = Tokenizer.learn((d.raw for d in train), settings.vocab_size)
        pieces, topics = self.tokenizer.pieces, []  # topics: one a document that fills a window
        for split, chosen in ("train", train), ("validation", validation):
            windows, number = [np.empty((0, self.context + 1), np.int32)], []
            for document in chosen:
                ids = self.tokenizer.encode(document.raw)
                if len(ids) > self.context:
                    windows.append(sliding_window_view(ids, self.context + 1)[:: self.context])
                    number += [len(topics)] * len(windows[-1])
                    topics.append(document.topic)
            self.stored[split] = np.concatenate(windows), np.array(number, int)
        if len(set(topics)) > 1:
            largest = collections.Counter(sorted(topics)).most_common(10)  # ties: the first by name
            place = {topic: i for i, (topic, _) in enumerate(largest)}
            self.topics = list(place)
            self.topic_of = torch.tensor([place.get(topic, -1) for topic in topics])
        is_code = all(document.name.endswith(".py") for document in documents)
        self.classes = CODE if is_code else PROSE
        kinds = [token_class(i, piece, self.classes) for i, piece in enumerate(pieces)]
        self.class_of, self.bytes_of = torch.tensor(kinds), torch.tensor(list(map(len, pieces)))
        self.vocab_size = len(pieces)
        name = f"standard library of Python {platform.python_version()}"
        if settings.data is not None:
            name = pathlib.Path(settings.data).name
        self.description = f"{name}: {len(documents)} documents, vocabulary of {self.vocab_size}"


def load_data(settings, device):
    """The text that --data names. ValueError for text that is missing, broken or too short."""
    return DATASETS.get(settings.data, Text)(settings, device)


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
        self.pieces = [bytes([i]) for i in range(256)] + known
        self.ids = {lexeme: 256 + i for i, lexeme in enumerate(known)}

    @classmethod
    def learn(cls, texts, vocab_size=4096):
        """Up to vocab_size - 256 lexemes, those met twice or more that cover the most bytes."""
        counts = collections.Counter(lexeme for text in texts for lexeme in lexemes(text))
        common = [lexeme for lexeme in counts if counts[lexeme] > 1]
        common.sort(key=lambda lexeme: (-counts[lexeme] * len(lexeme), lexeme))
        return cls(common[: vocab_size - 256])

    def encode(self, text):
        """bytes -> array [N] of ids."""
        ids = itertools.chain.from_iterable(map(self.cut, lexemes(text)))
        return np.fromiter(ids, np.int32)

    def cut(self, lexeme):
        """The id of a known lexeme; of another, those of its longest known beginnings."""
        if lexeme in self.ids:
            return [self.ids[lexeme]]
        ids = []  # a lexeme of one byte may be common; within others, a lone byte is its own id
        while lexeme:
            end = len(lexeme)
            while end > 1 and lexeme[:end] not in self.ids:
                end -= 1
            ids.append(self.ids[lexeme[:end]] if end > 1 else lexeme[0])
            lexeme = lexeme[end:]
        return ids

    def to_text(self, ids):
        return b"".join(self.pieces[i] for i in ids)


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
    a an the this that these those and or but if not as than of to in on at by for with from into is
    are was were be been has have had will would can could may must i you he she it we they him her
    us them my your his its our their who which what when where there der die das den dem des ein
    eine einen einer und oder nicht wenn dass daß auf aus bei mit nach von vor zu zum zur im ist
    sind wird werden kann sich es er sie auch für le la les un une du au aux et ou ne pas que qui ce
    cette est sont il elle dans par pour sur avec sans se son sa ses si lo gli uno una di della del
    dei delle da dal con per non che è sono questo ed come al alla nel nella
""".split()  # in four languages
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
        # Part of a character is not UTF-8; it counts as a letter.
        spelling = piece.decode("utf-8", "replace").replace("\ufffd", "x")
    for place, pattern in enumerate(classes.values()):
        if re.match(pattern, spelling):
            return place


# ---------------------------------------------------------------- documents
Document = collections.namedtuple("Document", "topic name raw")  # raw: its bytes


def holds_bins(data):
    """Is this a folder of nanoGPT's files?"""
    return data is not None and os.path.exists(os.path.join(data, "train.bin"))


def read_documents(path):
    """All texts, which must be UTF-8; the topics are the first-level subfolders of a folder.

    path None: the standard library without its tests; topics are top-level packages and modules.
    """
    root, skipped = pathlib.Path(path or sysconfig.get_paths()["stdlib"]), set()
    if path is None:
        skipped = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    files, documents = [], []
    for folder, below, names in os.walk(root):
        below[:] = set(below) - skipped  # it does not walk there
        files += map(pathlib.Path(folder).joinpath, names)
    for file in sorted(files) or [root]:
        inner = file.relative_to(root).parts
        hidden = any(part[0] == "." for part in inner)
        if hidden or not file.is_file() or (path is None and file.suffix != ".py"):
            continue
        raw = file.read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 at byte {error.start}") from None
        topic = inner[0].removesuffix(".py") if len(inner) > 1 or path is None else ""
        documents.append(Document(topic, "/".join(inner) or file.name, raw))
    if not documents:
        raise ValueError(f"{root} holds no text, or does not exist")
    return documents


def divide(documents):
    """Training and validation documents: a tenth of each topic is held out, at least one document.

    Topics of a single document are taken together. Of a lone document, the end is held out.
    """
    if len(documents) == 1:
        topic, name, raw = documents[0]
        cut = len(raw) * 9 // 10
        return [Document(topic, name, raw[:cut])], [Document(topic, name, raw[cut:])]
    sizes = collections.Counter(document.topic for document in documents)
    groups = collections.defaultdict(list)
    # Shuffled by a hash of the name, so that a new document moves no other.
    mixed = sorted(documents, key=lambda d: seeded("validation split", d.name).initial_seed())
    for document in mixed:
        topic = document.topic if sizes[document.topic] > 1 else None  # lone ones share a group
        groups[topic].append(document)
    train, validation = [], []
    for group in groups.values():
        tenth = min(len(group) - 1, max(1, round(len(group) / 10)))
        train += group[tenth:]
        validation += group[:tenth]
    return train, validation


# ---------------------------------------------------------------- sampling, and colored text
def sample(model, tokenizer, saved, asked):
    """Prompt and continuation, by a run of `saved` settings; ValueError if it cannot write them.

    asked: prompt, max_new_tokens, temperature and seed.
    """
    prompt = tokenizer.encode(asked.prompt.encode("utf-8", "surrogateescape")).tolist()
    if saved.pool == "mean":
        raise ValueError("this run routes by the mean of a whole sequence, known at its end")
    if len(prompt) < saved.prefix:  # the router reads them
        rule = f"--prompt needs at least {saved.prefix} tokens in this run"
        raise ValueError(f"{rule}, got {len(prompt)}")
    tokens = generate(model, prompt, asked.max_new_tokens, asked.temperature, asked.seed)
    return tokenizer.to_text(tokens).decode("utf-8", "replace")


@torch.no_grad()
def generate(model, tokens, count, temperature=1.0, seed=0):
    """`count` more tokens after a list, drawn; at temperature 0 the likeliest."""
    for step in range(count):
        context = torch.tensor([tokens[-model.context :]], device=model.position.device)
        logits, _ = model(context)
        chance = (logits[0, -1].float().cpu() / max(temperature, 1e-6)).softmax(-1)
        tokens = tokens + chance.multinomial(1, generator=seeded(seed, "sample", step)).tolist()
    return tokens


def commonest(counts, pieces):
    """The twelve commonest tokens of each expert, by counts [tokens, E + 1]; a dot is a blank."""
    found = []
    for share in counts[:, :-1].T:  # the last column is no expert
        best = [pieces[i] for i in share.topk(12).indices if share[i] > 0]
        words = [repr(piece.decode("utf-8", "replace"))[1:-1].replace(" ", "·") for piece in best]
        found.append(" ".join(words))
    return found


def painted(tokens, weights, pieces):
    """HTML of tokens [T], each stretch of one expert on its color.

    weights [T, E], or [1, E] of a sequence routed whole; a token's expert has the most of it.
    """
    E, page = weights.shape[-1], ""
    experts = torch.where(weights.sum(-1) > 0, weights.argmax(-1), E)  # E: no expert
    pairs = zip(experts.expand(len(tokens)).tolist(), tokens.tolist())
    for expert, stretch in itertools.groupby(pairs, key=lambda pair: pair[0]):
        raw = b"".join(pieces[token] for _, token in stretch)
        page += on_page(raw.decode("utf-8", "replace"), expert, E)
    return page


def on_page(text, expert, count):
    """HTML: text on the color of an expert of so many."""
    return f'<span style="background:{color(expert, count, 80)}">{html.escape(text)}</span>'


def color(place, count, lightness):
    """The CSS color of expert `place` of `count`; gray where place is count: no expert."""
    if place == count:
        return "#c8c8c8"
    return f"hsl({360 * place / count:.0f}, 80%, {lightness - 10 * (place % 2)}%)"

"""A vision transformer with mixture-of-experts blocks, and the images it learns from (2401.15969's side of the set).

The model is a ViT (2010.11929): pre-LN blocks, learned positions, global average pooling. Some blocks hold an MoE in
place of their FFN, as in V-MoE (2106.05974). A group is an image, a token a patch: x [B, T, D] is already [G, T, D].

Data comes in three kinds behind the same three methods (batch, split, probe): images drawn on the fly (the default), a
folder in the CIFAR binary layout or an .npz, and the official CIFAR archives, fetched once.
train.py uses the names below that need no image to be understood (add_flags, settle, ignored, load_data, build_model, moe_blocks,
loss, metrics, columns, report, labels, show, files, and the tables of defaults); moe_tokens.py offers it the same ones.
"""
import base64
import colorsys
import hashlib
import math
import os
import pathlib
import tarfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from routers import MoE, seeded

UNIT, SPLITS = "images", ("validation", "test")  # what examples/s counts; the parts that are evaluated, the last one for the table
EXAMINED = "test"  # the part on which it is asked what experts specialise in
MORE_IS_BETTER = True  # of the number in the first of columns()
SIZES = {  # model and budget; every entry has a flag of its own
    "tiny": dict(dim=64, depth=4, heads=4, hidden=256, patch=4, experts=8, steps=500, batch_size=128, lr=1e-2),
    "small": dict(dim=384, depth=12, heads=6, hidden=1536, patch=4, experts=32, steps=10_000, batch_size=512, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, patch=4, experts=32, steps=10_000, batch_size=512, lr=8e-4),
}
ROUTER_DEFAULTS = {  # where the vision study's practice differs from build_router's defaults (V-MoE's configs)
    "token_choice": dict(priority="choice", noise_std=1.0, balance="vmoe"),
}


# ---------------------------------------------------------------- the model
class Block(nn.Module):
    """x + attention(norm(x)), then x + FFN or MoE(norm(x)); both steps keep [B, T, D]."""

    def __init__(self, dim, heads, feed, together=False):
        super().__init__()
        self.heads, self.feed, self.together = heads, feed, together  # together: the batch is one group
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, D/heads]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        z = self.norm2(x)
        if not isinstance(self.feed, MoE):
            return x + self.feed(z), None
        if not self.together:
            y, routing = self.feed(z)
        else:  # hash goes by the place in its image
            y, routing = self.feed(z.reshape(1, B * T, D), torch.arange(T, device=x.device).repeat(B)[None])
        return x + y.view_as(x), routing


class ViT(nn.Module):
    """images [B, 3, S, S] -> logits and {block: Routing}: [B, classes] of images, or, patchwise, [B, T, classes] of patches."""

    def __init__(self, image_size, patch, dim, heads, feeds, classes, patchwise=False, together=False):
        super().__init__()
        self.patch, self.patchwise = patch, patchwise
        self.embed = nn.Linear(3 * patch**2, dim)
        self.position = nn.Parameter(torch.randn((image_size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, feed, together) for feed in feeds)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def patches(self, images):
        x = F.pixel_unshuffle(images, self.patch).flatten(2).mT  # [B, T, 3 * patch^2]
        x, routings = self.embed(x) + self.position, {}
        for i, block in enumerate(self.blocks):
            x, routing = block(x)
            if routing is not None:
                routings[i] = routing
        return self.norm(x), routings  # [B, T, D]

    def features(self, images):
        """What the head of a classifier reads, [B, D]."""
        return self.patches(images)[0].mean(1)

    def forward(self, images):
        x, routings = self.patches(images)
        return self.head(x if self.patchwise else x.mean(1)), routings


def build_model(args, data, feed):
    """The ViT these flags describe; feed(block, tokens) gives each block its FFN or MoE. ValueError for what the data lacks or cannot fit."""
    if data.image_size % args.patch:
        raise ValueError(f"--patch must divide the image size, got --patch {args.patch} and images of {data.image_size} pixels")
    tokens = (data.image_size // args.patch) ** 2
    feeds = [feed(block, tokens) for block in range(args.depth)]
    classes = 1 + 2 * len(SHAPES) if args.head == "patch" else len(data.classes)
    return ViT(data.image_size, args.patch, args.dim, args.heads, feeds, classes, args.head == "patch", args.group == "batch")


def moe_blocks(depth):
    """every second block, counted from the last (V-MoE)"""
    return [block for block in range(depth) if (depth - block) % 2]


def loss(model, batch):
    """Cross-entropy, counts {name: sum over the batch} for metrics, and the routings."""
    logits, routings = model(batch["image"])
    label, counts = batch["label"], {}
    if logits.ndim == 3:  # patches: ground, and an edge or the interior of each shape
        kind, guess = batch["kind"], logits.argmax(-1)
        label = torch.where(kind > 0, 2 * batch["pair"][:, :1] + kind, 0)  # [B, T]
        for c in range(logits.shape[-1]):
            counts |= {f"both{c}": ((guess == c) & (label == c)).sum(), f"either{c}": ((guess == c) | (label == c)).sum()}
    right = (logits.argmax(-1) == label).sum()
    return F.cross_entropy(logits.flatten(0, -2), label.flatten()), counts | {"count": label.numel(), "right": right}, routings


def metrics(sums):
    """What is reported, from summed counts and the summed loss; of patches also the mean intersection over union."""
    told = {"loss": sums["loss"] / sums["count"], "top1": 100 * sums["right"] / sums["count"]}
    shares = [sums[f"both{c}"] / max(1, sums[f"either{c}"]) for c in range(1 + 2 * len(SHAPES)) if f"both{c}" in sums]
    return told | ({"miou": 100 * sum(shares) / len(shares)} if shares else {})


def columns(summary):
    """The table's columns that are this task's own, {name: number, (mean, spread) or None}; the first one decides."""
    pair = lambda name: tuple(summary[name]) if name in summary else None
    test, dropless = summary["test"], summary.get("test_dropless", {})
    head = {"mIoU %": test["miou"], "patches right %": test["top1"]} if "miou" in test else {"top-1 %": test["top1"]}
    return {**head, "dropless %": dropless.get("miou", dropless.get("top1")), "10-shot %": pair("few_shot"),
            "untrained": pair("few_shot_untrained"), "pixels": pair("few_shot_pixels")}


# ---------------------------------------------------------------- images drawn on the fly
SHAPES = {  # inside or not, for points (u, v) of the unit square about the centre, r and angle their polar form
    "disc": lambda u, v, r, angle: r < 0.85,
    "square": lambda u, v, r, angle: torch.maximum(u.abs(), v.abs()) < 0.75,
    "triangle": lambda u, v, r, angle: torch.maximum(v, 0.87 * u.abs() - 0.5 * v) < 0.5,
    "cross": lambda u, v, r, angle: (torch.minimum(u.abs(), v.abs()) < 0.32) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "ring": lambda u, v, r, angle: (r > 0.45) & (r < 0.95),
    "star": lambda u, v, r, angle: r < 0.65 + 0.35 * torch.cos(5 * angle),
}
TEXTURES = {  # a wave between -1 and 1 in the shape's own frame
    "upright": lambda u, v, r: torch.sin(u),
    "level": lambda u, v, r: torch.sin(v),
    "checks": lambda u, v, r: torch.sin(u) * torch.sin(v),
    "ripples": lambda u, v, r: torch.sin(r),
}
KINDS = ("background", "edge", "interior")  # of a patch
PAIRS = [(shape, texture) for shape in range(len(SHAPES)) for texture in range(len(TEXTURES))]
HELD_OUT = [(shape, shape % len(TEXTURES)) for shape in range(len(SHAPES))]  # one of each shape, for the few-shot probe
TRAINED = [pair for pair in PAIRS if pair not in HELD_OUT]


class Drawn:
    """32x32 images of a shape filled with a texture; the class is the pair, colour says nothing of it.

    Parameters are drawn on the CPU from (seed, what for), so that one seed is one data set on every device.
    """

    image_size, classes, few_shot_classes = 32, TRAINED, HELD_OUT
    names = [f"{list(SHAPES)[shape]} {list(TEXTURES)[texture]}" for shape, texture in TRAINED]

    def __init__(self, args, device):
        self.seed, self.batch_size, self.patch, self.device = args.seed, args.batch_size, args.patch, device
        self.about = f"drawn images, {len(TRAINED)} classes to train, {len(HELD_OUT)} held out"

    def draw(self, count, pairs, *purpose, part=slice(None)):
        """A batch of `count` images of these pairs; all parameters are drawn, but only `part` of them rendered."""
        g = seeded(self.seed, *purpose)
        label = torch.randint(len(pairs), (count,), generator=g)
        number = torch.rand(count, 12, generator=g, dtype=torch.float32)  # one uniform number per parameter of an image
        noise = torch.randn(count, 1, 32, 32, generator=g, dtype=torch.float32)  # drawn alike for every --dtype
        default = torch.get_default_dtype()
        return self.render(*(z[part].to(self.device) for z in (torch.tensor(pairs)[label], label, number.to(default), noise.to(default))))

    def render(self, pair, label, number, noise):
        spread = lambda i, low, high: (low + (high - low) * number[:, i])[:, None, None]  # [B, 1, 1]
        axis = torch.arange(32, device=label.device) / 15.5 - 1
        angle, size = spread(0, -math.pi / 12, math.pi / 12), spread(1, 0.7, 0.95)
        y, x = axis[:, None] - spread(2, -0.3, 0.3), axis - spread(3, -0.3, 0.3)  # [B, 32, 1], [B, 1, 32]
        u, v = (angle.cos() * x + angle.sin() * y) / size, (angle.cos() * y - angle.sin() * x) / size  # [B, 32, 32]
        r, polar = (u * u + v * v).sqrt(), torch.atan2(u, -v)
        every = torch.arange(len(label), device=label.device)
        inside = torch.stack([shape(u, v, r, polar) for shape in SHAPES.values()])[pair[:, 0], every]
        wave = spread(4, 9, 11)  # radians per half an image
        wave = torch.stack([texture(u * wave + spread(5, 0, 6.3), v * wave + spread(5, 0, 6.3), r * wave + spread(5, 0, 6.3))
                            for texture in TEXTURES.values()])[pair[:, 1], every]
        ground, colour = number[:, 6:9] * 0.5, number[:, 9:12] * 0.5 + 0.5  # [B, 3], the shape brighter than the ground
        filled = colour[..., None, None] * (1 + wave[:, None] / 3)  # [B, 3, 32, 32]
        image = torch.where(inside[:, None], filled, ground[..., None, None]) + 0.15 * noise
        covered = F.avg_pool2d(inside[:, None].float(), self.patch).flatten(1)  # [B, T], share of the patch
        kind = (covered > 0).long() + (covered == 1).long()
        return {"image": (image - 0.5) * 4, "label": label, "kind": kind, "pair": pair}

    def pixels(self, image):
        """Images as the model sees them -> what an eye sees, [B, S, S, 3] uint8."""
        return ((image / 4 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()

    def batch(self, step, part=slice(None)):
        return self.draw(self.batch_size, TRAINED, "train", step, part=part)

    def split(self, name):
        """The validation or the test images, 2048 each, in batches."""
        return (self.draw(256, TRAINED, name, i) for i in range(8))

    def probe(self, draw, shots=10):
        """Support (so many shots of each held-out class) and query images of one draw of the few-shot probe."""
        return pick_shots(self.draw(1024, HELD_OUT, "probe", draw), shots)


def pick_shots(pool, shots):
    """Split a pool of images into the first `shots` of each class and the rest."""
    order = pool["label"].argsort(stable=True)
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(pool["label"][order], pool["label"][order])
    support = torch.zeros_like(order, dtype=torch.bool)
    support[order[rank < shots]] = True
    return [(pool["image"][rows], pool["label"][rows]) for rows in (support, ~support)]


# ---------------------------------------------------------------- images from files
OFFICIAL = {  # name: where the official binary archive lies, and its md5
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}


def download(name, root="data"):
    """Fetch an official archive once, check its md5, and unpack its .bin files alone; returns their folder."""
    url, md5 = OFFICIAL[name]
    folder = pathlib.Path(root, name)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    archive, part = folder.with_suffix(".tar.gz"), folder.with_suffix(".part")
    try:
        torch.hub.download_url_to_file(url, archive)
        digest = hashlib.md5(archive.read_bytes()).hexdigest()
        if digest != md5:
            raise ValueError(f"{url} has md5 {digest}, not {md5}: cut short or changed; the download was deleted")
        part.mkdir(exist_ok=True)
        with tarfile.open(archive) as members:
            for member in members:  # a member's path is never trusted: only its last part names the file
                if member.isfile() and member.name.endswith(".bin"):
                    (part / pathlib.PurePosixPath(member.name).name).write_bytes(members.extractfile(member).read())
        os.replace(part, folder)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"cannot fetch {url}: {error}") from None
    finally:
        archive.unlink(missing_ok=True)
    return folder


def read_cifar(files):
    """Images [N, 3, 32, 32] uint8, labels [N] and the class count of CIFAR .bin files; a size fits one layout only."""
    images, labels, classes = [], [], None
    for file in files:
        raw = np.frombuffer(pathlib.Path(file).read_bytes(), np.uint8)
        fine = int(file.name in ("train.bin", "test.bin"))  # CIFAR-100: a coarse label stands before the fine one
        record, classes = 3073 + fine, 100 if fine else 10
        if not len(raw) or len(raw) % record:
            raise ValueError(f"{file} holds {len(raw)} bytes, not a whole number of records of {record} bytes")
        raw = raw.reshape(-1, record)
        images.append(raw[:, fine + 1 :].reshape(-1, 3, 32, 32))
        labels.append(raw[:, fine])
    images, labels = np.concatenate(images), np.concatenate(labels)
    if labels.max() >= classes:
        raise ValueError(f"{files[0].parent} has a label {labels.max()}; labels of this layout are below {classes}")
    return images, labels.astype(np.int64), classes


def read_npz(path):
    """x_train, y_train, x_test, y_test of an .npz as (images, labels) twice and the class count; never a pickle."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise ValueError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(keys)}")
            x_train, y_train, x_test, y_test = (archive[key] for key in keys)
    except Exception as error:  # numpy reports a broken archive by a dozen exceptions
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}") from None
    parts = []
    for key, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.shape[1] != x.shape[2] or not len(x):
            raise ValueError(f"{path}: x_{key} must be square uint8 images [N, S, S, 3], got {x.dtype} {list(x.shape)}")
        y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{path}: y_{key} must be {len(x)} whole numbers, got {y.dtype} {list(y.shape)}")
        parts.append((x.transpose(0, 3, 1, 2), y.astype(np.int64)))
    classes = int(parts[0][1].max()) + 1
    for _, y in parts:
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"{path} has labels out of range: {y.min()} to {y.max()}, but training knows 0 to {classes - 1}")
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise ValueError(f"{path}: training and test images differ in size")
    return *parts, classes


class Stored:
    """Images from a CIFAR folder or an .npz. A tenth of the training part is the validation split, the same for all seeds."""

    def __init__(self, args, device):
        path = pathlib.Path(download(args.data) if args.data in OFFICIAL else args.data)
        if not path.exists():
            raise ValueError(f"no such data: {path}")
        if path.suffix == ".npz":
            train, test, count = read_npz(path)
        else:
            files = sorted(path.glob("data_batch_*.bin")) or [path / "train.bin"]
            held = [path / ("test.bin" if files[0].name == "train.bin" else "test_batch.bin")]
            for file in files + held:
                if not file.is_file():
                    raise ValueError(f"{path} lacks {file.name}; it needs data_batch_*.bin and test_batch.bin, or train.bin and test.bin")
            *train, count = read_cifar(files)
            *test, _ = read_cifar(held)
        known = count - round(count * 0.2) if args.few_shot else count
        if args.few_shot and count - known < 2:
            raise ValueError(f"--few-shot holds out a fifth of the classes, at least 2; {path} has {count} classes")
        self.seed, self.batch_size, self.patch, self.device = args.seed, args.batch_size, args.patch, device
        self.classes, self.few_shot_classes = range(known), range(known, count)
        order = torch.randperm(len(train[0]), generator=seeded("validation split"))
        images, labels = torch.from_numpy(np.ascontiguousarray(train[0]))[order], torch.from_numpy(train[1])[order]
        tenth = len(images) // 10
        test = torch.from_numpy(np.ascontiguousarray(test[0])), torch.from_numpy(test[1])
        keep, every = lambda x, y: (x[y < known], y[y < known]), torch.cat([labels, test[1]])
        self.parts = {"train": keep(images[tenth:], labels[tenth:]), "validation": keep(images[:tenth], labels[:tenth]), "test": keep(*test)}
        self.pool = torch.cat([images, test[0]])[every >= known], every[every >= known] - known
        if args.few_shot and self.pool[1].bincount(minlength=count - known).min() <= 10:
            raise ValueError(f"--few-shot needs more than 10 images of each held-out class; {path} has fewer")
        for name, (_, y) in self.parts.items():
            if not len(y):
                raise ValueError(f"{path}: the {name} part is empty")
        if self.batch_size > len(self.parts["train"][1]):
            raise ValueError(f"--batch-size {self.batch_size} is larger than the data: {len(self.parts['train'][1])} training images")
        pixels = self.parts["train"][0].to(torch.get_default_dtype()) / 255
        self.mean, self.std = pixels.mean((0, 2, 3))[:, None, None], pixels.std((0, 2, 3))[:, None, None] + 1e-5
        self.image_size, self.names = pixels.shape[-1], [f"class {c}" for c in range(known)]
        self.about = f"{path.name}: " + ", ".join(f"{len(y)} {name}" for name, (_, y) in self.parts.items()) + f" images, {known} classes"

    def pixels(self, image):
        return ((image.cpu() * self.std + self.mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()

    def ready(self, image, label):
        return {"image": ((image.to(self.mean) / 255 - self.mean) / self.std).to(self.device), "label": label.to(self.device)}

    def batch(self, step, part=slice(None)):
        """Epoch by epoch in a fresh order; each image cropped after padding by an eighth, and flipped in half the cases."""
        image, label = self.parts["train"]
        place = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        order = {int(e): torch.randperm(len(label), generator=seeded(self.seed, "epoch", int(e))) for e in (place // len(label)).unique()}
        rows = torch.stack([order[int(p) // len(label)][p % len(label)] for p in place])
        S, pad, g = self.image_size, self.image_size // 8, seeded(self.seed, "augment", step)
        shift = torch.randint(2 * pad + 1, (len(rows), 2), generator=g)
        flip = torch.rand(len(rows), generator=g) < 0.5
        rows, shift, flip = rows[part], shift[part], flip[part]
        y, x = shift[:, :1] + torch.arange(S), shift[:, 1:] + torch.arange(S)  # [B, S]
        x = torch.where(flip[:, None], x.flip(1), x)
        padded = F.pad(image[rows], (pad,) * 4)
        cropped = padded[torch.arange(len(rows))[:, None, None, None], torch.arange(3)[:, None, None], y[:, None, :, None], x[:, None, None, :]]
        return self.ready(cropped, label[rows])

    def split(self, name):
        image, label = self.parts[name]
        return (self.ready(image[i : i + 256], label[i : i + 256]) for i in range(0, len(label), 256))

    def probe(self, draw, shots=10):
        """A draw of the few-shot probe from the held-out classes (--few-shot): at most 1024 images."""
        order = torch.randperm(len(self.pool[1]), generator=seeded(self.seed, "probe", draw))[:1024]
        return pick_shots(self.ready(self.pool[0][order], self.pool[1][order]), shots)


# ---------------------------------------------------------------- the few-shot probe
def ridge_accuracy(support, query):
    """Accuracy of closed-form ridge regression from (features [N, D], labels [N]) to the same for queries (V-MoE).

    Features are standardised by the support set, with a constant appended; targets are -1 and 1. The penalty, of
    2^-10 .. 2^19, is the one with the least leave-one-out error on the support set: residual / (1 - leverage).
    Differs: V-MoE chooses the penalty on the query sets.
    """
    (x, y), (z, truth) = support, query
    mean, std = x.double().mean(0), x.double().std(0) + 1e-5
    x, z = (F.pad((f.double() - mean) / std, (0, 1), value=100.0) for f in (x, z))
    targets = F.one_hot(y).double() * 2 - 1
    value, vector = torch.linalg.eigh(x @ x.T)  # [N], [N, N]

    def fitted(penalty):
        hat = vector * (value / (value + penalty)) @ vector.T
        return ((targets - hat @ targets) / (1 - hat.diagonal()[:, None])).square().sum()

    penalty = min((2.0**i for i in range(-10, 20)), key=lambda p: float(fitted(p)))
    scores = z @ (x.T @ (vector / (value + penalty) @ (vector.T @ targets)))
    return (scores.argmax(1) == truth).double().mean().item()


@torch.no_grad()
def report(args, model, data, fresh, draws=5):
    """10-shot accuracy in % on held-out classes, [mean, spread] over draws: the model's, a fresh() one's, raw pixels'."""
    if not len(data.few_shot_classes):
        return {}
    untrained = fresh()
    readers = {"few_shot": model.features, "few_shot_untrained": untrained.features, "few_shot_pixels": lambda x: x.flatten(1)}
    accuracy = {name: [] for name in readers}
    for draw in range(draws):
        support, query = data.probe(draw)
        for name, read in readers.items():
            features = lambda images: torch.cat([read(part) for part in images.split(256)]).cpu()
            accuracy[name].append(100 * ridge_accuracy((features(support[0]), support[1].cpu()), (features(query[0]), query[1].cpu())))
    return {name: [float(np.mean(a)), float(np.std(a, ddof=1))] for name, a in accuracy.items()}


def labels(batch, data, start):
    """{name: (label [B, T], unit [B, T] on which it is constant, the labels' names)}, `start` images having come before."""
    B, T = len(batch["image"]), (data.image_size // data.patch) ** 2
    wide = lambda of_image: of_image.cpu()[:, None].expand(B, T)
    image, each = wide(torch.arange(start, start + B)), torch.arange(start * T, (start + B) * T).view(B, T)
    found = {"class": (wide(batch["label"]), image, data.names), "position": (torch.arange(T).expand(B, T), each, range(T))}
    if "kind" in batch:
        found["patch kind"] = batch["kind"].cpu(), each, KINDS
        found |= {"shape": (wide(batch["pair"][:, 0]), image, list(SHAPES)), "texture": (wide(batch["pair"][:, 1]), image, list(TEXTURES))}
    return found


def png(pixels):
    """The bytes of a PNG of pixels [H, W, 3] uint8."""
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    head = pixels.shape[1].to_bytes(4, "big") + pixels.shape[0].to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@torch.no_grad()
def show(model, data, joints, folder=None, count=8, side=128):
    """Write patches.svg to the run folder: test images, and beside each its patches coloured by expert, block by block."""
    if not folder or not joints:
        return
    images = next(iter(data.split("test")))["image"][:count]
    routings, n = model(images)[1], data.image_size // data.patch
    E = len(next(iter(routings.values())).load)
    palette = [[round(255 * part) for part in colorsys.hls_to_rgb(e / E, 0.45 + 0.25 * (e % 2), 0.8)] for e in range(E)] + [[200] * 3]
    fit = lambda tile: tile[:, np.arange(side) * tile.shape[1] // side][:, :, np.arange(side) * tile.shape[2] // side]
    tiles = [fit(data.pixels(images))]
    for routing in routings.values():
        mass = routing.mass().reshape(len(images), n, n, E).cpu()
        expert = torch.where(mass.sum(-1) > 0, mass.argmax(-1), E)  # E: no expert took the patch
        tiles.append(fit(np.array(palette, np.uint8)[expert.numpy()]))
    sheet = [np.pad(tile, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255) for tile in tiles]
    width, height = len(sheet) * sheet[0].shape[2], count * sheet[0].shape[1]
    mosaic = base64.b64encode(png(np.concatenate([np.concatenate(list(part)) for part in sheet], 1))).decode()
    write = lambda x, y, words: f'<text x="{x}" y="{y}">{words}</text>'
    heads = [write(4 + i * sheet[0].shape[2], 20, words) for i, words in enumerate(["image", *(f"block {block}" for block in routings)])]
    legend = [f'<rect x="{width + 12}" y="{34 + 22 * e}" width="16" height="16" fill="rgb{tuple(colour)}"/>' +
              write(width + 34, 47 + 22 * e, f"expert {e}" if e < E else "no expert") for e, colour in enumerate(palette)]
    (folder / "patches.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 120}" height="{max(height, 22 * E + 40) + 34}" font-family="sans-serif" font-size="14">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(heads + legend)}'
        f'<image x="0" y="28" width="{width}" height="{height}" href="data:image/png;base64,{mosaic}"/></svg>\n')


def files(data):
    """What a run folder keeps of its data: nothing."""
    return {}


def ignored(setting):
    """Flags of this file without meaning beside the others of {flag: value}: a grid drops them."""
    return {"--group"} if setting.get("--router") in ("dense", "soft") else set()


def settle(args, router):
    """Hold flags to each other; an image may be routed in any way, so that no remark (the returned string) is due."""
    if args.head == "patch" and args.data:
        raise ValueError("--head patch is for drawn images, whose patches are known; --data has none")
    if args.few_shot and not args.data:
        raise ValueError("--few-shot is for stored images; of those drawn on the fly, 6 classes are always held out")
    if args.group == "batch" and (args.router in ("dense", "soft") or torch.distributed.is_initialized()):
        raise ValueError("--group batch is for hard routers in one process: Soft MoE's slots are made for one image")
    return ""


def add_flags(parser, kinds):
    group = parser.add_argument_group("images")
    group.add_argument("--data", help="a CIFAR-layout folder, an .npz, cifar10 or cifar100 (fetched once); none: drawn on the fly")
    group.add_argument("--patch", type=kinds.whole, help="pixels along a patch")
    group.add_argument("--head", choices=("class", "patch"), default="class", help="predict an image's class, or each patch's kind and shape")
    group.add_argument("--group", choices=("image", "batch"), default="image", help="tokens that are routed together")
    group.add_argument("--few-shot", action="store_true", help="on stored images, hold out the last fifth of the classes for the probe")


def load_data(args, device):
    """The images these flags name. Raises ValueError for data that is missing, broken or too small."""
    return Stored(args, device) if args.data else Drawn(args, device)

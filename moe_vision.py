"""A vision transformer with mixture-of-experts blocks, and the images it learns from (2401.15969).

The model is a ViT (2010.11929): pre-LN blocks, learned positions, global average pooling. Some
blocks hold an MoE in place of their FFN, as in V-MoE (2106.05974). A group is an image, a token is
a patch: x [B, T, D] is already [G, T, D].

Images are drawn on the fly (the default), or read from files. ViT, resolve() and Images have their
twins in moe_tokens.py, in the same order: read the two files side by side.
"""

import base64
import functools
import hashlib
import io
import math
import pathlib
import struct
import tarfile
import tempfile
import urllib.request

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from routers import MoE

POSITION_STD = 0.5  # deviation of the positions at the start; patches have entries of about 1

SHAPES = ("disc", "square", "triangle", "cross", "ring", "star")
KINDS = ("background", "edge", "interior")  # of a patch
PATCH_CLASSES = 1 + 2 * len(SHAPES)  # 0 background; of shape s, 2s + 1 edge, 2s + 2 interior

SIZES = {  # the model, then its budget; each entry is a setting of its own
    "tiny": dict(dim=32, depth=4, heads=2, hidden=16, patch=4, experts=8,
                 steps=3200, batch_size=32, lr=1e-2),
    "cifar": dict(dim=48, depth=4, heads=3, hidden=12, patch=4, experts=8, moe_blocks=[0, 1, 2, 3],
                  steps=4000, batch_size=64, lr=4e-3),
    "small": dict(dim=384, depth=12, heads=6, hidden=1536, patch=4, experts=32,
                  steps=10_000, batch_size=512, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, patch=4, experts=32,
                 steps=10_000, batch_size=512, lr=8e-4),
}  # fmt: skip

SETTINGS = {  # as in train.py: name: (type, default, what it is)
    "patch": (int, None, "pixels along a patch"),
    "head": (("class", "patch"), "class", "predict an image's class, or a patch's kind and shape"),
}


# ---------------------------------------------------------------- the model
class Block(nn.Module):
    """Attention, then an FFN or an MoE, each added to its input. Causal in moe_tokens.py alone."""

    def __init__(self, dim, heads, ffn, causal=False):
        super().__init__()
        self.heads, self.ffn, self.causal = heads, ffn, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, run_moe=MoE.__call__):
        """x [B, T, D] -> x, and the Routing of the MoE; an FFN has None.

        run_moe(moe, z) is how the MoE is called: GPT brings its own, for sequences routed whole.
        """
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        z = self.norm2(x)
        if not isinstance(self.ffn, MoE):
            return x + self.ffn(z), None
        y, routing = run_moe(self.ffn, z)
        return x + y, routing


class ViT(nn.Module):
    """images [B, 3, S, S] -> logits and {block: Routing}.

    Logits are [B, classes] of images or, patchwise, [B, T, classes] of patches. Each image is a
    group; hash routes a patch by its position.
    """

    def __init__(self, image_size, patch, dim, heads, ffns, classes, patchwise):
        super().__init__()
        self.patch, self.patchwise = patch, patchwise
        self.embed = nn.Linear(3 * patch**2, dim)
        tokens = (image_size // patch) ** 2
        self.position = nn.Parameter(torch.randn(tokens, dim) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(dim, heads, ffn) for ffn in ffns)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images):
        x, routings = self.encode(images)
        return self.head(x if self.patchwise else x.mean(1)), routings

    def encode(self, images):
        """All but the head: the final features of each patch, [B, T, D], and the routings."""
        x = F.pixel_unshuffle(images, self.patch).flatten(2).mT  # [B, T, 3 * patch^2]
        x = self.embed(x) + self.position
        routings = {}
        for i, block in enumerate(self.blocks):
            x, routing = block(x)
            if routing is not None:
                routings[i] = routing
        return self.norm(x), routings


def resolve(settings, router, overrides):
    """As in moe_tokens.py: fill in settings that follow from others; the label of all results."""
    s = settings
    if s.moe_blocks is None:  # every second block, the last one among them, as in V-MoE
        s.moe_blocks = [block for block in range(s.depth) if (s.depth - block) % 2]
    kind = DATASETS.get(s.data or "drawn", Stored)
    if s.head == "patch" and not issubclass(kind, Drawn):
        raise ValueError("--head patch is for drawn images, whose patches we know; --data has none")
    return ""


# ---------------------------------------------------------------- what train.py asks of images
class Images:
    """A set of images. A subclass brings batch(), split() and these attributes:

    image_size, names  pixels along an image; names of the classes
    mean, std          an image is (pixel - mean) / std, pixels from about 0 to 1
    description        one line on the set

    A batch is {"image": [B, 3, S, S], "label": [B]}; of drawn images also "shape" [B], "kind"
    [B, T] and, if patches are of 4x4 pixels, "tile" [B, T]. batch(step, part) is the slice `part`
    of the step's batch, the same for every run of one seed; batches(split) are those of a split.
    """

    examples = "images"  # the unit of speed
    sign = 1  # -1: of the first column, less is better
    splits = ("validation", "test")  # what is evaluated; the last one is for the table
    examined = "test"  # the split on which experts are examined
    fingerprint = ""  # identifies the data; --resume checks it

    def __init__(self, settings, device):
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.patch, self.device = settings.patch, torch.device(device)

    @property
    def tokens(self):
        return (self.image_size // self.patch) ** 2

    def build(self, settings, make_ffn):
        """The ViT; make_ffn(block) gives each block its FFN or MoE."""
        s, size = settings, self.image_size
        if size % s.patch:
            raise ValueError(f"--patch must divide the image size {size}, got {s.patch}")
        ffns = [make_ffn(block) for block in range(s.depth)]
        patchwise = s.head == "patch"
        classes = PATCH_CLASSES if patchwise else len(self.names)
        return ViT(size, s.patch, s.dim, s.heads, ffns, classes, patchwise)

    def loss(self, model, batch):
        """Mean cross-entropy, counts for metrics() {name: sum over the batch}, the routings."""
        logits, routings = model(batch["image"])
        label, guess, counts = batch["label"], logits.argmax(-1), {}
        if logits.ndim == 3:  # patches
            kind, shape = batch["kind"], batch["shape"][:, None]
            label = torch.where(kind > 0, 2 * shape + kind, 0)  # [B, T], as PATCH_CLASSES says
            for c in range(PATCH_CLASSES):
                counts[f"both{c}"] = ((guess == c) & (label == c)).sum()
                counts[f"either{c}"] = ((guess == c) | (label == c)).sum()
        counts |= {"count": label.numel(), "right": (guess == label).sum()}
        return F.cross_entropy(logits.flatten(0, -2), label.flatten()), counts, routings

    def metrics(self, sums):
        """top1 and, of patches, miou in %. sums: of batches, their counts, and loss times count.

        miou: the mean over classes of intersection over union; a class that is nowhere counts 0.
        """
        found = {"loss": sums["loss"] / sums["count"], "top1": 100 * sums["right"] / sums["count"]}
        if "both0" in sums:
            shares = [sums[f"both{c}"] / max(1, sums[f"either{c}"]) for c in range(PATCH_CLASSES)]
            found["miou"] = 100 * sum(shares) / len(shares)
        return found

    def labels(self, batch, start):
        """What experts may specialize in: {name: (label [B, T], owner [B, T], names of labels)}.

        owner: the image or patch that the label belongs to; by chance (train.py), the routings of
        owners are shuffled. Label -1 is none. `start` images came before this batch.
        """
        B, T = len(batch["image"]), self.tokens
        patch = torch.arange(start * T, (start + B) * T).view(B, T)
        image = torch.arange(start, start + B)[:, None].expand(B, T)
        found = {"class": (batch["label"].cpu()[:, None].expand(B, T), image, self.names)}
        found["position"] = torch.arange(T).expand(B, T), patch, range(T)
        if "kind" in batch:
            found["patch kind"] = batch["kind"].cpu(), patch, KINDS
        if "tile" in batch:
            found["tile"] = batch["tile"].cpu(), patch, range(len(TILES))
        return found

    def report(self, settings, model, untrained):
        """What else the summary says of a model; untrained() makes one like it."""
        return {}

    def columns(self, summary):
        """The table's columns that are this task's own, {name: number or None}; the first ranks."""
        test, dropless = summary["test"], summary.get("test_dropless", {})
        few_shot = summary.get("few_shot", {})
        return {
            "mIoU %": test.get("miou"),
            "top-1 %": test["top1"],
            "dropless %": dropless.get("miou", dropless.get("top1")),
            "10-shot %": few_shot.get("trained"),
            "10-shot, untrained %": few_shot.get("untrained"),
        }

    def notes(self, contingency):
        """What is printed of the experts at the end: nothing of images."""
        return ""

    @torch.no_grad()
    def pictures(self, model, contingency):
        """The report page's part on images, HTML: the patches that each expert likes best."""
        P, image, page = self.patch, next(iter(self.batches("test")))["image"], ""
        pixels = ((image * self.std + self.mean).clamp(0, 1) * 255).round().byte().cpu()
        patches = F.pixel_unshuffle(pixels, P).flatten(2).mT.reshape(-1, 3, P, P)  # [B * T, ...]
        for block, routing in model(image)[1].items():
            page += f"<h3>Block {block}: the patches that each expert weighs most</h3>"
            weights = routing.expert_weights.float().flatten(0, 1).cpu()  # [B * T, E]
            for e, weight in enumerate(weights.T):
                weight, place = weight.sort(descending=True, stable=True)
                liked = patches[place[:16][weight[:16] > 0]]
                page += f"<div>expert {e} {strip(liked, 32)}</div>"
        return page


def load_data(settings, device):
    """The images that --data names. ValueError for data that is missing, broken or too small."""
    return DATASETS.get(settings.data or "drawn", Stored)(settings, device)


# ---------------------------------------------------------------- draws and devices, for all data
def seeded(*key):
    """A generator fixed by its key, as seeded(seed, step, "noise"): one key, the same draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@functools.lru_cache(2)
def order_of_epoch(seed, epoch, count):
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))


def rows_of_step(seed, step, size, count):
    """Which of `count` examples are the batch of a step: epoch by epoch, each in a fresh order."""
    epoch, start = divmod(step * size, count)
    rows = order_of_epoch(seed, epoch, count)[start : start + size]
    return torch.cat([rows, order_of_epoch(seed, epoch + 1, count)[: size - len(rows)]])


def send(tensor, device):
    """The tensor on that device; to a GPU, without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---------------------------------------------------------------- images drawn on the fly
TILE = 4  # pixels along a tile
TILES = torch.randint(2, (256, TILE, TILE), generator=seeded("tiles")) * 2.0 - 1  # dark -1, light 1
# The 64 tiles of each class, [classes, 64].
TILES_OF = torch.rand(24, len(TILES), generator=seeded("owned")).argsort(1)[:, :64]
TRAINED, HELD_OUT = range(18), range(18, 24)  # classes; those held out are for the probe


class Drawn(Images):
    """32x32 images of a shape laid with tiles; the class is the set of tiles to choose from.

    There are 256 tiles, patterns of 4x4 pixels. A class uses 64 of them, the same in every run, and
    a tile serves six classes or so: a class is a bag of visual words. Shape, pose and colors are
    independent of the class. A wider FFN can remember more tiles.
    """

    image_size, mean, std = 32, 0.5, 0.25
    names = [f"class {c}" for c in TRAINED]
    description = f"drawn images, {len(TRAINED)} classes to train, {len(HELD_OUT)} held out"
    fingerprint = "drawn images, version 1"

    def __init__(self, settings, device):
        super().__init__(settings, device)
        self.tiles = TILES.to(self.device, torch.get_default_dtype())

    def batch(self, step, part=slice(None)):
        return self.draw(self.batch_size, TRAINED, "train", step, part=part)

    def batches(self, split):
        """The validation or the test images, 2048 of each, in batches."""
        for i in range(8):
            yield self.draw(256, TRAINED, split, i)

    def report(self, settings, model, untrained):
        """10-shot accuracy in % on the held-out classes, the mean of five draws."""
        found = {}
        for name, reader in ("trained", model), ("untrained", untrained()):
            accuracy = [few_shot(reader, self.draw(1024, HELD_OUT, "probe", i)) for i in range(5)]
            found[name] = float(np.mean(accuracy))
        return {"few_shot": found}

    def draw(self, count, classes, *purpose, part=slice(None)):
        """`count` images of these classes, of which the slice `part` is rendered.

        Random numbers are drawn for all, so that processes agree; on the CPU, so that devices do;
        and in float32, so that a float64 run sees the same images.
        """
        g, S = seeded(self.seed, *purpose), self.image_size
        label = torch.randint(len(classes), (count,), generator=g)
        shape = torch.randint(len(SHAPES), (count,), generator=g)
        pick = torch.randint(TILES_OF.shape[1], (count, (S // TILE) ** 2), generator=g)
        tile = TILES_OF[torch.tensor(classes)[label]].gather(1, pick)  # [B, places]
        look = torch.rand(count, 10, generator=g, dtype=torch.float32)  # 0-3 pose, 4-9 colors
        noise = torch.randn(count, 1, S, S, generator=g, dtype=torch.float32)
        dtype = torch.get_default_dtype()
        drawn = label, shape, tile, look.to(dtype), noise.to(dtype)
        return self.render(*(send(tensor[part], self.device) for tensor in drawn))

    def render(self, label, shape, tile, look, noise):
        """The batch of images that these random numbers stand for."""
        B, S = len(label), self.image_size
        n = S // TILE
        filled = outline(shape, look, S)  # [B, S, S], is a pixel inside?
        laid = self.tiles[tile].view(B, n, n, TILE, TILE)  # n * n tiles
        laid = laid.transpose(2, 3).reshape(B, 1, S, S)  # an image of them
        ground, paint = look[:, 4:7] * 0.5, look[:, 7:10] * 0.5 + 0.5  # the shape is brighter
        figure = paint[..., None, None] * (1 + laid / 3)  # [B, 3, S, S]
        image = torch.where(filled[:, None], figure, ground[..., None, None]) + 0.15 * noise
        covered = F.avg_pool2d(filled[:, None].float(), self.patch).flatten(1)  # [B, T], a share
        kind = (covered > 0).long() + (covered == 1).long()
        image = (image - self.mean) / self.std
        batch = {"image": image, "label": label, "kind": kind, "shape": shape}
        if self.patch == TILE:
            batch["tile"] = torch.where(kind > 0, tile, -1)
        return batch


def outline(shape, look, size):
    """The pixels inside each shape, [B, size, size], turned, scaled and moved as `look` says."""

    def between(i, low, high):
        return (low + (high - low) * look[:, i])[:, None, None]  # [B, 1, 1]; look: from 0 to 1

    axis = torch.arange(size, device=look.device) / ((size - 1) / 2) - 1
    angle, scale = between(0, -math.pi / 12, math.pi / 12), between(1, 0.7, 0.95)
    y = axis[:, None] - between(2, -0.3, 0.3)  # [B, size, 1], it points down
    x = axis - between(3, -0.3, 0.3)  # [B, 1, size]
    u = (angle.cos() * x + angle.sin() * y) / scale  # [B, size, size], the shape's own frame
    v = (angle.cos() * y - angle.sin() * x) / scale
    near, far = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    r, turn = (u * u + v * v).sqrt(), torch.atan2(u, -v)  # turn counts from straight up
    inside = [  # in the order of SHAPES
        r < 0.85,
        far < 0.75,
        torch.maximum(v, 0.87 * u.abs() - 0.5 * v) < 0.5,
        (near < 0.32) & (far < 0.95),
        (r > 0.45) & (r < 0.95),
        r < 0.65 + 0.35 * torch.cos(5 * turn),
    ]
    return torch.stack(inside)[shape, torch.arange(len(shape), device=look.device)]


DATASETS = {"drawn": Drawn}  # names for --data beside OFFICIAL and paths; add your own here


# ---------------------------------------------------------------- images from files
class Stored(Images):
    """Images from a CIFAR folder or an .npz; a tenth of the training part is for validation."""

    def __init__(self, settings, device):
        super().__init__(settings, device)
        (image, label), test, classes = read_images(settings.data)
        self.fingerprint = fingerprint(image, label, *test)
        order = torch.randperm(len(image), generator=seeded("validation split"))  # one for all
        held, kept = order[: len(order) // 10], order[len(order) // 10 :]
        self.stored = {"train": (image[kept], label[kept])}
        self.stored |= {"validation": (image[held], label[held]), "test": test}
        sizes = f"{len(kept)} training, {len(held)} validation and {len(test[0])} test images"
        self.description = f"{pathlib.Path(settings.data).name}: {sizes} of {classes} classes"
        if not len(held) or self.batch_size > len(kept):
            raise ValueError(f"{self.description}: too few for --batch-size {self.batch_size}")
        pixels = self.stored["train"][0].to(torch.get_default_dtype()) / 255
        self.mean = pixels.mean((0, 2, 3))[:, None, None].to(self.device)
        self.std = (pixels.std((0, 2, 3))[:, None, None] + 1e-5).to(self.device)
        self.image_size, self.names = pixels.shape[-1], [f"class {c}" for c in range(classes)]

    def batch(self, step, part=slice(None)):
        """Epoch by epoch in a fresh order; images are shifted by up to an eighth, half flipped."""
        image, label = self.stored["train"]
        rows = rows_of_step(self.seed, step, self.batch_size, len(label))
        S, pad, g = self.image_size, self.image_size // 8, seeded(self.seed, "augment", step)
        shift = torch.randint(2 * pad + 1, (len(rows), 2), generator=g)
        flip = torch.rand(len(rows), generator=g) < 0.5
        rows = rows[part]
        y, x = send(shift[part], self.device).T
        flip = send(flip[part], self.device)[:, None, None, None]
        padded = F.pad(send(image[rows], self.device), (pad,) * 4)  # bytes travel, not floats
        windows = padded.unfold(2, S, 1).unfold(3, S, 1)  # [B, 3, y, x, S, S], a view
        crop = windows[torch.arange(len(rows), device=self.device), :, y, x]  # [B, 3, S, S]
        return self.ready(torch.where(flip, crop.flip(3), crop), label[rows])

    def batches(self, split):
        image, label = self.stored[split]
        for i in range(0, len(label), 256):
            yield self.ready(send(image[i : i + 256], self.device), label[i : i + 256])

    def ready(self, image, label):
        """The batch of images [B, 3, S, S] uint8 on the device."""
        image = image.to(self.mean.dtype) / 255
        return {"image": (image - self.mean) / self.std, "label": send(label, self.device)}


def read_images(data):
    """(images [N, 3, S, S] uint8, labels [N]) of training, those of test, the number of classes."""
    try:
        path = download(data) if data in OFFICIAL else pathlib.Path(data)
        parts, classes = read_cifar(path) if path.is_dir() else read_npz(path)
        found, S = [], parts[0][0].shape[-1]
        for x, y in parts:
            if x.dtype != np.uint8 or x.shape[1:] != (3, S, S) or y.shape != (len(x),):
                raise ValueError(f"images are {x.dtype} {x.shape} and labels {y.shape}")
            if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
                raise ValueError(f"{y.dtype} labels {y.min()} to {y.max()}, of {classes} classes")
            images = torch.from_numpy(np.ascontiguousarray(x))
            found.append((images, torch.from_numpy(y.astype(np.int64))))
    except Exception as error:  # a broken file or connection has a dozen kinds
        rule = "data_batch_*.bin and test_batch.bin, or train.bin and test.bin, or an .npz of uint8"
        rule += " images [N, S, S, 3] and labels: x_train, y_train, x_test, y_test"
        raise ValueError(f"cannot read images from {data}: {error}; it must hold {rule}") from None
    return *found, classes


def read_cifar(folder):
    """The parts of read_images(). A record: a coarse label (CIFAR-100 alone), a label, pixels."""
    parts, coarse = [], int((folder / "train.bin").exists())  # else CIFAR-10
    for name in ("train.bin", "test.bin") if coarse else ("data_batch_*.bin", "test_batch.bin"):
        raw = np.concatenate([np.fromfile(file, np.uint8) for file in sorted(folder.glob(name))])
        records = raw.reshape(-1, coarse + 1 + 3 * 32 * 32)
        parts.append((records[:, coarse + 1 :].reshape(-1, 3, 32, 32), records[:, coarse]))
    return parts, 100 if coarse else 10


def read_npz(path):
    parts = []
    with np.load(path, allow_pickle=False) as archive:  # a pickle could run code
        for part in "train", "test":
            x, y = archive[f"x_{part}"], archive[f"y_{part}"]
            parts.append((x.transpose(0, 3, 1, 2), y.reshape(-1)))
    return parts, int(parts[0][1].max()) + 1


def fingerprint(*arrays):
    """A text of their lengths, and of a hash of at most 10 million values of each."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.asarray(array).reshape(-1)
        digest.update(values[:: 1 + len(values) // 10_000_000].tobytes())
    lengths = " + ".join(str(len(array)) for array in arrays)
    return f"{lengths}, sha256 {digest.hexdigest()[:16]}"


TORONTO = "https://www.cs.toronto.edu/~kriz"
OFFICIAL = {  # name: where the official binary archive lies, and its md5
    "cifar10": (f"{TORONTO}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": (f"{TORONTO}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}


def download(name):
    """The folder of an official archive, fetched once and held against its md5."""
    url, md5 = OFFICIAL[name]
    folder = pathlib.Path("data", name)
    if folder.is_dir():
        return folder
    with urllib.request.urlopen(url, timeout=30) as reply:
        archive = reply.read()
    if hashlib.md5(archive).hexdigest() != md5:
        raise ValueError(f"{url} is cut short or changed: its md5 is not {md5}")
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="data") as fresh:  # so the folder is whole, or not there
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(fresh, filter="data")
        if not folder.is_dir():  # else another process was first
            next(pathlib.Path(fresh).iterdir()).rename(folder)
    return folder


# ---------------------------------------------------------------- the few-shot probe
@torch.no_grad()
def few_shot(model, batch, shots=10):
    """Accuracy in % of ridge regression on a ViT's features, fitted to `shots` of each class."""
    label = batch["label"]
    nth = F.one_hot(label).cumsum(0).gather(1, label[:, None])[:, 0]  # of its class, from 1
    parts = []
    for rows in nth <= shots, nth > shots:
        images = batch["image"][rows].split(256)
        features = [model.encode(some)[0].mean(1).cpu() for some in images]
        parts.append((torch.cat(features), label[rows].cpu()))
    return 100 * ridge_accuracy(*parts)


def ridge_accuracy(support, query):
    """Accuracy of closed-form ridge regression; support, query: (features [N, D], labels [N]).

    As in V-MoE: features are standardized by the support set, a constant is appended, targets are
    -1 and 1. Differs: the penalty, of 2^-10 .. 2^19, has the least leave-one-out error on the
    support set, residual / (1 - leverage); V-MoE chooses it on the query sets.
    """
    (x, y), (z, truth) = support, query
    mean, std = x.double().mean(0), x.double().std(0) + 1e-5
    # The constant is 100, so its weight is small and hardly penalized.
    x, z = (F.pad((part.double() - mean) / std, (0, 1), value=100.0) for part in (x, z))
    targets = F.one_hot(y).double() * 2 - 1
    value, vector = torch.linalg.eigh(x @ x.T)  # [N], [N, N]
    errors = {}
    for penalty in 2.0 ** np.arange(-10, 20):
        hat = (vector * (value / (value + penalty))) @ vector.T  # what it predicts: hat @ targets
        residual = (targets - hat @ targets) / (1 - hat.diagonal()[:, None])
        errors[penalty] = float(residual.square().sum())
    best = min(errors, key=errors.get)
    scores = z @ (x.T @ ((vector / (value + best)) @ (vector.T @ targets)))
    return (scores.argmax(1) == truth).double().mean().item()


# ---------------------------------------------------------------- pictures
def strip(images, width):
    """HTML: images [B, 3, S, S] uint8 as BMP files in a row, each `width` screen pixels wide."""
    page, style = "", f"width:{width}px;margin:1px;vertical-align:middle;image-rendering:pixelated"
    S = images.shape[-1]  # -S: the first row is on top
    head = struct.pack("<2s4I2i2H6I", b"BM", 54 + 4 * S * S, 0, 54, 40, S, -S, 1, 32, *[0] * 6)
    pixels = F.pad(images.flip(1), (0, 0, 0, 0, 0, 1), value=255)  # blue, green, red, opaque
    for image in pixels.permute(0, 2, 3, 1).numpy():
        source = base64.b64encode(head + image.tobytes()).decode()
        page += f'<img style="{style}" src="data:image/bmp;base64,{source}">'
    return page

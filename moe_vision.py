"""A vision transformer with mixture-of-experts blocks, and the images it learns from (2401.15969).

The model is a ViT (2010.11929): pre-LN blocks, learned positions, global average pooling. Some
blocks hold an MoE in place of their FFN, as in V-MoE (2106.05974). A group is an image, a token is
a patch: x [B, T, D] is already [G, T, D].

Images are drawn on the fly (the default), or read from a folder in the CIFAR binary layout, from an
.npz, or from the official CIFAR archives, which are fetched once. Block, ViT and Images have their
twins in moe_tokens.py: read the two files side by side.
"""

import base64
import hashlib
import http.client
import io
import math
import pathlib
import struct
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from routers import MoE, color, rows_of_step, seeded, send

UNIT = "images"  # speed is told in these per second
SPLITS = ("validation", "test")  # what is evaluated; the last one is for the table
EXAMINED = "test"  # the split on which experts are examined
MORE_IS_BETTER = True  # is a larger number better in the first of columns()?
POSITION_STD = 0.5  # deviation of the positions at the start; patches have entries of about 1

SHAPES = ("disc", "square", "triangle", "cross", "ring", "star")
KINDS = ("background", "edge", "interior")  # of a patch
PATCH_CLASSES = 1 + 2 * len(SHAPES)  # 0 background; of shape s, 2s + 1 edge, 2s + 2 interior

SIZES = {  # the model, then its budget; each entry is a setting of its own
    "tiny": dict(dim=32, depth=4, heads=2, hidden=16, patch=4, experts=8,
                 steps=3200, batch_size=32, lr=1e-2),
    "small": dict(dim=384, depth=12, heads=6, hidden=1536, patch=4, experts=32,
                  steps=10_000, batch_size=512, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, patch=4, experts=32,
                 steps=10_000, batch_size=512, lr=8e-4),
}  # fmt: skip

SETTINGS = {  # as in train.py: name: (kind, default, what it is)
    "patch": ("whole", None, "pixels along a patch"),
    "head": (("class", "patch"), "class", "predict an image's class, or a patch's kind and shape"),
    "group": (("image", "batch"), "image", "tokens that are routed together"),
    "few_shot": (bool, False, "stored images: hold out a fifth of the classes for the probe"),
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
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class ViT(nn.Module):
    """images [B, 3, S, S] -> logits and {block: Routing}.

    Logits are [B, classes] of images or, patchwise, [B, T, classes] of patches. together: all
    patches of the batch are one group.
    """

    def __init__(self, image_size, patch, dim, heads, feeds, classes, patchwise, together):
        super().__init__()
        self.patch, self.patchwise, self.together = patch, patchwise, together
        self.embed = nn.Linear(3 * patch**2, dim)
        tokens = (image_size // patch) ** 2
        self.position = nn.Parameter(torch.randn(tokens, dim) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(dim, heads, feed) for feed in feeds)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images):
        x, routings = self.encode(images)
        return self.head(x if self.patchwise else x.mean(1)), routings

    def features(self, images):
        """What a classifier's head reads, [B, D]."""
        return self.encode(images)[0].mean(1)

    def encode(self, images):
        """All but the head: the final features of each patch, [B, T, D], and the routings."""
        x = F.pixel_unshuffle(images, self.patch).flatten(2).mT  # [B, T, 3 * patch^2]
        x = self.embed(x) + self.position
        routings = {}
        for i, block in enumerate(self.blocks):
            x = x + block.attend(x)
            y, routing = self.feed_step(block, x)
            x = x + y
            if routing is not None:
                routings[i] = routing
        return self.norm(x), routings

    def feed_step(self, block, x):
        """What the block's FFN or MoE adds to x [B, T, D], and its Routing; an FFN has none."""
        z = block.norm2(x)
        if not isinstance(block.feed, MoE):
            return block.feed(z), None
        if not self.together:
            return block.feed(z)  # with its Routing
        position = torch.arange(x.shape[1], device=x.device).repeat(1, len(x))  # hash's keys
        y, routing = block.feed(z.flatten(0, 1)[None], position)
        return y.view_as(x), routing


def moe_blocks(depth):
    """every second block, the last one among them (V-MoE)"""
    return [block for block in range(depth) if (depth - block) % 2]


def settle(settings, router, said):
    """ValueError where settings clash. Returns the remark beside every result: none on images.

    `router` and `said` are for moe_tokens.py: images may be routed in any way.
    """
    kind = DATASETS.get(settings.data or "drawn", Stored)
    drawn = issubclass(kind, Drawn)
    if settings.head == "patch" and not drawn:
        raise ValueError("--head patch is for drawn images, whose patches we know; --data has none")
    if settings.few_shot and drawn:
        rule = f"of those drawn on the fly, {len(HELD_OUT)} classes are always held out"
        raise ValueError(f"--few-shot is for stored images; {rule}")
    if settings.group == "batch" and torch.distributed.is_initialized():
        raise ValueError("--group batch routes the batch as one group; it runs in one process")
    return ""


def unused(settings):
    """{setting: why it has no effect beside the others}."""
    if settings.router == "dense":
        return {"group": "--group is for routers; --router dense has none"}
    if settings.router == "soft":
        return {"group": "--group batch does not fit Soft MoE, whose slots are for one image"}
    return {}


# ---------------------------------------------------------------- what train.py asks of images
class Images:
    """A set of images. A subclass brings batch(), split(), probe() and these attributes:

    image_size        pixels along an image
    names             of the classes
    few_shot_classes  those held out for the probe
    about             one line on the set
    mean, std         an image is (pixel - mean) / std, pixels from 0 to 1; or override pixels()

    A batch is {"image": [B, 3, S, S], "label": [B]}; of drawn images also "shape" [B], "kind"
    [B, T] and, where a patch is a tile, "tile" [B, T]. batch(step, part) gives the slice `part` of
    the step's batch, the same for every run of one seed; split(name) the batches of one of SPLITS.
    """

    few_shot_classes = ()

    def __init__(self, settings, device):
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.patch, self.device = settings.patch, torch.device(device)

    @property
    def tokens(self):
        """Patches of an image."""
        return (self.image_size // self.patch) ** 2

    def build(self, settings, make_feed):
        """The ViT; make_feed(block) gives each block its FFN or MoE."""
        s, size = settings, self.image_size
        if size % s.patch:
            got = f"--patch {s.patch} and images of {size} pixels"
            raise ValueError(f"--patch must divide the image size, got {got}")
        feeds = [make_feed(block) for block in range(s.depth)]
        patchwise, together = s.head == "patch", s.group == "batch"
        classes = PATCH_CLASSES if patchwise else len(self.names)
        return ViT(size, s.patch, s.dim, s.heads, feeds, classes, patchwise, together)

    def loss(self, model, batch):
        """Mean cross-entropy, counts for metrics() {name: sum over the batch}, the routings."""
        logits, routings = model(batch["image"])
        label, guess, counts = batch["label"], logits.argmax(-1), {}
        if logits.ndim == 3:  # patches
            kind, shape = batch["kind"], batch["shape"][:, None]
            label = torch.where(kind > 0, 2 * shape + kind, 0)  # [B, T], see PATCH_CLASSES
            for c in range(PATCH_CLASSES):
                counts[f"both{c}"] = ((guess == c) & (label == c)).sum()
                counts[f"either{c}"] = ((guess == c) | (label == c)).sum()
        counts |= {"count": label.numel(), "right": (guess == label).sum()}
        return F.cross_entropy(logits.flatten(0, -2), label.flatten()), counts, routings

    def metrics(self, sums):
        """What is reported, from summed counts and the summed loss.

        top1 in %; of patches also miou in %, the mean over classes of intersection over union; a
        class that occurs nowhere counts 0.
        """
        found = {"loss": sums["loss"] / sums["count"], "top1": 100 * sums["right"] / sums["count"]}
        if "both0" in sums:
            classes = range(PATCH_CLASSES)
            shares = [sums[f"both{c}"] / max(1, sums[f"either{c}"]) for c in classes]
            found["miou"] = 100 * sum(shares) / len(shares)
        return found

    def labels(self, batch, start):
        """What an expert's choice may go by: {name: (label [B, T], owner [B, T], names of labels)}.

        owner: the number of the image or patch that a label is of; its tokens share one label, also
        when labels are shuffled. Label -1 is none. `start` images came before.
        """
        B, T = len(batch["image"]), self.tokens
        patch = torch.arange(start * T, (start + B) * T).view(B, T)
        image = torch.arange(start, start + B)[:, None].expand(B, T)
        found = {"class": (batch["label"].cpu()[:, None].expand(B, T), image, self.names)}
        found["position"] = torch.arange(T).expand(B, T), patch, range(T)
        if "kind" in batch:
            found["patch kind"] = batch["kind"].cpu(), patch, KINDS
            found["shape"] = batch["shape"].cpu()[:, None].expand(B, T), image, SHAPES
        if "tile" in batch:
            found["tile"] = batch["tile"].cpu(), patch, range(len(TILES))
        return found

    @torch.no_grad()
    def report(self, settings, model, fresh, draws=5):
        """10-shot accuracy in % on the held-out classes, [mean, deviation] over draws of the probe.

        Of the model, of an untrained one, fresh(), and of the raw pixels.
        """
        if not self.few_shot_classes:
            return {}
        readers = {"few_shot": model.features, "few_shot_untrained": fresh().features}
        readers["few_shot_pixels"] = nn.Flatten()
        found = {}
        for name, read in readers.items():
            accuracy = []
            for draw in range(draws):
                parts = []
                for image, label in self.probe(draw):
                    features = torch.cat([read(some) for some in image.split(256)])
                    parts.append((features.cpu(), label.cpu()))
                accuracy.append(100 * ridge_accuracy(*parts))
            found[name] = [float(np.mean(accuracy)), float(np.std(accuracy, ddof=1))]
        return found

    def files(self):
        """What a run folder keeps of its data, {file name: content}."""
        return {}

    def tell(self, model, joints):
        """What is printed of the experts at the end; joints, for moe_tokens.py, is unused."""
        return ""

    @torch.no_grad()
    def pictures(self, model, joints):
        """The report page's part on images: HTML."""
        routings = model(next(iter(self.split("test")))["image"][:1])[1]
        if not routings:
            return ""
        heads = "".join(f"<th>block {block}</th>" for block in routings)
        picture = base64.b64encode(png(self.mosaic(model))).decode()
        E = len(next(iter(routings.values())).load)
        return (
            "<h2>Test images, and their patches coloured by expert</h2>"
            f"<p>{swatches(E)}</p><table class=mosaic><tr><th>image</th>{heads}</tr><tr>"
            f'<td colspan={1 + len(routings)}><img src="data:image/png;base64,{picture}"></td>'
            "</tr></table>"
        )

    @torch.no_grad()
    def mosaic(self, model, count=8):
        """Pixels [H, W, 3]: a row for each test image, beside it its patches block by block.

        A patch has the colour of the expert that weighs most in it, grey if none took it.
        """
        images = next(iter(self.split("test")))["image"][:count]
        n = self.image_size // self.patch
        strips = [stacked(self.pixels(images))]
        for routing in model(images)[1].values():
            mass = routing.mass().cpu()
            E = mass.shape[-1]
            expert = torch.where(mass.sum(-1) > 0, mass.argmax(-1), E).view(len(images), n, n)
            palette = np.array([color(e, E) for e in range(E + 1)], np.uint8)
            strips.append(stacked(palette[expert.numpy()]))
        return np.concatenate(strips, 1)

    def pixels(self, image):
        """Images as the model sees them -> what an eye sees, [B, S, S, 3] uint8."""
        shown = ((image * self.std + self.mean).clamp(0, 1) * 255).byte()
        return shown.permute(0, 2, 3, 1).cpu().numpy()


def columns(summary):
    """The table's columns that are this task's own: {name: number, (mean, deviation) or None}."""
    test, dropless = summary["test"], summary.get("test_dropless", {})
    found = {"top-1 %": test["top1"]}
    if "miou" in test:
        found = {"mIoU %": test["miou"], "patches right %": test["top1"]}
    found["dropless %"] = dropless.get("miou", dropless.get("top1"))
    for name, key in ("10-shot %", "few_shot"), ("untrained", "few_shot_untrained"):
        found[name] = tuple(summary[key]) if key in summary else None
    return found


def load(settings, device, folder=None):
    """The images that --data names. ValueError for data that is missing, broken or too small."""
    return DATASETS.get(settings.data or "drawn", Stored)(settings, device)


# ---------------------------------------------------------------- images drawn on the fly
TILE = 4  # pixels along a tile
TILES = torch.randint(2, (256, TILE, TILE), generator=seeded("tiles")) * 2.0 - 1  # dark -1, light 1
# The 64 tiles of each class, [classes, 64].
TILES_OF = torch.rand(24, len(TILES), generator=seeded("owned")).argsort(1)[:, :64]
TRAINED, HELD_OUT = range(18), range(18, 24)  # classes; those held out are for the probe


def inside(u, v, r, angle):
    """The points that each of SHAPES covers; v points down, angle counts from straight up."""
    near, far = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    return [
        r < 0.85,  # disc
        far < 0.75,  # square
        torch.maximum(v, 0.87 * u.abs() - 0.5 * v) < 0.5,  # triangle
        (near < 0.32) & (far < 0.95),  # cross
        (r > 0.45) & (r < 0.95),  # ring
        r < 0.65 + 0.35 * torch.cos(5 * angle),  # star
    ]


class Drawn(Images):
    """32x32 images of a shape laid with tiles; the class is the set of tiles to choose from.

    There are 256 tiles, patterns of 4x4 pixels. A class uses 64 of them, the same in every run, and
    a tile serves six classes or so: a class is a bag of visual words. Shape, pose and colours tell
    nothing of it. A wider FFN can remember more tiles. Parameters are drawn on the CPU, so that one
    seed is one set of images on every device.
    """

    image_size, mean, std = 32, 0.5, 0.25
    names = [f"class {c}" for c in TRAINED]
    few_shot_classes = HELD_OUT
    about = f"drawn images, {len(TRAINED)} classes to train, {len(HELD_OUT)} held out"

    def batch(self, step, part=slice(None)):
        return self.draw(self.batch_size, TRAINED, "train", step, part=part)

    def split(self, name):
        """The validation or the test images, 2048 of each, in batches."""
        for i in range(8):
            yield self.draw(256, TRAINED, name, i)

    def probe(self, draw, shots=10):
        """(images, labels) twice: `shots` of each held-out class, and others to be classified."""
        batch = self.draw(1024, HELD_OUT, "probe", draw)
        image, label = batch["image"], batch["label"]
        return [(image[rows], label[rows]) for rows in pick_shots(label, shots)]

    def draw(self, count, classes, *purpose, part=slice(None)):
        """`count` images of these classes; all are drawn, but only `part` is rendered."""
        g = seeded(self.seed, *purpose)
        label = torch.randint(len(classes), (count,), generator=g)
        shape = torch.randint(len(SHAPES), (count,), generator=g)
        S = self.image_size
        pick = torch.randint(TILES_OF.shape[1], (count, (S // TILE) ** 2), generator=g)
        tile = TILES_OF[torch.tensor(classes)[label]].gather(1, pick)  # [B, places]
        look = torch.rand(count, 10, generator=g, dtype=torch.float32)  # 0-3 pose, 4-9 colours
        noise = torch.randn(count, 1, S, S, generator=g, dtype=torch.float32)
        dtype = torch.get_default_dtype()  # float32 above: so all types have the same images
        drawn = label, shape, tile, look.to(dtype), noise.to(dtype)
        return self.render(*(send(tensor[part], self.device) for tensor in drawn))

    def render(self, label, shape, tile, look, noise):
        def between(i, low, high):
            return (low + (high - low) * look[:, i])[:, None, None]  # [B, 1, 1]

        B, S = len(label), self.image_size
        n = S // TILE
        axis = torch.arange(S, device=label.device) / ((S - 1) / 2) - 1
        angle, size = between(0, -math.pi / 12, math.pi / 12), between(1, 0.7, 0.95)
        y = axis[:, None] - between(2, -0.3, 0.3)  # [B, S, 1]
        x = axis - between(3, -0.3, 0.3)  # [B, 1, S]
        u = (angle.cos() * x + angle.sin() * y) / size  # [B, S, S], the shape's own frame
        v = (angle.cos() * y - angle.sin() * x) / size
        r = (u * u + v * v).sqrt()
        each = torch.arange(B, device=label.device)
        filled = torch.stack(inside(u, v, r, torch.atan2(u, -v)))[shape, each]  # [B, S, S]
        laid = TILES.to(noise)[tile].view(B, n, n, TILE, TILE).transpose(2, 3).reshape(B, 1, S, S)
        ground, colour = look[:, 4:7] * 0.5, look[:, 7:10] * 0.5 + 0.5  # the shape is brighter
        figure = colour[..., None, None] * (1 + laid / 3)  # [B, 3, S, S]
        image = torch.where(filled[:, None], figure, ground[..., None, None]) + 0.15 * noise
        covered = F.avg_pool2d(filled[:, None].float(), self.patch).flatten(1)  # [B, T], a share
        kind = (covered > 0).long() + (covered == 1).long()
        image = (image - self.mean) / self.std
        batch = {"image": image, "label": label, "kind": kind, "shape": shape}
        if self.patch == TILE:
            batch["tile"] = torch.where(kind > 0, tile, -1)
        return batch


def pick_shots(label, shots):
    """Which of these are the first `shots` of each class, and which are the others."""
    place = F.one_hot(label).cumsum(0).gather(1, label[:, None])[:, 0]  # in its class, from 1
    return place <= shots, place > shots


DATASETS = {"drawn": Drawn}  # names for --data beside OFFICIAL and paths; add your own here


# ---------------------------------------------------------------- images from files
class Stored(Images):
    """Images from a CIFAR folder or an .npz; a tenth of the training part is for validation."""

    def __init__(self, settings, device):
        super().__init__(settings, device)
        path = download(settings.data) if settings.data in OFFICIAL else pathlib.Path(settings.data)
        train, test, count = read_images(path)
        known = count - round(count * 0.2) if settings.few_shot else count
        if settings.few_shot and count - known < 2:
            rule = "--few-shot holds out a fifth of the classes, at least 2"
            raise ValueError(f"{rule}; {path} has {count} classes")
        self.few_shot_classes = range(known, count)
        self.divide(train, test, known)
        if settings.few_shot and self.pool[1].bincount(minlength=count - known).min() <= 10:
            rule = "--few-shot needs more than 10 images of each held-out class"
            raise ValueError(f"{rule}; {path} has no more")
        sizes = {name: len(label) for name, (_, label) in self.parts.items()}
        for name, size in sizes.items():
            if not size:
                raise ValueError(f"{path}: the {name} part is empty")
        if self.batch_size > sizes["train"]:
            larger = f"--batch-size {self.batch_size} is larger than the data"
            raise ValueError(f"{larger}: {sizes['train']} training images")
        pixels = self.parts["train"][0].to(torch.get_default_dtype()) / 255
        self.mean = pixels.mean((0, 2, 3))[:, None, None].to(self.device)
        self.std = (pixels.std((0, 2, 3))[:, None, None] + 1e-5).to(self.device)
        self.image_size = pixels.shape[-1]
        self.names = [f"class {c}" for c in range(known)]
        counted = ", ".join(f"{size} {name}" for name, size in sizes.items())
        self.about = f"{path.resolve().name}: {counted} images, {known} classes"

    def divide(self, train, test, known):
        """Fill self.parts, and self.pool with the images of classes from `known` on."""
        order = torch.randperm(len(train[0]), generator=seeded("validation split"))  # one for all
        image, label = train[0][order], train[1][order]
        tenth = len(image) // 10
        validation = image[:tenth], label[:tenth]
        parts = {"train": (image[tenth:], label[tenth:]), "validation": validation, "test": test}
        self.parts = {name: (x[y < known], y[y < known]) for name, (x, y) in parts.items()}
        image, label = torch.cat([image, test[0]]), torch.cat([label, test[1]])
        self.pool = image[label >= known], label[label >= known] - known

    def batch(self, step, part=slice(None)):
        """Epoch by epoch in a fresh order; images are shifted by up to an eighth, half flipped."""
        image, label = self.parts["train"]
        rows = rows_of_step(self.seed, step, self.batch_size, len(label))
        S, pad, g = self.image_size, self.image_size // 8, seeded(self.seed, "augment", step)
        shift = torch.randint(2 * pad + 1, (len(rows), 2), generator=g)
        flip = torch.rand(len(rows), generator=g) < 0.5
        rows, shift, flip = rows[part], shift[part], flip[part]
        crops = []
        for padded, (y, x), mirrored in zip(F.pad(image[rows], (pad,) * 4), shift.tolist(), flip):
            crop = padded[:, y : y + S, x : x + S]
            crops.append(crop.flip(2) if mirrored else crop)
        return self.ready(torch.stack(crops), label[rows])

    def split(self, name):
        image, label = self.parts[name]
        for i in range(0, len(label), 256):
            yield self.ready(image[i : i + 256], label[i : i + 256])

    def probe(self, draw, shots=10):
        """(images, labels) twice: `shots` of each class, and at most 1024 others to classify."""
        image, label = self.pool
        order = torch.randperm(len(label), generator=seeded(self.seed, "probe", draw))
        support, others = pick_shots(label[order], shots)
        picked = order[support], order[others][:1024]
        batches = [self.ready(image[rows], label[rows]) for rows in picked]
        return [(batch["image"], batch["label"]) for batch in batches]

    def ready(self, image, label):
        image = send(image, self.device).to(self.mean.dtype) / 255  # bytes travel, not floats
        return {"image": (image - self.mean) / self.std, "label": send(label, self.device)}


def read_images(path):
    """(images [N, 3, S, S] uint8, labels [N]) of training and test, and the number of classes."""
    if path.is_file():
        return read_npz(path)
    if not path.is_dir():
        raise ValueError(f"no such data: {path}")
    train = sorted(path.glob("data_batch_*.bin")) or [path / "train.bin"]
    test = path / ("test.bin" if train[0].name == "train.bin" else "test_batch.bin")
    for file in [*train, test]:
        if not file.is_file():
            rule = "it needs data_batch_*.bin and test_batch.bin, or train.bin and test.bin"
            raise ValueError(f"{path} lacks {file.name}; {rule}")
    images, labels, classes = read_cifar(train)
    test_images, test_labels, _ = read_cifar([test])
    return (images, labels), (test_images, test_labels), classes


def read_cifar(files):
    """Images [N, 3, 32, 32], labels [N] and the class count of .bin files in the CIFAR layout.

    A record is the label, one byte, and 3072 bytes of pixels; in CIFAR-100's train.bin and test.bin
    a coarse label stands before the fine one.
    """
    coarse = int(files[0].name in ("train.bin", "test.bin"))  # bytes before the label proper
    size, classes, records = 3073 + coarse, 100 if coarse else 10, []
    for file in files:
        raw = torch.from_numpy(np.fromfile(file, np.uint8))
        if not len(raw) or len(raw) % size:
            rule = f"not a whole number of records of {size} bytes"
            raise ValueError(f"{file} holds {len(raw)} bytes, {rule}")
        records.append(raw.view(-1, size))
    records = torch.cat(records)
    images, labels = records[:, coarse + 1 :].reshape(-1, 3, 32, 32), records[:, coarse].long()
    if labels.max() >= classes:
        rule = f"labels of this layout are below {classes}"
        raise ValueError(f"{files[0].parent} has a label {labels.max()}; {rule}")
    return images, labels, classes


def read_npz(path):
    """x_train, y_train, x_test, y_test of an .npz, as read_images gives them; never a pickle."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz archive; for text say --task tokens")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in keys if key in archive}
    except Exception as error:  # numpy reports a broken archive by a dozen exceptions
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read {path}: {why}") from None
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(keys)}")
    train, test = (check_images(path, part, arrays) for part in ("train", "test"))
    most = min(int(train[1].max()), 65535)  # a larger label is a mistake, not that many classes
    for _, labels in train, test:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > most:
            rule = f"but training knows 0 to {most}"
            raise ValueError(f"{path} has labels out of range: {low} to {high}, {rule}")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"{path}: training and test images differ in size")
    return train, test, most + 1


def check_images(path, part, arrays):
    """The images and labels of one part of an .npz. ValueError for another shape or type."""
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    square = x.ndim == 4 and x.shape[3] == 3 and x.shape[1] == x.shape[2] > 0 and len(x) > 0
    if x.dtype != np.uint8 or not square:
        rule, got = "square uint8 images [N, S, S, 3]", f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"{path}: x_{part} must be {rule}, got {got}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.reshape(-1)
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        rule, got = f"{len(x)} whole numbers", f"{y.dtype} {list(y.shape)}"
        raise ValueError(f"{path}: y_{part} must be {rule}, got {got}")
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(y.astype(np.int64))


TORONTO = "https://www.cs.toronto.edu/~kriz"
OFFICIAL = {  # name: where the official binary archive lies, and its md5
    "cifar10": (f"{TORONTO}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": (f"{TORONTO}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}


def download(name, root="data"):
    """Fetch an official archive once, check its md5, unpack it; returns the files' folder."""
    url, md5 = OFFICIAL[name]
    folder = pathlib.Path(root, name)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            archive = reply.read()
        digest = hashlib.md5(archive).hexdigest()
        if digest != md5:
            raise ValueError(f"{url} has md5 {digest}, not {md5}: cut short or changed")
        with tempfile.TemporaryDirectory(dir=root) as mine:  # many processes may fetch it at once
            with tarfile.open(fileobj=io.BytesIO(archive)) as members:
                members.extractall(mine, filter="data")  # refuses what would lie outside
            files = sorted(pathlib.Path(mine).rglob("*.bin"))
            if not files:
                raise ValueError(f"{url} holds no .bin file")
            if not folder.is_dir():  # else another process was first
                files[0].parent.rename(folder)
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        raise ValueError(f"cannot fetch {url}: {error}") from None
    return folder


# ---------------------------------------------------------------- the few-shot probe
def ridge_accuracy(support, query):
    """Accuracy of closed-form ridge regression; support, query: (features [N, D], labels [N]).

    As in V-MoE: features are standardised by the support set, a constant is appended, targets are
    -1 and 1. Differs: the penalty, of 2^-10 .. 2^19, has the least leave-one-out error on the
    support set, residual / (1 - leverage); V-MoE chooses it on the query sets.
    """
    (x, y), (z, truth) = support, query
    mean, std = x.double().mean(0), x.double().std(0) + 1e-5
    # So large a constant that the penalty hardly touches its weight.
    x = F.pad((x.double() - mean) / std, (0, 1), value=100.0)
    z = F.pad((z.double() - mean) / std, (0, 1), value=100.0)
    targets = F.one_hot(y).double() * 2 - 1
    value, vector = torch.linalg.eigh(x @ x.T)  # [N], [N, N]
    errors = {}
    for penalty in 2.0 ** np.arange(-10, 20):
        hat = (vector * (value / (value + penalty))) @ vector.T
        residual = (targets - hat @ targets) / (1 - hat.diagonal()[:, None])
        errors[penalty] = float(residual.square().sum())
    best = min(errors, key=errors.get)
    scores = z @ (x.T @ (vector / (value + best) @ (vector.T @ targets)))
    return (scores.argmax(1) == truth).double().mean().item()


# ---------------------------------------------------------------- pictures
def stacked(images, side=112, margin=4):
    """Images [N, S, S, 3] one below the other, each `side` pixels wide in a white frame."""
    nearest = np.arange(side) * images.shape[1] // side
    space = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    images = np.pad(images[:, nearest][:, :, nearest], space, constant_values=255)
    return np.concatenate(images)


def swatches(num_experts):
    """A legend in HTML: each expert's number on its colour, and the grey of no expert."""
    names = [f"expert {e}" for e in range(num_experts)] + ["no expert"]
    marks = []
    for e, name in enumerate(names):
        rgb = color(e, num_experts)
        marks.append(f'<span style="background:rgb{rgb}">&nbsp;{name}&nbsp;</span>')
    return " ".join(marks)


def png(pixels):
    """The bytes of a PNG of pixels [H, W, 3] uint8."""
    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    found = b"\x89PNG\r\n\x1a\n"
    for kind, body in (b"IHDR", head), (b"IDAT", rows), (b"IEND", b""):
        checksum = zlib.crc32(kind + body)
        found += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return found

"""A vision transformer with mixture-of-experts blocks, and the images it learns from (2401.15969's side of the set).

The model is a ViT (2010.11929): pre-LN blocks, learned positions, global average pooling. Some blocks hold an MoE in
place of their FFN, as in V-MoE (2106.05974). A group is an image, a token a patch: x [B, T, D] is already [G, T, D].

Data comes in three kinds behind the same three methods (batch, split, probe): images drawn on the fly (the default), a
folder in the CIFAR binary layout or an .npz, and the official CIFAR archives, fetched once.
train.py uses add_flags, defaults, load_data, build_model, loss and report; moe_tokens.py offers it the same ones.
"""
import hashlib
import math
import os
import pathlib
import tarfile
import urllib.request
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from routers import Experts, MoE, build_router, seeded

UNIT = "images"  # what examples/s counts
SIZES = {  # model and budget; every entry has a flag of its own
    "tiny": dict(dim=64, depth=4, heads=4, hidden=256, patch=4, experts=8, steps=600, batch_size=128, lr=3e-3),
    "small": dict(dim=384, depth=12, heads=6, hidden=1536, patch=4, experts=32, steps=10_000, batch_size=512, lr=1e-3),
    "base": dict(dim=768, depth=12, heads=12, hidden=3072, patch=4, experts=32, steps=10_000, batch_size=512, lr=8e-4),
}
ROUTER_DEFAULTS = {  # where the vision study's practice differs from build_router's defaults (V-MoE's configs)
    "token_choice": dict(priority="choice", noise_std=1.0, balance="vmoe"),
}


# ---------------------------------------------------------------- the model
class Block(nn.Module):
    """x + attention(norm(x)), then x + FFN or MoE(norm(x)); both steps keep [B, T, D]."""

    def __init__(self, dim, heads, feed):
        super().__init__()
        self.heads, self.feed = heads, feed
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, D/heads]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        if isinstance(self.feed, MoE):
            y, routing = self.feed(self.norm2(x))
            return x + y, routing
        return x + self.feed(self.norm2(x)), None


class ViT(nn.Module):
    """images [B, 3, S, S] -> class logits [B, classes] and {block: Routing}; features are what the head reads."""

    def __init__(self, image_size, patch, dim, heads, feeds, classes):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch**2, dim)
        self.position = nn.Parameter(torch.randn((image_size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, feed) for feed in feeds)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def features(self, images):
        x = F.pixel_unshuffle(images, self.patch).flatten(2).mT  # [B, T, 3 * patch^2]
        x, routings = self.embed(x) + self.position, {}
        for i, block in enumerate(self.blocks):
            x, routing = block(x)
            if routing is not None:
                routings[i] = routing
        return self.norm(x).mean(1), routings  # [B, D]

    def forward(self, images):
        features, routings = self.features(images)
        return self.head(features), routings


def build_model(args, data, feed):
    """The ViT these flags describe; feed(block, tokens) gives each block its FFN or MoE. ValueError if sizes clash."""
    if args.dim % args.heads:
        raise ValueError(f"--heads must divide --dim, got --heads {args.heads} and --dim {args.dim}")
    if data.image_size % args.patch:
        raise ValueError(f"--patch must divide the image size, got --patch {args.patch} and images of {data.image_size} pixels")
    tokens = (data.image_size // args.patch) ** 2
    feeds = [feed(block, tokens) for block in range(args.depth)]
    return ViT(data.image_size, args.patch, args.dim, args.heads, feeds, len(data.classes))


def loss(model, batch):
    """Cross-entropy, {metric: sum over the batch}, and the routings."""
    logits, routings = model(batch["image"])
    right = (logits.argmax(-1) == batch["label"]).sum()
    return F.cross_entropy(logits.float(), batch["label"]), {"top1": right}, routings


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

    def __init__(self, args, device):
        self.seed, self.batch_size, self.patch, self.device = args.seed, args.batch_size, args.patch, device
        self.about = f"drawn images, {len(TRAINED)} classes to train, {len(HELD_OUT)} held out"

    def draw(self, count, pairs, *purpose, part=slice(None)):
        """A batch of `count` images of these pairs; all parameters are drawn, but only `part` of them rendered."""
        g = seeded(self.seed, *purpose)
        label = torch.randint(len(pairs), (count,), generator=g)
        number = torch.rand(count, 12, generator=g)  # one uniform number per parameter of an image
        noise = torch.randn(count, 1, 32, 32, generator=g)
        return self.render(*(z[part].to(self.device) for z in (torch.tensor(pairs)[label], label, number, noise)))

    def render(self, pair, label, number, noise):
        spread = lambda i, low, high: (low + (high - low) * number[:, i])[:, None, None]  # [B, 1, 1]
        axis = torch.arange(32, device=label.device) / 15.5 - 1
        angle, size = spread(0, -math.pi / 12, math.pi / 12), spread(1, 0.7, 0.95)
        y, x = axis[:, None] - spread(2, -0.2, 0.2), axis - spread(3, -0.2, 0.2)  # [B, 32, 1], [B, 1, 32]
        u, v = (angle.cos() * x + angle.sin() * y) / size, (angle.cos() * y - angle.sin() * x) / size  # [B, 32, 32]
        r, polar = (u * u + v * v).sqrt(), torch.atan2(u, -v)
        every = torch.arange(len(label), device=label.device)
        inside = torch.stack([shape(u, v, r, polar) for shape in SHAPES.values()])[pair[:, 0], every]
        wave = spread(4, 9, 11)  # radians per half an image
        wave = torch.stack([texture(u * wave + spread(5, 0, 6.3), v * wave + spread(5, 0, 6.3), r * wave + spread(5, 0, 6.3))
                            for texture in TEXTURES.values()])[pair[:, 1], every]
        ground, colour = number[:, 6:9] * 0.5, number[:, 9:12] * 0.5 + 0.5  # [B, 3], the shape brighter than the ground
        filled = colour[..., None, None] * (1 + wave[:, None] / 3)  # [B, 3, 32, 32]
        image = torch.where(inside[:, None], filled, ground[..., None, None]) + 0.1 * noise
        covered = F.avg_pool2d(inside[:, None].float(), self.patch).flatten(1)  # [B, T], share of the patch
        kind = (covered > 0).long() + (covered == 1).long()
        return {"image": (image - 0.5) * 4, "label": label, "kind": kind, "pair": pair}

    def batch(self, step, part=slice(None)):
        return self.draw(self.batch_size, TRAINED, "train", step, part=part)

    def split(self, name):
        """The validation or the test images, 2048 each, in batches."""
        return (self.draw(256, TRAINED, name, i) for i in range(8))

    def probe(self, draw, shots=10):
        """Support (so many shots of each held-out class) and query images of one draw of the few-shot probe."""
        pool = self.draw(1024, HELD_OUT, "probe", draw)
        return pick_shots(pool, shots, len(HELD_OUT))


def pick_shots(pool, shots, classes):
    """Split a pool of images into the first `shots` of each class and the rest."""
    order = pool["label"].argsort(stable=True)
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(pool["label"][order], pool["label"][order])
    support = torch.zeros_like(order, dtype=torch.bool)
    support[order[rank < shots]] = True
    return [(pool["image"][rows], pool["label"][rows]) for rows in (support, ~support)]

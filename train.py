"""Train one model with one router, and say what it learned and what it cost.

    python train.py --router expert_choice          a vision MoE on images drawn on the fly, about 2 minutes on 2 CPU cores
    python train.py --router dense                  the same ViT without experts
    python train.py --router soft --data DIR        on a folder in the CIFAR binary layout, or an .npz
    python train.py --task tokens --router token_choice         a language MoE on the standard library's text
    python train.py --sample runs/tokens-token_choice-0 --prompt "def "     write on
    python train.py --eval runs/vision-soft-0       evaluate a finished run again
    python train.py --resume runs/vision-soft-0     go on with one that was stopped, bit for bit
    torchrun --nproc-per-node 8 train.py ...        the same run on many processes
    python train.py --help                          every flag with its default; they depend on --size and --router

Every random draw comes from (seed, step, what for), so one seed fixes data, weights and order, and there is no random
state to keep: a resumed run is the same run, and a process of many draws for the whole batch and takes its part.
A run folder holds config.json, metrics.jsonl, checkpoint.pt and summary.json.
"""
import argparse
import colorsys
import ctypes
import gc
import hashlib
import html
import io
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import moe_tokens
import moe_vision
from routers import CHOICES, ROUTERS, MoE, Routing, build_router, seeded

TASKS = {"vision": moe_vision, "tokens": moe_tokens}
UNRELATED = {"device", "out", "overwrite", "eval", "sample", "table", "resume", "log_every", "save_every", "run", "bench", "tokens",
             "group_size", "repeats"}  # flags that change no result
DEFAULTS = dict(weight_decay=0.05, warmup=0.1, clip=1.0, grad_accum=1, z_loss=0.0, balance="none", expert_init="independent",
                dense_match="active", schedule="cosine", dtype="auto", remark="")
BALANCE = {"none": {}, "vmoe": {"importance": 0.005, "load": 0.005}, "switch": {"balance": 0.01}, "bias": {}}
BIAS_RATE = 1e-3  # the step of --balance bias (2408.15664)
OPTIONS = {name: default for router in ROUTERS.values() for name, default in router.defaults.items()}
FLAG = {"weights": "router_weights"}  # an option's flag bears its own name, but for these


# ---------------------------------------------------------------- flags
def number(rule, held, kind=float):
    """A parser of numbers for argparse, which holds them to a rule."""
    def parse(text):
        value = kind(text)
        if not held(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse names it in "invalid ... value"
    return parse


KINDS = SimpleNamespace(  # for the model files' own flags too
    whole=number("a whole number >= 1", lambda n: n >= 1, int), positive=number("a positive number", lambda x: 0 < x < math.inf),
    at_least_0=number("a number >= 0", lambda x: 0 <= x < math.inf), below_1=number("a share from 0 up to 1", lambda x: 0 <= x < 1))


def numbers(text):
    return sorted({int(n) for n in text.split(",") if n.strip()})


def capacity(text):
    return text if text == "none" else KINDS.positive(text)


numbers.__name__, capacity.__name__ = "list such as 1,3", "number"


def flag(name):
    """The flag of a name: router_weights -> --router-weights."""
    return "--" + FLAG.get(name, name).replace("_", "-")


def option_flag(parser, name, default, router):
    """One flag for one option of the routers, its type read off the default; a router added to ROUTERS brings its own."""
    having = [router for router, made in ROUTERS.items() if name in made.defaults]
    about = "all routers" if len(having) == len(ROUTERS) else ", ".join(having)
    about += "" if router in having else f" (default: {default})%(default).0s"  # its value here, None, is not shown
    if isinstance(default, bool):
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=about)
    elif isinstance(default, str):
        parser.add_argument(flag(name), choices=CHOICES.get(name), help=about)
    elif name == "capacity_factor":
        parser.add_argument(flag(name), type=capacity, help=f"a number, or none for dropless; {about}")
    else:
        parser.add_argument(flag(name), type=KINDS.whole if default is None or isinstance(default, int) else KINDS.at_least_0, help=about)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: error: {message}\n")  # one line; the flags are many, and --help has them


def make_parser(task, size, router):
    module = TASKS[task]
    defaults = DEFAULTS | module.SIZES[size] | module.ROUTER_DEFAULTS.get(router, {})
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    epilog=f"Defaults shown are those of --task {task} --size {size} --router {router}. A flag with several values, "
                    "or --router all, makes a grid of runs and one table.")
    run = parser.add_argument_group("run")
    run.add_argument("--task", choices=TASKS, default="vision", help="what to learn")
    run.add_argument("--router", default="expert_choice", help="dense, or one of " + ", ".join(ROUTERS))
    run.add_argument("--size", choices=module.SIZES, default="tiny", help="model and budget; every part has its own flag")
    run.add_argument("--seed", type=int, default=0, help="fixes data, weights and order")
    run.add_argument("--out", help="run folder; none: a fresh runs/TASK-ROUTER-N")
    run.add_argument("--overwrite", action="store_true", help="allow --out to be a folder with something in it")
    run.add_argument("--eval", metavar="RUN_DIR", help="evaluate a finished run again, then stop")
    run.add_argument("--sample", metavar="RUN_DIR", help="write text with a finished run of --task tokens, then stop")
    run.add_argument("--table", metavar="DIR", help="print and write one table of all finished runs in a folder, then stop")
    run.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: the best there is")
    run.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was stopped; its flags hold, but for steps, device and intervals")
    run.add_argument("--dtype", choices=("auto", "float32", "float64", "bfloat16"), help="auto: bfloat16 autocast on CUDA, else float32")
    run.add_argument("--compile", action="store_true", help="torch.compile the model, without graph breaks")
    run.add_argument("--log-every", type=KINDS.whole, default=10, help="steps between lines of metrics.jsonl")
    run.add_argument("--save-every", type=KINDS.whole, default=200, help="steps between checkpoints")
    train = parser.add_argument_group("optimisation: AdamW with warm-up")
    train.add_argument("--schedule", choices=("cosine", "constant"), help="the learning rate after the warm-up: cosine to 0, or constant")
    for name, kind, about in (("steps", KINDS.whole, "optimiser steps"), ("batch_size", KINDS.whole, "examples a step"),
                              ("grad_accum", KINDS.whole, "parts a batch is computed in"), ("lr", KINDS.positive, "peak learning rate"),
                              ("warmup", KINDS.below_1, "share of the steps"), ("clip", KINDS.positive, "largest gradient norm"),
                              ("weight_decay", KINDS.at_least_0, "not on norms, biases, positions, routers")):
        train.add_argument(flag(name), type=kind, help=about)
    model = parser.add_argument_group("model")
    for name, about in (("dim", "width D"), ("depth", "blocks"), ("heads", "attention heads"), ("hidden", "width inside an FFN or an expert"),
                        ("experts", "experts E in a block")):
        model.add_argument("--" + name, type=KINDS.whole, help=about)
    model.add_argument("--moe-blocks", type=numbers, help="blocks with experts, such as 1,3; none: " + module.moe_blocks.__doc__)
    model.add_argument("--expert-init", choices=("independent", "identical"), help="experts start apart, or all alike (V-MoE)")
    model.add_argument("--dense-match", choices=("active", "total"), help="with --router dense: FFNs as wide as the K active experts, or as all")
    module.add_flags(parser, KINDS)
    cost = parser.add_argument_group("what routing costs")
    cost.add_argument("--bench", action="store_true", help="time one MoE layer of every router (or of --router), then stop")
    cost.add_argument("--tokens", type=KINDS.whole, default=4096, help="tokens of that layer")
    cost.add_argument("--group-size", type=KINDS.whole, default=256, help="tokens in a group of it")
    cost.add_argument("--repeats", type=KINDS.whole, default=9, help="rounds that are timed")
    options = parser.add_argument_group("router options, for the routers named")
    for name, default in OPTIONS.items():
        try:
            option_flag(options, name, default, router)
        except argparse.ArgumentError:
            parser.error(f"router option {name} has the name of another flag; call it otherwise")
    losses = parser.add_argument_group("router losses")
    losses.add_argument("--balance", choices=BALANCE, help="importance and, with noise, load; Switch's; or a selection bias; without a learned gate none by default")
    losses.add_argument("--balance-weight", type=KINDS.at_least_0, help="weight of the balance losses (default: vmoe 0.005 each, switch 0.01)")
    losses.add_argument("--z-loss", type=KINDS.at_least_0, help="weight of the mean squared logsumexp of the logits")
    made = ROUTERS[router].defaults if router in ROUTERS else {}
    parser.set_defaults(**{FLAG.get(name, name): value for name, value in made.items()})
    parser.set_defaults(**defaults)
    return parser


def parse(argv):
    """Flags -> args. What they say of the task, the size and the router decides the other flags' defaults.

    With --resume, the run's own flags are the defaults, and only some may be given another value.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    for name, default in (("task", "vision"), ("size", "tiny"), ("router", "expert_choice"), ("balance", None), ("router-weights", None),
                          ("sample", None), ("resume", None)):
        first.add_argument("--" + name, default=default)
    first.add_argument("--bench", action="store_true")
    known, _ = first.parse_known_args(argv)
    try:
        saved = read_flags(known.resume) if known.resume else {}
    except ValueError as error:
        first.error(str(error))
    known = argparse.Namespace(**vars(known) | saved)
    task = "tokens" if known.sample else known.task if known.task in TASKS else "vision"
    parser = make_parser(task, known.size if known.size in TASKS[task].SIZES else "tiny", known.router)
    if known.router_weights not in (None, "learned") and known.balance is None:
        parser.set_defaults(balance="none")  # there is nothing to balance with
    parser.set_defaults(**saved)
    if known.bench:
        parser.set_defaults(dim=256, hidden=1024, experts=16)
    args = parser.parse_args(argv)
    for name, value in saved.items():
        if getattr(args, name) != value and name not in UNRELATED | {"steps"}:
            parser.error(f"{flag(name)} {getattr(args, name)} contradicts the run in {args.resume}, which has {value}")
    return args


def check(args):
    """Raise ValueError for flags that contradict each other; fill in what follows from the others."""
    if args.router != "dense" and args.router not in ROUTERS:
        raise ValueError(f"unknown router {args.router!r}; known: dense, {', '.join(ROUTERS)}")
    has = set(ROUTERS[args.router].defaults) if args.router in ROUTERS else {"top_k"}
    for name in OPTIONS:
        if name not in has and getattr(args, FLAG.get(name, name)) is not None:
            raise ValueError(f"{flag(name)} is no option of --router {args.router}; it has {', '.join(sorted(has))}")
    args.top_k = args.top_k or 1
    if args.dim % args.heads:
        raise ValueError(f"--heads must divide --dim, got --heads {args.heads} and --dim {args.dim}")
    if args.router == "dense" and args.top_k > args.experts:
        raise ValueError(f"--top-k must be at most --experts {args.experts}, got {args.top_k}")
    args.moe_blocks = TASKS[args.task].moe_blocks(args.depth) if args.moe_blocks is None else args.moe_blocks
    if not args.moe_blocks or args.moe_blocks[0] < 0 or args.moe_blocks[-1] >= args.depth:
        raise ValueError(f"--moe-blocks must name blocks from 0 to {args.depth - 1}, got {args.moe_blocks}")
    if args.balance == "bias":
        if "bias_rate" not in has:
            raise ValueError(f"--balance bias is for routers in which tokens choose by scores, not --router {args.router}")
        args.bias_rate = args.bias_rate or BIAS_RATE
    offered = ROUTERS[args.router].offers if args.router in ROUTERS else ()
    for name, weight in loss_weights(args).items():
        if weight and name not in offered and not (name == "load" and "importance" in offered):  # load comes with noise alone
            raise ValueError(f"--router {args.router} offers no {name} loss" + (f"; it offers {', '.join(offered)}" if offered else ""))
    if args.balance_weight is not None and not BALANCE[args.balance]:
        raise ValueError(f"--balance-weight weighs the losses of --balance vmoe or switch, got --balance {args.balance}")
    if args.batch_size % (args.grad_accum * processes()[1]):
        raise ValueError(f"--grad-accum must divide --batch-size {args.batch_size}, got {args.grad_accum} in {processes()[1]} process(es)")
    if args.data == "":
        raise ValueError("--data is empty; leave it away for the built-in data")
    args.remark = TASKS[args.task].settle(args, None if args.router == "dense" else make_router(args))


def loss_weights(args):
    weights = BALANCE[args.balance]
    if args.balance_weight is not None:
        weights = {name: args.balance_weight for name in weights}
    return weights | {"z": args.z_loss}


def pick_device(name):
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if here[kind])
    if not here[name]:
        raise ValueError(f"--device {name}: this machine has none; there is {', '.join(kind for kind in here if here[kind])}")
    if name == "cuda" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


# ---------------------------------------------------------------- building
def router_options(args, router):
    """The options of a router that these flags set; what they leave open stands as build_router has it."""
    options = {name: getattr(args, FLAG.get(name, name)) for name in ROUTERS[router].defaults}
    return {name: None if value == "none" else value for name, value in options.items() if value is not None}


def make_router(args):
    return build_router(args.router, args.dim, args.experts, **router_options(args, args.router))


def make_feed(args):
    """feed(block, tokens) -> what stands in that block after attention: an FFN or an MoE."""
    def feed(block, tokens):
        sparse = block in args.moe_blocks
        if sparse and args.router != "dense":
            return MoE(make_router(args), args.hidden, args.expert_init)
        width = args.hidden * ((args.experts if args.dense_match == "total" else args.top_k) if sparse else 1)
        return nn.Sequential(nn.Linear(args.dim, width), nn.GELU(), nn.Linear(width, args.dim))
    return feed


def build(args):
    """Everything a run needs from its flags: device, task, data, model. The first forward gives the GFLOPs of an example."""
    device, task = pick_device(args.device), TASKS[args.task]
    torch.set_default_dtype(torch.float64 if args.dtype == "float64" else torch.float32)
    data = task.load_data(args, device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = build_model(args, task, data, device)
    return device, task, data, model, counter.get_total_flops() / 1e9


def build_model(args, task, data, device):
    """The model at its start, in evaluation mode; a first look at one example gives Soft MoE its number of slots."""
    torch.manual_seed(seeded(args.seed, "weights").initial_seed())
    model = task.build_model(args, data, make_feed(args)).to(device).eval()
    with torch.no_grad():
        task.loss(model, {name: value[:1] for name, value in next(iter(data.split("validation"))).items()})
    return model


@contextmanager
def dropless(model):
    """Inside, no token is dropped where tokens choose, or thresholds do; says whether that changes anything."""
    limited = [moe.router for moe in moes(model) if moe.router.chooses in ("tokens", "threshold") and moe.router.options.capacity_factor]
    factors = [router.options.capacity_factor for router in limited]
    for router in limited:
        router.options.capacity_factor = None if router.chooses == "tokens" else float(router.num_experts)
    try:
        yield bool(limited)
    finally:
        for router, factor in zip(limited, factors):
            router.options.capacity_factor = factor


def moes(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def parameters(model):
    """Total parameters, and active ones: of an expert, the share of the tokens that it is to serve."""
    count = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for moe in moes(model):
        o, E = moe.router.options, moe.router.num_experts
        share = o.slots / len(model.position) if getattr(o, "slots", None) else o.top_k * (o.capacity_factor or 1) / E
        idle += (1 - min(1, share)) * sum(p.numel() for p in moe.experts.parameters())
    return count, round(count - idle)


def make_optimizer(args, model, device):
    """AdamW; no decay on norms, biases and positions, nor on routers, whose decay would only flatten every gate."""
    def decays(name, p):
        return p.ndim > 1 and name.split(".")[-1] not in ("b1", "b2", "position") and ".router." not in name

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if decays(n, p)], "weight_decay": args.weight_decay},
              {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))


def learning_rate(args, step):
    warm = max(1, round(args.warmup * args.steps))
    if step < warm or args.schedule == "constant":
        return args.lr * min(1, (step + 1) / warm)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


# ---------------------------------------------------------------- training and evaluation
def precision(args, device):
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def processes():
    """This process's number and how many there are: (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(values, device, share=1):
    """{name: number} summed over all processes, divided by `share`."""
    if not dist.is_initialized():
        return values
    vector = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()])
    dist.all_reduce(vector)
    return dict(zip(values, vector / share))


class WholeNoise(TorchFunctionMode):
    """Inside, a process draws the noise of the whole batch [processes*G, ...] and takes its own part."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rank, size = processes()
        if function is not torch.randn_like or size == 1:
            return function(*args, **(kwargs or {}))
        own = args[0]
        return torch.randn(size * len(own), *own.shape[1:], dtype=own.dtype, device=own.device)[rank * len(own) :][: len(own)]


def evenness(load):
    """Of load [E], the shares of all assignments: that of the busiest expert over the mean, and how many experts got nothing."""
    return {"load": float(load.max() * len(load) / load.sum().clamp(min=1e-9)), "dead": int((load == 0).sum())}


def statistics(routings):
    """The signs of a router's health, per MoE block, from {block: Routing}.

    load max/mean; experts that got nothing; share of tokens in no slot; slots a token sits in; entropy of the gates, 1 =
    uniform; in training, the norm of the router's gradient before clipping.
    """
    stats = {}
    for block, routing in routings.items():
        counts = routing.counts()
        stats[block] = {**evenness(routing.load), "dropped": float((counts == 0).float().mean()), "slots_per_token": float(counts.float().mean())}
        if hasattr(routing, "logits"):
            gates = routing.logits.detach().float().flatten(2).softmax(-1)
            stats[block]["entropy"] = float(-torch.special.xlogy(gates, gates).sum(-1).mean() / math.log(max(2, gates.shape[-1])))
        if hasattr(routing, "router_gradient"):
            stats[block]["router_gradient"] = float(routing.router_gradient)
    return stats


def add(sums, values):
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def once(routings):
    """The routings of {block: Routing}, each once: blocks may share one."""
    return list({id(routing): routing for routing in routings.values()}.values())


def mean_statistics(several):
    return {b: {k: float(np.mean([s[b][k] for s in several])) for k in several[0][b]} for b in several[0]} if several else {}


@torch.no_grad()
def evaluate(args, task, model, data, split, device):
    """Metrics over a whole split, cross-entropy alone and without noise, and the routings' statistics."""
    model.eval()
    sums, stats, loads = {}, [], {}
    for batch in data.split(split):
        with precision(args, device):
            loss, counts, routings = task.loss(model, batch)
        add(sums, {name: float(value) for name, value in (counts | {"loss": loss * counts["count"]}).items()})
        add(loads, {block: routing.load for block, routing in routings.items()})
        stats.append(statistics(routings))
    return {**task.metrics(sums), "blocks": {block: of | evenness(loads[block]) for block, of in mean_statistics(stats).items()}}


def train_step(args, task, model, optimizer, data, step, device, caught=(), before_moving=lambda: None):
    """One optimiser step: forward and backward of each part of the batch, clip, step, then what no gradient moves.

    Returns metrics of the whole batch, the last part's routings, and whether a process has caught a signal. Raises
    FloatingPointError, before any weight has moved, for a loss or a gradient norm that is not finite.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, step)
    torch.manual_seed(seeded(args.seed, step, "noise").initial_seed())
    (rank, size), weights, whole = processes(), loss_weights(args), args.batch_size // args.grad_accum
    rows = whole // size
    sums, losses, seen = {"stop": len(caught)}, {}, []
    for i in range(args.grad_accum):
        batch = data.batch(step, part=slice(i * whole + rank * rows, i * whole + (rank + 1) * rows))
        with model.no_sync() if size > 1 and i + 1 < args.grad_accum else nullcontext():
            with precision(args, device), WholeNoise() if size > 1 else nullcontext():
                loss, counts, routings = task.loss(model, batch)
            terms = {}
            for routing in once(routings):
                add(terms, routing.losses)
            objective = loss + sum(weight * terms[name] for name, weight in weights.items() if weight and name in terms)
            (objective / args.grad_accum).backward()
        add(sums, counts | {"loss": loss.detach() * counts["count"]})
        add(losses, {name: value.detach() / args.grad_accum for name, value in terms.items()})
        seen.append(once(routings))
    for moe, routing in zip(moes(model), routings.values()):
        routing.router_gradient = nn.utils.get_total_norm([p.grad for p in moe.router.parameters() if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    sums, losses = total(sums, device), total(losses, device, size)
    if not torch.isfinite(norm + sums["loss"]):
        raise FloatingPointError(f"step {step + 1}: loss {float(sums['loss'] / sums['count']):.3g}, gradient norm {float(norm):.3g}; "
                                 f"per block {json.dumps(statistics(routings))}")
    before_moving()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for layer, router in enumerate(dict.fromkeys(moe.router for moe in moes(model))):
        own = [routings[layer] for routings in seen]
        for routing in own:
            for name in {"load", "quantile"} & set(vars(routing)) if size > 1 else ():  # what bias and threshold go by
                setattr(routing, name, total({name: getattr(routing, name)}, device, size)[name])
        router.update(own, seeded(args.seed, step + 1, "router", layer))
    return {**task.metrics(sums), **losses, "grad_norm": norm}, routings, bool(sums["stop"])


def save(folder, name, content):
    """Write a file whole or not at all: to a temporary name, flushed, then in place of the old one. Process 0 alone does."""
    if processes()[0]:
        return
    raw = io.BytesIO()
    if name.endswith(".pt"):
        torch.save(content, raw)  # in memory first: a full disk then is an OSError like any other
    else:
        raw.write((content if isinstance(content, str) else json.dumps(content, indent=1) + "\n").encode())
    part = folder / (name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(raw.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / name)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def signals():
    """Inside, Ctrl-C and SIGTERM are kept for the end of the step: a list of the signals caught."""
    caught = []
    before = {number: signal.signal(number, lambda got, frame: caught.append(got)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compiled(module):
    """The module compiled in one piece; models before it are forgotten, since torch keeps only some versions of one code."""
    torch.compiler.reset()
    return torch.compile(module, fullgraph=not dist.is_initialized())


def settings_of(args):
    """The flags that decide what a run computes."""
    return {name: value for name, value in vars(args).items() if name not in UNRELATED}


def restore(args, folder, model, optimizer):
    """Load a run's checkpoint into model and optimizer; returns its step and seconds, metrics.jsonl cut back to that step."""
    checkpoint = read_checkpoint(folder)
    with reading(folder, "is no run", "holds a checkpoint that does not fit the run"):
        for name, value in settings_of(args).items():
            if checkpoint["flags"][name] != value and name != "steps":
                raise ValueError(f"it has {flag(name)} {checkpoint['flags'][name]}, not {value}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, seconds = int(checkpoint["step"]), float(checkpoint["seconds"])
        if step > args.steps:
            raise ValueError(f"it is of step {step}, beyond --steps {args.steps}")
    if checkpoint["versions"] != versions():
        print(f"the checkpoint is of {checkpoint['versions']}, this is {versions()}: it goes on, but not bit for bit", file=sys.stderr)
    kept = []
    for line in (folder / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            values = json.loads(line)
            if values["step"] <= step and "split" not in values:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError):
            pass  # half a line
    save(folder, "metrics.jsonl", "".join(kept))
    return step, seconds


def versions():
    return {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}


def fit(args, task, model, optimizer, data, device, folder, step=0, before=0.0):
    """Train from a step on, before which so many seconds were spent; write metrics.jsonl and checkpoints.

    Returns the steps done, (seconds, those of this process's first step: with --compile, nearly all compiling), signal or 0.
    """
    running = DistributedDataParallel(model) if dist.is_initialized() else model
    running = compiled(running) if args.compile else running
    start, first, saved, stop = time.perf_counter(), 0.0, step, False

    def keep(due=True):
        nonlocal saved
        if due and step > saved:
            save(folder, "checkpoint.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "flags": settings_of(args),
                                           "seconds": before + time.perf_counter() - start, "versions": versions()})
            saved = step

    with (open(os.devnull if processes()[0] else folder / "metrics.jsonl", "a" if step else "w") as file, signals() as caught,
          tqdm(total=args.steps, initial=step, desc=title(args), dynamic_ncols=True) as bar):
        while step < args.steps and not stop:
            try:
                logged, routings, stop = train_step(args, task, running, optimizer, data, step, device, caught,
                                                    lambda: keep(step % args.save_every == 0))  # weights with a finite gradient alone
            except FloatingPointError as error:
                good = f"the checkpoint of step {saved} in {folder} is the last good one" if saved else "no checkpoint was saved before"
                raise FloatingPointError(f"diverged at {error}; {good}") from None
            step += 1
            first = first or time.perf_counter() - start
            bar.update()
            if step % args.log_every == 0 or step == args.steps:
                line = {"step": step, **remarked(args), **{name: float(value) for name, value in logged.items()}}
                file.write(json.dumps(line | {"blocks": statistics(routings)}) + "\n")
                file.flush()
                rate = (step - bar.initial) * args.batch_size / (time.perf_counter() - start)
                shown = {name: f"{line[name]:.3g}" for name in ("loss", "top1", "miou", "bits_per_byte") if name in line}
                bar.set_postfix(shown | {f"{task.UNIT}/s": f"{rate:.0f}"})
        keep()
    return step, (before + time.perf_counter() - start, first), (caught or [signal.SIGTERM])[0] if stop else 0


def conclude(args, task, model, data, device, gflops, spent, folder=None):
    """Evaluate and probe; write the last lines of metrics.jsonl and the summary; print the table. spent: as fit() returns it."""
    result = {split: evaluate(args, task, model, data, split, device) for split in task.SPLITS}
    with dropless(model) as differs:
        if differs:
            result[task.SPLITS[-1] + "_dropless"] = evaluate(args, task, model, data, task.SPLITS[-1], device)
    every, active = parameters(model)
    found, joints = specialisation(args, task, model, data, device)
    told = task.report(args, model, data, lambda: build_model(args, task, data, device))
    summary = {"router": title(args), **result, **told, "specialisation": found, "parameters": every, "active_parameters": active,
               "gflops": gflops, "steps": args.steps}
    if folder:
        with open(folder / "metrics.jsonl", "a") as file:
            for split, values in result.items():
                file.write(json.dumps({"step": args.steps, "split": split} | remarked(args) | values) + "\n")
    (seconds, first), later = spent, args.compile and args.steps > 1  # of compiled steps, the first one is told apart
    rate = args.batch_size * (args.steps - later) / (seconds - first * later)
    summary |= {"seconds": seconds, f"{task.UNIT}_per_second": rate} | ({"first_step_seconds": first} if later else {})
    print(table([{"router": title(args), **row([summary], task)}]))
    if found:
        shown = lambda *values: dict(zip(("NMI", "by chance", "95 % of chance"), (f"{value:.3f}" for value in values)))
        print(table([{"block": str(block), "experts know of": name, **shown(*values)} for block, of in found.items() for name, values in of.items()]))
    task.show(model, data, joints, folder)
    if folder:
        draw(folder, joints)
    return summary


def title(args):
    return args.router + (f" ({args.remark})" if args.remark else "")


def remarked(args):
    """What marks a line of numbers as leaky, or as an oracle's."""
    return {"remark": args.remark} if args.remark else {}


DECIMALS = {"top-1 %": 1, "bits/byte": 3, "dropless": 3, "as generated": 3, "perplexity": 2, "bytes/token": 2, "load max/mean": 2, "slots/token": 2, "GFLOPs": 4,
            "vocabulary": 0, "parameters": 0, "active": 0, "seconds": 0, "images/s": 0, "sequences/s": 0}  # others: 1
CONSTANT = {"vocabulary", "bytes/token", "parameters", "active", "GFLOPs"}  # no deviation to speak of


def row(summaries, task, known=False):
    """One row of the table, {column: text}, of the runs of one setting: a lone run's numbers, or mean ± deviation over seeds.

    With `known`, also what experts know of the labels: NMI less its null mean, the mean of the blocks.
    """
    columns, texts = [], {}
    for s in summaries:
        blocks = s[task.SPLITS[-1]]["blocks"].values()
        columns.append({**task.columns(s), "load max/mean": [b["load"] for b in blocks], "dropped %": [100 * b["dropped"] for b in blocks],
                        "slots/token": [b["slots_per_token"] for b in blocks],
                        "parameters": s["parameters"], "active": s["active_parameters"], "GFLOPs": s["gflops"],
                        f"{task.UNIT}/s": s[f"{task.UNIT}_per_second"], "first step s": s.get("first_step_seconds"), "seconds": s["seconds"]})
        for label in ("patch kind", "class", "texture", "shape", "position", "token class", "topic") if known else ():
            values = [of[label][0] - of[label][1] for of in s["specialisation"].values() if label in of]
            columns[-1] |= {f"NMI {label}": float(np.mean(values)) if values else None}
    for name in columns[0]:
        values, show = [c[name] for c in columns], f"{{:,.{DECIMALS.get(name, 3 if name.startswith('NMI') else 1)}f}}".format
        if None in values or [] in values:
            texts[name] = "-"
        elif isinstance(values[0], list):
            texts[name] = ", ".join(map(show, np.mean(values, 0)))  # a number for each block
        elif len(values) == 1 and isinstance(values[0], tuple):
            texts[name] = " ± ".join(map(show, values[0]))  # of a lone run, over its draws
        else:
            values = [value[0] if isinstance(value, tuple) else value for value in values]
            texts[name] = show(np.mean(values)) + (f" ± {show(deviation(values))}" if len(values) > 1 and name not in CONSTANT else "")
    return texts


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def finished(folder):
    """The runs below a folder, a list of (flags, summary, training lines), and a note on each that is not whole."""
    runs, notes = [], []
    for path in sorted(path.parent for path in pathlib.Path(folder).glob("*/config.json")):
        try:
            flags, summary = read_flags(path), json.loads((path / "summary.json").read_text())
            row([summary], TASKS[flags["task"]], known=True)  # raises where something is missing
            runs.append((flags, summary, read_lines(path)))
        except FileNotFoundError:
            notes.append(f"Not finished: {path.name}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"Left out, not readable: {path.name} ({type(error).__name__}: {error})")
    return runs, notes


def score(summary, task):
    """By which rows are ranked, more is better: the first of the task's columns, or the loss where text has no bytes."""
    value = next(iter(task.columns(summary).values()))
    return -summary[task.SPLITS[-1]]["loss"] if value is None else value if task.MORE_IS_BETTER else -value


def results(folder):
    """All finished runs below a folder in one table: printed, and written to results.md and results.jsonl there."""
    runs, notes = finished(folder)
    tasks = {flags["task"] for flags, *_ in runs}
    if len(tasks) != 1:
        why = f"holds runs of several tasks: {', '.join(sorted(tasks))}" if tasks else "no finished run (a folder with a summary.json) lies there"
        raise ValueError("; ".join([f"--table {folder}: {why}", *notes[:3]]))
    task, groups, rows = TASKS[tasks.pop()], {}, []
    for one in runs:
        setting = json.dumps({name: value for name, value in one[0].items() if name not in UNRELATED | {"seed"}})
        groups.setdefault(setting, {})[one[0]["seed"]] = one
    settings = [json.loads(key) for key in groups]
    for setting in settings:
        setting |= {name: None for name in setting if flag(name) in ignored({flag(n): value for n, value in setting.items()})}
    names = [name for name in settings[0] if name not in ("router", "remark")]
    usual = [vars(make_parser(s["task"], s["size"], s["router"]).parse_args([])) for s in settings]  # not worth a column
    differing = [name for name in names if len({json.dumps(s[name]) for s in settings if s.get(name) is not None}) > 1
                 and any(s[name] not in (None, of[name]) for s, of in zip(settings, usual))]
    for setting, group in zip(settings, groups.values()):
        _, summaries, lines = zip(*group.values())
        named = {name: "-" if setting.get(name) is None else str(setting[name]) for name in differing}
        named = {"router": title(argparse.Namespace(**setting)), **named}
        losses = [{line["step"]: line["loss"] for line in of} for of in lines]
        curve = [(step, np.mean([of[step] for of in losses])) for step in losses[0] if all(step in of for of in losses)]  # mean over seeds
        texts = named | {"seeds": str(len(group)), "routing": routes(setting)} | row(summaries, task, known=True)
        rows.append(([score(summary, task) for summary in summaries], texts, curve, " ".join(part for part in named.values() if part != "-")))
    rows.sort(key=lambda r: -np.mean(r[0]))
    best = next((scores for scores, texts, *_ in rows if "(leaky)" not in texts["router"]), rows[0][0])
    digits = DECIMALS.get(next(iter(task.columns(runs[0][1]))), 1)
    for scores, texts, *_ in rows:
        gap, spread = np.mean(scores) - np.mean(best), math.hypot(deviation(scores), deviation(best))
        told = "one seed" if min(len(scores), len(best)) == 1 else "tie" if abs(gap) <= spread else f"{gap if task.MORE_IS_BETTER else -gap:+.{digits}f}"
        texts["to the best"] = "best" if scores is best else told  # inside the spread is a tie
    same = (f"{flag(name)} {of.pop()}" for name in ("task", "size", "steps", "batch_size", "lr") if len(of := {s[name] for s in settings}) == 1)
    shown = "\n".join([table([texts for _, texts, *_ in rows]), "", f"In every row: {' '.join(same)}", *notes])
    (pathlib.Path(folder) / "results.md").write_text(shown + "\n")
    (pathlib.Path(folder) / "results.jsonl").write_text("".join(json.dumps({"flags": flags, "summary": summary}) + "\n" for flags, summary, _ in runs))
    print(shown)
    trained = {name: curve for *_, curve, name in rows}
    parts = curves(60, 40, "training loss, mean over seeds", trained, 700, 420) + legend(790, 50, trained)
    (pathlib.Path(folder) / "curves.svg").write_text(svg(840 + 7 * max(map(len, trained)), max(500, 60 + 18 * len(trained)), parts))


def routes(setting):
    """Whether the routing of these flags can be trusted with text: "causal" or "leaky", "-" without a router."""
    if setting["router"] not in ROUTERS:
        return "-"
    causal = setting["remark"] != "leaky" and make_router(argparse.Namespace(**setting)).causal
    return "causal" if causal else "leaky"


def table(rows):
    """Rows of {column: text} as Markdown, columns aligned; without those in which nothing stands."""
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [names, ["-" * width[name] for name in names]] + [[row[name] for name in names] for row in rows]
    return "\n".join("| " + " | ".join(text.ljust(width[name]) for text, name in zip(line, names)) + " |" for line in lines)


# ---------------------------------------------------------------- what experts specialise in
def nmi(joint):
    """Normalised mutual information I / sqrt(H H) of a joint mass [labels, E]; 0 where an entropy is 0."""
    p = joint.double() / joint.sum()
    entropy = lambda q: -torch.special.xlogy(q, q).sum()
    labels, experts = entropy(p.sum(1)), entropy(p.sum(0))
    return float((labels + experts - entropy(p)) / (labels * experts).sqrt()) if labels > 1e-12 and experts > 1e-12 else 0.0


def nmi_and_null(mass, label, unit, draws=100):
    """[NMI, null mean, null 95 %] of expert with label, for combine mass [N, E], label [N] and unit [N] of N tokens.

    The null deals the labels of the units out anew. Within a unit the label is constant (a document for its topic, a token for
    its class), or else the routing is (a sequence that is routed as a whole).
    """
    units, index = unit.unique(return_inverse=True)
    routed = mass.new_zeros(len(units), mass.shape[1]).index_add(0, index, mass)  # [units, E]
    of, L, g = label.new_zeros(len(units)).scatter(0, index, label), int(label.max()) + 1, seeded("null")
    if (of[index] == label).all():
        joint = lambda order: routed.new_zeros(L, routed.shape[1]).index_add(0, of[order], routed)
    else:  # each unit's share of every label
        held = (index * L + label).bincount(minlength=len(units) * L).view(-1, L).to(routed)  # [units, labels]
        joint = lambda order: (held[order] / held[order].sum(1, keepdim=True)).T @ routed
    null = [nmi(joint(torch.randperm(len(units), generator=g))) for _ in range(draws)]
    return [nmi(joint(torch.arange(len(units)))), float(np.mean(null)), float(np.quantile(null, 0.95))]


@torch.no_grad()
def specialisation(args, task, model, data, device):
    """Of each MoE block: {block: {name: [NMI, null mean, null 95 %]}} and {block: {name: (joint mass [labels, E], labels)}}."""
    model.eval()
    gathered, start, found, joints = {}, 0, {}, {}
    for batch in data.split(task.EXAMINED):
        with precision(args, device):
            _, _, routings = task.loss(model, batch)
        for name, (label, unit, names) in task.labels(batch, data, start).items():
            for block, routing in routings.items():
                mass = routing.mass().float().cpu()
                mass = mass.reshape(len(label), -1, mass.shape[-1])  # [B, T, E], or [B, 1, E] of sequences
                if unit is not None and mass.shape[1] < len(unit[0].unique()):
                    unit = (start + torch.arange(len(label)))[:, None].expand_as(label)  # what is routed as a whole is dealt as a whole
                mass, known = mass.expand(*label.shape, -1), label.flatten() >= 0
                parts = mass.flatten(0, 1)[known], label.flatten()[known], None if unit is None else unit.flatten()[known]
                gathered.setdefault((block, name, tuple(names)), []).append(parts)
        start += len(batch[next(iter(batch))])
    for (block, name, names), parts in gathered.items():
        mass, label, unit = (torch.cat(column) if column[0] is not None else None for column in zip(*parts))
        joints.setdefault(block, {})[name] = mass.new_zeros(len(names), mass.shape[1]).index_add(0, label, mass), names
        if unit is not None and len(label):
            found.setdefault(block, {})[name] = nmi_and_null(mass, label, unit)
    return found, joints


# ---------------------------------------------------------------- pictures
def svg(width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def text(x, y, words, anchor="start", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(str(words))}</text>'


def heat_map(x, y, heading, joint, names, cell=18):
    """Parts of a picture: for each label [labels, E], how its mass is shared among the experts, white 0 to dark blue, the most."""
    share = joint / joint.sum(1, keepdim=True).clamp(min=1e-9)
    most = max(1e-9, float(share.max()))
    parts = [text(x, y - 24, heading, more='font-weight="bold"'), text(x, y + cell * len(names) + 14, f"the darkest: {most:.2f}")]
    parts += [text(x + cell * (e + 0.5), y - 7, e, "middle") for e in range(share.shape[1])]
    for r, name in enumerate(names):
        parts.append(text(x - 6, y + cell * (r + 0.7), name, "end"))
        for e, part in enumerate(share[r].tolist()):
            red, green, blue = (round(255 - part / most * (255 - full)) for full in (8, 48, 107))
            parts.append(f'<rect x="{x + cell * e}" y="{y + cell * r}" width="{cell}" height="{cell}" fill="rgb({red},{green},{blue})" stroke="#ddd">'
                         f"<title>{html.escape(str(name))}, expert {e}: {part:.3f}</title></rect>")
    return parts


def curves(x, y, heading, lines, width=330, height=180):
    """Parts of a picture: lines {name: [(x, y), ...]} in one frame, the axes' ends labelled."""
    finite = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    (left, right), (low, high) = ((min(of), max(of)) for of in (zip(*finite) if finite else [(0, 1), (0, 1)]))
    place = lambda a, b: (x + width * (a - left) / ((right - left) or 1), y + height - height * (b - low) / ((high - low) or 1))
    parts = [text(x, y - 8, heading, more='font-weight="bold"'), f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
             text(x - 4, y + 10, f"{high:.3g}", "end"), text(x - 4, y + height, f"{low:.3g}", "end"),
             text(x, y + height + 15, f"step {left}"), text(x + width, y + height + 15, right, "end")]
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line if math.isfinite(point[1]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{hue(i, len(lines))}" stroke-width="1.5"><title>{html.escape(name)}</title></polyline>')
    return parts


def hue(i, count):
    """A colour for line i of so many; a lone line is grey."""
    if count == 1:
        return "#444444"
    return "#" + bytes(round(255 * part) for part in colorsys.hls_to_rgb(i / max(1, count), 0.4 + 0.15 * (i % 2), 0.75)).hex()


def legend(x, y, names):
    return [part for i, name in enumerate(names) for part in (f'<rect x="{x}" y="{y + 18 * i - 10}" width="12" height="12" fill="{hue(i, len(names))}"/>',
                                                              text(x + 18, y + 18 * i, name))]


def read_lines(folder):
    """The training lines of metrics.jsonl."""
    return [line for line in map(json.loads, open(folder / "metrics.jsonl")) if "split" not in line]


SIGNS = {"load": "load max/mean", "dead": "experts without a token", "dropped": "share of tokens dropped", "entropy": "entropy of the gates",
         "router_gradient": "norm of the router's gradient"}


def draw(folder, joints):
    """experts.svg: where each label's tokens go, per block. health.svg: the run's loss and the signs of its routers' health."""
    parts, bottom, across = [text(10, 20, "Share of each label's tokens that goes to each expert: white none, dark blue the most")], 70, 0
    for name, (first, names) in next(iter(joints.values()), {}).items():
        if len(names) <= 24:  # more rows are no picture
            across = max(330, 150 + 18 * first.shape[1])
            for column, (block, of) in enumerate(joints.items()):
                parts += heat_map(150 + across * column, bottom, f"block {block}: {name} x expert", *of[name])
            bottom += 18 * len(names) + 60
    if across:
        (folder / "experts.svg").write_text(svg(max(560, across * len(joints) + 140), bottom, parts))
    lines = read_lines(folder)
    along = lambda value: [(line["step"], value(line)) for line in lines]
    frames = {"loss": {"loss": along(lambda line: line["loss"])}, "gradient norm": {"norm": along(lambda line: line["grad_norm"])}}
    blocks = lines[-1]["blocks"] if lines else {}
    for sign, heading in SIGNS.items():
        of = {f"block {b}": along(lambda line: line["blocks"][b][sign]) for b in blocks if sign in blocks[b]}
        frames |= {heading: of} if of else {}
    parts = [part for i, of in enumerate(frames.items()) for part in curves(60 + 410 * (i % 3), 40 + 230 * (i // 3), *of)]
    parts += legend(1260, 50, [f"block {b}" for b in blocks])
    (folder / "health.svg").write_text(svg(1360, 230 * math.ceil(len(frames) / 3) + 30, parts))


# ---------------------------------------------------------------- runs
def run_folder(args):
    """A fresh runs/TASK-ROUTER-N, or --out, made if it is not there. Raises ValueError for one that is in use."""
    fresh = (f for n in range(10**6) if not (f := pathlib.Path("runs", f"{args.task}-{args.router}-{n}")).exists())
    folder = pathlib.Path(args.out) if args.out is not None else next(fresh)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise ValueError(f"--out {folder} is not empty; choose another or say --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("summary.json", "checkpoint.pt", "tokenizer.json", "sample.html", "patches.svg", "experts.svg", "health.svg"):  # of an earlier run
        (folder / old).unlink(missing_ok=True)
    return folder


@contextmanager
def reading(folder, missing, broken):
    """Inside, a file that is missing, and whatever else goes wrong (files and flags that do not fit fail in many ways), is a ValueError."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{folder} {missing}: {pathlib.Path(error.filename).name} is missing") from None
    except Exception as error:
        why, *_ = (str(error) or type(error).__name__).splitlines()[0].split(". ")
        raise ValueError(f"{folder} {broken}: {why}") from None


def read_flags(folder):
    """The flags of a run, {name: value}. Raises ValueError for a folder that is none."""
    with reading(folder, "is no run", "is no run: config.json does not hold its flags"):
        flags = json.loads(pathlib.Path(folder, "config.json").read_text())["flags"]
        return vars(make_parser(flags["task"], flags["size"], flags["router"]).parse_args([])) | flags  # flags newer than the run: defaults


def read_checkpoint(folder):
    """A run's checkpoint, read without running any code in it. Raises ValueError for one that is missing, broken or unsafe."""
    path = pathlib.Path(folder) / "checkpoint.pt"
    with reading(folder, "was never saved", "holds a checkpoint.pt that cannot be read as a checkpoint"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)


def load_run(folder, device):
    """args, task, data, model, device, GFLOPs and time spent of a finished run. Raises ValueError for a folder that is none."""
    folder = pathlib.Path(folder)
    saved, checkpoint = argparse.Namespace(**read_flags(folder) | {"device": device, "run": folder}), read_checkpoint(folder)
    with reading(folder, "is no finished run", "cannot be read as a run"):
        summary = json.loads((folder / "summary.json").read_text())
        spent = summary["seconds"], summary.get("first_step_seconds", 0.0)
        device, task, data, model, gflops = build(saved)
        model.load_state_dict(checkpoint["model"])
    return saved, task, data, model, device, gflops, spent


def sample(args):
    """Text from a finished run. Raises ValueError for a folder that is none, or that cannot write."""
    folder = pathlib.Path(args.sample)
    saved, checkpoint = argparse.Namespace(**read_flags(folder)), read_checkpoint(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"--sample {folder}: a run of --task {saved.task} without a tokenizer writes no text")
    tokenizer, task, device = moe_tokens.Tokenizer.read(folder / "tokenizer.json"), TASKS[saved.task], pick_device(args.device)
    with reading(folder, "is no run", "cannot be read as a run"):
        model = task.build_model(saved, SimpleNamespace(vocab_size=len(tokenizer.pieces), topics=["any"]), make_feed(saved))
        model.load_state_dict(checkpoint["model"])
    with dropless(model.to(device).eval()) as differs:
        notes = ["sampled dropless, trained with a capacity"] * differs + [saved.remark] * bool(saved.remark)
        return task.sample(args, model, tokenizer, saved) + (f"\n({'; '.join(notes)})" if notes else "")


def keep_memory():
    """Let glibc keep what tensors free: to give it back and fetch it again, page by page, takes up to a fifth of a step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        for threshold, size in (-3, 2**26), (-1, 2**30):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(threshold, size)


def main(argv=None):
    """Run the command line; returns the exit status. Ctrl-C outside the training loop has nothing to save."""
    keep_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        if processes()[0]:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # process 0 speaks for all
        return command(argv)
    except KeyboardInterrupt:
        print("interrupted; what was written before stays", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def command(argv):
    settings = split_flags(argv)
    several = any(len(values) > 1 for values in settings.values()) or "all" in settings.get("--router", ())
    try:
        if several and not settings.keys() & {"--bench", "--eval", "--sample", "--table", "--resume"}:
            return grid(settings)
        args = parse(argv)
        if args.bench:
            bench(args, settings)
        elif args.eval:
            args, task, data, model, device, gflops, spent = load_run(args.eval, args.device)
            conclude(args, task, model, data, device, gflops, spent)
        elif args.sample:
            print(sample(args))
        elif args.table:
            results(args.table)
        elif args.resume:
            return run(args, pathlib.Path(args.resume))
        else:
            check(args)
            return run(args)
    except (ValueError, OSError) as error:
        Parser().error(str(error))
    return 0


def run(args, folder=None):
    """One run, into a folder of its own or on from the checkpoint in `folder`; returns the exit status."""
    resumed = folder is not None and (args.resume is not None or (folder / "checkpoint.pt").exists())
    args.run = folder if resumed else None
    device, task, data, model, gflops = build(args)
    optimizer = make_optimizer(args, model, device)
    at = restore(args, folder, model, optimizer) if resumed else (0, 0.0)  # step and seconds
    folder = folder or (pathlib.Path(os.devnull) if processes()[0] else run_folder(args))
    if at[0] < args.steps and processes()[0] == 0:
        (folder / "summary.json").unlink(missing_ok=True)  # of fewer steps: not finished any more
    flags = {name: value for name, value in vars(args).items() if name not in UNRELATED - {"log_every", "save_every"}}
    for name, content in task.files(data).items():
        save(folder, name, content)
    save(folder, "config.json", {"flags": flags, "device": device.type, "threads": torch.get_num_threads(), "processes": processes()[1]} | versions())
    print(f"{args.task}, router {title(args)}, {data.about}; {device.type}, torch {torch.__version__}, seed {args.seed} -> {folder}")
    try:
        done, spent, caught = fit(args, task, model, optimizer, data, device, folder, *at)
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    if caught:
        print(f"interrupted after {done} of {args.steps} steps; --resume {folder} goes on from there")
        return 128 + caught
    if processes()[0] == 0:
        save(folder, "summary.json", conclude(args, task, model, data, device, gflops, spent, folder))
    return 0


# ---------------------------------------------------------------- what routing costs
def bench(args, given):
    """Forward and backward of one MoE layer for every router (or --router), against what it could cost at least.

    In the same rounds: a dense FFN of the experts' FLOPs, the batched experts alone on as many slots, the tensor
    (einsum) form, and a plain matrix product. Times are medians after warm-up; "kept" is what the forward leaves for the backward, weights apart.
    """
    if args.router not in (*ROUTERS, "all"):
        raise ValueError(f"--bench times routers: {', '.join(ROUTERS)}; got {args.router!r}")
    if args.tokens % args.group_size:
        raise ValueError(f"--group-size must divide --tokens {args.tokens}, got {args.group_size}")
    device, rows, result = pick_device(args.device), [], []
    side, peak = 8192 if device.type == "cuda" else 1024, 0.0  # FLOP/s of a plain square product, the best of all rounds
    square = torch.randn(side, side, device=device)
    for name in [args.router] if "--router" in given and args.router != "all" else ROUTERS:
        options = {option: value for option, value in router_options(args, name).items() if flag(option) in given}
        moe = MoE(build_router(name, args.dim, args.experts, **options), args.hidden).to(device)
        ffn = nn.Sequential(nn.Linear(args.dim, args.hidden), nn.GELU(), nn.Linear(args.hidden, args.dim)).to(device)
        x = torch.randn(args.tokens // args.group_size, args.group_size, args.dim, device=device)
        with torch.no_grad():
            routing = moe(x)[1]  # also makes Soft MoE's slots
            G, E, C, D = routing.dispatch(x).shape
        filled = int((routing.index < routing.tokens).sum()) if getattr(routing, "ragged", False) else G * E * C
        layer, form = compiled(moe) if args.compile else moe, lambda r: Routing(*r.tensors(), r.load)
        calls = {"layer": (lambda z: layer(z)[0], x), "dense": (ffn, x.new_empty(filled, D).normal_()),
                 "bare experts": (moe.experts, x.new_empty(E, G, C, D).normal_().transpose(0, 1)),  # in memory as dispatch lays them
                 "tensor form": (lambda z: form(moe.router(z)).run(z, moe.experts), x), "matmul": (lambda z: z @ z, square)}
        if name == "soft" or G * E * C * args.group_size >= 2**27:
            del calls["tensor form"]  # it is the only form, or would take gigabytes
        first, times = timed(args, device, *calls["layer"])[0], {what: [] for what in calls}
        for _ in range(args.repeats + 2):
            for what, call in calls.items():
                moe.zero_grad(), ffn.zero_grad()  # each writes its gradients afresh, as after a step
                times[what].append(timed(args, device, *call))
        seconds = {what: np.array([taken for taken, _ in of[2:]]) for what, of in times.items()}
        ms = {what: 1e3 * float(np.median(of)) for what, of in seconds.items()}
        kept = {what: times[what][-1][1] / 2**20 for what in ("layer", "dense")}
        peak = max(peak, 3 * 2 * side**3 / seconds["matmul"].min())
        ratios = {"/ " + what: f"{np.median(seconds['layer'] / seconds[what]):.2f}" if what in ms else "-"
                  for what in ("dense", "bare experts", "tensor form")}
        rows.append({"router": name, "ms": f"{ms['layer']:.1f}", **ratios, "tokens/s": f"{1e3 * args.tokens / ms['layer']:,.0f}",
                     "% of matmul peak": "", "MiB kept": f"{kept['layer']:.0f}", "dense MiB": f"{kept['dense']:.0f}"})
        rows[-1] |= {"first step s": f"{first:.1f}"} if args.compile else {}
        rate = 3 * 4 * filled * D * args.hidden / (ms["layer"] / 1e3)
        result.append({"router": name, "options": options, "ms": ms, "first_step_s": first, "MiB": kept, "flops_per_second": rate})
    for row, of in zip(rows, result):  # the peak is known at the end alone
        row["% of matmul peak"], of["peak_flops"] = f"{100 * of['flops_per_second'] / peak:.0f}", peak
    print(f"{args.tokens} tokens in groups of {args.group_size}, width {args.dim}, hidden {args.hidden}, {args.experts} experts; {device.type}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, matmul peak {peak / 1e9:.0f} GFLOP/s, median of {args.repeats}")
    print(table(rows))
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def timed(args, device, call, x):
    """Seconds of one forward and backward, and the bytes of distinct tensors kept between them, weights and input apart."""
    x, seen, synchronize = x.detach().requires_grad_(), {}, torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def pack(tensor):
        base = tensor if tensor._base is None else tensor._base
        if not base.is_leaf or not base.requires_grad:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    synchronize()
    start = time.perf_counter()
    with precision(args, device), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)
    y.sum().backward()
    synchronize()
    seen.pop(x.untyped_storage().data_ptr(), None)
    return time.perf_counter() - start, sum(seen.values())


# ---------------------------------------------------------------- grids: the same run, many times
def split_flags(argv):
    """{flag: [values]} of a command line; a flag with several values spans an axis of a grid."""
    settings, values = {}, []
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = settings[name] = [value] if equals else []
        else:
            values.append(word)
    return settings


def ignored(setting):
    """The flags of {flag: value} that mean nothing for its router."""
    router, task = setting.get("--router", "expert_choice"), TASKS.get(setting.get("--task", "vision"), moe_vision)
    having = set(ROUTERS[router].defaults) if router in ROUTERS else {"top_k"}
    none = {no + flag(name)[2:] for name in OPTIONS if name not in having for no in ("--", "--no-")} | task.ignored({"--router": router} | setting)
    if router == "dense":
        width = {"--top-k"} if setting.get("--dense-match") == "total" else {"--experts"}
        return none | {"--balance", "--balance-weight", "--z-loss", "--expert-init"} | width
    offers = ROUTERS[router].offers if router in ROUTERS else ()
    balance = setting.get("--balance") or task.ROUTER_DEFAULTS.get(router, {}).get("balance", "none")
    balances = "balance" in offers and (balance != "bias" or "bias_rate" in having)
    none |= {"--dense-match"} | (set() if BALANCE.get(balance, True) else {"--balance-weight"}) | (set() if "z" in offers else {"--z-loss"})
    return none if balances else none | {"--balance", "--balance-weight"}


def grid(settings):
    """Every combination of the values given, a run folder each under --out; finished ones are kept. Ends with the table."""
    every = "all" in settings.get("--router", ())
    if every:
        settings |= {"--router": ["dense", *ROUTERS], "--dense-match": settings.get("--dense-match", ["active", "total"])}
    cells, axes = {}, [name for name, values in settings.items() if len(values) > 1]
    for values in itertools.product(*(v or [None] for v in settings.values())):
        setting = dict(zip(settings, values))
        setting = {name: value for name, value in setting.items() if name not in ignored(setting)}
        args = parse([word for pair in setting.items() for word in pair if word is not None])
        try:
            check(args)
        except ValueError as error:
            if not every:
                raise ValueError(f"{' '.join(f'{name} {setting[name]}' for name in axes if name in setting)}: {error}") from None
            print(f"left out: {args.router}: {error}")
            continue
        config = json.dumps(settings_of(args), sort_keys=True)
        several = [f"{name[2:]}_{setting[name]}".replace("/", "_") for name in axes if name in setting and name not in ("--router", "--seed")]
        cells[hashlib.sha256(config.encode()).hexdigest()[:8]] = "-".join([args.router, *several, f"seed_{args.seed}"]), args
    out, status = pathlib.Path(settings.get("--out", ["runs"])[0]), 0
    out.mkdir(parents=True, exist_ok=True)
    for code, (name, args) in tqdm(cells.items(), desc="grid", dynamic_ncols=True):
        folder = next(out.glob(f"*-{code}"), out / f"{name}-{code}")
        if (folder / "summary.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        try:
            status = max(status, run(args, folder))
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{folder} failed: {error}", file=sys.stderr)
            status = 1
        gc.collect()  # a model and its data hold each other
        if status > 128:
            return status
    if processes()[0] == 0:
        results(out)
    if dist.is_initialized():
        dist.barrier()  # process 0 has evaluations and the table to finish
    return status


if __name__ == "__main__":
    sys.exit(main())

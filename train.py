"""Train one model with one router, and say what it learned and what it cost.

    python train.py --router expert_choice      a ViT with experts, on images drawn on the fly
    python train.py --router soft --data DIR    on a folder in the CIFAR binary layout, or an .npz
    python train.py --task tokens --router token_choice     a GPT on the standard library's text
    python train.py --router dense soft --seed 0 1 2    a grid of runs, and its table
    python train.py --sample RUN_DIR --prompt "def "        write on, with a finished run
    python train.py --resume RUN_DIR            go on with one that was stopped, bit for bit
    torchrun --nproc-per-node 8 train.py ...    the same run in many processes

Read in order: the settings, then `run`, the whole life of one run, then what it calls. Sections
marked "Later" may wait. Words are explained in routers.py. Every random draw has a key such as
(seed, step, "noise"), so a resumed run is the same run, with no random state to keep. Of many
processes, each draws the whole batch's random numbers and uses its own rows.

What fails while settings, data and model are made, and a full disk: one line, status 2. A loss that
is not finite: one line, status 1. Any later error is a bug, with its traceback.
"""

import argparse
import ctypes
import datetime
import io
import itertools
import json
import math
import os
import pathlib
import signal
import sys
import time
import traceback
import zlib
from contextlib import ExitStack, contextmanager, suppress
from html import escape
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.special import entr
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

with suppress(ImportError):  # Windows lacks it
    from fcntl import LOCK_EX, LOCK_NB, flock

import moe_tokens
import moe_vision
from moe_tokens import color
from moe_vision import seeded  # seeded(*key): a torch.Generator fixed by that key
from routers import CHOICES, ROUTERS, Experts, MoE, Router, build_router

# A task is a module: SETTINGS, SIZES, resolve() and load_data(). That gives the data, whose methods
# build the model, batch, judge and draw: see Images in moe_vision.py, Text in moe_tokens.py.
TASKS = {"vision": moe_vision, "tokens": moe_tokens}
BALANCE = {  # --balance: losses and their weights, or how a bias on the scores moves instead
    "none": {},
    "vmoe": {"importance": 0.005, "load": 0.005},
    "switch": {"balance": 0.01},
    "st_moe": {"balance": 0.01, "z": 0.001},
    "bias": {"bias_rate": 0.001, "bias_update": "sign"},
    "quantile": {"bias_rate": 1.0, "bias_update": "quantile"},
}
# What settings ask of a router. Dense has none, but takes top_k, which sets the width of its FFN.
DENSE = SimpleNamespace(defaults={"top_k": 1}, train_defaults={}, aux_losses=())
ROUTER_KINDS = {"dense": DENSE} | ROUTERS
WEIGHT_DECAY, CLIP, WARMUP = 0.05, 1.0, 0.1  # CLIP: largest gradient norm; WARMUP: share of steps


# ---------------------------------------------------------------- settings
def blocks(word):
    return sorted(set(map(int, word.split(","))))


def path_or_name(word):
    """A path as an absolute one, so that --resume finds it from any folder; or a set's name."""
    return str(pathlib.Path(word).absolute()) if os.path.exists(word) else word


def number_or_none(word):
    return None if word == "none" else float(word)


def anything(word):
    """None, a whole number, another number, or the word itself: what it looks like."""
    for read in int, number_or_none:
        with suppress(ValueError):
            return read(word)
    return word


# name: (type, default, help). A type is bool, a tuple of choices, or a function of a word. Whole
# numbers are at least 1 (seed and shared: 0), other numbers at least 0. None: see the help.
SETTINGS = {
    "task": (tuple(TASKS), "vision", "what to learn from: images or text"),
    "router": ((*ROUTER_KINDS, "all"), "expert_choice", "who sends tokens to experts"),
    "size": (("tiny", "cifar", "small", "base"), "tiny", "a preset; cifar is for images alone"),
    "seed": (int, 0, "fixes data, weights and order"),
    "data": (path_or_name, None, "a path, cifar10 or cifar100; else drawn images, library's text"),
    "device": (("auto", "cpu", "cuda", "mps"), "auto", "auto: the best there is"),
    "dtype": (("auto", "float32", "float64", "bfloat16"), "auto", "auto: bfloat16 on CUDA"),
    "out": (str, None, "folder; by default a fresh one below runs, or of a grid runs/grid-TASK"),
    "log_every": (int, 10, "steps between lines of metrics.jsonl"),
    "save_every": (float, 5.0, "minutes between checkpoints; 0: one after every step"),
    "steps": (int, None, "optimizer steps"),
    "batch_size": (int, None, "examples a step"),
    "lr": (float, None, "peak learning rate; it rises for a tenth of the steps, then falls to 0"),
    "router_lr": (float, 1.0, "routers learn at so many times --lr"),
    "dim": (int, None, "width D"),
    "depth": (int, None, "blocks"),
    "heads": (int, None, "attention heads"),
    "hidden": (int, None, "width inside an FFN or an expert"),
    "experts": (int, None, "experts E in a block"),
    "shared": (int, 0, "more experts, which every token passes"),
    "moe_blocks": (blocks, None, "blocks with experts, such as 1,3; by default as the task says"),
    "dense_match": (("active", "total"), "active", "dense: as wide as K experts, or as all"),
    "balance": (tuple(BALANCE), "none", "losses of a paper; bias, quantile: a bias on the scores"),
}
OPTION_HELP = {
    "top_k": "experts a token chooses; elsewhere it sets the number of slots",
    "capacity_factor": "slots for each choice; none: as many as are asked for (dropless)",
    "noise_std": "E times the deviation of the noise on logits in training; vmoe's load needs it",
    "router_weights": "frozen: as they start; random: drawn anew at each step",
    "gate": "one layer, or an mlp with one hidden layer",
    "priority": "who gets a seat first: by position, first choices, or the largest gates",
    "renormalize": "divide a token's weights by their sum; on text True where top_k >= 2",
    "bias_rate": "how fast the bias moves; --balance bias 0.001, quantile 1",
    "bias_update": "the rule by which it moves, as --balance says",
    "iterations": "of the solver that makes a plan",
    "combine_weights": "what weighs outputs: the gates, or the plan too",
    "num_keys": "rows of the table; 4096, on text one for each token id",
    "hash_weights": "equal, or by a learned gate (top_k >= 2)",
    "slots": "of each expert; none: by top_k and capacity_factor",
    "scale": "where the learned scale starts; 10 is better for a short training",
}
OPTIONS = {}  # as SETTINGS, built from ROUTERS: so the options of a new router become flags
OPTION_TYPES = {float: number_or_none, type(None): anything}  # by the type of a default
for kind in ROUTERS.values():
    for name, default in kind.defaults.items():
        of_type = CHOICES.get(name) or OPTION_TYPES.get(type(default), type(default))
        OPTIONS.setdefault(name, (of_type, default, OPTION_HELP.get(name, "")))
ACTIONS = {
    "resume": (str, None, "go on with a stopped run, or evaluate a finished one again"),
    "sample": (str, None, "write text with a finished run of --task tokens, then stop"),
    "table": (str, None, "make one table of all finished runs in a folder, then stop"),
    "bench": (bool, False, "time one MoE layer of every router (or of --router), then stop"),
}
RESUMED = ("resume", "steps", "device", "log_every", "save_every")  # what --resume may change
FREE = ("device", "out", "log_every", "save_every")  # they change no result, but for rounding


def defaults(table):
    return {name: default for name, (_, default, _) in table.items()}


# ---------------------------------------------------------------- one run
def run(overrides, folder):
    """The whole life of one run, new or stopped; returns the exit status.

    overrides: {setting: value} that the user gave.
    """
    with mistakes():
        settings = resolve(overrides)
        device = pick_device(settings)
        data = TASKS[settings.task].load_data(settings, device)
        model = build(settings, data)
        optimizer = make_optimizer(settings, model)
        record = Record(settings, folder)
        step = record.restore(data, model, optimizer)
        record.begin(overrides, data)
    print(f"{settings.task}, router {settings.title}, {data.description}; {device.type}")

    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    batch = data.batch(step, part_of_batch(settings))
    stop = False
    bar = tqdm(total=settings.steps, initial=step, desc=settings.title, disable=not record.writes)
    with signals() as caught, bar:
        while step < settings.steps and not stop:
            stepped = train_step(settings, data, wrapped, optimizer, step, batch)
            step, batch = step + 1, stepped.next_batch
            bar.update()
            if step == settings.steps or step % settings.log_every == 0:
                line = to_floats(data.metrics(stepped.sums) | stepped.losses)
                stats = block_stats(sum_processes(block_sums(stepped.routings), device))
                record.log(step, line | {"blocks": stats})
                worst = max((block["load_max"] for block in stats.values()), default=1)
                bar.set_postfix(loss=f"{line['loss']:.3g}", load_max=f"{worst:.2f}")
            asked = sum_processes({"stop": len(caught), "save": record.due()}, device)
            stop = asked["stop"] > 0  # asked of any process
            if stop or asked["save"] or step == settings.steps:
                check_sound(data, model, step)
                record.save(step, model, optimizer)
    if stop:
        print(f"interrupted after {step} of {settings.steps} steps; --resume {folder} goes on")
        return 128 + max(caught, default=signal.SIGTERM)  # none: another process caught it

    if processes()[0] == 0:
        summary, contingency = conclude(settings, data, model, record.seconds)
        shown = summary_text(summary, data, contingency)
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        page = run_page(data, model, summary, shown, map(json.loads, lines), contingency)
        record.finish(summary, page)
        print(f"{shown}\n-> {folder}/report.html")
    return 0


# ---------------------------------------------------------------- what `run` calls, in that order
@contextmanager
def mistakes(kinds=Exception):
    """An error of these kinds inside becomes one line and status 2."""
    try:
        yield
    except kinds as error:
        why = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, OSError)):  # perhaps a bug in a fork: say where
            place = traceback.extract_tb(error.__traceback__)[-1]
            why += f" ({type(error).__name__}, {place.filename}:{place.lineno})"
        print(f"train.py: error: {why}", file=sys.stderr)
        raise SystemExit(2) from error


def resolve(overrides):
    """Defaults, then overrides, then what follows from both; ValueError where they clash."""
    s = SimpleNamespace(**(defaults_of(overrides) | overrides))
    if s.dim % s.heads:
        raise ValueError(f"--heads must divide --dim, got --heads {s.heads} and --dim {s.dim}")
    if s.batch_size % processes()[1]:
        rule = f"the number of processes must divide --batch-size {s.batch_size}"
        raise ValueError(f"{rule}, got {processes()[1]}")
    aux_losses = ROUTER_KINDS[s.router].aux_losses
    s.loss_weights = {name: w for name, w in BALANCE[s.balance].items() if name in aux_losses}
    router = None
    if s.router != "dense":
        with torch.device("meta"):  # takes no memory: tasks read its `chooses` and `causal` alone
            router = make_router(s)
    elif s.dense_match == "active":
        s.width = s.hidden * (s.top_k + s.shared)
        del s.experts  # no effect here, so code_of() must not see it; so with top_k below
    else:
        s.width = s.hidden * (s.experts + s.shared)
        del s.top_k
    s.label = TASKS[s.task].resolve(s, router, overrides)  # "leaky" or ""; sets s.moe_blocks, ...
    s.title = f"{s.router} ({s.label})" if s.label else s.router
    if s.moe_blocks[0] < 0 or s.moe_blocks[-1] >= s.depth:
        raise ValueError(f"--moe-blocks must be from 0 to {s.depth - 1}, got {s.moe_blocks}")
    s.code = code_of(vars(s))
    return s


def defaults_of(overrides):
    """{setting: default}, for the task, size and router in overrides.

    Later ones win: the general defaults, the size's, the router's, its train_defaults, --balance's.
    """
    chosen = defaults(SETTINGS) | overrides
    task, kind = TASKS[chosen["task"]], ROUTER_KINDS[chosen["router"]]
    if chosen["size"] not in task.SIZES:
        raise ValueError(f"--size {chosen['size']} is not for --task {chosen['task']}")
    values = defaults(SETTINGS | task.SETTINGS) | task.SIZES[chosen["size"]]
    values |= kind.defaults | kind.train_defaults
    if overrides.get("router_weights", "learned") != "learned":
        values["balance"] = "none"  # such a gate learns nothing that a loss could balance
    if "bias_rate" in values:
        values["bias_rate"] = 0.0  # off, whatever the class says; --balance turns it on
        by_balance = BALANCE[overrides.get("balance", values["balance"])]
        values |= {name: by_balance[name] for name in by_balance if name in kind.defaults}
    return values


def lacking(overrides):
    """The settings among these that their task or router does not have."""
    known = defaults_of(overrides)
    chosen = known | overrides
    kind, lacks = ROUTER_KINDS[chosen["router"]], set(overrides) - set(known)
    # Both are in SETTINGS, so all know them; yet dense has no router, and a router no dense width.
    lacks.add("router_lr" if kind is DENSE else "dense_match")
    by_balance = set(BALANCE[chosen["balance"]])  # losses and options: the router needs them all
    if not by_balance <= {*kind.aux_losses, *kind.defaults}:
        lacks.add("balance")
    return lacks & set(overrides)


def code_of(settings):
    """Eight hex digits, equal for runs with the same result but for the seed."""
    # Balance is only a name: its effect is in loss_weights, bias_rate and bias_update.
    idle = {*FREE, "seed", "balance"}
    if settings.get("capacity_factor", 1) is None:
        idle.add("priority")  # dropless, all get a slot
    deciding = {name: settings[name] for name in settings if name not in idle}
    return f"{zlib.crc32(json.dumps(deciding, sort_keys=True).encode()):08x}"


def make_router(settings, tokens=1):
    """The router of these settings, for groups of so many tokens."""
    options = {name: getattr(settings, name) for name in ROUTERS[settings.router].defaults}
    return build_router(settings.router, settings.dim, settings.experts, tokens=tokens, **options)


def pick_device(settings):
    """The device; also sets torch's default dtype."""
    torch.set_default_dtype(torch.float64 if settings.dtype == "float64" else torch.float32)
    kind = settings.device
    if kind == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        kind = best.type if best else "cpu"
    if kind == "cuda" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)


def build(settings, data):
    """The model at its start, in evaluation mode."""

    def make_ffn(block):
        """What stands in that block after attention: an FFN or an MoE."""
        if block not in settings.moe_blocks:
            return dense_ffn(settings.dim, settings.hidden)
        if settings.router == "dense":
            return dense_ffn(settings.dim, settings.width)
        router = make_router(settings, data.tokens)
        experts = Experts(settings.experts, settings.dim, settings.hidden)
        width = settings.shared * settings.hidden
        return MoE(router, experts, dense_ffn(settings.dim, width) if width else None)

    torch.manual_seed(seeded(settings.seed, "weights").initial_seed())
    return data.build(settings, make_ffn).to(data.device).eval()


def dense_ffn(dim, width):
    return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))


def make_optimizer(settings, model):
    """AdamW. No decay on norms, biases and positions, nor on routers: that would flatten gates."""
    matrices = {"params": [], "weight_decay": WEIGHT_DECAY, "factor": 1.0}
    vectors = {"params": [], "weight_decay": 0.0, "factor": 1.0}
    routers = {"params": [], "weight_decay": 0.0, "factor": settings.router_lr}
    for name, parameter in model.named_parameters():
        group = matrices
        if ".router." in name:
            group = routers
        elif parameter.ndim < 2 or parameter.shape[-2] == 1 or name == "position":
            group = vectors  # an expert's biases have the shape [E, 1, n]
        if parameter.requires_grad:
            group["params"].append(parameter)
    return torch.optim.AdamW([matrices, vectors, routers], settings.lr, (0.9, 0.95), fused=True)


def train_step(settings, data, model, optimizer, step, batch):
    """One optimizer step: forward, backward, clip, step, update of the routers.

    batch is this process's part. Returns the sums for data.metrics(), the routers' losses summed
    over blocks and grad_norm, the routings by block, and the next step's batch.
    FloatingPointError, before a weight moves, for a loss or gradient that is not finite.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step) * group["factor"]
    torch.manual_seed(seeded(settings.seed, step, "noise").initial_seed())
    with precision(settings, data.device):
        loss, counts, routings = data.loss(model, batch)  # mean, {name: sum}, {block: Routing}
        distinct = list(dict.fromkeys(routings.values()))  # by --scope global all blocks share one
        objective, losses = loss, {}
        for routing in distinct:
            add(losses, routing.losses)
        for name, weight in settings.loss_weights.items():
            objective = objective + weight * losses.get(name, 0.0)  # "load" is absent without noise
    objective.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    sums = sum_processes(counts | {"loss": loss.detach() * counts["count"]}, data.device)
    losses = {name: value.detach() / processes()[1] for name, value in losses.items()}
    losses = sum_processes(losses, data.device) | {"grad_norm": norm}
    next_batch = data.batch(step + 1, part_of_batch(settings))  # made while a GPU still works
    if not torch.isfinite(norm + sums["loss"]):  # waits for the GPU
        found = f"loss {sums['loss'] / sums['count']:.3g}, gradient norm {norm:.3g}"
        raise FloatingPointError(f"at step {step + 1}: {found}")
    optimizer.step()
    optimizer.zero_grad()
    for i, routing in enumerate(distinct):  # for the next step
        routing.router.update([routing], seeded(settings.seed, step + 1, "router", i))
    return SimpleNamespace(sums=sums, losses=losses, routings=routings, next_batch=next_batch)


def learning_rate(settings, step):
    warm = max(1, round(WARMUP * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def precision(settings, device):
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def add(sums, values):
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def to_floats(values):
    return {name: float(value) for name, value in values.items()}


def block_sums(routings):
    """{block: Routing} -> {block: [E + 3]}, to be added over batches and processes.

    How many tokens want each expert; then all tokens, dropped tokens, summed entropies.
    """
    sums = {}
    for block, routing in routings.items():
        dropped = (routing.slots_per_token == 0).float()  # [G, T]
        entropy = torch.zeros_like(dropped)
        if routing.gates is not None:  # hash has none
            gates = routing.gates.detach().float()
            entropy = entr(gates).sum(-1) / math.log(max(2, gates.shape[-1]))
        of_tokens = torch.stack([torch.ones_like(dropped), dropped, entropy]).sum((1, 2))
        sums[block] = torch.cat([routing.tokens_per_expert.float(), of_tokens])
    return sums


def block_stats(sums):
    """How well each block's router works, {block: {stat: number}}, from block_sums().

    load_max: E * max_e n_e / sum_e n_e, the largest load over the mean, where n_e tokens want
    expert e; 1 is even. dead: experts that none wants. dropped: share of tokens that no expert
    serves. entropy: of the gates; 1 is uniform.
    """
    found = {}
    for block, of_block in sums.items():
        *wanted, tokens, dropped, entropy = of_block.tolist()
        load_max = len(wanted) * max(wanted) / max(sum(wanted), 1e-9)
        found[block] = {"load_max": load_max, "dead": wanted.count(0)}
        found[block] |= {"dropped": dropped / tokens, "entropy": entropy / tokens}
    return found


@torch.no_grad()
def check_sound(data, model, step):
    """FloatingPointError for weights that are not finite, or whose loss is not: never save them."""
    model.eval()
    loss, _, _ = data.loss(model, data.batch(step - 1, part=slice(0, 8)))  # a few are enough
    if not all(tensor.isfinite().all() for tensor in (loss, *model.state_dict().values())):
        raise FloatingPointError(f"at step {step}: the new weights or their loss are not finite")


def conclude(settings, data, model, seconds):
    """Evaluate and examine: the summary, and the contingency tables of specialization()."""
    summary = {"router": settings.title, "steps": settings.steps, "seconds": seconds}
    summary[f"{data.examples}_per_second"] = settings.batch_size * settings.steps / seconds
    summary["gflops"] = measure_flops(data, model)
    for split in data.splits:
        summary[split] = evaluate(settings, data, model, split)
    last = data.splits[-1]
    with dropless(model) as differs:
        if differs:
            summary[f"{last}_dropless"] = evaluate(settings, data, model, last)
    count = sum(p.numel() for p in model.parameters())
    summary["parameters"] = count
    summary["active_parameters"] = round(count - idle_parameters(model, data.tokens))
    summary["specialization"], contingency = specialization(settings, data, model)
    # A task adds: few-shot accuracy, trained and untrained; a leaky text model's loss without leak.
    summary |= data.report(settings, model, untrained=lambda: build(settings, data))
    summary["cells"] = cells(summary, data)  # for the table
    first_cell = next(iter(summary["cells"].values()))  # the task's first column ranks
    summary["score"] = data.sign * first_cell  # sign -1: less is better
    return summary, contingency


@torch.no_grad()
def measure_flops(data, model):
    """GFLOPs of one example's forward."""
    batch = next(iter(data.batches(data.splits[0])))
    one = {name: value[:1] for name, value in batch.items()}
    # The counter knows matrix products, not every fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        data.loss(model, one)
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def evaluate(settings, data, model, split):
    """Metrics and block stats of a whole split: without noise, cross-entropy alone."""
    model.eval()
    sums, of_blocks = {}, {}
    for batch in tqdm(data.batches(split), f"evaluating on {split}", leave=False):
        with precision(settings, data.device):
            loss, counts, routings = data.loss(model, batch)
        add(sums, to_floats(counts | {"loss": loss * counts["count"]}))
        add(of_blocks, block_sums(routings))
    metrics = to_floats(data.metrics(sums))
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(f"at the evaluation: loss {metrics['loss']} on {split}")
    return metrics | {"blocks": block_stats(of_blocks)}


@contextmanager
def dropless(model):
    """Inside, no token that chooses is turned away. Yields True if one could be before."""
    before = {}  # {router: its capacity_factor}
    for router in model.modules():
        if isinstance(router, Router) and router.chooses in ("tokens", "threshold"):
            before[router] = router.options.capacity_factor
            # A threshold needs a number: cf = E makes C the number of tokens.
            ample = None if router.chooses == "tokens" else float(router.num_experts)
            router.options.capacity_factor = ample
    yield any(before.values())
    for router, factor in before.items():
        router.options.capacity_factor = factor


def idle_parameters(model, tokens):
    """Parameters that an average token does not meet: those of experts that do not serve it."""
    idle = 0.0
    for moe in model.modules():
        if isinstance(moe, MoE):
            o = moe.router.options
            factor = o.capacity_factor or 1.0  # dropless: every choice is served
            if moe.router.chooses != "experts":
                factor = min(1.0, factor)  # more slots are not more choices
            serving = factor * o.top_k / moe.router.num_experts  # share of the experts
            if hasattr(o, "slots"):  # Soft: each token's share of E * slots mixes
                serving = o.slots / tokens
            idle += (1 - min(1, serving)) * sum(p.numel() for p in moe.experts.parameters())
    return idle


def summary_text(summary, data, contingency):
    """What a run prints: its row, how much its experts know of labels, the data's notes."""
    line = {"router": summary["router"]} | row([summary["cells"]])
    parts = table([line]), table(summary["specialization"]), data.notes(contingency)
    return "\n".join(filter(None, parts))


# ================================================================ Later: the table
def cells(summary, data):
    """The row of one run: {column: number, or a list of one number for each block}."""
    found = {name: value for name, value in data.columns(summary).items() if value is not None}
    for block in summary[data.splits[-1]]["blocks"].values():
        found.setdefault("load max/mean", []).append(block["load_max"])
        found.setdefault("dropped %", []).append(100 * block["dropped"])
    found["parameters"], found["active"] = summary["parameters"], summary["active_parameters"]
    found["GFLOPs"], found["seconds"] = summary["gflops"], summary["seconds"]
    found[f"{data.examples}/s"] = summary[f"{data.examples}_per_second"]
    gains = {}  # {label: NMI above chance of each block}
    for of_block in summary["specialization"]:
        gains.setdefault(of_block["experts know of"], []).append(of_block["above chance"])
    for label, values in gains.items():
        found[f"NMI {label}"] = float(np.mean(values))
    return found


def row(of_runs):
    """A row of the table, {column: text}: over the cells of several runs, mean ± deviation.

    A cell with a number for each block has a mean for each, and no deviation.
    """
    texts = {}
    for name in of_runs[0]:
        parts = []
        values = [found[name] for found in of_runs]  # [runs] or [runs, blocks]
        for mean in np.atleast_1d(np.mean(values, 0)):  # one, or one for each block
            rounded = mean % 1 == 0 or mean > 1000
            parts.append(f"{mean:,.0f}" if rounded else f"{mean:.4g}")
        texts[name] = ", ".join(parts)
        if np.ndim(values) == 1 and deviation(values):
            texts[name] += f" ± {deviation(values):,.3g}"
    return texts


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(rows):
    """Rows of {column: text or number} as Markdown, columns aligned; no column without an entry."""
    columns = []
    for name in dict.fromkeys(itertools.chain(*rows)):
        texts = []
        for line in rows:
            value = line.get(name, "-")
            texts.append(f"{value:.3f}" if isinstance(value, float) else str(value))
        if set(texts) != {"-"}:
            width = max(map(len, [name, *texts]))
            columns.append([text.ljust(width) for text in (name, "-" * width, *texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def results(overrides):
    """--table: one table of all finished runs in a folder; results.md and report.html go there."""
    folder = pathlib.Path(overrides["table"])
    runs, notes = finished(folder)
    if not runs:
        raise ValueError("; ".join([f"{folder} holds no finished run", *notes[:3]]))
    varied = varied_settings(runs)
    if not {"task", "head", "data"}.isdisjoint(varied):
        raise ValueError(f"{folder} holds runs of several tasks or data, which no table compares")
    groups, entries = {}, []
    for done in runs:
        groups.setdefault(done.settings["code"], []).append(done)
    for group in groups.values():  # runs of the same settings, one of each seed
        chosen = {"router": group[0].settings["title"]}
        for name in varied:
            chosen[name] = to_text(group[0].settings.get(name, "-"))
        texts = chosen | {"seeds": len(group), "to the best": ""}  # compare() fills in the last
        texts |= row([done.cells for done in group])
        title, scores = " ".join(chosen.values()), [done.score for done in group]
        entries.append(SimpleNamespace(title=title, runs=group, texts=texts, scores=scores))
    entries.sort(key=lambda entry: -np.mean(entry.scores))
    compare(entries)
    shown = "\n".join([table([entry.texts for entry in entries]), "", *notes])
    write_whole(folder / "results.md", shown + "\n")
    write_whole(folder / "report.html", grid_page(entries, shown))
    print(shown)


def varied_settings(runs):
    """The settings that a user gave and that differ between runs: each is a column."""
    varied = []
    for name in dict.fromkeys(itertools.chain(*(done.overrides for done in runs))):
        values = {to_text(done.settings.get(name, "-")) for done in runs}
        if len(values - {"-"}) > 1 and name not in (*FREE, "router", "seed"):
            varied.append(name)
    return varied


def finished(folder):
    """Runs below a folder (config.json, cells and score), and notes on those left out."""
    runs, notes = [], []
    for path in sorted(folder.glob("*/config.json")):
        try:
            summary = read_json(path.with_name("summary.json"))
            done = read_json(path) | {"cells": summary["cells"], "score": summary["score"]}
            runs.append(SimpleNamespace(**done))
        except Exception:  # a damaged file fails in many ways; the rest is still a table
            notes.append(f"Left out, not finished or not readable: {path.parent.name}")
    return runs, notes


def compare(entries):
    """Fill in the column "to the best" of entries, best first. A leaky one is never the best.

    A tie: the gap is at most the root of the summed squares of both deviations.
    """
    fair = [entry for entry in entries if entry.runs[0].settings["label"] != "leaky"]
    best = (fair or entries)[0]
    for entry in entries:
        gap = np.mean(entry.scores) - np.mean(best.scores)
        verdict = f"{gap:+.3g}"
        if entry is best:
            verdict = "best"
        elif min(len(entry.scores), len(best.scores)) == 1:
            verdict = "one seed"
        elif abs(gap) <= math.hypot(deviation(entry.scores), deviation(best.scores)):
            verdict = "tie"
        entry.texts["to the best"] = verdict


# ================================================================ Later: what experts know
EXAMINED = 2**21  # about so many weights are shuffled, which takes seconds


@torch.no_grad()
def examine(settings, data, model):
    """All N tokens of a split: {block: weights [N, E]}, {name: (label [N], owner [N], names)}.

    owner: the patch, image, document or sequence that a token belongs to. Its tokens share a label
    or a routing, so the draws by chance shuffle owners, not tokens.
    """
    model.eval()
    weights, labels, names_of, start = {}, {}, {}, 0
    for batch in tqdm(data.batches(data.examined), "examining experts", leave=False):
        with precision(settings, data.device):
            _, _, routings = data.loss(model, batch)
        B = len(batch["label"])
        for block, routing in routings.items():
            weight = routing.expert_weights.float().cpu()
            # [B, T, E]; with --unit sequence [B, 1, E], repeated for the T tokens of each.
            weight = weight.reshape(B, -1, weight.shape[-1]).expand(-1, data.tokens, -1)
            weights.setdefault(block, []).append(weight.flatten(0, 1))
        for name, (label, owner, names) in data.labels(batch, start).items():
            labels.setdefault(name, []).append(torch.stack([label, owner]).flatten(1))  # [2, B * T]
            names_of[name] = names
        start += B
    weights = {block: torch.cat(parts) for block, parts in weights.items()}
    return weights, {name: (*torch.cat(labels[name], 1), names_of[name]) for name in labels}


def specialization(settings, data, model):
    """How an expert's choice goes with the labels of tokens: rows of a table, and contingency.

    Rows: of each block and label the normalized mutual information (NMI), and that by chance.
    Contingency: {block: {label: (counts [labels, E + 1], names)}}, how many of a label's tokens
    expert e serves, split by weight where several do; the last column: the dropped ones.
    """
    weights, labels = examine(settings, data, model)
    rows, contingency = [], {}
    for block, name in itertools.product(weights, labels):
        label, owner, names = labels[name]
        known = label >= 0
        weight, label, owner = weights[block][known], label[known], owner[known]
        whole = weight.sum(1, keepdim=True)
        share = torch.cat([weight / whole.clamp(min=1e-30), (whole == 0).float()], 1)
        counts = share.new_zeros(len(names), share.shape[1]).index_add(0, label, share)
        contingency.setdefault(block, {})[name] = counts, names
        if len(label) and owner[0] >= 0:  # owner -1: counts but no NMI, as of token ids
            # Of much data every n-th token; n is odd, so that it skips no place in an image.
            n = 2 * (weight.numel() // EXAMINED) + 1
            value, null = nmi_and_null(weight[::n], label[::n], owner[::n])
            found = {"block": block, "experts know of": name, "NMI": value}
            found |= {"by chance": np.mean(null), "by chance, 95 %": np.quantile(null, 0.95)}
            rows.append(found | {"above chance": value - np.mean(null)})
    return rows, contingency


def nmi_and_null(weight, label, owner, draws=100):
    """NMI of expert with label, and of each draw by chance: weight [N, E], label [N], owner [N].

    An owner's weights are pooled, and spread evenly over its tokens. A draw by chance gives each
    owner the pool of another.
    """
    owners, index = owner.unique(return_inverse=True)
    routed = torch.zeros(len(owners), weight.shape[1], dtype=torch.float64)
    routed.index_add_(0, index, weight.double())
    part = 1 / index.bincount()[index].double()[:, None]  # [N, 1], of its owner's pool
    found, g = [], seeded("null")
    whose = torch.arange(len(owners))  # whose pool an owner gets: first its own, then drawn
    for _ in range(1 + draws):
        counts = torch.zeros(int(label.max()) + 1, weight.shape[1], dtype=torch.float64)
        found.append(nmi(counts.index_add(0, label, part * routed[whose[index]])))
        whose = torch.randperm(len(owners), generator=g)
    return found[0], found[1:]


def nmi(counts):
    """Normalized mutual information I / sqrt(H H) of counts [labels, E]; 0 if an H is 0."""
    p = counts.double() / counts.sum()
    labels, experts, both = (float(entr(q).sum()) for q in (p.sum(1), p.sum(0), p))
    if min(labels, experts) <= 1e-12:
        return 0.0
    return max(0.0, labels + experts - both) / math.sqrt(labels * experts)


# ================================================================ Later: the report page
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 15px/1.5 sans-serif; margin: 1.5em auto; max-width: 1180px; padding: 0 1em; }}
  figure {{ display: inline-block; vertical-align: top; margin: 0 2em 1em 0; width: 350px; }}
  figure svg {{ width: 100%; height: 160px; border: 1px solid #999; overflow: visible; }}
  polyline {{ fill: none; stroke-width: 1.5px; vector-effect: non-scaling-stroke; }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }}
  pre.table {{ white-space: pre; overflow-x: auto; line-height: 1.4; }}
  .map {{ display: inline-table; margin-right: 2em; }}
  .map td {{ width: 24px; border: 1px solid #ddd; font-size: 12px; text-align: center; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
CURVES = {  # of the numbers in metrics.jsonl, those that the page shows
    "loss": "training loss",
    "load_max": "load_max: the largest load over the mean; 1 is even",
    "dropped": "dropped: share of tokens that no expert serves",
    "entropy": "entropy of the gates; 1 is uniform",
}


def run_page(data, model, summary, shown, lines, contingency):
    """The page of one run, HTML that needs no network. shown: what is printed; lines: the log."""
    drawn = {name: {} for name in CURVES}  # {name: {"" or a block: [(step, value), ...]}}
    for line in lines:
        for block, values in (line["blocks"] | {"": line}).items():  # "": of the whole model
            for name in drawn.keys() & values.keys():
                drawn[name].setdefault(block, []).append((line["step"], values[name]))
    body = [f"<pre class=table>{escape(data.description)}\n{escape(shown)}</pre>"]
    body += [curves(CURVES[name], of_name) for name, of_name in drawn.items() if of_name]
    maps = []
    for found in sorted(summary["specialization"], key=lambda found: -found["above chance"]):
        block, label = found["block"], found["experts know of"]
        counts, names = contingency[block][label]
        if len(names) <= 24:  # more rows are no picture
            maps.append(heat_map(f"Block {block}: % of each {label} by expert", counts, names))
    body += maps[:3]
    body.append(data.pictures(model, contingency))
    title = escape(f"Router {summary['router']} on {data.examples}")
    return PAGE.format(title=title, body="\n".join(body))


def curves(heading, lines, of="steps", style=""):
    """A picture of lines {name: [(x, y), ...]} in one frame, the ranges of y and x above it."""
    xs, ys = zip(*itertools.chain(*lines.values()))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    drawn = legend = ""
    for i, (name, line) in enumerate(lines.items()):
        points = ""
        for x, y in line:
            across, up = (x - left) / (right - left or 1), (y - low) / (high - low or 1)
            points += f"{across:.4f},{1 - up:.4f} "
        ink = color(i, len(lines), lightness=40)
        drawn += f'<polyline points="{points}" stroke="{ink}" style="{style}"/>'
        legend += f'<span style="color:{ink}">&#9632; {escape(str(name))}</span> '
    frame = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1" preserveAspectRatio="none"'
    reach = f"<b>{escape(heading)}</b><br>{low:.4g} to {high:.4g}, {of} {left:.4g} to {right:.4g}"
    return f"<figure>{reach}<svg {frame}>{drawn}</svg>{legend}</figure>"


def heat_map(heading, counts, names):
    """A table of counts [labels, E + 1]: of each label, the share of its tokens in each column."""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1e-9)
    heads = "".join(f"<th>{e}" for e in range(share.shape[1] - 1))
    page = f"<caption>{escape(heading)}</caption><tr><th>{heads}<th>none"
    for name, values in zip(names, share.tolist()):
        page += f"<tr><th>{escape(str(name))}"
        for value in values:
            page += f'<td style="background:rgba(90,150,230,{value:.2f})">{100 * value:.0f}'
    return f"<table class=map>{page}</table>"


def grid_page(entries, shown):
    """The page of a grid: its table, and what each run reaches at which cost."""
    column = next(iter(entries[0].runs[0].cells))  # that which ranks
    reached = {}
    for entry in entries:
        points = [(done.cells["GFLOPs"], done.cells[column]) for done in entry.runs]
        reached[entry.title] = points * 2  # a lone point must come twice to be drawn
    heading, style = f"{column}: all runs of a row", "stroke-width:9px;stroke-linecap:round"
    picture = curves(heading, reached, "GFLOPs", style)
    return PAGE.format(title="Results", body=f"<pre class=table>{escape(shown)}</pre>{picture}")


# ================================================================ Later: runs that survive
class Record:
    """The folder of a run, in which process 0 alone writes."""

    def __init__(self, settings, folder):
        self.settings, self.folder, self.checkpoint = settings, folder, folder / "checkpoint.pt"
        self.writes = processes()[0] == 0
        self.end = 0  # bytes of metrics.jsonl at the last checkpoint
        self.seconds = 0.0  # of training until then
        self.start = self.saved_at = time.perf_counter()

    def restore(self, data, model, optimizer=None):
        """Load the checkpoint, if there is one; returns its step. Nothing is written."""
        if not self.checkpoint.exists():
            return 0
        if read_json(self.folder / "config.json")["fingerprint"] != data.fingerprint:
            raise ValueError(f"{self.folder} was trained on other data than {data.description}")
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)  # runs no code
        if saved["step"] > self.settings.steps:
            raise ValueError(f"{self.folder} is at step {saved['step']}, beyond --steps")
        model.load_state_dict(saved["model"])
        if optimizer:
            optimizer.load_state_dict(saved["optimizer"])
        self.end, self.seconds = saved["metrics_end"], saved["seconds"]
        self.start -= self.seconds
        return saved["step"]

    def begin(self, overrides, data):
        """Make this the folder of a run that trains, metrics.jsonl cut back to the checkpoint."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lines = open(self.folder / "metrics.jsonl", "ab")
        try:
            flock(self.lines, LOCK_EX | LOCK_NB)  # as long as the file is open
        except BlockingIOError:
            raise ValueError(f"{self.folder} is in use: another process trains there") from None
        except (OSError, NameError):
            pass  # Windows and some file systems have no flock
        self.lines.truncate(self.end)
        self.lines.seek(self.end)
        (self.folder / "summary.json").unlink(missing_ok=True)
        config = {"overrides": overrides, "settings": vars(self.settings)}
        config |= {"data": data.description, "fingerprint": data.fingerprint}
        config |= {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
        write_whole(self.folder / "config.json", json.dumps(config, indent=1))

    def log(self, step, values):
        """A line of metrics.jsonl. It holds no clock, so that equal runs have equal files."""
        line = {"step": step}
        if self.settings.label:
            line["label"] = self.settings.label
        if self.writes:
            self.lines.write(json.dumps(line | values).encode() + b"\n")
            self.lines.flush()

    def due(self):
        """Is it time for a checkpoint? The clock of process 0 decides."""
        return self.writes and time.perf_counter() - self.saved_at >= 60 * self.settings.save_every

    def save(self, step, model, optimizer):
        self.seconds = time.perf_counter() - self.start
        if self.writes:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            saved |= {"metrics_end": self.lines.tell(), "seconds": self.seconds}
            raw = io.BytesIO()  # in memory first: so a full disk is an OSError like any other
            torch.save(saved, raw)
            write_whole(self.checkpoint, raw.getvalue())
        self.saved_at = time.perf_counter()

    def finish(self, summary, page):
        """The evaluations' lines of metrics.jsonl, the report, the summary."""
        for split, values in summary.items():
            if isinstance(values, dict) and "blocks" in values:
                self.log(self.settings.steps, {"split": split, **values})
        write_whole(self.folder / "report.html", page)
        write_whole(self.folder / "summary.json", json.dumps(summary, indent=1))


def write_whole(path, content):
    """Write text or bytes, whole or not at all: under another name, then in place of the old."""
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write it too
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path):
    return json.loads(path.read_text("utf-8"))


@contextmanager
def signals():
    """Inside, Ctrl-C and SIGTERM wait for the end of the step. Yields a list of those caught."""
    caught = []
    with ExitStack() as after:
        for number in signal.SIGINT, signal.SIGTERM:
            before = signal.signal(number, lambda got, frame: caught.append(got))
            after.callback(signal.signal, number, before)
        yield caught


# ================================================================ Later: many processes
@contextmanager
def process_group():
    """Inside, this is one of the processes that torchrun started, if it did."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # to wait for process 0
    if processes()[0]:  # only process 0 prints results; errors come from all
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
    yield  # no finally: after an error torchrun ends the others, and to wait would hang
    dist.barrier()  # process 0 has evaluations and the table to finish
    dist.destroy_process_group()


def processes():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part_of_batch(settings):
    """The slice of a batch that this process computes."""
    rank, count = processes()
    rows = settings.batch_size // count
    return slice(rank * rows, (rank + 1) * rows)


def sum_processes(values, device):
    """{name: number, or tensors of one shape}, summed over all processes."""
    if not dist.is_initialized() or not values:
        return values
    stacked = torch.stack([torch.as_tensor(value).double().to(device) for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked))


# ================================================================ Later: what routing costs
BENCH_SECONDS = 2.0  # in which a call is repeated


def bench(overrides):
    """--bench: milliseconds of an MoE layer, forward and backward: of every router, or --router.

    And over the time of a dense FFN on the same slots, which has the experts' FLOPs.
    """
    b = dict(router="all", dim=256, hidden=1024, experts=16, dtype="auto", device="auto")
    b = SimpleNamespace(**(b | overrides))
    x, rows = torch.randn(16, 256, b.dim, device=pick_device(b)), []
    dense = dense_ffn(b.dim, b.hidden).to(x.device)
    for name in ROUTERS if b.router == "all" else [b.router]:
        # Of one router, an option that it lacks is an error; of all, it is left out.
        known = ROUTERS[name].defaults if b.router == "all" else OPTIONS
        options = {option: overrides[option] for option in overrides.keys() & known.keys()}
        router = build_router(name, b.dim, b.experts, tokens=x.shape[1], **options)
        moe = MoE(router, Experts(b.experts, b.dim, b.hidden)).to(x.device)
        routing = moe(x)[1]
        slots = routing.dispatch(x).detach().flatten(0, 2)  # [G * E * C, D]
        if routing.filled:  # dropless: filled slots alone; which ones changes no time
            slots = slots[: sum(routing.filled)]
        ms = milliseconds(b, lambda z: moe(z)[0], x)
        rows.append({"router": name, "ms": ms, "time / dense": ms / milliseconds(b, dense, slots)})
    print(f"{x.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(rows))


def milliseconds(b, layer, x):
    """The median time of layer(x) and its backward."""
    x = x.detach().requires_grad_()

    def both():
        with precision(b, x.device):
            y = layer(x)
        y.sum().backward()

    timer = Timer("both()", globals={"both": both}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=BENCH_SECONDS).median


# ================================================================ Later: the command line
def main(words=None):
    """Run the command line; returns the exit status, 1 if a run diverged. Mistakes exit with 2."""
    keep_memory()
    try:
        with mistakes(OSError), process_group():  # such as a full disk
            return command(words)
    except KeyboardInterrupt:  # outside the training, where signals() waits for the step's end
        print("train.py: interrupted", file=sys.stderr)
        return 130


def keep_memory():
    """Let glibc keep what tensors free: to fetch it again takes up to a quarter of a CPU's step."""
    with suppress(AttributeError, TypeError):  # other systems have no mallopt
        for threshold, size in (-3, 2**25), (-1, 2**30):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, size)


def command(words):
    """Train the runs that are asked for and make their table, or do something else."""
    with mistakes():
        action, lists = parse(words)
        overrides = {name: values[0] for name, values in lists.items()}  # a grid's: runs_to_do()
        several = overrides.get("router") == "all" or max(map(len, lists.values()), default=1) > 1
        if action == "resume":
            out = pathlib.Path(overrides.pop(action))
            runs = {out: read_json(out / "config.json")["overrides"] | overrides}
        elif action:
            if processes()[0] == 0:  # no training: one process does it alone
                {"bench": bench, "table": results, "sample": sample}[action](overrides)
            return 0
        else:
            out, runs = runs_to_do(lists, several)
    status = 0
    for folder in tqdm(runs, "grid", disable=not several or processes()[0] > 0):
        try:
            interrupted = run(runs[folder], folder)
        except FloatingPointError as error:
            print(f"train.py: {folder} diverged {error}", file=sys.stderr)
            interrupted, status = 0, 1  # and the grid goes on
        if interrupted:
            return interrupted
    if several and processes()[0] == 0:
        with mistakes():
            results({"table": out})
    return status


def sample(overrides):
    """--sample: print text that a finished run of --task tokens writes."""
    asked = defaults(moe_tokens.SAMPLING) | {"seed": 0, "device": "auto"} | overrides
    asked, folder = SimpleNamespace(**asked), pathlib.Path(overrides["sample"])
    of_run = read_json(folder / "config.json")["overrides"]
    settings = resolve(of_run | {"device": asked.device})
    data = TASKS[settings.task].load_data(settings, pick_device(settings))
    model = build(settings, data)
    if getattr(data, "tokenizer", None) is None:
        raise ValueError(f"{folder} was not trained on text: it cannot write")
    if Record(settings, folder).restore(data, model) == 0:
        raise ValueError(f"{folder} has no checkpoint yet")
    with dropless(model) as differs:
        print(moe_tokens.sample(model, data.tokenizer, settings, asked))
    if differs:
        print("(sampled dropless, trained with a capacity)")
    if settings.label:
        print(f"({settings.label})")


def runs_to_do(lists, several):
    """The output folder, and {folder: overrides} of unfinished runs, from {setting: [values]}."""
    first = defaults(SETTINGS) | {name: values[0] for name, values in lists.items()}
    fresh = f"{first['task']}-{first['router']}-{time.strftime('%m%d-%H%M%S')}"
    if several:
        fresh = f"grid-{first['task']}"
    out = pathlib.Path(first["out"] or f"runs/{fresh}")
    if not several and processes()[0] == 0 and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; choose another folder")
    for name in ("task", "head", "data", *FREE):  # no table compares two of the first three
        if len(lists.get(name, ())) > 1:
            raise ValueError(f"{flag(name)} takes one value, got {len(lists[name])}")
    runs = {}
    for overrides, settings in combinations(lists):
        folder = out
        if several:  # equal settings have equal codes, and are one run
            folder = out / f"{settings.router}-seed_{settings.seed}-{settings.code}"
        if not (folder / "summary.json").exists():
            runs.setdefault(folder, overrides)
    return out, runs


def combinations(lists):
    """All combinations of {setting: [values]}: (overrides, settings) of each.

    A setting is dropped where its router lacks it; if all lack it, that is an error. --router all:
    routers that reject a value are left out, and named.
    """
    all_routers, found, left_out = "all" in lists.get("router", ()), [], {}
    if all_routers:
        widths = {"dense_match": ["active", "total"]}  # of dense; other routers' two runs are one
        lists = widths | lists | {"router": list(ROUTER_KINDS)}
    unused = set(lists)  # settings that no combination has
    for values in itertools.product(*lists.values()):
        overrides = dict(zip(lists, values))
        for name in lacking(overrides):
            del overrides[name]
        unused -= set(overrides)
        try:
            found.append((overrides, resolve(overrides)))
        except ValueError as error:
            if not all_routers:
                raise
            left_out[overrides["router"]] = error
    if unused:
        chosen = defaults(SETTINGS) | {name: to_text(lists[name]) for name in lists}
        rule = f"--router {chosen['router']} on --task {chosen['task']} has no"
        raise ValueError(f"{rule} {', '.join(map(flag, sorted(unused)))}")
    for router, error in left_out.items():
        print(f"left out: {router}: {error}")
    return found


def parse(words):
    """The command line -> an action or None, and what it says, {setting: [values]}."""
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = __doc__.partition("\n")[0]
    groups = {"a run": SETTINGS} | {f"--task {name}": TASKS[name].SETTINGS for name in TASKS}
    groups |= {"options of routers": OPTIONS}
    groups |= {"instead of a run, and beside it": ACTIONS | moe_tokens.SAMPLING}
    for heading, settings in groups.items():
        group = parser.add_argument_group(heading)
        for name, (of_type, default, what) in settings.items():
            how = dict(nargs="+", type=of_type, metavar="X")
            if of_type is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(of_type, tuple):
                how = dict(nargs="+", choices=of_type)
            what = f"{what} {default_text(name, default)}".strip().replace("%", "%%")
            group.add_argument(flag(name), default=argparse.SUPPRESS, help=what, **how)
    lists = vars(parser.parse_args(words))
    for name, value in lists.items():
        lists[name] = value if isinstance(value, list) else [value]  # a bool is no list
    action = next((name for name in ACTIONS if any(lists.get(name, []))), None)
    for name, values in lists.items():
        if action and len(values) > 1:
            raise ValueError(f"{flag(name)} takes one value beside {flag(action)}")
        if action == "resume" and name not in RESUMED:
            raise ValueError(f"{flag(name)} cannot change in a run that is resumed")
        for value in values:
            least = 1 if type(value) is int and name not in ("seed", "shared") else 0
            if type(value) in (int, float) and not least <= value < math.inf:
                raise ValueError(f"{flag(name)} must be at least {least}, got {value}")
    return action, lists


def default_text(name, default):
    """A setting's default, then that of tasks and routers that have another, in brackets."""
    texts = [to_text(default)] if to_text(default) not in ("none", "False", "") else []
    others = {f"{task}, tiny": module.SIZES["tiny"] for task, module in TASKS.items()}
    others |= {router: kind.defaults | kind.train_defaults for router, kind in ROUTERS.items()}
    for owner, theirs in others.items():
        if theirs.get(name, default) != default:
            texts.append(f"{owner}: {to_text(theirs[name])}")
    return f"({'; '.join(texts)})" if texts else ""


def flag(name):
    return "--" + name.replace("_", "-")


def to_text(value):
    """A value as text; none and lists as the command line takes them."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())

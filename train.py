"""Train one model with one router, and say what it learned and what it cost.

    python train.py --router expert_choice      a ViT with experts, on images drawn on the fly
    python train.py --router dense              the same ViT without experts
    python train.py --router soft --data DIR    on a folder in the CIFAR binary layout, or an .npz
    python train.py --task tokens --router token_choice     a GPT on the standard library's text
    python train.py --router dense soft --seed 0 1 2    a grid of runs, and its table
    python train.py --sample RUN_DIR --prompt "def "        write on, with a finished run
    python train.py --eval RUN_DIR              evaluate a finished run again
    python train.py --resume RUN_DIR            go on with one that was stopped, bit for bit
    torchrun --nproc-per-node 8 train.py ...    the same run in many processes
    python train.py --help                      every setting

Words are explained in routers.py. Read in order: the settings, then `run`, the whole life of one
run, then what it calls. Skip the sections marked "Later" on a first reading; of them it is enough
to know

    Record                    the run's folder and its checkpoints
    signals                   a list of the signals caught so far, such as Ctrl-C
    processes                 (this process's number, how many there are)
    total                     sums over all processes
    wrap                      the model ready to train: compiled, synchronised
    parts_of_batch            the rows that this process computes
    examine, specialisation   to which experts the tokens of each label go
    row, table, report_page   what is printed, and report.html

Every random draw has a key such as (seed, step, "noise"): one seed fixes data, weights and order,
and no random state has to be kept. So a resumed run is the same run. Of many processes, each draws
the whole batch's random numbers and uses its own rows. A run folder holds config.json,
metrics.jsonl, checkpoint.pt, summary.json and report.html.
"""

import argparse
import ctypes
import datetime
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import signal
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial
from html import escape
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.special import entr
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import moe_tokens
import moe_vision
from routers import CHOICES, ROUTERS, Experts, MoE, Routing, build_router, color, seeded

# A task is a module: SETTINGS, SIZES, SPLITS, EXAMINED, UNIT, MORE_IS_BETTER, moe_blocks, settle,
# unused, columns, load. load() gives the data, whose methods build the model, batch and judge.
TASKS = {"vision": moe_vision, "tokens": moe_tokens}
BALANCE = {  # --balance: the losses it weighs
    "none": {},
    "vmoe": {"importance": 0.005, "load": 0.005},
    "switch": {"balance": 0.01},
    "bias": {},
}

# What settings ask of a router; dense is none, but takes top_k, which sets its width.
ROUTER_KINDS = {"dense": SimpleNamespace(defaults={"top_k": 1}, recipe={}, offers=())} | ROUTERS

# ---------------------------------------------------------------- settings
# name: (kind, default, what it is). A kind is bool, a tuple of choices, or a word that read_word()
# knows, most of them numbers: see NUMBERS, near the end.
SETTINGS = {
    # what to run
    "task": (tuple(TASKS), "vision", "what to learn from: images or text"),
    "router": ("router", "expert_choice", "dense, all, or one of " + ", ".join(ROUTERS)),
    "size": (("tiny", "small", "base"), "tiny", "a preset; each part has a flag too"),
    "seed": ("integer", 0, "fixes data, weights and order"),
    "data": ("path", None, "a path, cifar10 or cifar100; else drawn images, the library's text"),
    "device": (("auto", "cpu", "cuda", "mps"), "auto", "auto: the best there is"),
    "dtype": (("auto", "float32", "float64", "bfloat16"), "auto", "auto: bfloat16 on CUDA"),
    "compile": (bool, False, "torch.compile the model, without graph breaks"),
    "out": ("path", None, "run folder; by default a fresh runs/TASK-ROUTER-N"),
    "log_every": ("whole", 10, "steps between lines of metrics.jsonl"),
    "save_every": ("whole", 200, "steps between checkpoints"),
    # optimisation: AdamW. None: as the size says.
    "steps": ("whole", None, "optimiser steps"),
    "batch_size": ("whole", None, "examples a step"),
    "grad_accum": ("few", 1, "parts a batch is computed in"),
    "lr": ("positive", None, "peak learning rate"),
    "router_lr": ("positive", 1.0, "routers learn at so many times --lr"),
    "warmup": ("share", 0.1, "share of the steps in which the rate rises"),
    "schedule": (("cosine", "constant"), "cosine", "the rate after that: cosine to 0, or constant"),
    "weight_decay": ("at_least_0", 0.05, "not on norms, biases, positions and routers"),
    "clip": ("positive", 1.0, "largest gradient norm"),
    # the model
    "dim": ("whole", None, "width D"),
    "depth": ("few", None, "blocks"),
    "heads": ("few", None, "attention heads"),
    "hidden": ("whole", None, "width inside an FFN or an expert"),
    "experts": ("whole", None, "experts E in a block"),
    "shared": ("count", 0, "more experts, which every token passes"),
    "moe_blocks": ("blocks", None, "blocks with experts, such as 1,3; by default as the task says"),
    "expert_init": (("independent", "identical"), "independent", "start apart, or all alike"),
    "dense_match": (("active", "total"), "active", "dense: as wide as K experts, or as all"),
    # the routers' losses
    "balance": (tuple(BALANCE), "none", "vmoe: importance, and load with --noise-std"),
    "balance_weight": ("at_least_0", None, "their weight; by default vmoe .005 each, switch .01"),
    "z_loss": ("at_least_0", 0.0, "weight of the mean squared logsumexp of the logits"),
}
OPTIONS = {}  # the routers' options: a router added to ROUTERS brings its own
for kind in ROUTERS.values():
    OPTIONS |= kind.defaults
SAMPLING = {  # with --sample
    "prompt": ("text", "", "text to go on from"),
    "max_new_tokens": ("whole", 200, "tokens to write"),
    "temperature": ("at_least_0", 0.8, "0: always the likeliest token"),
    "top_p": ("positive", 0.95, "draw from the likeliest tokens that hold this much probability"),
}
BENCH = {  # with --bench
    "tokens": ("whole", 4096, "tokens that pass the layer"),
    "group_size": ("whole", 256, "tokens in a group of them"),
    "repeats": ("whole", 9, "rounds that are timed"),
}
ACTIONS = {
    "eval": ("path", None, "evaluate a finished run again, then stop"),
    "sample": ("path", None, "write text with a finished run of --task tokens, then stop"),
    "table": ("path", None, "make one table of all finished runs in a folder, then stop"),
    "resume": ("path", None, "go on with a stopped run; steps, device, intervals may change"),
    "bench": (bool, False, "time one MoE layer of every router (or of --router), then stop"),
}
# Flags allowed beside an action. bench() checks its own, Record.restore() those of --resume.
BESIDE = {"table": (), "eval": ("device",), "sample": ("device", "seed", "task", *SAMPLING)}
FREE = {"device", "out", "log_every", "save_every"}  # they change no result


# ---------------------------------------------------------------- one run
def run(said, folder=None, resume=False):
    """The whole life of one run; returns the exit status.

    said    {setting: value}, what the command line says
    folder  of the run; None: a fresh one. resume: it holds a checkpoint to go on from
    """
    settings = settle(said)
    device = pick_device(settings)
    data = TASKS[settings.task].load(settings, device, folder if resume else None)
    model = build(settings, data, device)
    gflops = measure_flops(settings, data, model)
    optimizer = make_optimizer(settings, model, device)

    with Record(settings, said, data.about, folder, resume) as record:
        step = record.restore(model, optimizer) if resume else 0
        record.begin(data, device)
        print(f"{settings.task}, router {title(settings)}, {data.about}; {about(settings, device)}")
        trained = wrap(settings, model)
        stop = False
        bar = tqdm(total=settings.steps, initial=step, desc=title(settings), dynamic_ncols=True)
        with signals() as caught, bar:
            while step < settings.steps and not stop:
                stepped = train_step(settings, data, trained, optimizer, step)
                step += 1
                last = step == settings.steps
                record.note_first_step()
                bar.update()
                if last or step % settings.log_every == 0:
                    line = numbers(data.metrics(stepped.sums) | stepped.losses)
                    record.log(step, line | {"blocks": statistics(stepped.routings)})
                    show(bar, line)
                stop = bool(total({"stop": len(caught)}, device)["stop"])
                if last or stop or step % settings.save_every == 0:
                    check_sound(data, model, step)
                    record.save(step, model, optimizer)
            # A signal may have come during the last save.
            stop = bool(total({"stop": len(caught)}, device)["stop"])
        if stop:
            done = f"interrupted after {step} of {settings.steps} steps"
            print(f"{done}; --resume {record.folder} goes on from there")
            return 128 + (caught or [signal.SIGTERM])[0]  # or caught by another process
        spent = record.spent()
        if processes()[0] == 0:
            summary, joints = conclude(settings, data, model, device)
            summary |= spent | {"gflops": gflops}
            record.finish(summary, report_page(settings, data, model, summary, joints, record))
            tell(settings, data, model, summary, joints)
            print(f"-> {record.folder}/report.html")
    return 0


# ---------------------------------------------------------------- what `run` calls, in that order
def settle(said):
    """Every setting of a run, from those said; ValueError where they clash or have no effect.

    filled() gives each its value; unused(), complete() and the task's settle() apply the rules.
    """
    settings = filled(said)
    unsaid = filled(dict(task=settings.task, router=settings.router, size=settings.size))
    for name, why in unused(said).items():
        # To say the default of a setting without effect does no harm; another task's has none here.
        if not hasattr(unsaid, name) or said[name] != getattr(unsaid, name):
            raise ValueError(why)
    complete(settings, said)
    router = None
    if settings.router != "dense":
        with torch.device("meta"):  # no memory is taken: the task only asks what it is
            router = make_router(settings)
    settings.remark = TASKS[settings.task].settle(settings, router, said)  # such as "leaky", or ""
    return settings


def filled(said):
    """Every setting. Later ones win: the defaults, the size, the router's recipe, what was said."""
    task = TASKS[said.get("task", SETTINGS["task"][1])]
    values = {name: default for name, (_, default, _) in (SETTINGS | task.SETTINGS).items()}
    chosen = values | said  # which router, which size
    kind = ROUTER_KINDS[chosen["router"]]
    values |= task.SIZES[chosen["size"]] | kind.defaults
    values |= {name: value for name, value in kind.recipe.items() if name in values}
    if said.get("router_weights", "learned") != "learned":
        values["balance"] = "none"  # such a gate learns nothing that a loss could balance
    return SimpleNamespace(**(values | said))


def unused(said):
    """{setting said: why it has no effect here}. A run refuses it, a grid leaves it out."""
    settings = filled(said)
    name, task = settings.router, TASKS[settings.task]
    options, offered = ROUTER_KINDS[name].defaults, ROUTER_KINDS[name].offers
    found = {}  # {setting without effect: why}, said or not
    if name == "dense":
        found["expert_init"] = "--expert-init is for experts; --router dense has none"
    else:
        found["dense_match"] = f"--dense-match is for --router dense, not {name}"
    if getattr(settings, "capacity_factor", 1) is None:
        found["priority"] = "--priority orders the line for slots; dropless, every token gets one"
    if getattr(settings, "slots", None):
        found["capacity_factor"] = "--capacity-factor counts slots, which --slots does"
    if settings.balance != "switch":
        found["balance_scope"] = "--balance-scope is for the loss of --balance switch"
    offers = f"; it offers {', '.join(offered)}" if offered else ""
    for setting in said:
        if setting in OPTIONS and setting not in options:
            has = f"it has {', '.join(sorted(options))}"
            found[setting] = f"{flag(setting)} is no option of --router {name}; {has}"
        elif setting not in SETTINGS | task.SETTINGS | options:
            found[setting] = f"{flag(setting)} is no setting of --task {settings.task}"
    found |= task.unused(settings)
    if name in ("dense", "hash") or getattr(settings, "router_weights", "learned") != "learned":
        found["router_lr"] = f"--router-lr is for routers that learn, not {name} with these options"
    for loss in BALANCE[settings.balance]:
        if loss not in offered and loss != "load":  # load comes with importance, and noise
            found["balance"] = f"--router {name} offers no {loss} loss{offers}"
    if settings.balance == "bias" and "bias_rate" not in options:
        rule = "--balance bias is for routers in which tokens choose by scores"
        found["balance"] = f"{rule}, not --router {name}"
    if not BALANCE[settings.balance] or "balance" in found:
        rule = "--balance-weight weighs the losses of --balance vmoe or switch"
        found["balance_weight"] = f"{rule}, got --balance {settings.balance}"
    if "z" not in offered:
        found["z_loss"] = f"--router {name} offers no z loss{offers}"
    return {setting: why for setting, why in found.items() if setting in said}


def complete(settings, said):
    """Fill in the settings that follow from others, on any task; ValueError where some clash."""
    s = settings
    if s.dim % s.heads:
        raise ValueError(f"--heads must divide --dim, got --heads {s.heads} and --dim {s.dim}")
    if s.moe_blocks is None:
        s.moe_blocks = TASKS[s.task].moe_blocks(s.depth)
    if s.moe_blocks[-1] >= s.depth:
        rule = f"--moe-blocks must name blocks from 0 to {s.depth - 1}"
        raise ValueError(f"{rule}, got {s.moe_blocks}")
    if s.router == "dense":
        if s.top_k > s.experts:
            raise ValueError(f"--top-k must be at most --experts {s.experts}, got {s.top_k}")
        if s.dense_match == "active":
            experts = s.top_k
        else:
            experts = s.experts
            del s.top_k  # without effect: a grid over it would train the same model again
        s.width = s.hidden * (experts + s.shared)  # of the dense FFN
        del s.experts, s.shared  # of them the width alone has an effect
    if hasattr(s, "bias_rate") and "bias_rate" not in said:
        s.bias_rate = 1e-3 if s.balance == "bias" else 0.0  # as in 2408.15664
    if s.balance == "bias" and not s.bias_rate:
        raise ValueError(f"--balance bias needs a --bias-rate above 0, got {s.bias_rate}")
    if s.batch_size % (s.grad_accum * processes()[1]):
        rule = f"--grad-accum times the processes must divide --batch-size {s.batch_size}"
        raise ValueError(f"{rule}, got {s.grad_accum} times {processes()[1]}")


def make_router(settings, tokens=1):
    """The router of these settings, for groups of so many tokens."""
    options = {}
    for name in ROUTERS[settings.router].defaults:
        value = getattr(settings, name)
        if value is not None or name == "capacity_factor":
            options[name] = value
    return build_router(settings.router, settings.dim, settings.experts, tokens=tokens, **options)


def pick_device(settings):
    """The device; also sets torch's default dtype."""
    torch.set_default_dtype(torch.float64 if settings.dtype == "float64" else torch.float32)
    here = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).device_count()]
    name = here[0] if settings.device == "auto" else settings.device
    if name not in here:
        raise ValueError(f"--device {name}: this machine has none; there is {', '.join(here)}")
    if name == "cuda" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def build(settings, data, device):
    """The model at its start, in evaluation mode."""

    def make_feed(block):
        """What stands in that block after attention: an FFN or an MoE."""
        if block not in settings.moe_blocks:
            return ffn(settings.dim, settings.hidden)
        if settings.router == "dense":
            return ffn(settings.dim, settings.width)
        router = make_router(settings, data.tokens)
        experts = Experts(settings.experts, settings.dim, settings.hidden, settings.expert_init)
        shared = ffn(settings.dim, settings.shared * settings.hidden) if settings.shared else None
        return MoE(router, experts, shared)

    with torch.device("meta"):  # shapes alone: does it fit into memory?
        check_memory(settings, data, data.build(settings, make_feed), device)
    torch.manual_seed(seeded(settings.seed, "weights").initial_seed())
    return data.build(settings, make_feed).to(device).eval()


def ffn(dim, width):
    return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))


def check_memory(settings, data, model, device):
    """ValueError for settings that cannot fit into a CPU's memory, before anything is filled."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return  # unknown
    examples = settings.batch_size // settings.grad_accum // processes()[1]
    count = 4 * sum(p.numel() for p in model.parameters())  # with gradients and AdamW's two
    count += examples * data.tokens * settings.dim * 4 * settings.depth  # of a block at least four
    for moe in moes(model):
        slots = moe.router.num_experts * (moe.router.capacity(data.tokens) or 1)
        count += 2 * examples * slots * settings.hidden
    wanted = count * torch.get_default_dtype().itemsize / 1e9
    if device.type == "cpu" and wanted > memory:
        has = f"this machine has {memory:,.0f} GB"
        raise ValueError(f"these sizes need at least {wanted:,.0f} GB of memory, {has}")


@torch.no_grad()
def measure_flops(settings, data, model):
    """GFLOPs of one example's forward; labels that do not fit it fail here, not after training."""
    batch = next(iter(data.split(TASKS[settings.task].SPLITS[0])))
    one = {name: value[:1] for name, value in batch.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, _, routings = data.loss(model, one)
    examine(data, one, 0, routings)
    return counter.get_total_flops() / 1e9


def make_optimizer(settings, model, device):
    """AdamW. No decay on norms, biases and positions, nor on routers: that would flatten gates."""
    spared = {"position"}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            spared |= {f"{name}.{parameter}" for parameter in module.no_decay()}
    weights = {"params": [], "weight_decay": settings.weight_decay, "factor": 1.0}
    bare = {"params": [], "weight_decay": 0.0, "factor": 1.0}
    gates = {"params": [], "weight_decay": 0.0, "factor": settings.router_lr}
    for name, parameter in model.named_parameters():
        group = weights
        if ".router." in name:
            group = gates
        elif parameter.ndim < 2 or name in spared:
            group = bare
        if parameter.requires_grad:
            group["params"].append(parameter)
    fused = device.type in ("cuda", "cpu")
    groups = [weights, bare, gates]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=fused)


def train_step(settings, data, model, optimizer, step):
    """One optimiser step: forward and backward of each part of the batch, clip, step, update.

    Returns sums (for data.metrics), losses (of the routers, and grad_norm) and the last part's
    routings {block: Routing}. FloatingPointError, before a weight moves, for a loss or gradient
    that is not finite.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step) * group["factor"]
    torch.manual_seed(seeded(settings.seed, step, "noise").initial_seed())
    loss_weights = BALANCE[settings.balance] | {"z": settings.z_loss}
    if settings.balance_weight is not None:
        loss_weights |= dict.fromkeys(BALANCE[settings.balance], settings.balance_weight)
    sums, losses, routed = {}, {}, {}  # routed: {router: its routing of each part}
    parts = parts_of_batch(settings)
    for i, part in enumerate(parts):
        batch = data.batch(step, part=part)
        more = i + 1 < len(parts) and hasattr(model, "no_sync")  # gradients are summed at the last
        with precision(settings, data.device), model.no_sync() if more else nullcontext():
            loss, counts, routings = data.loss(model, batch)
            objective, of_routers = loss, {}
            for routing in dict.fromkeys(routings.values()):  # blocks may share one: it counts once
                routed.setdefault(routing.router, []).append(routing)
                add(of_routers, routing.losses)
            for name, value in of_routers.items():
                if loss_weights.get(name):
                    objective = objective + loss_weights[name] * value
                add(losses, {name: value.detach() / len(parts)})
        (objective / len(parts)).backward()
        add(sums, counts | {"loss": loss.detach() * counts["count"]})
    for routing in routings.values():
        gradients = [p.grad for p in routing.router.parameters() if p.grad is not None]
        routing.router_gradient = nn.utils.get_total_norm(gradients)
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    sums = total(sums, data.device)
    losses = total(losses, data.device, divisor=processes()[1])
    if not torch.isfinite(norm + sums["loss"]):
        told = f"loss {sums['loss'] / sums['count']:.3g}, gradient norm {norm:.3g}"
        blocks = json.dumps(statistics(routings))
        raise FloatingPointError(f"step {step + 1}: {told}; per block {blocks}")
    optimizer.step()
    optimizer.zero_grad()
    for i, (router, of_parts) in enumerate(routed.items()):
        router.update(of_parts, seeded(settings.seed, step + 1, "router", i))
    losses["grad_norm"] = norm
    return SimpleNamespace(sums=sums, losses=losses, routings=routings)


def learning_rate(settings, step):
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm or settings.schedule == "constant":
        return settings.lr * min(1, (step + 1) / warm)
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def precision(settings, device):
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def add(sums, values):
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def moes(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def statistics(routings):
    """{block: {sign: number}}, the health of each router. The report page draws every number."""
    found = {}
    for block, routing in routings.items():
        counts = routing.counts()
        signs = found[block] = evenness(routing.load)
        signs["dropped"] = float((counts == 0).float().mean())
        signs["slots_per_token"] = float(counts.float().mean())
        if hasattr(routing, "gates"):
            gates = routing.gates.detach().float()
            entropy = entr(gates).sum(-1).mean()
            signs["entropy"] = float(entropy / math.log(max(2, gates.shape[-1])))
        if hasattr(routing, "router_gradient"):
            signs["router_gradient"] = float(routing.router_gradient)
    return found


def evenness(load):
    """Of load [E]: its largest over its mean, and how many experts got nothing."""
    most = load.max() * len(load) / load.sum().clamp(min=1e-9)
    return {"load": float(most), "dead": int((load == 0).sum())}


@torch.no_grad()
def check_sound(data, model, step):
    """FloatingPointError for weights that are not finite, or whose loss is not: never save them."""
    model.eval()
    loss, _, _ = data.loss(model, data.batch(step - 1, part=slice(0, 8)))
    if not all(tensor.isfinite().all() for tensor in (loss, *model.state_dict().values())):
        raise FloatingPointError(f"step {step}: the new weights or their loss are not finite")


def conclude(settings, data, model, device):
    """Evaluate, probe, examine: the summary, and the maps of specialisation(), for the report."""
    task = TASKS[settings.task]
    summary = {"router": title(settings), "steps": settings.steps}
    for split in task.SPLITS:
        summary[split] = evaluate(settings, data, model, split)
    last = task.SPLITS[-1]
    with dropless(model) as differs:
        if differs:
            summary[f"{last}_dropless"] = evaluate(settings, data, model, last)
    summary["parameters"], summary["active_parameters"] = parameters(model, data)
    summary["specialisation"], joints = specialisation(settings, data, model)
    summary |= data.report(settings, model, fresh=lambda: build(settings, data, device))
    return summary, joints


@torch.no_grad()
def evaluate(settings, data, model, split):
    """Metrics over a whole split, without noise and the routers' losses; and its blocks' signs."""
    model.eval()
    sums, blocks, examples = {}, {}, 0
    for batch in tqdm(data.split(split), f"evaluating on {split}", leave=False, dynamic_ncols=True):
        with precision(settings, data.device):
            loss, counts, routings = data.loss(model, batch)
        add(sums, numbers(counts | {"loss": loss * counts["count"]}))
        size = len(next(iter(batch.values())))  # the last batch may be smaller
        for block, signs in statistics(routings).items():
            signs["load"] = routings[block].load  # [E], for the evenness of the whole split
            add(blocks.setdefault(block, {}), {name: size * sign for name, sign in signs.items()})
        examples += size
    for block, signs in blocks.items():
        means = {name: value / examples for name, value in signs.items()}
        blocks[block] = means | evenness(signs["load"])
    metrics = numbers(data.metrics(sums))
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the evaluation: loss {metrics['loss']} on {split}")
    return metrics | {"blocks": blocks}


def numbers(values):
    return {name: float(value) for name, value in values.items()}


@contextmanager
def dropless(model):
    """Inside, tokens and thresholds choose without drops. Yields: did any have a capacity?"""
    before = {}
    for router in {moe.router for moe in moes(model)}:
        factor, room = router.options.capacity_factor, float(router.num_experts)
        if router.chooses in ("tokens", "threshold") and factor is not None:
            before[router] = factor
            router.options.capacity_factor = None if router.chooses == "tokens" else room
    try:
        yield bool(before)
    finally:
        for router, factor in before.items():
            router.options.capacity_factor = factor


def parameters(model, data):
    """All parameters; and active ones, where an expert counts by its share of a group's tokens."""
    count = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for moe in moes(model):
        o, E = moe.router.options, moe.router.num_experts
        share = o.top_k * (o.capacity_factor or 1) / E
        if moe.router.chooses == "tokens":
            share = min(share, o.top_k / E)  # more slots do not give a token more experts
        if getattr(o, "slots", None):
            share = o.slots / data.tokens
        idle += (1 - min(1, share)) * sum(p.numel() for p in moe.experts.parameters())
    return count, round(count - idle)


def tell(settings, data, model, summary, joints):
    """Print what a run found."""
    print(table([{"router": title(settings), **row([cells(summary, TASKS[settings.task])])}]))
    for words in table(known(summary)), data.tell(model, joints):
        if words:
            print(words)


def known(summary):
    """Rows of a table, {column: text}: what the experts of each block know of each label."""
    rows = []
    for block, labels in summary["specialisation"].items():
        for label, values in labels.items():
            value, mean, bound = (f"{number:.3f}" for number in values)
            texts = {"block": str(block), "experts know of": label, "NMI": value}
            rows.append(texts | {"by chance": mean, "95 % of chance": bound})
    return rows


def title(settings):
    return settings.router + (f" ({settings.remark})" if settings.remark else "")


def about(settings, device):
    words = f"{device.type}, torch {torch.__version__}, seed {settings.seed}"
    if settings.compile and getattr(settings, "capacity_factor", 1) is None:
        words += "; compiled, a dropless expert computes a slot for every token of its group"
    return words


def show(bar, line):
    named = ("loss", "top1", "miou", "bits_per_byte")
    bar.set_postfix({name: f"{line[name]:.3g}" for name in named if name in line})


# ================================================================ Later: the table
DECIMALS = {"GFLOPs": 4}  # of a column; 1 where it is not named
DECIMALS |= dict.fromkeys(("vocabulary", "parameters", "active", "seconds"), 0)
DECIMALS |= dict.fromkeys(("images/s", "sequences/s"), 0)
DECIMALS |= dict.fromkeys(("perplexity", "bytes/token", "load max/mean", "slots/token"), 2)
DECIMALS |= dict.fromkeys(("bits/byte", "dropless", "as generated"), 3)


def row(of_runs):
    """A row of the table, {column: text}: of the cells of each run, mean ± deviation."""
    texts = {}
    for name in dict.fromkeys(itertools.chain(*of_runs)):
        values = [found.get(name) for found in of_runs]
        decimals = 3 if name.startswith("NMI") else DECIMALS.get(name, 1)
        texts[name] = spell_cell(values, decimals)
    return texts


def cells(summary, task):
    """{column: number, list of one number a block, (mean, deviation), or None} of one run."""
    blocks = summary[task.SPLITS[-1]]["blocks"].values()
    found = task.columns(summary)
    found["load max/mean"] = [block["load"] for block in blocks]
    found["dropped %"] = [100 * block["dropped"] for block in blocks]
    found["slots/token"] = [block["slots_per_token"] for block in blocks]
    found["parameters"], found["active"] = summary["parameters"], summary["active_parameters"]
    found["GFLOPs"] = summary["gflops"]
    found[f"{task.UNIT}/s"] = summary[f"{task.UNIT}_per_second"]
    found["first step s"] = summary.get("first_step_seconds")
    found["seconds"] = summary["seconds"]
    return found


def knowledge(summary):
    """{column: what experts know of a label}: NMI less its null's mean, the mean of the blocks."""
    found = {}
    for labels in summary["specialisation"].values():
        for label, (value, by_chance, _) in labels.items():
            found.setdefault(f"NMI {label}", []).append(value - by_chance)
    return {name: float(np.mean(values)) for name, values in found.items()}


def spell_cell(values, decimals):
    """One column of a row as text: values as cells() gives them, one a run."""
    if None in values or [] in values:
        return "-"
    between = " ± "
    if isinstance(values[0], list):
        shown, between = np.mean(values, 0), ", "  # one for each block
    elif isinstance(values[0], tuple) and len(values) == 1:
        shown = values[0]  # of a lone run, over draws
    else:
        means = [value[0] if isinstance(value, tuple) else value for value in values]
        shown = [np.mean(means)]
        if len(set(means)) > 1:  # parameters, say, are the same for every seed
            shown.append(deviation(means))
    return between.join(f"{number:,.{decimals}f}" for number in shown)


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(rows):
    """Rows of {column: text} as Markdown, columns aligned; none in which nothing stands."""
    columns = []
    for name in dict.fromkeys(itertools.chain(*rows)):
        texts = [line.get(name, "-") for line in rows]
        if set(texts) != {"-"}:
            width = max(map(len, [name, *texts]))
            columns.append([text.ljust(width) for text in (name, "-" * width, *texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


def results(folder):
    """One table of all finished runs below a folder; results.md and report.html go there."""
    runs, notes = finished(folder)
    if not runs:
        why = f"--table {folder}: no finished run (a folder with a summary.json) lies there"
        raise ValueError("; ".join([why, *notes[:3]]))
    one_task(folder, [done.settings for done in runs])
    task = TASKS[runs[0].settings.task]
    groups = {}
    for done in runs:  # the runs of one setting, one of each seed
        key = {name: value for name, value in of_result(done.settings).items() if name != "seed"}
        of_seed = groups.setdefault(json.dumps(key, sort_keys=True), {})
        first = of_seed.setdefault(done.settings.seed, done)
        if first is not done:
            notes.append(f"Left out, of the same settings and seed as {first.name}: {done.name}")
    axes = axes_of(runs)
    entries = []
    for of_seed in groups.values():
        group = list(of_seed.values())
        first = group[0]
        texts = {"router": title(first.settings)}
        texts |= {name: spell_setting(first, name) for name in axes}
        texts["recipe"] = recipe(first.settings, axes)
        name = " ".join(text for text in texts.values() if text != "-")  # in the picture's legend
        entry = SimpleNamespace(name=name, runs=group)
        texts["seeds"] = str(len(group))
        texts["to the best"] = ""  # known only when all rows are
        entry.texts = texts | row([done.cells for done in group])
        entry.scores = [score(done.summary, task) for done in group]
        entries.append(entry)
    entries.sort(key=lambda entry: -np.mean(entry.scores))
    compare(entries, task, digits=DECIMALS.get(next(iter(task.columns(runs[0].summary))), 1))
    same = []
    for name in ("task", "size", "data", "steps", "batch_size", "lr"):
        values = {spell_setting(done, name) for done in runs}
        if len(values) == 1 and not values & {"-", "none"}:
            same.append(f"{flag(name)} {values.pop()}")
    shown = table([entry.texts for entry in entries])
    shown = "\n".join([shown, "", f"In every row: {' '.join(same)}", *notes])
    save(pathlib.Path(folder) / "results.md", shown + "\n")
    save(pathlib.Path(folder) / "report.html", grid_page(entries, shown))
    print(shown)


def one_task(folder, of_runs):
    """ValueError if these settings of runs are not of one task, which a table needs."""
    tasks = {f"{settings.task} {getattr(settings, 'head', '')}".strip() for settings in of_runs}
    if len(tasks) > 1:
        raise ValueError(f"{folder} holds runs of several tasks: {', '.join(sorted(tasks))}")


def finished(folder):
    """Runs below a folder (name, said, settings, summary, lines), and notes on what is broken."""
    runs, notes = [], []
    for config in sorted(pathlib.Path(folder).glob("*/config.json")):
        path = config.parent
        if not (path / "summary.json").exists():
            notes.append(f"Not finished: {path.name}")
            continue
        try:
            done = SimpleNamespace(name=path.name, said=read_said(path))
            done.summary = json.loads(read_file(path, "summary.json"))
            done.settings, done.lines = settle(done.said), read_lines(path)
            done.cells = cells(done.summary, TASKS[done.settings.task]) | knowledge(done.summary)
            runs.append(done)
        except Exception as error:  # a damaged file fails in many ways; the rest is still a table
            notes.append(f"Left out, not readable: {path.name} ({type(error).__name__}: {error})")
    return runs, notes


def axes_of(runs):
    """The settings that were said, and differ between runs that have them: a column each."""
    said, axes = {}, []
    for done in runs:
        said |= done.said
    for name in said:
        values = {spell_setting(done, name) for done in runs} - {"-"}
        if len(values) > 1 and name not in FREE | {"router", "seed"}:
            axes.append(name)
    return axes


def spell_setting(done, name):
    """A run's setting as text; "-" where it has none, or where to say it would mean nothing."""
    value = getattr(done.settings, name, None)
    if not hasattr(done.settings, name) or name in unused(done.said | {name: value}):
        return "-"
    return spell(value)


def recipe(settings, axes):
    """What the router's recipe set, as text: rows alike in all columns may differ by it."""
    recipe = ROUTER_KINDS[settings.router].recipe
    names = [name for name in recipe if hasattr(settings, name) and name not in axes]
    return ", ".join(f"{name} {spell(getattr(settings, name))}" for name in names) or "-"


def compare(entries, task, digits):
    """Fill in the column "to the best" of entries, best first. A leaky one is never the best."""
    fair = [entry for entry in entries if entry.runs[0].settings.remark != "leaky"]
    best = (fair or entries)[0]
    for entry in entries:
        gap = np.mean(entry.scores) - np.mean(best.scores)
        if entry is best:
            verdict = "best"
        elif min(len(entry.scores), len(best.scores)) == 1:
            verdict = "one seed"
        elif abs(gap) <= math.hypot(deviation(entry.scores), deviation(best.scores)):
            verdict = "tie"
        else:
            verdict = f"{gap if task.MORE_IS_BETTER else -gap:+.{digits}f}"
        entry.texts["to the best"] = verdict


def score(summary, task):
    """By which rows are ranked: the first of the task's columns, else the loss; more is better."""
    value = next(iter(task.columns(summary).values()))
    if value is None:
        return -summary[task.SPLITS[-1]]["loss"]
    return value if task.MORE_IS_BETTER else -value


# ================================================================ Later: what experts know
def specialisation(settings, data, model):
    """How an expert's choice goes with the labels of tokens, in two forms.

    Numbers {block: {label: [NMI, its mean by chance, its 95 % bound by chance]}}. Maps {block:
    {label: (share [labels, E + 1], names)}}: column e is how many tokens of a label expert e gets,
    a token of several divided by its weights; the last column, those that no expert gets.
    """
    model.eval()
    gathered, start = {}, 0
    batches = data.split(TASKS[settings.task].EXAMINED)
    for batch in tqdm(batches, "examining experts", leave=False, dynamic_ncols=True):
        with torch.no_grad(), precision(settings, data.device):
            routings = data.loss(model, batch)[2]
        for key, parts in examine(data, batch, start, routings).items():
            gathered.setdefault(key, []).append(parts)
        start += len(next(iter(batch.values())))
    found, joints = {}, {}
    for (block, label_name, names), parts in gathered.items():
        mass, label, owner = zip(*parts)
        mass, label = torch.cat(mass), torch.cat(label)
        total_mass = mass.sum(1, keepdim=True)
        share = torch.cat([mass / total_mass.clamp(min=1e-30), (total_mass == 0).float()], 1)
        joint = share.new_zeros(len(names), share.shape[1]).index_add(0, label, share)
        joints.setdefault(block, {})[label_name] = joint, names
        if owner[0] is not None and len(label):
            found.setdefault(block, {})[label_name] = nmi_and_null(mass, label, torch.cat(owner))
    return found, joints


def examine(data, batch, start, routings):
    """{(block, label's name, names): (mass [N, E], label [N], owner [N])} of a batch, N tokens."""
    found = {}
    for name, (label, owner, names) in data.labels(batch, start).items():
        (B, T), labelled = label.shape, label >= 0
        sequence = torch.arange(start, start + B)[:, None].expand(B, T)
        for block, routing in routings.items():
            mass = routing.mass().float().cpu()
            mass = mass.reshape(B, -1, mass.shape[-1])
            places = mass.shape[1]  # in an example: T tokens, or one whole sequence
            if places not in (1, T):
                rule = f"labels of {T} tokens an example do not fit a routing"
                raise ValueError(f"{rule} of {places}")
            of_label = None
            if owner is not None:
                # A sequence routed whole has one routing for many labels: it is their owner.
                whole = places < len(owner[0].unique())
                of_label = (sequence if whole else owner)[labelled]
            mass = mass.expand(B, T, -1)[labelled]
            found[block, name, tuple(names)] = mass, label[labelled], of_label
    return found


def nmi_and_null(mass, label, owner, draws=100):
    """[NMI, null mean, null 95 %] of expert with label: mass [N, E], label [N], owner [N].

    The null hands each owner's labels to a random other owner. All tokens of an owner have one
    label (a document's topic), or one routing (a sequence routed whole).
    """
    owners, index = owner.unique(return_inverse=True)
    routed = mass.new_zeros(len(owners), mass.shape[1]).index_add(0, index, mass)  # [owners, E]
    share = (1 / index.bincount()[index]).to(mass.dtype)  # of an owner, each of its tokens
    places = torch.stack([label, index])
    labels = torch.sparse_coo_tensor(places, share, check_invariants=True)  # [labels, owners]
    labels, null = labels.coalesce(), []
    g = seeded("null")
    for _ in range(draws):
        order = torch.randperm(len(owners), generator=g)  # owner o gets the labels of order[o]
        null.append(nmi(labels @ routed[order.argsort()]))
    value = nmi(labels @ routed)
    return [value, float(np.mean(null)), float(np.quantile(null, 0.95))]


def nmi(joint):
    """Normalised mutual information I / sqrt(H H) of a joint mass [labels, E]; 0 if an H is 0."""
    p = joint.double() / joint.sum()
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
  .row {{ display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1em 2em; }}
  .wide {{ overflow-x: auto; }}
  svg, img {{ max-width: 100%; height: auto; }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }}
  pre.table {{ white-space: pre; overflow-x: auto; line-height: 1.4; }}
  td, th {{ padding: .1em .7em .1em 0; text-align: left; }}
  .mosaic td, .mosaic th {{ padding: 0; text-align: center; }}
  .map td {{ width: 22px; height: 22px; padding: 0; border: 1px solid #ddd; }}
  caption {{ font-weight: bold; text-align: left; }}
  span {{ white-space: pre-wrap; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
KNOWN_SHOWS = """<p>How much an expert's choice tells of a label, as normalised mutual information
(NMI), from 0 for nothing to 1 for all; beside it, what labels dealt by chance would give.</p>"""
MAPS_SHOW = """<p>In a row: the share of a label's tokens that each expert serves, white none, dark
blue the most; a token in several slots is divided by its weights. Column “none”: those that no
expert serves.</p>"""
SIGNS = {  # headings; a sign that statistics() adds is drawn under its own name
    "grad_norm": "gradient norm",
    "load": "load max/mean: 1 is even",
    "dead": "experts without a token",
    "dropped": "share of tokens in no slot",
    "slots_per_token": "slots a token sits in",
    "entropy": "entropy of the gates: 1 is uniform",
    "router_gradient": "norm of the router's gradient",
}
DASHES = ("none", "6 3", "2 3", "8 3 2 3")  # tell lines apart that lie over one another
LIMITS = {"load": (1, 2), "dropped": (0, 1), "entropy": (0, 1)}  # what a picture shows at least


def report_page(settings, data, model, summary, joints, record):
    """The page of one run, HTML that needs no network."""
    texts = {"data": data.about, "seed": str(settings.seed)}
    texts |= row([cells(summary, TASKS[settings.task])])
    body = ["<div class=wide><table>"]
    for name, text in texts.items():
        if text != "-":
            body.append(f"<tr><th>{escape(name)}<td>{escape(text)}")
    body.append("</table></div>")
    body += ["<h2>Step by step</h2>", "<div class=row>"]
    body += [*health(read_lines(record.folder)), "</div>"]
    rows, maps = known(summary), []
    if rows:
        body.append("<h2>What experts know</h2>")
        body.append(f"{KNOWN_SHOWS}<pre class=table>{escape(table(rows))}</pre>")
    for block, labels in joints.items():
        for name, (joint, names) in labels.items():
            if len(names) <= 24:  # more rows are no picture
                maps.append(heat_map(f"block {block}: {name}", joint, names))
    if maps:
        body.append("<h2>Where the tokens of each label go</h2>")
        body += [MAPS_SHOW, "<div class=row>", *maps, "</div>"]
    body.append(data.pictures(model, joints))
    heading = escape(f"{settings.task}, router {title(settings)}")
    return PAGE.format(title=heading, body="\n".join(body))


def grid_page(entries, shown):
    """The page of a grid: its table, and the loss of each row, the mean over its runs."""
    smooth = {}
    for entry in entries:
        losses = {}
        for done in entry.runs:
            for line in done.lines:
                if "loss" in line:
                    losses.setdefault(line["step"], []).append(line["loss"])
        points = [(step, float(np.mean(of_runs))) for step, of_runs in sorted(losses.items())]
        smooth[entry.name] = smoothed(points)
    body = f"<pre class=table>{escape(shown)}</pre><div class=row>"
    body += curves("training loss, mean over seeds, smoothed", smooth, width=640, height=380)
    legend = ""
    for i, name in enumerate(smooth):
        mark = f'<span style="color:{hue(i, len(smooth))}">&#9632;</span>'
        legend += f"<div>{mark} {escape(name)}</div>"
    return PAGE.format(title="Results", body=f"{body}<div>{legend}</div></div>")


def smoothed(line, width=0.02):
    """A line of (x, y), each y the mean of its neighbours within a share of the length."""
    reach = round(width * len(line))
    means = []
    for i, (x, _) in enumerate(line):
        _, near = zip(*line[max(0, i - reach) : i + reach + 1])
        means.append((x, float(np.mean(near))))
    return means


def health(lines):
    """Pictures of the loss, the gradient's norm and every sign of the blocks, step by step."""
    drawn = {}  # {sign: {name of its line: points}}
    for line in lines:
        groups = {"": {name: line[name] for name in ("loss", "grad_norm") if name in line}}
        groups |= {f"block {block}": signs for block, signs in line.get("blocks", {}).items()}
        for name, signs in groups.items():
            for sign, value in signs.items():
                drawn.setdefault(sign, {}).setdefault(name, []).append((line["step"], value))
    return [curves(SIGNS.get(sign, sign), drawn[sign], LIMITS.get(sign, ())) for sign in drawn]


def curves(heading, lines, limits=(), width=350, height=210):
    """An SVG of lines {name: [(x, y), ...]} in one frame. limits: y that must be seen."""
    points = [point for point in itertools.chain(*lines.values()) if math.isfinite(point[1])]
    xs, ys = zip(*(points or [(0, 0), (1, 1)]))
    ys += limits
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if high == low:
        high = low + (abs(low) or 1)
    x0, y0, w, h = 52, 26, width - 64, height - 50

    def across(x):
        return x0 + w * (x - left) / ((right - left) or 1)

    def up(y):
        return y0 + h * (high - y) / (high - low)

    parts = [svg_text(x0, 16, heading, more='font-weight="bold"')]
    parts.append(f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#999"/>')
    for tick in ticks(low, high):
        parts.append(f'<path d="M{x0},{up(tick):.1f}h{w}" stroke="#ddd"/>')
        parts.append(svg_text(x0 - 5, up(tick) + 4, f"{tick:.4g}", "end"))
    for tick in ticks(left, right):
        parts.append(svg_text(across(tick), y0 + h + 16, f"{tick:.6g}", "middle"))
    for i, (name, line) in enumerate(lines.items()):
        drawn = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line if math.isfinite(y))
        ink, dashes = hue(i, len(lines)), DASHES[i % len(DASHES)]
        style = f'stroke="{ink}" stroke-width="1.5" stroke-dasharray="{dashes}"'
        label = f"<title>{escape(name)}</title>"
        parts.append(f'<polyline points="{drawn}" fill="none" {style}>{label}</polyline>')
        if 1 < len(lines) <= 6:
            parts.append(svg_text(x0 + w - 8, y0 + 14 + 14 * i, name, "end", f'fill="{ink}"'))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    return f"<svg {style} {size}>{''.join(parts)}</svg>"


def ticks(low, high):
    """Three to six round numbers from low to high."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10(high - low))
    while (high - low) / step > 5:
        step *= 2
    while (high - low) / step < 2:
        step /= 2
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def heat_map(heading, joint, names):
    """A table of joint [labels, E + 1]: of each label, the share of its tokens in each column."""
    share = joint / joint.sum(1, keepdim=True).clamp(min=1e-9)
    most = max(1e-9, float(share.max()))
    heads = [*map(str, range(share.shape[1] - 1)), "none"]
    parts = [f"<th>{head}" for head in ("", *heads)]
    for name, values in zip(map(str, names), share.tolist()):
        parts.append(f"<tr><th>{escape(name)}")
        for head, value in zip(heads, values):
            style = f"background:rgba(8,48,107,{value / most:.2f})"
            parts.append(f'<td style="{style}" title="{escape(name)}, {head}: {value:.3f}">')
    darkest = f"<caption>{escape(heading)}; the darkest: {most:.2f}</caption>"
    return f"<table class=map>{darkest}<tr>{''.join(parts)}</table>"


def svg_text(x, y, words, anchor="start", more=""):
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def hue(i, count):
    """The colour of line i of so many; a lone line is grey."""
    return "#444444" if count == 1 else "rgb{}".format(color(i, count, lightness=0.4))


def picture(folders, path, count=5):
    """Write a PNG: test images, and beside them, run by run, their patches coloured by expert."""
    parts = []
    for folder in folders:
        _, data, model = load_run(folder)
        part = data.mosaic(model, count)
        parts.append(np.pad(part, ((0, 0), (0, 12), (0, 0)), constant_values=255))
    pathlib.Path(path).write_bytes(moe_vision.png(np.concatenate(parts, 1)))


# ================================================================ Later: runs that survive
VERSIONS = {"torch": str(torch.__version__), "numpy": np.__version__}
VERSIONS["python"] = platform.python_version()


class Record:
    """The folder of a run. As a context, it keeps other processes out of the folder."""

    def __init__(self, settings, said, about, folder=None, resume=False):
        """about: the data. resume: the folder holds a checkpoint to go on from."""
        self.settings, self.said = settings, said
        self.made_by = VERSIONS | {"data": about}
        self.folder = pathlib.Path(folder or settings.out or fresh_folder(settings))
        self.new, self.resume = folder is None, resume
        self.writes = processes()[0] == 0
        self.lock = self.lines = None
        self.saved = self.end = 0  # the last checkpoint's step, and where metrics.jsonl ended
        self.before = self.first = 0.0  # seconds spent earlier, seconds of the first step

    def __enter__(self):
        if self.writes:
            if self.folder.is_file():
                raise ValueError(f"--out {self.folder} is a file")
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.new and any(self.folder.iterdir()):
                raise ValueError(f"--out {self.folder} is not empty; choose another folder")
            self.lock = locked(self.folder)
            if (self.folder / "checkpoint.pt").exists() and not self.resume:
                os.close(self.lock)
                raise ValueError(f"{self.folder}: another process has trained there meanwhile")
        return self

    def __exit__(self, error_type, error, trace):
        if self.lines is not None:
            self.lines.close()
        if self.lock is not None:
            os.close(self.lock)
        if error_type is FloatingPointError:
            good = "no checkpoint was saved before"
            if self.saved:
                good = f"the checkpoint of step {self.saved} in {self.folder} is the last good one"
            raise FloatingPointError(f"diverged at {error}; {good}") from None

    def restore(self, model, optimizer):
        """Load the checkpoint into model and optimizer; returns its step. Nothing is written."""
        checkpoint = read_checkpoint(self.folder)
        with reading(self.folder, "holds a checkpoint that does not fit the run"):
            for name, value in of_result(self.settings).items():
                had = checkpoint["settings"][name]
                if had != value and name != "steps":
                    raise ValueError(f"it has {flag(name)} {had}, not {value}")
            self.saved, self.end = int(checkpoint["step"]), int(checkpoint["metrics_end"])
            self.before, made_by = float(checkpoint["seconds"]), checkpoint["made_by"]
            most = self.settings.steps
            if self.saved > most:
                raise ValueError(f"it is of step {self.saved}, beyond --steps {most}")
            if self.writes and (self.folder / "metrics.jsonl").stat().st_size < self.end:
                raise ValueError("metrics.jsonl is shorter than at the checkpoint")
            model.load_state_dict(checkpoint["model"])
            load_optimizer(optimizer, checkpoint["optimizer"])
        if made_by != self.made_by:
            note = f"the checkpoint is of {made_by}, this is {self.made_by}"
            print(f"{note}: it goes on, not bit for bit", file=sys.stderr)
        return self.saved

    def begin(self, data, device):
        """Make this the folder of an unfinished run, metrics.jsonl cut back to the checkpoint."""
        self.start = time.perf_counter()
        if not self.writes:
            return
        if self.saved < self.settings.steps:
            (self.folder / "summary.json").unlink(missing_ok=True)
        for part in self.folder.glob("*.part"):  # of a process killed while it wrote
            part.unlink()
        for name, content in data.files().items():
            save(self.folder / name, content)
        config = {"said": self.said, "settings": vars(self.settings), "device": device.type}
        config |= {"threads": torch.get_num_threads(), "processes": processes()[1]} | VERSIONS
        save(self.folder / "config.json", config)
        self.lines = open(self.folder / "metrics.jsonl", "r+b" if self.saved else "wb")
        self.lines.truncate(self.end)
        self.lines.seek(self.end)

    def log(self, step, values):
        """A line of metrics.jsonl. It holds no clock, so that equal runs have equal files."""
        remark = {"remark": self.settings.remark} if self.settings.remark else {}
        if self.writes:
            self.lines.write(json.dumps({"step": step, **remark, **values}).encode() + b"\n")
            self.lines.flush()

    def save(self, step, model, optimizer):
        if self.writes and step > self.saved:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            os.fsync(self.lines.fileno())  # before a checkpoint that counts on these lines
            content |= {"step": step, "metrics_end": self.lines.tell(), "seconds": self.seconds()}
            content |= {"settings": of_result(self.settings), "made_by": self.made_by}
            save(self.folder / "checkpoint.pt", content)
        self.saved = step

    def seconds(self):
        return self.before + time.perf_counter() - self.start

    def note_first_step(self):
        self.first = self.first or time.perf_counter() - self.start

    def spent(self):
        """Seconds and examples a second of training; a compiled first step is counted apart."""
        seconds, steps = self.seconds(), self.settings.steps
        spent = {"seconds": seconds}
        if self.settings.compile and steps > 1:
            spent["first_step_seconds"] = self.first
            seconds, steps = seconds - self.first, steps - 1
        rate = self.settings.batch_size * steps / max(seconds, 1e-9)
        return spent | {f"{TASKS[self.settings.task].UNIT}_per_second": rate}

    def finish(self, summary, page):
        """The last lines of metrics.jsonl, the report, the summary; before anything is printed."""
        for split, values in summary.items():
            if isinstance(values, dict) and "blocks" in values:
                self.log(self.settings.steps, {"split": split, **values})
        save(self.folder / "report.html", page)
        save(self.folder / "summary.json", summary)


def fresh_folder(settings):
    for number in itertools.count():
        folder = pathlib.Path("runs", f"{settings.task}-{settings.router}-{number}")
        if not folder.exists():
            return folder


def locked(folder):
    """A lock on the folder, which ends with this process however it ends. ValueError if taken."""
    try:
        import fcntl
    except ImportError:
        return None  # on Windows nothing keeps two processes out of one folder
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{folder} is in use: another process trains there") from None
    return lock


def of_result(settings):
    """The settings that decide what a run computes."""
    return {name: value for name, value in vars(settings).items() if name not in FREE}


def save(path, content):
    """Write a file whole or not at all: to another name, flushed, then in place of the old one."""
    raw = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(content, raw)  # in memory first: so a full disk is an OSError like any other
    elif isinstance(content, str):
        raw.write(content.encode("utf-8", "replace"))
    else:
        raw.write((json.dumps(content, indent=1) + "\n").encode())
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # others may write the same file
    try:
        with open(part, "wb") as file:
            file.write(raw.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def signals():
    """Inside, Ctrl-C and SIGTERM wait for the end of the step: a list of those caught."""
    caught = []

    def keep(number, frame):
        caught.append(number)

    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def reading(folder, broken):
    """Inside, whatever goes wrong with a damaged file is a ValueError."""
    try:
        yield
    except Exception as error:
        why = one_line(error).split(". ")[0]
        raise ValueError(f"{folder} {broken}: {why}") from None


def read_file(folder, name, missing="is no run"):
    """The bytes of a file. ValueError if it is missing, or a pipe: to open one is to wait."""
    path = pathlib.Path(folder, name)
    if not path.is_file():
        raise ValueError(f"{folder} {missing}: {name} is missing")
    return path.read_bytes()


def read_said(folder):
    """What was said of a run, checked as on the command line. ValueError for another folder."""
    raw = read_file(folder, "config.json")
    with reading(folder, "is no run: config.json does not hold its settings"):
        said = json.loads(raw)["said"]
        if "help" in said:
            raise ValueError("it holds more than the settings of a run")
        words = []
        for name, value in said.items():
            if isinstance(value, bool):
                words.append(flag(name if value else f"no_{name}"))
            else:
                words.append(f"{flag(name)}={spell(value)}")
        action, lists = parse(words)
        if action is not None or lists.get("router") == ["all"]:
            raise ValueError("it holds more than the settings of a run")
        parsed = {name: values[0] for name, values in lists.items()}
        if parsed != said:
            raise ValueError("it holds values of a wrong type")
        return parsed


def read_checkpoint(folder):
    """A checkpoint, read without running code in it. ValueError if missing, broken or unsafe."""
    raw = io.BytesIO(read_file(folder, "checkpoint.pt", "was never saved"))
    with reading(folder, "holds a checkpoint.pt that cannot be read as a checkpoint"):
        with zipfile.ZipFile(raw) as archive:
            if archive.testzip():
                raise ValueError("its checksum is wrong")
        raw.seek(0)
        return torch.load(raw, map_location="cpu", weights_only=True)


def load_optimizer(optimizer, state):
    """load_state_dict, which itself would take numbers of any shape. ValueError for wrong ones."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            shape = () if name == "step" else parameter.shape
            if not torch.is_tensor(value) or value.shape != shape:
                raise ValueError(f"the optimiser's {name} has a wrong shape")


def read_lines(folder):
    """The training lines of metrics.jsonl; one that is damaged is left out."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text("utf-8", "replace").splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("grad_norm"), float):
                lines.append(line)  # an evaluation has no gradient
    return lines


def load_run(folder, device="auto", load=None):
    """settings, data and model of a run. ValueError for a folder that is none.

    load(settings, device, folder) gives the data; by default as for training.
    """
    folder = pathlib.Path(folder)
    settings = settle(read_said(folder) | {"device": device})
    checkpoint = read_checkpoint(folder)
    device = pick_device(settings)
    data = (load or TASKS[settings.task].load)(settings, device, folder)
    model = build(settings, data, device)
    with reading(folder, "holds a checkpoint that does not fit the run"):
        model.load_state_dict(checkpoint["model"])
    return settings, data, model


def sample(folder, asked):
    """--sample: print text from a run. ValueError for a folder that is none, or cannot write."""
    settings, data, model = load_run(folder, asked.device, moe_tokens.Vocabulary)
    with dropless(model) as differs:
        print(moe_tokens.sample(model, data.tokenizer, settings, asked, sys.stdout.isatty()))
    notes = [settings.remark] if settings.remark else []
    if differs:
        notes.append("sampled dropless, trained with a capacity")
    if notes:
        print(f"({'; '.join(notes)})")


# ================================================================ Later: many processes
@contextmanager
def process_group():
    """Inside, this is one of the processes that torchrun started, if it did."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name)
        if not str(value).isdigit():
            raise ValueError(f"torchrun sets {name} to a whole number, got {name}={value}")
    # A timeout of hours: in a grid, the others wait while process 0 evaluates a run.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(settings, model):
    """The model as it is trained: synchronised between processes, compiled."""
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    if settings.compile:
        torch.compiler.reset()  # torch keeps only some versions of one code: forget earlier models
        model = torch.compile(model, fullgraph=not dist.is_initialized())
    return model


def parts_of_batch(settings):
    """The rows of each part of a batch that this process computes."""
    rank, size = processes()
    rows = settings.batch_size // settings.grad_accum // size
    starts = range(rank * rows, settings.batch_size, size * rows)
    return [slice(start, start + rows) for start in starts]


def total(values, device, divisor=1):
    """{name: number} summed over all processes, divided by `divisor`."""
    if not dist.is_initialized() or not values:
        return values
    vector = torch.stack([torch.as_tensor(value).double().to(device) for value in values.values()])
    dist.all_reduce(vector)
    return dict(zip(values, vector / divisor))


# ================================================================ Later: grids
def grid(lists):
    """Every combination of lists, {setting: [values]}: a run folder each, below --out.

    Finished runs are kept, unfinished ones go on, equal ones are one. Ends with the table.
    """
    for name in ("out", "device", "log_every", "save_every", "task", "head"):
        if len(lists.get(name, ())) > 1:
            raise ValueError(f"{flag(name)} takes one value, got {len(lists[name])}")
    every = "all" in lists.get("router", ())
    if every:
        lists = lists | {"router": list(ROUTER_KINDS)}
        lists.setdefault("dense_match", ["active", "total"])
    task = lists.get("task", [SETTINGS["task"][1]])[0]
    out = pathlib.Path(lists.get("out", [f"runs/grid-{task}"])[0])
    runs = grid_runs(lists, every)
    here = [done.settings for done in finished(out)[0]]
    one_task(out, here + [settle(cell) for _, cell in runs.values()])
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    for code, (name, cell) in tqdm(runs.items(), desc="grid", dynamic_ncols=True):
        folder = next(out.glob(f"*-{code}"), out / f"{name}-{code}")
        if (folder / "summary.json").exists():
            continue
        try:
            ended = run(cell, folder, resume=(folder / "checkpoint.pt").exists())
        except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
            if dist.is_initialized():
                raise  # perhaps in this process alone: the others must not wait for it
            why = explain(error)
            if why is None:
                traceback.print_exc()
            print(f"{folder} failed: {why or one_line(error)}", file=sys.stderr)
            ended = 1
        gc.collect()  # a model and its data hold each other
        if ended > 128:
            return ended
        status = max(status, ended)
    if processes()[0] == 0:
        results(out)
    if dist.is_initialized():
        dist.barrier()  # process 0 has evaluations and the table to finish
    return status


def grid_runs(lists, every):
    """{code: (name, said of one run)}. ValueError for a setting or combination that no run takes.

    every: with --router all, routers that cannot take the settings are left out.
    """
    axes = [name for name, values in lists.items() if len(values) > 1]
    runs, failed = {}, []
    useful, useless = set(), {}  # settings with an effect in some cell; why others have none
    for values in itertools.product(*lists.values()):
        cell = dict(zip(lists, values))
        idle = unused(cell)
        useless |= idle
        cell = {name: value for name, value in cell.items() if name not in idle}
        try:
            settings = settle(cell)
        except ValueError as error:
            why = f"{filled(cell).router}: {error}"
            if every and why not in failed:  # once for all its seeds
                print(f"left out: {why}")
            failed.append(why)
            if every:
                continue
            at = " ".join(f"{flag(name)} {spell(cell[name])}" for name in axes if name in cell)
            raise ValueError(f"{at}: {error}") from None
        useful |= set(cell)
        config = json.dumps(of_result(settings), sort_keys=True)
        code = hashlib.sha256(config.encode()).hexdigest()[:8]
        parts = [settings.router]
        for name in axes:
            if name in cell and name not in ("router", "seed"):
                parts.append(f"{flag(name)[2:]}_{spell(cell[name])}".replace("/", "_"))
        name = "-".join([*parts, f"seed_{settings.seed}"])
        runs[code] = name[:120], cell  # file systems limit names; the code tells them apart
    if not runs:
        raise ValueError(f"no router takes these settings; {failed[0]}")
    for name, why in useless.items():
        if name not in useful:
            raise ValueError(why)
    return runs


# ================================================================ Later: what routing costs
def bench(said):
    """Forward and backward of one MoE layer, of every router or --router, in a table.

    Held against a dense FFN of the experts' FLOPs, the experts alone on as many slots, and the
    tensor form. Times are medians; "kept" is what a forward leaves for its backward.
    """
    sizes = dict(router="all", dim=256, hidden=1024, experts=16, out=None, compile=False)
    sizes |= dict(dtype="auto", device="auto") | {name: of[1] for name, of in BENCH.items()}
    for name in said:
        if name not in sizes | OPTIONS:
            raise ValueError(f"{flag(name)} means nothing beside --bench")
    b = SimpleNamespace(**(sizes | said))
    if b.router not in (*ROUTERS, "all"):
        raise ValueError(f"--bench times routers: {', '.join(ROUTERS)}; got {b.router!r}")
    if b.tokens % b.group_size:
        raise ValueError(f"--group-size must divide --tokens {b.tokens}, got {b.group_size}")
    if b.out:
        open(b.out, "ab").close()  # fails now rather than after all the timing
    b.device = pick_device(b)
    names = list(ROUTERS) if b.router == "all" else [b.router]
    for option in said:
        if option in OPTIONS and not any(option in ROUTERS[name].defaults for name in names):
            raise ValueError(f"{flag(option)} is no option of --router {b.router}")
    measured, rows = [], []
    for name in names:
        try:
            measured.append(bench_router(b, name, said))
        except ValueError as error:
            if b.router != "all":
                raise
            print(f"left out: {name}: {error}")
            continue
        ms, ratio, kept = measured[-1]["ms"], measured[-1]["ratio"], measured[-1]["MiB"]
        line = {"router": name, "ms": f"{ms['layer']:.1f}"}
        for what in "dense", "bare experts", "tensor form":
            line["/ " + what] = f"{ratio[what]:.2f}" if what in ratio else "-"
        line["MiB kept"], line["dense MiB"] = f"{kept['layer']:.0f}", f"{kept['dense']:.0f}"
        rows.append(line)
    if b.out:
        save(pathlib.Path(b.out), measured)
    shape = f"{b.tokens} tokens in groups of {b.group_size}, width {b.dim}, hidden {b.hidden}"
    place = f"{b.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{shape}, {b.experts} experts; {place}, median of {b.repeats}")
    print(table(rows))


def bench_router(b, name, said):
    """Times of one router's layer and of what it is held against; ms are medians of the rounds."""
    known = ROUTERS[name].defaults
    options = {option: value for option, value in said.items() if option in known}
    router = build_router(name, b.dim, b.experts, tokens=b.group_size, **options)
    moe = MoE(router, Experts(b.experts, b.dim, b.hidden)).to(b.device)
    dense = ffn(b.dim, b.hidden).to(b.device)
    x = torch.randn(b.tokens // b.group_size, b.group_size, b.dim, device=b.device)
    with torch.no_grad():
        routing = moe(x)[1]
        G, E, C, D = routing.dispatch(x).shape
    rows = sum(getattr(routing, "filled", None) or [G * E * C])  # of the slots that are run
    slots = x.new_empty(E, G, C, D).normal_().transpose(0, 1)  # in memory as dispatch lays them

    def tensor_form(z):
        routing = moe.router(z)
        return Routing(*routing.tensors(), routing.load).run(z, moe.experts), routing

    calls = {"layer": (wrap(b, moe), x), "dense": (dense, x.new_empty(rows, D).normal_())}
    calls["bare experts"] = moe.experts, slots
    if name != "soft" and G * E * C * b.group_size < 2**27:  # its only form, or gigabytes
        calls["tensor form"] = tensor_form, x
    seconds, kept = {}, {}
    for i in range(b.repeats + 2):
        for what, call in calls.items():
            moe.zero_grad()
            dense.zero_grad()  # each writes its gradients afresh, as after a step
            taken, kept[what] = timed(b, *call)
            if i >= 2:
                seconds.setdefault(what, []).append(taken)
    measured = {"router": name, "options": options, "ms": {}, "ratio": {}, "MiB": {}}
    for what, taken in seconds.items():
        measured["ms"][what] = 1e3 * float(np.median(taken))
        measured["ratio"][what] = float(np.median(np.divide(seconds["layer"], taken)))
        measured["MiB"][what] = kept[what] / 2**20
    return measured


def timed(b, call, x):
    """Seconds of one forward and backward, and the bytes kept between them, weights and x apart."""
    x, seen = x.detach().requires_grad_(), {}

    def pack(tensor):
        base = tensor if tensor._base is None else tensor._base
        if not base.is_leaf or not base.requires_grad:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    synchronize = getattr(torch, b.device.type).synchronize
    synchronize()
    start = time.perf_counter()
    with precision(b, b.device), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        y = call(x)
    (y[0] if isinstance(y, tuple) else y).sum().backward()
    synchronize()
    seen.pop(x.untyped_storage().data_ptr(), None)
    return time.perf_counter() - start, sum(seen.values())


# ================================================================ Later: the command line
def main(words=None):
    """Run the command line; returns the exit status: 2 after an error, 1 if a run diverged."""
    keep_memory()
    with redirect_stdout(Outlet(sys.stdout)), redirect_stderr(Outlet(sys.stderr)):
        try:
            with process_group():
                if processes()[0]:
                    sys.stdout = sys.stderr = open(os.devnull, "w")  # process 0 speaks for all
                return command(words)
        except KeyboardInterrupt:
            print("interrupted; what was written before stays", file=sys.stderr)
            return 130
        except FloatingPointError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 1
        except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
            why = explain(error)
            if why is None:
                raise
            print(f"train.py: error: {why}", file=sys.stderr)
            raise SystemExit(2) from None


def explain(error):
    """What a user did wrong, in one line; None for a bug, which needs its traceback."""
    why, kind = one_line(error), type(error).__name__
    if isinstance(error, (ValueError, OSError)):
        place = traceback.extract_tb(error.__traceback__)[-1]
        # A rule is raised; what else fails in routers.py may be a router that a reader added.
        bug = place.filename.endswith("routers.py") and not place.line.startswith("raise")
        return None if bug else why
    if re.search("out of memory|MemoryError|alloc|overflow|too large", why + kind, re.I):
        return f"these sizes do not fit into memory: {why[:200]}"
    return None


def keep_memory():
    """Let glibc keep what tensors free: to fetch it again takes up to a fifth of a CPU's step."""
    if platform.libc_ver()[0] == "glibc":
        for threshold, size in (-3, 2**25), (-1, 2**30):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, size)


class Outlet:
    """A stream whose reader may leave (| head) or whose disk may fill; then only words are lost."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # Python has None for a closed one
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # names need not be in its alphabet

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def command(words):
    action, lists = parse(words)
    said = {name: values[0] for name, values in lists.items()}
    several = any(len(values) > 1 for values in lists.values())
    every = said.get("router") == "all"
    if action is None:
        for name in lists:
            if name in SAMPLING | BENCH:
                raise ValueError(f"{flag(name)} is for --sample or --bench")
        return grid(lists) if several or every else run(said)
    if several or (every and action != "bench"):
        raise ValueError(f"{flag(action)} takes one value for each flag, and one router")
    if processes()[0] and action != "resume":
        return 0  # process 0 does it
    folder = said.pop(action)
    for name in said:
        if action in BESIDE and name not in BESIDE[action]:
            raise ValueError(f"{flag(name)} means nothing beside {flag(action)}")
    if action == "bench":
        bench(said)
    elif action == "resume":
        if "out" in said:
            raise ValueError(f"--out means nothing beside --resume, which goes on in {folder}")
        return run(read_said(folder) | said, pathlib.Path(folder), resume=True)
    elif action == "table":
        results(folder)
    elif action == "eval":  # what the run printed, from its weights
        settings, data, model = load_run(folder, said.get("device", "auto"))
        with reading(folder, "has no summary"):
            before = json.loads(read_file(folder, "summary.json", "is no finished run"))
            cells(before, TASKS[settings.task])  # raises if a number is missing
        summary, joints = conclude(settings, data, model, data.device)
        tell(settings, data, model, before | summary, joints)
    else:
        asked = {name: of[1] for name, of in SAMPLING.items()} | {"device": "auto", "seed": 0}
        sample(folder, SimpleNamespace(**(asked | said)))
    return 0


def parse(words):
    """The command line -> an action or None, and what it says, {setting: [values]}."""
    lists = vars(make_parser().parse_args(words))
    lists = {name: value if isinstance(value, list) else [value] for name, value in lists.items()}
    actions = [name for name in ACTIONS if name in lists]
    if len(actions) > 1:
        raise ValueError(f"one at a time: {', '.join(map(flag, actions))}")
    return next(iter(actions), None), lists


def make_parser():
    parser = Parser(prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.description = __doc__.splitlines()[0]
    parser.epilog = "Several values of a flag, or --router all, make a grid of runs and one table."
    options, kinds = {}, CHOICES | {"capacity_factor": "capacity"}
    for name, default in OPTIONS.items():
        of_type = {bool: bool, float: "at_least_0", str: "text"}.get(type(default), "whole")
        usual = {}
        for router, kind in ROUTERS.items():
            if name in kind.defaults:
                usual[router] = spell((kind.defaults | kind.recipe)[name])
        what = "all routers" if len(usual) == len(ROUTERS) else ", ".join(usual)
        if len(set(usual.values())) > 1:
            what += f" ({' or '.join(sorted(set(usual.values())))}, by router)"
        if set(usual.values()) != {spell(default)}:
            default = None
        options[name] = kinds.get(name, of_type), default, what
    groups = {"a run": SETTINGS} | {f"--task {name}": TASKS[name].SETTINGS for name in TASKS}
    groups |= {"router options, for the routers named": options, "instead of a run": ACTIONS}
    groups |= {"with --sample": SAMPLING, "with --bench": BENCH}
    for heading, settings in groups.items():
        group = parser.add_argument_group(heading)
        for name, (kind, default, what) in settings.items():
            try:
                add_flag(group, name, kind, default, what)
            except argparse.ArgumentError:
                rule = "has the name of another flag; call it otherwise"
                raise ValueError(f"router option {name} {rule}") from None
    return parser


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)  # main() says it in one line


def add_flag(group, name, kind, default, what):
    sizes = [task.SIZES["tiny"].get(name) for task in TASKS.values()]
    if any(size is not None for size in sizes):
        shown = ", ".join(f"{task} {size}" for task, size in zip(TASKS, sizes) if size is not None)
        what += f" ({shown})"
    elif default is not None and default is not False and default != "":
        what += f" ({default})"
    if name in ACTIONS and kind is bool:
        how = dict(action="store_true")
    elif kind is bool:
        how = dict(action=argparse.BooleanOptionalAction)
    elif isinstance(kind, tuple):
        how = dict(nargs="+", choices=kind)
    else:
        how = dict(nargs="+", type=partial(read_word, kind), metavar=name.split("_")[-1].upper())
    group.add_argument(flag(name), help=what.replace("%", "%%"), **how)


NUMBERS = {  # kind: (type, least, most, what it must be)
    "whole": (int, 1, 10**7, "a whole number >= 1"),
    "few": (int, 1, 1024, "a whole number >= 1"),
    "count": (int, 0, 4096, "a whole number >= 0"),
    "integer": (int, -(2**63), 2**63 - 1, "a whole number"),
    "positive": (float, math.ulp(0.0), sys.float_info.max, "a positive number"),
    "capacity": (float, math.ulp(0.0), sys.float_info.max, "a positive number"),  # or none
    "at_least_0": (float, 0, sys.float_info.max, "a number >= 0"),
    "share": (float, 0, 1 - 1e-9, "a share from 0 up to 1"),
}


def read_word(kind, text):
    """A word of the command line as a value of that kind; an error names the rule."""
    if kind in NUMBERS:
        if kind == "capacity" and text == "none":
            return None
        number, least, most, rule = NUMBERS[kind]
        with suppress(ValueError):
            value = number(text)
            if least <= value <= most:
                return value
            if value > most:
                rule += f", at most {most:,}"
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    if kind == "router" and text not in (*ROUTER_KINDS, "all"):
        known = ", ".join(ROUTER_KINDS)
        raise argparse.ArgumentTypeError(f"unknown router {text!r}; known: {known}")
    if kind == "path" and not text:
        raise argparse.ArgumentTypeError("is empty; say a path or leave the flag away")
    if kind == "blocks":
        if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
            raise argparse.ArgumentTypeError(f"must be a list such as 1,3, got {text}")
        return sorted(set(map(int, text.split(","))))
    return text


def flag(name):
    return "--" + name.replace("_", "-")


def spell(value):
    """A value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())

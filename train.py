"""Train one model with one router, and say what it learned and what it cost.

    python train.py --router expert_choice          a vision MoE on images drawn on the fly, about 2 minutes on 2 CPU cores
    python train.py --router dense                  the same ViT without experts
    python train.py --router soft --data DIR        on a folder in the CIFAR binary layout, or an .npz
    python train.py --task tokens --router token_choice         a language MoE on the standard library's text
    python train.py --sample runs/tokens-token_choice-0 --prompt "def "     write on
    python train.py --eval runs/vision-soft-0       evaluate a finished run again
    python train.py --help                          every flag with its default; they depend on --size and --router

Every random draw comes from (seed, step, what for), so one seed fixes data, weights and order, and there is no random
state to keep. A run folder holds config.json, metrics.jsonl, checkpoint.pt and summary.json.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import moe_tokens
import moe_vision
from routers import CHOICES, ROUTERS, MoE, build_router, seeded

TASKS = {"vision": moe_vision, "tokens": moe_tokens}
UNRELATED = {"device", "out", "overwrite", "eval", "sample", "table", "log_every", "run"}  # flags that change no result
DEFAULTS = dict(weight_decay=0.05, warmup=0.1, clip=1.0, grad_accum=1, z_loss=0.0, balance="none", expert_init="independent",
                dense_match="active")
BALANCE = {"none": {}, "vmoe": {"importance": 0.005, "load": 0.005}, "switch": {"balance": 0.01}, "bias": {}}
BIAS_RATE = 1e-3  # the step of --balance bias (2408.15664)
OPTIONS = {name: default for router in ROUTERS.values() for name, default in router.defaults.items()}
FLAG = {"weights": "router_weights"}  # an option's flag bears its own name, but for these


# ---------------------------------------------------------------- flags
def whole(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return number


def positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def at_least_0(text):
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text}")
    return number


def below_1(text):
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 up to 1, got {text}")
    return number


def numbers(text):
    return sorted({int(n) for n in text.split(",") if n.strip()})


def capacity(text):
    return text if text == "none" else positive(text)


KINDS = SimpleNamespace(whole=whole, positive=positive, at_least_0=at_least_0)  # for the model files' own flags
for parse, name in ((whole, "whole number"), (positive, "number"), (at_least_0, "number"), (below_1, "number"), (capacity, "number"),
                    (numbers, "list such as 1,3")):
    parse.__name__ = name  # argparse names it in "invalid ... value"


def option_flag(parser, name, default):
    """One flag for one option of the routers, its type read off the default; a router added to ROUTERS brings its own."""
    having = [router for router, made in ROUTERS.items() if name in made.defaults]
    about = f"{'all routers' if len(having) == len(ROUTERS) else ', '.join(having)} (default: {default})"
    flag = "--" + FLAG.get(name, name).replace("_", "-")
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=about)
    elif isinstance(default, str):
        parser.add_argument(flag, choices=CHOICES.get(name), help=about)
    elif name == "capacity_factor":
        parser.add_argument(flag, type=capacity, help=f"a number, or none for dropless; {about}")
    else:
        parser.add_argument(flag, type=whole if default is None or isinstance(default, int) else at_least_0, help=about)


def make_parser(task, size, router):
    module = TASKS[task]
    defaults = DEFAULTS | module.SIZES[size] | module.ROUTER_DEFAULTS.get(router, {})
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog=f"Defaults shown are those of --task {task} --size {size} --router {router}.")
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
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument("--log-every", type=whole, default=50, help="steps between lines of metrics.jsonl")
    train = parser.add_argument_group("optimisation: AdamW, warm-up, cosine to 0")
    for name, kind, about in (("steps", whole, "optimiser steps"), ("batch_size", whole, "examples a step"), ("lr", positive, "peak learning rate"),
                              ("grad_accum", whole, "parts a batch is computed in"), ("warmup", below_1, "share of the steps"),
                              ("weight_decay", at_least_0, "not on norms, biases, positions, routers"), ("clip", positive, "largest gradient norm")):
        train.add_argument("--" + name.replace("_", "-"), type=kind, help=about)
    model = parser.add_argument_group("model")
    for name, about in (("dim", "width D"), ("depth", "blocks"), ("heads", "attention heads"), ("hidden", "width inside an FFN or an expert"),
                        ("experts", "experts E in a block")):
        model.add_argument("--" + name, type=whole, help=about)
    model.add_argument("--moe-blocks", type=numbers, help="blocks with experts, such as 1,3; none: " + module.moe_blocks.__doc__)
    model.add_argument("--expert-init", choices=("independent", "identical"), help="experts start apart, or all alike (V-MoE)")
    model.add_argument("--dense-match", choices=("active", "total"), help="with --router dense: FFNs as wide as the K active experts, or as all")
    module.add_flags(parser, KINDS)
    options = parser.add_argument_group("router options, for the routers named")
    for name, default in OPTIONS.items():
        option_flag(options, name, default)
    losses = parser.add_argument_group("router losses")
    losses.add_argument("--balance", choices=BALANCE, help="importance and load; Switch's; or a selection bias")
    losses.add_argument("--balance-weight", type=at_least_0, help="weight of the balance losses (default: vmoe 0.005 each, switch 0.01)")
    losses.add_argument("--z-loss", type=at_least_0, help="weight of the mean squared logsumexp of the logits")
    made = ROUTERS[router].defaults if router in ROUTERS else {}
    parser.set_defaults(**{FLAG.get(name, name): "none" if name == "capacity_factor" and value is None else value for name, value in made.items()})
    parser.set_defaults(**defaults)
    return parser


def parse(argv):
    """Flags -> (parser, args). What they say of the task, the size and the router decides the other flags' defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in (("task", "vision"), ("size", "tiny"), ("router", "expert_choice"), ("balance", None), ("router-weights", None), ("sample", None)):
        first.add_argument("--" + name, default=default)
    known, _ = first.parse_known_args(argv)
    task = "tokens" if known.sample else known.task if known.task in TASKS else "vision"
    parser = make_parser(task, known.size if known.size in TASKS[task].SIZES else "tiny", known.router)
    if known.router_weights not in (None, "learned") and known.balance is None:
        parser.set_defaults(balance="none")  # there is nothing to balance with
    return parser, parser.parse_args(argv)


def check(args):
    """Raise ValueError for flags that contradict each other; fill in what follows from the others."""
    if args.router != "dense" and args.router not in ROUTERS:
        raise ValueError(f"unknown router {args.router!r}; known: dense, {', '.join(ROUTERS)}")
    has = set(ROUTERS[args.router].defaults) if args.router in ROUTERS else {"top_k"}
    for name in OPTIONS:
        if name not in has and getattr(args, FLAG.get(name, name)) is not None:
            raise ValueError(f"--{FLAG.get(name, name).replace('_', '-')} is no option of --router {args.router}; it has {', '.join(sorted(has))}")
    args.top_k = args.top_k or 1
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
        if weight and name not in offered:
            raise ValueError(f"--router {args.router} offers no {name} loss" + (f"; it offers {', '.join(offered)}" if offered else ""))
    if args.batch_size % args.grad_accum:
        raise ValueError(f"--grad-accum must divide --batch-size {args.batch_size}, got {args.grad_accum}")
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
    return torch.device(name)


# ---------------------------------------------------------------- building
def make_router(args):
    """The router these flags describe; what they leave open stands as build_router has it."""
    options = {name: getattr(args, FLAG.get(name, name)) for name in ROUTERS[args.router].defaults}
    options = {name: None if value == "none" else value for name, value in options.items() if value is not None}
    return build_router(args.router, args.dim, args.experts, **options)


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
    data = task.load_data(args, device)
    model = build_model(args, task, data, device)
    one = {name: value[:1] for name, value in next(iter(data.split("validation"))).items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.loss(model, one)
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
    """Total parameters, and active ones: of an expert, the share of the tokens that its slots can serve."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for moe in moes(model):
        o, E = moe.router.options, moe.router.num_experts
        share = min(1, getattr(o, "top_k", 1) * (getattr(o, "capacity_factor", 1) or 1) / E)
        idle += (1 - share) * sum(p.numel() for p in moe.experts.parameters())
    return total, round(total - idle)


def make_optimizer(args, model, device):
    """AdamW; no decay on norms, biases and positions, nor on routers, whose decay would only flatten every gate."""
    def decays(name, p):
        return p.ndim > 1 and name.split(".")[-1] not in ("b1", "b2", "position") and ".router." not in name

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if decays(n, p)], "weight_decay": args.weight_decay},
              {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def learning_rate(args, step):
    warm = max(1, round(args.warmup * args.steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


# ---------------------------------------------------------------- training and evaluation
def precision(device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def statistics(routings):
    """Per MoE block: load max/mean, share of dropped tokens, and slots a token sits in, from {block: Routing}."""
    stats = {}
    for block, routing in routings.items():
        counts = routing.counts()
        stats[block] = {"load": float(routing.load.max() * len(routing.load)), "dropped": float((counts == 0).float().mean()),
                        "slots_per_token": float(counts.float().mean())}
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
def evaluate(task, model, data, split, device):
    """Cross-entropy alone, metrics in %, and routing statistics, over a whole split; without noise."""
    model.eval()
    sums, stats = {}, []
    for batch in data.split(split):
        with precision(device):
            loss, counts, routings = task.loss(model, batch)
        add(sums, {name: float(value) for name, value in (counts | {"loss": loss * counts["count"]}).items()})
        stats.append(statistics(routings))
    return {**task.metrics(sums), "blocks": mean_statistics(stats)}


def train_step(args, task, model, optimizer, data, step, device):
    """One optimiser step: forward and backward of each part of the batch, clip, step, then what no gradient moves."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, step)
    torch.manual_seed(seeded(args.seed, step, "noise").initial_seed())
    weights, rows = loss_weights(args), args.batch_size // args.grad_accum
    sums, losses, seen = {}, {}, []
    for i in range(args.grad_accum):
        batch = data.batch(step, part=slice(i * rows, (i + 1) * rows))
        with precision(device):
            loss, counts, routings = task.loss(model, batch)
            terms = {}
            for routing in once(routings):
                for name, value in routing.losses.items():
                    terms[name] = terms.get(name, 0.0) + value
            objective = loss + sum(weight * terms[name] for name, weight in weights.items() if weight and name in terms)
        (objective / args.grad_accum).backward()
        add(sums, counts | {"loss": loss.detach() * counts["count"]})
        add(losses, {name: value.detach() / args.grad_accum for name, value in terms.items()})
        seen.append(once(routings))
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for layer, router in enumerate(dict.fromkeys(moe.router for moe in moes(model))):
        router.update([routings[layer] for routings in seen], seeded(args.seed, step + 1, "router", layer))
    return {**task.metrics(sums), **losses, "grad_norm": norm}, routings


def save(folder, name, content):
    """Write a file whole or not at all: to a temporary name, then in place of the old one."""
    part = folder / (name + ".part")
    if name.endswith(".json"):
        part.write_text(json.dumps(content, indent=1) + "\n")
    else:
        torch.save(content, part)
    os.replace(part, folder / name)


def fit(args, task, model, data, device, folder):
    """Train, write metrics.jsonl as it comes, save the checkpoint; returns (steps done, seconds)."""
    optimizer, start, step = make_optimizer(args, model, device), time.perf_counter(), 0
    running = torch.compile(model) if args.compile else model
    with open(folder / "metrics.jsonl", "w") as file, tqdm(total=args.steps, desc=title(args), dynamic_ncols=True) as bar:
        try:
            for step in range(args.steps):
                logged, routings = train_step(args, task, running, optimizer, data, step, device)
                if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
                    line = {"step": step + 1, **remarked(args), **{name: float(value) for name, value in logged.items()}, "blocks": statistics(routings)}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    rate = (step + 1) * args.batch_size / (time.perf_counter() - start)
                    shown = {name: f"{line[name]:.3g}" for name in ("loss", "top1", "bits_per_byte") if name in line}
                    bar.set_postfix(shown | {f"{task.UNIT}/s": f"{rate:.0f}"})
                bar.update()
            done = args.steps
        except KeyboardInterrupt:
            done = step
    seconds = time.perf_counter() - start
    save(folder, "checkpoint.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "args": vars(args)})
    return done, seconds


def conclude(args, task, model, data, device, gflops, seconds, folder=None):
    """Evaluate and probe; write the last lines of metrics.jsonl and the summary; print the table."""
    result = {split: evaluate(task, model, data, split, device) for split in task.SPLITS}
    with dropless(model) as differs:
        if differs:
            result[task.SPLITS[-1] + "_dropless"] = evaluate(task, model, data, task.SPLITS[-1], device)
    total, active = parameters(model)
    found, joints = specialisation(task, model, data, device)
    summary = {"router": title(args), **result, **task.report(args, model, data, lambda: build_model(args, task, data, device)), "specialisation": found,
               "parameters": total, "active_parameters": active, "gflops": gflops, "steps": args.steps}
    if folder:
        with open(folder / "metrics.jsonl", "a") as file:
            for split, values in result.items():
                file.write(json.dumps({"step": args.steps, "split": split} | remarked(args) | values) + "\n")
    summary |= {"seconds": seconds, f"{task.UNIT}_per_second": args.steps * args.batch_size / seconds}
    print(table([{"router": title(args), **row([summary], task)}]))
    if found:
        print(table([{"block": str(block), "experts know of": name, "NMI": f"{value:.3f}", "by chance": f"{mean:.3f}", "95 % of chance": f"{bound:.3f}"}
                     for block, of in found.items() for name, (value, mean, bound) in of.items()]))
    task.show(model, data, joints, folder)
    return summary


def title(args):
    return args.router + (f" ({args.remark})" if args.remark else "")


def remarked(args):
    """What marks a line of numbers as leaky, or as an oracle's."""
    return {"remark": args.remark} if args.remark else {}


def row(summaries, task):
    """One row of the table, {column: text}, of the runs of one setting: a lone run's numbers, or mean ± deviation over seeds."""
    decimals = {task.HEADLINE[0]: 1 if task.HEADLINE[1] > 0 else 3, "dropless": 1 if task.HEADLINE[1] > 0 else 3, "as generated": 3, "GFLOPs": 4,
                "load max/mean": 2, "bytes/token": 2, "perplexity": 2, "parameters": 0, "active": 0, "seconds": 0, f"{task.UNIT}/s": 0}
    columns = []
    for s in summaries:
        blocks = s[task.SPLITS[-1]]["blocks"].values()
        columns.append({**task.columns(s), "load max/mean": [b["load"] for b in blocks], "dropped %": [100 * b["dropped"] for b in blocks],
                        "parameters": s["parameters"], "active": s["active_parameters"], "GFLOPs": s["gflops"],
                        f"{task.UNIT}/s": s[f"{task.UNIT}_per_second"], "seconds": s["seconds"]})
    texts = {}
    for name in columns[0]:
        values, show = [c[name] for c in columns], f"{{:,.{decimals.get(name, 1)}f}}".format
        if None in values or [] in values:
            texts[name] = "-"
        elif isinstance(values[0], list):
            texts[name] = ", ".join(map(show, np.mean(values, 0)))  # a number for each block
        else:
            pairs = [v if isinstance(v, tuple) else (v, None) for v in values]
            mean, spread = float(np.mean([v for v, _ in pairs])), pairs[0][1]
            if len(values) > 1:
                spread = float(np.std([v for v, _ in pairs], ddof=1))
            fixed = spread is None or len(values) > 1 and name in ("parameters", "active", "GFLOPs")
            texts[name] = show(mean) + ("" if fixed else " ± " + show(spread))
    return texts


def results(folder):
    """All finished runs below a folder in one table: printed, and written to results.md and results.jsonl there."""
    runs = {}
    for path in sorted(pathlib.Path(folder).glob("*/summary.json")):
        flags, summary = json.loads((path.parent / "config.json").read_text())["flags"], json.loads(path.read_text())
        runs.setdefault(json.dumps({name: value for name, value in flags.items() if name not in UNRELATED | {"seed"}}), []).append((flags, summary))
    if not runs:
        raise ValueError(f"--table {folder}: no finished run (a folder with a summary.json) lies there")
    settings = [json.loads(key) for key in runs]
    tasks = {setting["task"] for setting in settings}
    if len(tasks) > 1:
        raise ValueError(f"--table {folder} holds runs of several tasks: {', '.join(sorted(tasks))}")
    task, rows = TASKS[tasks.pop()], []
    told = {name: {json.dumps(s[name]) for s in settings if s.get(name) is not None} for s in settings for name in s if name not in ("router", "remark")}
    differing = [name for name, values in told.items() if len(values) > 1]
    column, sign = task.HEADLINE
    for setting, group in zip(settings, runs.values()):
        scores = [task.columns(summary)[column] for _, summary in group]
        named = {name: "-" if setting.get(name) is None else str(setting[name]) for name in differing}
        rows.append((scores, {"router": title(argparse.Namespace(**setting)), **named, "seeds": str(len(group)), **row([s for _, s in group], task)}))
    rows.sort(key=lambda r: -sign * np.mean(r[0]) if None not in r[0] else 0)
    best = rows[0][0]
    for scores, texts in rows:  # a difference inside the spread is a tie
        gap, spread = (float(f(scores) - f(best)) if f is np.mean else float(np.hypot(f(scores), f(best))) for f in (np.mean, np.std))
        texts["to the best"] = "best" if scores is best else "tie" if abs(gap) <= spread else f"{gap:+.3f}"
    text = table([texts for _, texts in rows])
    (pathlib.Path(folder) / "results.md").write_text(text + "\n")
    lines = [json.dumps({"flags": flags, "summary": summary}) for group in runs.values() for flags, summary in group]
    (pathlib.Path(folder) / "results.jsonl").write_text("\n".join(lines) + "\n")
    print(text)


def table(rows):
    """Rows of {column: text} as Markdown, columns aligned."""
    names = list(rows[0])
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

    The null permutes labels among the units on which a label is constant: a document for its topic, a token for its class.
    """
    units, index = unit.unique(return_inverse=True)
    shares = mass.new_zeros(len(units), mass.shape[1]).index_add(0, index, mass)  # [units, E]
    of = label.new_zeros(len(units)).scatter(0, index, label)
    joint = lambda labels: shares.new_zeros(int(of.max()) + 1, shares.shape[1]).index_add(0, labels, shares)
    g = seeded("null")
    null = [nmi(joint(of[torch.randperm(len(of), generator=g)])) for _ in range(draws)]
    return [nmi(joint(of)), float(np.mean(null)), float(np.quantile(null, 0.95))]


@torch.no_grad()
def specialisation(task, model, data, device):
    """Of each MoE block on the table's split: {block: {name: [NMI, null mean, null 95 %]}} and {block: {name: joint mass}}."""
    model.eval()
    gathered, start = {}, 0
    for batch in data.split(task.SPLITS[-1]):
        with precision(device):
            _, _, routings = task.loss(model, batch)
        for name, (label, unit, names) in task.labels(batch, data, start).items():
            for block, routing in routings.items():
                mass = routing.mass().float().cpu()
                mass = mass.reshape(len(label), -1, mass.shape[-1]).expand(*label.shape, -1)  # a sequence's on all its tokens
                known = label.flatten() >= 0
                parts = mass.flatten(0, 1)[known], label.flatten()[known], None if unit is None else unit.flatten()[known]
                gathered.setdefault((block, name, len(names)), []).append(parts)
        start += len(next(iter(batch.values())))
    found, joints = {}, {}
    for (block, name, count), parts in gathered.items():
        mass, label, unit = (torch.cat(column) if column[0] is not None else None for column in zip(*parts))
        joints.setdefault(block, {})[name] = mass.new_zeros(count, mass.shape[1]).index_add(0, label, mass)
        if unit is not None and len(label):
            found.setdefault(block, {})[name] = nmi_and_null(mass, label, unit)
    return found, joints


# ---------------------------------------------------------------- runs
def run_folder(args):
    """A fresh runs/TASK-ROUTER-N, or --out, made if it is not there. Raises ValueError for one that is in use."""
    if args.out is None:
        folder = next(f for n in range(10**6) if not (f := pathlib.Path("runs", f"{args.task}-{args.router}-{n}")).exists())
    else:
        folder = pathlib.Path(args.out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file")
        if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
            raise ValueError(f"--out {folder} is not empty; choose another or say --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("summary.json", "checkpoint.pt"):
        (folder / old).unlink(missing_ok=True)
    return folder


def load_files(folder, device):
    """The flags and the checkpoint of a run. Raises ValueError for a folder that is none."""
    try:
        flags = json.loads((folder / "config.json").read_text())["flags"]
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no finished run: {pathlib.Path(error.filename).name} is missing") from None
    except (KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{folder} cannot be read as a run: {error}") from None
    except Exception as error:  # torch.load reports a broken or unsafe file by its own and by pickle's exceptions
        raise ValueError(f"{folder}: the checkpoint cannot be read: {str(error).splitlines()[0]}") from None
    return argparse.Namespace(**flags, device=device, run=folder), checkpoint


def load_run(folder, device):
    """args, task, data, model, device, GFLOPs and seconds of a finished run. Raises ValueError for a folder that is none."""
    folder = pathlib.Path(folder)
    saved, checkpoint = load_files(folder, device)
    try:
        seconds = json.loads((folder / "summary.json").read_text())["seconds"]
        device, task, data, model, gflops = build(saved)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} cannot be read as a run: {str(error).splitlines()[0]}") from None
    return saved, task, data, model, device, gflops, seconds


def sample(args):
    """Text from a finished run. Raises ValueError for a folder that is none, or that cannot write."""
    folder = pathlib.Path(args.sample)
    saved, checkpoint = load_files(folder, args.device)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"--sample {folder}: a run of --task {saved.task} without a tokenizer writes no text")
    tokenizer, task, device = moe_tokens.Tokenizer.read(folder / "tokenizer.json"), TASKS[saved.task], pick_device(args.device)
    model = task.build_model(saved, SimpleNamespace(vocab_size=len(tokenizer.pieces), topics=()), make_feed(saved))
    model.load_state_dict(checkpoint["model"])
    with dropless(model.to(device).eval()) as differs:
        notes = ["sampled dropless, trained with a capacity"] * differs + [saved.remark] * bool(saved.remark)
        return task.sample(args, model, tokenizer, saved) + (f"\n({'; '.join(notes)})" if notes else "")


def main(argv=None):
    """Run the command line; returns the exit status. Ctrl-C outside the training loop has nothing to save."""
    try:
        return command(argv)
    except KeyboardInterrupt:
        print("interrupted; what was written before stays", file=sys.stderr)
        return 130


def command(argv):
    settings = split_flags(argv)
    if any(len(values) > 1 for values in settings.values()) or settings.get("--router") == ["all"]:
        return grid(settings)
    parser, args = parse(argv)
    try:
        if args.eval:
            args, task, data, model, device, gflops, seconds = load_run(args.eval, args.device)
            conclude(args, task, model, data, device, gflops, seconds)
        elif args.sample:
            print(sample(args))
        elif args.table:
            results(args.table)
        else:
            check(args)
            return run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def run(args, folder=None):
    """One run, into a folder of its own; returns the exit status."""
    device, task, data, model, gflops = build(args)
    folder = folder or run_folder(args)
    flags = {name: value for name, value in vars(args).items() if name not in UNRELATED - {"log_every"}}
    for name, content in task.files(data).items():
        save(folder, name, content)
    save(folder, "config.json", {"flags": flags, "device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
                                 "numpy": np.__version__, "python": platform.python_version()})
    print(f"{args.task}, router {title(args)}, {data.about}; {device.type}, torch {torch.__version__}, seed {args.seed} -> {folder}")
    done, seconds = fit(args, task, model, data, device, folder)
    if done < args.steps:
        print(f"interrupted after {done} of {args.steps} steps; weights so far are in {folder / 'checkpoint.pt'}")
        return 130
    save(folder, "summary.json", conclude(args, task, model, data, device, gflops, seconds, folder))
    return 0


# ---------------------------------------------------------------- grids: the same run, many times
def split_flags(argv):
    """{flag: [values]} of a command line; a flag with several values spans an axis of a grid."""
    settings, values = {}, []
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            values = settings[flag] = [value] if equals else []
        else:
            values.append(word)
    return settings


def ignored(setting):
    """The flags of {flag: value} that mean nothing for its router."""
    router, task = setting.get("--router", "expert_choice"), TASKS.get(setting.get("--task", "vision"), moe_vision)
    having = set(ROUTERS[router].defaults) if router in ROUTERS else {"top_k"}
    none = {"--" + FLAG.get(name, name).replace("_", "-") for name in OPTIONS if name not in having} | task.ignored({"--router": router} | setting)
    if router == "dense":
        return none | {"--balance", "--balance-weight", "--z-loss", "--expert-init"} | ({"--top-k"} if setting.get("--dense-match") == "total" else {"--experts"})
    offers = ROUTERS[router].offers if router in ROUTERS else ()
    useless = setting.get("--balance") == "bias" and "bias_rate" not in having or setting.get("--balance") in ("vmoe", "switch") and "balance" not in offers
    return none | {"--dense-match"} | ({"--balance", "--balance-weight"} if useless else set()) | ({"--z-loss"} if "z" not in offers else set())


def grid(settings):
    """Every combination of the values given, a run folder each under --out; finished ones are kept. Ends with the table."""
    every = settings.get("--router") == ["all"]
    if every:
        settings["--router"] = ["dense", *ROUTERS]
    cells = {}
    for values in itertools.product(*(v or [None] for v in settings.values())):
        setting = dict(zip(settings, values))
        setting = {flag: value for flag, value in setting.items() if flag not in ignored(setting)}
        parser, args = parse([word for flag, value in setting.items() for word in (flag, value) if word is not None])
        try:
            check(args)
        except ValueError as error:
            if not every:
                parser.error(f"{' '.join(f'{flag} {value}' for flag, value in setting.items())}: {error}")
            print(f"left out: {args.router}: {error}")
            continue
        config = json.dumps({name: value for name, value in vars(args).items() if name not in UNRELATED}, sort_keys=True)
        several = [f"{flag[2:]}_{setting[flag]}" for flag, of in settings.items() if len(of) > 1 and flag in setting and flag not in ("--router", "--seed")]
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
        if status == 130:
            return status
    results(out)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Train one model with one router, and say what it learned and what it cost.

    python train.py --router expert_choice          a vision MoE on images drawn on the fly, about 2 minutes on 2 CPU cores
    python train.py --router dense                  the same ViT without experts
    python train.py --router soft --data DIR        on a folder in the CIFAR binary layout, or an .npz
    python train.py --eval runs/vision-soft-0       evaluate a finished run again
    python train.py --help                          every flag with its default; they depend on --size and --router

Every random draw comes from (seed, step, what for), so one seed fixes data, weights and order, and there is no random
state to keep. A run folder holds config.json, metrics.jsonl, checkpoint.pt and summary.json.
"""
import argparse
import copy
import json
import math
import os
import pathlib
import platform
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import moe_vision
from routers import CHOICES, ROUTERS, MoE, build_router, seeded

TASKS = {"vision": moe_vision}
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
    module.add_flags(parser)
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
    for name, default in (("task", "vision"), ("size", "tiny"), ("router", "expert_choice"), ("balance", None), ("router-weights", None)):
        first.add_argument("--" + name, default=default)
    known, _ = first.parse_known_args(argv)
    task = known.task if known.task in TASKS else "vision"
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
def make_feed(args):
    """feed(block, tokens) -> what stands in that block after attention: an FFN or an MoE."""
    def feed(block, tokens):
        sparse = block in args.moe_blocks
        if sparse and args.router != "dense":
            options = {name: getattr(args, FLAG.get(name, name)) for name in ROUTERS[args.router].defaults}
            if options.get("capacity_factor") == "none":
                options["capacity_factor"] = None
            return MoE(build_router(args.router, args.dim, args.experts, **options), args.hidden, args.expert_init)
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
    with open(folder / "metrics.jsonl", "w") as file, tqdm(total=args.steps, desc=args.router, dynamic_ncols=True) as bar:
        try:
            for step in range(args.steps):
                logged, routings = train_step(args, task, running, optimizer, data, step, device)
                if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
                    line = {"step": step + 1, **{name: float(value) for name, value in logged.items()}, "blocks": statistics(routings)}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    rate = (step + 1) * args.batch_size / (time.perf_counter() - start)
                    shown = {name: f"{line[name]:.3g}" for name in ("loss", "top1") if name in line}
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
    result = {split: evaluate(task, model, data, split, device) for split in ("validation", "test")}
    layers = [moe.router for moe in moes(model) if moe.router.chooses == "tokens" and moe.router.options.capacity_factor]
    if layers:
        factor = layers[0].options.capacity_factor
        for router in layers:
            router.options.capacity_factor = None
        result["test_dropless"] = evaluate(task, model, data, "test", device)
        for router in layers:
            router.options.capacity_factor = factor
    total, active = parameters(model)
    summary = {"router": args.router, **result, **task.report(model, data, lambda: build_model(args, task, data, device)), "parameters": total, "active_parameters": active,
               "gflops": gflops, "steps": args.steps}
    if folder:
        with open(folder / "metrics.jsonl", "a") as file:
            for split, values in result.items():
                file.write(json.dumps({"step": args.steps, "split": split, **values}) + "\n")
    summary |= {"seconds": seconds, f"{task.UNIT}_per_second": args.steps * args.batch_size / seconds}
    print(table([summary_row(summary, task)]))
    return summary


def summary_row(s, task):
    """One row of the table, {column: text}."""
    blocks, row = s["test"]["blocks"], {"router": s["router"], **task.columns(s)}
    row["load max/mean"] = ", ".join(f"{b['load']:.2f}" for b in blocks.values()) or "-"
    row["dropped %"] = ", ".join(f"{100 * b['dropped']:.1f}" for b in blocks.values()) or "-"
    row |= {"parameters": f"{s['parameters']:,}", "active": f"{s['active_parameters']:,}", "GFLOPs": f"{s['gflops']:.4f}",
            f"{task.UNIT}/s": f"{s[f'{task.UNIT}_per_second']:.0f}", "seconds": f"{s['seconds']:.0f}"}
    return row


def table(rows):
    """Rows of {column: text} as Markdown, columns aligned."""
    names = list(rows[0])
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [names, ["-" * width[name] for name in names]] + [[row[name] for name in names] for row in rows]
    return "\n".join("| " + " | ".join(text.ljust(width[name]) for text, name in zip(line, names)) + " |" for line in lines)


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


def load_run(folder, device):
    """args, task, data, model and GFLOPs of a finished run. Raises ValueError for a folder that is none."""
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        saved = argparse.Namespace(**config["flags"], device=device)
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        device, task, data, model, gflops = build(saved)
        model.load_state_dict(checkpoint["model"])
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no finished run: {pathlib.Path(error.filename).name} is missing") from None
    except (KeyError, TypeError, json.JSONDecodeError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{folder} cannot be read as a run: {str(error).splitlines()[0]}") from None
    except Exception as error:  # torch.load reports a broken or unsafe file by its own and by pickle's exceptions
        raise ValueError(f"{folder}: the checkpoint cannot be read: {str(error).splitlines()[0]}") from None
    return saved, task, data, model, device, gflops, summary


def main(argv=None):
    """Run the command line; returns the exit status. Ctrl-C outside the training loop has nothing to save."""
    try:
        return command(argv)
    except KeyboardInterrupt:
        print("interrupted; what was written before stays", file=sys.stderr)
        return 130


def command(argv):
    parser, args = parse(argv)
    try:
        if args.eval:
            args, task, data, model, device, gflops, before = load_run(args.eval, args.device)
            conclude(args, task, model, data, device, gflops, before["seconds"])
            return 0
        check(args)
        device, task, data, model, gflops = build(args)
        folder = run_folder(args)
        flags = {name: value for name, value in vars(args).items() if name not in ("device", "out", "overwrite", "eval")}
        save(folder, "config.json", {"flags": flags, "device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
                                     "numpy": np.__version__, "python": platform.python_version()})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.task}, router {args.router}, {data.about}; {device.type}, torch {torch.__version__}, seed {args.seed} -> {folder}")
    done, seconds = fit(args, task, model, data, device, folder)
    if done < args.steps:
        print(f"interrupted after {done} of {args.steps} steps; weights so far are in {folder / 'checkpoint.pt'}")
        return 130
    save(folder, "summary.json", conclude(args, task, model, data, device, gflops, seconds, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What this set promises, one test a promise: `pytest -q` (CPU, under 3 minutes, nothing downloaded). With EVERY_ROUTER=1, and
`-k killed`, runs of six routers on both tasks are killed and resumed.

Axes as in routers.py: G groups, T tokens, D width, E experts, C slots, K choices. Numbers are compared in float64. What is parametrised
over ROUTERS, or by @each, tests a router that you add as it is; for its values, write its worked example (WORKED) and slow twin (SLOW).
"""
import collections
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from types import SimpleNamespace
from xml.etree import ElementTree

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread mostly waits, and for long where others work
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_tokens
import moe_vision
import routers
import train
from routers import (ROUTERS, Experts, MoE, Routing, balance_loss, build_router, importance_loss, load_loss, project, queue,
                     seeded, sinkhorn_plan, sparse_plan, top, z_loss)


# ---------------------------------------------------------------- helpers
def those(held):
    """The names of the routers of which this holds."""
    return [name for name, kind in ROUTERS.items() if held(kind)]


HARD, TOKENS_CHOOSE = those(lambda kind: kind.chooses != "soft"), those(lambda kind: kind.chooses == "tokens")
WEIGHED, NOISY = those(lambda kind: "weights" in kind.defaults), those(lambda kind: "noise_std" in kind.defaults)
ROOT = pathlib.Path(__file__).parent
LEARNED = [name for name in ROUTERS if list(build_router(name, 4, 2).parameters())]


def settings(names=tuple(ROUTERS), **axes):
    """(name, options) for every product of these options; a router is spared an option that it does not know."""
    found = {}
    for name, values in itertools.product(names, itertools.product(*axes.values())):
        options = {option: value for option, value in zip(axes, values) if option in ROUTERS[name].defaults}
        if name in TOKENS_CHOOSE or options.get("capacity_factor", 1) is not None:
            found[" ".join([name, *(f"{option}={value}" for option, value in options.items())])] = (name, options)
    return [pytest.param(*value, id=key) for key, value in found.items()]


def each(names=tuple(ROUTERS), **axes):
    return pytest.mark.parametrize("name, options", settings(names, **axes))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(name, x, num_experts, seed=0, init="independent", **options):
    """The MoE layer with that router in float64, its shapes settled by a first look at tokens x [G, T, D]."""
    torch.manual_seed(seed)
    moe = MoE(build_router(name, x.shape[-1], num_experts, **options), hidden=7, init=init).double()
    moe.router(x)
    return moe


def plain(name, num_experts, **options):
    """The router alone with logits = x: D = E, and the identity as its weight."""
    router = build_router(name, num_experts, num_experts, **options).double()
    if name in WEIGHED:
        nn.init.eye_(router.gate.weight)
    return router


def same(got, want, within=1e-12):
    want = torch.as_tensor(want, dtype=torch.float64) if isinstance(want, (float, list)) else want
    torch.testing.assert_close(got, want, rtol=0, atol=within)


def alike(R, leaves, got, want, within=1e-12):
    """The same values, and from the last of each the same gradients of sum(R * value)."""
    gradients = lambda values: torch.autograd.grad((R * values[-1]).sum(), leaves, materialize_grads=True)
    same((*got, *gradients(got)), (*want, *gradients(want)), within)


# ---------------------------------------------------------------- worked examples: 3 tokens, 3 experts, 2 slots each
# Rows are tokens. Logits are the logarithms of these numbers, so a softmax divides each row by its sum.
GATES = [[.5, .3, .2], [.6, .1, .3], [.7, .2, .1]]
TURNS = [[.5, .3, .2], [.2, .5, .3], [.3, .2, .5]]
# A doubly stochastic matrix (.6 .3 .1 / .3 .2 .5 / .1 .5 .4) whose first column is times 6: the first expert is in demand.
# Sinkhorn divides that out again; the softmax (.9 .075 .025 / .72 .08 .2 / .4 1/3 4/15) does not.
CROWD = [[3.6, .3, .1], [1.8, .2, .5], [.6, .5, .4]]
WORKED = [  # router, options, numbers, {(token, expert, slot): gate}
    # All three want expert 0, which has two slots: the first two get them, token 2 is dropped.
    ("token_choice", dict(capacity_factor=2), GATES, {(0, 0, 0): .5, (1, 0, 1): .6}),
    # The surest first: token 2 (.7), then token 1 (.6); token 0 is dropped.
    ("token_choice", dict(capacity_factor=2, priority="gate"), GATES, {(2, 0, 0): .7, (1, 0, 1): .6}),
    # Two choices by position: 0 -> 0, 1; 1 -> 0, 2; 2 -> 0 (full), 1. Gates divided by .8, .9, .9, whoever is dropped.
    ("token_choice", dict(top_k=2, renormalize=True), GATES,
     {(0, 0, 0): 5 / 8, (0, 1, 0): 3 / 8, (1, 0, 1): 6 / 9, (1, 2, 0): 3 / 9, (2, 1, 1): 2 / 9}),
    # Everyone's largest number stands first, yet in the balanced plan tokens prefer 0 (.6), 2 (.5), 1 (.5). Softmax weighs.
    ("sinkhorn_token_choice", dict(capacity_factor=2), CROWD, {(0, 0, 0): .9, (1, 2, 0): .2, (2, 1, 0): 1 / 3}),
    # A row's two largest, .5 and .3, reach the simplex by (1 - .8) / 2 more each: .6 and .4. So every expert has .6 + .4 = 1
    # and no price has to move. Seats by position; the plan weighs.
    ("sparse_token_choice", dict(top_k=2, combine="plan"), TURNS,
     {(0, 0, 0): .6, (0, 1, 0): .4, (1, 1, 1): .6, (1, 2, 0): .4, (2, 2, 1): .6, (2, 0, 1): .4}),
    # Columns .5 .6 .7, .3 .1 .2 and .2 .3 .1: the two largest of each, falling.
    ("expert_choice", dict(capacity_factor=2), GATES, {(2, 0, 0): .7, (1, 0, 1): .6, (0, 1, 0): .3, (2, 1, 1): .2, (1, 2, 0): .3, (0, 2, 1): .2}),
    # Columns of the plan: .6 .3 .1 takes 0, 1; .3 .2 .5 takes 2, 0; .1 .5 .4 takes 1, 2. Softmax weighs.
    ("sinkhorn_expert_choice", dict(capacity_factor=2), CROWD,
     {(0, 0, 0): .9, (1, 0, 1): .72, (2, 1, 0): 1 / 3, (0, 1, 1): .075, (1, 2, 0): .2, (2, 2, 1): 4 / 15}),
    # As the sparse plan above, by columns: .5 .2 .3 -> .6 (token 0) and .4 (token 2), and so on round the circle.
    ("sparse_expert_choice", dict(capacity_factor=2, combine="plan"), TURNS,
     {(0, 0, 0): .6, (2, 0, 1): .4, (1, 1, 0): .6, (0, 1, 1): .4, (2, 2, 0): .6, (1, 2, 1): .4}),
    # Thresholds start at 1/3: token 0 passes at 0, 1 at 0 and 1, 2 at 0 (whose two slots are gone) and 1.
    ("expert_threshold", {}, [[.5, .3, .2], [.4, .4, .2], [.45, .35, .2]], {(0, 0, 0): .5, (1, 0, 1): .4, (1, 1, 0): .4, (2, 1, 1): .35}),
    # Keys 0, 2, 4 of a table 1 0 2. Key 0 goes to 1 and the next, 2; key 2 to 2 and 0; 4 mod 3 = 1 and 2, where it is third.
    ("hash", dict(top_k=2, num_keys=3), GATES, {(0, 1, 0): .5, (0, 2, 0): .5, (1, 2, 1): .5, (1, 0, 0): .5, (2, 1, 1): .5}),
]


@pytest.mark.parametrize("name, options, numbers, seats", WORKED)
def test_a_router_fills_the_tensors_as_worked_out_by_hand(name, options, numbers, seats):
    router, want = plain(name, 3, **options), torch.zeros(2, 1, 3, 3, 2, dtype=torch.float64)
    router.load_state_dict({"table": torch.tensor([1, 0, 2])} if name == "hash" else {}, strict=False)
    tensors = router(torch.tensor([numbers], dtype=torch.float64).log(), torch.tensor([[0, 2, 4]])).tensors()
    for seat, gate in seats.items():
        want[0, 0][seat], want[1, 0][seat] = 1, gate
    same(torch.stack(tensors), want, 1e-9)  # the sparse solver's one step moves a price by 1e-10


def test_soft_fills_the_tensors_as_worked_out_by_hand():
    router = build_router("soft", 3, 3, slots=2, scale=math.log(2) * (1 + 1e-6)).double()  # undoes the 1e-6 under both roots
    axes = F.one_hot(torch.tensor([[0, 1], [2, 0], [1, 2]])).permute(2, 0, 1).double()  # [D, E, C]: each axis has two slots
    router.load_state_dict({"phi": axes, "scale": router.scale})
    dispatch, combine = router(torch.eye(3, dtype=torch.float64)[None]).tensors()
    # exp(logits) is 2 where token and slot point the same way, else 1. A slot: 2 / (2+1+1). A token: 2 / (2+2+1+1+1+1).
    same((dispatch[0], combine[0]), ((1 + axes) / 4, (1 + axes) / 8), 1e-7)  # the scale was a float32


# ---------------------------------------------------------------- every router again, as slow loops
# One group: logits[t][e], scores and gates are nested lists of scalars, so that autograd runs through the loops. What
# comes back is slots[e][c], each a {token: (dispatch weight, combine weight)}.
def number(value):
    return value.item() if torch.is_tensor(value) else value


def best(values, k=None):
    """The places of the k largest, falling; sorted() leaves equals in order."""
    return sorted(range(len(values)), key=lambda i: -number(values[i]))[:k]


def slow_softmax(row):
    return [value.exp() / sum(other.exp() for other in row) for value in row]


def slow_sinkhorn(logits, iterations):
    """The paper's form: scale columns, then rows, of the kernel exp(logits); good while exp() does not overflow."""
    kernel, tokens, experts = [[value.exp() for value in row] for row in logits], range(len(logits)), range(len(logits[0]))
    u = [1] * len(tokens)
    for _ in range(iterations):
        v = [len(tokens) / len(experts) / sum(kernel[t][e] * u[t] for t in tokens) for e in experts]
        u = [1 / sum(kernel[t][e] * v[e] for e in experts) for t in tokens]
    return [[u[t] * kernel[t][e] * v[e] for e in experts] for t in tokens]


def slow_project(column, k):
    largest = best(column, k)
    for size in range(len(largest), 0, -1):  # the widest support in which everyone stays above zero
        over = (sum(column[i] for i in largest[:size]) - 1) / size
        if column[largest[size - 1]] > over:
            return [column[i] - over if i in largest[:size] else 0.0 for i in range(len(column))]


def slow_sparse(gates, k, mass, iterations):
    """A plan whose columns have that mass; torch's Adam follows the slope of the semi-dual, row sums minus their target."""
    tokens, experts = range(len(gates)), range(len(gates[0]))
    price = torch.zeros(len(tokens), dtype=torch.float64)
    adam = torch.optim.Adam([price], lr=1e-2)

    def plan(price, gates):
        columns = [slow_project([(price[t] + gates[t][e]) / mass for t in tokens], k) for e in experts]
        return [[mass * columns[e][t] for e in experts] for t in tokens]

    for _ in range(iterations):
        rows = [sum(row) for row in plan(price.tolist(), [[number(gate) for gate in row] for row in gates])]
        price.grad = torch.tensor(rows, dtype=torch.float64) - mass * len(experts) / len(tokens)
        adam.step()
        if price.grad.norm() <= 1e-3:
            break
    return plan(price, gates)


def slow_queue(line, num_experts, capacity):
    """(expert, token, gate) in this order; a full expert turns away."""
    slots = [[] for _ in range(num_experts)]
    for expert, token, gate in line:
        if capacity is None or len(slots[expert]) < capacity:
            slots[expert].append({token: (1.0, gate)})
    return slots


def budget(router, tokens, times=1):
    o = router.options
    return None if o.capacity_factor is None else math.ceil(times * tokens * o.top_k * o.capacity_factor / router.num_experts)


def slow_choice(router, x, key):
    """Token choice or expert choice by the softmax, a Sinkhorn plan or a sparse plan."""
    o, T, E, K, C = router.options, len(x), router.num_experts, router.options.top_k, budget(router, len(x))
    logits = [[sum(a * b for a, b in zip(token, weight)) for weight in router.gate.weight] for token in x]
    decide = gates = [slow_softmax(row) for row in logits]
    if isinstance(router, routers.Sparse) and router.chooses == "experts":
        decide = slow_sparse(gates, C, T / E, o.iterations)
    elif isinstance(router, routers.Sparse):  # tokens and experts exchanged: a token has mass 1
        decide = list(zip(*slow_sparse(list(zip(*gates)), K, 1.0, o.iterations)))
    elif isinstance(router, routers.Sinkhorn):
        decide = slow_sinkhorn(logits, o.iterations)
    weigh = decide if getattr(o, "combine", "") == "plan" else gates
    if router.chooses == "experts":
        return [[{t: (1.0, weigh[t][e])} for t in best(column, C)] for e, column in enumerate(zip(*decide))]
    bias = router.bias if o.bias_rate else [0] * E
    picks = [best([score + push for score, push in zip(row, bias)], K) for row in decide]
    order = best([max(row) for row in decide]) if o.priority == "gate" else range(T)
    pairs = [(t, k) for t in order for k in range(K)] if o.priority == "token" else [(t, k) for k in range(K) for t in order]
    total = [sum(weigh[t][e] for e in picks[t]) if o.renormalize else 1 for t in range(T)]
    return slow_queue([(picks[t][k], t, weigh[t][picks[t][k]] / total[t]) for t, k in pairs], E, C)


def slow_soft(router, x, key):
    D, E, C = router.phi.shape
    unit = lambda vector: [value / (sum(other**2 for other in vector) + 1e-6).sqrt() for value in vector]
    tokens, directions = [unit(token) for token in x], [unit(router.phi[:, e, c]) for e in range(E) for c in range(C)]
    logits = [[router.scale * sum(a * b for a, b in zip(token, direction)) for direction in directions] for token in tokens]
    over_slots, over_tokens = [slow_softmax(row) for row in logits], [slow_softmax(column) for column in zip(*logits)]
    mixed = [{t: (over_tokens[s][t], over_slots[t][s]) for t in range(len(x))} for s in range(E * C)]
    return [mixed[e * C : (e + 1) * C] for e in range(E)]


def slow_hash(router, x, key):
    K, E = router.options.top_k, router.num_experts
    first = [int(router.table[k]) if k < len(router.table) else k % E for k in key.tolist()]
    return slow_queue([((e + k) % E, t, 1 / K) for t, e in enumerate(first) for k in range(K)], E, budget(router, len(x)))


def slow_threshold(router, x, key):
    gates, E = [slow_softmax(row) for row in x @ router.gate.weight.T], router.num_experts
    line = [(e, t, gates[t][e]) for t in range(len(x)) for e in range(E) if gates[t][e] >= router.threshold[e]]
    return slow_queue(line, E, budget(router, len(x), times=2))


SLOW = {"soft": slow_soft, "hash": slow_hash, "expert_threshold": slow_threshold} | {
    f"{scores}{who}_choice": slow_choice for scores in ("", "sinkhorn_", "sparse_") for who in ("token", "expert")}


def slow_expert(experts, e, z):
    return F.gelu(z @ experts.w1[e] + experts.b1[e, 0]) @ experts.w2[e] + experts.b2[e, 0]


SIZES = [(7, 3, dict(top_k=2, capacity_factor=1.0)), (6, 4, dict(top_k=2, capacity_factor=0.5, renormalize=True, bias_rate=0.1)),
         (5, 3, dict(capacity_factor=2.0)), (3, 5, dict(capacity_factor=1.0)), (4, 3, dict(top_k=3, capacity_factor=0.5)),
         (3, 1, dict(capacity_factor=1.0)), (5, 4, dict(top_k=2, capacity_factor=None))]  # T, E, and what is bought
CASES = [pytest.param(*case.values, T, E, id=f"T={T} E={E} {case.id}") for T, E, size in SIZES
         for case in settings(SLOW, **{option: [value] for option, value in size.items()}, num_keys=[8],
                              priority=["token", "choice", "gate"], combine=["softmax", "plan"])]


@pytest.mark.parametrize("name, options, T, E", CASES)
def test_tensors_and_layer_equal_plain_loops_in_values_and_gradients(name, options, T, E):
    x, key = draw(2, T, 4, seed=T).requires_grad_(), torch.tensor([[(5 * t + g) % 11 for t in range(T)] for g in range(2)])
    moe = layer(name, x, E, **options)
    for buffer in moe.router.buffers():
        if buffer.is_floating_point():  # a bias, a threshold
            buffer -= draw(E, seed=2).abs() / 20
    y, routing = moe(x, key)
    got = torch.stack(routing.tensors())
    want, slow_y = torch.zeros_like(got), torch.zeros_like(x)
    for g in range(2):  # the two sums of routers.py's first lines, one slot after the other
        slots = SLOW[name](moe.router, x[g], key[g])
        for e, c, slot in ((e, c, slot) for e in range(E) for c, slot in enumerate(slots[e])):
            out = slow_expert(moe.experts, e, sum(weight * x[g, t] for t, (weight, _) in slot.items()))
            for t, weights in slot.items():
                want[0, g, t, e, c], want[1, g, t, e, c] = map(number, weights)
                slow_y[g, t] = slow_y[g, t] + weights[1] * out
    if E == 1:  # every plan is 1 but for rounding, so the order of its slots means nothing
        got, want = got.sum(-1), want.sum(-1)
    alike(draw(2, T, 4, seed=1), [x, *moe.parameters()], [got, y], [want, slow_y], 1e-10 if "iterations" in ROUTERS[name].defaults else 1e-12)


# ---------------------------------------------------------------- numbers that published code gives
# By google-research/vmoe, commit 942a78bc81d2e63199f0933733582ddae0715416, on random tokens: logits row by row, the token in each
# slot (T where empty), the combine weight of each slot. All but the tokens are times 10^4 and rounded: weights are held to 1e-4.
PUBLISHED = [
    ("token_choice", dict(top_k=2, priority="choice"), 3,
     "-28312 -24384 -38756 21952 25999 -8012 -1628 -14074 -22263 -2320 -29752 -7233 19031 12912 -3443 -11453 -2021 -7223 7238 12196 23126 691 5291 "
     "2808 -10714 5559 -3358 17090 -9737 -22985",
     "2 3 4 9 0 1 10  0 1 5 7 8 2 4  6 3 5 7 8 10 10",
     "7067 5966 6068 9203 3530 3923 0 5228 5880 5041 4147 6225 2036 3291 6496 3650 2996 3235 2552 0 0"),
    ("sinkhorn_token_choice", dict(priority="gate", combine="plan"), 4,
     "-23408 24252 -6480 -23535 -21379 23761 -3857 -26140 37206 -21563 11654 -1332 -21758 5534 -22058 1253 10054 -9283 -4385 10015 13030 -2706 "
     "-14617 -7337 9816 -9347 5125 2271 -21540 20461 -18652 -23131 12765 541 13036 -13207 36275 -10346 -226 -3439 15011 1634 3138 -4554 4276 -3390 "
     "-834 -2276 -21219 -4661 3338 16562 -7452 -16823 -5168 -594 -19691 -16078 -16462 -12242 12059 12814 -2869 -4777",
     "9 2 5 10  7 0 1 15  8 6 11 16  12 4 3 13", "8766 7678 5680 3830 9073 8607 8269 3489 6815 4535 3990 0 7224 5751 5545 4878"),
    ("expert_choice", dict(capacity_factor=2), 3,
     "-21 14883 -8791 5494 -10009 -9856 -8274 -17701 -44 -15632 -513 -2047 -11514 21622 -46325 -6418 -21878 -5759 14570 8800 47513 -5063 -4604 "
     "17616 7713 1483 49262 7821 14683 23416",
     "1 5 2 0 9 3 7  4 0 3 9 1 2 5  8 6 7 2 9 5 3",
     "7005 4384 2727 1708 1292 1061 854 9639 7582 4812 2565 1486 1062 934 9765 9452 8251 6210 6143 4682 4127"),
    ("sinkhorn_expert_choice", dict(capacity_factor=1.5, combine="plan"), 6,
     "4235 -5562 -4791 -7985 -11625 -5974 9375 -4499 -1620 -597 -2569 25047 -34334 -1986 12839 8607 -26213 -36388 -16493 10625 11101 3259 -10830 "
     "-10283 -16631 13514 -7697 27716 -3106 -17209 4373 15264 2355 9973 13413 -48 16769 -279 -6148 2859 8853 -6147 -24215 17583 1922 11283 -14612 "
     "-2693 175 2303 -13176 11886 5626 18327 16705 19254 13918 682 22914 20674 13407 -8573 8652 4857 3460 18196 5524 -3656 -6853 8225 6946 22716 "
     "9324 -1280 3057 -656 7545 -2341 -535 4357 -13860 14739 1669 -5394 20537 -2694 -18684 4320 13454 1543 27566 12333 204 4596 45976 24386 -22679 "
     "7888 5373 -4618 -38466 -3622 10643 7452 -10024 25676 11638 49881 9677 -5829 7256 -12568 -900 -15618 -3777 619 14483 -668 -13302 -15742 12562 "
     "1281 -1343 10977 29513 16655 22954 -5385 -3956 2775 33430 8873 -14192 7127 -7516 -39 4018 -23907 -568 -7715 5547 8776 -437 9172",
     "14 6 0 18 12 21  7 22 16 3 5 9  19 2 3 18 16 23  4 13 2 23 8 7  15 21 20 9 22 14  17 1 11 8 10 23",
     "5485 5014 3817 3811 3049 2681 5552 4316 4265 3621 3533 2340 6233 5753 4113 3618 3592 2488 7197 4819 2895 2640 2554 2460 7186 6094 5469 2410 "
     "2259 2154 8454 6163 5186 3974 3233 2245"),
    ("sparse_expert_choice", {}, 4,
     "11767 47080 -27053 6555 1284 17077 6318 11375 23750 23625 14110 7660 -18965 11897 -10305 -6586 -8061 -20773 17910 8567 12880 24720 971 4993 "
     "9898 -4420 -4332 12064 -9185 13158 -11007 -2765 17164 32699 -9699 -17377 3719 -34600 14043 20230 -5276 -8338 5885 -5671 2768 -315 -459 -1078 "
     "-5524 -13278 -14958 -3686 6039 46554 -46303 8637 -1831 -3006 -9401 -14582 1709 -16804 9322 2811",
     "5 14 2 11  3 7 13 8  4 10 15 7  9 12 6 7", "1990 3791 3893 3185 7623 7144 9615 8113 6719 5309 4850 637 5765 3938 4563 1453"),
]


def numbers(text):
    return torch.tensor([int(word) for word in text.split()], dtype=torch.float64) / 1e4


@pytest.mark.parametrize("name, options, E, logits, index, gates", PUBLISHED)
def test_a_router_gives_the_published_slots_and_weights(name, options, E, logits, index, gates):
    routing = plain(name, E, **options)(numbers(logits).view(1, -1, E))
    assert routing.index.flatten().tolist() == [int(word) for word in index.split()]
    same(routing.gate.flatten(), numbers(gates), 1e-4)


def test_soft_gives_the_published_weights():
    # The published logits are 16 x 4 cosines, at scale 1. Unit tokens with half of each as coordinates give them at scale 2 to axes.
    cosines = numbers(
        "3289 -2216 3311 3822 6089 1670 -2163 4820 1600 -1018 371 3643 497 3579 -1216 1386 3279 1515 -3891 -2401 -5124 -116 "
        "-2980 -2289 -4987 534 439 -871 -208 738 854 1959 -832 -890 -3063 4989 -3740 5310 -8289 447 -3893 -3118 2855 2753 -231 552 2137 "
        "2227 5312 2836 -269 3441 -1674 -3457 -2158 6827 -3177 567 2545 -3196 -1790 -3297 -1289 2168").view(16, 4)
    router = build_router("soft", 5, 4, slots=1).double()
    router.load_state_dict({"phi": torch.eye(5)[:, :4, None], "scale": torch.tensor(2 * (1 + 1e-6), dtype=torch.float64)})
    x = torch.cat([cosines / 2, (1 - (cosines / 2).square().sum(1, keepdim=True)).sqrt()], 1)
    dispatch, combine = router(x[None]).tensors()
    same(dispatch[0, [0, 4, 15], :, 0].flatten(), numbers("847 476 906 733 846 692 441 393 510 428 572 621"), 1e-4)
    same(combine[0, [0, 4, 15], :, 0].flatten(), numbers("2752 1587 2758 2903 3456 2897 1688 1959 2274 1956 2391 3378"), 1e-4)


# ---------------------------------------------------------------- properties of every router
@each(HARD, top_k=[1, 2], capacity_factor=[0.25, 1.0, 4.0, None], priority=["token", "choice", "gate"])
def test_a_hard_routing_seats_one_token_a_slot_drops_to_exactly_zero_and_equals_its_tensor_form(name, options):
    x, K, bought = draw(3, 13, 6).requires_grad_(), options["top_k"], options["capacity_factor"]
    moe = layer(name, x, 4, **options)
    y, routing = moe(x)
    (dispatch, combine), counts = routing.tensors(), routing.counts()
    assert set(dispatch.unique().tolist()) <= {0.0, 1.0} and dispatch.sum(1).max() == 1 and dispatch.sum(3).max() == 1
    assert torch.equal(combine != 0, dispatch == 1)
    assert counts.max() <= (K if name in TOKENS_CHOOSE else 4)
    if bought in (4.0, None) and ROUTERS[name].chooses != "threshold":  # room for every token
        assert bool((counts == (K if name in TOKENS_CHOOSE else 4)).all())
    if bought == 0.25 and K == 1:
        assert (counts == 0).any(1).all()
    assert not y[counts == 0].any() and y[counts > 0].abs().sum(-1).min() > 0
    tensors = Routing(*moe.router(x).tensors(), routing.load)
    want, used = moe(x, routing=tensors)
    alike(draw(3, 13, 6, seed=1), [x, *moe.parameters()], [routing.dispatch(x), routing.mass(), y], [tensors.dispatch(x), tensors.mass(), want])
    assert used is tensors and torch.equal(counts, tensors.counts())


@pytest.mark.parametrize("T, E, K, factor, tokens, experts, threshold, soft", [  # C of each kind, by hand
    (10, 3, 2, 1.0, 7, 7, 10, 7), (10, 3, 1, 1.0, 4, 4, 7, 3), (4, 8, 1, 1.0, 1, 1, 1, 1), (5, 2, 2, 2.0, 10, 5, 5, 10),
    (12, 4, 1, 1.05, 4, 4, 7, 3), (12, 4, 1, 0.5, 2, 2, 3, 2)])
@pytest.mark.parametrize("name", ROUTERS)
def test_slots_are_bought_from_one_budget(name, T, E, K, factor, tokens, experts, threshold, soft):
    x, C = draw(1, T, 8), dict(tokens=tokens, experts=experts, threshold=threshold, soft=soft)[ROUTERS[name].chooses]
    router = layer(name, x, E, top_k=K, capacity_factor=factor).router
    assert router(x).tensors()[0].shape == router.eval()(x).tensors()[0].shape == (1, T, E, C)
    same(router(x).load.double().sum(), 1.0, 1e-6)


@each(LEARNED, combine=["softmax", "plan"])
def test_permuted_experts_give_the_same_output(name, options):
    x, order = draw(2, 14, 8), torch.tensor([3, 0, 4, 1, 2])
    moe = layer(name, x, 5, **options)  # no other axis is 5 long
    want, _ = moe(x)
    for tensor in moe.state_dict().values():
        if 5 in tensor.shape:
            tensor.copy_(tensor.index_select(tensor.shape.index(5), order))
    same(moe(x)[0], want)


@each([name for name in NOISY if name in SLOW], noise_std=[0.5], top_k=[2], combine=["softmax", "plan"])
def test_noise_is_normal_of_deviation_noise_std_over_e_in_training_alone_and_enters_choices_and_load_loss(name, options):
    x, router = draw(2, 16, 4), plain(name, 4, **options)
    torch.manual_seed(3)
    noisy = x + torch.randn_like(x) * 0.5 / 4
    torch.manual_seed(3)
    routing = router(x)
    dispatch, combine = router.eval()(noisy).tensors()
    if name == "sinkhorn_token_choice" and options["combine"] == "softmax":  # published so: the clean softmax weighs
        combine = dispatch * x.softmax(-1)[..., None]
    same(routing.logits, x)
    same(torch.stack(routing.tensors()), torch.stack([dispatch, combine]))
    want = {"z": z_loss(x)}
    if name in TOKENS_CHOOSE:
        want |= {"importance": importance_loss(x), "balance": balance_loss(x, routing.expert_index)}
        assert router(x).losses.keys() == want.keys()  # no noise, no load loss
        want["load"] = load_loss(x, noisy, 2, 0.5 / 4)
    same(routing.losses, want)


@each(top_k=[2], combine=["plan"], capacity_factor=[1.0, None])
def test_autocast_leaves_logits_and_choices_in_float32(name, options):
    x = draw(2, 16, 8).bfloat16()
    moe = layer(name, x.double(), 4, **options).float()
    want, reference = moe(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
        same(moe(x.float())[0], y, 0)  # the experts work in bfloat16, whatever comes in
    said = lambda routing: (*routing.tensors(), routing.logits if name in WEIGHED else routing.load)
    same(said(routing), said(reference), 0)
    assert {tensor.dtype for tensor in said(routing)} == {torch.float32}
    same(y.float(), want, 0.02)


@each(top_k=[2], capacity_factor=[1.0, None], iterations=[2])
def test_a_fresh_layer_compiles_into_one_graph(name, options):
    torch._dynamo.reset()
    x, moe = draw(2, 8, 6).requires_grad_(), MoE(build_router(name, 6, 4, **options), hidden=7).double()
    y, routing = torch.compile(moe, fullgraph=True, backend="eager")(x)
    alike(torch.ones(2, 8, 6), [x, *moe.parameters()], [y], [moe(x)[0]])
    if options["capacity_factor"] is None:
        assert routing.tensors()[0].shape == (2, 8, 4, 8)  # the longest queue is unknown: every token


def test_importing_routers_changes_and_prints_nothing(capsys):
    state = lambda: (torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads(),
                     torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    before = state()
    runpy.run_path(routers.__file__)
    assert state() == before and capsys.readouterr() == ("", "")


def test_equal_scores_go_to_the_lower_index():
    x = torch.zeros(1, 70, 40, dtype=torch.float64)  # long enough for an unstable sort to show
    assert top(x, 40, 1)[0, :, 7].tolist() == list(range(40))
    assert plain("token_choice", 40, top_k=40)(x).expert_index[0, 5].tolist() == list(range(40))
    assert plain("token_choice", 40, capacity_factor=20, priority="gate")(x).index[0, 0].tolist() == list(range(35))
    assert plain("expert_choice", 40, capacity_factor=20)(x).index[0, 9].tolist() == list(range(35))


def test_a_queue_passes_before_the_experts():
    wants = torch.tensor([[[1, 0], [1, 1], [0, 0], [1, 1], [1, 0]]])  # expert 0 is wanted by 0, 1, 3, 4; expert 1 by 1, 3
    assert queue(wants, 3).tolist() == [[[0, 1, 3], [1, 3, 5]]]
    assert queue(wants, None).tolist() == [[[0, 1, 3, 4], [1, 3, 5, 5]]]
    assert queue(wants[:, 2:3], None).tolist() == [[[1], [1]]]  # nobody wants anything: one empty slot


# ---------------------------------------------------------------- who leaks the future, or into other groups
@each(top_k=[1, 2], capacity_factor=[0.5, 1.0, 2.0, None], priority=["token", "choice", "gate"], combine=["softmax", "plan"])
def test_groups_are_apart_and_what_is_called_causal_leaks_nothing_and_what_is_not_does(name, options):
    causal, K, bought = build_router(name, 6, 4, **options).causal, options["top_k"], options["capacity_factor"]
    if name in SLOW:
        limited = {(1, "token"), (2, "token"), (1, "choice")}  # else a first choice, or a surer token, comes from behind
        assert causal is (name in ("hash", "expert_threshold") or name == "token_choice" and (
            bought is None or (K, options["priority"]) in limited))
    for seed in range(2):  # 60 groups, 60 draws: how far do EARLIER outputs and masses move with the last token and key?
        x, key = draw(80, 16, 6, seed=seed), torch.randint(100, (80, 16), generator=seeded(seed))
        moe = layer(name, x, 4, seed, **options)
        before, then = moe(x, key)
        x[:60, -1], key[:60, -1] = 2 * draw(60, 6, seed=seed + 100), key[:60, -1] + 1
        after, now = moe(x, key)
        same(after[60:], before[60:])
        apart = max((after - before)[:60, :-1].abs().max(), (now.mass() - then.mass())[:60, :-1].abs().max())
        if causal:
            assert apart <= 1e-12
        elif bought in (1.0, None):  # where everyone has room, little is left to leak
            assert apart > 1e-6
        if causal and bought is None:
            same(moe(x[:, :7], key[:, :7])[0], after[:, :7])


# ---------------------------------------------------------------- learning signals
@each(LEARNED, combine=["softmax", "plan"], gate=["linear", "mlp"])
def test_the_task_loss_alone_moves_every_learned_router_at_top_1(name, options):
    if name == "sparse_token_choice" and options.get("combine") == "plan":
        options = options | dict(top_k=2)  # a lone choice holds all of its token's mass: a constant gate
    x = draw(4, 16, 6)
    moe = layer(name, x, 4, **options)
    for gradient in torch.autograd.grad(moe(x)[0].square().sum(), list(moe.router.parameters())):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-6


def test_losses_equal_values_worked_out_by_hand():
    gates = torch.tensor([[[.8, .2], [.6, .4]], [[.9, .1], [.1, .9]]], dtype=torch.float64)
    # Group 0: f = (1, 0), P = (.7, .3), so 2 * .7 = 1.4. Group 1: f = P = (.5, .5), so 1. Mean 1.2.
    same(balance_loss(gates.log(), gates.argmax(-1, keepdim=True)), 1.2)
    for E, K in (4, 1), (4, 2), (6, 3), (5, 5):  # 1 when uniform, E/K at collapse
        logits = torch.zeros(2, 30, E, dtype=torch.float64)
        same(balance_loss(logits, ((torch.arange(30)[:, None] + torch.arange(K)) % E).expand(2, 30, K)), 1.0)
        logits[..., :K] = 500
        same(balance_loss(logits, torch.arange(K).expand(2, 30, K)), E / K)
    # Group 0: sums (1.4, .6), mean 1, variance .16. Group 1: even. Mean .08.
    same(importance_loss(gates.log()), .08)
    # Rows sum to 1, and in group 1 we add 2 to the logits: logsumexp 0 and 2, squared 0 and 4.
    same(z_loss(gates.log() + torch.tensor([0, 2])[:, None, None]), 2.0)
    single = draw(2, 5, 1).requires_grad_()
    assert torch.autograd.grad(importance_loss(single), single)[0].eq(0).all()  # of one expert: even, not NaN


def test_load_loss_equals_a_loop_over_tokens_and_experts_in_values_and_gradients():
    clean, want = draw(2, 7, 4).requires_grad_(), 0
    noisy = clean + 0.3 * draw(2, 7, 4, seed=1)
    for g in range(2):
        threshold = [noisy[g, t, best(noisy[g, t], 2)[-1]] for t in range(7)]
        chance = [sum((1 + ((clean[g, t, e] - threshold[t]) / 0.3 / math.sqrt(2)).erf()) / 2 / 7 for t in range(7)) for e in range(4)]
        mean = sum(chance) / 4
        want += sum((value - mean) ** 2 for value in chance) / 4 / mean**2 / 2
    alike(1, [clean], [load_loss(clean, noisy, 2, 0.3)], [want])


LOSSES = {"importance": importance_loss, "balance": lambda logits: balance_loss(logits, top(logits, 2, -1)), "z": z_loss,
          "load": lambda logits: load_loss(logits, logits + 0.1 * draw(*logits.shape[1:], seed=9), 2, 0.1)}


@pytest.mark.parametrize("name", ["importance", "balance", "load"])
def test_a_balance_loss_pushes_the_overloaded_expert_down_and_opposite_skews_do_not_cancel(name):
    skew = torch.tensor([2.0, 0, 0, -2], dtype=torch.float64)
    logits = (draw(1, 40, 4) + skew).requires_grad_()
    push = torch.autograd.grad(LOSSES[name](logits), logits)[0].sum((0, 1))
    assert push.argmax() == 0 and push[0] > 0.1
    one, other, even = LOSSES[name](logits), LOSSES[name](logits - 2 * skew), LOSSES[name](logits - skew)
    assert one + other > 2.6 * even  # two layers
    same(LOSSES[name](torch.cat([logits, logits - 2 * skew])), (one + other) / 2)  # two groups


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_finite_at_huge_logits(name):
    for logits in draw(2, 9, 4).sign(), torch.eye(4).double().repeat(2, 2, 1), torch.tensor([[[-1.0] * 4] * 5]).double():
        logits = (1e3 * logits).requires_grad_()
        loss = LOSSES[name](logits)
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


# ---------------------------------------------------------------- solvers
@pytest.mark.parametrize("T, E, scale", [(16, 4, 1), (17, 4, 1), (16, 8, 1), (64, 8, 1), (200, 16, 1), (16, 4, 1e3)])
def test_sinkhorn_rows_are_exact_and_columns_balanced_after_20_iterations_and_huge_logits_finite(T, E, scale):
    logits = (scale * draw(20, T, E)).requires_grad_()
    plan = sinkhorn_plan(logits)
    same(plan.sum(2), torch.ones(20, T, dtype=torch.float64), 1e-12 * scale)
    assert torch.autograd.grad(plan.square().sum(), logits)[0].isfinite().all()
    if scale == 1:
        same(plan.sum(1) * E / T, torch.ones(20, E, dtype=torch.float64), 1e-3)


def test_a_projection_keeps_the_k_largest_and_sums_to_1():
    z = torch.tensor([.5, .1, .9, -1, .3], dtype=torch.float64).view(1, 5, 1)
    # k = 2: .9 and .5 each give up (1.4 - 1) / 2 = .2. k = 3: .3 too, (1.7 - 1) / 3 = .7 / 3. k = 5: .1 has not as much.
    for k, want in (1, [0, 0, 3, 0, 0]), (2, [.9, 0, 2.1, 0, 0]), (3, [.8, 0, 2, 0, .2]), (5, [.8, 0, 2, 0, .2]):
        same(3 * project(z, k).flatten(), want)


def test_the_sparse_solver_reaches_the_best_balanced_assignment():
    gates = draw(8, 6, 3).softmax(-1)
    seats = torch.tensor(sorted(set(itertools.permutations([0, 0, 1, 1, 2, 2]))))  # all 90 of them
    value = gates[:, torch.arange(6), seats].sum(-1).amax(-1) - 6 / 2  # of a 0/1 plan: <P, gates> - |P|^2 / 2
    plan = sparse_plan(gates, 2, iterations=4000)
    # D(a) = <P, gates> - |P|^2 / 2 + a . (rows - 1) for the plan P of the prices a. Inside a column's support P - gates is
    # a less a constant, which a . (rows - 1) does not feel where columns sum to T/E and no two supports meet: D from P alone.
    assert bool(((plan > 0).sum(2) == 1).all())
    price = ((plan - gates) * (plan > 0)).sum(2)
    dual = (plan * gates).sum((1, 2)) - plan.square().sum((1, 2)) / 2 + (price * (plan.sum(2) - 1)).sum(1)
    assert bool((dual >= value - 1e-9).all()) and bool((dual <= value + 1e-5).all())
    same(sparse_plan(gates[:3], 2, iterations=200), plan[:3], 1e-9)  # every group has stopped, and by itself


# ---------------------------------------------------------------- options
WRONG = [  # routers, options beside dim=4 and num_experts=3, what the message says
    (["tokens"], {}, f"unknown router 'tokens'; known: {', '.join(ROUTERS)}"),
    *[([name], {option: 1}, f"router {name} has no option {option}; it has {', '.join(ROUTERS[name].defaults)}") for name, option in [
        ("hash", "noise_std"), ("sparse_token_choice", "noise_std"), ("sparse_expert_choice", "noise_std"), ("expert_choice", "combine")]],
    (["token_choice"], dict(priority="last"), "priority must be one of token, choice, gate, got priority='last'"),
    (["sinkhorn_token_choice"], dict(combine="both"), "combine must be one of softmax, plan, got combine='both'"),
    (["token_choice"], dict(renormalize=True), "renormalize needs top_k >= 2 (the only gate would always be 1), got top_k=1"),
    (["soft"], dict(scale=-1), "scale must be a number >= 0, got scale=-1"),
    (["token_choice"], dict(bias_rate=-1), "bias_rate must be a number >= 0, got bias_rate=-1"),
    (WEIGHED, dict(weights="fixed"), "weights must be one of learned, frozen, random, self, got weights='fixed'"),
    (WEIGHED, dict(gate="cubic"), "gate must be one of linear, mlp, got gate='cubic'"),
    (WEIGHED, dict(weights="self", num_experts=5), "weights='self' needs num_experts <= dim=4, got num_experts=5"),
    (ROUTERS, dict(top_k=4), "top_k must be at most num_experts=3, got top_k=4"),
    *[(names, {option: value}, f"{option} must be a whole number >= 1, got {option}={value}") for names, option, value in [
        (ROUTERS, "num_experts", 0), (ROUTERS, "dim", 0), (ROUTERS, "top_k", 0), (ROUTERS, "top_k", 1.5), (["soft"], "slots", 0),
        (["hash"], "num_keys", 0), (["sparse_expert_choice"], "iterations", 0)]],
    *[(NOISY, dict(noise_std=std), f"noise_std must be a number >= 0, got noise_std={std}") for std in (-1, math.nan)],
    *[(ROUTERS, dict(capacity_factor=factor), f"capacity_factor must be a positive number, got capacity_factor={factor}")
      for factor in (0, -1.0, math.inf, math.nan)],
    (those(lambda kind: kind.chooses != "tokens"), dict(capacity_factor=None), "(dropless) is for routers in which tokens choose"),
]


@pytest.mark.parametrize("name, options, message", [(name, *rest) for names, *rest in WRONG for name in names])
def test_a_wrong_option_is_a_valueerror_that_names_the_rule(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(name, **dict(dim=4, num_experts=3) | options)


@pytest.mark.parametrize("name, shape, key, message", [
    *[(name, shape, None, f"needs tokens [G, T, 4], got {list(shape)}") for name in ROUTERS for shape in ((5, 4), (1, 2, 5, 4), (2, 5, 3))],
    ("hash", (2, 5, 4), torch.arange(5), "key must be [G, T] = [2, 5], got [5]"),
    ("expert_choice", (2, 0, 4), None, "a group needs at least 1 token, got 0")])
def test_tokens_and_keys_of_a_wrong_shape_are_a_valueerror(name, shape, key, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(name, 4, 3)(torch.zeros(shape), key)


# ---------------------------------------------------------------- what a router remembers
@each(weights=["learned", "random"], bias_rate=[0.1])
def test_training_alone_changes_no_buffer_and_a_fresh_layer_takes_over_the_state_of_a_used_one(name, options):
    x = draw(2, 12, 6)
    moe, fresh = layer(name, x, 4, **options), MoE(build_router(name, 6, 4, **options), hidden=7).double()
    before, (y, routing) = {key: tensor.clone() for key, tensor in moe.state_dict().items()}, moe(x)
    y.sum().backward()
    assert [key for key, tensor in moe.state_dict().items() if not torch.equal(tensor, before[key])] == []
    moe.router.update([routing], seeded(0))
    fresh.load_state_dict(moe.state_dict())
    assert torch.equal(fresh(x)[0], moe(x)[0]) and torch.equal(fresh.eval()(x)[0], moe.eval()(x)[0])


@each(WEIGHED, weights=["frozen", "random"], gate=["linear", "mlp"])
def test_a_frozen_router_stands_still_and_a_random_one_is_drawn_anew_by_each_update_for_training_alone(name, options):
    x = draw(2, 12, 6)
    moe = layer(name, x, 4, **options)
    trained, fixed = [], []
    for key in 1, 2, 1, 0:
        trained.append(moe.router.train()(x).logits)
        fixed.append(moe.router.eval()(x).logits)
        y, routing = moe.train()(x)
        y.square().sum().backward()
        torch.optim.SGD(moe.parameters(), 0.1).step()
        moe.router.update([routing], seeded(key))
    assert all(weight.grad is None for weight in moe.router.parameters()) and all(weight.grad.any() for weight in moe.experts.parameters())
    assert all(torch.equal(logits, fixed[0]) for logits in fixed) and torch.equal(trained[1], trained[3])
    assert [torch.equal(*trained[i : i + 2]) for i in (0, 1)] == [options["weights"] == "frozen"] * 2


@pytest.mark.parametrize("name", WEIGHED)
def test_logits_are_the_first_features_for_weights_self_and_pass_a_hidden_layer_for_gate_mlp(name):
    x = draw(2, 12, 6)
    router, mlp = layer(name, x, 4, weights="self").router, layer(name, x, 4, gate="mlp").router
    assert torch.equal(router(x).logits, x[..., :4]) and not list(router.parameters())
    first, second = mlp.parameters()
    same(mlp(x).logits, F.gelu(x @ first.T) @ second.T)


@each(those(lambda kind: "bias_rate" in kind.defaults), bias_rate=[0.1], capacity_factor=[None])
def test_a_bias_follows_the_sign_of_the_mean_load_error_and_only_chooses(name, options):
    x, router = draw(2, 13, 3), plain(name, 3, **options)
    one, other = router(x), router(x * 2 + torch.tensor([1, 0, 0]))
    router.update([one, other])
    step = (1 / 3 - (one.load + other.load) / 2).sign()
    same(router.state_dict()["bias"], 0.1 * (step - step.mean()))  # only differences choose
    router.bias.copy_(torch.tensor([0, 0, 9]))
    routing = router(x)
    assert bool((one.expert_index != 2).any()) and bool((routing.expert_index == 2).all())
    if name in SLOW:
        same(routing.mass()[..., 2], x.softmax(-1)[..., 2])


def test_expert_thresholds_start_at_the_mean_quantile_and_then_run():
    router, x = plain("expert_threshold", 4), [draw(3, 5, 4, seed=seed) for seed in range(3)]
    # The quantile 1 - 1/4 of 5 numbers is the fourth from below. Its mean is over groups, then over routings.
    quantile = [tokens.softmax(-1).sort(1).values[:, 3].mean(0) for tokens in x]
    routings = [router(tokens) for tokens in x]
    same(router.state_dict()["threshold"], [1 / 4] * 4)
    router.update(routings[:2])
    same(router.threshold, (quantile[0] + quantile[1]) / 2)
    router.update(routings[2:])
    same(router.threshold, 0.9 * (quantile[0] + quantile[1]) / 2 + 0.1 * quantile[2], 1e-8)  # that 0.1 is a float32


def test_a_hash_is_balanced_over_each_run_of_keys_and_reads_unknown_keys_and_positions():
    router = build_router("hash", 6, 4, num_keys=10, capacity_factor=None)
    first = lambda *key: router(draw(*key[0].shape, 6), *key).expert_index[..., 0]
    assert first(torch.arange(8).view(2, 4)).sort(1).values.tolist() == [[0, 1, 2, 3]] * 2  # keys 0..3, keys 4..7
    assert len(set(first(torch.tensor([[8, 9]])).flatten().tolist())) == 2
    assert first(torch.tensor([[10, 11, 13, -1]])).tolist() == [[2, 3, 1, 3]]  # not in the table: key mod E
    x = draw(2, 12, 6)
    assert torch.equal(router(x).index, router(x, torch.arange(12).expand(2, 12)).index)
    assert len({tuple(build_router("hash", 6, 4).table[:40].tolist()) for _ in range(3)}) == 3  # a table of its own each


def test_a_seed_is_a_matter_of_its_key_alone():
    keys = [(0, 1, "noise"), (0, 1, "noise"), (0, 2, "noise"), (0, 1, "batch")]
    one, again, step, purpose = (torch.rand(4, generator=seeded(*key)).tolist() for key in keys)
    assert one == again and one != step and one != purpose and step != purpose


def test_experts_start_apart_or_all_like_the_first():
    for apart, like in zip(Experts(4, 3, 5).parameters(), Experts(4, 3, 5, init="identical").parameters()):
        assert not torch.equal(apart[0], apart[1]) and all(torch.equal(like[0], other) for other in like)
    with pytest.raises(ValueError, match="init must be one of independent, identical, got 'zero'"):
        Experts(2, 3, 4, init="zero")


# ---------------------------------------------------------------- train.py and moe_vision.py
SMALL = "--dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --patch 8 --batch-size 8 --steps 3 --log-every 1".split()


def run(*flags):
    return train.main([str(flag) for flag in flags])


def refused(capsys, *flags):
    """What the one line of an error says; status 2, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    said = [line for line in capsys.readouterr().err.strip().splitlines() if "%|" not in line]  # progress bars apart
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("train.py: error: ")
    return said[0]


def built(*flags, small=SMALL):
    """The small run of these flags, not yet trained: args, device, task, data, model, GFLOPs."""
    args = train.parse([*small, *flags])
    train.check(args)
    return args, *train.build(args)


def write_cifar(folder, files=("data_batch_1.bin", "test_batch.bin"), count=40, label=lambda i: i % 10, fine=False):
    """A folder in the CIFAR layout whose pixels are random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
    for file in files:
        rows = [bytes([0] * fine + [label(i)]) + row.tobytes() for i, row in enumerate(pixels)]
        (folder / file).write_bytes(b"".join(rows))
    return pixels


def stored(folder, **flags):
    return moe_vision.load_data(SimpleNamespace(**dict(data=str(folder), few_shot=False, seed=0, batch_size=4, patch=4) | flags), "cpu")


def write_npz(path, **changed):
    x, y = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 4
    np.savez(path, **dict(x_train=x, y_train=y, x_test=x, y_test=y) | changed)
    return path


def test_one_seed_gives_the_same_run_bit_for_bit_eval_repeats_it_and_another_seed_gives_another(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in a, b:
        assert run(*SMALL, "--router", "token_choice", "--out", folder) == 0
    table = capsys.readouterr().out.splitlines()[-1]
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (a, b))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 3, 3] and {"loss", "importance", "load", "blocks"} <= set(lines[0])
    assert [line.get("split") for line in lines[3:]] == ["validation", "test", "test_dropless"]
    assert json.loads((a / "summary.json").read_text())["test"] == {k: v for k, v in lines[4].items() if k not in ("step", "split")}
    assert run("--eval", b) == 0 and capsys.readouterr().out.splitlines()[-1] == table
    first, second = ((data.batch(0)["image"], model.embed.weight) for *_, data, model, _ in (built("--seed", "0"), built("--seed", "1")))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


@pytest.mark.parametrize("flags, rule", [
    ("--router expert", "unknown router 'expert'; known: dense, token_choice"), ("--patch 5", "--patch must divide the image size, got --patch 5"),
    ("--top-k 9", "top_k must be at most num_experts=8, got top_k=9"), ("--router dense --top-k 9", "--top-k must be at most --experts 8, got 9"),
    ("--experts 0", "--experts: must be a whole number >= 1, got 0"), ("--router hash --router-weights frozen", "--router-weights is no option"),
    ("--experts x", "--experts: invalid whole number value: 'x'"), ("--balance switch", "--router expert_choice offers no balance loss; it offers z"),
    ("--capacity-factor 0", "must be a positive number, got 0"), ("--router token_choice --noise-std -1", "must be a number >= 0, got -1"),
    ("--capacity-factor nan", "must be a positive number, got nan"), ("--moe-blocks 4", "--moe-blocks must name blocks from 0 to 3, got [4]"),
    ("--capacity-factor much", "invalid number value: 'much'"), ("--router soft --priority gate", "--priority is no option of --router soft; it has"),
    ("--heads 3", "--heads must divide --dim, got --heads 3 and --dim 64"), ("--eval nowhere", "nowhere is no run: config.json is missing"),
    ("--capacity-factor none", "capacity_factor=None (dropless) is for routers in which tokens choose"), ("--data nowhere", "no such data: nowhere"),
    ("--slots 2", "--slots is no option of --router expert_choice"), ("--router token_choice --renormalize", "renormalize needs top_k >= 2"),
    ("--router dense --capacity-factor 2", "--capacity-factor is no option of --router dense"), ("--steps 0", "must be a whole number >= 1, got 0"),
    ("--router hash --z-loss 1", "offers no z loss"), ("--grad-accum 3", "--grad-accum must divide --batch-size 128, got 3"),
    ("--balance bias", "--balance bias is for routers in which"), ("--moe-blocks a", "--moe-blocks: invalid list such as 1,3 value"),
    ("--steps 1.5", "--steps: invalid whole number value: '1.5'"), ("--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
    ("--group batch --router soft", "--group batch is for hard routers"), ("--head patch --data x", "--head patch is for drawn images"),
    ("--bench --router dense", "--bench times routers: token_choice"), ("--bench --tokens 100", "--group-size must divide --tokens 100, got 256"),
    ("--lr 0", "must be a positive number, got 0"), ("--size huge", "argument --size: invalid choice: 'huge'"),
    ("--lr inf", "must be a positive number, got inf"), ("--warmup 1", "must be a share from 0 up to 1"),
    ("--few-shot", "--few-shot is for stored images"), ("--balance-weight 1", "weighs the losses of --balance vmoe or switch, got --balance none"),
    ("--router token_choice --router-weights self --gate mlp", "weights='self' has no gate to choose, got gate='mlp'"),
    pytest.param("--device cuda", "--device cuda: this machine has none; there is cpu", marks=pytest.mark.skipif("torch.cuda.is_available()"))])
def test_a_wrong_flag_gets_one_line_that_names_the_rule_and_the_value(flags, rule, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rule in refused(capsys, "--steps", 1, *flags.split())
    assert not list(tmp_path.iterdir())


class Bomb:  # what a pickle inside an .npz could do
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("rule, write", [
    ("lacks train.bin; it needs data_batch_*.bin and test_batch.bin, or", lambda here: None),
    ("not a whole number of records of 3073 bytes", lambda here: (write_cifar(here), os.truncate(here / "test_batch.bin", 9999))),
    ("holds 0 bytes", lambda here: (write_cifar(here), os.truncate(here / "data_batch_1.bin", 0))),
    ("has a label 10; labels of this layout are below 10", lambda here: write_cifar(here, label=lambda i: 10 if i == 7 else 1)),
    ("--batch-size 99 is larger than the data: 36 training images", write_cifar),
    *[(rule, lambda here, changed=changed: write_npz(here / "x.npz", **changed)) for rule, changed in [
        ("allow_pickle", dict(y_train=np.array([Bomb()], object))), ("y_train must be 20 whole numbers, got float64", dict(y_train=np.zeros(20))),
        ("x_train must be square uint8 images [N, S, S, 3], got float32", dict(x_train=np.zeros((20, 16, 16, 3), np.float32))),
        ("labels out of range: 0 to 4, but training knows 0 to 3", dict(y_test=np.arange(20) % 5)),
        ("labels out of range: -1", dict(y_train=np.arange(20) % 5 - 1))]],
    ("cannot read", lambda here: os.truncate(write_npz(here / "x.npz"), 9999)),
    ("x.npz lacks x_test, y_test; it needs", lambda here: np.savez(here / "x.npz", x_train=0, y_train=0))])
def test_a_broken_image_file_is_refused_and_a_pickle_never_opened(rule, write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert rule in refused(capsys, *SMALL, "--batch-size", 99, "--data", next(tmp_path.glob("*.npz"), tmp_path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("files, fine", [(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"), False), (("train.bin", "test.bin"), True)])
def test_cifar_files_are_read_whole_and_trained_on(files, fine, tmp_path):
    pixels = write_cifar(tmp_path / "data", files, fine=fine, label=lambda i: i % 7)
    images, labels, classes = moe_vision.read_cifar([tmp_path / "data" / file for file in files[:-1]])
    assert classes == (100 if fine else 10) and len(images) == 40 * (len(files) - 1)
    assert (images[:40].reshape(40, -1) == pixels).all() and (labels[:40] == np.arange(40) % 7).all()
    assert run(*SMALL, "--data", tmp_path / "data", "--out", tmp_path / "run") == 0


def test_stored_images_part_into_training_validation_test_and_the_few_shot_classes(tmp_path):
    write_cifar(tmp_path, count=200)
    data = stored(tmp_path, few_shot=True)
    assert all((labels < 8).all() for _, labels in data.parts.values()) and list(data.few_shot_classes) == [8, 9]
    (_, support), (_, query) = data.probe(0)
    assert support.bincount().tolist() == [10, 10] and len(query) == 80 - 20
    (tmp_path / "test_batch.bin").write_bytes(b"\1" + b"\7" * 3072)
    parts = stored(write_npz(tmp_path / "x.npz", x_test=np.full((5, 16, 16, 3), 9, np.uint8), y_test=np.arange(5) % 4)).parts
    assert (parts["test"][0] == 9).all() and not parts["train"][0].any() and not parts["validation"][0].any()
    with pytest.raises(ValueError, match="a fifth of the classes, at least 2; .* has 4 classes"):
        stored(tmp_path / "x.npz", few_shot=True)
    write_cifar(tmp_path / "few")
    with pytest.raises(ValueError, match="more than 10 images of each held-out class"):
        stored(tmp_path / "few", few_shot=True)
    parts = stored(tmp_path).parts
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 180, "validation": 20, "test": 1}
    assert len(torch.cat([parts["train"][0], parts["validation"][0]]).flatten(1).unique(dim=0)) == 200


def test_an_epoch_of_stored_images_meets_each_once_cropped_or_flipped_on_its_own(tmp_path):
    write_cifar(tmp_path)
    data = stored(tmp_path, batch_size=9)
    data.parts["train"] = data.parts["train"][0], torch.arange(36)  # name each image by its number
    assert torch.cat([data.batch(step)["label"] for step in range(4)]).sort().values.tolist() == list(range(36))
    whole, part = data.batch(2), data.batch(2, part=slice(3, 7))
    assert torch.equal(whole["image"][3:7], part["image"]) and torch.equal(whole["label"][3:7], part["label"])
    for image, label in zip(whole["image"], whole["label"]):
        padded = F.pad(data.parts["train"][0][label], (4,) * 4)
        crops = torch.stack([padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)])
        crops = data.ready(torch.cat([crops, crops.flip(-1)]), torch.zeros(162))["image"]
        assert (crops == image).flatten(1).all(1).any()
    assert not torch.equal(whole["image"], data.ready(*data.parts["train"])["image"][whole["label"]])


def test_the_official_archive_is_fetched_once_checked_and_unpacked_inside_its_folder(tmp_path, capsys, monkeypatch):
    def serve(body, md5=None, length=None):
        """From now on CIFAR-10's address is a server here that answers one request with this archive."""
        def answer():
            with server, server.accept()[0] as connection:
                connection.recv(9999)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % (length or len(body)) + body)

        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-binary.tar.gz"
        monkeypatch.setitem(moe_vision.OFFICIAL, "cifar10", (address, md5 or hashlib.md5(body).hexdigest()))

    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "source", count=20)
    packed, link = io.BytesIO(), tarfile.TarInfo("cifar-10-batches-bin/link.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(tmp_path / "source", "cifar-10-batches-bin")
        for member in tarfile.TarInfo("../../escaped.bin"), tarfile.TarInfo("/absolute.bin"), link:
            tar.addfile(member)
    body = packed.getvalue()
    serve(body, md5="0" * 32)
    assert f"has md5 {hashlib.md5(body).hexdigest()}, not {'0' * 32}: cut short or changed; the download was deleted" in refused(capsys, "--data", "cifar10")
    serve(body[:-100], md5=hashlib.md5(body).hexdigest(), length=len(body))
    assert "cut short or changed; the download was deleted" in refused(capsys, "--data", "cifar10")
    assert not list((tmp_path / "data").iterdir())
    serve(body)
    folder = moe_vision.download("cifar10")
    assert {file.name for file in folder.iterdir()} == {"data_batch_1.bin", "test_batch.bin", "escaped.bin", "absolute.bin"}
    assert {file.name for file in tmp_path.iterdir()} == {"data", "source"} and [f.name for f in (tmp_path / "data").iterdir()] == ["cifar10"]
    serve(b"not fetched again")
    assert moe_vision.download("cifar10") == folder and run(*SMALL, "--data", "cifar10", "--out", "run") == 0


def test_drawn_images_hold_what_their_labels_and_patch_maps_say():
    data = moe_vision.Drawn(SimpleNamespace(seed=0, batch_size=64, patch=4), "cpu")
    batch = data.batch(3)
    assert [list(batch[name].shape) for name in ("image", "label", "kind", "pair")] == [[64, 3, 32, 32], [64], [64, 64], [64, 2]]
    assert [moe_vision.TRAINED[label] for label in batch["label"]] == [tuple(pair) for pair in batch["pair"].tolist()]
    assert not set(moe_vision.TRAINED) & set(moe_vision.HELD_OUT)
    assert [set(part) for part in zip(*moe_vision.TRAINED)] == [set(range(6)), set(range(4))]
    brightness = F.avg_pool2d(batch["image"].mean(1), 4).flatten(1)
    assert brightness[batch["kind"] == 2].mean() > brightness[batch["kind"] == 0].mean() + 1  # the map lies where the shape is
    part = data.batch(3, part=slice(10, 20))
    assert all(torch.equal(part[name], batch[name][10:20]) for name in batch) and not torch.equal(batch["image"], data.batch(4)["image"])
    number = torch.tensor([[0.5] * 6 + [0.0] * 3 + [1.0] * 3])  # black ground, white shape
    drawn = data.render(torch.tensor([[list(moe_vision.SHAPES).index("disc"), 0]]), torch.tensor([0]), number, torch.zeros(1, 1, 32, 32))
    shape = (drawn["image"][0, 0] > -2).view(8, 4, 8, 4).float().mean((1, 3)).flatten()  # share of a patch; black is (0 - 0.5) * 4
    assert torch.equal(drawn["kind"][0], (shape > 0).long() + (shape == 1).long()) and set(drawn["kind"].flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("router", ["dense", "expert_choice", "soft"])
def test_gflops_are_the_forward_products_of_one_image_and_active_parameters_those_a_token_meets(router):
    *_, model, gflops = built("--router", router, "--top-k", "3")
    D, H, T, E, K, out = 16, 32, 16, 4, 3, 18
    block = T * D * 3 * D + 2 * T * T * D + T * D * D  # qkv, the two attention products, the projection
    mixing = {"dense": 0, "expert_choice": T * D * E, "soft": 3 * T * D * K * T}[router]  # gate; phi, dispatch and combine
    products = T * 3 * 64 * D + 2 * block + T * 2 * D * H + K * T * 2 * D * H + mixing + D * out
    assert gflops == pytest.approx(2 * products / 1e9, rel=1e-9)
    total, active = train.parameters(model)
    assert total - active == (0 if router == "dense" else (E - K) * (2 * D * H + D + H))
    if router == "soft":  # --slots decides where it is given: 4 slots of an expert for 16 tokens are a quarter of its work
        total, active = train.parameters(built("--router", "soft", "--top-k", "3", "--slots", "4")[4])
        assert total - active == (E - 1) * (2 * D * H + D + H)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "expert_threshold"])
@pytest.mark.parametrize("top_k", ["1", "2"])
@pytest.mark.parametrize("task", ["vision", "tokens"])
def test_every_router_pays_what_the_dense_model_of_its_active_experts_pays(task, top_k, router, shelf):
    def cost(*flags):
        words = ["--data", str(shelf), "--context", "32", "--batch-size", "4", "--allow-leak"] if task == "tokens" else []
        args = train.parse(["--task", task, "--top-k", top_k, *words, *flags])
        train.check(args)
        return train.build(args)[-1]

    T, D, E, blocks = (64, 64, 8, 2) if task == "vision" else (32, 128, 8, 4)
    mixing = 6 * blocks * T * D * T * int(top_k) / 1e9 if router == "soft" else 0  # logits, dispatch, combine: T*K slots by T tokens
    assert cost("--router", router) == pytest.approx(cost("--router", "dense") + mixing, rel=0.03)


def test_patches_are_told_apart_by_kind_and_shape():
    args, _, _, data, model, _ = built("--head", "patch", "--router", "dense")
    batch = data.batch(0)
    shape, kind = batch["pair"][:, 0], batch["kind"]
    truth = torch.stack([torch.where(kind[i] == 0, 0, 1 + 2 * shape[i] + kind[i] - 1) for i in range(len(kind))])
    perfect = lambda image: (10.0 * F.one_hot(truth, 13).float(), {})
    value, counts, _ = moe_vision.loss(perfect, batch)
    present = len(truth.unique())
    assert value < 1e-2 and moe_vision.metrics(counts | {"loss": value})["miou"] == pytest.approx(100 * present / 13)
    ground, counts, _ = moe_vision.loss(lambda image: (F.one_hot(torch.zeros_like(truth), 13).float(), {}), batch)
    assert moe_vision.metrics(counts | {"loss": ground})["miou"] == pytest.approx(100 * (truth == 0).double().mean().item() / 13)
    assert model(batch["image"])[0].shape == (*truth.shape, 13)


def test_a_batch_is_one_group_if_so_asked():
    for router in "token_choice", "expert_choice":
        args, _, _, data, model, _ = built("--router", router, "--group", "batch")
        (routing,) = model(data.batch(0)["image"])[1].values()
        assert list(routing.mass().shape) == [1, 8 * 16, 4]
        _, joints = train.specialisation(args, moe_vision, model, data, torch.device("cpu"))
        whole = sum(float(joint.sum()) for joint, _ in joints[1].values()) / len(joints[1])
        assert all(float(joint.sum()) == pytest.approx(whole, rel=1e-4) for joint, _ in joints[1].values())


def test_statistics_of_a_routing_worked_out_by_hand():
    entropy = train.statistics({0: Routing(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), torch.tensor([1.0, 0]), logits=torch.tensor([[[0.0, math.log(3)]]]))})[0]
    assert entropy["dead"] == 1 and entropy["entropy"] == pytest.approx(0.811278, abs=1e-5)
    routing = routers.HardRouting(torch.tensor([[[0, 1], [0, 4]]]), torch.ones(1, 2, 2), 4, torch.tensor([0.75, 0.25]))  # tokens 2, 3 dropped
    assert train.statistics({1: routing}) == {1: {"load": 1.5, "dead": 0, "dropped": 0.5, "slots_per_token": 0.75}}


def test_a_dropless_layer_computes_no_empty_slots_however_unbalanced():
    moe, x = MoE(build_router("token_choice", 8, 4, capacity_factor=None), 16), torch.randn(2, 32, 8)
    with torch.no_grad():
        moe.router.gate.weight[0] += 9 * x.mean((0, 1))
    with train.FlopCounterMode(display=False) as counter:
        moe(x)
    assert counter.get_total_flops() == 2 * 64 * (8 * 4 + 2 * 8 * 16)  # the gate, and one expert a token


def test_a_router_option_named_like_another_flag_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(train.OPTIONS, "temperature", 1.0)
    assert "router option temperature has the name of another flag" in refused(capsys, "--task", "tokens", "--router", "token_choice")


def test_a_compiled_run_tells_its_first_step_apart_from_the_others(tmp_path, monkeypatch):
    compiled, whole = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: whole.append(fullgraph) or compiled(module, fullgraph=fullgraph, backend="eager"))
    assert run(*SMALL, "--compile", "--router", "expert_choice", "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    left, flags = summary["seconds"] - summary["first_step_seconds"], train.read_flags(tmp_path / "run")
    assert whole == [True] and 0 < left < summary["first_step_seconds"]
    assert summary["images_per_second"] == pytest.approx(flags["batch_size"] * (flags["steps"] - 1) / left)


def test_a_bench_times_a_layer_against_its_bounds(capsys, tmp_path):
    assert run("--bench", "--router", "token_choice", "--dim", 8, "--hidden", 16, "--tokens", 512, "--repeats", 1, "--out", tmp_path / "b.json") == 0
    assert "| token_choice |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "b.json").read_text())
    assert set(row["ms"]) == {"layer", "dense", "bare experts", "tensor form", "matmul"} and all(ms > 0 for ms in row["ms"].values())


def test_no_decay_on_norms_biases_positions_and_routers():
    args, device, _, _, model, _ = built("--router", "token_choice")
    decayed, free = (group["params"] for group in train.make_optimizer(args, model, device).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = [any(word in names[id(p)] for word in ("norm", "bias", "position", "router", ".b1", ".b2")) for p in [*decayed, *free]]
    assert spared == [False] * len(decayed) + [True] * len(free) and len(spared) == len(names)


def test_a_batch_in_parts_takes_the_step_of_the_whole_batch_and_the_balance_weight_reaches_its_gradient():
    moved = []
    for parts, weight in ("1", "0.5"), ("4", "0.5"), ("1", "0"):
        args, device, task, data, model, _ = built("--router", "token_choice", "--noise-std", "0", "--balance", "switch",
                                                   "--grad-accum", parts, "--balance-weight", weight)
        model, optimizer, batch = model.double(), train.make_optimizer(args, model, device), data.batch
        data.batch = lambda step, part: {k: v.double() if v.is_floating_point() else v for k, v in batch(step, part=part).items()}
        logged, *_ = train.train_step(args, task, model, optimizer, data, 0, device)
        moved.append((nn.utils.parameters_to_vector(model.parameters()), [float(logged[n]) for n in ("loss", "balance", "top1", "grad_norm")]))
    (whole, said), (parted, said_in_parts), (_, unweighted) = moved
    assert said == pytest.approx(said_in_parts, rel=1e-9) and torch.allclose(whole, parted, atol=1e-7)
    assert said[:3] == unweighted[:3] and abs(said[3] - unweighted[3]) > 1e-4


def test_an_evaluation_tells_the_load_of_the_whole_split_and_float64_draws_the_same_images(monkeypatch):
    args, device, task, data, model, _ = built("--router", "token_choice", "--noise-std", "0")
    batches = [{name: value[8 * i : 8 * i + 8] for name, value in data.draw(64, data.classes, "x").items()} for i in range(8)]
    monkeypatch.setattr(data, "split", lambda name: iter(batches))
    load = {block: sum(model(batch["image"])[1][block].load for batch in batches) / 8 for block in (1,)}
    told = train.evaluate(args, task, model, data, "test", device)["blocks"]
    assert {block: of["load"] for block, of in told.items()} == pytest.approx({block: float(of.max() * 4) for block, of in load.items()})
    single, double = data.batch(0)["image"], built("--dtype", "float64")[3].batch(0)["image"]
    torch.set_default_dtype(torch.float32)
    assert double.dtype == torch.float64 and torch.allclose(single.double(), double, atol=1e-4)


def test_hash_routes_by_the_place_in_the_image_also_where_a_batch_is_one_group(tmp_path):
    *_, data, model, _ = built("--router", "hash")
    together = built("--router", "hash", "--group", "batch")[4]
    together.load_state_dict(model.state_dict())
    image = data.batch(0)["image"]
    assert torch.allclose(model(image)[0], together(image)[0], atol=1e-5)
    assert run(*SMALL, "--patch", 4, "--data", write_npz(tmp_path / "x.npz", x_train=np.zeros((20, 28, 28, 3), np.uint8), x_test=np.zeros((20, 28, 28, 3), np.uint8)),
               "--out", tmp_path / "run") == 0 and (tmp_path / "run/patches.svg").exists()  # images of any size are shown


def test_the_ridge_probe_picks_its_penalty_by_leaving_one_out():
    x, z, rule = draw(24, 20), draw(200, 20, seed=1), draw(20, 3, seed=2)  # few and noisy: without leverages it would be 0.365
    y, truth = (x @ rule + draw(24, 3, seed=99)).argmax(1), (z @ rule).argmax(1)
    mean, std = x.mean(0), x.std(0) + 1e-5
    a, b = (torch.cat([(f - mean) / std, torch.full((len(f), 1), 100.0)], 1) for f in (x, z))
    targets = F.one_hot(y).double() * 2 - 1
    solve = lambda rows, penalty: torch.linalg.solve(a[rows].T @ a[rows] + penalty * torch.eye(21), a[rows].T @ targets[rows])
    error = lambda penalty: sum(((a[i] @ solve([j for j in range(24) if j != i], penalty) - targets[i]) ** 2).sum() for i in range(24))
    best = min((2.0**i for i in range(-10, 20)), key=error)
    expected = ((b @ solve(list(range(24)), best)).argmax(1) == truth).double().mean().item()
    assert moe_vision.ridge_accuracy((x, y), (z, truth)) == pytest.approx(expected) and 0.5 < expected < 1


# ---------------------------------------------------------------- moe_tokens.py
WORDS = "--task tokens --dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --context 16 --batch-size 4 --steps 3 --log-every 1 --vocab-size 320".split()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of three topics, forty documents each, whose words tell the topic; and one document of a fourth."""
    folder, g = tmp_path_factory.mktemp("shelf"), random.Random(0)
    for topic, words in ("en", "the cat sat on a mat and it was 3 pm"), ("de", "die Katze saß auf der Matte und es war 3 Uhr"), ("it", "il gatto (era) qui"):
        for i in range(40):
            (folder / topic).mkdir(exist_ok=True)
            (folder / topic / f"{i}.txt").write_text(" ".join(g.choices(words.split(), k=120 + i)) + ".\n")
    (folder / "fr").mkdir()
    (folder / "fr/lone.txt").write_text("le chat est là. " * 20)
    return folder


def gpt(shelf, *flags):
    """args, data and model of these flags in float64, and 3 sequences of it."""
    args, _, _, data, model, _ = built("--data", str(shelf), *flags, small=WORDS)
    return args, data, model.double(), torch.randint(len(data.tokenizer.pieces), (3, args.context), generator=seeded("sequences"))


AXES = ["--router token_choice", "--router token_choice --top-k 2 --priority gate", "--router token_choice --balance bias --capacity-factor 1",
        "--router token_choice --router-weights frozen --scope global", "--router token_choice --router-weights random --top-k 2",
        "--router token_choice --router-weights self --gate linear", "--router hash", "--router hash --hash-key topic", "--router expert_threshold",
        "--router expert_threshold --scope global", "--router dense", "--router token_choice --unit sequence --prefix 4",
        "--router token_choice --unit sequence --prefix 4 --top-k 2 --scope global", "--router hash --unit sequence"]
LEAKY = ["--router expert_choice", "--router soft", "--router sinkhorn_token_choice", "--router token_choice --capacity-factor 1 --priority gate",
         "--router token_choice --unit sequence --pool mean", "--router token_choice --unit sequence --prefix 4 --score-from 1"]


@pytest.mark.parametrize("flags", AXES + LEAKY)
def test_a_gpt_lets_no_later_token_nor_another_sequence_in_unless_it_says_so(flags, shelf):
    args, _, model, tokens = gpt(shelf, *flags.split(), *["--allow-leak"] * (flags in LEAKY))
    topic, moved = torch.tensor([0, 1, 2]), 0.0
    model.train()
    with torch.no_grad():
        out = model(tokens, topic)[0]
        for t in range(args.score_from, args.context):
            changed = tokens.clone()
            changed[1, t] = (changed[1, t] + 1 + t) % 300
            difference = (model(changed, topic)[0] - out).abs().amax(-1)  # [3, T]
            assert difference[1, t] > 1e-6 and difference[[0, 2]].max() < 1e-10
            moved = max(moved, difference[1, args.score_from - 1 : t].max().item())
    assert (moved > 1e-6) == (flags in LEAKY) == (args.remark == "leaky"), moved


@pytest.mark.parametrize("flags", [flags for flags in AXES if "topic" not in flags])
def test_what_is_offered_for_sampling_says_of_a_beginning_what_it_says_of_the_whole(flags, shelf):
    args, _, model, tokens = gpt(shelf, *flags.split())
    with torch.no_grad(), train.dropless(model):
        out = model(tokens)[0]
        for t in range(args.prefix if args.unit == "sequence" else 1, args.context):
            assert torch.allclose(model(tokens[:, :t])[0], out[:, :t], atol=1e-10)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_sequence_as_a_whole_goes_to_the_experts_that_its_prefix_chooses(top_k, shelf):
    args, _, model, tokens = gpt(shelf, "--router", "token_choice", "--unit", "sequence", "--prefix", "4", "--top-k", str(top_k))
    block, x = model.blocks[0], draw(5, 16, 16)
    key = torch.zeros(5, 16, dtype=torch.long)
    routing = model.route(block.feed, x, key)
    y = block.feed(x.reshape(1, 5, -1), routing=routing)[0].view_as(x)
    gates = block.feed.router.gate(x[:, :4].mean(1)).softmax(-1)
    for b in range(5):
        weight, chosen = gates[b].topk(top_k)
        weight = weight / weight.sum() if top_k > 1 else weight
        one = lambda e: F.gelu(x[b] @ block.feed.experts.w1[e] + block.feed.experts.b1[e]) @ block.feed.experts.w2[e] + block.feed.experts.b2[e]
        assert torch.allclose(y[b], sum(w * one(e) for w, e in zip(weight, chosen)), atol=1e-12)


def test_global_routing_is_one_object_of_one_router_in_all_blocks(shelf):
    *_, model, tokens = gpt(shelf, "--router", "token_choice", "--scope", "global")
    routings = model(tokens)[1]
    assert len(routings) == 2 and routings[0] is routings[1] and model.blocks[0].feed.router is model.blocks[1].feed.router
    assert model(tokens)[1][0] is not routings[0]
    assert sum("router" in name for name, _ in model.named_parameters()) == 1


def test_frozen_routers_stand_still_and_random_ones_change_each_step_but_not_in_evaluation(shelf):
    for weights, moves in ("learned", True), ("frozen", False), ("random", False):
        args, data, model, tokens = gpt(shelf, "--router", "token_choice", "--router-weights", weights, "--lr", "0.01")
        gates, embedded, optimizer = [], model.embed.weight.clone(), train.make_optimizer(args, model, torch.device("cpu"))
        first = model.blocks[0].feed.router.gate.weight.clone()
        for step in range(2):
            train.train_step(args, moe_tokens, model, optimizer, data, step, torch.device("cpu"))
            gates.append((model.blocks[0].feed.router.drawn if weights == "random" else model.blocks[0].feed.router.gate).weight.clone())
        assert torch.equal(model.blocks[0].feed.router.gate.weight, first) != moves and not torch.equal(model.embed.weight, embedded)
        assert torch.equal(*gates) == (weights == "frozen")
        model.eval()
        assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_a_gpt_starts_at_the_log_of_its_vocabulary_and_learns_a_batch_by_heart(shelf):
    args, data, model, _ = gpt(shelf, "--router", "token_choice", "--lr", "0.01", "--steps", "200", "--dim", "32")
    loss = lambda: moe_tokens.loss(model, batch)[0].item()
    batch = data.batch(0)
    assert abs(loss() / math.log(len(data.tokenizer.pieces)) - 1) < 0.02
    data.batch = lambda step, part: batch
    optimizer = train.make_optimizer(args, model.float(), torch.device("cpu"))
    for step in range(args.steps):
        train.train_step(args, moe_tokens, model, optimizer, data, step, torch.device("cpu"))
    assert loss() < 0.1


def test_the_tokenizer_brings_back_any_bytes_and_takes_the_longest_pieces():
    text = "def naïve(x):\r\n\t return x  ** 2 # 日本語 \U0001f600\n\n\n    self.self_self = \"'''\" + 'ß' * 12345\n".encode()
    tokenizer = moe_tokens.Tokenizer.learn([text * 3, b"the theatre then"], 280)
    assert tokenizer.pieces[:256] == [bytes([i]) for i in range(256)] and len(set(tokenizer.pieces[256:])) == 24
    g = np.random.default_rng(0)
    for sample in [b"", text, b"\x00\xff\xfe", "\u2028\u0085 e\u0301 \ufeff".encode(), " \t \r \n\r".encode(), bytes(range(256))] + [
            g.integers(0, 256, g.integers(1, 60), np.uint8).tobytes() for _ in range(300)]:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    tokenizer = moe_tokens.Tokenizer([b" the", b"at", b"atre", b"x", b"r"])
    assert [tokenizer.pieces[i] for i in tokenizer.encode(b" theatre x")] == [b" the", b"atre", b" ", b"x"]
    assert tokenizer.encode(b"x").tolist() == [259] and tokenizer.encode(b"xr").tolist() == [120, 114]  # a lexeme of its own, and bytes of another


def test_the_standard_library_has_topics_in_both_parts_and_enough_bytes_a_token():
    args = SimpleNamespace(data=None, seed=0, batch_size=16, context=128, score_from=1, vocab_size=None, replace_undecodable=False)
    data = moe_tokens.load_data(args, "cpu")
    long = collections.Counter(topic for topic, _, raw in moe_tokens.read_documents(None) if len(raw) > 999)
    topics = [{data.topics[topic] for topic in data.parts[part][3]} for part in ("train", "validation")]
    assert data.facts["bytes_per_token"] >= 2.5 and len(long) > 100 and all({topic for topic in long if long[topic] > 3} <= part for part in topics)
    assert f"Python {sys.version.split()[0]}" in data.about and data.classes is moe_tokens.CODE and data.vocab_size == 4096
    kinds = {piece: list(moe_tokens.CODE)[kind] for piece, kind in zip(data.tokenizer.pieces[256:], data.class_of[256:])}
    assert [kinds[p] for p in (b" if", b" self", b" 1", b" =", b"(", b'"""', b"#", b"\n    ", b"  ")] == [
        "keyword", "name", "number", "operator", "bracket", "string or comment mark", "string or comment mark", "newline and indent", "blank"]
    assert set(data.class_of[:256].tolist()) == {list(moe_tokens.CODE).index("raw byte")}


def test_blocks_lie_within_documents_which_are_divided_by_topic(shelf):
    documents = moe_tokens.read_documents(shelf)
    assert [sum(d[0] == topic for d in documents) for topic in ("de", "en", "fr", "it")] == [40, 40, 1, 40]
    kept, held = moe_tokens.divide(documents)
    assert sorted(kept + held) == sorted(documents) and collections.Counter(d[0] for d in held) == {"de": 4, "en": 4, "it": 4}
    assert moe_tokens.divide([("", "x", b"12345678" + "äü".encode())]) == ([("", "x", "12345678ä".encode())], [("", "x", "ü".encode())])
    args, data, *_ = gpt(shelf, "--router", "dense", "--score-from", "5")
    for part, chosen in ("train", kept), ("validation", held):
        rows = np.arange(len(data.parts[part][1]))
        batch = data.ready(part, rows)
        for tokens, label, document, topic in zip(batch["input"], batch["label"], batch["document"], batch["topic"]):
            text, name = data.tokenizer.decode(tokens), data.topics[topic]
            assert any(text in raw for of, _, raw in documents if of == name)
            assert (label[:4] == -100).all() and torch.equal(label[4:-1], tokens[5:])
        lengths = [len(data.tokenizer.encode(raw)) for _, _, raw in (kept if part == "train" else held)]
        assert len(rows) == sum((length - 1) // 16 for length in lengths) and (batch["bytes"][:, :4] == 0).all()
    order = torch.cat([data.batch(step)["input"] for step in range(len(data.parts["train"][1]) // 4)])
    assert len(order.unique(dim=0)) > 0.9 * len(order)
    assert all(torch.equal(v[1:3], data.batch(1, part=slice(1, 3))[k]) for k, v in data.batch(1).items())


def test_nanogpt_files_are_mapped_and_trained_on(tmp_path, capsys):
    for name, count in ("train.bin", 1000), ("val.bin", 100):
        (np.arange(count) % 50).astype(np.uint16).tofile(tmp_path / name)
    flags = [*WORDS[:-2], "--router", "token_choice", "--data", tmp_path, "--vocab-size", 50]
    assert run(*flags, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and "bits/byte" not in said  # there is no tokenizer to count bytes by
    args = train.parse([str(flag) for flag in flags])
    train.check(args)
    data = moe_tokens.load_data(args, "cpu")
    batch = data.batch(0)
    assert torch.equal((batch["input"] + 1) % 50, batch["label"]) and isinstance(data.parts["train"][0], np.memmap)
    assert "without a tokenizer writes no text" in refused(capsys, "--sample", tmp_path / "run", "--prompt", "x")


@pytest.mark.parametrize("flags, rule", [
    *[(flags, "--allow-leak runs it all the same") for flags in LEAKY], ("--router expert_choice --unit sequence", "--unit sequence needs a dropless router"),
    ("--router token_choice --capacity-factor 1 --unit sequence", "--unit sequence needs a dropless router"), ("--data", "expected one argument"),
    ("--router token_choice --unit sequence --prefix 17", "--prefix must be at most --context 16, got 17"), ("--router dense --data nowhere", "nowhere does not exist"),
    ("--router token_choice --prefix 3", "--pool and --prefix are for --unit sequence"), ("--router dense --score-from 17", "--score-from must be at most"),
    ("--router dense --scope global", "are for routers; --router dense has none"), ("--router token_choice --hash-key topic", "--hash-key is for --router hash"),
    ("--router hash --hash-key topic --data one.txt", "needs text in at least two topics"), ("--router dense --data short.txt", "is shorter than one block"),
    ("--router dense --data empty", "empty holds no text"), ("--router dense --data void.txt", "void.txt holds no text"), ("--router dense --data latin.txt", "latin.txt is not UTF-8 at byte 2; --replace-undecodable"),
    ("--router dense --data bins", "holds token 400, beyond --vocab-size 320"), ("--router dense --data odd", "must hold tokens of two bytes each, got 33 bytes"),
    ("--router dense --data one.txt --batch-size 4000", "--batch-size 4000 is larger than the data"), ("--router dense --heads 3", "--heads must divide --dim"),
    ("--router dense --data=", "--data is empty"), ("--sample nowhere --prompt x", "nowhere is no run: config.json is missing")])
def test_a_wrong_text_or_axis_gets_one_line(flags, rule, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "empty", "bins", "odd":
        (tmp_path / folder).mkdir()
    for folder, count in ("bins", 40), ("odd", 16):
        for name in "train.bin", "val.bin":
            np.full(count, 400, np.uint16).tofile(tmp_path / folder / name)
    (tmp_path / "odd/train.bin").write_bytes(b"\0" * 33)
    (tmp_path / "one.txt").write_text("one two three four " * 100)
    (tmp_path / "short.txt").write_text("one two")
    (tmp_path / "void.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"na\xefve " * 400)
    assert rule in refused(capsys, *WORDS, *(["--data", "one.txt"] if "--data" not in flags else []), *flags.split())
    assert not (tmp_path / "runs").exists()


def test_a_leak_is_marked_on_every_line_and_vanishes_when_the_model_generates(shelf, tmp_path, capsys):
    flags = [*WORDS, "--data", shelf, "--router", "expert_choice", "--allow-leak", "--out", tmp_path / "run"]
    assert run(*flags) == 0
    said = capsys.readouterr().out
    assert "router expert_choice (leaky)" in said and "| expert_choice (leaky) |" in said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["remark"] == "leaky" for line in lines)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    args, task, data, model, device, *_ = train.load_run(tmp_path / "run", "cpu")
    batch, total = data.ready("validation", data.scored[:: max(1, len(data.scored) // 32)][:32]), 0.0
    for row in range(len(batch["input"])):
        for t in range(args.context):
            logits, _ = model(batch["input"][row : row + 1, : t + 1])
            total += F.cross_entropy(logits[0, -1], batch["label"][row, t]).item()
    assert summary["as_generated"]["loss"] == pytest.approx(total / batch["label"].numel(), rel=1e-4) and summary["router"] == "expert_choice (leaky)"
    assert summary["as_scored"]["loss"] == pytest.approx(moe_tokens.loss(model, batch)[0].item(), rel=1e-4)


def test_a_finished_run_writes_on_from_a_prompt_or_says_why_not(shelf, tmp_path, capsys):
    common = [*WORDS, "--data", shelf]
    assert run(*common, "--router", "expert_threshold", "--out", tmp_path / "a") == 0
    assert run(*common, "--router", "token_choice", "--unit", "sequence", "--prefix", "8", "--out", tmp_path / "b") == 0
    assert run(*common, "--router", "hash", "--hash-key", "topic", "--out", tmp_path / "c") == 0
    assert "| hash (topic oracle) |" in capsys.readouterr().out
    assert run(*common, "--router", "token_choice", "--unit", "sequence", "--pool", "mean", "--allow-leak", "--out", tmp_path / "d") == 0
    assert run(*SMALL, "--out", tmp_path / "e") == 0
    page = (tmp_path / "a/sample.html").read_text()
    assert "<h2>block 1</h2>" in page and page.count("<span") > 20 and json.loads((tmp_path / "a/tokenizer.json").read_text())
    capsys.readouterr()
    texts = []
    for extra in ["--temperature", 0], ["--temperature", 0], ["--seed", 1], ["--seed", 2]:
        assert run("--sample", tmp_path / "a", "--prompt", "the cat", "--max-new-tokens", 30, *extra) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[2] != texts[3] and all(text.startswith("the cat") and "sampled dropless" in text for text in texts)
    assert run("--sample", tmp_path / "b", "--prompt", "the cat sat on a mat and it") == 0
    for folder, prompt, rule in [("a", "", "--prompt is empty"), ("b", "the", "routes by the first 8 tokens; --prompt has only 3"), ("c", "the", "a prompt has none"),
                                 ("d", "the", "the mean of a whole sequence"), ("e", "the", "a run of --task vision without a tokenizer")]:
        assert rule in refused(capsys, "--sample", tmp_path / folder, "--prompt", prompt)


def test_sampling_keeps_to_the_likeliest_tokens():
    class Fixed(nn.Module):
        context, position = 4, torch.zeros(1)

        def forward(self, tokens):
            return torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(*tokens.shape, 4), {}

    drawn = lambda **options: np.bincount(moe_tokens.generate(Fixed(), [0], 400, **options)[1:], minlength=4) / 400
    assert drawn(temperature=0).tolist() == [1, 0, 0, 0] and drawn(top_p=0.4).tolist() == [1, 0, 0, 0]
    assert np.allclose(drawn(top_p=0.8), [5 / 8, 3 / 8, 0, 0], atol=0.08) and np.allclose(drawn(), [0.5, 0.3, 0.15, 0.05], atol=0.08)


# ---------------------------------------------------------------- what experts specialise in
def test_nmi_equals_values_worked_out_by_hand_and_its_null_permutes_whole_units():
    assert train.nmi(torch.eye(4)) == pytest.approx(1) and train.nmi(torch.ones(3, 5)) == pytest.approx(0) == train.nmi(torch.tensor([[1.0, 0], [1, 0]]))
    p = torch.tensor([[0.5, 0.0], [0.25, 0.25]])  # H = 1 bit and 0.8113 bits, I = 0.3113 bits
    assert train.nmi(p * 7) == pytest.approx(0.311278 / math.sqrt(0.811278), abs=1e-5)
    unit = torch.arange(400) // 100  # 4 documents of 100 tokens, two topics; experts follow the document
    label, mass = (unit >= 2).long(), F.one_hot(unit, 4).float()
    value, mean, bound = train.nmi_and_null(mass, label, unit)
    assert [value, mean, bound] == pytest.approx([1 / math.sqrt(2)] * 3)  # 4 documents cannot prove a topic: any labels fit as well
    value, mean, bound = train.nmi_and_null(mass, label, torch.arange(400))
    assert value > 0.7 and bound < 0.05 and 0 < mean <= bound


def test_the_null_of_sequences_routed_as_a_whole_deals_whole_sequences():
    """Sequences of one class each, sent to experts at random: tokens would call it knowledge, sequences call it chance."""
    label = (torch.arange(40) % 2)[:, None].expand(40, 50)
    mass = F.one_hot(torch.randint(4, (40,), generator=routers.seeded("at random")), 4).float()
    task = SimpleNamespace(EXAMINED="all", loss=lambda model, batch: (0, {}, {0: SimpleNamespace(mass=lambda: mass[batch["rows"]][None])}),
                           labels=lambda batch, data, start: {"token class": (label[batch["rows"]], start * 50 + torch.arange(1000).view(20, 50), "ab")})
    data = SimpleNamespace(split=lambda name: [{"rows": torch.arange(20)}, {"rows": torch.arange(20, 40)}])
    found, _ = train.specialisation(SimpleNamespace(dtype="float32"), task, torch.nn.Identity(), data, torch.device("cpu"))
    value, mean, bound = found[0]["token class"]
    assert 0 < value <= bound and mean > 0.01
    tokens = train.nmi_and_null(mass.repeat_interleave(50, 0), label.flatten(), torch.arange(2000))
    assert tokens[0] == pytest.approx(value, rel=1e-4) and tokens[2] < value


@pytest.mark.parametrize("flags, name", [("--router hash --hash-key topic", "topic"), ("--router hash", "token class")])
def test_experts_of_a_topic_know_the_topic_and_those_of_a_token_its_class(flags, name, shelf, tmp_path, capsys):
    assert run(*WORDS, "--data", shelf, *flags.split(), "--out", tmp_path / "run") == 0
    value, mean, bound = json.loads((tmp_path / "run/summary.json").read_text())["specialisation"]["0"][name]
    assert value > bound > mean and (name != "topic" or value == pytest.approx(1))
    assert "block 0, expert 0:" in capsys.readouterr().out


def test_pictures_are_xml_and_hold_what_they_name(tmp_path):
    assert run(*SMALL, "--router", "token_choice", "--steps", 4, "--out", tmp_path) == 0
    pictures = {name: ElementTree.parse(tmp_path / f"{name}.svg").getroot() for name in ("experts", "health", "patches")}
    words = {name: [part.text for part in picture.iter("{http://www.w3.org/2000/svg}text")] for name, picture in pictures.items()}
    assert {"block 1: patch kind x expert", "interior", "disc level", "3"} <= set(words["experts"])
    assert {"loss", *train.SIGNS.values(), "block 1", "step 1"} <= set(words["health"]) and {"image", "block 1", "expert 3", "no expert"} <= set(words["patches"])
    points = [part.get("points").split() for part in pictures["health"].iter("{http://www.w3.org/2000/svg}polyline")]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:4]]
    heights = [float(point.split(",")[1]) for point in points[0]]
    assert np.argsort(heights).tolist() == np.argsort(losses)[::-1].tolist()  # up is more
    joint = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    shares = re.findall(r"<title>(\w), expert (\d): ([\d.]+)", "".join(train.heat_map(0, 0, "t", joint, "ab")))
    assert shares == [("a", "0", "0.750"), ("a", "1", "0.250"), ("b", "0", "0.000"), ("b", "1", "0.000")]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    raw = zlib.decompress(re.search(rb"IDAT(.*)....\x00\x00\x00\x00IEND", moe_vision.png(pixels), re.S)[1])
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(5, 22)[:, 1:].reshape(5, 7, 3), pixels)


# ---------------------------------------------------------------- grids and tables
def test_a_grid_drops_what_a_router_ignores_merges_equal_runs_and_keeps_finished_ones(tmp_path, capsys):
    grid = [*SMALL, "--router", "dense", "token_choice", "soft", "--priority", "choice", "gate", "--seed", "0", "1", "--out", tmp_path]
    assert run(*grid) == 0
    names = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir() if path.is_dir())
    assert names == sorted([f"{r}-seed_{s}" for r in ("dense", "soft") for s in "01"] + [f"token_choice-priority_{p}-seed_{s}" for p in ("choice", "gate") for s in "01"])
    table = (tmp_path / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert "In every row: --task vision --size tiny --steps 3 --batch-size" in table
    assert len(rows) == 2 + 4 and table.strip() in capsys.readouterr().out and {"seeds", "priority", "to the best", "10-shot %"} <= set(rows[0])
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    scores = [line["summary"]["test"]["top1"] for line in runs if line["flags"]["router"] == "soft"]
    soft = dict(zip(rows[0], next(row for row in rows if row[0] == "soft")))
    assert soft["priority"] == "-" and soft["top-1 %"] == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}" and soft["seeds"] == "2"
    assert {(row[rows[0].index("priority")], row[rows[0].index("routing")]) for row in rows[2:]} == {("-", "-"), ("-", "leaky"), ("gate", "leaky"), ("choice", "causal")}
    touched = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.pt")}
    (next(tmp_path.glob("soft-seed_1-*")) / "summary.json").unlink()
    assert run(*grid) == 0
    again = [path.parent.name for path, time in touched.items() if path.stat().st_mtime_ns != time]
    assert len(again) <= 1 and (tmp_path / "results.md").read_text().splitlines()[0].split() == table.splitlines()[0].split()
    whole = next(tmp_path.glob("soft-seed_0-*")) / "summary.json"
    for broken, note in (whole.read_text()[:-9], "Left out, not readable: soft-seed_0"), ("{}", "Left out, not readable: soft-seed_0"), (None, "Not finished: soft-seed_0"):
        whole.unlink() if broken is None else whole.write_text(broken)
        assert run("--table", tmp_path) == 0 and note in (tmp_path / "results.md").read_text().splitlines()[-1]


def test_a_table_says_only_what_its_rows_bear_out(shelf, tmp_path, monkeypatch):
    data = [write_npz(tmp_path / f"{name}.npz") for name in "ab"]
    assert run(*SMALL, "--size", "tiny", "small", "--data", *data, "--router", "dense", "--out", tmp_path / "images") == 0
    table = (tmp_path / "images/results.md").read_text()
    assert table.count("| one seed ") == 3 and table.count("| best ") == 1 and "In every row: --task vision --steps 3 --batch-size 8\n" in table  # not --lr
    monkeypatch.setattr(train, "score", lambda summary, task: -1.0 - ("leaky" not in summary["router"]))
    assert run(*WORDS, "--data", shelf, "--router", "token_choice", "expert_choice", "--allow-leak", "--seed", 0, 1, "--out", tmp_path / "words") == 0
    *_, leaky, causal = [line for line in (tmp_path / "words/results.md").read_text().splitlines() if line.startswith("| ")]
    assert leaky.startswith("| expert_choice (leaky) ") and "| -1.000 " in leaky and "| best " in causal


def test_a_grid_with_an_invalid_cell_does_not_start_but_all_leaves_it_out(shelf, tmp_path, capsys):
    refused(capsys, *SMALL, "--experts", 2, 4, "--router", "token_choice", "--top-k", 3, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for action in "--eval", "--table", "--resume", "--sample":
        refused(capsys, *SMALL, action, tmp_path / "x", "--router", "all", "--out", tmp_path / "z")
    (tmp_path / "file").touch()
    assert "exists" in refused(capsys, *SMALL, "--seed", 0, 1, "--out", tmp_path / "file") and not (tmp_path / "z").exists()
    assert "--no-renormalize" in train.ignored({"--router": "soft"}) and "--prefix" in train.ignored({"--task": "tokens", "--router": "hash", "--unit": "sequence"})
    assert run(*WORDS, "--data", shelf, "--router", "all", "--steps", 1, "--out", tmp_path / "y") == 0
    said = capsys.readouterr().out
    assert "left out: expert_choice: --router expert_choice is not causal" in said
    assert {path.name.split("-")[0] for path in (tmp_path / "y").iterdir() if path.is_dir()} == {"dense", "token_choice", "hash", "expert_threshold"}
    assert len(list((tmp_path / "y").glob("dense-dense-match_*"))) == 2  # at equal active and at equal total parameters
    heads, *dense = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "y" / "results.md").read_text().splitlines()
                     if line.startswith(("| router", "| dense"))]
    assert {row[heads.index("dense_match")] for row in dense} == {"active", "total"} and len(dense) == 2
    assert not {"capacity_factor", "balance", "priority"} & set(heads)  # these rows differ by their routers' defaults alone
    assert "no finished run" in refused(capsys, "--table", tmp_path)


# ---------------------------------------------------------------- runs that survive
LONG = ["--steps", "40", "--save-every", "7", "--log-every", "1"]
CHAINS = [("vision", "expert_threshold", []), ("tokens", "token_choice", ["--balance", "bias"])]
if os.environ.get("EVERY_ROUTER"):  # the full matrix, minutes: EVERY_ROUTER=1 python -m pytest -q -k killed
    CHAINS += [(task, router, ["--allow-leak"] * (task == "tokens")) for task in ("vision", "tokens")
               for router in ("token_choice", "sinkhorn_token_choice", "expert_choice", "sinkhorn_expert_choice", "sparse_expert_choice", "soft")]
FORK = multiprocessing.get_context("forkserver")  # children of a process that has torch loaded
FORK.set_forkserver_preload(["train"])


@pytest.mark.parametrize("task, router, flags", CHAINS)
def test_a_run_that_is_killed_and_resumed_three_times_ends_as_one_unbroken(task, router, flags, shelf, tmp_path):
    flags = [*(SMALL if task == "vision" else [*WORDS, "--data", str(shelf)]), *LONG, "--router", router, *flags]
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(*flags, "--out", a) == 0
    ends, lines = [], lambda: (b / "metrics.jsonl").read_bytes().splitlines() if (b / "metrics.jsonl").exists() else []
    for kill, most in enumerate((10, 18, 25)):
        child = FORK.Process(target=train.main, args=([*flags, "--out", str(b)] if kill == 0 else ["--resume", str(b)],))
        child.start()
        while child.is_alive() and not (len(lines()) >= most and (b / "checkpoint.pt").exists()):
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL and not (b / "summary.json").exists()
        checkpoint = torch.load(b / "checkpoint.pt", weights_only=True)
        ends.append((checkpoint["step"], len(lines()), checkpoint["model"]["embed.weight"]))
        with open(b / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 39, "lo')  # as if it had died in the middle of a line
    assert any(count > step for step, count, _ in ends), "no line was ever cut back"
    assert ends[0][0] < ends[1][0] < ends[2][0] and not torch.equal(ends[0][2], ends[2][2])
    assert run("--resume", b) == 0
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"]) and one["step"] == other["step"] == 40


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first_and_a_resumed_run_ends_as_one_unbroken(number, status, tmp_path, capsys, monkeypatch):
    step, flags = train.train_step, [*SMALL, "--steps", "6", "--router", "expert_threshold"]
    assert run(*flags, "--out", tmp_path / "a") == 0

    def signalled(*given):
        if given[5] == 2:  # the number of the step
            os.kill(os.getpid(), number)
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        assert run(*flags, "--out", tmp_path / "b") == status
    assert f"interrupted after 3 of 6 steps; --resume {tmp_path / 'b'} goes on from there" in capsys.readouterr().out
    assert "is no finished run: summary.json is missing" in refused(capsys, "--eval", tmp_path / "b")
    for flag, value, had in ("--router", "dense", "expert_threshold"), ("--dim", 32, 16), ("--lr", 1, 0.01):
        assert f"contradicts the run in {tmp_path / 'b'}, which has {had}" in refused(capsys, "--resume", tmp_path / "b", flag, value)
    assert run("--resume", tmp_path / "b", "--log-every", 1, "--save-every", 1) == 0
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    monkeypatch.setattr(train, "train_step", lambda *given: (os.kill(os.getpid(), number), step(*given))[1])
    assert run("--resume", tmp_path / "b", "--steps", 9) == status and not (tmp_path / "b/summary.json").exists()
    capsys.readouterr()
    assert "it is of step 7, beyond --steps 6" in refused(capsys, "--resume", tmp_path / "b", "--steps", 6)
    assert train.read_flags(tmp_path / "b")["steps"] == 9


def test_a_run_that_diverges_stops_at_its_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    loss = moe_vision.loss
    calls = iter(range(100))
    monkeypatch.setattr(moe_vision, "loss", lambda *given: (lambda value, *rest: (value * (math.nan if next(calls) == 7 else 1), *rest))(*loss(*given)))
    assert run(*SMALL, "--steps", 9, "--save-every", 2, "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"diverged at step \d: loss nan, gradient norm nan; per block .*load.*; the checkpoint of step \d in", said), said
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["step"] == int(re.search(r"checkpoint of step (\d)", said)[1]) and all(torch.isfinite(z).all() for z in saved["model"].values())
    monkeypatch.setattr(moe_vision, "loss", loss)
    assert run("--resume", tmp_path / "run") == 0


class Spy:  # what a pickle in place of a checkpoint could do
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_that_is_cut_changed_or_malicious_is_refused_and_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "--router", "token_choice", "--out", "run") == 0
    path = tmp_path / "run/checkpoint.pt"
    good = path.read_bytes()
    middle = good.index(b"data/0") + 500
    changed = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    evil = io.BytesIO()
    torch.save({"model": Spy()}, evil)
    for bad in good[: len(good) // 2], changed, evil.getvalue(), pickle.dumps(Spy()), b"":
        path.write_bytes(bad)
        lines = (tmp_path / "run/metrics.jsonl").read_bytes()
        for flag in "--resume", "--eval":
            assert "cannot be read as a checkpoint" in refused(capsys, flag, "run")
        assert path.read_bytes() == bad and (tmp_path / "run/metrics.jsonl").read_bytes() == lines and not (tmp_path / "exploded").exists()


def test_a_full_disk_gets_one_line_and_what_was_saved_stays_whole(tmp_path, capsys, monkeypatch):
    assert run(*SMALL, "--out", tmp_path / "run") == 0
    before, fsync = (tmp_path / "run/checkpoint.pt").read_bytes(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left on device" in refused(capsys, "--resume", tmp_path / "run", "--steps", 9)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("run/*.part"))
    monkeypatch.setattr(os, "fsync", fsync)
    write_cifar(tmp_path / "data")
    assert run(*SMALL, "--data", tmp_path / "data", "--out", tmp_path / "other") == 0
    (tmp_path / "data/test_batch.bin").unlink()
    assert "lacks test_batch.bin" in refused(capsys, "--resume", tmp_path / "other")


def one_of_two(rank, port, unsynchronised, argv):
    """A process as torchrun starts it."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if unsynchronised:
        train.DistributedDataParallel = lambda model: model
    sys.exit(train.main(argv))


def in_two_processes(argv, unsynchronised=False):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = [FORK.Process(target=one_of_two, args=(rank, port, unsynchronised, [str(word) for word in argv])) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


@pytest.mark.parametrize("flags", [[*SMALL, "--router", "token_choice", "--noise-std", "1"], [*WORDS, "--router", "token_choice", "--balance", "bias"]])
def test_two_processes_take_the_steps_of_one_and_would_not_without_synchronised_gradients(flags, shelf, tmp_path):
    y = np.arange(64) % 4
    x = np.broadcast_to((60 * y).astype(np.uint8)[:, None, None, None], (64, 16, 16, 3))
    write_npz(tmp_path / "x.npz", x_train=x, y_train=y)
    flags = [*flags, "--data", shelf if "tokens" in flags else tmp_path / "x.npz", "--dtype", "float64", "--schedule", "constant", "--warmup", 0, "--lr", 0.02,
             "--steps", 20, "--batch-size", 16]
    assert run(*flags, "--out", tmp_path / "one") == 0 and in_two_processes([*flags, "--out", tmp_path / "two"]) == [0, 0]
    assert in_two_processes([*flags, "--out", tmp_path / "apart"], unsynchronised=True) == [0, 0]
    one, two, apart = ([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[:20]] for name in ("one", "two", "apart"))
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-9 and one[-1] < 0.9 * one[0]
    assert max(abs(a - b) for a, b in zip(one, apart)) > 1e-6


def test_sequences_are_routed_in_one_process_only(shelf, tmp_path):
    assert in_two_processes([*WORDS, "--data", shelf, "--router", "token_choice", "--unit", "sequence", "--out", tmp_path / "run"]) == [2, 2]


def damaged(good, g):
    """These bytes cut short, or with some of them changed."""
    if g.random() < 0.4:
        return good[: g.randrange(len(good))]
    bad = bytearray(good)
    for _ in range(g.choice([1, 1, 2, 8, 40])):
        bad[g.randrange(len(bad))] = g.randrange(256)
    return bytes(bad)


def test_readers_end_in_a_value_or_a_valueerror_whatever_the_bytes(shelf, tmp_path):
    write_cifar(tmp_path / "cifar")
    write_npz(tmp_path / "x.npz")
    (tmp_path / "bin").mkdir()
    for name in "train.bin", "val.bin":
        (np.arange(200) % 300).astype(np.uint16).tofile(tmp_path / "bin" / name)
    (tmp_path / "one.txt").write_text("Dies sei — naïve — ein Text. " * 30)
    assert run(*SMALL, "--out", tmp_path / "run") == 0
    assert run(*WORDS, "--data", shelf, "--router", "dense", "--out", tmp_path / "words") == 0
    text = lambda path: moe_tokens.load_data(SimpleNamespace(data=str(path), seed=0, batch_size=2, context=8, score_from=1, vocab_size=300, replace_undecodable=False), "cpu")

    def restored(folder):
        args = train.parse(["--resume", str(folder)])
        args.run = pathlib.Path(args.resume)
        model = train.build(args)[3]
        return train.restore(args, folder, model, train.make_optimizer(args, model, torch.device("cpu")))

    readers = [(tmp_path / "cifar/data_batch_1.bin", lambda path: stored(path.parent), 300), (tmp_path / "x.npz", lambda path: stored(path), 300),
               (tmp_path / "one.txt", text, 300), (tmp_path / "bin/train.bin", lambda path: text(path.parent), 300),
               (tmp_path / "words/tokenizer.json", moe_tokens.Tokenizer.read, 300), (tmp_path / "run/config.json", lambda path: train.load_run(path.parent, "cpu"), 200),
               (tmp_path / "run/checkpoint.pt", lambda path: train.read_checkpoint(path.parent), 300)]
    for path, read, times in readers:
        good, g, outcomes = path.read_bytes(), random.Random(1), {"read": 0, "refused": 0}
        for _ in range(times):
            path.write_bytes(damaged(good, g))
            try:
                read(path)
                outcomes["read"] += 1
            except ValueError as error:
                assert str(error) and len(str(error).splitlines()) == 1
                outcomes["refused"] += 1
        path.write_bytes(good)
        read(path)
        assert outcomes["refused"] > 20, (path, outcomes)


# ---------------------------------------------------------------- README.md
def test_readme_counts_the_lines_of_code_of_each_router_and_names_them_all():
    code = lambda part: re.sub(r'"""(.|\n)*?"""', "", inspect.getsource(part))  # without docstrings
    count = lambda part: len(re.findall(r"^ *[^ #\n]", code(part), re.M))  # nor blanks and comments
    parts = {name: [ROUTERS[name]] for name in ("token_choice", "expert_choice", "soft", "hash", "expert_threshold")}
    for who in ("token", "expert"):
        parts |= {f"sinkhorn_{who}_choice": [routers.Sinkhorn, sinkhorn_plan], f"sparse_{who}_choice": [routers.Sparse, sparse_plan, project]}
    said = {name: int(count) for name, count in re.findall(r"^\| `(\w+)` \|.*\| \+?(\d+) \|$", (ROOT / "README.md").read_text(), re.M)}
    assert said == {name: sum(map(count, of)) for name, of in parts.items()} and set(said) <= set(ROUTERS)


def test_readme_adds_a_router_that_flags_and_these_tests_pick_up(tmp_path):
    block = re.search(r"```python\n(class .*?ROUTERS\[\"(\w+)\"\].*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(block[1].splitlines()) <= 15
    for name in ("moe_tokens.py", "moe_vision.py", "train.py", "test_routers.py", "README.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "routers.py").write_text((ROOT / "routers.py").read_text() + "\n\n" + block[1])
    python = lambda *words: subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=170)
    tests = python("-m", "pytest", "-q", "test_routers.py", "-k", f"{block[2]} and not readme")
    assert tests.returncode == 0 and int(re.search(r"(\d+) passed", tests.stdout)[1]) >= 20, tests.stdout[-2000:]
    option = re.search(r"dict\((\w+)=", block[1])[1]
    trained = python("train.py", *SMALL, "--steps", "2", "--router", block[2], f"--{option}", "0.5", "--out", "run")
    assert trained.returncode == 0 and f"| {block[2]} " in trained.stdout, trained.stderr[-2000:]

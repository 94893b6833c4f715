"""What routers.py promises, one test a promise: `pytest -q test_routers.py` (CPU, under a minute, nothing downloaded).

Axes as in routers.py: G groups, T tokens, D width, E experts, C slots, K choices. Numbers are compared in float64. What is
parametrised over ROUTERS, or by @each, tests a router that you add as it is; for its values, write its worked example (WORKED)
and its slow twin (SLOW).
"""
import ast
import copy
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    nn.init.eye_(router.gate.weight)
    return router


def same(got, want, within=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64) if isinstance(want, (float, list)) else want,
                               rtol=0, atol=within)


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def alike(R, leaves, got, want, within=1e-12):
    """The same values, and from the last of each the same gradients of sum(R * value)."""
    for one, other in zip([*got, *gradients((R * got[-1]).sum(), leaves)], [*want, *gradients((R * want[-1]).sum(), leaves)]):
        same(one, other, within)


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
    ("expert_choice", dict(capacity_factor=2), GATES,
     {(2, 0, 0): .7, (1, 0, 1): .6, (0, 1, 0): .3, (2, 1, 1): .2, (1, 2, 0): .3, (0, 2, 1): .2}),
    # Columns of the plan: .6 .3 .1 takes 0, 1; .3 .2 .5 takes 2, 0; .1 .5 .4 takes 1, 2. Softmax weighs.
    ("sinkhorn_expert_choice", dict(capacity_factor=2), CROWD,
     {(0, 0, 0): .9, (1, 0, 1): .72, (2, 1, 0): 1 / 3, (0, 1, 1): .075, (1, 2, 0): .2, (2, 2, 1): 4 / 15}),
    # As the sparse plan above, by columns: .5 .2 .3 -> .6 (token 0) and .4 (token 2), and so on round the circle.
    ("sparse_expert_choice", dict(capacity_factor=2, combine="plan"), TURNS,
     {(0, 0, 0): .6, (2, 0, 1): .4, (1, 1, 0): .6, (0, 1, 1): .4, (2, 2, 0): .6, (1, 2, 1): .4}),
    # Thresholds start at 1/3: token 0 passes at 0, 1 at 0 and 1, 2 at 0 (whose two slots are gone) and 1.
    ("expert_threshold", {}, [[.5, .3, .2], [.4, .4, .2], [.45, .35, .2]],
     {(0, 0, 0): .5, (1, 0, 1): .4, (1, 1, 0): .4, (2, 1, 1): .35}),
]


@pytest.mark.parametrize("name, options, numbers, seats", WORKED)
def test_a_router_fills_the_tensors_as_worked_out_by_hand(name, options, numbers, seats):
    tensors = plain(name, 3, **options)(torch.tensor([numbers], dtype=torch.float64).log()).tensors()
    want = torch.zeros(2, 1, 3, 3, 2, dtype=torch.float64)
    for seat, gate in seats.items():
        want[0, 0][seat], want[1, 0][seat] = 1, gate
    same(torch.stack(tensors), want, 1e-9)  # the sparse solver's one step moves a price by 1e-10


def test_hash_fills_the_tensors_as_worked_out_by_hand():
    router = build_router("hash", 3, 3, top_k=2, num_keys=3)
    router.table.copy_(torch.tensor([1, 0, 2]))
    dispatch, combine = router(draw(1, 3, 3), key=torch.tensor([[0, 2, 4]])).tensors()
    # Key 0 goes to 1 and the next, 2; key 2 to 2 and 0; key 4 is not in the table: 4 mod 3 = 1, and 2, where it is third.
    want = torch.zeros(1, 3, 3, 2, dtype=torch.float64)
    for token, expert, slot in (0, 1, 0), (0, 2, 0), (1, 2, 1), (1, 0, 0), (2, 1, 1):
        want[0, token, expert, slot] = 1
    same(dispatch, want)
    same(combine, want / 2)


def test_soft_fills_the_tensors_as_worked_out_by_hand():
    router = build_router("soft", 3, 3, slots=2).double()
    axes = F.one_hot(torch.tensor([[0, 1], [2, 0], [1, 2]])).permute(2, 0, 1).double()  # [D, E, C]: each axis has two slots
    with torch.no_grad():
        router.phi.copy_(axes)
        router.scale.fill_(math.log(2) * (1 + 1e-6))  # undoes the 1e-6 under both roots
    dispatch, combine = router(torch.eye(3, dtype=torch.float64)[None]).tensors()
    # exp(logits) is 2 where token and slot point the same way, else 1. A slot: 2 / (2+1+1). A token: 2 / (2+2+1+1+1+1).
    same(dispatch[0], (1 + axes) / 4)
    same(combine[0], (1 + axes) / 8)


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


def slow_choice(scores):
    """Token choice or expert choice by these scores(options, logits, gates, capacity) -> [T][E]."""
    def route(router, x, key):
        o, T, E, K, C = router.options, len(x), router.num_experts, router.options.top_k, budget(router, len(x))
        logits = [[sum(a * b for a, b in zip(token, weight)) for weight in router.gate.weight] for token in x]
        gates = [slow_softmax(row) for row in logits]
        decide = scores(o, logits, gates, C)
        weigh = decide if getattr(o, "combine", "") == "plan" else gates
        if router.chooses == "experts":
            return [[{t: (1.0, weigh[t][e])} for t in best(column, C)] for e, column in enumerate(zip(*decide))]
        bias = router.bias if o.bias_rate else [0] * E
        picks = [best([score + push for score, push in zip(row, bias)], K) for row in decide]
        order = best([max(row) for row in decide]) if o.priority == "gate" else range(T)
        pairs = [(t, k) for t in order for k in range(K)] if o.priority == "token" else [(t, k) for k in range(K) for t in order]
        total = [sum(weigh[t][e] for e in picks[t]) if o.renormalize else 1 for t in range(T)]
        return slow_queue([(picks[t][k], t, weigh[t][picks[t][k]] / total[t]) for t, k in pairs], E, C)
    return route


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


by_softmax = slow_choice(lambda o, logits, gates, C: gates)
by_sinkhorn = slow_choice(lambda o, logits, gates, C: slow_sinkhorn(logits, o.iterations))
by_sparse_columns = slow_choice(lambda o, logits, gates, C: slow_sparse(gates, C, len(gates) / len(gates[0]), o.iterations))
by_sparse_rows = slow_choice(  # tokens and experts exchanged: a token has mass 1
    lambda o, logits, gates, C: list(zip(*slow_sparse(list(zip(*gates)), o.top_k, 1.0, o.iterations))))
SLOW = {"token_choice": by_softmax, "sinkhorn_token_choice": by_sinkhorn, "sparse_token_choice": by_sparse_rows,
        "expert_choice": by_softmax, "sinkhorn_expert_choice": by_sinkhorn, "sparse_expert_choice": by_sparse_columns,
        "soft": slow_soft, "hash": slow_hash, "expert_threshold": slow_threshold}


def slow_expert(experts, e, z):
    """Expert e as an ordinary FFN that borrows its weights (nn.Linear keeps them [out, in])."""
    (_, dim, hidden), linear = experts.w1.shape, lambda *axes: nn.Linear(*axes, device="meta")
    ffn = nn.Sequential(linear(dim, hidden), nn.GELU(), linear(hidden, dim))
    weights = experts.w1[e].T, experts.b1[e, 0], experts.w2[e].T, experts.b2[e, 0]
    return torch.func.functional_call(ffn, dict(zip(dict(ffn.named_parameters()), weights)), z)


def slow_layer(moe, x, groups):
    """y by the two sums of routers.py's first lines, one slot after the other; groups[g][e][c] is a slot."""
    y = [[torch.zeros_like(token) for token in tokens] for tokens in x]
    for g, experts in enumerate(groups):
        for e, slots in enumerate(experts):
            for slot in slots:
                out = slow_expert(moe.experts, e, sum(weight * x[g, t] for t, (weight, _) in slot.items()))
                for t, (_, weight) in slot.items():
                    y[g][t] = y[g][t] + weight * out
    return torch.stack([torch.stack(tokens) for tokens in y])


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
    groups = [SLOW[name](moe.router, x[g], key[g]) for g in range(2)]
    want = torch.zeros(2, *routing.tensors()[0].shape, dtype=torch.float64)
    for g, experts in enumerate(groups):
        for e, c, t in ((e, c, t) for e, slots in enumerate(experts) for c, slot in enumerate(slots) for t in slot):
            want[0, g, t, e, c], want[1, g, t, e, c] = map(number, experts[e][c][t])
    got = torch.stack(routing.tensors())
    if E == 1:  # every plan is 1 but for rounding, so the order of its slots means nothing
        got, want = got.sum(-1), want.sum(-1)
    alike(draw(2, T, 4, seed=1), [x, *moe.parameters()], [got, y], [want, slow_layer(moe, x, groups)],
          1e-10 if "iterations" in ROUTERS[name].defaults else 1e-12)


@each(HARD, top_k=[2], capacity_factor=[0.5, 2.0, None], combine=["plan"])
def test_the_index_form_equals_the_tensor_form_in_values_and_gradients(name, options):
    x = draw(3, 7, 6).requires_grad_()
    moe = layer(name, x, 4, **options)
    y, routing = moe(x)
    tensors = Routing(*moe.router(x).tensors(), routing.load)
    want, used = moe(x, routing=tensors)
    alike(draw(3, 7, 6, seed=1), [x, *moe.parameters()], [routing.dispatch(x), routing.mass(), y],
          [tensors.dispatch(x), tensors.mass(), want])
    assert used is tensors and torch.equal(routing.counts(), tensors.counts())


@pytest.mark.parametrize("E, G, C", [(4, 2, 3), (1, 3, 1), (5, 1, 2)])
def test_batched_experts_equal_a_loop_over_experts_in_values_and_gradients(E, G, C):
    experts, slots = Experts(E, 6, 9).double(), draw(G, E, C, 6).requires_grad_()
    want = torch.stack([slow_expert(experts, e, slots[:, e]) for e in range(E)], 1)
    alike(draw(G, E, C, 6, seed=1), [slots, *experts.parameters()], [experts(slots)], [want])


# ---------------------------------------------------------------- numbers that published code gives
# Computed by google-research/vmoe, commit 942a78bc81d2e63199f0933733582ddae0715416, on random tokens: logits (row by row),
# the token in each slot (T where empty), the combine weight of each slot. All but the tokens are times 10^4 and rounded,
# so weights are held to 1e-4.
PUBLISHED = [
    ("token_choice", dict(top_k=2, priority="choice"), 3,
     "-28312 -24384 -38756 21952 25999 -8012 -1628 -14074 -22263 -2320 -29752 -7233 19031 12912 -3443 -11453 -2021 -7223 7238 "
     "12196 23126 691 5291 2808 -10714 5559 -3358 17090 -9737 -22985",
     "2 3 4 9 0 1 10  0 1 5 7 8 2 4  6 3 5 7 8 10 10",
     "7067 5966 6068 9203 3530 3923 0 5228 5880 5041 4147 6225 2036 3291 6496 3650 2996 3235 2552 0 0"),
    ("sinkhorn_token_choice", dict(priority="gate", combine="plan"), 4,
     "-23408 24252 -6480 -23535 -21379 23761 -3857 -26140 37206 -21563 11654 -1332 -21758 5534 -22058 1253 10054 -9283 -4385 "
     "10015 13030 -2706 -14617 -7337 9816 -9347 5125 2271 -21540 20461 -18652 -23131 12765 541 13036 -13207 36275 -10346 -226 "
     "-3439 15011 1634 3138 -4554 4276 -3390 -834 -2276 -21219 -4661 3338 16562 -7452 -16823 -5168 -594 -19691 -16078 -16462 "
     "-12242 12059 12814 -2869 -4777",
     "9 2 5 10  7 0 1 15  8 6 11 16  12 4 3 13",
     "8766 7678 5680 3830 9073 8607 8269 3489 6815 4535 3990 0 7224 5751 5545 4878"),
    ("expert_choice", dict(capacity_factor=2), 3,
     "-21 14883 -8791 5494 -10009 -9856 -8274 -17701 -44 -15632 -513 -2047 -11514 21622 -46325 -6418 -21878 -5759 14570 8800 "
     "47513 -5063 -4604 17616 7713 1483 49262 7821 14683 23416",
     "1 5 2 0 9 3 7  4 0 3 9 1 2 5  8 6 7 2 9 5 3",
     "7005 4384 2727 1708 1292 1061 854 9639 7582 4812 2565 1486 1062 934 9765 9452 8251 6210 6143 4682 4127"),
    ("sinkhorn_expert_choice", dict(capacity_factor=1.5, combine="plan"), 6,
     "4235 -5562 -4791 -7985 -11625 -5974 9375 -4499 -1620 -597 -2569 25047 -34334 -1986 12839 8607 -26213 -36388 -16493 10625 "
     "11101 3259 -10830 -10283 -16631 13514 -7697 27716 -3106 -17209 4373 15264 2355 9973 13413 -48 16769 -279 -6148 2859 8853 "
     "-6147 -24215 17583 1922 11283 -14612 -2693 175 2303 -13176 11886 5626 18327 16705 19254 13918 682 22914 20674 13407 -8573 "
     "8652 4857 3460 18196 5524 -3656 -6853 8225 6946 22716 9324 -1280 3057 -656 7545 -2341 -535 4357 -13860 14739 1669 -5394 "
     "20537 -2694 -18684 4320 13454 1543 27566 12333 204 4596 45976 24386 -22679 7888 5373 -4618 -38466 -3622 10643 7452 -10024 "
     "25676 11638 49881 9677 -5829 7256 -12568 -900 -15618 -3777 619 14483 -668 -13302 -15742 12562 1281 -1343 10977 29513 "
     "16655 22954 -5385 -3956 2775 33430 8873 -14192 7127 -7516 -39 4018 -23907 -568 -7715 5547 8776 -437 9172",
     "14 6 0 18 12 21  7 22 16 3 5 9  19 2 3 18 16 23  4 13 2 23 8 7  15 21 20 9 22 14  17 1 11 8 10 23",
     "5485 5014 3817 3811 3049 2681 5552 4316 4265 3621 3533 2340 6233 5753 4113 3618 3592 2488 7197 4819 2895 2640 2554 2460 "
     "7186 6094 5469 2410 2259 2154 8454 6163 5186 3974 3233 2245"),
    ("sparse_expert_choice", {}, 4,
     "11767 47080 -27053 6555 1284 17077 6318 11375 23750 23625 14110 7660 -18965 11897 -10305 -6586 -8061 -20773 17910 8567 "
     "12880 24720 971 4993 9898 -4420 -4332 12064 -9185 13158 -11007 -2765 17164 32699 -9699 -17377 3719 -34600 14043 20230 "
     "-5276 -8338 5885 -5671 2768 -315 -459 -1078 -5524 -13278 -14958 -3686 6039 46554 -46303 8637 -1831 -3006 -9401 -14582 "
     "1709 -16804 9322 2811",
     "5 14 2 11  3 7 13 8  4 10 15 7  9 12 6 7",
     "1990 3791 3893 3185 7623 7144 9615 8113 6719 5309 4850 637 5765 3938 4563 1453"),
]


def numbers(text):
    return torch.tensor([int(word) for word in text.split()], dtype=torch.float64) / 1e4


@pytest.mark.parametrize("name, options, E, logits, index, gates", PUBLISHED)
def test_a_router_gives_the_published_slots_and_weights(name, options, E, logits, index, gates):
    routing = plain(name, E, **options)(numbers(logits).view(1, -1, E))
    assert routing.index.flatten().tolist() == [int(word) for word in index.split()]
    same(routing.gate.flatten(), numbers(gates), 1e-4)


def test_soft_gives_the_published_weights():
    # The published logits are 16 x 4 cosines, at scale 1. Unit tokens with half of each as a coordinate, and slots along
    # the axes, give them back at scale 2.
    cosines = numbers("3289 -2216 3311 3822 6089 1670 -2163 4820 1600 -1018 371 3643 497 3579 -1216 1386 3279 1515 -3891 -2401 "
                      "-5124 -116 -2980 -2289 -4987 534 439 -871 -208 738 854 1959 -832 -890 -3063 4989 -3740 5310 -8289 447 "
                      "-3893 -3118 2855 2753 -231 552 2137 2227 5312 2836 -269 3441 -1674 -3457 -2158 6827 -3177 567 2545 "
                      "-3196 -1790 -3297 -1289 2168").view(16, 4)
    router = build_router("soft", 5, 4, slots=1).double()
    with torch.no_grad():
        router.phi.copy_(torch.eye(5)[:, :4, None])
        router.scale.fill_(2 * (1 + 1e-6))
    x = torch.cat([cosines / 2, (1 - (cosines / 2).square().sum(1, keepdim=True)).sqrt()], 1)
    dispatch, combine = router(x[None]).tensors()
    same(dispatch[0, [0, 4, 15], :, 0].flatten(), numbers("847 476 906 733 846 692 441 393 510 428 572 621"), 1e-4)
    same(combine[0, [0, 4, 15], :, 0].flatten(), numbers("2752 1587 2758 2903 3456 2897 1688 1959 2274 1956 2391 3378"), 1e-4)


# ---------------------------------------------------------------- properties of every router
@each(top_k=[1, 2], capacity_factor=[0.5, 1.0, 2.0, None], priority=["token", "choice", "gate"])
def test_a_hard_slot_holds_one_token_and_its_gate_and_a_soft_slot_a_convex_mix(name, options):
    x = draw(3, 13, 6)
    routing = layer(name, x, 4, **options).router(x)
    dispatch, combine = routing.tensors()
    same(routing.load.double().sum(), 1.0, 1e-6)
    if name in HARD:
        assert set(dispatch.unique().tolist()) <= {0.0, 1.0} and dispatch.sum(1).max() == 1
        assert torch.equal(combine != 0, dispatch == 1)
    if name in HARD and name in SLOW:  # combine is the kept gates and nothing else
        gates = routing.logits.softmax(-1) if name in WEIGHED else torch.full((3, 13, 4), 1 / options["top_k"]).double()
        same(combine.sum(3), gates * dispatch.sum(3))
    if name not in HARD:
        assert bool((dispatch > 0).all() and (combine > 0).all())
        same(dispatch.sum(1), torch.ones_like(dispatch[:, 0]))
        same(combine.sum((2, 3)), torch.ones_like(x[..., 0]))
    if name in TOKENS_CHOOSE:
        assert routing.counts().max() <= options["top_k"] and dispatch.sum(3).max() == 1


@pytest.mark.parametrize("T, E, K, factor, tokens, experts, threshold, soft", [  # C of each kind, by hand
    (10, 3, 2, 1.0, 7, 7, 10, 7), (10, 3, 1, 1.0, 4, 4, 7, 3), (4, 8, 1, 1.0, 1, 1, 1, 1), (5, 2, 2, 2.0, 10, 5, 5, 10),
    (12, 4, 1, 1.05, 4, 4, 7, 3), (12, 4, 1, 0.5, 2, 2, 3, 2)])
@pytest.mark.parametrize("name", ROUTERS)
def test_slots_are_bought_from_one_budget(name, T, E, K, factor, tokens, experts, threshold, soft):
    x, C = draw(1, T, 8), dict(tokens=tokens, experts=experts, threshold=threshold, soft=soft)[ROUTERS[name].chooses]
    router = layer(name, x, E, top_k=K, capacity_factor=factor).router
    assert router(x).tensors()[0].shape == router.eval()(x).tensors()[0].shape == (1, T, E, C)


@each(those(lambda kind: kind.chooses in ("tokens", "experts")), top_k=[1, 2], capacity_factor=[4.0, None])
def test_nothing_is_dropped_where_the_capacity_reaches_the_number_of_tokens(name, options):
    x = draw(3, 13, 6)
    assert bool((layer(name, x, 4, **options).router(x).counts() == (options["top_k"] if name in TOKENS_CHOOSE else 4)).all())


@each(HARD, capacity_factor=[0.25], combine=["softmax", "plan"])
def test_a_dropped_token_comes_back_as_exactly_zero(name, options):
    x = draw(3, 16, 6)  # at most half of the tokens find a slot
    y, routing = layer(name, x, 4, **options)(x)
    dropped = routing.counts() == 0
    assert dropped.any(1).all() and not y[dropped].any() and y[~dropped].abs().sum(-1).min() > 0


@each(LEARNED, combine=["softmax", "plan"])
def test_permuted_experts_give_the_same_output(name, options):
    x, order = draw(2, 14, 8), torch.tensor([3, 0, 4, 1, 2])
    moe = layer(name, x, 5, **options)  # no other axis is 5 long
    want, _ = moe(x)
    with torch.no_grad():
        for tensor in moe.state_dict().values():
            if 5 in tensor.shape:
                tensor.copy_(tensor.index_select(tensor.shape.index(5), order))
    same(moe(x)[0], want)


@each(top_k=[2], capacity_factor=[1.0, None], priority=["token", "choice", "gate"])
def test_groups_do_not_influence_one_another(name, options):
    x, other = draw(2, 13, 6), torch.stack([draw(2, 13, 6)[0], 3 * draw(13, 6, seed=1)])
    moe = layer(name, x, 4, **options)
    (y, _), (changed, _) = moe(x), moe(other)
    same(changed[0], y[0])
    assert (changed[1] - y[1]).abs().max() > 1e-3


@each([name for name in NOISY if name in SLOW], noise_std=[0.5], top_k=[2], combine=["softmax", "plan"])
def test_noise_is_normal_of_deviation_noise_std_over_e_and_enters_choices_and_load_loss(name, options):
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
        want["load"] = load_loss(x, noisy, 2, 0.5 / 4)
    assert routing.losses.keys() == want.keys()
    for loss in want:
        same(routing.losses[loss], want[loss])


@each(NOISY, noise_std=[1.0])
def test_noise_moves_training_and_never_evaluation(name, options):
    x = draw(2, 16, 6)
    moe = layer(name, x, 4, **options)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    assert torch.equal(moe.eval()(x)[0], layer(name, x, 4)(x)[0])


@each(top_k=[2], combine=["plan"])
def test_autocast_leaves_logits_and_choices_in_float32(name, options):
    x = draw(2, 16, 8).bfloat16()
    moe = layer(name, x.double(), 4, **options).float()
    want, reference = moe(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    numbers = lambda routing: [*routing.tensors(), *([routing.logits] if name in WEIGHED else [])]
    for got, wanted in zip(numbers(routing), numbers(reference)):
        assert got.dtype == torch.float32
        same(got, wanted, 0)
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
    before, spec = state(), importlib.util.spec_from_file_location("routers_again", routers.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
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


# ---------------------------------------------------------------- who leaks the future
def moved(name, options, seed=0):
    """How far EARLIER outputs and masses move when the last token and key of each of 60 groups, 60 draws, change."""
    x, key = draw(60, 16, 6, seed=seed), torch.randint(100, (60, 16), generator=torch.Generator().manual_seed(seed))
    moe = layer(name, x, 4, seed, **options)
    before, then = moe(x, key)
    x[:, -1], key[:, -1] = 2 * draw(60, 6, seed=seed + 100), key[:, -1] + 1
    after, now = moe(x, key)
    return max((after - before)[:, :-1].abs().max(), (now.mass() - then.mass())[:, :-1].abs().max())


AXES = dict(top_k=[1, 2], capacity_factor=[0.5, 1.0, 2.0, None], priority=["token", "choice", "gate"],
            combine=["softmax", "plan"])
CALLED_CAUSAL = [case for case in settings(**AXES) if build_router(case.values[0], 6, 4, **case.values[1]).causal]
CALLED_LEAKY = [case for case in settings(**AXES | dict(top_k=[2], capacity_factor=[1.0]))
                if not build_router(case.values[0], 6, 4, **case.values[1]).causal]


@pytest.mark.parametrize("name, options", CALLED_CAUSAL)
def test_what_is_called_causal_never_lets_a_later_token_move_an_earlier_output(name, options):
    for seed in range(2):
        assert moved(name, options, seed) <= 1e-12


@pytest.mark.parametrize("name, options", CALLED_LEAKY)
def test_what_is_not_called_causal_does_leak(name, options):
    assert moved(name, options) > 1e-6


@each(SLOW, **AXES)
def test_causal_is_a_matter_of_the_instance(name, options):
    limited = {(1, "token"), (2, "token"), (1, "choice")}  # else a first choice, or a surer token, comes from behind
    want = name in ("hash", "expert_threshold") or name == "token_choice" and (
        options["capacity_factor"] is None or (options["top_k"], options["priority"]) in limited)
    assert build_router(name, 6, 4, **options).causal is want


@each(TOKENS_CHOOSE, top_k=[1, 2], capacity_factor=[None], priority=["token", "gate"])
def test_a_dropless_causal_layer_gives_a_prefix_what_it_gives_the_whole(name, options):
    x = draw(2, 16, 6)
    moe = layer(name, x, 4, **options)
    apart = (moe(x[:, :7])[0] - moe(x)[0][:, :7]).abs().max()
    assert apart <= 1e-12 if moe.router.causal else apart > 1e-3


# ---------------------------------------------------------------- learning signals
@each(LEARNED, combine=["softmax", "plan"], gate=["linear", "mlp"])
def test_the_task_loss_alone_moves_every_learned_router_at_top_1(name, options):
    if name == "sparse_token_choice" and options.get("combine") == "plan":
        options = options | dict(top_k=2)  # a lone choice holds all of its token's mass: a constant gate
    x = draw(4, 16, 6)
    moe = layer(name, x, 4, **options)
    for gradient in gradients(moe(x)[0].square().sum(), list(moe.router.parameters())):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-6


def test_renormalised_gates_are_the_softmax_over_the_kept_logits():
    x = draw(2, 9, 6)
    routing = layer("token_choice", x, 5, top_k=3, capacity_factor=None, renormalize=True).router(x)
    kept = routing.logits.gather(-1, routing.expert_index).softmax(-1)
    same(routing.mass().gather(-1, routing.expert_index), kept)


@pytest.mark.parametrize("E, K", [(4, 1), (4, 2), (6, 3), (5, 5)])
def test_balance_loss_is_1_when_uniform_and_e_over_k_at_collapse(E, K):
    logits = torch.zeros(2, 30, E, dtype=torch.float64)
    same(balance_loss(logits, ((torch.arange(30)[:, None] + torch.arange(K)) % E).expand(2, 30, K)), 1.0)
    logits[..., :K] = 500
    same(balance_loss(logits, torch.arange(K).expand(2, 30, K)), E / K)


def test_losses_equal_values_worked_out_by_hand():
    gates = torch.tensor([[[.8, .2], [.6, .4]], [[.9, .1], [.1, .9]]], dtype=torch.float64)
    # Group 0: f = (1, 0), P = (.7, .3), so 2 * .7 = 1.4. Group 1: f = P = (.5, .5), so 1. Mean 1.2.
    same(balance_loss(gates.log(), gates.argmax(-1, keepdim=True)), 1.2)
    # Group 0: sums (1.4, .6), mean 1, variance .16. Group 1: even. Mean .08.
    same(importance_loss(gates.log()), .08)
    # Rows sum to 1, and in group 1 we add 2 to the logits: logsumexp 0 and 2, squared 0 and 4.
    same(z_loss(gates.log() + torch.tensor([0, 2])[:, None, None]), 2.0)
    single = draw(2, 5, 1).requires_grad_()
    assert gradients(importance_loss(single), [single])[0].eq(0).all()  # of one expert: even, not NaN


def test_load_loss_equals_a_loop_over_tokens_and_experts_in_values_and_gradients():
    clean, want = draw(2, 7, 4).requires_grad_(), 0
    noisy = clean + 0.3 * draw(2, 7, 4, seed=1)
    for g in range(2):
        chance = [0] * 4
        for t, e in itertools.product(range(7), range(4)):
            threshold = noisy[g, t, best(noisy[g, t], 2)[-1]]
            chance[e] += (1 + ((clean[g, t, e] - threshold) / 0.3 / math.sqrt(2)).erf()) / 2 / 7
        mean = sum(chance) / 4
        want += sum((value - mean) ** 2 for value in chance) / 4 / mean**2 / 2
    alike(1, [clean], [load_loss(clean, noisy, 2, 0.3)], [want])


LOSSES = {"importance": importance_loss, "balance": lambda logits: balance_loss(logits, top(logits, 2, -1)), "z": z_loss,
          "load": lambda logits: load_loss(logits, logits + 0.1 * draw(*logits.shape[1:], seed=9), 2, 0.1)}


@pytest.mark.parametrize("name", ["importance", "balance", "load"])
def test_a_balance_loss_pushes_the_overloaded_expert_down_and_opposite_skews_do_not_cancel(name):
    skew = torch.tensor([2.0, 0, 0, -2], dtype=torch.float64)
    logits = (draw(1, 40, 4) + skew).requires_grad_()
    push = gradients(LOSSES[name](logits), [logits])[0].sum((0, 1))
    assert push.argmax() == 0 and push[0] > 0.1
    one, other, even = LOSSES[name](logits), LOSSES[name](logits - 2 * skew), LOSSES[name](logits - skew)
    assert one + other > 2.6 * even  # two layers
    same(LOSSES[name](torch.cat([logits, logits - 2 * skew])), (one + other) / 2)  # two groups


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_finite_at_huge_logits(name):
    for logits in draw(2, 9, 4).sign(), torch.eye(4).double().repeat(2, 2, 1), torch.tensor([[[-1.0] * 4] * 5]).double():
        logits = (1e3 * logits).requires_grad_()
        loss = LOSSES[name](logits)
        assert loss.isfinite() and gradients(loss, [logits])[0].isfinite().all()


# ---------------------------------------------------------------- solvers
@pytest.mark.parametrize("T, E, scale", [(16, 4, 1), (17, 4, 1), (16, 8, 1), (64, 8, 1), (200, 16, 1), (16, 4, 1e3)])
def test_sinkhorn_rows_are_exact_and_columns_balanced_after_20_iterations_and_huge_logits_finite(T, E, scale):
    logits = (scale * draw(20, T, E)).requires_grad_()
    plan = sinkhorn_plan(logits)
    same(plan.sum(2), torch.ones(20, T, dtype=torch.float64), 1e-12 * scale)
    assert gradients(plan.square().sum(), [logits])[0].isfinite().all()
    if scale == 1:
        same(plan.sum(1) * E / T, torch.ones(20, E, dtype=torch.float64), 1e-3)


def test_a_projection_keeps_the_k_largest_and_sums_to_1():
    z = torch.tensor([.5, .1, .9, -1, .3], dtype=torch.float64).view(1, 5, 1)
    # k = 2: .9 and .5 each give up (1.4 - 1) / 2 = .2. k = 3: .3 too, (1.7 - 1) / 3 = .7 / 3. k = 5: .1 has not as much.
    for k, want in (1, [0, 0, 3, 0, 0]), (2, [.9, 0, 2.1, 0, 0]), (3, [.8, 0, 2, 0, .2]), (5, [.8, 0, 2, 0, .2]):
        same(3 * project(z, k).flatten(), want)


@pytest.mark.parametrize("T, E, k, column", [(16, 4, 4, None), (13, 5, 6, None), (3, 8, 1, None), (6, 3, 2, 1.0)])
def test_sparse_columns_are_exact_with_at_most_k_nonzeros(T, E, k, column):
    plan = sparse_plan(draw(8, T, E).softmax(-1), k, column=column)
    same(plan.sum(1), torch.full((8, E), column or T / E, dtype=torch.float64))
    assert (plan > 0).sum(1).max() <= k and plan.min() == 0


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
WRONG = [  # router, D, E, options, what the message says
    ("tokens", 4, 3, {}, f"unknown router 'tokens'; known: {', '.join(ROUTERS)}"),
    ("hash", 4, 3, dict(noise_std=1), "router hash has no option noise_std; it has top_k, capacity_factor, num_keys"),
    ("token_choice", 4, 3, dict(slots=1), f"no option slots; it has {', '.join(ROUTERS['token_choice'].defaults)}"),
    ("expert_choice", 4, 3, dict(combine="plan"), "no option combine"),
    ("token_choice", 4, 3, dict(priority="last"), "priority must be one of token, choice, gate, got priority='last'"),
    ("sinkhorn_token_choice", 4, 3, dict(combine="both"), "combine must be one of softmax, plan, got combine='both'"),
    ("sparse_expert_choice", 4, 3, dict(iterations=0), "iterations must be a whole number >= 1, got iterations=0"),
    ("soft", 4, 3, dict(slots=0), "slots must be a whole number >= 1, got slots=0"),
    ("hash", 4, 3, dict(num_keys=0), "num_keys must be a whole number >= 1, got num_keys=0"),
    ("token_choice", 4, 3, dict(renormalize=True), "renormalize needs top_k >= 2 (the only gate would always be 1), got top_k=1"),
    ("token_choice", 4, 3, dict(bias_rate=-1), "bias_rate must be a number >= 0, got bias_rate=-1"),
    *[(name, 4, E, options, message) for name in WEIGHED for E, options, message in [
        (3, dict(weights="fixed"), "weights must be one of learned, frozen, random, self, got weights='fixed'"),
        (3, dict(gate="cubic"), "gate must be one of linear, mlp, got gate='cubic'"),
        (5, dict(weights="self"), "weights='self' needs num_experts <= dim=4, got num_experts=5")]],
    *[(name, dim, E, options, message) for name in ROUTERS for dim, E, options, message in [
        (4, 0, {}, "num_experts must be a whole number >= 1, got num_experts=0"),
        (0, 3, {}, "dim must be a whole number >= 1, got dim=0"),
        (4, 3, dict(top_k=0), "top_k must be a whole number >= 1, got top_k=0"),
        (4, 3, dict(top_k=1.5), "top_k must be a whole number >= 1, got top_k=1.5"),
        (4, 3, dict(top_k=4), "top_k must be at most num_experts=3, got top_k=4")]],
    *[(name, 4, 3, dict(capacity_factor=factor), f"capacity_factor must be a positive number, got capacity_factor={factor}")
      for name in ROUTERS for factor in (0, -1.0, math.inf, math.nan)],
    *[(name, 4, 3, dict(capacity_factor=None), "capacity_factor=None (dropless) is for routers in which tokens choose")
      for name in ROUTERS if name not in TOKENS_CHOOSE],
    *[(name, 4, 3, dict(noise_std=std), f"noise_std must be a number >= 0, got noise_std={std}")
      for name in NOISY for std in (-1, math.nan)],
]


@pytest.mark.parametrize("name, dim, num_experts, options, message", WRONG)
def test_a_wrong_option_is_a_valueerror_that_names_the_rule(name, dim, num_experts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_router(name, dim, num_experts, **options)


@pytest.mark.parametrize("shape", [(5, 4), (1, 2, 5, 4), (2, 5, 3)])
@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_of_a_wrong_shape_are_a_valueerror(name, shape):
    with pytest.raises(ValueError, match=re.escape(f"needs tokens [G, T, 4], got {list(shape)}")):
        build_router(name, 4, 3)(torch.zeros(shape))


def test_keys_of_a_wrong_shape_an_empty_group_and_a_wrong_start_are_valueerrors():
    with pytest.raises(ValueError, match=re.escape("key must be [G, T] = [2, 5], got [5]")):
        build_router("hash", 4, 3)(torch.zeros(2, 5, 4), torch.arange(5))
    with pytest.raises(ValueError, match="a group needs at least 1 token, got 0"):
        build_router("expert_choice", 4, 3)(torch.zeros(2, 0, 4))
    with pytest.raises(ValueError, match="init must be one of independent, identical, got 'zero'"):
        Experts(2, 3, 4, init="zero")


# ---------------------------------------------------------------- what a router remembers
@each(noise_std=[1.0], bias_rate=[0.1], weights=["learned", "random"])
def test_a_training_pass_changes_no_buffer_and_no_weight(name, options):
    x = draw(2, 12, 6)
    moe = layer(name, x, 4, **options).train()
    before = copy.deepcopy(moe.state_dict())
    moe(x)[0].sum().backward()
    assert [key for key, tensor in moe.state_dict().items() if not torch.equal(tensor, before[key])] == []


@each(WEIGHED, weights=["frozen"], gate=["linear", "mlp"])
def test_a_frozen_router_stands_still_while_experts_learn(name, options):
    x = draw(2, 12, 6)
    moe = layer(name, x, 4, **options)
    before, (y, routing) = copy.deepcopy(moe.state_dict()), moe(x)
    y.square().sum().backward()
    torch.optim.SGD(moe.parameters(), 0.1).step()
    moe.router.update([routing])
    moves = {key for key, tensor in moe.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moves - {"router.threshold", "router.updates"} == {"experts.w1", "experts.b1", "experts.w2", "experts.b2"}
    assert all(weight.grad is None for weight in moe.router.parameters())


@each(WEIGHED, weights=["random"], gate=["linear", "mlp"])
def test_a_random_router_is_drawn_anew_by_each_update_for_training_alone(name, options):
    x = draw(2, 12, 6)
    router = layer(name, x, 4, **options).router
    trained, fixed = [router.train()(x).logits], [router.eval()(x).logits]
    for key in 1, 2, 1:
        router.update([router(x)], seeded(key))
        trained.append(router.train()(x).logits)
        fixed.append(router.eval()(x).logits)
    assert all(torch.equal(logits, fixed[0]) for logits in fixed) and torch.equal(trained[1], trained[3])
    assert not torch.equal(trained[0], trained[1]) and not torch.equal(trained[1], trained[2])
    assert not any(weight.requires_grad for weight in router.parameters())


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


@each(weights=["learned", "random"], bias_rate=[0.1])
def test_a_fresh_layer_takes_over_the_state_of_a_used_one(name, options):
    x = draw(2, 12, 6)
    moe, fresh = layer(name, x, 4, **options), MoE(build_router(name, 6, 4, **options), hidden=7).double()
    moe.router.update([moe(x)[1]], seeded(0))
    fresh.load_state_dict(moe.state_dict())
    assert torch.equal(fresh(x)[0], moe(x)[0]) and torch.equal(fresh.eval()(x)[0], moe.eval()(x)[0])


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
    assert first(torch.tensor([[10, 11, 13, 103]])).tolist() == [[2, 3, 1, 3]]  # not in the table: key mod E
    x = draw(2, 12, 6)
    assert torch.equal(router(x).index, router(x, torch.arange(12).expand(2, 12)).index)
    assert len({tuple(build_router("hash", 6, 4).table[:40].tolist()) for _ in range(3)}) == 3  # a table of its own each


def test_a_seed_is_a_matter_of_its_key_alone():
    one, again, step, purpose = (torch.rand(4, generator=seeded(*key)).tolist()
                                 for key in [(0, 1, "noise"), (0, 1, "noise"), (0, 2, "noise"), (0, 1, "batch")])
    assert one == again and one != step and one != purpose and step != purpose


# ---------------------------------------------------------------- where a mixture is something simpler
@pytest.mark.parametrize("E", [1, 4])
@each([name for name in SLOW if name in HARD], capacity_factor=[1.0, None])
def test_all_experts_for_all_tokens_are_the_dense_mixture_and_a_single_one_the_dense_ffn(name, options, E):
    x = draw(2, 7, 6).requires_grad_()
    moe = layer(name, x, E, top_k=E, **options)
    if name == "expert_threshold":
        moe.router.threshold.zero_()  # everyone passes
    gates = moe.router(x).logits.softmax(-1) if name in WEIGHED else torch.full((2, 7, E), 1 / E).double()
    ffns = [slow_expert(moe.experts, e, x) for e in range(E)]
    want = ffns[0] if E == 1 else sum(gates[..., e, None] * ffns[e] for e in range(E))
    alike(draw(2, 7, 6, seed=1), [x, *moe.parameters()], [moe(x)[0]], [want])


@each(HARD, top_k=[2], capacity_factor=[0.5])
def test_identical_experts_give_one_ffn_times_the_sum_of_the_kept_gates(name, options):
    x = draw(2, 14, 6)
    moe = layer(name, x, 4, init="identical", **options)
    y, routing = moe(x)
    same(y, routing.mass().sum(-1, keepdim=True) * slow_expert(moe.experts, 0, x))
    assert all(torch.equal(weight[0], weight[3]) for weight in moe.experts.parameters())
    assert not any(torch.equal(weight[0], weight[1]) for weight in layer(name, x, 4, **options).experts.parameters())


# ---------------------------------------------------------------- train.py and moe_vision.py
SMALL = "--dim 16 --depth 2 --heads 2 --hidden 32 --experts 4 --patch 8 --batch-size 8 --steps 3 --log-every 1".split()


def run(*flags):
    return train.main([str(flag) for flag in flags])


def refused(capsys, *flags):
    """What the one line of an error says; status 2, and no traceback."""
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("train.py: error: ")
    return said[-1]


def weights_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def write_cifar(folder, files=("data_batch_1.bin", "test_batch.bin"), count=40, label=lambda i: i % 10, fine=False):
    """A folder in the CIFAR layout whose pixels are random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
    for file in files:
        rows = [bytes([0] * fine + [label(i)]) + row.tobytes() for i, row in enumerate(pixels)]
        (folder / file).write_bytes(b"".join(rows))
    return pixels


def write_npz(path, **changed):
    x, y = np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 4
    arrays = dict(x_train=x, y_train=y, x_test=x, y_test=y) | changed
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_one_seed_gives_the_same_run_bit_for_bit_and_eval_repeats_it(tmp_path, capsys):
    for name in ("a", "b"):
        assert run(*SMALL, "--router", "token_choice", "--out", tmp_path / name) == 0
    table = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 3, 3] and {"loss", "importance", "load", "blocks"} <= set(lines[0])
    assert [line.get("split") for line in lines[3:]] == ["validation", "test", "test_dropless"]
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["test"] == {k: v for k, v in lines[4].items() if k not in ("step", "split")}
    assert run("--eval", tmp_path / "b") == 0
    assert capsys.readouterr().out.splitlines()[-1] == table


def test_another_seed_gives_other_data_and_weights(tmp_path):
    runs = [train.build(train.parse([*SMALL, "--seed", seed, "--moe-blocks", "1"])[1]) for seed in ("0", "1")]
    (_, _, data, model, _), (_, _, other_data, other_model, _) = runs
    assert not torch.equal(data.batch(0)["image"], other_data.batch(0)["image"])
    assert not torch.equal(model.embed.weight, other_model.embed.weight)


@pytest.mark.parametrize("flags, rule", [
    ("--router expert", "unknown router 'expert'; known: dense, token_choice"), ("--top-k 9", "top_k must be at most num_experts=8, got top_k=9"),
    ("--router dense --top-k 9", "--top-k must be at most --experts 8, got 9"),
    ("--experts 0", "--experts: must be a whole number >= 1, got 0"), ("--experts x", "--experts: invalid whole number value: 'x'"),
    ("--capacity-factor 0", "must be a positive number, got 0"), ("--capacity-factor -1", "must be a positive number, got -1"),
    ("--capacity-factor nan", "must be a positive number, got nan"), ("--capacity-factor much", "invalid number value: 'much'"),
    ("--capacity-factor none", "capacity_factor=None (dropless) is for routers in which tokens choose"),
    ("--heads 3", "--heads must divide --dim, got --heads 3 and --dim 64"), ("--patch 5", "--patch must divide the image size, got --patch 5"),
    ("--router soft --priority gate", "--priority is no option of --router soft; it has"),
    ("--router dense --capacity-factor 2", "--capacity-factor is no option of --router dense"),
    ("--slots 2", "--slots is no option of --router expert_choice"), ("--router hash --router-weights frozen", "--router-weights is no option"),
    ("--balance switch", "--router expert_choice offers no balance loss; it offers z"), ("--balance bias", "--balance bias is for routers in which"),
    ("--router hash --z-loss 1", "offers no z loss"), ("--data nowhere", "no such data: nowhere"), ("--steps 0", "must be a whole number >= 1, got 0"),
    ("--steps 1.5", "--steps: invalid whole number value: '1.5'"), ("--lr 0", "must be a positive number, got 0"),
    ("--lr -1", "must be a positive number, got -1"), ("--lr inf", "must be a positive number, got inf"), ("--lr fast", "invalid number value: 'fast'"),
    ("--moe-blocks 4", "--moe-blocks must name blocks from 0 to 3, got [4]"), ("--moe-blocks a", "--moe-blocks: invalid list such as 1,3 value"),
    ("--grad-accum 3", "--grad-accum must divide --batch-size 128, got 3"), ("--warmup 1", "must be a share from 0 up to 1"),
    ("--router token_choice --renormalize", "renormalize needs top_k >= 2"), ("--size huge", "argument --size: invalid choice: 'huge'"),
    ("--eval nowhere", "nowhere is no finished run: config.json is missing"), ("--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
    ("--router token_choice --noise-std -1", "must be a number >= 0, got -1")])
def test_a_wrong_flag_gets_one_line_that_names_the_rule_and_the_value(flags, rule, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rule in refused(capsys, *flags.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(capsys):
    assert "--device cuda: this machine has none; there is cpu" in refused(capsys, "--device", "cuda")


def test_a_run_folder_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, *SMALL, "--out", tmp_path / "file")
    assert "is not empty; choose another or say --overwrite" in refused(capsys, *SMALL, "--out", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_broken_image_files_are_refused(tmp_path, capsys):
    def said(data, *flags):
        return refused(capsys, *SMALL, "--data", data, *flags)

    (tmp_path / "empty").mkdir()
    assert "lacks train.bin; it needs data_batch_*.bin and test_batch.bin, or" in said(tmp_path / "empty")
    write_cifar(tmp_path / "half")
    file = tmp_path / "half/data_batch_1.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert "not a whole number of records of 3073 bytes" in said(tmp_path / "half")
    file.write_bytes(b"")
    assert "holds 0 bytes" in said(tmp_path / "half")
    write_cifar(tmp_path / "labels", label=lambda i: 10 if i == 7 else 1)
    assert "has a label 10; labels of this layout are below 10" in said(tmp_path / "labels")
    write_cifar(tmp_path / "few")
    assert "--batch-size 99 is larger than the data: 36 training images" in said(tmp_path / "few", "--batch-size", "99")
    npz = tmp_path / "x.npz"
    assert "lacks y_test" in said(write_npz(npz, y_test=None))
    assert "x_train must be square uint8 images [N, S, S, 3], got float32" in said(write_npz(npz, x_train=np.zeros((20, 16, 16, 3), np.float32)))
    assert "y_train must be 20 whole numbers, got float64" in said(write_npz(npz, y_train=np.zeros(20)))
    assert "labels out of range: 0 to 4, but training knows 0 to 3" in said(write_npz(npz, y_test=np.arange(20) % 5))
    assert "labels out of range: -1" in said(write_npz(npz, y_train=np.arange(20) % 5 - 1))
    npz.write_bytes(npz.read_bytes()[:-50])
    assert "cannot read" in said(npz)


def test_a_pickle_inside_an_npz_is_not_opened(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = write_npz(tmp_path / "x.npz", y_train=np.array([Bomb()], object))
    assert "allow_pickle" in refused(capsys, *SMALL, "--data", path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("files, fine", [(("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"), False), (("train.bin", "test.bin"), True)])
def test_cifar_files_are_read_whole_and_trained_on(files, fine, tmp_path):
    pixels = write_cifar(tmp_path / "data", files, fine=fine, label=lambda i: i % 7)
    images, labels, classes = moe_vision.read_cifar([tmp_path / "data" / file for file in files[:-1]])
    assert classes == (100 if fine else 10) and len(images) == 40 * (len(files) - 1)
    assert (images[:40].reshape(40, -1) == pixels).all() and (labels[:40] == np.arange(40) % 7).all()
    assert run(*SMALL, "--data", tmp_path / "data", "--out", tmp_path / "run") == 0


def test_the_validation_split_is_a_tenth_and_apart_from_training_and_test(tmp_path):
    write_cifar(tmp_path, count=50)
    (tmp_path / "test_batch.bin").write_bytes(b"\1" + b"\7" * 3072)
    data = moe_vision.load_data(SimpleNamespace(data=str(tmp_path), few_shot=False, seed=0, batch_size=4, patch=4), "cpu")
    sizes = {name: len(labels) for name, (_, labels) in data.parts.items()}
    assert sizes == {"train": 45, "validation": 5, "test": 1}
    both = torch.cat([data.parts["train"][0], data.parts["validation"][0]]).flatten(1)
    assert len(both.unique(dim=0)) == 50


def test_an_epoch_of_stored_images_meets_each_once_cropped_or_flipped_on_its_own(tmp_path):
    count = 40
    write_cifar(tmp_path, count=count, label=lambda i: i % 10)
    data = moe_vision.load_data(SimpleNamespace(data=str(tmp_path), few_shot=False, seed=0, batch_size=9, patch=4), "cpu")
    data.parts["train"] = data.parts["train"][0], torch.arange(36)  # name each image by its number
    seen = torch.cat([data.batch(step)["label"] for step in range(4)])
    assert seen.sort().values.tolist() == list(range(36))
    whole, part = data.batch(2), data.batch(2, part=slice(3, 7))
    assert torch.equal(whole["image"][3:7], part["image"]) and torch.equal(whole["label"][3:7], part["label"])
    original = data.ready(*data.parts["train"])["image"]
    for image, label in zip(whole["image"], whole["label"]):
        padded = F.pad(data.parts["train"][0][label], (4,) * 4)
        crops = torch.stack([padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)])
        crops = data.ready(torch.cat([crops, crops.flip(-1)]), torch.zeros(162))["image"]
        assert (crops == image).flatten(1).all(1).any()
    assert not torch.equal(whole["image"], original[whole["label"]])


def test_few_shot_on_files_keeps_the_last_fifth_of_the_classes_from_training(tmp_path):
    write_cifar(tmp_path, count=200)
    args = SimpleNamespace(data=str(tmp_path), few_shot=True, seed=0, batch_size=4, patch=4)
    data = moe_vision.load_data(args, "cpu")
    assert all((labels < 8).all() for _, labels in data.parts.values()) and list(data.few_shot_classes) == [8, 9]
    (_, support), (_, query) = data.probe(0)
    assert support.bincount().tolist() == [10, 10] and len(query) == 80 - 20


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve an archive on 127.0.0.1 as CIFAR-10; served(bytes, md5, length) sets what comes."""
    answer = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(answer["length"]))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *_):
            pass

    def serve(body, md5=None, length=None):
        answer.update(body=body, length=length or len(body))
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setitem(moe_vision.OFFICIAL, "cifar10", (url, md5 or hashlib.md5(body).hexdigest()))

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    yield serve
    server.shutdown()
    server.server_close()


def archive(folder, *extra):
    write_cifar(folder, count=20)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, f"cifar-10-batches-bin/{file.name}")
        for name in extra:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("cifar-10-batches-bin/link.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return packed.getvalue()


def test_the_official_archive_is_fetched_once_checked_and_unpacked_inside_its_folder(served, tmp_path):
    served(archive(tmp_path / "source", "../../escaped.bin", "/absolute.bin"))
    folder = moe_vision.download("cifar10")
    assert {file.name for file in folder.iterdir()} == {"data_batch_1.bin", "test_batch.bin", "escaped.bin", "absolute.bin"}
    assert {file.name for file in tmp_path.iterdir()} == {"data", "source"} and [f.name for f in (tmp_path / "data").iterdir()] == ["cifar10"]
    served(b"not fetched again")
    assert moe_vision.download("cifar10") == folder and run(*SMALL, "--data", "cifar10", "--out", "run") == 0


def test_a_wrong_sum_or_half_a_download_is_deleted_and_reported(served, tmp_path, capsys):
    body = archive(tmp_path / "source")
    served(body, md5="0" * 32)
    assert f"has md5 {hashlib.md5(body).hexdigest()}, not {'0' * 32}; the download was deleted" in refused(capsys, "--data", "cifar10")
    served(body, length=len(body) + 100)
    assert "was deleted" in refused(capsys, "--data", "cifar10") or "cannot fetch" in refused(capsys, "--data", "cifar10")
    assert not list((tmp_path / "data").iterdir())


def test_drawn_images_hold_what_their_labels_and_patch_maps_say():
    data = moe_vision.Drawn(SimpleNamespace(seed=0, batch_size=64, patch=4), "cpu")
    batch = data.batch(3)
    assert [list(batch[name].shape) for name in ("image", "label", "kind", "pair")] == [[64, 3, 32, 32], [64], [64, 64], [64, 2]]
    assert [moe_vision.TRAINED[label] for label in batch["label"]] == [tuple(pair) for pair in batch["pair"].tolist()]
    assert not set(moe_vision.TRAINED) & set(moe_vision.HELD_OUT) and len(moe_vision.PAIRS) == 24
    assert {s for s, _ in moe_vision.TRAINED} == set(range(6)) and {t for _, t in moe_vision.TRAINED} == set(range(4))
    brightness = F.avg_pool2d(batch["image"].mean(1, keepdim=True), 4).flatten(1)
    ground = [brightness[i][batch["kind"][i] == 0].mean() for i in range(64)]
    inside = [brightness[i][batch["kind"][i] == 2].mean() for i in range(64) if (batch["kind"][i] == 2).any()]
    assert sum(inside) / len(inside) > sum(ground) / 64 + 1  # the shape is brighter, so the map lies where the shape is
    part = data.batch(3, part=slice(10, 20))
    assert all(torch.equal(part[name], batch[name][10:20]) for name in batch)
    assert not torch.equal(batch["image"], data.batch(4)["image"])


def test_the_patch_map_is_the_share_of_shape_in_each_patch():
    data = moe_vision.Drawn(SimpleNamespace(seed=0, batch_size=1, patch=4), "cpu")
    number = torch.full((1, 12), 0.5)
    number[:, 6:9], number[:, 9:] = 0.0, 1.0  # black ground, white shape
    square = list(moe_vision.SHAPES).index("square")
    drawn = data.render(torch.tensor([[square, 0]]), torch.tensor([0]), number, torch.zeros(1, 1, 32, 32))
    shape = (drawn["image"][0, 0] > -2).view(8, 4, 8, 4).float().mean((1, 3))  # [8, 8] patches; black is (0 - 0.5) * 4
    assert torch.equal(drawn["kind"].view(8, 8), (shape > 0).long() + (shape == 1).long()) and set(drawn["kind"].flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("router", ["dense", "expert_choice", "soft"])
def test_gflops_are_the_forward_products_of_one_image(router):
    _, args = train.parse([*SMALL, "--router", router, "--top-k", "2"])
    train.check(args)
    D, H, T, E, out = 16, 32, 16, 4, 18
    block = T * D * 3 * D + 2 * T * T * D + T * D * D  # qkv, the two attention products, the projection
    mixing = {"dense": 0, "expert_choice": T * D * E, "soft": 3 * T * D * 2 * T}[router]  # gate; phi, dispatch and combine
    products = T * 3 * 64 * D + 2 * block + T * 2 * D * H + 2 * T * 2 * D * H + mixing + D * out
    assert train.build(args)[-1] == pytest.approx(2 * products / 1e9, rel=1e-9)


def test_active_parameters_leave_out_the_experts_a_token_does_not_meet():
    _, args = train.parse([*SMALL, "--router", "token_choice"])
    train.check(args)
    model = train.build(args)[3]
    total, active = train.parameters(model)
    assert total == sum(p.numel() for p in model.parameters()) and total - active == 0.75 * 4 * (2 * 16 * 32 + 16 + 32)


def test_no_decay_on_norms_biases_positions_and_routers():
    _, args = train.parse([*SMALL, "--router", "token_choice"])
    train.check(args)
    model = train.build(args)[3]
    decayed, free = (group["params"] for group in train.make_optimizer(args, model, torch.device("cpu")).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(names) == len(decayed) + len(free)
    assert all(any(word in names[id(p)] for word in ("norm", "bias", "position", "router", ".b1", ".b2")) for p in free)
    assert not any(any(word in names[id(p)] for word in ("norm", "bias", "position", "router", ".b1", ".b2")) for p in decayed)


def test_a_batch_in_parts_takes_the_step_of_the_whole_batch():
    moved = []
    for parts in ("1", "4"):
        _, args = train.parse([*SMALL, "--router", "token_choice", "--noise-std", "0", "--balance", "switch", "--grad-accum", parts])
        train.check(args)
        device, task, data, model, _ = train.build(args)
        model, optimizer = model.double(), train.make_optimizer(args, model, device)
        batch = data.batch
        data.batch = lambda step, part: {k: v.double() if v.is_floating_point() else v for k, v in batch(step, part=part).items()}
        logged, _ = train.train_step(args, task, model, optimizer, data, 0, device)
        moved.append([float(logged[name]) for name in ("loss", "balance", "top1", "grad_norm")] + [torch.cat([p.flatten() for p in model.parameters()])])
    assert moved[0][:4] == pytest.approx(moved[1][:4], rel=1e-9) and torch.allclose(moved[0][4], moved[1][4], atol=1e-7)


def test_the_balance_weight_reaches_the_router_gradient():
    slopes = []
    for weight in ("0", "0.5"):
        _, args = train.parse([*SMALL, "--router", "token_choice", "--balance", "switch", "--balance-weight", weight, "--clip", "1e9"])
        train.check(args)
        device, task, data, model, _ = train.build(args)
        kept = []
        train.moes(model)[0].router.gate.weight.register_hook(kept.append)
        train.train_step(args, task, model, train.make_optimizer(args, model, device), data, 0, device)
        slopes.append(kept[0])
    assert (slopes[0] - slopes[1]).abs().max() > 1e-4


def test_ctrl_c_says_how_far_it_came_and_keeps_the_weights(tmp_path, capsys, monkeypatch):
    step = train.train_step

    def interrupted(args, task, model, optimizer, data, number, device):
        if number == 2:
            raise KeyboardInterrupt
        return step(args, task, model, optimizer, data, number, device)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(*SMALL, "--out", tmp_path / "run") == 130
    assert "interrupted after 2 of 3 steps; weights so far are in" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2 and not (tmp_path / "run/summary.json").exists()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert "is no finished run: summary.json is missing" in refused(capsys, "--eval", tmp_path / "run")


def test_the_ridge_probe_picks_its_penalty_by_leaving_one_out():
    x, z, rule = draw(24, 5), draw(200, 5, seed=1), draw(5, 3, seed=2)
    y, truth = (x @ rule).argmax(1), (z @ rule).argmax(1)
    mean, std = x.mean(0), x.std(0) + 1e-5
    a, b = (torch.cat([(f - mean) / std, torch.full((len(f), 1), 100.0)], 1) for f in (x, z))
    targets = F.one_hot(y).double() * 2 - 1
    solve = lambda rows, penalty: torch.linalg.solve(a[rows].T @ a[rows] + penalty * torch.eye(6), a[rows].T @ targets[rows])
    error = lambda penalty: sum(((a[i] @ solve([j for j in range(24) if j != i], penalty) - targets[i]) ** 2).sum() for i in range(24))
    best = min((2.0**i for i in range(-10, 20)), key=error)
    expected = ((b @ solve(list(range(24)), best)).argmax(1) == truth).double().mean().item()
    assert moe_vision.ridge_accuracy((x, y), (z, truth)) == pytest.approx(expected) and 0.5 < expected < 1


def test_readme_counts_the_lines_of_code_of_each_router_and_names_them_all():
    def lines(*parts):
        """Lines of code, without docstrings, comments and blanks."""
        trees = [ast.parse(inspect.getsource(part)) for part in parts]
        for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))):
            node.body = node.body[bool(ast.get_docstring(node)):]
        return sum(len({at for node in ast.walk(tree) if hasattr(node, "lineno") for at in range(node.lineno, node.end_lineno + 1)
                        if not isinstance(node, (ast.ClassDef, ast.FunctionDef))} | {node.lineno for node in ast.walk(tree) if
                        isinstance(node, (ast.ClassDef, ast.FunctionDef))}) for tree in trees)

    parts = {"token_choice": [routers.TokenChoice], "expert_choice": [routers.ExpertChoice], "soft": [routers.Soft], "hash": [routers.Hash],
             "expert_threshold": [routers.ExpertThreshold]}
    for who in ("token", "expert"):
        parts |= {f"sinkhorn_{who}_choice": [routers.Sinkhorn, sinkhorn_plan], f"sparse_{who}_choice": [routers.Sparse, sparse_plan, project]}
    text = (pathlib.Path(__file__).parent / "README.md").read_text()
    said = {name: int(count) for name, count in re.findall(r"^\| `(\w+)` \|.*\| \+?(\d+) \|$", text, re.M)}
    assert said == {name: lines(*of) for name, of in parts.items()} and (len(said) == 9) and set(said) <= set(ROUTERS)


def test_readme_adds_a_router_that_flags_and_these_tests_pick_up(tmp_path):
    root = pathlib.Path(__file__).parent
    block = re.search(r"```python\n(class .*?ROUTERS\[\"(\w+)\"\].*?)```", (root / "README.md").read_text(), re.S)
    assert len(block[1].splitlines()) <= 15
    for name in ("moe_vision.py", "train.py", "test_routers.py", "README.md"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "routers.py").write_text((root / "routers.py").read_text() + "\n\n" + block[1])
    python = lambda *words: subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=170)
    tests = python("-m", "pytest", "-q", "test_routers.py", "-k", f"{block[2]} and not readme")
    assert tests.returncode == 0 and int(re.search(r"(\d+) passed", tests.stdout)[1]) >= 20, tests.stdout[-2000:]
    option = re.search(r"dict\((\w+)=", block[1])[1]
    trained = python("train.py", *SMALL, "--steps", "2", "--router", block[2], f"--{option}", "0.5", "--out", "run")
    assert trained.returncode == 0 and block[2] in trained.stdout.splitlines()[-1], trained.stderr[-2000:]

"""Mixture-of-experts routers behind one formulation: a dispatch tensor and a combine tensor.

Axes, the same letters in every file: G groups that are routed independently (an image, a sequence), T tokens in a
group, D width, E experts, C slots (the capacity) of one expert in one group, K choices of one token.

    slots[g,e,c] = sum_t      dispatch[g,t,e,c] * x[g,t]                      what enters each slot
    y[g,t]       = sum_{e,c}  combine[g,t,e,c]  * expert_e(slots[g,e,c])      what comes back

A router is a way to fill these two tensors. All but Soft MoE and hash answer two small questions: how scores are made
(softmax, Sinkhorn plan, sparse plan), and who chooses by them (tokens choose experts, or experts choose tokens).
2401.15969 (Routers in Vision Mixture of Experts) compares TokenChoice, its Sinkhorn twin, the three expert choices and
Soft. "As published" below means the code in google-research/vmoe at commit 942a78b.

A hard routing is an index in truth (which token sits in slot [g,e,c]) and a gate per slot: dispatch is a gather,
combine a weighted scatter, and nothing has size T^2. The tensors stay the definition; test_routers.py holds both
forms equal. Left out: experts spread over machines, and padding masks. To add a router: a class, a line in ROUTERS.
"""
import copy
import hashlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin


# ---------------------------------------------------------------- the formulation
class Routing:
    """What a router decided: dispatch and combine [G, T, E, C], and beside them load [E], the share of all assignments
    that went to each expert before drops; losses {name: scalar}, unweighted; `extras` (logits, ...) as attributes."""

    def __init__(self, dispatch, combine, load, losses=None, **extras):
        self._tensors, self.load, self.losses = (dispatch, combine), load, losses or {}
        self.__dict__.update(extras)

    def tensors(self):
        """dispatch and combine, both [G, T, E, C]: the definition, for reading and testing."""
        return self._tensors

    def dispatch(self, x):
        """Slots [G, E, C, D] that the experts read, from tokens x [G, T, D]."""
        dispatch = self.tensors()[0].to(x.dtype)
        return torch.einsum("gts,gtd->gsd", dispatch.flatten(2), x).unflatten(1, dispatch.shape[2:])  # s: all slots (e, c)

    def combine(self, y):
        """Tokens [G, T, D], from what the experts wrote, y [G, E, C, D]."""
        return torch.einsum("gts,gsd->gtd", self.tensors()[1].to(y.dtype).flatten(2), y.flatten(1, 2))

    def run(self, x, experts):
        """The two equations: dispatch, let the experts work, combine; x [G, T, D] -> y [G, T, D]."""
        return self.combine(experts(self.dispatch(x)))

    def mass(self):
        """Combine weight that each token gives each expert, [G, T, E]."""
        return self.tensors()[1].sum(-1)

    def counts(self):
        """How many slots each token sits in, [G, T]; 0 means dropped. Every token is in every soft slot."""
        return (self.tensors()[0] != 0).sum((2, 3))


class HardRouting(Routing):
    """One token, or none, in a slot: index [G, E, C] names it, T where empty; gate [G, E, C] is its combine weight.

    Slots lie expert by expert in memory, so that one batched product over E reads them without a copy. A ragged routing
    (dropless: few experts fill the largest load) is run on its filled slots alone.
    """

    def __init__(self, index, gate, tokens, load, losses=None, ragged=False, **extras):
        super().__init__(None, None, load, losses, index=index, gate=gate, tokens=tokens, ragged=ragged, **extras)
        start = torch.arange(len(index), device=index.device)[:, None, None] * tokens
        self._rows = (index.clamp(max=tokens - 1) + start).transpose(0, 1).flatten()  # [E*G*C] rows of x as [G*T, D]

    def tensors(self):
        dispatch = F.one_hot(self.index, self.tokens + 1)[..., :-1].permute(0, 3, 1, 2).to(self.gate.dtype)  # [G, T, E, C]
        return dispatch, dispatch * self.gate[:, None]

    def gather(self, x):
        """Slots as dispatch has them, but with some token in the empty ones: whatever comes of it, their gate is 0."""
        G, E, C = self.index.shape
        return x.reshape(-1, x.shape[-1]).index_select(0, self._rows).view(E, G, C, -1).transpose(0, 1)  # [G, E, C, D]

    def dispatch(self, x):
        return self.gather(x).masked_fill((self.index == self.tokens)[..., None], 0)

    def combine(self, y):
        G, E, C, D = y.shape
        weighted = y.transpose(0, 1) * self.gate.transpose(0, 1)[..., None].to(y.dtype)  # [E, G, C, D]
        return y.new_zeros(G * self.tokens, D).index_add_(0, self._rows, weighted.reshape(-1, D)).view(G, -1, D)

    def run(self, x, experts):
        if not self.ragged:
            return self.combine(experts(self.gather(x)))
        filled = (self.index < self.tokens).transpose(0, 1).flatten().nonzero().flatten()  # [N], expert by expert
        rows, gate = self._rows[filled], self.gate.transpose(0, 1).reshape(-1, 1)[filled]
        counts = (self.index < self.tokens).sum((0, 2)).tolist()
        y = experts.ragged(x.flatten(0, 1).index_select(0, rows), counts)  # [N, D]
        return y.new_zeros(x.shape).flatten(0, 1).index_add_(0, rows, y * gate.to(y.dtype)).view_as(x)

    def _scatter(self, values):
        G, E, _ = self.index.shape
        return values.new_zeros(G, E, self.tokens + 1).scatter_add(2, self.index, values)[..., :-1].mT  # [G, T, E]

    def mass(self):
        return self._scatter(self.gate)

    def counts(self):
        return self._scatter(torch.ones_like(self.index)).sum(-1)


def top(scores, k, dim):
    """Indices of the k largest along dim, falling, the lower index first among equals (torch.topk promises no order)."""
    if k == 1:
        return scores.argmax(dim, keepdim=True)
    if scores.device.type == "cpu" and k < scores.shape[dim] and not torch.compiler.is_compiling():
        value, index = scores.topk(k + 1, dim)
        if (value.diff(dim=dim) < 0).all():  # no equals: a quarter of the sort's time
            return index.narrow(dim, 0, k)
    return scores.sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)


def queue(wants, capacity):
    """Each expert takes the first `capacity` (None: all) who want it, of N candidates in line; wants [G, N, E] bool.

    Returns the candidate's number for each slot, [G, E, C], N where empty.
    """
    place = wants.cumsum(1, dtype=torch.int32).mT.contiguous()  # [G, E, N], how many want e up to here
    C = capacity or max(1, int(place[..., -1].max()))
    nth = torch.arange(1, C + 1, dtype=torch.int32, device=wants.device).repeat(*place.shape[:2], 1)
    return torch.searchsorted(place, nth)  # the first candidate by whom there are c


# ---------------------------------------------------------------- how scores are made
def sinkhorn_plan(logits, iterations=20):
    """Entropic optimal transport of tokens to experts: argmin_P <P, -logits> + sum P log P, rows 1, columns T/E.

    logits [G, T, E] -> plan [G, T, E] (S-BASE 2202.01169). Tokens are scaled last, so rows are exact and columns nearly
    so. Differs from the published code: in the log domain, so that no logits overflow; its gradient is the unrolled loop's.
    """
    G, T, E = logits.shape
    u = logits.new_zeros(G, T, 1)
    for _ in range(iterations):
        v = math.log(T / E) - (logits + u).logsumexp(1, keepdim=True)  # [G, 1, E] experts
        u = -(logits + v).logsumexp(2, keepdim=True)  # [G, T, 1] tokens
    return (logits + u + v).exp()


def project(z, k):
    """Each column z[g, :, e] of [G, T, E] projected on the simplex with at most k non-zeros: its k largest less a threshold."""
    value = z.topk(min(k, z.shape[1]), dim=1).values  # [G, k, E], falling
    excess = (value.cumsum(1) - 1) / torch.arange(1, value.shape[1] + 1, device=z.device, dtype=z.dtype)[:, None]
    support = (value > excess).sum(1, keepdim=True)  # [G, 1, E], at least 1
    above, level = z > value[:, -1:], z == value[:, -1:]  # of equals at the k-th place, the first ones are in
    among = above | (level & (level.cumsum(1) + above.sum(1, keepdim=True) <= k))
    return (z - excess.gather(1, support - 1)).clamp(min=0) * among


def sparse_plan(gates, k, iterations=20, lr=1e-2, column=None):
    """Optimal transport with at most k non-zeros a column: argmax_P <P, gates> - |P|^2 / 2 (2209.15466, semi-dual).

    gates [G, T, E] -> plan [G, T, E]; columns sum to `column` (T/E if None) exactly, rows to E/T of it roughly: Adam
    moves alpha, one price a row, along the excess of its sum, and a group stops once that slope's norm is below 1e-3.
    Differs: the last projection is differentiable in the gates; the published plan has no gradient at all.
    """
    G, T, E = gates.shape
    column = T / E if column is None else column
    scores, row = gates.detach(), column * E / T
    alpha = m = v = scores.new_zeros(G, T, 1)
    running = torch.ones_like(alpha[:, :1], dtype=torch.bool)
    for step in range(1, iterations + 1):
        slope = column * project((alpha + scores) / column, k).sum(2, keepdim=True) - row  # [G, T, 1]
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        move = lr * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        alpha = torch.where(running, alpha - move, alpha)
        running = running & (slope.norm(dim=1, keepdim=True) > 1e-3)
    return column * project((alpha + gates) / column, k)


# ---------------------------------------------------------------- losses: scalars, means over groups
def importance_loss(logits):
    """Squared coefficient of variation of the experts' summed gates; logits [G, T, E], clean (V-MoE 2106.05974, app. A)."""
    importance = logits.softmax(-1).sum(1)  # [G, E]
    return (importance.var(1, correction=0) / importance.mean(1) ** 2).mean()


def load_loss(logits, noisy_logits, top_k, noise_std):
    """Squared coefficient of variation of each expert's chance to be chosen under fresh noise (V-MoE, app. A).

    logits clean, noisy_logits with normal noise of deviation noise_std, both [G, T, E]. Differs from 1701.06538, as
    the published code does: the threshold is the K-th noisy logit of all experts.
    """
    threshold = noisy_logits.gather(-1, top(noisy_logits, top_k, -1)[..., -1:])  # [G, T, 1]
    chance = torch.special.ndtr((logits - threshold) / noise_std).mean(1)  # [G, E]
    return (chance.var(1, correction=0) / chance.mean(1) ** 2).mean()


def balance_loss(logits, expert_index):
    """(E/K) sum_e f_e P_e, 1 when uniform and E/K at collapse (Switch, 2101.03961, eq. 4-6, for any K).

    f_e = share of tokens with e among their choices expert_index [G, T, K], before drops; P_e = mean clean gate.
    """
    E = logits.shape[-1]
    chosen = F.one_hot(expert_index, E).sum(2).to(logits.dtype).mean(1)  # f [G, E]
    return E / expert_index.shape[-1] * (chosen * logits.softmax(-1).mean(1)).sum(1).mean()


def z_loss(logits):
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


# ---------------------------------------------------------------- routers
CHOICES = {"priority": ("token", "choice", "gate"), "combine": ("softmax", "plan"), "gate": ("linear", "mlp"),
           "weights": ("learned", "frozen", "random", "self")}
WHOLE = ("dim", "num_experts", "top_k", "iterations", "num_keys", "slots")


class Router(nn.Module):
    """Common ground: options and their rules, the gate that gives logits, and the capacity.

    A subclass says who `chooses` ("tokens", "experts", "threshold" or "soft"), lists its options with their defaults,
    and writes route(x, key) -> Routing for x [G, T, D] and key [G, T] integers (read by hash alone).
      top_k            K: a token's choices; for the other routers the budget, T*K*capacity_factor slots for all
      capacity_factor  slots bought per assignment; None = dropless, where tokens choose
      noise_std        normal noise on the logits in training, of this standard deviation over E
      weights          learned; frozen at the start; random: drawn anew each step; self: logits = x[..., :E] (2604.00801)
      gate             linear, or mlp with one hidden layer
    Raises ValueError for a value against these rules.
    """

    chooses, causal, offers, slack = "experts", False, ("z",), 1  # offers: its losses' names; slack: slots over the mean
    defaults = dict(top_k=1, capacity_factor=1.0, noise_std=0.0, weights="learned", gate="linear")

    def __init__(self, dim, num_experts, **options):
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.options = SimpleNamespace(**(self.defaults | options))
        self.check(dim=dim, num_experts=num_experts, **vars(self.options))
        self.gate = lambda x: x[..., :num_experts]  # weights="self"
        if getattr(self.options, "weights", "self") != "self":
            self.gate = nn.Linear(dim, num_experts, bias=False)
            if self.options.gate == "mlp":
                self.gate = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.GELU(), self.gate)
            self.redraw(self.gate)
            self.gate.requires_grad_(self.options.weights == "learned")
            if self.options.weights == "random":
                self.drawn = copy.deepcopy(self.gate)  # training uses this one, evaluation the fixed self.gate
        if getattr(self.options, "bias_rate", 0):
            self.register_buffer("bias", torch.zeros(num_experts))

    def check(self, **values):
        """Raise ValueError, naming rule and value, for options that no router or not this one can take."""
        def need(held, rule, name):
            if not held:
                raise ValueError(f"{rule}, got {name}={values[name]!r}")

        for name, value in values.items():
            if name in CHOICES:
                need(value in CHOICES[name], f"{name} must be one of {', '.join(CHOICES[name])}", name)
            if name in WHOLE and (name, value) != ("slots", None):
                need(type(value) is int and value >= 1, f"{name} must be a whole number >= 1", name)
            if name in ("noise_std", "bias_rate", "scale"):
                need(type(value) in (int, float) and 0 <= value < math.inf, f"{name} must be a number >= 0", name)
        E, K, cf = (values[name] for name in ("num_experts", "top_k", "capacity_factor"))
        held = type(cf) in (int, float) and 0 < cf < math.inf
        need(cf is None or held, "capacity_factor must be a positive number", "capacity_factor")
        need(held or self.chooses == "tokens", "capacity_factor=None (dropless) is for routers in which tokens choose", "capacity_factor")
        need(K <= E, f"top_k must be at most num_experts={E}", "top_k")
        need(not values.get("renormalize") or K > 1, "renormalize needs top_k >= 2 (the only gate would always be 1)", "top_k")
        need(values.get("weights") != "self" or E <= self.dim, f"weights='self' needs num_experts <= dim={self.dim}", "num_experts")
        need(values.get("weights") != "self" or values["gate"] == "linear", "weights='self' has no gate to choose", "gate")

    def redraw(self, gate, generator=None):
        """Fresh normal weights of standard deviation dim^-1/2: unit-variance logits for unit-variance tokens."""
        with torch.no_grad():
            for weight in gate.parameters():
                weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).normal_(0, self.dim**-0.5, generator=generator))

    def capacity(self, tokens):
        """Slots of one expert in a group of so many tokens: C = ceil(T*K*cf/E), at most T unless tokens choose."""
        if tokens < 1:
            raise ValueError(f"a group needs at least 1 token, got {tokens}")
        if self.options.capacity_factor is None:
            return None
        C = math.ceil(self.slack * tokens * self.options.top_k * self.options.capacity_factor / self.num_experts)
        return C if self.chooses == "tokens" else min(C, tokens)

    def logits(self, x):
        """Clean and noisy logits [G, T, E] of tokens x [G, T, D]; at least float32, whatever autocast says."""
        weights, noise_std = self.options.weights, getattr(self.options, "noise_std", 0)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            gate = self.drawn if weights == "random" and self.training else self.gate
            logits = gate(x)
            noisy = logits + torch.randn_like(logits) * (noise_std / self.num_experts) if self.training and noise_std else logits
            return logits, noisy

    def scores(self, logits, noisy):
        """What decides the routing and what weighs the outputs, both [G, T, E]; here the softmax is both."""
        gates = noisy.softmax(-1)
        return gates, gates

    def forward(self, x, key=None):
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"a router needs tokens [G, T, {self.dim}], got {list(x.shape)}")
        return self.route(x, key)

    @torch.no_grad()
    def update(self, routings, generator=None):
        """Once per optimiser step, with the step's routings: whatever no gradient moves. Nothing else moves buffers."""
        if getattr(self.options, "weights", None) == "random":
            self.redraw(self.drawn, generator)


class TokenChoice(Router):
    """Each token goes to the K experts of its largest gates, if they have a slot left (V-MoE 2106.05974, section 2).

      priority     who queues first: "token" by position, "choice" all first choices (GShard), "gate" the surest token
                   of each choice (V-MoE's batch priority, section 4)
      renormalize  divide the K kept gates by their sum (K >= 2)
      bias_rate    0, or the step u of 2408.15664: experts are chosen by gate + bias, weighed by the gate alone, and
                   update() moves the bias by u * sign(mean load - load)
    """

    chooses, offers = "tokens", ("importance", "load", "balance", "z")  # load in training with noise
    defaults = Router.defaults | dict(priority="token", renormalize=False, bias_rate=0.0)

    @property
    def causal(self):
        """In a queue by position no later token takes a seat; nor does one where nobody is dropped."""
        o = self.options
        return o.priority == "token" or o.capacity_factor is None or (o.priority == "choice" and o.top_k == 1)

    def route(self, x, key=None):
        logits, noisy = self.logits(x)
        scores, gates = self.scores(logits, noisy)
        biased = scores + self.bias if self.options.bias_rate else scores
        expert_index = top(biased, self.options.top_k, -1)  # [G, T, K]
        gate = gates.gather(-1, expert_index)
        if self.options.renormalize:
            gate = gate / gate.sum(-1, keepdim=True)
        losses = {"importance": importance_loss(logits), "balance": balance_loss(logits, expert_index), "z": z_loss(logits)}
        if noisy is not logits:
            losses["load"] = load_loss(logits, noisy, self.options.top_k, self.options.noise_std / self.num_experts)
        return self.seat(expert_index, gate, scores, losses, logits=logits)

    def seat(self, expert_index, gate, scores, losses, **extras):
        """Queue the T*K (token, choice) pairs; expert_index, gate [G, T, K]; scores [G, T, E] rank batch priority."""
        G, T, K = expert_index.shape
        rank = top(scores.amax(-1), T, -1) if self.options.priority == "gate" else torch.arange(T, device=gate.device).expand(G, T)
        pair = rank[..., None] * K + torch.arange(K, device=gate.device)  # [G, T, K], the pair's number in the flat [T*K]
        pair = (pair if self.options.priority == "token" else pair.mT).flatten(1)  # [G, T*K] in queue order
        wants = expert_index.flatten(1).gather(1, pair)[..., None] == torch.arange(self.num_experts, device=gate.device)
        C = self.capacity(T) or (T if torch.compiler.is_compiling() else None)  # a compiled graph knows no queue lengths
        place = queue(wants, C).flatten(1)  # [G, E*C]
        pair = F.pad(pair, (0, 1), value=T * K).gather(1, place)  # T*K where the slot is empty
        slot_gate = F.pad(gate.flatten(1), (0, 1)).gather(1, pair)
        shape = (G, self.num_experts, -1)
        load = wants.sum((0, 1)).to(gate.dtype) / (G * T * K)
        return HardRouting((pair // K).view(shape), slot_gate.view(shape), T, load, losses, C is None, expert_index=expert_index, **extras)

    @torch.no_grad()
    def update(self, routings, generator=None):
        super().update(routings, generator)
        if getattr(self.options, "bias_rate", 0):
            load = torch.stack([routing.load.to(self.bias) for routing in routings]).mean(0)
            self.bias += self.options.bias_rate * (1 / self.num_experts - load).sign()
            self.bias -= self.bias.mean()  # only differences choose


class ExpertChoice(Router):
    """Each expert takes the C tokens with the largest gates for it (2202.09368, section 3.2). Never causal."""

    def route(self, x, key=None):
        logits, noisy = self.logits(x)
        scores, gates = self.scores(logits, noisy)
        index = top(scores, self.capacity(x.shape[1]), 1).mT  # [G, E, C]
        load = torch.full_like(logits[0, 0], 1 / self.num_experts)
        return HardRouting(index, gates.mT.gather(2, index), x.shape[1], load, {"z": z_loss(logits)}, logits=logits)


class Sinkhorn:
    """Scores from a Sinkhorn plan of the noisy logits (S-BASE 2202.01169); outputs weighed by softmax, or by the plan."""

    causal = False  # a plan balances over all tokens
    extra, lacks = dict(iterations=20, combine="softmax"), ()

    def scores(self, logits, noisy):
        if self.options.combine == "plan":
            plan = sinkhorn_plan(noisy, self.options.iterations)
            return plan, plan
        plan = sinkhorn_plan(noisy.detach(), self.options.iterations)  # decides only: no gradient
        return plan, (logits if self.chooses == "tokens" else noisy).softmax(-1)  # clean for tokens: so it was published


class Sparse(Sinkhorn):
    """Scores from a sparse plan of the gates (2209.15466): at most C tokens an expert, or K experts a token. No noise.

    Where K = 1 a token's plan is 1 at its one expert: combine="plan" then gives the gate of token choice no gradient.
    """

    lacks = ("noise_std",)

    def scores(self, logits, noisy):
        gates, steps = logits.softmax(-1), self.options.iterations
        decides = gates if self.options.combine == "plan" else gates.detach()
        if self.chooses == "tokens":  # the same problem, experts and tokens exchanged: every token has mass 1
            plan = sparse_plan(decides.mT, self.options.top_k, steps, column=1.0).mT
        else:
            plan = sparse_plan(decides, self.capacity(gates.shape[1]), steps)
        return plan, plan if self.options.combine == "plan" else gates


def cross(scores, choice):
    """The router that chooses as one class does, by the scores that another makes."""
    defaults = {name: value for name, value in (choice.defaults | scores.extra).items() if name not in scores.lacks}
    offers = tuple(loss for loss in choice.offers if loss != "load" or "noise_std" in defaults)  # a load loss needs noise
    return type(scores.__name__ + choice.__name__, (scores, choice), {"defaults": defaults, "offers": offers, "__doc__": scores.__doc__})


class Soft(LazyModuleMixin, Router):
    """Every slot is a convex mix of all tokens, every token of all slots (Soft MoE 2308.00951, section 2). Never causal.

    phi [D, E, C] is a direction per slot; scale, learned, sharpens all mixes. It starts at 1 as published, where they are
    all but uniform: a short training does well to start it at 10. C = slots, or else round(T*K*cf/E), at least 1, for the T
    of the first call.
    """

    chooses, offers = "soft", ()
    defaults = dict(top_k=1, capacity_factor=1.0, slots=None, scale=1.0)

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        self.phi, self.scale = nn.UninitializedParameter(), nn.Parameter(torch.tensor(float(self.options.scale)))
        if self.options.slots:
            self.initialize_parameters()

    def initialize_parameters(self, x=None, key=None):
        if self.has_uninitialized_params():
            o = self.options
            C = o.slots or max(1, round(x.shape[1] * o.top_k * o.capacity_factor / self.num_experts))
            self.phi.materialize((self.dim, self.num_experts, C))
            nn.init.normal_(self.phi, std=self.dim**-0.5)

    def route(self, x, key=None):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            unit = lambda z, dim: z * (z.square().sum(dim, keepdim=True) + 1e-6).rsqrt()
            logits = torch.einsum("gtd,dec->gtec", unit(x, -1), self.scale * unit(self.phi, 0))
            dispatch = logits.softmax(1)  # over tokens: a slot's weights sum to 1
            combine = logits.flatten(2).softmax(-1).view_as(logits)  # over all slots: a token's weights sum to 1
        return Routing(dispatch, combine, combine.detach().sum(-1).mean((0, 1)), logits=logits)


class Hash(TokenChoice):
    """A fixed table sends a key (token id, patch position, topic) to K experts, equally weighed (2106.04426).

    The table is random and balanced: of keys nE to nE+E-1 each expert gets one. A key from num_keys on goes to key mod
    E. Without keys, the position is the key. Nothing is learned, and nothing can leak.
    """

    causal, offers = True, ()
    defaults = dict(top_k=1, capacity_factor=1.0, num_keys=4096)

    def __init__(self, dim, num_experts, **options):
        Router.__init__(self, dim, num_experts, **options)
        self.options.priority = "token"
        runs = math.ceil(self.options.num_keys / num_experts)
        self.register_buffer("table", torch.rand(runs, num_experts).argsort(1).flatten()[: self.options.num_keys])

    def route(self, x, key=None):
        G, T, E, K = *x.shape[:2], self.num_experts, self.options.top_k
        key = torch.arange(T, device=x.device).expand(G, T) if key is None else key
        if key.shape != (G, T):
            raise ValueError(f"key must be [G, T] = {[G, T]}, got {list(key.shape)}")
        known = (key >= 0) & (key < len(self.table))
        first = torch.where(known, self.table[key.clamp(0, len(self.table) - 1)], key % E)  # [G, T]
        expert_index = (first[..., None] + torch.arange(K, device=x.device)) % E  # [G, T, K]
        gate = torch.full((G, T, K), 1 / K, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.seat(expert_index, gate, None, {})


class ExpertThreshold(Router):
    """A token goes to every expert whose gate reaches that expert's threshold (2603.11535): causal expert choice.

    update() keeps the threshold at a running mean of the gates' (1 - K/E) quantile in a group, so that a token meets K
    experts on average; before, it is 1/E. Tokens queue by position for C = min(T, ceil(2*T*K*cf/E)) slots, always.
    """

    chooses, causal = "threshold", True
    decay, slack = 0.9, 2

    def __init__(self, dim, num_experts, **options):
        super().__init__(dim, num_experts, **options)
        self.register_buffer("threshold", torch.full((num_experts,), 1 / num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def route(self, x, key=None):
        logits, noisy = self.logits(x)
        gates = noisy.softmax(-1)
        wants = gates >= self.threshold  # [G, T, E]
        index = queue(wants, self.capacity(x.shape[1]))  # [G, E, C]
        gate = F.pad(gates.mT, (0, 1)).gather(2, index)
        quantile = gates.detach().quantile(1 - self.options.top_k / self.num_experts, dim=1).mean(0)  # [E]
        load = wants.sum((0, 1)) / wants.sum().clamp(min=1)
        return HardRouting(index, gate, x.shape[1], load, {"z": z_loss(logits)}, logits=logits, quantile=quantile)

    @torch.no_grad()
    def update(self, routings, generator=None):
        super().update(routings, generator)
        quantile = torch.stack([routing.quantile.to(self.threshold) for routing in routings]).mean(0)
        self.threshold.lerp_(quantile, torch.where(self.updates > 0, 1 - self.decay, 1.0))
        self.updates += 1


# ---------------------------------------------------------------- experts and the layer
class Experts(nn.Module):
    """E two-layer perceptrons with GELU, stacked, each run on its own slots by one batched product a layer.

    init: "independent", each as nn.Linear starts, or "identical", all like the first (V-MoE); routing parts them.
    """

    def __init__(self, num_experts, dim, hidden, init="independent"):
        super().__init__()
        if init not in ("independent", "identical"):
            raise ValueError(f"init must be one of independent, identical, got {init!r}")
        self.w1, self.b1 = (nn.Parameter(torch.empty(num_experts, n, hidden)) for n in (dim, 1))
        self.w2, self.b2 = (nn.Parameter(torch.empty(num_experts, n, dim)) for n in (hidden, 1))
        drawn = num_experts if init == "independent" else 1
        with torch.no_grad():
            for weight, fan_in in ((self.w1, dim), (self.b1, dim), (self.w2, hidden), (self.b2, hidden)):
                weight.copy_(torch.empty(drawn, *weight.shape[1:]).uniform_(-(fan_in**-0.5), fan_in**-0.5))

    def forward(self, slots):
        """slots [G, E, C, D] -> [G, E, C, D]. A slot may be wide: n vectors of width D, laid one after another."""
        G, E, C, _ = slots.shape
        z = slots.transpose(0, 1).reshape(E, -1, self.w1.shape[1])  # [E, G*C, D]
        hidden = F.gelu(torch.baddbmm(self.b1, z, self.w1))  # [E, G*C, H]
        return torch.baddbmm(self.b2, hidden, self.w2).view(E, G, C, -1).transpose(0, 1)

    def ragged(self, z, counts):
        """The same for z [N, D], sorted by expert, counts[e] rows of each: work for real tokens only, however unbalanced."""
        device = z.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
        w1, b1, w2, b2 = (weight.to(dtype) for weight in (self.w1, self.b1, self.w2, self.b2))
        counts = [count * z.shape[1] // w1.shape[1] for count in counts]  # a wide row is several
        hidden = F.gelu(GroupedLinear.apply(z.reshape(-1, w1.shape[1]).to(dtype), w1, b1, counts))
        return GroupedLinear.apply(hidden, w2, b2, counts).view_as(z)


class GroupedLinear(torch.autograd.Function):
    """z [N, D] @ w[e] + b[e], rows sorted by expert, counts[e] of each: split, matmul and cat, minus what autograd would copy."""

    @staticmethod
    def forward(ctx, z, w, b, counts):
        ctx.save_for_backward(z, w)
        ctx.counts, y = counts, z.new_empty(len(z), w.shape[2])
        for ye, ze, we, be in zip(y.split(counts), z.split(counts), w, b):
            torch.addmm(be, ze, we, out=ye)
        return y

    @staticmethod
    def backward(ctx, dy):
        z, w = ctx.saved_tensors
        dz, dw, db = torch.empty_like(z), torch.empty_like(w), dy.new_empty(len(w), 1, w.shape[2])
        for dze, dwe, dbe, dye, ze, we in zip(dz.split(ctx.counts), dw, db, dy.split(ctx.counts), z.split(ctx.counts), w):
            torch.mm(dye, we.T, out=dze)
            torch.mm(ze.T, dye, out=dwe)
            torch.sum(dye, 0, keepdim=True, out=dbe)
        return dz, dw, db, None


class MoE(nn.Module):
    """The layer: route, dispatch, let the experts work, combine. Returns its routing beside its output."""

    def __init__(self, router, hidden, init="independent"):
        super().__init__()
        self.router, self.experts = router, Experts(router.num_experts, router.dim, hidden, init)

    def forward(self, x, key=None, routing=None):
        """x [G, T, D], key [G, T] or None -> y [G, T, D] and its Routing; a given routing is used as it is."""
        routing = self.router(x, key) if routing is None else routing
        return routing.run(x, self.experts), routing


def seeded(*key):
    """A CPU generator for one purpose, such as seeded(seed, step, "noise"): randomness without a state to keep."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little", signed=True))


def build_router(name, dim, num_experts, **options):
    """The router of that name. Raises ValueError for an unknown name, an unknown option, or a value against its rule."""
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
    known = ROUTERS[name].defaults
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"router {name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return ROUTERS[name](dim, num_experts, **options)


ROUTERS = {
    "token_choice": TokenChoice, "sinkhorn_token_choice": cross(Sinkhorn, TokenChoice), "sparse_token_choice": cross(Sparse, TokenChoice),
    "expert_choice": ExpertChoice, "sinkhorn_expert_choice": cross(Sinkhorn, ExpertChoice), "sparse_expert_choice": cross(Sparse, ExpertChoice),
    "soft": Soft, "hash": Hash, "expert_threshold": ExpertThreshold,
}

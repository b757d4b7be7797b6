"""SAHP against the published formulation, written here from its description, and EasyTPP's where it is installed.

A training step is forward, backward and optimiser on one batch. The reference does what the published code does:
whole score matrices, separate projections, one-hot rows, the integral over every padded interval.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Report, measure
from timeseries.event_data import EventData, EventSamples, Piece
from timeseries.event_likelihood import terms
from timeseries.event_tasks import EventModel
from timeseries.hawkes import Span, simulate
from timeseries.sahp import SAHP

# The simulated data of two types that the NLLs are measured on
MU = np.array([0.25, 0.12])
ALPHA = np.array([[0.35, 0.15], [0.45, 0.25]])
BETA = np.array([[1.2, 0.6], [3.0, 0.9]])
WINDOW = 60.0
SAMPLES = 20


class Reference(nn.Module):
    """The published code's modules and loss: shared layers, double exponential, Monte-Carlo integral."""

    def __init__(self, kinds: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.kinds, self.width, self.heads, self.layers = kinds, width, heads, layers
        self.types = nn.Embedding(kinds + 1, width, padding_idx=kinds)
        self.shift = nn.Linear(1, width // 2, bias=False)
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2))
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.start, self.converge, self.decay = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, kinds)
        self.drop, self.drop_attention = nn.Dropout(dropout), nn.Dropout(0.1 if dropout else 0.0)
        self.register_buffer("div", torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width)))

    def norm(self, x: Tensor, index: int) -> Tensor:
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.gains[index] * (x - mean) / (deviation + 1e-6) + self.offsets[index]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, rows, width = x.shape
        q, k, v = (
            layer(x).view(batch, rows, self.heads, width // self.heads).transpose(1, 2) for layer in self.projections
        )
        score = torch.exp(torch.matmul(q, k.transpose(-2, -1))) / math.sqrt(width // self.heads)
        score = score.masked_fill(mask[:, None] == 0, -1e9)
        mixed = torch.matmul(self.drop_attention(F.softmax(score, dim=-1)), v)
        return self.output(mixed.transpose(1, 2).contiguous().view(batch, rows, width))

    def loss(self, dt: Tensor, types: Tensor) -> Tensor:
        """`dt` `[B, L]`, `types` `[B, L]` in the published alignment."""
        place = torch.arange(dt.shape[1])[:, None] * self.div
        phase = place + self.shift(dt[..., None])
        x = self.types(types) * math.sqrt(self.width) + torch.cat([phase.sin(), phase.cos()], -1)
        mask = (types != self.kinds)[:, None] & torch.ones(dt.shape[1], dt.shape[1], dtype=torch.bool).tril()
        for _ in range(self.layers):
            x = x + self.drop(self.attend(self.norm(x, 0), mask))
            x = self.drop(x + self.drop(self.down(self.drop(self.gelu(self.up(self.norm(x, 1)))))))
        start, converge = self.gelu(self.start(x)), self.gelu(self.converge(x))
        decay = F.softplus(self.decay(x), beta=10.0)
        cell = torch.tanh(converge + (start - converge) * torch.exp(-decay * dt[..., None]))
        rates = F.softplus(self.head(cell))
        onehot = F.one_hot(types, self.kinds + 1)[..., : self.kinds].float()
        events = (rates * onehot).sum(-1)
        log_sum = torch.log(events.masked_fill(events == 0, 1.0)).sum()
        u = dt[..., None] * torch.rand(*dt.shape, SAMPLES)
        gone = torch.exp(-decay[..., None, :] * u[..., None])
        cells = torch.tanh(converge[..., None, :] + (start - converge)[..., None, :] * gone)
        total = F.softplus(self.head(cells)).sum(-1).mean(-1)
        return (total * dt).sum() - log_sum


def installed() -> bool:
    return importlib.util.find_spec("easy_tpp") is not None


def peer(kinds: int, width: int, heads: int, layers: int, dropout: float = 0.0, norm: bool = False) -> Any:
    """EasyTPP's model of the same name; its arguments' defaults are its own."""
    from easy_tpp.config_factory.model_config import ModelConfig
    from easy_tpp.model.sahp import SAHP as EasySAHP

    return EasySAHP(ModelConfig(
        hidden_size=width, num_heads=heads, num_layers=layers, dropout_rate=dropout, use_ln=norm, thinning={},
        num_event_types=kinds, num_event_types_pad=kinds + 1, event_pad_index=kinds,
        loss_integral_num_sample_per_step=SAMPLES,
    ))  # fmt: skip


def peer_batch(dt: Tensor, types: Tensor, kinds: int) -> dict[str, Tensor]:
    """What EasyTPP's collator makes of a batch whose padding has the type K: events 2 to n are scored."""
    there = types < kinds
    later = torch.ones(dt.shape[1], dt.shape[1], dtype=torch.bool).triu(1)
    return {"time_seqs": dt.cumsum(1), "time_delta_seqs": dt, "type_seqs": types, "seq_non_pad_mask": there,
            "attention_mask": later | ~there[:, None]}  # fmt: skip


def span(sequence: tuple[np.ndarray, np.ndarray]) -> Span:
    return Span(*sequence, 0.0, WINDOW, False)


def batch_of(lengths: list[int], kinds: int = 2) -> tuple[Tensor, Tensor, int]:
    """Gaps and types `[B, L]`, and how many events; padding has type K and gap 0."""
    rng = torch.Generator().manual_seed(0)
    longest = max(lengths)
    types = torch.randint(0, kinds, (len(lengths), longest), generator=rng)
    dt = -torch.rand(len(lengths), longest, generator=rng).log()
    beyond = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return dt.masked_fill(beyond, 0), types.masked_fill(beyond, kinds), sum(lengths)


def ours(model: SAHP, dt: Tensor, types: Tensor, count: int, rule: Any) -> Callable[[], Tensor]:
    """Our loss on the same events: BOS and all but the last in, all scored (as many intervals as the references)."""
    kinds = model.kinds
    before = F.pad(dt, (1, 0))[:, :-1]
    inputs = F.pad(types, (1, 0), value=kinds)[:, :-1]
    target = torch.where(types < kinds, types, -1)
    return lambda: terms(model, model(before, inputs), dt, target, count, rule).nll


def step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    module.train()

    def run() -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return run


def steps(quick: bool) -> list[dict[str, Any]]:
    """Events a CPU second of a training step."""
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(6, 13, 4).tolist() if quick else rng.integers(76, 129, 32).tolist(), reverse=True)
    dt, types, events = batch_of(lengths)
    size: tuple[int, ...] = (2, 16, 8, 4)
    makers: dict[str, Callable[[], Callable[[], object]]] = {}

    def reference(dropout: float) -> Callable[[], object]:
        module = Reference(*size, dropout)
        return step(module, lambda: module.loss(dt, types))

    def own(sizes: tuple[int, ...], count: int, rule: str, **options: Any) -> Callable[[], object]:
        module = SAHP(*sizes, **options)
        return step(module, ours(module, dt, types, count, rule))

    makers["published, dropout 0.1"] = lambda: reference(0.1)
    makers["ours, the same function"] = lambda: own(size, SAMPLES, "monte_carlo", score="exp_softmax")
    makers["ours, softmax and quadrature"] = lambda: own(size, 8, "quadrature")

    def theirs(sizes: tuple[int, ...], dropout: float, norm: bool) -> Callable[[], object]:
        module, batch = peer(*sizes, dropout, norm), peer_batch(dt, types, sizes[0])
        return step(module, lambda: module.loglike_loss(**batch)[0])

    same = "EasyTPP, the same sizes, dropout 0.1"
    if installed():
        makers[same] = lambda: theirs(size, 0.1, True)
    makers["ours, EasyTPP's function"] = lambda: own(size, SAMPLES, "even", variant="easytpp", norm=True)
    makers["published, no dropout"] = lambda: reference(0.0)
    still = {"dropout": 0.0, "attention_dropout": 0.0}
    makers["ours, the same function, no dropout"] = lambda: own(
        size, SAMPLES, "monte_carlo", score="exp_softmax", **still
    )
    makers["ours, softmax and quadrature, no dropout"] = lambda: own(size, 8, "quadrature", **still)
    if installed():
        makers["EasyTPP's default (32, 2 heads, 2 layers)"] = lambda: theirs((2, 32, 2, 2), 0.0, False)
    makers["ours, the recipe (32, 4 heads, 4 layers, 3 kernels)"] = lambda: own(
        (2, 32, 4, 4), 8, "quadrature", dropout=0.1, attention_dropout=0.0, rates=3
    )
    torch.manual_seed(0)
    timing = measure({name: make() for name, make in makers.items()}, rounds=3 if quick else 15, warmup=2)
    published = timing["published, dropout 0.1"].cpu
    return [
        {
            "step": name,
            "CPU ms": 1e3 * t.cpu,
            "events a CPU second": events / t.cpu,
            "times published": published / t.cpu,
        }
        | ({"times EasyTPP": timing[same].cpu / t.cpu} if same in timing else {})
        for name, t in timing.items()
    ]


def truth(sequences: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Negative log likelihood an event under the true process, events 2 to n, up to the last."""
    total, count = 0.0, 0
    for times, types in sequences:
        for i in range(1, len(times)):
            own = BETA[:, types[:i]] * ALPHA[:, types[:i]]
            past = own * np.exp(-BETA[:, types[:i]] * (times[i] - times[:i]))
            total -= np.log(MU[types[i]] + past[types[i]].sum())
        if len(times) < 2:
            continue
        first, last = times[0], times[-1]
        total += MU.sum() * (last - first)
        begin = np.exp(-BETA[:, types] * np.maximum(first - times, 0))
        end = np.exp(-BETA[:, types] * (last - times))
        total += (ALPHA[:, types] * (begin - end)).sum()
        count += len(times) - 1
    return total / count


def train_ours(train: list[Any], test: list[Any], seconds: float) -> float:
    """The recipe's model, trained for so many CPU seconds; scored on events 2 to n."""
    from apps.cli import read_recipe
    from polyhead import bundle

    recipe = read_recipe(["--config", "timeseries/sahp"])["model"]
    data = EventData(types=["0", "1"], max_positions=1024)
    pieces = [Piece(str(i), span(s)) for i, s in enumerate(train)]
    scale = sum(p.span.end for p in pieces) / sum(len(p.span.times) for p in pieces)
    data.time_scale = scale
    data._reading = None
    samples = EventSamples(pieces, 2)
    system: Any = bundle.build_model(
        {**recipe, "init_args": {**recipe["init_args"], "facts": {"types": ["0", "1"], "time_scale": scale}}}
    )
    assert isinstance(system, EventModel)
    data._parts = {}
    data.pieces = lambda split: pieces  # type: ignore[method-assign]
    began = time.process_time()
    system.begin(data)
    # The schedule spans the time: steps are counted as they come
    optimizer = torch.optim.AdamW(system.parameters(), lr=3e-3, weight_decay=0.3, betas=(0.9, 0.98))
    average = {k: v.clone() for k, v in system.state_dict().items()}
    done = epoch = 0
    system.train()
    while time.process_time() - began < seconds:
        for batch in data.batches(samples, "train", epoch):
            share = (time.process_time() - began) / seconds
            if share >= 1:
                break
            rate = share / 0.2 if share < 0.2 else 0.5 * (1 + math.cos(math.pi * (share - 0.2) / 0.8))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * max(rate, 0.01)
            loss = system.losses(data.collate([samples.load(i, 0) for i in batch]))["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(system.parameters(), 1.0)
            optimizer.step()
            decay = min(0.99, (1 + done) / (10 + done))
            for name, value in system.state_dict().items():
                average[name].lerp_(value, 1 - decay)
            done += 1
        epoch += 1
    system.load_state_dict(average)
    system.eval()
    total, count = 0.0, 0
    rows = EventSamples([Piece(str(i), span(s)) for i, s in enumerate(test)], 2)
    with torch.no_grad():
        for batch in data.batches(rows, "test", 0):
            made = data.collate([rows.load(i, 0) for i in batch])
            states = system.states(made)
            there = made["target"] >= 0
            there[:, 0] = False
            got = terms(system.network, states, torch.where(there, made["gap"], 0) / scale,
                        torch.where(there, made["target"], -1), 64)  # fmt: skip
            total += float(got.nll) + int(there.sum()) * math.log(scale)
            count += int(there.sum())
    return total / count


def train_peer(train: list[Any], test: list[Any], seconds: float) -> float:
    """EasyTPP's default, Adam 1e-3, batches of 256, for so many CPU seconds; scored by a fine quadrature."""
    model = peer(2, 32, 2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)

    def padded(sequences: list[Any]) -> tuple[Tensor, Tensor]:
        longest = max(len(t) for t, _ in sequences)
        dt, types = torch.zeros(len(sequences), longest), torch.full((len(sequences), longest), 2)
        for row, (times, kinds) in enumerate(sequences):
            dt[row, : len(times)] = torch.from_numpy(np.diff(times, prepend=times[:1])).float()
            types[row, : len(times)] = torch.from_numpy(kinds)
        return dt, types

    began = time.process_time()
    while time.process_time() - began < seconds:
        order = rng.permutation(len(train))
        for first in range(0, len(order), 256):
            loss, _ = model.loglike_loss(**peer_batch(*padded([train[i] for i in order[first : first + 256]]), 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    nodes, weights = (torch.from_numpy(v).float() for v in np.polynomial.legendre.leggauss(64))
    dt, types = padded(test)
    batch = peer_batch(dt, types, 2)
    with torch.no_grad():
        states = model(*(batch[n][:, :-1] for n in ("time_seqs", "time_delta_seqs", "type_seqs")),
                       batch["attention_mask"][:, :-1, :-1])  # fmt: skip
        gap, target, there = dt[:, 1:], types[:, 1:], batch["seq_non_pad_mask"][:, 1:]
        u = gap[..., None] * ((nodes + 1) / 2) ** 2
        rates = model.softplus(model.compute_states_at_sample_times(states, u)).sum(-1)
        chosen = model.softplus(model.state_decay(states, gap[..., None])).gather(2, target.clamp(max=1)[..., None])
        area = (rates * weights * (nodes + 1) / 2).sum(-1) * gap
        total = (area * there).sum() - chosen[..., 0][there].log().sum()
    return float(total / there.sum())


def quality(quick: bool) -> list[dict[str, Any]]:
    """Test NLL after equal CPU time, against the true process."""
    made = simulate(MU, ALPHA, BETA, WINDOW, 40 if quick else 1150, seed=5)
    made = [s for s in made if len(s[0]) > 1]
    train, test = made[: len(made) * 4 // 5], made[len(made) * 4 // 5 :]
    true = truth(test)
    rows = []
    for seconds in [1] if quick else [30]:
        torch.manual_seed(0)
        mine = train_ours(train, test, seconds)
        theirs = {"EasyTPP's default": f"{train_peer(train, test, seconds):.4f}"} if installed() else {}
        row = {"CPU seconds of training": seconds, "true process": f"{true:.4f}", "ours": f"{mine:.4f}"}
        rows.append(row | theirs)
    return rows


def run(command: str, threads: int, quick: bool, only: str) -> Report:
    tables: dict[str, list[dict[str, Any]]] = {}
    if only in ("", "steps"):
        tables["a training step"] = steps(quick)
    if only in ("", "quality"):
        tables["test NLL after equal CPU time"] = quality(quick)
    notes = [
        "32 sequences of 76 to 128 events, two types, 20 samples an interval (8 nodes for the quadrature); D 16, "
        "8 heads, 4 layers unless said otherwise; Adam.",
        "NLL in nats an event, events 2 to n, up to the last event, every integral by 64 nodes.",
    ]
    if not installed():
        notes.append("EasyTPP is not installed here: `make bench-peers`, then the same with its python")
    return Report("sahp", command, tables, notes)

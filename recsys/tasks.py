"""The Lightning module that recsys recipes name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection

from polyhead.catalogue import Catalogue
from polyhead.columns import make_columns
from polyhead.errors import UserError
from polyhead.system import Signature, System
from recsys import ranking
from recsys.histories import transitions
from recsys.mqsa_ted import MQSATED, Trace, distillation_loss, recommendation_loss
from recsys.ranking import rank, ranking_metrics, without_seen

# Where the users of a batch, by ascending length, are cut into groups that are encoded at a width of their own
GROUPS = (0.5, 0.875)
EXPLAINED = 5
# More than a history has places
LARGE = 1 << 30
SCORES = 2**24  # that an evaluation holds at a time


class NextItem(System):
    """Recommends the next item with MQSA-TED (or, with `alpha` 1 and `lambda_kd` 0, a SASRec-like model).

    Takes `history [B, W]`, item numbers with N where there is none, the newest last; gives `items [B, K]`, their
    `scores [B, K]` and `fallback [B]`, true where a history has no known item and popularity decides. Prediction
    rows, one a user and place: `item`, `score` (an inner product, comparable within a user; minus the place by
    popularity in a fallback), `fallback`.

    Args:
        facts: `items` (the catalogue), `transitions` and `max_len`; linked from the data.
        dim, blocks, heads, length, alpha, dropout: see `recsys.mqsa_ted.MQSATED`.
        lambda_kd: weight of the distillation loss.
        tau: its temperature.
        topk: K, how many items are recommended.
        filter_seen: leave the items of a history out, also in evaluation.
        cutoffs: of hit rate and NDCG.
        baselines: evaluate popularity, transition counts and item neighbours on the same targets.
        system: optimiser, scheduler and the other arguments of `polyhead.system.System`.
    """

    network: MQSATED
    starts: Tensor
    followers: Tensor
    followed: Tensor
    place: Tensor

    def __init__(
        self, facts: dict[str, Any] | None = None, dim: int = 64, blocks: int = 1, heads: int = 1,
        length: int = 3, alpha: float = 0.5, dropout: float = 0.5, lambda_kd: float = 0.1, tau: float = 0.1,
        topk: int = 20, filter_seen: bool = True, cutoffs: list[int] | None = None, baselines: bool = True,
        **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        for name, value in {"dim": dim, "blocks": blocks, "heads": heads, "length": length, "topk": topk}.items():
            if value < 1:
                raise UserError(f"model.{name} is {value}: at least 1 is needed")
        for name, share in {"alpha": alpha, "dropout": dropout}.items():
            if not 0 <= share <= 1:
                raise UserError(f"model.{name} is {share:g}: it must be between 0 and 1")
        if dim % heads:
            raise UserError(f"model.dim {dim} cannot be divided among model.heads {heads}")
        if tau <= 0 or lambda_kd < 0:
            raise UserError(
                f"model.tau is {tau:g} and model.lambda_kd {lambda_kd:g}: above 0, and 0 or more, are needed"
            )
        self.cutoffs = list(cutoffs or [5, 10, 20])
        if min(self.cutoffs) < 1:
            raise UserError(f"model.cutoffs holds {min(self.cutoffs)}: at least 1 is needed")
        self.catalogue = Catalogue.unpack(self.facts["items"])
        size = len(self.catalogue)
        self.lambda_kd, self.tau, self.topk = lambda_kd, tau, min(topk, size)
        self.filter_seen, self.baselines = filter_seen, baselines
        self.network = MQSATED(size, self.facts["max_len"], dim, blocks, heads, length, alpha, dropout)
        # What a trained model keeps of its training data: what followed what, and each item's place by popularity
        pairs = self.facts["transitions"]
        self.register_buffer("starts", torch.zeros(size + 1, dtype=torch.int64))
        self.register_buffer("followers", torch.zeros(pairs, dtype=torch.int32))
        self.register_buffer("followed", torch.zeros(pairs, dtype=torch.int32))
        self.register_buffer("place", torch.arange(1, size + 1, dtype=torch.int32))

    # Training

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        counts = data.counts
        if counts.nnz != len(self.followers):
            raise UserError("the log has other transitions than the model was made for: start anew with --init_from")
        order = np.argsort(-data.popularity(), kind="stable")
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(1, len(order) + 1)
        for name, values in {"starts": counts.indptr, "followers": counts.indices, "followed": counts.data,
                             "place": place}.items():  # fmt: skip
            buffer: Tensor = getattr(self, name)
            buffer.copy_(torch.from_numpy(np.asarray(values)))

    def encoded(self, batch: dict[str, Any]) -> Tensor:
        """Representations of the positions that have a next item, `[R, d]`, in the batch's order."""
        history = batch["history"]
        if history.is_cuda:
            return self.network(history).flatten(0, 1).index_select(0, batch["place"])
        # Users ascend in length: groups of short ones need no wide encoder
        parts = []
        cuts = [0, *(int(share * len(history)) for share in GROUPS), len(history)]
        for first, last in zip(cuts, cuts[1:], strict=False):
            if first < last:
                there = history[first:last] < self.network.items
                width = int(there[-1].sum())
                parts.append(self.network(history[first:last, -width:])[there[:, -width:]])
        return torch.cat(parts)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        rec = recommendation_loss(self.encoded(batch), self.network.item, batch["target"])
        if not self.lambda_kd:
            return {"loss": rec}
        row, item, share = (batch[f"edge_{name}"] for name in ("row", "item", "share"))
        kd = distillation_loss(self.network, batch["head"], row, item, share, self.tau)
        return {"loss": rec + self.lambda_kd * kd, "rec": rec, "kd": kd}

    def adapt_facts(self, state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
        """A model of another catalogue or history length as a start: items by their ids, positions by their age."""
        own = {k: v.clone() for k, v in self.state_dict().items()}
        if state["network.item"].shape[1] != self.network.dim:
            return state
        known = Catalogue.unpack(facts["items"]).numbers_of(self.catalogue.ids)
        there = torch.from_numpy(known >= 0)
        own["network.item"][there] = state["network.item"][torch.from_numpy(known[known >= 0]).long()]
        both = min(len(own["network.position"]), len(state["network.position"]))
        own["network.position"][-both:] = state["network.position"][-both:]
        kept = {"network.item", "network.position", "starts", "followers", "followed", "place"}
        return {**state, **{k: own[k] for k in kept}}

    # Evaluation

    def make_metrics(self) -> MetricCollection:
        return ranking_metrics(self.cutoffs)

    def users(self, history: Tensor) -> Tensor:
        """Vectors of users, `[B, d]`: the newest position's, of what the model sees of their histories."""
        longest = self.network.max_len
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            # One width for all, since the graph must not depend on it
            history = F.pad(history, (longest, 0), value=self.network.items)
        return self.network(history[:, -longest:])[:, -1]

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        users, total = self.users(batch["history"]), 0.0
        # A few users at a time where there are many items
        step = max(1, SCORES // len(self.catalogue))
        for user, history, target in zip(*(t.split(step) for t in (users, batch["history"], batch["target"])),
                                         strict=True):  # fmt: skip
            scores = user @ self.network.item.T
            loss = scores.logsumexp(1) - scores.gather(1, target.clamp(min=0)[:, None])[:, 0]
            total += (loss * (target >= 0)).sum()
            scores = self._with_fallback(scores, history)
            if self.filter_seen:
                scores = without_seen(scores, history)
            metrics.update(*rank(scores, target), len(self.catalogue))
        return {"loss": total / (batch["target"] >= 0).sum().clamp(min=1)}

    def _with_fallback(self, scores: Tensor, history: Tensor) -> Tensor:
        empty = (history >= self.network.items).all(1)
        return torch.where(empty[:, None], -self.place.to(scores.dtype), scores)

    def named_results(self, stage: str) -> dict[str, float]:
        named = super().named_results(stage)
        trainer: Any = self._trainer
        if self.baselines and trainer is not None and getattr(trainer, "datamodule", None) is not None:
            for name, values in self.simple_methods(trainer.datamodule, stage).items():
                named |= {f"{name}.{metric}": value for metric, value in values.items()}
        return named

    def simple_methods(self, data: Any, stage: str) -> dict[str, dict[str, float]]:
        """What popularity, transition counts and item neighbours reach on the targets of `stage`."""
        items = len(self.catalogue)
        questions = data.samples(stage)
        # They see what the protocol shows a model
        train = data.train if data.seen == "window" else data.whole_train
        scorers = {
            "popularity": ranking.popularity(train, items),
            "markov": ranking.markov(transitions(train, items), train, items),
            "itemknn": ranking.item_knn(train, items),
        }
        return {
            name: ranking.evaluate(scorer, questions.histories, questions.target, items, self.cutoffs, self.filter_seen)
            for name, scorer in scorers.items()
        }

    # Prediction and export

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        history, size = inputs["history"], self.network.items
        # Gaps, wherever they are, go to the left
        place = torch.arange(history.shape[1], device=history.device)
        history = history.gather(1, (place - (history >= size).long() * LARGE).argsort(1))
        scores = self._with_fallback(self.users(history) @ self.network.item.T, history)
        if self.filter_seen:
            scores = without_seen(scores, history)
        lowest = torch.finfo(scores.dtype).min
        best, items = scores.clamp(min=lowest).topk(self.topk, 1)
        items = torch.where(best > lowest, items, size)
        return {"items": items, "scores": best, "fallback": (history >= size).all(1)}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        return make_columns(self._columns(), {k: outputs[k].cpu().numpy() for k in self.signature_outputs})

    signature_outputs = ("items", "scores", "fallback")

    def _columns(self) -> dict[str, Any]:
        return {"kind": "ranked", "names": self.catalogue.ids}

    def input_names(self) -> list[str]:
        return ["history"]

    def signature(self) -> Signature:
        width = self.network.max_len
        examples = self._examples(2 + 1 + 3, width + 3)
        return Signature(
            inputs={"history": examples[:2, -width:].contiguous()},
            outputs=list(self.signature_outputs),
            dynamic={"history": {1: "width"}},
            checks=[{"history": examples[2:3, -1:].contiguous()}, {"history": examples[3:]}],
            columns=self._columns(),
            tolerance=1e-3,
        )

    @torch.inference_mode()
    def _examples(self, count: int, width: int) -> Tensor:
        """Histories whose recommended items differ so much in score that rounding does not reorder them."""
        size, drawn = len(self.catalogue), torch.Generator().manual_seed(0)
        histories = torch.randint(0, size, (8 * count, width), generator=drawn)
        # Short ones, so that a small catalogue has something left to recommend
        histories[:, : max(width // 2, width - max(1, size // 4))] = size
        training, device = self.training, self.network.item.device
        self.eval()
        scores = without_seen(self.users(histories.to(device)) @ self.network.item.T, histories.to(device))
        self.train(training)
        best = scores.topk(min(self.topk + 1, size)).values
        gaps = (best[:, :-1] - best[:, 1:]).amin(1)
        return histories[gaps.argsort(descending=True)[:count].cpu()]

    # Explanation

    def transition_counts(self) -> csr_matrix:
        """What followed what in training, `[N, N]`."""
        arrays = (v.cpu().numpy() for v in (self.followed, self.followers, self.starts))
        size = len(self.catalogue)
        return csr_matrix(tuple(arrays), shape=(size, size))

    @torch.inference_mode()
    def explain(self, batch: dict[str, Any]) -> list[tuple[Any, dict[str, np.ndarray]]]:
        """For each user the last query's attention over the history, and what precedes each recommended item."""
        from recsys.pictures import explanation

        history = batch["history"][:, -self.network.max_len :]
        trace: Trace = {}
        self.network.encode(history, trace)
        last = len(next(iter(self.network.branches.values())).blocks) - 1  # type: ignore[arg-type]
        weights = {name: trace[f"{name}/block{last}/attn_probs"][:, :, -1].mean(1) for name in self.network.branches}
        outputs = self(batch)
        before = self.transition_counts().tocsc()

        def listed(values: Tensor) -> Any:
            return values.cpu().numpy()

        return [
            explanation(
                name,
                self.catalogue.ids,
                listed(history[row]),
                {k: listed(v[row]) for k, v in weights.items()},
                listed(outputs["items"][row, :EXPLAINED]),
                listed(outputs["scores"][row, :EXPLAINED]),
                before,
            )
            for row, name in enumerate(batch["id"])
        ]

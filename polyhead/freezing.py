"""Training a part of a network: what is named stays as it is, until an epoch or for good."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyhead.errors import UserError
from polyhead.system import System


class Freezing(System):
    """A System of which named parts are not trained; their norms keep their statistics.

    A subclass calls `freeze_parts(names, unfreeze_at)` once its network is built, and says which parameters are its
    head (`head_parameters`) and where all batch norms keep their statistics in training (`still_norms`).
    """

    def freeze_parts(self, names: list[str] | None, unfreeze_at: int | None = None) -> None:
        """Freeze parameters by name.

        Args:
            names: prefixes of names inside the network; `backbone` is all but the head, unless a part of the
                network has that name.
            unfreeze_at: the epoch at which they are trained again; None is never.

        Raises:
            UserError: a name that nothing has, or an epoch without names.
        """
        if unfreeze_at is not None and not names:
            raise UserError("model.unfreeze_at thaws what model.freeze names, and that names nothing")
        self.frozen, self.unfreeze_at = list(names or []), unfreeze_at
        self._set_frozen(True)

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the classifier, which are new when other weights are started from."""
        raise NotImplementedError

    def still_norms(self) -> nn.Module | None:
        """The part of which no batch norm averages in training, whether it is frozen or not."""
        return None

    def head_prefixes(self) -> list[str]:
        """Where the classifier's weights are: they may be new when starting from other weights."""
        heads = {id(p) for p in self.head_parameters()}
        names = [n for n, p in self.named_parameters() if id(p) in heads]
        return [n.rsplit(".", 1)[0] for n in names]

    def _frozen_names(self) -> list[str]:
        heads = {id(p) for p in self.head_parameters()}
        everything = "backbone" in self.frozen and not hasattr(self.network, "backbone")
        prefixes = [f for f in self.frozen if f != "backbone" or not everything]
        return [
            name for name, p in self.network.named_parameters()
            if any(name.startswith(f) for f in prefixes) or (everything and id(p) not in heads)
        ]  # fmt: skip

    def _set_frozen(self, frozen: bool) -> None:
        names = set(self._frozen_names())
        unknown = [f for f in self.frozen if f != "backbone" and not any(n.startswith(f) for n in names)]
        if unknown:
            raise UserError(f"model.freeze: the network has no parameters named {unknown[0]}...")
        for name, parameter in self.network.named_parameters():
            if name in names:
                parameter.requires_grad_(not frozen)
        self._frozen_now = frozen and bool(names)
        self._frozen_set = names

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        if mode and getattr(self, "_frozen_now", False):
            for name, module in self.network.named_modules():
                own = [f"{name}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)]
                if own and all(n in self._frozen_set for n in own):
                    module.eval()
        if mode and hasattr(self, "network") and (still := self.still_norms()) is not None:
            for module in still.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def configure_optimizers(self) -> Any:
        # What is thawed later must be known to the optimiser from the start
        later = self.unfreeze_at is not None and self._frozen_now
        if later:
            self._set_frozen(False)
        configured = super().configure_optimizers()
        if later:
            self._set_frozen(True)
        return configured

    def on_train_start(self) -> None:
        # A run that goes on inside an epoch does not start it again
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        if self.unfreeze_at is not None:
            self._set_frozen(self.current_epoch < self.unfreeze_at)
        # Lightning leaves the modes as it finds them: without this, frozen batch norms would go on averaging
        self.train()

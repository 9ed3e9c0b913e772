"""What is trained."""

from torch import Tensor, nn

from medssl.engine.parallel import Run


class Method(nn.Module):
    """What is trained. Its networks are attributes; everything that must survive a restart is in its state dict.

    Attributes:
        sync_batch_norm: whether batch norms share their statistics under DistributedDataParallel on GPUs.
        find_unused: whether a step may leave parameters without gradient (DistributedDataParallel asks).
        features: (B, C) of the last forward, before any batch norm, for the collapse alarm.
        embeddings: (B, D) of the last forward, which are contrasted, of one view of each image, for the same alarm.
    """

    sync_batch_norm = False
    find_unused = False
    features: Tensor | None = None
    embeddings: Tensor | None = None

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Named, already weighted, scalar losses, whose sum is minimised. Changes nothing but batch-norm statistics."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Momentum networks, queues and annealed weights change here. `progress` is the share of the run done."""

    def encoder_state(self) -> dict[str, Tensor]:
        """What fine-tuning loads."""
        raise NotImplementedError

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the encoder. A volume's network is exported whole, and its encoder are the levels down."""
        state = self.encoder_state()
        down = {key: value for key, value in state.items() if key.startswith("down_tr")}
        own = {value.data_ptr() for value in (down or state).values()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and parameter.data_ptr() in own]

    def decoder_state(self) -> dict[str, Tensor] | None:
        """The decoder, where it lies beside the encoder and segmentation can start from it (one with skips)."""
        return None

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name → normalised images (N, 3, H, W), or volumes (N, 1, X, Y, Z) in [0, 1] or normalised, that show what
        is learned from; by default, the views."""
        return {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim in (4, 5)}

    def compiled_parts(self) -> list[nn.Module]:
        """Networks that `--compile` compiles, each called with inputs of few shapes."""
        return list(self.children())

"""Small heads on top of encoders and decoders."""

from segmentation_models_pytorch.base.initialization import initialize_decoder
from torch import Tensor, nn


def global_average(x: Tensor) -> Tensor:
    """Global average pooling: (B, C, *S) → (B, C)."""
    return x.flatten(2).mean(2)


class Averaged(nn.Module):
    """An encoder and the average of its last map: (B, C, *S) → (B, F) float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return global_average(self.encoder(x)[-1].float())


class Embedder(Averaged):
    """Encoder, global average pooling and projection head: (B, C, *S) → features (B, F), embeddings (B, D)."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__(encoder)
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = super().forward(x)
        return features, self.head(features)


class DenseEmbedder(Averaged):
    """Encoder and projection head: (B, C, *S) → {"features" (B, F), their average, "z" (B, D), its embedding, "maps":
    the encoder's last two}."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__(encoder)
        self.head = head

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        maps = self.encoder(x)[-2:]
        features = global_average(maps[-1].float())
        return {"features": features, "z": self.head(features), "maps": maps}


def mlp(c_in: int, c_hidden: int, c_out: int) -> nn.Sequential:
    """Linear–ReLU–Linear."""
    return nn.Sequential(nn.Linear(c_in, c_hidden), nn.ReLU(inplace=True), nn.Linear(c_hidden, c_out))


def begin_neck(neck: nn.Module, std: float | None = None) -> nn.Module:
    """Give a neck's linear layers the weights that ConCL and its baselines begin with, and return it: from a normal
    distribution, with the deviation `std` or else He's by the number of inputs; no bias (published code,
    openselfsup/models/necks.py)."""
    for layer in neck.modules():
        if isinstance(layer, nn.Linear):
            if std is None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return neck


def norm_mlp(c_in: int, c_hidden: int, c_out: int) -> nn.Sequential:
    """Linear–batch norm–ReLU–Linear."""
    return nn.Sequential(
        nn.Linear(c_in, c_hidden), nn.BatchNorm1d(c_hidden), nn.ReLU(inplace=True), nn.Linear(c_hidden, c_out)
    )


class EncoderClassifier(Averaged):
    """Encoder, global average pooling, dropout and one linear layer: (B, C, *S) → features (B, F), logits (B, L).

    Args:
        encoder: `encoder(x)` lists maps, shallow to deep, with `encoder.out_channels`; of any dimension.
        outputs: number of classes or labels L.
        freeze: train the last layer only; the encoder stays in evaluation mode.
    """

    def __init__(self, encoder: nn.Module, outputs: int, dropout: float = 0.2, freeze: bool = False) -> None:
        super().__init__(encoder)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(encoder.out_channels[-1], outputs))
        self.encoder.requires_grad_(not freeze)
        self.freeze = freeze

    def train(self, mode: bool = True) -> "EncoderClassifier":
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = super().forward(x)
        return features, self.head(features).float()


class ScaleHead(nn.Module):
    """PCRLv2's 2D heads at one decoder level (arXiv 2301.00772, §3): projection p, prediction q, restoration.

    Args:
        channels: C of the decoder level.
        out_channels: of the restored image.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        c = channels
        self.norm = nn.BatchNorm1d(c)
        self.predictor = norm_mlp(c, 2 * c, c)
        self.restore = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, out_channels, 1)
        )
        initialize_decoder(self)  # as the published decoder, to which these heads belong

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder map (B, C, *S) → p = BN(GAP(x)) and q = predictor(p), both (B, C)."""
        p = self.norm(global_average(x))
        return p, self.predictor(p)

"""The module that is traced: the model, with what is constant folded into its weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msn_export.graph.fold import with_cls_token, with_normalisation
from msn_export.graph.reference import read_head, require_readable
from msn_export.models.vit_msn import VitMsn
from msn_export.preprocessing import Preprocessing
from msn_export.spec import Head, InputKind

# b batch, n tokens, dim hidden size, c channels, h and w pixels


class ExportedModule(nn.Module):
    """Images as the graph takes them, to one tensor a head.

    Raises:
        GraphError: a head asks for a classifier or a final LayerNorm that the model lacks.
    """

    def __init__(
        self,
        model: VitMsn,
        heads: Sequence[Head],
        stem: InputKind,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        require_readable(model, heads)
        self.model, self.heads = model, tuple(heads)
        self.takes_bytes = stem is InputKind.UINT8
        self.patch = (
            with_normalisation(model.patch, preprocessing) if self.takes_bytes else model.patch
        )
        self.pos_embed = with_cls_token(model.pos_embed, model.cls_token)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run planes [b, c, h, w], or bytes [b, h, w, c]."""
        if self.takes_bytes:
            # Cast before Transpose: TensorRT rejects a UINT8 Transpose
            images = images.to(torch.float32).permute(0, 3, 1, 2)
        x = self.patch(images).flatten(2).transpose(1, 2)
        # an empty row in front, whose position holds [CLS]: joining a token that is repeated over
        # the batch would take a kernel that computes the batch's size
        x = F.pad(x, (0, 0, 1, 0)) + self.pos_embed
        hidden = self.model.transform(x)
        return tuple(read_head(self.model, head, hidden) for head in self.heads)

"""The sizes that torch's own modules state about themselves, for ``repr`` and for code that reads them.

What `forward` needs is found by the trace. These attributes are only read by people, and by other libraries:
a ``Linear`` works with a wrong ``in_features``, but must not print it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from secateurs.attention import MultiheadAttention, packed_weight
from secateurs.graph.copying import modules_of

_STATING = (
    _ConvNd,
    _NormBase,
    nn.Linear,
    nn.Bilinear,
    nn.GroupNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.PReLU,
    MultiheadAttention,
)


def restate_sizes(model: nn.Module) -> None:
    """Set the declared sizes of torch's own modules from the shapes of their weights."""
    for _, module in modules_of(model):
        if not isinstance(module, _STATING):
            continue
        weight = _weight_of(module)
        if isinstance(module, _ConvNd) and isinstance(weight, Tensor):
            first, second = int(weight.shape[0]), int(weight.shape[1])
            module.out_channels = second * module.groups if module.transposed else first
            module.in_channels = first if module.transposed else second * module.groups
        elif isinstance(module, nn.Linear) and isinstance(weight, Tensor):
            module.out_features, module.in_features = int(weight.shape[0]), int(weight.shape[1])
        elif isinstance(module, nn.Bilinear) and isinstance(weight, Tensor):
            module.out_features, module.in1_features, module.in2_features = (int(n) for n in weight.shape)
        elif isinstance(module, _NormBase):
            known = weight if isinstance(weight, Tensor) else module.running_mean
            if isinstance(known, Tensor):
                module.num_features = int(known.shape[0])
        elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
            module.num_channels = int(weight.shape[0])
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and isinstance(weight, Tensor):
            module.embedding_dim = int(weight.shape[1])
        elif isinstance(module, nn.PReLU) and isinstance(weight, Tensor):
            module.num_parameters = int(weight.shape[0])
        elif isinstance(module, MultiheadAttention):
            _restate_attention(module)


def _restate_attention(layer: MultiheadAttention) -> None:
    """The widths of what comes in, and of a head; the number of heads is stated by no shape."""
    packed = packed_weight(layer)
    if packed is not None:
        rows, layer.embed_dim = int(packed.shape[0]) // 3, int(packed.shape[1])
        layer.kdim = layer.vdim = layer.embed_dim
    else:
        rows, layer.embed_dim = (int(n) for n in layer.q_proj_weight.shape)
        layer.kdim, layer.vdim = int(layer.k_proj_weight.shape[1]), int(layer.v_proj_weight.shape[1])
    layer.head_dim = rows // layer.num_heads


def _weight_of(module: nn.Module) -> Tensor | None:
    """The weight of a module; with torch's older weight norm and spectral norm, what it is made of."""
    for name in ("weight_v", "weight_orig"):
        if isinstance(module._parameters.get(name), Tensor):
            return module._parameters[name]
    return getattr(module, "weight", None)

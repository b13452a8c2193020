"""What a model weighs: parameters, multiply-accumulates, bytes of its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from secateurs.graph import batch_size
from secateurs.graph.running import Inputs, attention_as_written, call_model, frozen, modes_kept


def _layer_of_onednn(
    x: Sequence[int], inward: Sequence[int], across: Sequence[int], *_: Any, **__: Any
) -> int:
    """Floating-point operations of one level in one direction: each weight is used once a step."""
    return 2 * prod(x[:-1]) * (prod(inward) + prod(across))


def _layers_of_cudnn(x: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """The same for all levels and directions; vectors are biases."""
    return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) > 1)


_aten = torch.ops.aten
_KERNELS: dict[Any, Any] = {  # of recurrent layers, which torch's counter takes for free
    _aten.mkldnn_rnn_layer: _layer_of_onednn,
    _aten._cudnn_rnn: _layers_of_cudnn,
    _aten.miopen_rnn: _layers_of_cudnn,
}


def parameters(model: nn.Module) -> int:
    """The number of parameters, one that is shared counted once, buffers not counted.

    Example:
        >>> parameters(nn.Linear(4, 2))
        10
    """
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass of one sample, counted while the model runs.

    Counted by torch's own counter of floating-point operations, independently of the graph that plans are
    made with. The model runs in evaluation mode and is left as it was.

    Args:
        model: The model.
        inputs: Example inputs; the count is divided by the length of their first dimension.

    Returns:
        Half of the floating-point operations of convolutions and matrix products.

    Example:
        >>> macs(nn.Linear(4, 2), torch.zeros(3, 4))
        8
    """
    counter = FlopCounterMode(display=False, custom_mapping=_KERNELS)
    # torch's counter takes the fused operators of attention for free, so it runs as matrix products
    # and its record of modules asks views of parameters for gradient functions that they do not have
    with (
        modes_kept(model),
        frozen(model),
        attention_as_written(),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        counter,
    ):
        call_model(model.eval(), inputs)
    return round(counter.get_total_flops() / 2 / batch_size(inputs))


def file_bytes(model: nn.Module) -> int:
    """The bytes of the safetensors file of a model's state, without writing it.

    Tensors that share their memory are counted once, as they are written once.

    Example:
        >>> from safetensors.torch import save
        >>> net = nn.Linear(4, 2)
        >>> file_bytes(net) == len(save(net.state_dict()))
        True
    """
    entries: dict[str, dict[str, object]] = {}
    seen: set[tuple[int, int, int]] = set()
    total = 0
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: (_rank(item[1]), item[0])):
        place = (tensor.data_ptr(), tensor.storage_offset(), tensor.numel())
        if tensor.numel() and not tensor.is_meta and place in seen:
            continue
        seen.add(place)
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        entries[name]["data_offsets"] = [total, total + size]
        total += size
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + total


def _rank(tensor: Tensor) -> int:
    return list(_DTYPES).index(tensor.dtype)


# In the order in which the format writes them, which decides how many digits an offset has.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

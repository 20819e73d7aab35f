"""Tensors to bytes and back: raw bf16/fp16/fp32, or int8 with one scale per row.

Decoding checks the size against the declared shape before it allocates. Knows nothing of messages beyond `TensorSpec`.

    Tensor [tokens, hidden] --encode_tensor--> (TensorSpec, bytes) ~~> decode_tensor --> Tensor
"""

import numpy as np
import torch

from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.protocol import DType, Encoding, TensorSpec

_TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}
_WIRE_DTYPES = {dtype: wire for wire, dtype in _TORCH_DTYPES.items()}


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of a wire dtype."""
    return _TORCH_DTYPES[dtype]


def encode_tensor(hidden_states: torch.Tensor, encoding: Encoding = Encoding.RAW) -> tuple[TensorSpec, memoryview]:
    """Encode hidden states [tokens, hidden] for the wire.

    Raises:
        InvalidRequest: for a dtype or number of dimensions that the wire does not carry.
    """
    if hidden_states.ndim != 2 or hidden_states.dtype not in _WIRE_DTYPES:
        shape = tuple(hidden_states.shape)
        raise InvalidRequest(
            f"cannot send a {hidden_states.dtype} tensor of shape {shape}: need 2 dimensions of floats"
        )
    num_tokens, hidden_size = hidden_states.shape
    spec = TensorSpec(_WIRE_DTYPES[hidden_states.dtype], (num_tokens, hidden_size), encoding)
    tensor = hidden_states.detach().cpu().contiguous()
    if encoding is Encoding.RAW:
        return spec, _bytes_of(tensor)
    scales = tensor.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / 127.0
    quantized = (tensor.float() / scales).round_().clamp_(-127, 127).to(torch.int8)
    return spec, memoryview(_bytes_of(scales).tobytes() + _bytes_of(quantized).tobytes())


def decode_tensor(spec: TensorSpec, body: bytes | bytearray | memoryview) -> torch.Tensor:
    """Decode hidden states [tokens, hidden] that own their memory.

    Raises:
        PeerMisbehaved: when the body is not exactly as long as the spec says.
    """
    if len(body) != spec.num_bytes:
        raise PeerMisbehaved(f"tensor body of {len(body)} bytes, {spec.num_bytes} declared")
    dtype = _TORCH_DTYPES[spec.dtype]
    if spec.encoding is Encoding.RAW:
        return _tensor_of(body, dtype).view(spec.shape)
    num_tokens, hidden_size = spec.shape
    scales = _tensor_of(memoryview(body)[: 4 * num_tokens], torch.float32).view(num_tokens, 1)
    quantized = _tensor_of(memoryview(body)[4 * num_tokens :], torch.int8).view(num_tokens, hidden_size)
    return (quantized.float() * scales).to(dtype)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _tensor_of(body: bytes | bytearray | memoryview, dtype: torch.dtype) -> torch.Tensor:
    owned = torch.empty(len(body), dtype=torch.uint8)
    if len(body):
        owned.numpy()[:] = np.frombuffer(body, dtype=np.uint8)
    return owned.view(dtype)

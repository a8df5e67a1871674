"""The kernels as typed functions over torch tensors.

Shape letters: M rows, K inputs, N outputs or query heads, T tokens, H head dim, P pages.

Activations are float32 throughout, one row after the other. Weights are packed once (`Weight`):
those of bfloat16 stay so in memory, or in 12 bits, and are widened in registers. Sums are
float32.

Call from any thread, but from one at a time: the threads of a call are torch's.
"""

from __future__ import annotations

import ctypes
from array import array
from ctypes import c_double, c_float, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from penstock_runtime.kernels.library import load
from penstock_runtime.kernels.structures import (
    Attention,
    AttentionInputs,
    DecoderLayer,
    KvLayer,
    LastRows,
    Linear,
    Matrix,
    Step,
)
from penstock_runtime.memory import Arena

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import Structure

_FLOAT32, _BFLOAT16, _BFLOAT16_PAIRS, _BFLOAT16_CODED = 0, 1, 2, 3
"""`WeightKind` in kernels.h."""
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`KvLayer.element` in kernels.h."""
_LOW_HALF = 0xFFFF
_NO_MEMORY = "the kernels got no memory to work in"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight matrix in the kernels' own layout, see tile.h."""

    packed: torch.Tensor
    address: int
    """Of `packed`."""
    kind: int
    outputs: int
    inputs: int


class KvPages:
    """Where one layer of a pool lies: keys (P, K, S, key dim) and values (P, K, S, value dim).

    Pages may lie apart; inside one, tokens follow each other, a head after the other. Values may be
    of another head dim than keys, and a part of them. The tensors are not kept.
    """

    __slots__ = ("key_dim", "kv_heads", "layer", "page_stride", "pairs", "value_dim")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raises ValueError if they do not lie in memory as described."""
        if keys.dtype not in ELEMENTS or values.dtype != keys.dtype or keys.device.type != "cpu":
            raise ValueError(f"pages are {keys.dtype} and {values.dtype} on {keys.device}")
        _, self.kv_heads, page_size, self.key_dim = keys.shape
        self.value_dim, self.page_stride = values.shape[3], keys.stride(0)
        self.pairs = keys.dtype == torch.bfloat16 and self.key_dim % 2 == 0
        for name, x in (("keys", keys), ("values", values)):
            row = x.stride(2)
            if x.stride()[1:] != (page_size * row, row, 1):
                raise ValueError(f"{name} of shape {tuple(x.shape)} have strides {x.stride()}")
        self.layer = KvLayer(
            keys.data_ptr(),
            values.data_ptr(),
            ELEMENTS[keys.dtype],
            page_size,
            self.kv_heads,
            self.key_dim,
            self.value_dim,
            keys.stride(0),
            keys.stride(2),
            values.stride(0),
            values.stride(2),
        )


class _Tables:
    """Tables of int64, one behind the other.

    They are no tensors: to make those takes long while all caches are full of weights.
    """

    def __init__(self, *tables: Sequence[int]) -> None:
        self._memory = array("q")
        lengths = [len(table) for table in tables]
        for table in tables:
            self._memory.extend(table)
        begin, _ = self._memory.buffer_info()
        self.addresses = tuple(begin + 8 * before for before in accumulate(lengths[:-1], initial=0))
        """Where each of them is."""


class Segments:
    """A batch for `Kernels.attention`."""

    def __init__(
        self,
        *,
        starts: Sequence[int],
        lengths: Sequence[int],
        first_rows: Sequence[int],
        first_pages: Sequence[int],
        pages: Sequence[int],
    ) -> None:
        """Keep the tables.

        Args:
            starts: position of each segment's first query.
            lengths: its queries.
            first_rows: its first row in the batch.
            first_pages: where its pages begin in `pages`.
            pages: those of all segments, one after the other.
        """
        count = len(starts)
        if not count == len(lengths) == len(first_rows) == len(first_pages):
            raise ValueError("the tables of segments differ in length")
        self._tables = _Tables(starts, lengths, first_rows, first_pages, pages)
        self.addresses = (count, *self._tables.addresses)
        """The number of segments, and where the tables are, as the library takes them."""


class TokenSlots:
    """A batch's own tokens: their positions, and where their keys and values go."""

    def __init__(
        self, positions: Sequence[int], pages: Sequence[int], offsets: Sequence[int]
    ) -> None:
        """Keep the tables, a token after the other.

        Args:
            positions: in their sequences.
            pages: that they lie in.
            offsets: their places in these.
        """
        if not len(positions) == len(pages) == len(offsets):
            raise ValueError("the tables of tokens differ in length")
        self.pages, self.offsets = pages, offsets
        self._tables = _Tables(positions, pages, offsets)

    def addresses_for(self, tokens: int) -> tuple[int, ...]:
        """Return where positions, pages and offsets are. Raises ValueError for another number."""
        if len(self.pages) != tokens:
            raise ValueError(f"slots of {len(self.pages)} tokens for {tokens}")
        return self._tables.addresses


class Kernels:
    """The library of this process."""

    def __init__(self) -> None:
        """Raises KernelsUnavailable."""
        level, self._library = load()
        self._weights = Arena()
        self.weight_bytes = self.weight_elements = 0
        """Of all weights that were packed."""
        self.level = level.name
        self.multiplies_bfloat16 = bool(self._library.penstock_has_bf16_products())
        """Whether the processor has instructions for products of bfloat16."""
        self._linear = self._library.penstock_linear
        self._linear.argtypes = [ctypes.POINTER(Linear)]
        self._attention = self._library.penstock_attention
        self._attention.argtypes = [ctypes.POINTER(Attention)]
        self._attention_inputs = self._library.penstock_attention_inputs
        self._attention_inputs.argtypes = [ctypes.POINTER(AttentionInputs)]
        self._attention_inputs.restype = None
        self._layers = self._library.penstock_layers
        self._layers.argtypes = [c_void_p, c_int64, ctypes.POINTER(Step)]
        self._rms_norm = self._library.penstock_rms_norm
        self._rms_norm.argtypes = [
            *(c_void_p, c_void_p, c_void_p),
            *(c_int64, c_int64, c_int64, c_float),
        ]
        self._rms_norm.restype = None
        self._silu_multiply = self._library.penstock_silu_multiply
        self._silu_multiply.argtypes = [c_void_p, c_void_p, c_int64, c_int64]
        self._silu_multiply.restype = None
        together = self._library.penstock_columns_together
        together.restype = c_int64
        self.columns_together = int(together())
        """See kernels.h: a weight may be divided at multiples of it."""
        self._coded_bytes = self._library.penstock_coded_bytes
        self._coded_bytes.argtypes = [c_int64, c_int64]
        self._coded_bytes.restype = c_int64
        self._code = self._library.penstock_code_bf16
        self._code.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
        self._code.restype = c_int64
        self._packed_elements = self._library.penstock_packed_elements
        self._packed_elements.argtypes = [c_int64, c_int64]
        self._packed_elements.restype = c_int64

    def structure_sizes(self) -> dict[type[Structure], int]:
        """Return the bytes that the library takes each structure to have."""
        size_of = self._library.penstock_structure_bytes
        size_of.argtypes, size_of.restype = [c_int64], c_int64
        structures = (
            *(Linear, KvLayer, AttentionInputs, Attention),
            *(Matrix, DecoderLayer, LastRows, Step),
        )
        return {structure: size_of(index) for index, structure in enumerate(structures)}

    def pack(self, weight_NK: torch.Tensor, *, round_inputs: bool = False) -> Weight:
        """Return a weight in the layout that `linear` takes.

        bfloat16 stays as it is, and so does a float32 or float16 weight whose every element is a
        bfloat16 (a checkpoint of bfloat16 loaded as float32): the products are the same. With
        `round_inputs` it is kept in 12 bits an element, without loss, if it is as alike as weights
        are (src/coded.h).

        Args:
            weight_NK: on the CPU, of a floating dtype.
            round_inputs: round x to bfloat16 too and multiply pairs, which some processors have
                instructions for. Only for a weight that is kept in bfloat16.
        """
        outputs, inputs = weight_NK.shape
        narrow = inputs % 2 == 0 and _is_bfloat16(weight_NK)
        plain = weight_NK.to(torch.bfloat16 if narrow else torch.float32).contiguous()
        packed = self._coded(plain) if narrow and round_inputs else None
        if packed is not None:
            kind = _BFLOAT16_CODED
        else:
            packed = self._packed(plain)
            kind = _FLOAT32 if not narrow else _BFLOAT16_PAIRS if round_inputs else _BFLOAT16
        self.weight_bytes += packed.nbytes
        self.weight_elements += weight_NK.numel()
        return Weight(packed, packed.data_ptr(), kind, outputs, inputs)

    def _packed(self, weight_NK: torch.Tensor) -> torch.Tensor:
        outputs, inputs = weight_NK.shape
        dtype = weight_NK.dtype
        size = self._packed_elements(outputs, inputs) * dtype.itemsize
        packed = self._weights.take(size).view(dtype)
        narrow = dtype == torch.bfloat16
        pack = self._library.penstock_pack_bf16 if narrow else self._library.penstock_pack_f32
        pack.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
        pack(weight_NK.data_ptr(), outputs, inputs, packed.data_ptr())
        return packed

    def _coded(self, weight_NK: torch.Tensor) -> torch.Tensor | None:
        """Return a weight coded, or None if it cannot be, or takes hardly less."""
        outputs, inputs = weight_NK.shape
        coded = self._weights.take(self._coded_bytes(outputs, inputs))
        used = self._code(weight_NK.data_ptr(), outputs, inputs, coded.data_ptr())
        coded = self._weights.trim(used)
        return coded if used else None

    def linear(
        self,
        x_MK: torch.Tensor,
        weight: Weight,
        bias_N: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return x · Wᵀ + bias, float32 (M, N); or add it to `add_to` and return that."""
        rows = x_MK.shape[0]
        y_MN = torch.empty(rows, weight.outputs) if add_to is None else add_to
        if add_to is not None:
            check(add_to, "add_to", (rows, weight.outputs))
        if bias_N is not None:
            check(bias_N, "bias", (weight.outputs,))
        call = Linear(
            x_MK.data_ptr(),
            _row_stride(x_MK, "x", weight.inputs),
            weight.address,
            weight.kind,
            None if bias_N is None else bias_N.data_ptr(),
            y_MN.data_ptr(),
            rows,
            weight.outputs,
            weight.inputs,
            add_to is not None,
        )
        if self._linear(call):
            raise MemoryError(_NO_MEMORY)
        return y_MN

    def rms_norm(self, x_MD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight, float32 (M, D)."""
        rows, columns = x_MD.shape
        stride = _row_stride(x_MD, "x", columns)
        check(weight_D, "weight", (columns,))
        y_MD = torch.empty(rows, columns)
        addresses = (x_MD.data_ptr(), weight_D.data_ptr(), y_MD.data_ptr())
        self._rms_norm(*addresses, rows, columns, stride, eps)
        return y_MD

    def silu_multiply(self, gate_up_MF: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up, float32 (M, F), of (M, 2·F): the gate, then what it gates."""
        rows, columns = gate_up_MF.shape[0], gate_up_MF.shape[1] // 2
        check(gate_up_MF, "gate_up", (rows, 2 * columns))
        y_MF = torch.empty(rows, columns)
        self._silu_multiply(gate_up_MF.data_ptr(), y_MF.data_ptr(), rows, columns)
        return y_MF

    def attention_inputs(
        self,
        qkv_TW: torch.Tensor,
        *,
        heads: int,
        norm: tuple[torch.Tensor, float] | None,
        rotations: torch.Tensor,
        slots: TokenSlots,
        kv: KvPages,
    ) -> None:
        """Turn what was projected into q, and into keys and values in their pages.

        Args:
            qkv_TW: the heads of q, k and v side by side. q's are replaced; k's and v's are then
                undefined.
            heads: query heads.
            norm: weights (query and KV heads, H) and epsilon of an RMS norm over each head.
            rotations: complex64, H / 2 a token: what pairs of neighbours are multiplied by.
            slots: of the tokens.
            kv: where keys and values go.
        """
        tokens, kv_heads, key_dim = qkv_TW.shape[0], kv.kv_heads, kv.key_dim
        width = heads * key_dim + kv_heads * (key_dim + kv.value_dim)
        check(qkv_TW, "qkv", (tokens, width))
        if norm is not None:
            check(norm[0], "norm", (heads + kv_heads, key_dim))
        if rotations.dtype != torch.complex64 or rotations.numel() != tokens * (key_dim // 2):
            raise ValueError(f"rotations are {rotations.dtype} {tuple(rotations.shape)}")
        _, page_of, offset_of = slots.addresses_for(tokens)
        self._attention_inputs(
            AttentionInputs(
                qkv_TW.data_ptr(),
                tokens,
                heads,
                None if norm is None else norm[0].data_ptr(),
                rotations.data_ptr(),
                page_of,
                offset_of,
                0.0 if norm is None else norm[1],
                kv.layer,
            )
        )

    def attention(
        self,
        q_TW: torch.Tensor,
        segments: Segments,
        kv: KvPages,
        *,
        heads: int,
        scale: float,
        round_inputs: bool = False,
    ) -> torch.Tensor:
        """Return causal attention over pages, float32 (T, heads · value dim).

        Args:
            q_TW: rows that begin with the query heads side by side.
            segments: the batch; its keys and values are in their pages already.
            kv: one layer's pages.
            heads: query heads, a multiple of the KV heads.
            scale: of the scores.
            round_inputs: round q, and the weights of the values, to bfloat16 and multiply pairs.
                Only with pages of bfloat16.
        """
        rows, width = q_TW.shape
        stride = _row_stride(q_TW, "q", width)
        if width < heads * kv.key_dim or heads % kv.kv_heads:
            raise ValueError(f"{heads} heads of {kv.key_dim} in rows of {width}")
        out = torch.empty(rows, heads * kv.value_dim)
        call = Attention(
            q_TW.data_ptr(),
            stride,
            out.data_ptr(),
            heads,
            *segments.addresses,
            scale,
            round_inputs and kv.pairs,
            kv.layer,
        )
        if self._attention(call):
            raise MemoryError(_NO_MEMORY)
        return out

    def layers(self, layers: ctypes.Array[DecoderLayer], step: Step) -> None:
        """Compute layers one after the other. `layers.py` knows what to put into them."""
        if self._layers(ctypes.addressof(layers), len(layers), step):
            raise MemoryError(_NO_MEMORY)

    def spin(self, repeats: int, *, pairs: bool = False) -> float:
        """Multiply and add on registers, by all threads; return the operations done.

        With `pairs`: on pairs of bfloat16.
        """
        work = self._library.penstock_spin_pairs if pairs else self._library.penstock_spin_products
        work.argtypes, work.restype = [c_int64, c_void_p], c_double
        sink = c_float()
        return float(work(repeats, ctypes.addressof(sink)))

    def read(self, memory: torch.Tensor) -> float:
        """Read contiguous memory once, by all threads; return the bytes read."""
        size = memory.nbytes // 256 * 256
        work = self._library.penstock_read
        work.argtypes, work.restype = [c_void_p, c_int64], c_uint64
        work(memory.data_ptr(), size)
        return float(size)


def _is_bfloat16(weight: torch.Tensor) -> bool:
    """Tell whether every element is one: the lower half of its float32 is zero."""
    if weight.dtype == torch.bfloat16:
        return True
    words = weight.float().contiguous().view(torch.int32)
    return not bool((words & _LOW_HALF).any())


def check(x: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless x is what a kernel will take its memory for."""
    if x.dtype is not torch.float32 or not x.is_cpu or x.shape != shape or not x.is_contiguous():
        raise _misread(x, name, f"torch.float32 {shape}, contiguous")


def _row_stride(x: torch.Tensor, name: str, columns: int) -> int:
    """Return the elements from row to row of a float32 matrix. Raises ValueError if x is none."""
    if x.dtype is torch.float32 and x.is_cpu and x.dim() == 2 and x.shape[1] == columns:
        if x.is_contiguous():
            return columns
        if x.stride(1) == 1:
            return x.stride(0)
    raise _misread(x, name, f"torch.float32 rows of {columns}")


def _misread(x: torch.Tensor, name: str, expected: str) -> ValueError:
    return ValueError(
        f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}, "
        f"expected {expected}, on the CPU"
    )

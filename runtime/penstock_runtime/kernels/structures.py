"""The structures of src/kernels.h, as ctypes takes them. A test compares their sizes."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class Linear(Structure):
    """A matrix product."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("weight", c_void_p),
        ("kind", c_int64),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("accumulate", c_int64),
    ]


class KvLayer(Structure):
    """How one layer lies in the pool."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("element", c_int64),
        ("page_size", c_int64),
        ("kv_heads", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("key_page_stride", c_int64),
        ("key_stride", c_int64),
        ("value_page_stride", c_int64),
        ("value_stride", c_int64),
    ]


class AttentionInputs(Structure):
    """What comes between projection and attention."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("qkv", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("norm", c_void_p),
        ("rotations", c_void_p),
        ("pages", c_void_p),
        ("offsets", c_void_p),
        ("epsilon", c_float),
        ("kv", KvLayer),
    ]


class Attention(Structure):
    """Attention of a batch."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("heads", c_int64),
        ("segments", c_int64),
        ("starts", c_void_p),
        ("lengths", c_void_p),
        ("first_rows", c_void_p),
        ("first_pages", c_void_p),
        ("pages", c_void_p),
        ("scale", c_float),
        ("pairs", c_int64),
        ("kv", KvLayer),
    ]


class Matrix(Structure):
    """A packed weight and its bias."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("weight", c_void_p),
        ("kind", c_int64),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
    ]


class DecoderLayer(Structure):
    """The weights of a layer, and its pages; null is the half that another stage has."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("attention_norm", c_void_p),
        ("qkv", Matrix),
        ("head_norm", c_void_p),
        ("output", Matrix),
        ("mlp_norm", c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("kv", KvLayer),
    ]


class LastRows(Structure):
    """The rows whose hidden states are wanted behind the last layer."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("attention", Attention),
    ]


class Step(Structure):
    """What a forward pass tells all layers."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("rows", c_int64),
        ("hidden", c_int64),
        ("element", c_int64),
        ("epsilon", c_float),
        ("positions", c_void_p),
        ("frequencies", c_void_p),
        ("magnitude", c_double),
        ("inputs", AttentionInputs),
        ("attention", Attention),
        ("last", POINTER(LastRows)),
    ]

"""Backbones in 8 bits: an exact offline rotation, then W8A8 with integer sums."""

from sarm.quantization.int8 import Int8Decoder, quantize_backbone
from sarm.quantization.layer import Int8DecoderLayer
from sarm.quantization.rotation import Rotation, rotate_layer

__all__ = ["Int8Decoder", "Int8DecoderLayer", "Rotation", "quantize_backbone", "rotate_layer"]

"""A graph of OpenVINO's before it is written: 4-bit codes packed by twos, and the runtime free to choose its precision."""

from __future__ import annotations

from typing import Any

import numpy as np

NIBBLES = {"i4": (-8, 7), "u4": (0, 15)}
"""OpenVINO's types of four bits, and what they hold."""


def pack_nibbles(program: Any) -> None:
    """Constants of bytes that four bits hold take four bits: codes, whose layers read them by rows or turn them into floats.

    The values are the same, and the runtime multiplies with them as they are. What has an odd count is left.
    """
    import openvino

    for node in program.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() not in (openvino.Type.i8, openvino.Type.u8):
            continue
        readers = list(node.output(0).get_target_inputs())
        values = node.data
        fit = [kind for kind, (low, high) in NIBBLES.items() if values.size and low <= values.min() and values.max() <= high]
        if not fit or values.size % 2 or any(one.get_node().get_type_name() not in ("Convert", "Gather") for one in readers):
            continue
        packed = openvino.Tensor(getattr(openvino.Type, fit[0]), openvino.Shape(values.shape))
        flat = values.reshape(-1).view(np.uint8) & 15
        packed.data.reshape(-1).view(np.uint8)[:] = flat[::2] | flat[1::2] << 4  # the first in the lower half
        constant = openvino.opset14.constant(packed)
        for one in readers:
            one.replace_source_output(constant.output(0))


def free_precision(program: Any) -> None:
    """Drop the precision that the exporter records, float32 for a model in float32: it would keep a processor that multiplies
    bfloat16 from doing so, which is OpenVINO's own choice there. That of caches stays."""
    options, kept = "runtime_options", "KV_CACHE_PRECISION"
    recorded = program.get_rt_info([options, kept]).value if program.has_rt_info([options, kept]) else None
    program.set_rt_info({} if recorded is None else {kept: recorded}, options)

"""Python that computes with an export by its runtime alone, from `inputs` of a tokenizer: logits, or the likeliest text."""

from __future__ import annotations

from typing import Any

from hfcompress.export.graphs import DECODER, ENCODER

OPENVINO = {
    "answers": """\
import openvino

model = openvino.Core().compile_model("FOLDER/openvino_model.xml", "CPU")
logits = model(dict(inputs))["logits"]""",
    "goes on": """\
import numpy as np
import openvino

model = openvino.Core().compile_model("FOLDER/openvino_model.xml", "CPU").create_infer_request()
takes = {name for port in model.model_inputs for name in port.names}
ids = new = inputs["input_ids"]
for _ in range(20):  # the likeliest token each time; the model keeps what it has read
    places = np.arange(ids.shape[1])[None].repeat(len(ids), 0)[:, -new.shape[1] :]
    feed = {"input_ids": new, "attention_mask": np.ones_like(ids), "position_ids": places}
    feed["beam_idx"] = np.arange(len(ids), dtype=np.int32)
    logits = model.infer({name: value for name, value in feed.items() if name in takes})["logits"]
    new = logits[:, -1:].argmax(-1)
    ids = np.concatenate([ids, new], 1)
print(tokenizer.batch_decode(ids))""",
    "reads and writes": """\
import numpy as np
import openvino

core = openvino.Core()
encoder = core.compile_model("FOLDER/openvino_encoder.xml", "CPU").create_infer_request()
decoder = core.compile_model("FOLDER/openvino_decoder.xml", "CPU").create_infer_request()
said = encoder.infer(dict(inputs))
read = {port.any_name: said[port] for port in encoder.model_outputs}
ids = new = np.full((len(next(iter(read.values()))), 1), START)
read |= {**inputs, "beam_idx": np.arange(len(ids), dtype=np.int32)}
takes = {name for port in decoder.model_inputs for name in port.names}
for _ in range(20):  # the likeliest token each time; the decoder keeps what it has written
    logits = decoder.infer({"decoder_input_ids": new, **{name: read[name] for name in takes & read.keys()}})["logits"]
    new = logits[:, -1:].argmax(-1)
    ids = np.concatenate([ids, new], 1)
print(tokenizer.batch_decode(ids))""",
    "reads": """\
import openvino

encoder = openvino.Core().compile_model("FOLDER/openvino_encoder.xml", "CPU")
hidden = encoder(dict(inputs))[0]  # which openvino_decoder.xml takes""",
}
ONNX = {
    "answers": """\
import onnxruntime

model = onnxruntime.InferenceSession("FOLDER/model.onnx")
logits = model.run(["logits"], dict(inputs))[0]""",
    "goes on": """\
import numpy as np
import onnxruntime

model = onnxruntime.InferenceSession("FOLDER/model.onnx")
takes, gives = model.get_inputs(), [one.name for one in model.get_outputs()]
ids = new = inputs["input_ids"]
cache = {one.name: np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32) for one in takes if "past" in one.name}
for _ in range(20):  # the likeliest token each time; the cache comes out of a step and goes into the next
    places = np.arange(ids.shape[1])[None].repeat(len(ids), 0)[:, -new.shape[1] :]
    feed = {"input_ids": new, "attention_mask": np.ones_like(ids), "position_ids": places, **cache}
    said = dict(zip(gives, model.run(None, {one.name: feed[one.name] for one in takes})))
    cache = {name: said[name.replace("input.", "output.")] for name in cache}
    new = said["logits"][:, -1:].argmax(-1)
    ids = np.concatenate([ids, new], 1)
print(tokenizer.batch_decode(ids))""",
    "reads and writes": """\
import numpy as np
import onnxruntime

encoder, decoder = (onnxruntime.InferenceSession(f"FOLDER/{graph}.onnx") for graph in ("encoder", "decoder"))
read = dict(zip([one.name for one in encoder.get_outputs()], encoder.run(None, dict(inputs)))) | dict(inputs)
takes, gives = decoder.get_inputs(), [one.name for one in decoder.get_outputs()]
ids = new = np.full((len(next(iter(read.values()))), 1), START)
cache = {one.name: np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32) for one in takes if "past" in one.name}
for _ in range(20):  # the likeliest token each time; the cache comes out of a step and goes into the next
    feed = {"decoder_input_ids": new, **read, **cache}
    said = dict(zip(gives, decoder.run(None, {one.name: feed[one.name] for one in takes})))
    cache = {name: said[name.replace("input.", "output.")] for name in cache}
    new = said["logits"][:, -1:].argmax(-1)
    ids = np.concatenate([ids, new], 1)
print(tokenizer.batch_decode(ids))""",
    "reads": """\
import onnxruntime

encoder = onnxruntime.InferenceSession("FOLDER/encoder.onnx")
hidden = encoder.run(None, dict(inputs))[0]  # which decoder.onnx takes""",
}


def code_of(snippets: dict[str, str], folder: str, told: dict[str, Any]) -> str:
    """The one for what an export does. `told`: what `exported.json` holds."""
    if {ENCODER, DECODER} <= set(told["graphs"]):
        what = "reads and writes" if told.get("caches") else "reads"
    else:
        what = "goes on" if told.get("caches") else "answers"
    return snippets[what].replace("FOLDER", folder).replace("START", str(told.get("start", 0)))

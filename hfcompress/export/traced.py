"""Formats whose graphs transformers' own exporters trace: how they are traced, quantised and written."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from transformers.utils import logging as transformers_logging

from hfcompress.checkpoint.errors import CompressionError, first_line
from hfcompress.export.base import Format, Source
from hfcompress.export.graphs import cached_layers, graphs_of, writes
from hfcompress.export.onnx_blocks import IN_FLOAT32, IN_INTEGERS, blocks_of, in_blocks
from hfcompress.export.openvino_graph import free_precision, pack_nibbles
from hfcompress.export.plain import plain
from hfcompress.export.snippets import ONNX, OPENVINO, code_of
from hfcompress.layers.kernels import FULL, levels
from hfcompress.layers.stored import StoredLinear


class Traced(Format):
    """A format that transformers' exporters write: graphs and what is known of them, in one folder."""

    quantize: Literal["int8"] | None = Field(
        default=None, description="int8: products in integers, weights and activations, chosen on samples of the training data."
    )
    samples: PositiveInt = Field(default=128, description="Training examples to choose int8 on.")

    program: ClassVar[str]
    """How the file of a graph is called, as a format of its name."""
    begins_empty: ClassVar[bool] = True
    """Whether its runtime takes a cache that holds no token yet."""

    @property
    def place(self) -> str:
        return f"{self.key()}-{self.quantize}" if self.quantize else self.key()

    def exporter(self) -> Any:
        raise NotImplementedError

    def config(self, **how: Any) -> Any:
        """The exporter's own config."""
        raise NotImplementedError

    def quantizer(self, samples: list[dict[str, Any]]) -> Any:
        """transformers' quantiser for int8, on these inputs."""
        raise NotImplementedError

    def finish(self, program: Any) -> None:
        """What a runtime's graph still needs before it is written."""

    def written(self, module: Any) -> AbstractContextManager[None]:
        """While a graph is traced, its layers are what this format has operators for."""
        return nullcontext()

    def multiplies_codes(self, model: Any) -> bool:
        """Whether the runtime itself rounds what such layers of codes read."""
        return False

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        from transformers.exporters import ExportedModel

        by_codes = self.quantize is not None and source.model.can_generate()
        model = plain(source.model, keep_codes=self.quantize is None or by_codes)
        if by_codes and not self.multiplies_codes(model):
            raise CompressionError(
                f"export to {self.key()}: quantize: int8 is for models that answer at once, not for those that write; leave it "
                f"out, and give the model codes before: quantize: {{bits: 4, engine: hfcompress, group_size: 32}}."
            )
        components: dict[str, Any] = {}
        caches: list[list[int]] = []
        with quiet_exporters(), torch.no_grad():
            exporter = self.exporter()
            for name, graph in graphs_of(source, self.begins_empty).items():
                how = {"quantizer": self.quantizer(self._samples(source))} if self.quantize and not by_codes else {}
                try:
                    with self.written(graph.module):
                        config = self.config(dynamic_shapes=graph.axes, **how)
                        traced = exporter.export(graph.module, graph.inputs, config=config)
                except Exception as error:  # of torch.export, the converters and the quantisers, which have one each
                    raise CompressionError(
                        f"export to {self.key()}: {type(model).__name__} can't be traced ({type(error).__name__}: "
                        f"{first_line(error)}); other formats may take it, and transformers' exporters are where it failed."
                    ) from error
                components[name] = traced.components["model"]
                self.finish(components[name].program)
                caches = [[*one.keys.shape[1::2], one.values.shape[3]] for one in cached_layers(graph.inputs)]
            generation = model.generation_config if model.can_generate() else None
            ExportedModel(components, exporter.export_format, model.config, generation).save_pretrained(folder)
        start = getattr(generation, "decoder_start_token_id", None)
        start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
        told = {"caches": caches or None, "start": start}
        return {"graphs": list(components), **{name: value for name, value in told.items() if value is not None}}

    def _samples(self, source: Source) -> list[dict[str, Any]]:
        """Single examples: those of a batch are padded to the longest, and pads would widen what is seen."""
        return [dict(batch) for batch in source.samples(self.samples)]

    def file(self, graph: str) -> str:
        return self.program.format(graph)


class Openvino(Traced):
    """OpenVINO's intermediate representation: fast on CPUs, Intel's GPUs and NPUs.

    Needs: openvino; nncf for quantize. Buys: fused graphs, bfloat16 where the processor multiplies it (unless it is opened with
    INFERENCE_PRECISION_HINT: f32), codes that stay codes, of 4 bits too. Costs: a folder that runs in OpenVINO alone, and can
    be trained no more.
    """

    packages: ClassVar[dict[str, str]] = {"openvino": "openvino"}
    program: ClassVar[str] = "openvino_{}.xml"

    def check_here(self) -> None:
        super().check_here()
        if self.quantize:
            self.require({"nncf": "nncf"})

    def exporter(self) -> Any:
        from transformers.exporters import OpenVINOExporter

        return OpenVINOExporter()

    def config(self, **how: Any) -> Any:
        from transformers.exporters import OpenVINOConfig

        return OpenVINOConfig(**how)

    def quantizer(self, samples: list[dict[str, Any]]) -> Any:
        from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig

        return NNCFOpenVINOQuantizer(NNCFQuantizationConfig(subset_size=len(samples)), samples)

    def finish(self, program: Any) -> None:
        pack_nibbles(program)
        free_precision(program)

    def snippet(self, name: str, told: dict[str, Any]) -> str:
        return code_of(OPENVINO, name, told)


class Onnx(Traced):
    """ONNX, as ONNX Runtime reads it: servers, browsers, phones.

    Needs: onnx, onnxscript, onnxruntime. Buys: a graph for a dozen runtimes; codes stay codes in the file, those of 4 bits and
    those in groups as ONNX Runtime's own operator for them (MatMulNBits), with which models that write may round inputs too.
    Costs: codes of rows are unpacked when the file is opened; quantize: int8 rounds what is multiplied as it comes, on
    processors without VNNI to 7 bits, where 8 would overflow.
    """

    packages: ClassVar[dict[str, str]] = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}
    program: ClassVar[str] = "{}.onnx"

    def exporter(self) -> Any:
        from transformers.exporters import OnnxExporter

        return OnnxExporter()

    def config(self, **how: Any) -> Any:
        from transformers.exporters import OnnxConfig

        return OnnxConfig(**how)

    def quantizer(self, samples: list[dict[str, Any]]) -> Any:
        from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

        how = OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=levels() < FULL, op_types_to_quantize=["MatMul", "Gemm"])
        return OnnxRuntimeQuantizer(how)

    def written(self, module: Any) -> AbstractContextManager[None]:
        return in_blocks(module, IN_INTEGERS if self.quantize else IN_FLOAT32)

    def multiplies_codes(self, model: Any) -> bool:
        layers = [one for one in model.modules() if isinstance(one, StoredLinear)]
        return any(blocks_of(one) is not None and one.offset is None for one in layers)  # of an offset it unpacks them

    def snippet(self, name: str, told: dict[str, Any]) -> str:
        return code_of(ONNX, name, told)


class Executorch(Traced):
    """ExecuTorch's programs, for phones and other devices, by XNNPACK.

    Needs: executorch; a model that is no causal language model. Buys: PyTorch's own runtime of a few megabytes.
    Costs: codes are worked out at each forward.
    """

    quantize: None = Field(default=None, description="Not offered here.")

    packages: ClassVar[dict[str, str]] = {"executorch": "executorch"}
    program: ClassVar[str] = "{}.pte"
    begins_empty: ClassVar[bool] = False

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        if writes(source.model):
            raise CompressionError(
                f"export to executorch: {type(source.model).__name__} goes on with a cache, and a program can't begin with an "
                f"empty one; export it to gguf, onnx or openvino."
            )
        return super().write(source, folder)

    def exporter(self) -> Any:
        from transformers.exporters import ExecutorchExporter

        return ExecutorchExporter()

    def config(self, **how: Any) -> Any:
        from transformers.exporters import ExecutorchConfig

        return ExecutorchConfig(**how)

    def snippet(self, name: str, told: dict[str, Any]) -> str:
        lines = ["from executorch.runtime import Runtime", ""]
        lines += [f'program = Runtime.get().load_program("{name}/{self.file(told["graphs"][0])}")']
        return "\n".join([*lines, 'outputs = program.load_method("forward").execute(list(inputs.values()))[0]'])


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Without what converters say of themselves, in warnings, logs and on stdout; as before afterwards."""
    names = (
        "",  # onnxruntime's quantiser speaks to the root
        "torch.onnx",
        "torch.export",
        "nncf",
        "openvino",
        "onnxscript",
        "onnx_ir",
        "torch.fx",
        "torch._dynamo",
        "torch._export",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels, verbosity = [one.level for one in loggers], transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)

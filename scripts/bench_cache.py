"""What the cache of generation costs as it is and in 8, 4 and 2 bits: bytes a token, perplexity through it, time a token.

python scripts/bench_cache.py                    # SmolLM2-135M on half a novel; 4 and 2 bits where optimum-quanto is installed
python scripts/bench_cache.py --model FOLDER     # any decoder that caches, with its tokenizer
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from demo import SMOL
from transformers import AutoModelForCausalLM

import hfcompress
from hfcompress import QuantizeCache
from hfcompress.results.kv_cache import cache_costs
from hfcompress.tasks.pretrained import load_tokenizer, open_model

TEXT = Path(hfcompress.__file__).parent / "tasks" / "alice.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--prompt", type=int, default=64)
    given = parser.parse_args()
    model = open_model(given.model, AutoModelForCausalLM, dtype=given.dtype)
    ids = load_tokenizer(given.model)(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, : given.tokens]
    print(
        json.dumps({"model": given.model, "dtype": given.dtype, "threads": torch.get_num_threads(), "on": platform.processor()})
    )
    for bits in (None, 8, *((4, 2) if find_spec("optimum") else ())):
        if bits:
            QuantizeCache(bits=bits).run(model, None)
        started = time.perf_counter()
        costs = cache_costs(model, ids, given.prompt)
        took = (time.perf_counter() - started) * 1000 / (ids.shape[1] - given.prompt)
        print(json.dumps({"bits": bits, **costs._asdict(), "ms_per_token": round(took, 1)}), flush=True)


if __name__ == "__main__":
    main()
